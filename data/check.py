"""Every image is opened before training: unreadable ones, copies across parts, 12-bit pixels.

    task, errors = check_images(task, workers=8)     # {path: why it cannot be read}

Good images are cached by size and date in $XDG_CACHE_HOME/ordinalclip/checked/ (else ~/.cache).
Read after task.py. Copy together with: files.py, images.py, lists.py, task.py.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader

from .files import atomic_write, cache_dir
from .images import read_image
from .lists import Sample, Samples
from .task import PARTS, Task

MIN_IMAGES_FOR_WORKERS = 400  # fewer are opened before workers have started


def check_images(
    task: Task, workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> tuple[Task, dict[str, str]]:
    """(the task without unreadable images, {path: why it cannot be read}).

    What else is unusual about the images is added to the protocol, and a digest of the bytes of
    each part's images to the task. Decodes each image once, and again only if its size or date
    changes. progress: called with (opened, of how many).
    """
    paths = sorted({sample.path for part in PARTS for sample in getattr(task, part)})
    key = hashlib.sha256(os.fsencode(task.root.resolve()) + PIL.__version__.encode()).hexdigest()
    cache_path, cache = cache_dir() / "checked" / f"{key[:32]}.json", {}
    with suppress(OSError, ValueError):  # there is none, or a broken one
        entries = json.loads(cache_path.read_text("utf-8"))  # {path: [[size, date], digest, peak]}
        if isinstance(entries, dict) and all(len(entry) == 3 for entry in entries.values()):
            cache = entries
    good = {path: cache[path] for path in paths if path in cache}
    good = {path: entry for path, entry in good.items() if entry[0] == _stat(task.root / path)}
    new, errors = Samples((path, 0) for path in paths if path not in good), {}
    loader = DataLoader(
        new,
        batch_size=16,
        num_workers=workers if len(new) >= MIN_IMAGES_FOR_WORKERS else 0,
        collate_fn=partial(_open_images, task.root),  # in the workers
        generator=torch.Generator(),  # the global one's draws belong to the training
    )
    try:
        for i, (path, entry, error) in enumerate(chain.from_iterable(loader), 1):
            if error:
                errors[path] = error
            else:
                good[path] = entry
            if progress:
                progress(i, len(new))
    finally:
        if new:
            with suppress(OSError):  # no room, or not ours: they are opened again next time
                cache_path.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(cache | good)
                atomic_write(cache_path, lambda tmp_path: tmp_path.write_text(text, "utf-8"))
    peaks = [peak for _, _, peak in good.values() if peak is not None]
    digests = {path: digest for path, (_, digest, _) in good.items()}
    notes = _copies(task, digests)
    dark = [peak for peak in peaks if peak.bit_length() <= 14]
    if dark and len(dark) >= 0.9 * len(peaks):  # the others: a logo, say
        bits = max(dark).bit_length()
        notes.append(
            f"{len(dark):,} images of 16 bits a pixel are near black, as they use only {bits} "
            f"bits: multiply their pixels by {2 ** (16 - bits)}"
        )
    parts = {}
    if errors:
        notes.append(f"{len(errors):,} unreadable images left out")
        parts = {part: [s for s in getattr(task, part) if s.path not in errors] for part in PARTS}
    task = replace(task, protocol="; ".join([task.protocol, *notes]), **parts)
    file_digests = {}
    for part in PARTS:
        texts = (digests[path] for path in getattr(task, part).iterate_paths())
        file_digests[part] = hashlib.sha256("".join(texts).encode()).hexdigest()
    return replace(task, file_digests=file_digests), errors


def _stat(path: Path) -> list[int] | None:
    with suppress(OSError):
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]  # cp -p keeps the first two
    return None


def _open_images(root: Path, samples: list[Sample]) -> list[tuple[str, list, str | None]]:
    """[(path, its entry in the cache, error)]"""
    results = []
    for path, _ in samples:
        try:
            read_image(root / path, draft=1)  # all its bytes, at 1/8 of its size
            digest = hashlib.blake2b((root / path).read_bytes(), digest_size=16).hexdigest()
            entry, error = [_stat(root / path), digest, _brightest_of_16_bits(root / path)], None
        except (ValueError, OSError) as why:
            entry, error = [], str(why)
        results.append((path, entry, error))
    return results


def _brightest_of_16_bits(path: Path) -> int | None:
    """The largest value in a file of 16 bits a channel, 0 .. 65535; None for other files."""
    with Image.open(path) as image:
        if not re.search(r"'[^']*;16", str(image.tile)):  # 'I;16B', 'RGB;16B': as in the file
            return None
        if image.mode.startswith("I"):
            return int(np.asarray(image).max())
        return int(np.asarray(image.convert("RGB")).max()) * 257  # Pillow reads 8 of the bits


def _copies(task: Task, digests: dict[str, str]) -> list[str]:
    """Notes on files with the same bytes: in two parts, or with two labels."""
    paths_by_digest = {}  # {digest: {path: (label, parts)}}
    for part in PARTS:
        for path, label in getattr(task, part):
            files = paths_by_digest.setdefault(digests.get(path, path), {})
            files.setdefault(path, (label, set()))[1].add(part)
    groups, notes = [files for files in paths_by_digest.values() if len(files) > 1], []
    for part, other in (("test", "train"), ("val", "train"), ("test", "val")):
        copies = [
            path
            for files in groups
            for path, (_, parts) in files.items()
            if part in parts and any(other in files[o][1] for o in files if o != path)
        ]
        if copies:
            notes.append(
                f"{len(copies):,} images of {part} have the same bytes as others of {other}, "
                f"such as {min(copies)}"
            )
    odd = [sorted(files) for files in groups if len({label for label, _ in files.values()}) > 1]
    if odd:
        some = " and ".join(min(odd)[:2])
        notes.append(f"{len(odd):,} images have copies of another rank, such as {some}")
    return notes
