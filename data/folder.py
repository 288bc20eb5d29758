"""Your own images: a folder in one of these layouts (names may hold spaces).

    PATH/<rank>/*.jpg                     split by this file: 80 / 10 / 10 %, in proportion to ranks
    PATH/{train,val,test}/<rank>/*.jpg    split by you; val or test may be missing
    PATH/{train,val,test}.txt             lines `path label`, or .csv, .tsv; label = 0 .. R-1
    PATH/NAME.csv, PATH/**/*.jpg          a table of paths and ranks; or one in each of train, ...

PATH/ranks.txt (or beside a list) names the ranks, one a line, lowest first; names with numbers need
none. Without a test part the val part is the test part too; without a val part 10 % of train are
held out for it. Read after lists.py and task.py. Copy together with: those two, files.py.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from .files import find_images, is_hidden, is_image, read_lines
from .lists import Sample, check_labels, parse_integer, parse_rows, resolve_paths
from .task import PARTS, Options, Task, make_task

MAX_RANKS = 10_000
PART_NAMES = {  # in upper or lower case; eval is whichever of val and test is missing
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# Units to be minded: 3 months come before 2 years.
UNITS = set("mg g kg t lb oz mm cm m km ft sec min h hr hour day week month year yr k".split())
NUMBER = r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
BELOW, ABOVE = ("<", "≤", "under", "below", "up to"), (">", "≥", "over", "above")


def load(folder: Path, root: Path, options: Options) -> Task:
    """The Task of a folder; lists and their paths under `root` may replace those in the folder."""
    entries = [entry for entry in sorted(folder.iterdir()) if not is_hidden(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    files = [file for file in entries if file.suffix.lower() in (".txt", ".csv", ".tsv")]
    lists = options.lists or _find_parts({file: file.stem for file in files if file.is_file()})
    ranks_dirs = [path.parent for path in lists if path] + [folder]  # a list's own ranks.txt first
    order = next(filter(None, (_read_ranks(path / "ranks.txt") for path in ranks_dirs)), None)
    notes: list[str] = []
    if any(lists):
        options = replace(options, lists=tuple(lists))
        description = "own lists " + " ".join(path.name for path in lists if path)
        parts = options.read_lists(root, order and len(order))
        highest = max(max(part.labels) for part in parts if part)
        num_images = sum(len(part or ()) for part in parts)
        _check_num_ranks(folder, len(order or ()) or highest + 1, len(order or ()) or num_images)
        names = order or [str(rank) for rank in range(highest + 1)]
    else:
        part_dirs, description = _find_parts({path: path.name for path in folders}), "own folders"
        if any(part_dirs):
            unused = [path.name for path in folders if path not in part_dirs]
            notes += [f"folders left out: {', '.join(unused)}"] * bool(unused)
        else:
            part_dirs = [folder, None, None]
            description += f", split by seed {options.seed}, fold {options.fold}"
        ranks = set(order or ())
        rows = [path and _read_part(path, root, ranks, notes) for path in part_dirs]
        names = _order_ranks(folder, ranks, order)
        num_images = sum(len(part or ()) for part in rows)
        _check_num_ranks(folder, len(names), len(order or ()) or num_images)
        index = {name: rank for rank, name in enumerate(names)}
        parts = [part and [Sample(path, index[name]) for path, name in part] for part in rows]
    if len(names) < 2:
        raise ValueError(f"{folder}: {len(names)} rank, but ordinal regression needs 2 or more")
    preset = dict(context="the rank of the image is", rank_names=names)
    task = make_task(folder.resolve().name, preset, root, parts, options, description)
    return replace(task, protocol="; ".join([task.protocol, *notes]))


def _find_parts(names: dict[Path, str]) -> list[Path | None]:
    """The lists or folders of train, val and test among {path: name}, None where there is none."""
    candidates = [[path for path in names if names[path].lower() in PART_NAMES[p]] for p in PARTS]
    others = [path for path in names if names[path].lower() in ("eval", "evaluation")]
    if candidates[0] and others:
        if bool(candidates[1]) == bool(candidates[2]):
            raise ValueError(f"{others[0]}: is it the val or the test part? rename it to that")
        candidates[1 if candidates[2] else 2] = others
    for part, paths in zip(PARTS, candidates):
        if len(paths) > 1:
            raise ValueError(f"{paths[0]} and {paths[1].name} are both the {part} part; keep one")
    return [paths[0] if paths else None for paths in candidates]


def _read_ranks(path: Path) -> list[str] | None:
    names = [name for _, name in read_lines(path)] if path.is_file() else None
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"{path} names a rank twice; give one name a line, lowest rank first")
    return names


def _check_num_ranks(folder: Path, num_ranks: int, num_images: int) -> None:
    """ValueError for labels that are dates or ids: more ranks than images, or than MAX_RANKS."""
    if num_ranks > (limit := min(MAX_RANKS, num_images)):
        raise ValueError(
            f"{folder}: {num_ranks:,} ranks, expected at most {limit:,}; labels are ranks, counted "
            "from 0: if these are dates or ids, write the rank in their place"
        )


def _read_part(part_dir: Path, root: Path, ranks: set[str], notes: list[str]) -> list[list[str]]:
    """[(image, name of its rank)]; adds to ranks their names, to notes what is left out."""
    entries = [entry for entry in sorted(part_dir.iterdir()) if not is_hidden(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if not entry.is_dir()]
    tables = [file for file in files if file.suffix.lower() in (".csv", ".tsv")]
    if len(tables) == 1 and len(folders) < 2:
        rows = _read_label_table(part_dir, tables[0])
        notes.append(f"labels of {os.path.relpath(tables[0], root)}")
    elif len(folders) < 2 and not ranks:
        nested = f"; if {folders[0].name} holds the ranks, give {folders[0]}" if folders else ""
        raise ValueError(
            f"{part_dir} holds {len(folders)} folders and {len(tables)} tables; expected a folder "
            "per rank, lists train.txt (.csv, .tsv) of path and rank index, or one table (.csv, "
            f".tsv) with the columns path and label{nested}"
        )
    else:
        rows, others = [], Counter(table.suffix for table in tables)
        for rank_dir in folders:
            images, others_of_rank = find_images(rank_dir)
            rows += [(os.path.relpath(image, root), rank_dir.name) for image in images]
            others += others_of_rank
        if others:
            types = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(others.items()))
            notes.append(f"{others.total():,} files of other types left out ({types})")
        if beside := sum(map(is_image, files)):
            notes.append(f"{beside:,} images beside the folders of {part_dir.name} left out")
        ranks |= {rank_dir.name for rank_dir in folders}
        return rows
    ranks |= {name for _, name in rows}
    return [(os.path.relpath(part_dir / path, root), name) for path, name in rows]


def _read_label_table(part_dir: Path, table: Path) -> list[tuple[str, str]]:
    """The images, relative to part_dir, each with the name of its rank as label."""
    rows = [*parse_rows(table)]
    integers = [parse_integer(text) for _, _, text in rows]  # 3.0 is 3
    labels = [text if n is None else str(n) for (_, _, text), n in zip(rows, integers)]
    samples = zip((image for _, image, _ in rows), labels)
    samples = [*resolve_paths(part_dir, samples, table)]
    check_labels(samples, lambda i: f"{table}:{rows[i][0]}")
    return samples


def _order_ranks(folder: Path, names: Iterable[str], order: list[str] | None) -> list[str]:
    """The ranks in order: that of ranks.txt, or by the numbers in their names.

    ValueError where there is none: a name without a number, two of one number, months and years.
    """
    how = f"name the ranks in {folder / 'ranks.txt'}, one a line, lowest first"
    if order is None:
        keys = {name: key for name in sorted(names) if (key := _rank_key(name))}
        before = next(iter(keys.values()))[1] if keys else ""  # "class" of "class 3"
        by_number = {key[0]: name for name, key in keys.items() if key[1] == before}
        order = [by_number[number] for number in sorted(by_number)]
        units = {key[2]: name for name, key in keys.items()}
        if len(units.keys() - {""}) > 1 or {"", "k"} <= units.keys():
            pair = " and ".join(map(repr, sorted(units.values())[:2]))
            raise ValueError(f"{folder}: the ranks {pair} have different units; {how}")
    if unknown := sorted(set(names) - set(order)):
        raise ValueError(f"{folder}: the order of rank {unknown[0]!r} is not known; {how}")
    return order


def _rank_key(name: str) -> tuple[tuple[float, int], str, str] | None:
    """((number, -1 below it, 1 above it, else 0), word before it, unit after it)."""
    match = re.match(rf"(\D*?)({NUMBER})(\s*\+)?(.*)", name.casefold())
    if not match:
        return None
    before, number = match[1].strip(" _-([#"), float(match[2].replace(",", ""))
    side = -1 if before in BELOW else int(before in ABOVE or bool(match[3]))
    words = [word.rstrip("s") for word in re.findall(r"[^\W\d_]+", match[4])]
    unit = next((word for word in words if word in UNITS), "")
    return (number, side), before * (side == 0), unit
