"""What a run prints while it goes on: its header, a line of progress, a line per epoch.

Needs: training.distributed, .methods, .run_folder.
"""

import sys
import time
from datetime import timedelta

from training.distributed import is_main, world_size
from training.methods import param_groups
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
    print(
        f"epoch {row['epoch']:3d}/{epochs}  "
        f"loss {row['loss']:.3f} (i2t {row['i2t']:.3f} t2i {row['t2i']:.3f})  "
        f"val MAE {row['val_mae_expected']:.3f} expected {row['val_mae_argmax']:.3f} argmax  "
        f"acc {row['val_acc_argmax']:.1%}  {row['images_per_s']:.0f} img/s  "
        f"{row['peak_mb']:.0f} MB  eta {eta // 60:.0f}:{eta % 60:02.0f}{'  *' if is_best else ''}",
        flush=True,
    )


class ProgressLine:
    """progress(done, total): a line on stderr with images done, images per second, time left.

    On a terminal it is rewritten four times a second and removed at the end; elsewhere, as in a log
    file, a new line is printed once a minute. Of several processes only the main one prints.
    """

    def __init__(self, title: str, start: int = 0) -> None:
        self.title, self.start = title, start  # images done before, in an epoch that was cut off
        self.start_time = self.last_print = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now, is_terminal = time.monotonic(), sys.stderr.isatty()
        if not is_main():
            return
        if is_terminal and done >= total:
            clear_line()
        elif now - self.last_print >= (0.25 if is_terminal else 60) and done > self.start:
            self.last_print = now
            speed = (done - self.start) / (now - self.start_time)
            left = timedelta(seconds=round((total - done) / speed))
            line = f"{self.title}  {done:,}/{total:,} images  {speed:.0f} images/s  {left} left"
            line = f"\r\033[K  {line}" if is_terminal else f"{line}\n"
            print(line, end="", file=sys.stderr, flush=True)


def clear_line() -> None:
    """Remove the line of progress."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
