"""Shared by all test files: the path, the interpreter, the markers, small data and a finished run."""

import copy
import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel import pytest_runtestloop  # noqa: F401  pytest's hook
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that plain `pytest` finds the modules
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported

MARKERS = {
    "full": "the whole grid of shapes and dtypes, many minutes: pytest -m full",
    "benchmark": "prints a table of times, needs a GPU to mean anything: pytest -m benchmark",
}
TINY_MODEL = "--clip tiny --image-encoder clip --batch-size 16 --workers 0 --device cpu".split()
TINY = [*TINY_MODEL, "--lr", "0.002", "--epochs", "1"]  # flags of a run of seconds


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if not config.option.markexpr:  # nothing chosen with -m: the short suite
        config.option.markexpr = " and ".join(f"not {name}" for name in MARKERS)


@pytest.fixture(scope="session", autouse=True)
def made_once():
    """The vocabulary and the tiny CLIP of all runs of a process: a quarter of a short run."""
    import tokenizer
    import training.methods

    tiny_clip = functools.cache(training.methods.tiny_clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "load_merges", functools.cache(tokenizer.load_merges))
        patch.setattr(training.methods, "tiny_clip", lambda **o: copy.deepcopy(tiny_clip(**o)))
        yield


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """Features and downloads of a test stay in its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def stripes(tmp_path_factory):
    """Own data: 4 x 20 images, ranks by the number of stripes, every name with a space."""
    root = tmp_path_factory.mktemp("own data") / "stripes"
    rng = np.random.RandomState(0)
    for rank in range(4):
        (root / f"{rank + 1} stripes").mkdir(parents=True)
        for i in range(20):
            x = np.linspace(0, 2 * np.pi * (rank + 1), 80)[None, :, None]
            pixels = 128 + 100 * np.sin(x + rng.uniform(0, 6)) + rng.normal(0, 10, (80, 80, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / f"{rank + 1} stripes" / f"image {i}.png")
    return root


@pytest.fixture(scope="session")
def gray(tmp_path_factory):
    """Own data: 70 images of gray levels in 4 ranks, four times as many of the second rank."""
    root = tmp_path_factory.mktemp("gray") / "gray"
    rng = np.random.RandomState(0)
    for rank, count in enumerate((10, 40, 10, 10)):
        (root / f"{rank} gray").mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(60 + 40 * rank, 12, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{rank} gray" / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def finished_run(stripes, tmp_path_factory):
    """(folder, results) of one whole run of 3 epochs, read by many tests and changed by none."""
    import train

    run_dir = tmp_path_factory.mktemp("runs") / "a"
    argv = ["--data", str(stripes), "--out", str(run_dir), *TINY, "--epochs", "3"]
    return run_dir, train.main(argv)


def tiny_run(folder, *flags):
    """The Run of the tiny model on a folder of images, before training."""
    from training.methods import build_run
    from training.options import parse_args

    return build_run(parse_args(["--data", str(folder), *TINY, *flags]))


@pytest.fixture
def small_encoder(monkeypatch):
    """Stands in for VGG-16, which has 500 MB."""

    def build(dim):
        encoder = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, dim))
        encoder.last_layer = "1"
        return encoder

    monkeypatch.setattr("backbones.VGG16", build)
