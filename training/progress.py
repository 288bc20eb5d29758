"""What a run prints while it goes on: its header, a line of progress, a line per epoch.

Needs: training.distributed, .methods, .run_folder.
"""

import sys
import time

from training.distributed import is_main, world_size
from training.optim import param_groups
from training.run_folder import Run, run_name


def print_run_header(run: Run) -> None:
    if not is_main():
        return
    args, task = run.args, run.task
    counts = [
        f"{group['name']} {sum(p.numel() for p in group['params']):,}"
        for group in param_groups(run.model)
    ]
    trained = ", ".join(counts) if args.epochs else "nothing"
    print(
        f"{task.protocol}\n"
        f"method {run_name(args)}   ranks {task.num_ranks}   "
        f"context {args.context or task.context!r}\n"
        f"image encoder {args.image_encoder} {run.preprocess['image_size']} px   "
        f"clip {args.clip}   trains {trained}\n"
        f"{args.device} {args.precision}, {world_size()} process(es)   -> {args.out}"
    )


def print_epoch(row: dict[str, float], epochs: int, eta: float, is_best: bool) -> None:
    clear_line()
    print(
        f"epoch {row['epoch']:3d}/{epochs}  "
        f"loss {row['loss']:.3f} (i2t {row['i2t']:.3f} t2i {row['t2i']:.3f})  "
        f"val MAE {row['val_mae_expected']:.3f} expected {row['val_mae_argmax']:.3f} argmax  "
        f"acc {row['val_acc_argmax']:.1%}  {row['images_per_s']:.0f} img/s  "
        f"{row['peak_mb']:.0f} MB  eta {eta // 60:.0f}:{eta % 60:02.0f}{'  *' if is_best else ''}",
        flush=True,
    )


class ProgressLine:
    """One line on stderr, rewritten four times a second, where that is a terminal."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.start_time, self.last_print = time.time(), 0.0
        self.is_shown = is_main() and sys.stderr.isatty()

    def update(self, done: int, num_images: int) -> None:
        """`done` of `total` steps, which took num_images images."""
        now = time.time()
        if self.is_shown and now - self.last_print > 0.25:
            self.last_print = now
            speed = num_images / max(now - self.start_time, 1e-9)
            line = f"\r  {self.title}  {done}/{self.total}  {speed:.0f} images/s "
            print(line, end="", file=sys.stderr, flush=True)


def clear_line() -> None:
    """Remove the line of progress."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
