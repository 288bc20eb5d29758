"""Every image is opened before training: unreadable ones, copies across parts, 12-bit pixels.

    task, errors = check_images(task, workers=8)     # {path: why it cannot be read}

Results are cached by path, size and date in $XDG_CACHE_HOME/ordinalclip/checked/ (~/.cache).
Read after task.py. Copy together with: files.py, images.py, lists.py, task.py.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .files import atomic_write
from .images import read_image
from .task import PARTS, Task

MIN_IMAGES_FOR_WORKERS = 400  # below, they would be checked before the workers have started
Result = tuple[str, int | None, str | None]  # digest, brightest of 16-bit values, error


def check_images(
    task: Task, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> tuple[Task, dict[str, str]]:
    """(the task without unreadable images, {path: why it cannot be read}).

    What else is unusual about the images is added to the protocol. Decodes each image once, and
    again only if its size or date changes. progress: called with (checked, of how many).
    """
    paths = sorted({sample.path for part in PARTS for sample in getattr(task, part)})
    cache_path, stats = _cache_path(task.root), {path: _stat(task.root / path) for path in paths}
    cache = _read_cache(cache_path)
    cached = {path: entry for path, entry in cache.items() if entry[:2] == stats.get(path)}
    new, errors = [path for path in paths if path not in cached], {}
    try:
        for i, (digest, peak, error) in enumerate(_open_all(task.root, new, workers)):
            if error:
                errors[new[i]] = error
            else:
                cached[new[i]] = [*stats[new[i]], digest, peak]
            if progress:
                progress(i + 1, len(new))
    finally:
        if new:
            with suppress(OSError):  # no room, or none of ours: opened again next time
                cache_path.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(cache | cached)
                atomic_write(cache_path, lambda tmp_path: tmp_path.write_text(text, "utf-8"))
    notes = _copies(task, {path: entry[2] for path, entry in cached.items()})
    peaks = [cached[path][3] for path in paths if path in cached]
    notes += _dark_pixels([peak for peak in peaks if peak is not None])
    notes += [f"{len(errors):,} unreadable images left out"] * bool(errors)
    parts = {
        part: tuple(sample for sample in getattr(task, part) if sample.path not in errors)
        for part in PARTS
    }
    return replace(task, protocol="; ".join([task.protocol, *notes]), **parts), errors


def _cache_path(root: Path) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(f"{root.resolve()} {PIL.__version__}".encode("utf-8", "replace"))
    return Path(cache, "ordinalclip", "checked", f"{name.hexdigest()[:32]}.json")


def _read_cache(path: Path) -> dict[str, list]:
    """{path: [size, date, digest, peak]}; empty where there is none, or a broken one."""
    with suppress(OSError, ValueError):
        entries = json.loads(path.read_text("utf-8"))
        return {key: entry for key, entry in entries.items() if len(entry) == 4}
    return {}


def _stat(path: Path) -> list[int]:
    """[size, date], [] for a missing file."""
    with suppress(OSError):
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns]
    return []


class _Results(Dataset):
    """The result of opening each image."""

    def __init__(self, root: Path, paths: list[str]) -> None:
        self.root, self.paths = root, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Result:
        path = self.root / self.paths[index]
        try:
            read_image(path)
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            return digest, _brightest_of_16_bits(path), None
        except (ValueError, OSError) as error:
            return "", None, str(error)


def _open_all(root: Path, paths: list[str], workers: int) -> Iterator[Result]:
    """The results of all paths, in order."""
    workers = workers if len(paths) >= MIN_IMAGES_FOR_WORKERS else 0
    loader = DataLoader(
        _Results(root, paths),
        batch_size=16,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # the global one's draws belong to the training
    )
    for results in loader:
        yield from results


def _brightest_of_16_bits(path: Path) -> int | None:
    """The largest value in a file of 16 bits a channel, 0 .. 65535; None for other files."""
    with Image.open(path) as image:
        if not re.search(r"'[^']*;16", str(image.tile)):  # 'I;16B', 'RGB;16B': as in the file
            return None
        if image.mode.startswith("I"):
            return int(np.asarray(image).max())
        return int(np.asarray(image.convert("RGB")).max()) * 257  # Pillow reads 8 bits of them


def _dark_pixels(peaks: list[int]) -> list[str]:
    """[] or a note that the 16-bit images hold pixels of fewer bits."""
    bits = max(peaks, default=65535).bit_length()
    if bits > 14:
        return []
    return [
        f"{len(peaks):,} images of 16 bits a pixel are near black, as they use only {bits} bits: "
        f"multiply their pixels by {2 ** (16 - bits)}"
    ]


def _copies(task: Task, digests: dict[str, str]) -> list[str]:
    """Notes on files with the same bytes: in two parts, or with two labels."""
    files, labels = {part: {} for part in PARTS}, {}
    for part in PARTS:
        for path, label in getattr(task, part):
            if path in digests:
                files[part].setdefault(digests[path], set()).add(path)
                labels.setdefault(digests[path], {})[path] = label
    notes = []
    for part, other in (("test", "train"), ("val", "train"), ("test", "val")):
        copies = [
            path
            for digest in files[part].keys() & files[other].keys()
            for path in files[part][digest] - files[other][digest]
        ]
        if copies:
            notes.append(
                f"{len(copies):,} images of {part} have the same bytes as one of {other}, "
                f"such as {min(copies)}"
            )
    odd = [sorted(paths) for paths in labels.values() if len(set(paths.values())) > 1]
    if odd:
        some = " and ".join(min(odd)[:2])
        notes.append(f"{len(odd):,} images have copies of another rank, such as {some}")
    return notes
