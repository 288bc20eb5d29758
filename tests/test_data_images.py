"""pytest tests/test_data_images.py -- every image mode has the colours a person sees; ImageList."""

import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import ImageList, Sample, normalize, read_image


def saved(path, image, **options):
    image.save(path, **options)
    return np.asarray(read_image(path)).astype(int)


def png(path, depth, color_type, rows, *chunks):
    """A PNG of any bit depth, written by hand; Pillow writes few of them."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    width = {1: 8}.get(depth, 2)
    head = struct.pack(">IIBBBBB", width, len(rows), depth, color_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )
    return np.asarray(read_image(path)).astype(int)


GRAY16 = np.array([[0, 128, 129, 257], [32768, 40000, 65406, 65535]], np.uint16)
GRAY8 = np.array([[0, 0, 1, 1], [128, 156, 254, 255]])


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("RGB", (10, 120, 250), (10, 120, 250)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 120, 250, 255), (10, 120, 250)),
        ("RGBA", (10, 120, 250, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 250, 51), (204, 224, 254)),
        ("LA", (100, 0), (255, 255, 255)),
        ("LA", (0, 51), (204, 204, 204)),
        ("LA", (9, 255), (9, 9, 9)),
    ],
)
def test_png_modes(tmp_path, mode, color, expected):
    assert (
        saved(tmp_path / "x.png", Image.new(mode, (3, 2), color)).tolist()
        == [[list(expected)] * 3] * 2
    )


@pytest.mark.parametrize(
    "ending, options",
    [
        ("png", {}),
        ("gif", {}),
        ("png", dict(transparency=1)),
        ("gif", dict(transparency=1)),
        ("png", dict(transparency=bytes([255, 51, 255]))),
    ],
)
def test_palettes(tmp_path, ending, options):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([250, 0, 0, 0, 100, 250, 5, 6, 7])
    blue = {1: [255, 255, 255], None: [0, 100, 250]}.get(
        options.get("transparency"), [204, 224, 254]
    )
    assert saved(tmp_path / f"x.{ending}", image, **options)[0].tolist() == [
        [250, 0, 0],
        blue,
        [5, 6, 7],
    ]


def test_palette_with_alpha(tmp_path):
    image = Image.new("PA", (2, 1))
    image.putpalette([250, 0, 0, 0, 100, 250])
    image.putpixel((0, 0), (1, 255))
    image.putpixel((1, 0), (1, 51))
    assert np.asarray(data.to_rgb(image))[0].tolist() == [[0, 100, 250], [204, 224, 254]]


@pytest.mark.parametrize(
    "mode, ending",
    [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"), ("I", "tif"), ("I;16", "pgm")],
)
def test_sixteen_bits_are_scaled(tmp_path, mode, ending):
    raw = GRAY16.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    image = Image.frombytes(mode, (4, 2), raw.tobytes())
    pixels = saved(tmp_path / f"x.{ending}", image)
    assert (pixels == GRAY8[..., None]).all()


def test_sixteen_bit_pngs(tmp_path):
    wide = [struct.pack(">2H", 40000, 20000)] * 2
    assert png(tmp_path / "g.png", 16, 0, wide)[0].tolist() == [[156] * 3, [78] * 3]
    clear = (b"tRNS", struct.pack(">H", 20000))
    assert png(tmp_path / "t.png", 16, 0, wide, clear)[0].tolist() == [[156] * 3, [255] * 3]
    color = [struct.pack(">6H", 40000, 20000, 0, 65535, 257, 514)]
    assert png(tmp_path / "c.png", 16, 2, color)[0].tolist() == [[156, 78, 0], [255, 1, 2]]
    alpha = [struct.pack(">4H", 40000, 65535, 40000, 0)]
    assert png(tmp_path / "a.png", 16, 4, alpha)[0].tolist() == [[156] * 3, [255] * 3]


def test_twelve_bits_in_files_of_sixteen_are_named(tmp_path):
    """Also if one of them is of all 16 bits, a logo, say."""
    for i in range(22):
        pixels = np.full((4, 4), 4095 - i if i < 20 else 65535, "<u2")
        path = tmp_path / "own" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("I;16", (4, 4), pixels.tobytes()).save(path)
    task, errors = data.check_images(data.load(tmp_path / "own"))
    note = "; 20 images of 16 bits a pixel are near black, as they use only 12 bits: multiply"
    assert note + " their pixels by 16" in task.protocol and not errors
    for i in range(8):  # a depth map may be dark
        Image.frombytes("I;16", (4, 4), pixels.tobytes()).save(
            tmp_path / "own" / "0" / f"bright {i}.png"
        )
    assert "near black" not in data.check_images(data.load(tmp_path / "own"))[0].protocol


def test_gray_pngs_with_one_transparent_gray(tmp_path):
    eight = png(tmp_path / "8.png", 8, 0, [bytes([100, 200])], (b"tRNS", struct.pack(">H", 100)))
    assert eight[0].tolist() == [[255] * 3, [200] * 3]
    one = png(tmp_path / "1.png", 1, 0, [b"\xa0"], (b"tRNS", struct.pack(">H", 0)))
    assert (one == 255).all()


def test_tiff_in_which_zero_is_white(tmp_path):
    image = Image.frombytes("I;16", (4, 2), GRAY16.astype("<u2").tobytes())
    assert (
        saved(tmp_path / "x.tif", image, tiffinfo={262: 0}) - (255 - GRAY8[..., None]) == 0
    ).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "RGB"])
def test_jpeg_modes(tmp_path, mode):
    """A CMYK JPEG is stored inverted, with Adobe's marker; the colour must come back."""
    color = Image.new("RGB", (16, 16), (40, 90, 200))
    image = color.convert(mode)
    if mode == "CMYK":
        image = Image.new("CMYK", (16, 16), (215, 165, 55, 0))
    pixels = saved(tmp_path / "x.jpg", image, quality=100)
    expected = [87, 87, 87] if mode == "L" else [40, 90, 200]
    assert np.abs(pixels - expected).max() <= 3
    if mode == "CMYK":
        assert b"Adobe" in (tmp_path / "x.jpg").read_bytes()[:64]


def test_ycck_jpeg(tmp_path):
    """Photoshop's other CMYK: the same bytes read as luma, chroma, chroma, black."""
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (16, 16), (255 - 80, 127, 127, 0)).save(path, quality=100, subsampling=0)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"Adobe") + 11] = 2  # the transform: YCCK
    path.write_bytes(raw)
    assert np.abs(np.asarray(read_image(path)).astype(int) - (255 - 80)).max() <= 3


@pytest.mark.parametrize(
    "tag, turn",
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (6, lambda a: np.rot90(a, -1)),
        (8, np.rot90),
    ],
)
def test_exif_orientation(tmp_path, tag, turn):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x112] = tag
    result = saved(tmp_path / "x.png", Image.fromarray(pixels), exif=exif)
    assert (result == turn(pixels)).all()
    wide = Image.frombytes("I;16", (4, 2), GRAY16.astype("<u2").tobytes())
    assert (saved(tmp_path / "y.png", wide, exif=exif)[..., 0] == turn(GRAY8)).all()


def test_animation_gives_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ((250, 0, 0), (0, 250, 0))]
    for ending in ("gif", "png", "webp"):
        pixels = saved(
            tmp_path / f"x.{ending}",
            frames[0],
            save_all=True,
            append_images=frames[1:],
            lossless=True,
        )
        assert (pixels == [250, 0, 0]).all()


@pytest.mark.parametrize(
    "mode, value, words",
    [
        ("F", 0.5, "x.tif cannot be read as an image: floating point has no known white"),
        ("I", 70000, "x.tif cannot be read as an image: 70000 .. 70000 has no known white"),
        ("I", -5, "-5 .. -5 has no known white"),
    ],
)
def test_numbers_without_a_white(tmp_path, mode, value, words):
    with pytest.raises(ValueError, match=words):
        saved(tmp_path / "x.tif", Image.new(mode, (2, 2), value))


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_truncated_and_missing(tmp_path, ending):
    path = tmp_path / f"x y.{ending}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=f"x y.{ending} cannot be read as an image"):
        read_image(path)
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"x y.{ending} cannot be read as an image"):
        read_image(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"x y.{ending}: there is no such image"):
        read_image(path)


def test_broken_images_are_never_patched_up():
    for file in Path(data.__file__).parent.glob("*.py"):
        assert "LOAD_TRUNCATED" not in file.read_text()


# ---------------------------------------------------------------------------------------- ImageList


@pytest.fixture
def gradient(tmp_path):
    """A 90 x 60 image in which every pixel differs."""
    x, y = np.meshgrid(np.arange(90), np.arange(60))
    Image.fromarray(np.stack([x * 2, y * 4, (x + y)], -1).astype(np.uint8)).save(tmp_path / "g.png")
    return tmp_path


def test_centre_crop_is_exact(gradient):
    image, label = ImageList([Sample("g.png", 3)], gradient, image_size=56)[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 56, 56) and label == 3
    assert image.is_contiguous()
    resized = read_image(gradient / "g.png").resize((96, 64), Image.Resampling.BICUBIC)
    assert (image.permute(1, 2, 0).numpy() == np.asarray(resized)[4:60, 20:76]).all()


def test_no_resampling_when_the_size_fits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image, _ = ImageList([Sample(str(tmp_path / "x.png"), 0)], "elsewhere", image_size=56)[0]
    assert (image.permute(1, 2, 0).numpy() == pixels[4:60, 12:68]).all()


def test_squash_and_bilinear(gradient):
    image, _ = ImageList(
        [Sample("g.png", 0)], gradient, image_size=56, squash=True, resample="bilinear"
    )[0]
    resized = read_image(gradient / "g.png").resize((64, 64), Image.Resampling.BILINEAR)
    assert (image.permute(1, 2, 0).numpy() == np.asarray(resized)[4:60, 4:60]).all()
    with pytest.raises(ValueError, match="resample='nearest'; give bicubic or bilinear"):
        ImageList([], gradient, resample="nearest")


@pytest.mark.parametrize("size", [1, 32, 64, 96, 224, 336])
def test_sizes(gradient, size):
    for train in (False, True):
        image, _ = ImageList([Sample("g.png", 0)], gradient, image_size=size, train=train)[0]
        assert image.shape == (3, size, size)


def test_training_crops_and_mirrors(gradient):
    """Every crop is a window of the resized image, half of them mirrored, all positions reached."""
    images = ImageList([Sample("g.png", 0)], gradient, image_size=14, train=True)
    whole = np.asarray(read_image(gradient / "g.png").resize((24, 16), Image.Resampling.BICUBIC))
    windows = {
        whole[top : top + 14, left : left + 14].tobytes(): (top, left, 0)
        for top in range(3)
        for left in range(11)
    }
    windows |= {
        whole[top : top + 14, left : left + 14][:, ::-1].tobytes(): (top, left, 1)
        for top in range(3)
        for left in range(11)
    }
    torch.manual_seed(0)
    crops = [windows[images[0][0].permute(1, 2, 0).numpy().tobytes()] for _ in range(800)]
    assert len(set(crops)) == 66 and 0.45 < np.mean([mirror for *_, mirror in crops]) < 0.55


def test_workers_and_seeds(gradient):
    images = ImageList([Sample("g.png", i) for i in range(8)], gradient, image_size=14, train=True)

    def batches(workers, seed):
        loader = torch.utils.data.DataLoader(
            images, 4, num_workers=workers, generator=torch.Generator().manual_seed(seed)
        )
        torch.manual_seed(seed)
        return torch.cat([batch for batch, _ in loader])

    assert batches(0, 1).equal(batches(0, 1)) and not batches(0, 1).equal(batches(0, 2))
    assert batches(2, 1).equal(batches(2, 1)) and len(images) == 8


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    copy = images.clone()
    for mean, std in ((data.CLIP_MEAN, data.CLIP_STD), (data.IMAGENET_MEAN, data.IMAGENET_STD)):
        out = normalize(images, mean, std)
        exact = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(
            std
        ).double().view(3, 1, 1)
        assert out.dtype == torch.float32 and (out - exact).abs().max() < 1e-6
        with pytest.raises(ValueError, match="images are torch.float32; expected uint8 pixels"):
            normalize(images / 255, mean, std)
        half = normalize(images, mean, std, torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half.equal(out.bfloat16())
    assert images.equal(copy)


# ------------------------------------------------------------------------- large JPEGs, draft mode


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs with detail of all sizes: 1.9 megapixels, gray, CMYK, turned by EXIF."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    pixels = np.zeros((1200, 1600, 3), np.float32)
    for cells in (4, 16, 64, 256):
        noise = rng.normal(0, 60, (cells, cells, 3)).clip(-120, 120) + 128
        noise = Image.fromarray(noise.astype(np.uint8)).resize((1600, 1200), Image.BICUBIC)
        pixels += np.asarray(noise) / 4
    photo = Image.fromarray(pixels.astype(np.uint8))
    for mode in ("RGB", "L", "CMYK"):
        photo.convert(mode).save(folder / f"{mode}.jpg", quality=92)
    photo.save(folder / "progressive.jpg", quality=92, progressive=True)
    photo.crop((0, 0, 1600, 80)).save(folder / "strip.jpg", quality=92)
    for tag in range(1, 9):  # sides of no multiple of 8: the last pixels of a draft are partial
        exif = Image.Exif()
        exif[0x112] = tag
        photo.crop((0, 0, 1597, 1195)).save(folder / f"turned{tag}.jpg", quality=92, exif=exif)
    return folder


def mean_difference(image, other):
    return (image.float() - other.float()).abs().mean().item()


def exact_and_draft(path, **options):
    samples = [Sample(path.name, 0)]
    for draft in (False, True):
        torch.manual_seed(0)
        yield ImageList(samples, path.parent, draft=draft, **options)[0][0]


@pytest.mark.parametrize(
    "name", ["RGB", "L", "CMYK", "progressive", *map("turned{}".format, range(1, 9))]
)
def test_draft_is_close_to_the_image_in_full(photos, name):
    """Measured: 0.2 to 0.6 gray levels of 255; moved by one pixel: 5 or more."""
    for size, options in itertools.product(
        (56, 112, 224), ({}, dict(squash=True), dict(train=True))
    ):
        exact, draft = exact_and_draft(photos / f"{name}.jpg", image_size=size, **options)
        assert 0 < mean_difference(exact, draft) < 0.7
        assert min(mean_difference(exact, draft.roll(1, axis)) for axis in (1, 2)) > 4


def test_draft_of_a_strip_is_resized_in_the_crop_only(photos):
    for train in (False, True):
        exact, draft = exact_and_draft(photos / "strip.jpg", image_size=14, train=train)
        assert 0 < mean_difference(exact, draft) < 0.7


def test_draft_keeps_at_least_twice_the_size(photos):
    sizes = {
        draft: read_image(photos / "RGB.jpg", draft).size for draft in (None, 601, 600, 299, 1)
    }
    assert sizes == {
        None: (1600, 1200), 601: (1600, 1200), 600: (800, 600), 299: (400, 300), 1: (200, 150)
    }  # fmt: skip
    assert read_image(photos / "turned6.jpg", 298).size == (299, 400)
    assert ImageList([], photos, draft=True).draft == 512 and ImageList([], photos).draft is None


def test_draft_changes_no_other_file(photos, tmp_path):
    image = read_image(photos / "RGB.jpg")
    image.resize((800, 600)).save(tmp_path / "x.png")
    image.resize((400, 300)).save(tmp_path / "small.jpg")
    for name in ("x.png", "small.jpg"):
        exact, draft = exact_and_draft(tmp_path / name)
        assert exact.equal(draft)


@pytest.mark.parametrize("name", ["RGB", "progressive"])
def test_draft_finds_what_is_cut_off(photos, tmp_path, name):
    content = (photos / f"{name}.jpg").read_bytes()
    for share in (0.02, 0.3, 0.9, 0.999):
        (tmp_path / "cut.jpg").write_bytes(content[: int(len(content) * share)])
        for draft in (None, 299, 1):
            with pytest.raises(ValueError, match="cut.jpg cannot be read as an image"):
                read_image(tmp_path / "cut.jpg", draft)
