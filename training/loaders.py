"""The task under its protocol, DataLoaders, batches to the device, features of a frozen encoder.

Needs: data, clip_weights, training.distributed, .progress, .run_folder.
"""

import contextlib
import copy
import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

import data
from clip_weights import load_file
from training.distributed import main_process_first, world_size
from training.progress import ProgressLine
from training.run_folder import Run, digest_images, load_json, saved_digests, split_digests

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print user errors (bad path, bad value) without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train.py: {error}") from error


@exit_on_user_error()
@main_process_first()  # it draws the demo, the others find it
def load_task(args: Namespace) -> data.Task:
    """The dataset under its protocol; that of a run that exists is read from its folder."""
    run_exists, is_own = bool(args.resume or args.eval), args.data not in data.DATASETS
    reads_splits = run_exists and args.data != "demo"  # which has one split
    options, name = dict(category=args.category, label_rule=args.label_rule), args.data
    if reads_splits:  # they have the split, the ranks and the labels
        if is_own and not Path(name).is_dir():
            if not args.data_root:
                raise SystemExit(
                    f"the images of {args.out} lay in {name!r}, which is not there; give "
                    "--data-root, or go to the folder in which the run was started (now "
                    f"{Path.cwd()})"
                )
            name = args.data_root
        options["lists"] = [Path(args.out) / "splits" / f"{part}.txt" for part in data.PARTS]
        for path in options["lists"]:
            if not path.is_file():
                raise SystemExit(f"{path} is missing; restore it, or repeat the run anew")
    else:
        names = ("split", "label_pattern", "ranks", "bins", "group")
        options |= {key: getattr(args, key) for key in names} | dict(lists=given_lists(args))
        options["allow_missing"] = args.skip_bad
    fold = dict(fold=args.fold, seed=args.split_seed)
    task = data.load(name, args.data_root, **fold, **options)
    if not reads_splits:
        if is_own and fold != dict(fold=0, seed=1):
            first = data.load(args.data, args.data_root, fold=0, seed=1, **options)
            if split_digests(first) == split_digests(task):
                raise SystemExit(
                    f"--fold and --split-seed have no effect with {args.data}, which has one split "
                    "of its own (lists, or train / val / test folders); remove them"
                )
        if args.skip_bad:  # before shots are drawn
            task = exclude_unreadable(args, task)
        task = replace(task, images_digest=digest_images(task))
        if args.shots is not None:
            task = data.few_shot(task, args.shots, args.seed)
        if args.shift:
            task = data.distribution_shift(task, *args.shift, args.seed)
    if args.method == "ordinalclip" and args.base_ranks > task.num_ranks:
        raise SystemExit(
            f"--base-ranks {args.base_ranks}, but {args.data} has {task.num_ranks} ranks; "
            f"give at most {task.num_ranks}"
        )
    task, errors = data.check_images(task, args.workers, ProgressLine("images opened"))
    if errors:
        raise unreadable_error(args, errors, "or start the run with --skip-bad")
    if run_exists:  # the same images, so the same protocol
        path = Path(args.out) / "config.json"
        if not path.exists():
            raise SystemExit(
                f"{path} is missing; repeat the command of the run, which continues and writes it"
            )
        config = load_json(path)
        images_digest = saved_digests(config).get("images", "")
        task = replace(task, protocol=str(config.get("protocol")), images_digest=images_digest)
    return task


def given_lists(args: Namespace) -> list[str | None] | None:
    """--train-list, --val-list and --test-list; None without them."""
    lists = [args.train_list, args.val_list, args.test_list]
    if any(lists) and lists[0] is None:
        raise SystemExit("--val-list and --test-list need a --train-list")
    for part, path in zip(data.PARTS, lists):
        if path and not Path(path).is_file():
            what = "a folder" if Path(path).is_dir() else "not there"
            raise SystemExit(f"--{part}-list {path} is {what}; give a list file `path label`")
    return lists if any(lists) else None


def exclude_unreadable(args: Namespace, task: data.Task) -> data.Task:
    """--skip-bad: the task without images that cannot be read. ValueError: a part is empty."""
    checked, errors = data.check_images(task, args.workers, ProgressLine("images opened"))
    if not errors:
        return task
    parts = {part: getattr(checked, part) for part in data.PARTS}
    if not all(parts.values()):
        raise unreadable_error(args, errors, "without them a part is empty")
    counts = " / ".join(f"{len(samples):,} {part}" for part, samples in parts.items())
    note = f"{len(errors):,} unreadable images left out, so {counts} images are used"
    return replace(task, protocol=f"{task.protocol}; {note}", **parts)


def unreadable_error(args: Namespace, errors: dict[str, str], advice: str) -> ValueError:
    first = f"{len(errors):,} images of {args.data} cannot be read; fix or remove them, {advice}:"
    return ValueError("\n".join([first, *errors.values()]))


def make_loaders(run: Run) -> list[DataLoader]:
    """Train, validation and test loaders of (uint8 images (B, 3, S, S), labels (B,)).

    With --freeze-image of (features (B, D), labels (B,)).
    """
    args, loaders = run.args, []
    if args.batch_size % world_size():
        raise SystemExit(
            f"--batch-size {args.batch_size} is over all processes: {world_size()} must divide it"
        )
    for part in data.PARTS:
        is_train, sampler = part == "train", None
        augment = is_train and not args.freeze_image
        images = make_images(run.task, part, run.preprocess, augment, not args.no_flip)
        if args.freeze_image:
            images = cached_features(run, images)
        if is_train:
            labels, weights = torch.tensor(run.task.train.labels), None
            if args.balanced:  # all ranks are equally likely
                weights = labels.bincount().double().reciprocal()[labels]
            sampler = EpochSampler(len(images), args.seed, weights)
            images = SeededImages(images, args.seed)
        elif dist.is_initialized():
            images = Subset(images, range(dist.get_rank(), len(images), world_size()))
        workers = 0 if args.freeze_image else args.workers
        loader = DataLoader(
            images,
            args.batch_size // world_size(),
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0 and part != "test",  # which is read once
            pin_memory=args.device.startswith("cuda"),
            generator=torch.Generator(),  # its draws would move the seed of what the model draws
        )
        loaders.append(loader)
    return loaders


class EpochSampler(Sampler[int]):
    """Keys of this process's share of the images, in an order that seed and epoch decide.

    A key is epoch * num_images + index, see SeededImages. As DistributedSampler does, the first
    images are repeated until all processes have equally many. weights (M,): images are drawn with
    these, again and again, instead of once each; each draw counts as an epoch of its own.
    """

    def __init__(self, num_images: int, seed: int, weights: Tensor | None = None) -> None:
        self.num_images, self.seed, self.weights = num_images, seed, weights
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """As DistributedSampler's; start: images of this process to skip, when resuming."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return max(0, -(-self.num_images // world_size()) - self.start)  # the last batch is smaller

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        if self.weights is None:
            keys = torch.randperm(self.num_images, generator=generator)
            keys += self.epoch * self.num_images
        else:
            keys = torch.multinomial(self.weights, self.num_images, True, generator=generator)
            draws = torch.arange(self.num_images) + self.epoch * self.num_images
            keys += draws * self.num_images
        share = -(-self.num_images // world_size())
        keys = keys.repeat(1 + world_size())[: share * world_size()]
        process = dist.get_rank() if dist.is_initialized() else 0
        return iter(keys[process :: world_size()][self.start :].tolist())


class SeededImages(Dataset):
    """Images by keys of EpochSampler: their augmentation follows from seed, epoch and index.

    So neither the number of workers nor an interruption changes what an image looks like, and
    workers that stay for all epochs need not be told which one it is.
    """

    def __init__(self, images: Dataset, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        epoch, index = divmod(key, len(self.images))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, epoch, index))
            return self.images[index]


def mix_seed(*numbers: int) -> int:
    """A 63-bit seed from several numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_images(
    task: data.Task, part: str, preprocess: dict[str, Any], augment: bool = False, flip: bool = True
) -> data.ImageList:
    options = {key: preprocess[key] for key in ("squash", "resample", "draft") if key in preprocess}
    options |= dict(image_size=preprocess["image_size"], train=augment, flip=flip)
    return data.ImageList(getattr(task, part), task.root, **options)


def prepare_batch(images: Tensor, args: Namespace, preprocess: dict[str, Any]) -> Tensor:
    """uint8 images (B, 3, S, S) -> normalised on the device; features (B, D) stay as they are."""
    images = images.to(args.device, non_blocking=True)
    if images.dim() == 2:
        return images
    images = data.normalize(images, preprocess["mean"], preprocess["std"])
    return images.contiguous(memory_format=torch.channels_last)


def autocast(args: Namespace) -> torch.autocast:
    dtype = PRECISIONS[args.precision]
    return torch.autocast(args.device.split(":")[0], dtype, enabled=dtype is not None)


# --- --freeze-image: the encoder runs once per image ---


def cached_features(run: Run, images: data.ImageList) -> Dataset:
    """The frozen encoder's [(feature (D,), label)] of all images, cached per encoder and list."""
    args, encoder, digest = run.args, run.model.image_encoder, hashlib.sha256()
    # its modules: QuickGELU or GELU
    digest.update(f"{encoder} {args.device.split(':')[0]}".encode())
    for key, value in encoder.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().float().numpy().tobytes())
    for sample in images.samples:
        stat = (images.root / sample.path).stat()
        dates = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
        digest.update(f"{sample.path} {stat.st_size} {dates}\n".encode())
    root = str(images.root.resolve())
    digest.update(repr((sorted(run.preprocess.items()), args.precision, root)).encode())
    path = data.cache_dir() / "features" / f"{digest.hexdigest()}.pt"
    with main_process_first():
        try:
            features = load_file(path, "cached features")
        except (OSError, ValueError):  # none there, or a damaged file
            features = None
        if not torch.is_tensor(features) or len(features) != len(images):
            features = compute_features(run, images)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                data.atomic_write(path, lambda tmp_path: torch.save(features, tmp_path))
            except OSError as error:
                print(f"features are not cached: {error}; set XDG_CACHE_HOME", file=sys.stderr)
    return TensorDataset(features, torch.tensor(images.samples.labels, dtype=torch.long))


@torch.no_grad()
def compute_features(run: Run, images: data.ImageList) -> Tensor:
    """Features (M, D), float32 on the CPU."""
    args, encoder = run.args, run.model.image_encoder.eval()
    features, progress = [], ProgressLine("features")
    loader = DataLoader(images, args.batch_size, num_workers=args.workers)
    for i, (batch, _) in enumerate(loader, 1):
        with autocast(args):
            features.append(encoder(prepare_batch(batch, args, run.preprocess)).float().cpu())
        progress(min(i * args.batch_size, len(images)), len(images))
    return torch.cat(features)


def without_image_encoder(model: nn.Module) -> nn.Module:
    """The same model (shared, not copied), reading features (B, D) instead of images."""
    other = copy.copy(model)
    other._modules = dict(model._modules, image_encoder=nn.Identity())
    return other
