"""Images: any mode to RGB as a person sees it, resize and crop, normalize.

    images = ImageList(task.train, task.root, image_size=224, train=True)
    image, label = images[0]                               # uint8 (3, 224, 224), rank index
    batch = normalize(image[None], CLIP_MEAN, CLIP_STD)    # float32 (1, 3, 224, 224)

Dims: B images, S image size. Differs from the official code (xk-huang/OrdinalCLIP@ca10a20):
every image mode is read, not only RGB and L (ordinalclip/runner/data.py#L96); the aspect ratio is
kept (`squash=True`: as ordinalclip/runner/utils.py#L375).
Read on its own. Copy together with: nothing; needs torch>=2.4, numpy, pillow.
"""

import struct
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_ASPECT_RATIO = 16  # beyond it only the crop is resized: a 1 x 20,000 image would take 4 GB
EXIF_ORIENTATION = 274
TRANSPOSE = {  # to the upright image, by the value of that tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow warns of odd EXIF and large images without naming the file; what it cannot read it raises.
warnings.filterwarnings("ignore", module="PIL")


def read_image(path: str | Path, draft: int | None = None) -> Image.Image:
    """An image of any mode as a person sees it, in RGB.

    Upright by its EXIF tag, first frame, transparency on white, 16 bits scaled to 8. draft: a JPEG
    with more than twice as many pixels on its shorter side is decoded at 1/2, 1/4 or 1/8 of its
    size, so that at least that many remain. Raises ValueError for unreadable files, and where white
    is unknown: floating point, and 32-bit integers beyond 0 .. 65535.
    """
    try:
        with Image.open(path) as image:
            as_draft = draft and image.draft(None, (draft, draft))
            image.load()
            rgb, tag = to_rgb(image), _orientation(image)
            upright = rgb.transpose(TRANSPOSE[tag]) if tag in TRANSPOSE else rgb
            if as_draft:
                upright.info["draft_box"] = _upright_box(*as_draft[1][2:], upright.size, tag)
            return upright
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such image") from None
    except Exception as error:  # decoders raise many types
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _upright_box(
    width: float, height: float, size: tuple[int, int], tag: int | None
) -> tuple[float, float, float, float]:
    """Where the image is in its draft: the last row and column hold parts of a pixel."""
    width, height = (height, width) if tag in (5, 6, 7, 8) else (width, height)
    left = size[0] - width if tag in (2, 3, 6, 7) else 0
    top = size[1] - height if tag in (3, 4, 7, 8) else 0
    return left, top, left + width, top + height


def _orientation(image: Image.Image) -> int | None:
    """The EXIF tag, 1 .. 8, or None; also where the rest of the EXIF is damaged."""
    with suppress(Exception):  # struct.error, KeyError, TypeError, SyntaxError ...
        if orientation := image.getexif().get(EXIF_ORIENTATION):
            return orientation
    with suppress(struct.error):  # Pillow stops at a dangling pointer
        exif = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
        order = "<" if exif.startswith(b"II") else ">"
        start = struct.unpack_from(order + "I", exif, 4)[0]
        for i in range(struct.unpack_from(order + "H", exif, start)[0]):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, start + 2 + 12 * i)
            if tag == EXIF_ORIENTATION:
                return value


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> RGB, transparency on white. ValueError where white is unknown."""
    if image.mode == "F":
        raise ValueError("floating point has no known white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _integers_to_gray(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgb, rgba = Image.new("RGB", image.size, "white"), image.convert("RGBA")
    rgb.paste(rgba, mask=rgba)  # as alpha_composite, in half its memory
    return rgb


def _integers_to_gray(image: Image.Image) -> Image.Image:
    gray = np.asarray(image)  # (H, W)
    if gray.min() < 0 or gray.max() > 65535:
        raise ValueError(f"{gray.min()} .. {gray.max()} has no known white; save it with 16 bits")
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(258) == (12,) else 65535  # TIFF with 12 bits a pixel
    levels = np.arange(65536)
    if tags.get(262) == 0:  # TIFF in which 0 is white
        levels = white - levels
    levels = ((levels * 255 + white // 2) // white).astype(np.uint8)
    if "transparency" in image.info:
        levels[image.info["transparency"]] = 255
    return Image.fromarray(levels[gray])


class ImageList(torch.utils.data.Dataset):
    """Samples as (uint8 tensor (3, S, S), label): resized, then cropped.

    The shorter side becomes round(S * 256 / 224); with squash both do, as in the official code.
    train: crop at random and, with flip, mirror half the time; otherwise the crop is the centre.
    draft: decode large JPEGs at least twice as large as they become, not in full; much faster.
    Random numbers are torch's, so the seeds of a DataLoader govern them.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        root: str | Path,
        *,
        image_size: int = 224,
        train: bool = False,
        flip: bool = True,
        squash: bool = False,
        resample: str = "bicubic",
        draft: bool = False,
    ) -> None:
        if resample not in ("bicubic", "bilinear"):
            raise ValueError(f"resample={resample!r}; give bicubic or bilinear")
        self.samples, self.root = samples, Path(root)  # no copy: workers share Samples
        self.image_size, self.side = image_size, round(image_size * 256 / 224)
        self.train, self.flip, self.squash = train, flip, squash
        self.draft = 2 * self.side if draft else None
        self.resample = Image.Resampling[resample.upper()]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.prepare(read_image(self.root / path, self.draft)), label

    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB image of any size -> uint8 (3, S, S)."""
        x0, y0, x1, y1 = whole = image.info.get("draft_box", (0, 0, *image.size))
        side, edges = self.side, (x1 - x0, y1 - y0)
        size = [side if self.squash else int(side * edge // min(edges)) for edge in edges]
        margin = [edge - self.image_size for edge in size]  # beyond the crop
        if self.train:
            left, top = (int(torch.randint(edge + 1, ())) for edge in margin)
        else:
            left, top = (round(edge / 2) for edge in margin)
        right, bottom = left + self.image_size, top + self.image_size
        if max(size) <= MAX_ASPECT_RATIO * side:
            image = image.resize(size, self.resample, whole).crop((left, top, right, bottom))
        else:
            x, y = edges[0] / size[0], edges[1] / size[1]  # pixels of the file per pixel
            box = (x0 + left * x, y0 + top * y, x0 + right * x, y0 + bottom * y)
            image = image.resize((self.image_size,) * 2, self.resample, box)
        if self.train and self.flip and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image))  # (S, S, 3)
        return pixels.permute(2, 0, 1).contiguous()  # (3, S, S)


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 images (B, 3, H, W) -> (images / 255 - mean) / std (B, 3, H, W), on their device.

    ValueError for other dtypes: floats in 0 .. 1 would be divided by 255 again.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; expected uint8 pixels, 0 .. 255")
    mean, std = (torch.tensor(rgb, device=images.device).view(3, 1, 1) for rgb in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std).to(dtype)
