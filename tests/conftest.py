"""What every test file needs before it is imported: the path, the interpreter, the markers."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that plain `pytest` finds the modules
torch.set_num_threads(2)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported

MARKERS = {
    "full": "the whole grid of shapes and dtypes, many minutes: pytest -m full",
    "benchmark": "prints a table of times, needs a GPU to mean anything: pytest -m benchmark",
}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if not config.option.markexpr:  # nothing chosen with -m: the short suite
        config.option.markexpr = " and ".join(f"not {name}" for name in MARKERS)
