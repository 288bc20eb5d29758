"""pytest tests/test_backbones.py -- image encoders that are not CLIP's."""

import sys

import pytest
import torch

from backbones import VGG16, VGG16_SHA256, VGG16_URL, build_image_encoder


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    return VGG16(8).eval()


def released(vgg, classes):
    """A state dict as torchvision releases it: same names, last layer 4096 -> classes with bias."""
    last = {
        "classifier.6.weight": torch.zeros(classes, 4096),
        "classifier.6.bias": torch.zeros(classes),
    }
    state = {k: v for k, v in vgg.state_dict().items() if not k.startswith("classifier.6")}
    return last | {  # large tensors expanded: no 500 MB to write
        k: v + 1 if v.numel() < 10**7 else v.new_zeros(1).expand(v.shape) for k, v in state.items()
    }


def test_vgg16_is_the_papers(vgg):
    shapes = {name: tuple(p.shape) for name, p in vgg.named_parameters()}
    assert shapes["features.0.weight"] == (64, 3, 3, 3)
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    assert shapes["classifier.0.weight"] == (4096, 25088)
    assert shapes["classifier.6.weight"] == (8, 4096) and "classifier.6.bias" not in shapes
    assert sum(p.numel() for p in vgg.parameters()) == 134_260_544 + 8 * 4096
    torch.manual_seed(0)
    out = vgg(torch.randn(2, 3, 224, 224))
    assert out.shape == (2, 8) and out.std() > 0
    message = r"vgg16 got images \(1, 3, 256, 256\); expected \(B, 3, 224, 224\)"
    with pytest.raises(ValueError, match=message):
        vgg(torch.randn(1, 3, 256, 256))


def test_weights_are_loaded_but_for_the_last_layer(vgg, tmp_path):
    wrapped = {"state_dict": {f"module.{k}": v for k, v in released(vgg, 101).items()}}
    torch.save(wrapped, tmp_path / "imdb_wiki.pth")
    encoder = build_image_encoder("vgg16", 16, weights=str(tmp_path / "imdb_wiki.pth"))
    assert torch.equal(encoder.features[0].weight, vgg.features[0].weight + 1)
    assert torch.equal(encoder.classifier[3].bias, vgg.classifier[3].bias + 1)
    assert not encoder.classifier[0].weight.any()
    last = encoder.classifier[6].weight
    assert last.shape == (16, 4096) and last.std() > 0


def test_imagenet_weights_come_from_the_public_file_by_its_hash(small_encoder, tmp_path):
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3)}
    torch.save(state | {"1.weight": torch.ones(1000, 3)}, tmp_path / "vgg16.pth")
    requests = []

    def download(url, sha256):
        requests.append((url, sha256))
        return tmp_path / "vgg16.pth"

    encoder = build_image_encoder("vgg16", 16, weights="imagenet", download=download)
    assert requests == [(VGG16_URL, VGG16_SHA256)]
    assert torch.equal(encoder[0].weight, torch.ones(3, 2)) and encoder[1].weight.std() > 0


def test_weights_that_do_not_fit_are_refused(small_encoder, tmp_path):
    torch.save({"0.weight": torch.zeros(3, 5), "1.weight": torch.ones(9, 3)}, tmp_path / "x.pth")
    message = "does not fit Sequential: 2 entries .* 0.bias, 0.weight$"
    with pytest.raises(ValueError, match=message):
        build_image_encoder("vgg16", 16, weights=tmp_path / "x.pth")
    message = "no weights at .*none.pth; expected 'imagenet' or a state dict"
    with pytest.raises(FileNotFoundError, match=message):
        build_image_encoder("vgg16", 16, weights=tmp_path / "none.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="page.pth cannot be read as a state dict"):
        build_image_encoder("vgg16", 16, weights=tmp_path / "page.pth")


@pytest.mark.parametrize("name", ["vgg99", "timm", "timm:", "resnet50"])
def test_unknown_names_list_the_choices(name):
    message = f"image encoder '{name}': expected one of vgg16, timm:NAME, torchvision:NAME"
    with pytest.raises(ValueError, match=message):
        build_image_encoder(name, 8)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_an_absent_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    message = f"image encoder {package}:resnet18 needs {package}: pip install {package}"
    with pytest.raises(ImportError, match=message):
        build_image_encoder(f"{package}:resnet18", 8)


class FakeModels:
    """Stands in for torchvision.models, which has no CPU build to test with."""

    @staticmethod
    def get_model(name, weights=None):
        layers = [torch.nn.Flatten(), torch.nn.Linear(12, 10)]
        return torch.nn.Sequential(*layers[: 2 if name == "net" else 1])


def test_a_torchvision_classifier_gets_a_last_layer_of_our_size(monkeypatch):
    package = type(sys)("torchvision")
    package.models = FakeModels
    monkeypatch.setitem(sys.modules, "torchvision", package)
    encoder = build_image_encoder("torchvision:net", 8)
    assert encoder(torch.randn(3, 3, 2, 2)).shape == (3, 8) and encoder.last_layer == "1"
    with pytest.raises(
        ValueError, match="torchvision:headless: expected a classifier that ends in a linear layer"
    ):
        build_image_encoder("torchvision:headless", 8)


def test_public_weights_need_a_download_function():
    with pytest.raises(ValueError, match="needs download=, a function .url, sha256. -> path"):
        build_image_encoder("vgg16", 16, weights="imagenet")
