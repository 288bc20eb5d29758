"""--profile: where the time and the memory of a training step go, part by part.

After each part the program waits for the device, only here. On a GPU that takes longer than
training, where the next part is prepared meanwhile; so the time of a step without waiting is
printed, too.

Needs: training.checkpoints, .distributed, .loaders, .methods, .run_folder.
"""

import itertools
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.checkpoints import TrainingState
from training.distributed import world_size
from training.loaders import autocast, make_loaders, prepare_batch
from training.methods import METHODS, build_loss, build_run, warm_start
from training.run_folder import Run, peak_memory, run_name

WARM_UP, STEPS = 3, 20  # steps before and while measuring
DATA, TRANSFER, IMAGE, TEXT, MATCHING, OPTIMISER = STEP_PARTS = (
    "waiting for data", "transfer", "image tower", "text tower", "matching", "optimiser"
)  # fmt: skip
COLUMNS = "forward ms", "backward ms", "share", "weights MB", "gradients", "optimiser", "saved"


def profile_run(args: Namespace) -> str:
    """Train some steps of a run and print where time and memory go; writes no run folder.

    -> the printed table. SystemExit under torchrun.
    """
    if world_size() > 1:
        raise SystemExit(
            f"--profile measures one process, torchrun started {world_size()}; "
            "start it without torchrun, with the --batch-size of one process"
        )
    if args.accumulate > 1:
        raise SystemExit("--profile times steps of one batch; leave --accumulate out")
    run = build_run(args)
    if args.init:
        warm_start(args, run.model)
    batches = endless(make_loaders(run)[0])
    profiler = StepProfiler(run)
    saved = profiler.saved_bytes(*next(batches))
    for _ in range(WARM_UP - 1):
        profiler.step(*next(batches))
    profiler.seconds.clear()
    profiler.restart()
    num_images = 0
    for _ in range(STEPS):
        images, labels = next(batches)
        num_images += len(labels)
        profiler.lap(DATA)
        profiler.step(images, labels)
    seconds = sum(profiler.seconds.values())
    lines = [
        f"{run_name(args)}   {args.device} {args.precision}, {run.preprocess['image_size']} px, "
        f"batch {args.batch_size}, {args.workers} workers; mean of {STEPS} steps",
        *table(profiler, saved),
        f"in all {seconds / STEPS * 1e3:.2f} ms a step, {num_images / seconds:.1f} images/s; "
        f"peak {peak_memory(args.device):.0f} MB; saved: kept for the backward pass",
    ]
    if profiler.is_cuda:
        profiler.lap = lambda *_: None
        start = profiler.restart()
        for _ in range(STEPS):
            profiler.step(*next(batches))
        seconds = profiler.restart() - start
        lines.append(f"without waiting between the parts {seconds / STEPS * 1e3:.2f} ms a step")
    print("\n".join(lines))
    return "\n".join(lines)


def endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    """Batches of one epoch after the other."""
    for epoch in itertools.count(1):
        loader.sampler.set_epoch(epoch)
        yield from loader


def table(profiler: "StepProfiler", saved: dict[str, int]) -> list[str]:
    """Times of each part, and bytes of its weights, gradients, optimiser state, and those saved."""
    args, seconds, weights = profiler.run.args, profiler.seconds, profiler.weights()
    rows = [("", COLUMNS)]
    for part in STEP_PARTS:
        times = [seconds.get((part, direction), 0) for direction in ("forward", "backward")]
        cells = [f"{time / STEPS * 1e3:.2f}" for time in times]
        cells.append(f"{sum(times) / sum(seconds.values()):.1%}")
        if part in weights:
            grads = [w for w in weights[part] if w.requires_grad]  # as large as the weights
            states = (profiler.state.optimizer.state.get(w, {}) for w in weights[part])
            moments = [value for state in states for value in state.values()]
            sizes = [sum(t.nbytes for t in tensors) for tensors in (weights[part], grads, moments)]
            cells += [f"{size / 2**20:.2f}" for size in (*sizes, saved[part])]
        is_matrix = part == TEXT and not METHODS[args.method].has_prompts
        rows.append(("rank prototypes" if is_matrix else part, cells))
    return [f"{name:16}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]


class Timed(nn.Module):
    """A tower between two readings of the clock; not hooks, which --compile would compile, too.

    The graph is cut behind it, so that matching and each tower go backward one after another.
    """

    def __init__(self, profiler: "StepProfiler", name: str, tower: nn.Module) -> None:
        super().__init__()
        self.profiler, self.name, self.tower = profiler, name, tower

    def forward(self, *images: Tensor) -> Tensor:
        profiler = self.profiler
        profiler.lap(MATCHING)
        profiler.part = self.name
        output = self.tower(*images)
        profiler.lap(self.name)
        profiler.part = MATCHING
        copy = output.detach().requires_grad_(output.requires_grad)
        profiler.outputs.append((self.name, output, copy))
        return copy


class StepProfiler:
    """Training steps of a model, with a clock that is read after each part."""

    def __init__(self, run: Run) -> None:
        self.run = run
        run.model.train()
        self.state = TrainingState(run, time.time(), None)  # optimizer, scaler, average; no file
        self.is_cuda = run.args.device.startswith("cuda")
        self.loss_module = build_loss(run)
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)  # of (part, direction)
        self.part = MATCHING  # that runs
        self.outputs: list[tuple[str, Tensor, Tensor]] = []  # tower, its output, the copy in use
        self.towers: dict[str, nn.Module] = {}
        model = self.loss_module.model
        for name, attribute in ((IMAGE, "image_encoder"), (TEXT, "prototypes")):
            if hasattr(model, attribute):
                self.towers[name] = getattr(model, attribute)
                setattr(model, attribute, Timed(self, name, self.towers[name]))
        self.restart()

    def restart(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize(self.run.args.device)
        self.last = time.perf_counter()
        return self.last

    def lap(self, part: str, direction: str = "forward") -> None:
        """What ran since the clock was read was this part."""
        last = self.last
        self.seconds[part, direction] += self.restart() - last

    def step(self, images: Tensor, labels: Tensor) -> None:
        """A step of training, from uint8 images (B, 3, S, S) or features (B, D)."""
        args = self.run.args
        images = prepare_batch(images, args, self.run.preprocess)
        labels = labels.to(args.device, non_blocking=True)
        self.lap(TRANSFER)
        with autocast(args):
            total, _, _ = self.loss_module(images, labels)
        self.lap(MATCHING)
        self.state.scaler.scale(total).backward()
        self.lap(MATCHING, "backward")
        while self.outputs:
            tower, output, copy = self.outputs.pop()
            if copy.grad is not None:
                output.backward(copy.grad)
            self.lap(tower, "backward")
        self.state.step()
        self.lap(OPTIMISER)

    def saved_bytes(self, images: Tensor, labels: Tensor) -> dict[str, int]:
        """One step: bytes that each part keeps for the backward pass, beside the weights."""
        saved: dict[str, int] = defaultdict(int)
        weights = [w for ws in self.weights().values() for w in ws]
        counted = {weight.untyped_storage().data_ptr() for weight in weights}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in counted:
                counted.add(storage.data_ptr())
                saved[self.part] += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self.step(images, labels)
        return saved

    def weights(self) -> dict[str, list[Tensor]]:
        """Parameters and buffers of each part; of matching those that are in no tower."""
        parts, counted = {}, set()
        for part, module in (*self.towers.items(), (MATCHING, self.loss_module)):
            modules = module, *getattr(module, "_text", ())  # the frozen tower of RankPrompts
            tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
            parts[part] = [t for t in tensors if id(t) not in counted]
            counted |= {id(t) for t in tensors}
        return parts
