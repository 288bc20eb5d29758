"""Your own images: a folder in one of these layouts (names may hold spaces).

    PATH/<rank>/*.jpg                     split by this file: 80 / 10 / 10 %, in proportion to ranks
    PATH/{train,val,test}/<rank>/*.jpg    split by you; val or test may be missing
    PATH/{train,val,test}.txt             lines `path label`, or .csv, .tsv; label = 0 .. R-1
    PATH/*.csv, PATH/**/*.jpg             a table of paths and ranks, or one in each of train, ...

PATH/ranks.txt (or beside a list) names the ranks, one a line, lowest first; ranks with numbers need
none. Without a test part the val part is the test part too; without a val part 10 % of train are
held out for it. Read after lists.py and task.py. Copy together with: those two.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .files import find_images, is_hidden, is_image, read_lines
from .lists import Sample, check_labels, parse_integer, parse_rows, resolve_paths
from .task import PARTS, Options, Task, make_task

MAX_RANKS = 10_000
LIST_TYPES = (".txt", ".csv", ".tsv")
PART_NAMES = {  # in any case
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
OTHER_PART_NAMES = ("eval", "evaluation")  # whichever of val and test is missing
# Units that are no text to be ignored: 3 months come before 2 years.
UNITS = set("mg g kg t lb oz mm cm m km ft in sec min h hr hour day week month year yr k".split())
NUMBER = r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
BELOW, ABOVE = ("<", "≤", "under", "below", "up to"), (">", "≥", "over", "above")


Row = tuple[str, str]  # image path, name of its rank


def load(folder: Path, root: Path, options: Options) -> Task:
    """The Task of a folder; lists and their paths under `root` may replace those in the folder."""
    entries = [entry for entry in sorted(folder.iterdir()) if not is_hidden(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if entry.suffix.lower() in LIST_TYPES and entry.is_file()]
    lists = options.lists or _find_parts([(file.stem, file) for file in files])
    ranks_dirs = [path.parent for path in lists if path] + [folder]  # a list's own ranks.txt first
    names = next(filter(None, (_read_ranks(path / "ranks.txt") for path in ranks_dirs)), None)
    if any(lists):
        options, notes = replace(options, lists=tuple(lists)), []
        description = "own lists " + " ".join(path.name for path in lists if path)
        parts = options.read_lists(root, names and len(names))
        samples = [sample for part in parts for sample in part or ()]
        num_ranks = len(names) if names else 1 + max(sample.label for sample in samples)
        _check_num_ranks(folder, num_ranks, None if names else len(samples))
        names = names or [str(rank) for rank in range(num_ranks)]
    else:
        part_dirs, description = _find_parts([(entry.name, entry) for entry in folders]), ""
        unused = [entry.name for entry in folders if entry not in part_dirs]
        notes = [f"folders left out: {', '.join(unused)}"] * any(part_dirs) * bool(unused)
        if not any(part_dirs):
            part_dirs = [folder, None, None]
            description = f", split by seed {options.seed}, fold {options.fold}"
        description = "own folders" + description
        names, parts = _read_folders(folder, part_dirs, root, names, notes)
    if len(names) < 2:
        raise ValueError(f"{folder}: {len(names)} rank, but ordinal regression needs 2 or more")
    preset = dict(context="the rank of the image is", rank_names=names)
    task = make_task(folder.resolve().name, preset, root, parts, options, description)
    return replace(task, protocol="; ".join([task.protocol, *notes]))


def _find_parts(candidates: Sequence[tuple[str, Path]]) -> list[Path | None]:
    """The lists or folders of train, val and test among (name, path), None where there is none."""
    found = {
        part: [path for name, path in candidates if name.lower() in PART_NAMES[part]]
        for part in PARTS
    }
    if found["train"]:
        others = [path for name, path in candidates if name.lower() in OTHER_PART_NAMES]
        missing = [part for part in ("val", "test") if not found[part]]
        if others and len(missing) != 1:
            raise ValueError(f"{others[0]}: is it the val or the test part? rename it to that")
        for part in missing:
            found[part] = others
    for part, paths in found.items():
        if len(paths) > 1:
            raise ValueError(f"{paths[0]} and {paths[1].name} are both the {part} part; keep one")
    return [paths[0] if paths else None for paths in found.values()]


def _read_ranks(path: Path) -> list[str] | None:
    names = [name for _, name in read_lines(path)] if path.is_file() else None
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"{path} names a rank twice; give one name a line, lowest rank first")
    return names


def _check_num_ranks(folder: Path, num_ranks: int, num_images: int | None) -> None:
    """ValueError for labels that are no ranks; num_images: None if a ranks.txt names the ranks."""
    limit = MAX_RANKS if num_images is None else min(MAX_RANKS, num_images)
    if num_ranks > limit:
        images = "" if num_images is None else f" of {num_images:,} images"
        raise ValueError(
            f"{folder}: {num_ranks:,} ranks{images}, expected at most {limit:,}; labels are "
            "ranks, counted from 0: if these are dates or ids, write the rank in their place"
        )


def _read_folders(
    folder: Path,
    part_dirs: Sequence[Path | None],
    root: Path,
    order: list[str] | None,
    notes: list[str],
) -> tuple[list[str], list[list[Sample] | None]]:
    """(names of the ranks in order, samples of each part); adds to notes what is left out."""
    names: set[str] = set()
    rows = [part_dir and _read_part(part_dir, root, names, notes) for part_dir in part_dirs]
    names, has_ranks_file = _order_ranks(folder, names, order), bool(order)
    num_images = sum(len(part or ()) for part in rows)
    _check_num_ranks(folder, len(names), None if has_ranks_file else num_images)
    ranks = {name: rank for rank, name in enumerate(names)}
    return names, [part and [Sample(path, ranks[name]) for path, name in part] for part in rows]


def _read_part(part_dir: Path, root: Path, names: set[str], notes: list[str]) -> list[Row]:
    """The images of a part and the names of their ranks, from folders or from a table.

    Adds to names: all rank names; to notes: what is left out.
    """
    entries = [entry for entry in sorted(part_dir.iterdir()) if not is_hidden(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if not entry.is_dir()]
    tables = [file for file in files if file.suffix.lower() in LIST_TYPES[1:]]
    if tables and len(folders) < 2:
        notes.append(f"labels of {' '.join(table.name for table in tables)}")
        return _read_label_table(part_dir, root, tables, names)
    if not folders:
        raise ValueError(
            f"{part_dir} holds neither train.txt (.csv, .tsv) nor one folder per rank nor a table "
            "(.csv, .tsv) with the columns path and label"
        )
    if len(folders) == 1 and not names and any(e.is_dir() for e in folders[0].iterdir()):
        raise ValueError(f"{part_dir} holds one folder; if the ranks are in it, give {folders[0]}")
    rows, left_out = [], Counter(file.suffix for file in tables)
    for rank_dir in folders:
        images, others = find_images(rank_dir)
        rows += [(os.path.relpath(image, root), rank_dir.name) for image in images]
        left_out += others
    names |= {rank_dir.name for rank_dir in folders}
    if left_out:
        types = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(left_out.items()))
        notes.append(f"{left_out.total():,} files of other types left out ({types})")
    if beside := sum(map(is_image, files)):
        notes.append(f"{beside:,} images beside the folders of {part_dir.name} left out")
    return rows


def _read_label_table(part_dir: Path, root: Path, tables: list[Path], names: set[str]) -> list[Row]:
    """The images and names of ranks in the one table of a folder; adds the names to `names`."""
    if len(tables) > 1:
        raise ValueError(
            f"{tables[0]} and {tables[1].name}: which one holds the ranks? remove the other"
        )
    rows = parse_rows(tables[0])
    integers = [parse_integer(text) for _, _, text in rows]  # 3.0 is 3
    labels = [row[2] if n is None else str(n) for row, n in zip(rows, integers)]
    samples = [Sample(image, label) for (_, image, _), label in zip(rows, labels)]
    samples = resolve_paths(part_dir, samples, tables[0])
    check_labels((f"{tables[0]}:{row[0]}", sample) for row, sample in zip(rows, samples))
    names.update(labels)
    return [(os.path.relpath(part_dir / path, root), label) for path, label in samples]


def _order_ranks(folder: Path, names: Iterable[str], order: list[str] | None) -> list[str]:
    """The ranks in order: that of ranks.txt, or by the numbers in their names.

    ValueError for names without an order: one without a number, two with the same, months and years.
    """
    names = sorted(names)
    how = f"name it in {folder / 'ranks.txt'}, one rank a line, lowest first"
    if order is None:
        keys = {name: _rank_key(name) for name in names}
        prefix = next((key[1] for key in keys.values() if key), "")
        by_number = {key[0]: name for name, key in keys.items() if key and key[1] == prefix}
        order = [by_number[number] for number in sorted(by_number)]
        units = {key[2]: name for name, key in keys.items() if key and key[2] in UNITS}
        plain = [name for name, key in keys.items() if key and not key[2]]
        if "k" in units and plain:
            units[""] = plain[0]
        if len(units) > 1:
            pair = " and ".join(map(repr, sorted(units.values())[:2]))
            raise ValueError(f"{folder}: the ranks {pair} have different units; {how}")
    if unknown := [name for name in names if name not in order]:
        raise ValueError(f"{folder}: the order of rank {unknown[0]!r} is not known; {how}")
    return order


def _rank_key(name: str) -> tuple[tuple[float, int], str, str] | None:
    """((number, -1 below it, 1 above it, else 0), words before it, unit after it)."""
    match = re.match(rf"(\D*?)({NUMBER})\s*[-_]?\s*(\+|[^\W\d_]*)", name.casefold())
    if not match:
        return None
    before, number, after = match[1].strip(" _-([#"), match[2], match[3]
    side = -1 if before in BELOW else int(before in ABOVE or after == "+")
    return (float(number.replace(",", "")), side), before * (side == 0), after.rstrip("s")
