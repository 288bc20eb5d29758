"""The task under its protocol, DataLoaders, batches to the device, features of a frozen encoder.

Needs: data, training.distributed, training.options, training.run_folder.
"""

import contextlib
import copy
import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

import data
from training.distributed import main_process_first, world_size
from training.options import PRECISIONS


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print user errors (bad path, bad value) without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train.py: {error}") from error


def load_task(args: Namespace) -> data.Task:
    """The dataset under its protocol.

    When resuming or evaluating, the split is read from the run's splits/ folder.
    """
    run_exists = args.resume or args.eval
    lists = (args.train_list, args.val_list, args.test_list)
    if run_exists:
        lists = tuple(Path(args.out) / "splits" / f"{part}.txt" for part in data.PARTS)
    if args.data == "demo" and run_exists or not any(lists):
        lists = None  # the demo has one split
    elif lists[0] is None:
        raise SystemExit("--val-list and --test-list need a --train-list")
    with main_process_first(), exit_on_user_error():  # it draws the demo, the others find it
        task = data.load(
            args.data,
            args.data_root,
            split=args.split,
            fold=args.fold,
            seed=args.split_seed,
            lists=lists,
            category=args.category,
            label_rule=args.label_rule,
        )
        if lists is None or not run_exists:  # else the lists of the run are these images
            if args.shots is not None:
                task = data.few_shot(task, args.shots, args.seed)
            if args.shift:
                task = data.distribution_shift(task, *args.shift, args.seed)
        if run_exists:  # the same images, so the same protocol
            config = json.loads((Path(args.out) / "config.json").read_text())
            task = replace(task, protocol=config["protocol"])
    return task


def make_loaders(
    args: Namespace, task: data.Task, preprocess: dict[str, Any], model: nn.Module
) -> list[DataLoader]:
    """Train, validation and test loaders of (uint8 images (B, 3, S, S), labels (B,)).

    With --freeze-image of (features (B, D), labels (B,)).
    """
    if args.batch_size % world_size():
        raise SystemExit(
            f"--batch-size {args.batch_size} is over all processes: {world_size()} must divide it"
        )
    loaders = []
    for part in data.PARTS:
        is_train = part == "train"
        images = make_images(task, part, preprocess, augment=is_train and not args.freeze_image)
        if args.freeze_image:
            images = cached_features(args, images, preprocess, model)
        sampler = None
        if dist.is_initialized() and is_train:
            sampler = DistributedSampler(images, seed=args.seed)
        elif dist.is_initialized():
            images = Subset(images, range(dist.get_rank(), len(images), world_size()))
        loader = DataLoader(
            images,
            args.batch_size // world_size(),
            shuffle=is_train and sampler is None,
            sampler=sampler,
            num_workers=0 if args.freeze_image else args.workers,
            pin_memory=args.device.startswith("cuda"),
        )
        loaders.append(loader)
    return loaders


def make_images(
    task: data.Task, part: str, preprocess: dict[str, Any], augment: bool = False
) -> data.ImageList:
    options = {key: preprocess[key] for key in ("squash", "resample") if key in preprocess}
    size = preprocess["image_size"]
    return data.ImageList(getattr(task, part), task.root, image_size=size, train=augment, **options)


def prepare_batch(images: Tensor, args: Namespace, preprocess: dict[str, Any]) -> Tensor:
    """uint8 images (B, 3, S, S) -> normalised on the device; features (B, D) stay as they are."""
    images = images.to(args.device, non_blocking=True)
    if images.dim() == 2:
        return images
    images = data.normalize(images, preprocess["mean"], preprocess["std"])
    return images.contiguous(memory_format=torch.channels_last)


def autocast(args: Namespace) -> AbstractContextManager:
    dtype = PRECISIONS[args.precision]
    return torch.autocast(args.device.split(":")[0], dtype) if dtype else contextlib.nullcontext()


# --- --freeze-image: the encoder runs once per image ---


def cached_features(
    args: Namespace, images: data.ImageList, preprocess: dict[str, Any], model: nn.Module
) -> Dataset:
    """The frozen encoder's [(feature (D,), label)] of all images, cached per encoder and list."""
    encoder, digest = model.image_encoder, hashlib.sha256()
    for key, value in encoder.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().float().numpy().tobytes())
    for sample in images.samples:
        stat = (images.root / sample.path).stat()
        digest.update(f"{sample.path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    root = str(images.root.resolve())
    digest.update(repr((sorted(preprocess.items()), args.precision, root)).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "ordinalclip" / "features" / f"{digest.hexdigest()}.pt"
    with main_process_first():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            features = compute_features(args, images, preprocess, encoder)
            data.atomic_write(path, lambda tmp_path: torch.save(features, tmp_path))
    features = torch.load(path, map_location="cpu", weights_only=True)
    return list(zip(features, (sample.label for sample in images.samples)))


@torch.no_grad()
def compute_features(
    args: Namespace, images: data.ImageList, preprocess: dict[str, Any], encoder: nn.Module
) -> Tensor:
    """Features (M, D), float32 on the CPU."""
    encoder.eval()
    features = []
    for batch, _ in DataLoader(images, args.batch_size, num_workers=args.workers):
        with autocast(args):
            features.append(encoder(prepare_batch(batch, args, preprocess)).float().cpu())
    return torch.cat(features)


def without_image_encoder(model: nn.Module) -> nn.Module:
    """The same model (shared, not copied), reading features (B, D) instead of images."""
    other = copy.copy(model)
    other._modules = dict(model._modules, image_encoder=nn.Identity())
    return other
