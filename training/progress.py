"""What a run shows while it runs: header, line of progress, line per epoch, TensorBoard.

Needs: training.distributed, .optim, .run_folder.
"""

import sys
import time
from datetime import timedelta
from typing import Any

import torch

from training.distributed import is_main, world_size
from training.optim import param_groups
from training.run_folder import Run, is_digits, run_name


def print_run_header(run: Run, clip: str) -> None:
    """clip: the name of the CLIP that was loaded, or none."""
    if not is_main():
        return
    args, task = run.args, run.task
    counts = [
        f"{group['name']} {sum(p.numel() for p in group['params']):,}"
        for group in param_groups(run.model)
    ]
    trained = ", ".join(counts) if args.epochs else "nothing"
    context = repr(args.context or task.context)
    if args.method in ("linear", "regression"):
        context = "none"
    elif is_digits(args.context or ""):
        context = f"{args.context} tokens" + f" of {args.init}" * bool(args.init)
    print(
        f"{task.protocol}\n"
        f"method {run_name(args)}   ranks {task.num_ranks}   "
        f"context {context}\n"
        f"image encoder {args.image_encoder} {run.preprocess['image_size']} px   "
        f"clip {clip}   trains {trained}\n"
        f"{args.device} {args.precision}, {world_size()} process(es)   -> {args.out}"
    )


def print_resumed(run: Run, saved: dict[str, Any]) -> None:
    steps = f" and {saved['progress']['steps']} steps" if saved.get("progress") else ""
    if is_main():
        print(f"resumes from last.pt, after {saved['epoch']}/{run.args.epochs} epochs{steps}")


def print_epoch(row: dict[str, float], epochs: int, eta: float, is_best: bool) -> None:
    print(
        f"epoch {row['epoch']:3d}/{epochs}  "
        f"loss {row['loss']:.3f} (i2t {row['i2t']:.3f} t2i {row['t2i']:.3f})  "
        f"val MAE {row['val_mae_expected']:.3f} expected {row['val_mae_argmax']:.3f} argmax  "
        f"acc {row['val_acc_argmax']:.1%}  {row['images_per_s']:.0f} img/s  "
        f"{row['peak_mb']:.0f} MB  {timedelta(seconds=round(eta))} left{'  *' if is_best else ''}",
        flush=True,
    )


class ProgressLine:
    """progress(num_images, total): a line on stderr: images so far, images per second, time left.

    On a terminal it is rewritten four times a second and removed at the end; elsewhere, as in a log
    file, a new line is printed once a minute. Of several processes only the main one prints.
    """

    def __init__(self, title: str, start: int = 0) -> None:
        self.title, self.start = title, start  # images before, in an interrupted epoch
        self.start_time = self.last_print = time.monotonic()

    def __call__(self, num_images: int, total: int) -> None:
        now, is_terminal = time.monotonic(), sys.stderr.isatty()
        if not is_main():
            return
        if is_terminal and num_images >= total:
            clear_line()
        elif now - self.last_print >= (0.25 if is_terminal else 60) and num_images > self.start:
            self.last_print = now
            speed = (num_images - self.start) / (now - self.start_time)
            eta = timedelta(seconds=round((total - num_images) / speed))
            line = (
                f"{self.title}  {num_images:,}/{total:,} images  {speed:.0f} images/s  {eta} left"
            )
            line = f"\r\033[K  {line}" if is_terminal else f"{line}\n"
            print(line, end="", file=sys.stderr, flush=True)


def clear_line() -> None:
    """Remove the line of progress."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# --- --tensorboard ---


def summary_writer() -> type:
    """torch's SummaryWriter. SystemExit where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit(
            f"--tensorboard needs the package tensorboard ({error}); pip install tensorboard"
        ) from error
    return SummaryWriter


class TensorBoard:
    """Figures and pictures of a run in its folder tensorboard/; without --tensorboard, nothing.

    Repeated after an interruption, `first_epoch` and what follows replace what was written before.
    """

    def __init__(self, run: Run, first_epoch: int | None = None) -> None:
        self.writer = None
        if run.args.tensorboard and is_main():
            self.writer = summary_writer()(str(run.dir / "tensorboard"), purge_step=first_epoch)

    def write(
        self, epoch: int, figures: dict[str, float | None], pictures: dict[str, Any] | None = None
    ) -> None:
        """figures: None is left out, val_NAME and test_NAME are groups; pictures: of Pillow."""
        if self.writer is None:
            return
        for name, value in figures.items():
            is_group = name.startswith(("val_", "test_"))
            tag = name.replace("_", "/", 1) if is_group else f"train/{name}"
            if value is not None and name != "epoch":
                self.writer.add_scalar(tag, value, epoch)
        for name, picture in (pictures or {}).items():
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(picture.height, picture.width, 3)
            self.writer.add_image(name, pixels, epoch, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
