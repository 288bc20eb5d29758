"""Image encoders that are not CLIP's: (B, 3, H, W) -> (B, D), by name.

    vgg16              VGG-16 as in the paper (Simonyan & Zisserman 2015, arXiv 1409.1556)
    timm:NAME          any model of timm
    torchvision:NAME   any classifier of torchvision that ends in a linear layer

The last two need those packages installed. Each encoder has the attributes `image_size` (pixels),
`mean` and `std` (per channel, for images in 0..1): what images it reads.

Copy together with: nothing; needs torch>=2.4. Read from the top.
"""

import re
import sys
from collections.abc import Callable
from importlib import import_module
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

# torchvision's ImageNet weights
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_image_encoder(
    name: str,
    dim: int,
    *,
    weights: str | PathLike | None = None,
    download: Callable[[str, str], PathLike] | None = None,
) -> nn.Module:
    """An image encoder (B, 3, H, W) -> (B, dim).

    Args:
        name: "vgg16", "timm:NAME" or "torchvision:NAME".
        dim: D of the joint space; the encoder's last layer is replaced by a new linear one to D.
        weights: None for random weights, "imagenet" for the public ones, or a state dict file (.pt,
            .pth) of the same architecture, e.g. VGG-16 trained on IMDB-WIKI; its last layer is left
            out.
        download: function (url, sha256) -> path that fetches vgg16's public file.

    Raises ValueError for an unknown name or weights that do not fit, FileNotFoundError for missing
    weights, ImportError where the package is absent.
    """
    is_imagenet = weights == "imagenet"
    path = None if is_imagenet else weights
    package, _, model_name = name.partition(":")
    builders = {"timm": _timm, "torchvision": _torchvision}
    if name == "vgg16":
        if is_imagenet and download is None:
            raise ValueError(
                "vgg16 with weights='imagenet' needs download=, a function (url, sha256) -> path, "
                "such as clip_weights.download; or give the path of its weights"
            )
        encoder = VGG16(dim)
        path = download(VGG16_URL, VGG16_SHA256) if is_imagenet else weights
    elif package in builders and model_name:
        try:
            module = import_module(package)
        except ImportError as error:
            message = f"image encoder {name} needs {package}: pip install {package}"
            raise ImportError(message) from error
        encoder = builders[package](module, model_name, dim, is_imagenet)
    else:
        expected = "expected one of vgg16, timm:NAME, torchvision:NAME"
        raise ValueError(f"image encoder {name!r}: {expected}")
    if path is not None:
        _load(encoder, path)
    return encoder


class VGG16(nn.Module):
    """VGG-16 without batch norm, dropout 0.5, last layer 4096 -> D without bias, 224 x 224 only.

    Parameters are named as torchvision's. Source: xk-huang/OrdinalCLIP@ca10a20
    ordinalclip/models/image_encoders/vgg.py#L33-L68.
    """

    image_size, mean, std = 224, IMAGENET_MEAN, IMAGENET_STD
    last_layer = "classifier.6"

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers, channels = [], 3
        for size in _VGG16:
            if size == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, size, 3, padding=1), nn.ReLU(inplace=True)]
                channels = size
        self.features = nn.Sequential(*layers)
        layers = []
        for width in (512 * 7 * 7, 4096):
            layers += [nn.Linear(width, 4096), nn.ReLU(inplace=True), nn.Dropout()]
        self.classifier = nn.Sequential(*layers, nn.Linear(4096, dim, bias=False))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(self.classifier[-1].weight, mode="fan_out", nonlinearity="linear")

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 224, 224) -> (B, D). Raises ValueError for another size."""
        if images.shape[-2:] != (224, 224):
            raise ValueError(f"vgg16 got images {tuple(images.shape)}; expected (B, 3, 224, 224)")
        return self.classifier(self.features(images).flatten(1))  # (B, D)


def _timm(timm, name, dim, pretrained):
    encoder = timm.create_model(name, pretrained=pretrained, num_classes=dim)
    settings = encoder.default_cfg
    encoder.image_size, encoder.last_layer = settings["input_size"][-1], settings["classifier"]
    encoder.mean, encoder.std = settings["mean"], settings["std"]
    return encoder


def _torchvision(torchvision, name, dim, pretrained):
    encoder = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    layers = [key for key, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"torchvision:{name}: expected a classifier that ends in a linear layer")
    parent, _, child = layers[-1].rpartition(".")
    width = encoder.get_submodule(layers[-1]).in_features
    setattr(encoder.get_submodule(parent), child, nn.Linear(width, dim))
    encoder.image_size, encoder.last_layer = 224, layers[-1]
    encoder.mean, encoder.std = IMAGENET_MEAN, IMAGENET_STD
    return encoder


# What training puts around a state dict, and before its names
_WRAPPERS = "state_dict model_state_dict model net module params model_ema ema".split()
_PREFIXES = re.compile(r"((module|_orig_mod|model|net|backbone|image_encoder)\.)+")


def _load(encoder, path):
    """Load a state dict file except for the last layer, whose size is another task's."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; expected 'imagenet' or a state dict file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own
        reason = type(error).__name__  # torch's text advises to trust the file
        message = f"{path} cannot be read as a state dict ({reason}); save state_dict() alone"
        raise ValueError(message) from error
    removed = set()
    while isinstance(state, dict) and (key := next(filter(state.__contains__, _WRAPPERS), "")):
        state = state[key]
        removed.add(key)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}; expected a state dict")
    last_layer, expected, entries = encoder.last_layer + ".", encoder.state_dict(), {}
    for key, value in state.items():
        name = str(key)
        if name not in expected and (prefix := _PREFIXES.match(name)):
            name = name.removeprefix(prefix[0])
            removed.add(prefix[0])
        if not name.startswith(last_layer):
            entries[name] = value
    got = {(name, getattr(value, "shape", None)) for name, value in entries.items()}
    wanted = {(name, v.shape) for name, v in expected.items() if not name.startswith(last_layer)}
    if mismatched := sorted({name for name, _ in got ^ wanted}):
        raise ValueError(
            f"{path} does not fit {type(encoder).__name__}: {len(mismatched)} entries missing, "
            f"unexpected or of another shape, e.g. {', '.join(mismatched[:3])}"
        )
    for name, value in entries.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds nan or inf; get the file again")
    if removed:
        print(f"{path}: without {', '.join(map(repr, sorted(removed)))}", file=sys.stderr)
    encoder.load_state_dict(entries, strict=False)
