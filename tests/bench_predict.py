"""python tests/bench_predict.py -- an exported model against the same encoder with a linear head.

RN50's image tower with random weights, 101 ranks; both get the same batches in turn, one process.
Prints median times, their ratio (lowest and highest), the time behind the encoder, and file sizes.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from clip_model import ModifiedResNet
from ordinalclip import FixedPrototypes, OrdinalCLIP

RANKS, DIM, ROUNDS = 101, 1024, 15


@torch.inference_mode()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    encoder = ModifiedResNet((3, 4, 6, 3), DIM, 224).eval().to(device)
    ours = OrdinalCLIP(encoder, FixedPrototypes(torch.randn(RANKS, DIM)), 4.6).eval().to(device)
    head = torch.nn.Linear(DIM, RANKS).to(device)
    linear = torch.nn.Sequential(encoder, head)
    for batch in (1, 8):
        images = torch.randn(batch, 3, 224, 224, device=device)
        features = encoder(images)
        alone = OrdinalCLIP(torch.nn.Identity(), ours.prototypes, 4.6).eval().to(device)
        compare(
            f"batch {batch}, whole", lambda: ours.predict(images), lambda: linear(images).softmax(1)
        )
        behind = f"batch {batch}, behind the encoder"
        compare(behind, lambda: alone.predict(features), lambda: head(features).softmax(1))
    print(f"file {file_size(ours):,} bytes, with a linear head {file_size(linear):,}")


def compare(name: str, ours: Callable, linear: Callable) -> None:
    for run in (ours, linear) * 2:
        seconds_of(run)
    pairs = [(seconds_of(ours), seconds_of(linear)) for _ in range(ROUNDS)]
    a, b = (statistics.median(column) * 1e3 for column in zip(*pairs))
    ratios = sorted(x / y for x, y in pairs)
    ratio = f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"{name}: {a:.3f} ms against {b:.3f} ms, {ratio}")


def seconds_of(run: Callable) -> float:
    start_time = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start_time


def file_size(model: torch.nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "x.pt")
        return (Path(folder) / "x.pt").stat().st_size


if __name__ == "__main__":
    main()
