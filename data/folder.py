"""Your own images: a folder in one of three layouts (names may hold spaces).

    PATH/<rank>/*.jpg                     split by this file: 80 / 10 / 10 %, in proportion to ranks
    PATH/{train,val,test}/<rank>/*.jpg    split by you; val or test may be missing
    PATH/{train,val,test}.txt             lines `path label`, or .csv, .tsv; label = 0 .. R-1

PATH/ranks.txt (or beside a list) names the ranks, one a line, lowest first; folders that start with
a number need none. Without a test part val is the test part too; without a val part 10 % of train
are held out for it. Read after lists.py and task.py. Copy together with: those two.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .lists import Sample, is_image, read_lines
from .task import PARTS, Options, Task, make_task


def load(folder: Path, root: Path, options: Options) -> Task:
    """The Task of a folder; lists and their paths under `root` may replace those in the folder."""
    paths = [[folder / f"{part}{end}" for end in (".txt", ".csv", ".tsv")] for part in PARTS]
    lists = options.lists or [next(filter(Path.is_file, candidates), None) for candidates in paths]
    ranks_dirs = [path.parent for path in lists if path] + [folder]  # a list's own ranks.txt first
    names = next(filter(None, (_read_ranks(path / "ranks.txt") for path in ranks_dirs)), None)
    if any(lists):
        description = "own lists " + " ".join(path.name for path in lists if path)
        parts = replace(options, lists=lists).read_lists(root, names and len(names))
        highest = max(sample.label for samples in parts if samples for sample in samples)
        names = names or [str(rank) for rank in range(highest + 1)]
    else:
        part_dirs = [folder / part if (folder / part).is_dir() else None for part in PARTS]
        description = "own folders"
        if not any(part_dirs):
            part_dirs = [folder, None, None]
            description += f", split by seed {options.seed}, fold {options.fold}"
        names = _order_ranks(folder, part_dirs, names)
        parts = [part_dir and _list_folders(part_dir, root, names) for part_dir in part_dirs]
    if len(names) < 2:
        raise ValueError(f"{folder}: {len(names)} rank, but ordinal regression needs 2 or more")
    preset = dict(context="the rank of the image is", rank_names=names)
    return make_task(folder.resolve().name, preset, root, parts, options, description)


def _read_ranks(path: Path) -> list[str] | None:
    names = [name for _, name in read_lines(path)] if path.is_file() else None
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"{path} names a rank twice; give one name a line, lowest rank first")
    return names


def _order_ranks(
    folder: Path, part_dirs: Sequence[Path | None], names: list[str] | None
) -> list[str]:
    """The ranks in order: ranks.txt's, or the rank folders by the number they start with."""
    entries = [entry for part_dir in part_dirs if part_dir for entry in part_dir.iterdir()]
    rank_folders = {entry.name for entry in entries if entry.is_dir()}
    rank_folders = sorted(name for name in rank_folders if not name.startswith((".", "__")))
    if not rank_folders:
        raise ValueError(f"{folder} holds neither train.txt (.csv, .tsv) nor one folder per rank")
    if names is None:
        numbers = [re.match(r"-?\d+(\.\d+)?", name) for name in rank_folders]
        by_number = {float(n[0]): name for n, name in zip(numbers, rank_folders) if n}
        names = [by_number[number] for number in sorted(by_number)]
    if unknown_folders := [name for name in rank_folders if name not in names]:
        raise ValueError(
            f"{folder}: the order of rank folder {unknown_folders[0]!r} is not known; name it "
            f"in {folder / 'ranks.txt'}, one rank a line, lowest first"
        )
    return names


def _list_folders(part_dir: Path, root: Path, names: list[str]) -> list[Sample]:
    return [
        Sample(os.path.relpath(image, root), rank)
        for rank, name in enumerate(names)
        for image in sorted((part_dir / name).rglob("*"))
        if is_image(image.name)
    ]
