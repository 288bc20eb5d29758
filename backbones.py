"""Image encoders that are not CLIP's: (B, 3, H, W) -> (B, D), by name.

    vgg16                VGG-16 as in the paper (Simonyan & Zisserman 2015, arXiv 1409.1556)
    timm:NAME            any model of timm          torchvision:NAME     any classifier of torchvision

The last two need those packages installed. An encoder says what images it reads: `image_size`, `mean`, `std`.

Copy-paste: needs torch>=2.4.
"""

from pathlib import Path

import torch
from torch import nn

VGG16_URL = (
    "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's ImageNet weights
)
VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = "vgg16, timm:NAME, torchvision:NAME"


def build_image_encoder(name, dim, *, weights=None, download=None):
    """An image encoder (B, 3, H, W) -> (B, dim).

    Args:
        name: "vgg16", "timm:NAME" or "torchvision:NAME".
        dim: D of the joint space; the encoder's last layer is replaced by a new linear one to D.
        weights: None for random weights, "imagenet" for the public ones, or a state dict file (.pt, .pth)
            of the same architecture, e.g. VGG-16 trained on IMDB-WIKI; its last layer is left out.
        download: function (url, sha256) -> path that fetches vgg16's public file.

    Raises ValueError for an unknown name or weights that do not fit, ImportError where the package is absent.
    """
    kind, _, model = name.partition(":")
    if name == "vgg16":
        encoder = VGG16(dim)
        path = download(VGG16_URL, VGG16_SHA256) if weights == "imagenet" else weights
    elif kind in ("timm", "torchvision") and model:
        encoder = {"timm": _timm, "torchvision": _torchvision}[kind](
            model, dim, weights == "imagenet"
        )
        path = None if weights == "imagenet" else weights
    else:
        raise ValueError(f"image encoder {name!r}: expected one of {KINDS}")
    if path is not None:
        _load(encoder, path)
    return encoder


class VGG16(nn.Module):
    """VGG-16 without batch norm, dropout 0.5, last layer 4096 -> D without bias, 224 x 224 pixels only.

    Parameters are named as torchvision's. Source: xk-huang/OrdinalCLIP@ca10a20
    ordinalclip/models/image_encoders/vgg.py#L33-L68.
    """

    image_size, mean, std = 224, IMAGENET_MEAN, IMAGENET_STD
    last_layer = "classifier.6"

    def __init__(self, dim):
        super().__init__()
        layers, channels = [], 3
        for size in _VGG16:
            if size == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, size, 3, padding=1), nn.ReLU(inplace=True)]
                channels = size
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, dim, bias=False),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(self.classifier[-1].weight, mode="fan_out", nonlinearity="linear")

    def forward(self, images):
        if images.shape[-2:] != (224, 224):
            raise ValueError(f"vgg16 got images {tuple(images.shape)}; expected (B, 3, 224, 224)")
        return self.classifier(self.features(images).flatten(1))  # (B, D)


def _timm(name, dim, pretrained):
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"image encoder timm:{name} needs timm: pip install timm") from error
    encoder = timm.create_model(name, pretrained=pretrained, num_classes=dim)
    settings = encoder.default_cfg
    encoder.image_size, encoder.last_layer = settings["input_size"][-1], settings["classifier"]
    encoder.mean, encoder.std = settings["mean"], settings["std"]
    return encoder


def _torchvision(name, dim, pretrained):
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"image encoder torchvision:{name} needs torchvision: pip install torchvision"
        ) from error
    encoder = models.get_model(name, weights="DEFAULT" if pretrained else None)
    layers = [key for key, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f"torchvision:{name} has no linear layer at its end; expected a classifier"
        )
    parent, _, child = layers[-1].rpartition(".")
    width = encoder.get_submodule(layers[-1]).in_features
    setattr(encoder.get_submodule(parent), child, nn.Linear(width, dim))
    encoder.image_size, encoder.last_layer = 224, layers[-1]
    encoder.mean, encoder.std = IMAGENET_MEAN, IMAGENET_STD
    return encoder


def _load(encoder, path):
    """Load a state dict file but for the last layer, whose size is the old task's."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; give 'imagenet' or a state dict file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own
        raise ValueError(
            f"{path} cannot be read as a state dict ({error}); save state_dict() alone"
        ) from error
    state = state.get("state_dict", state)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = encoder.state_dict()
    last = {key for key in own if key.startswith(encoder.last_layer + ".")}
    wrong = [
        key
        for key in {*own, *state} - last
        if not key.startswith(encoder.last_layer + ".")
        and (key not in own or key not in state or own[key].shape != state[key].shape)
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit {type(encoder).__name__}: {len(wrong)} entries missing, unexpected or of "
            f"another shape, e.g. {', '.join(sorted(wrong)[:3])}"
        )
    encoder.load_state_dict({key: own[key] if key in last else state[key] for key in own})
