"""Your own images: a folder in one of these layouts (names may hold spaces).

    PATH/<rank>/*.jpg                     split by this file: 80 / 10 / 10 %, in proportion to ranks
    PATH/{train,val,test}/<rank>/*.jpg    split by you; val or test may be missing
    PATH/{train,val,test}.txt             lines `path label`, or .csv, .tsv; label = 0 .. R-1
    PATH/NAME.csv, PATH/**/*.jpg          a table of paths and ranks; or one in each of train, ...
    PATH/**/25_0_1.jpg                    ranks in file names: label_pattern; or in {train,..}/

PATH/ranks.txt (or beside a list) names the ranks, one a line, lowest first; names with numbers need
none. Without a test part the val part is the test part too; without a val part 10 % of train are
held out for it. With groups (persons) no group is in two parts, and 10 % of them are held out.
Read after lists.py, labels.py and task.py. Copy together with: those three, files.py.
"""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from .files import count_types, find_images, is_hidden, is_image, read_lines
from .labels import MAX_RANKS, PRESENT, match_names, nfc, number_ranks, order_ranks, rank_key
from .lists import (
    LABEL_COLUMNS,
    SPLIT_COLUMNS,
    Sample,
    check_labels,
    parse_integer,
    read_header,
    read_texts,
)
from .task import PARTS, REAL_LABELS, Options, Task, hold_out, make_task

LEAVE_ONE_OUT = "leave-one-group-out"
SPLITS = ("random", LEAVE_ONE_OUT)
PART_NAMES = {  # in upper or lower case; eval is whichever of val and test is missing
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
LIST_WORD = "train|val|test|dev|label|meta|annotation|split|fold"  # in names of lists


def load(folder: Path, root: Path, options: Options) -> Task:
    """The Task of a folder; lists and their paths under `root` may replace those in the folder."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}, given as the data root; mend the path")
    entries = [entry for entry in sorted(folder.iterdir()) if not is_hidden(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    files = [file for file in entries if file.suffix.lower() in (".txt", ".csv", ".tsv")]
    lists = options.lists or _find_parts({file: file.stem for file in files if file.is_file()})
    ranks_dirs = [path.parent for path in lists if path] + [folder]  # a list's own ranks.txt first
    order = next(filter(None, map(_read_ranks, ranks_dirs)), None)
    _check_label_options(folder, options, [path for path in lists if path], order)
    chosen = ("label_pattern", "group", "ranks", "bins")
    notes = [f"{key.replace('_', ' ')} {v}" for key in chosen if (v := getattr(options, key))]
    unread = [] if options.lists else [f for f in _find_lists(folder) if f not in lists]
    groups: dict[str, str] = {}  # {path: group}
    split: dict[str, int] = {}  # {path: part}, by a column of a table
    real_labels: dict[str, float] = {}
    if any(lists):
        options = replace(options, lists=tuple(lists))
        description = "own lists " + " ".join(path.name for path in lists if path)
        for path in filter(None, lists if options.group else ()):
            groups |= dict(read_texts(path, root, options.group, options.allow_missing))
        for path in filter(None, lists):
            split |= dict(_read_split(path, root, options.allow_missing))
    if any(lists) and not (options.ranks or options.bins):
        names, parts = _read_rank_lists(folder, root, options, order)
        used = {sample.path.split(os.sep)[0] for part in parts for sample in part or ()}
        unused = [path.name for path in folders if path.name not in used and folder == root]
        notes += [f"folders left out: {', '.join(unused)}"] * bool(unused)
        if (path := ranks_dirs[0] / REAL_LABELS).is_file():  # beside the lists of a run
            real_labels = {image: float(text) for image, text in read_texts(path, root)}
            if lacking := [
                s.path for part in parts for s in part or () if s.path not in real_labels
            ]:
                raise ValueError(f"{path} lacks {lacking[0]}; restore it, or remove it")
    else:
        ranks = set(order or ())
        if any(lists):
            rows = [path and read_texts(path, root, None, options.allow_missing) for path in lists]
            check_labels(rows, lambda part, _: str(lists[part]))
            ranks |= {name for part in rows for _, name in part or ()}
        else:
            part_dirs, description = _find_part_dirs(folder, folders, options, notes)
            rows = [
                path and _read_part(path, root, options, ranks, groups, split, notes)
                for path in part_dirs
            ]
            if part_dirs[0] == folder and set(split.values()) - {0}:  # more than train
                description = "own table, split by its column"
                rows = [[s for s in rows[0] if split[s.path] == part] or None for part in range(3)]
        names, parts, real_labels = _to_ranks(folder, rows, ranks, order, options, notes)
    if split and any(split.get(s.path, i) != i for i, part in enumerate(parts) for s in part or ()):
        raise ValueError(
            f"{folder}: a column names other parts than its list; make train.csv, val.csv, test.csv"
        )
    if len(names) < 2:
        raise ValueError(f"{folder}: {len(names)} rank, but ordinal regression needs 2 or more")
    unread = [path.name for path in unread if f"labels of {path.name}" not in notes]
    notes += [f"lists left out: {', '.join(unread)}"] * bool(unread)
    if groups or options.split == LEAVE_ONE_OUT:
        groups = {path: groups[path] for part in parts for path, _ in part or () if groups}
        groups = _join_spellings(groups, notes)
        parts = _split_by_group(folder, parts, groups, options, notes)
    preset = dict(context="the rank of the image is", rank_names=names)
    task = make_task(folder.resolve().name, preset, root, parts, options, description)
    protocol, num_groups = "; ".join([task.protocol, *notes]), len(set(groups.values()))
    return replace(task, protocol=protocol, real_labels=real_labels, num_groups=num_groups)


def _check_label_options(
    folder: Path, options: Options, lists: list[Path], order: list[str] | None
) -> None:
    """ValueError for options that exclude each other, or what the folder says."""
    if options.label_pattern and lists:
        raise ValueError(f"{lists[0]} has the labels, a label pattern has no effect; remove one")
    if options.label_pattern and options.group:
        raise ValueError(
            f"group column {options.group!r}, but a label pattern: write (?P<group>...) in it"
        )
    if order and (options.bins or options.ranks not in (None, PRESENT)):
        raise ValueError(f"{folder}: ranks.txt names the ranks; remove it, or ranks and bins")


def _read_rank_lists(
    folder: Path, root: Path, options: Options, order: list[str] | None
) -> tuple[list[str], list[list[Sample] | None]]:
    """(names of ranks, parts) of lists whose labels are rank indices."""
    parts = options.read_lists(root, order and len(order))
    highest = max(max(part.labels) for part in parts if part)
    num_images = sum(len(part or ()) for part in parts)
    _check_num_ranks(folder, len(order or ()) or highest + 1, len(order or ()) or num_images)
    return order or [str(rank) for rank in range(highest + 1)], parts


def _find_part_dirs(
    folder: Path, folders: list[Path], options: Options, notes: list[str]
) -> tuple[list[Path | None], str]:
    """(folders of train, val and test, description); the folder itself is to be split."""
    part_dirs = _find_parts({path: path.name for path in folders})
    if not any(part_dirs):
        split = f", split by seed {options.seed}, fold {options.fold}"
        return [folder, None, None], "own folders" + split
    unused = [path.name for path in folders if path not in part_dirs]
    notes += [f"folders left out: {', '.join(unused)}"] * bool(unused)
    return part_dirs, "own folders"


def _to_ranks(
    folder: Path,
    rows: list[list[Sample] | None],
    ranks: set[str],
    order: list[str] | None,
    options: Options,
    notes: list[str],
) -> tuple[list[str], list[list[Sample] | None], dict[str, float]]:
    """(names of ranks, parts with rank indices, {path: real label}) of samples with text labels."""
    if options.bins or options.ranks not in (None, PRESENT):
        is_strict = bool(options.lists)
        names, parts, real_labels, outside = number_ranks(
            rows, options.ranks, options.bins, is_strict
        )
        notes += outside
        return names, parts, real_labels
    names = order_ranks(folder, ranks, order)
    num_images = sum(len(part or ()) for part in rows)
    _check_num_ranks(folder, len(names), len(order or ()) or num_images)
    index = {name: rank for rank, name in enumerate(names)}
    return names, [part and [Sample(p, index[name]) for p, name in part] for part in rows], {}


def _join_spellings(groups: dict[str, str], notes: list[str]) -> dict[str, str]:
    """{path: group}, in one spelling: 1, 01 and 1.0 are the same group, Anna and anna, too."""
    spellings: dict[str | int, set[str]] = {}
    for name in set(groups.values()):
        number = parse_integer(name)
        key = nfc(name).casefold() if number is None else number
        spellings.setdefault(key, set()).add(name)
    joined = [sorted(names) for names in spellings.values() if len(names) > 1]
    some = " and ".join(map(repr, min(joined, default=())))
    notes += [f"{len(joined):,} groups have several spellings, such as {some}"] * bool(joined)
    first = {name: min(names) for names in spellings.values() for name in names}
    return {path: first[name] for path, name in groups.items()}


def _split_by_group(
    folder: Path,
    parts: list[list[Sample] | None],
    groups: dict[str, str],
    options: Options,
    notes: list[str],
) -> list[list[Sample] | None]:
    """The parts, with val and test held out where they are missing; no group is in two of them."""

    def held_out(samples: list[Sample], part: str) -> tuple[list[Sample], list[Sample]]:
        num_groups = len({groups[path] for path, _ in samples})
        share, salt = max(0.1, 1 / max(1, num_groups)), f"{part}/{options.salt}"
        return hold_out(samples, share, salt, groups.__getitem__)

    train, val, test = parts
    names = sorted(set(groups.values()))
    notes.append(f"{len(names):,} groups, none in two parts")
    if options.split == LEAVE_ONE_OUT:
        if not names:
            needed = "a group column, or (?P<group>...) in the label pattern"
            raise ValueError(f"{folder}: split {LEAVE_ONE_OUT} needs {needed}")
        if val or test:
            raise ValueError(f"{folder} has parts of its own, so split {LEAVE_ONE_OUT} is not made")
        if not 0 <= options.fold < len(names):
            raise ValueError(f"{folder} has no fold {options.fold}; give 0 .. {len(names) - 1}")
        notes.append(f"test group {names[options.fold]!r}")
        test = [sample for sample in train if groups[sample.path] == names[options.fold]]
        train = [sample for sample in train if groups[sample.path] != names[options.fold]]
    elif train and val is None and test is None:
        train, test = held_out(train, "test")
    if train and val is None:
        train, val = held_out(train, "val")
    part_groups = [{groups[path] for path, _ in part or ()} for part in (train, val, test)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        if shared := part_groups[i] & part_groups[j]:
            raise ValueError(
                f"{folder}: group {min(shared)!r} is in both {PARTS[i]} and {PARTS[j]}; move its "
                "images into one part"
            )
    if not (train and val and (test or test is None)):
        counts = [f"{len(part or ()):,} {name}" for name, part in zip(PARTS, (train, val, test))]
        raise ValueError(
            f"{folder.name}: {' / '.join(counts)} images, and none may be empty: "
            f"{len(names)} groups are too few, train, val and test need one each"
        )
    return [train, val, test]


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


def _find_lists(folder: Path) -> list[Path]:
    """Files that may be lists, by their names; not those that a run writes."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in (".txt", ".csv", ".tsv", ".json", ".jsonl")
        and re.search(LIST_WORD, path.stem.casefold())
        and path.name != REAL_LABELS
        and not is_hidden(path.name)
    ]


def _read_ranks(folder: Path) -> list[str] | None:
    path = next((path for path in folder.glob("*.*") if path.name.lower() == "ranks.txt"), None)
    names = path and [nfc(name) for _, name in read_lines(path)]
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


def _read_part(
    part_dir: Path,
    root: Path,
    options: Options,
    ranks: set[str],
    groups: dict[str, str],
    split: dict[str, int],
    notes: list[str],
) -> list[Sample]:
    """Images with the names of their ranks; adds to ranks these, to groups, to split, to notes what
    is left out."""
    entries = [entry for entry in sorted(part_dir.iterdir()) if not is_hidden(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if not entry.is_dir()]
    tables = [file for file in files if file.suffix.lower() in (".csv", ".tsv")]
    others: Counter[str] = Counter()
    if options.label_pattern:
        images, others = find_images(part_dir)
        matches, unmatched = match_names(images, part_dir, options.label_pattern)
        some = ", ".join(map(ascii, unmatched[:3]))
        if not matches:
            got = f"of {len(unmatched):,} images, such as {some}" if unmatched else "(no images)"
            raise ValueError(f"{part_dir}: the label pattern matches no name {got}")
        rows = [Sample(os.path.relpath(image, root), label) for image, label, _ in matches]
        groups |= {row.path: group for row, (_, _, group) in zip(rows, matches) if group}
        notes += [
            f"{len(unmatched):,} images that the pattern does not match left out, such as {some}"
        ] * bool(unmatched)
    elif len(tables) == 1 and len(folders) < 2:
        rows = _relative(part_dir, root, read_texts(tables[0], part_dir))
        rows = [Sample(path, nfc(name)) for path, name in rows]
        if options.group:
            cells = read_texts(tables[0], part_dir, options.group)
            groups |= dict(_relative(part_dir, root, cells))
        split |= dict(_relative(part_dir, root, _read_split(tables[0], part_dir)))
        notes.append(f"labels of {os.path.relpath(tables[0], root)}")
        images = {os.path.relpath(image, root) for image in find_images(part_dir)[0]}
        if unlisted := len(images - {path for path, _ in rows}):
            notes.append(f"{unlisted:,} images without a label left out")
    elif len(folders) < 2 and not ranks:
        unread = ", ".join(path.name for path in _find_lists(part_dir))
        lists = f"; not read: {unread}" if unread else ""
        nested = f"; if {folders[0].name} holds the ranks, give {folders[0]}" if folders else ""
        raise ValueError(
            f"{part_dir} holds {len(folders)} folders and {len(tables)} tables; expected a folder "
            "per rank, lists train.txt (.csv, .tsv) of path and rank index, or one table (.csv, "
            f".tsv) with the columns path and label{nested}{lists}"
        )
    elif options.group:
        raise ValueError(f"{part_dir} has no table with the group column {options.group!r}")
    else:
        rows, others = [], Counter(table.suffix for table in tables)
        for rank_dir in folders:
            if part := _find_parts({path: path.name for path in rank_dir.iterdir()})[0]:
                wanted = part_dir / part.name / rank_dir.name
                raise ValueError(f"{part}: the parts come first; expected {wanted}")
            images, others_of_rank = find_images(rank_dir)
            rank = nfc(rank_dir.name)
            rows += [Sample(os.path.relpath(image, root), rank) for image in images]
            others += others_of_rank
        if beside := sum(map(is_image, files)):
            notes.append(f"{beside:,} images beside the folders of {part_dir.name} left out")
        if names := {nfc(rank_dir.name) for rank_dir in folders} - ranks:  # not in ranks.txt
            for table in tables if all(map(rank_key, names)) else ():
                _check_agreement(part_dir, table)
        ranks |= names
    if others:
        notes.append(count_types(others))
    ranks |= {name for _, name in rows}
    return rows


def _read_split(table: Path, root: Path, allow_missing: bool = False) -> list[Sample]:
    """Parts (0, 1, 2) as labels, where a column such as split has names of parts; or []."""
    for column in (name for name in read_header(table) if name in SPLIT_COLUMNS):
        cells = read_texts(table, root, column, allow_missing)
        parts = _find_parts({Path(cell): cell for _, cell in cells})
        index = {path.name: part for part, path in enumerate(parts) if path}
        if other := [cell for _, cell in cells if index and cell not in index]:
            raise ValueError(f"{table}: column {column} has {other[0]!r}, no name of a part")
        if index:
            return [Sample(path, index[cell]) for path, cell in cells]
    return []


def _check_agreement(part_dir: Path, table: Path) -> None:
    """ValueError if a table has other labels than the folders of ranks that it lies beside."""
    if not {*LABEL_COLUMNS} & {*read_header(table)}:
        return
    for path, label in read_texts(table, part_dir, allow_missing=True):
        name = Path(path).parts[0]
        if label not in (name, str(parse_integer(name))):
            raise ValueError(
                f"{table} says {label!r} of {path}, but folders lie beside it: for the labels of "
                f"the table give --train-list {table} --ranks present, else move it away"
            )


def _relative(part_dir: Path, root: Path, samples: list[Sample]) -> list[Sample]:
    return [Sample(os.path.relpath(part_dir / path, root), label) for path, label in samples]
