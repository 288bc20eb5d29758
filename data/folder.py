"""Your own images: a folder in one of these layouts (names may hold spaces).

    PATH/<rank>/*.jpg                     split by this file: 80 / 10 / 10 %, in proportion to ranks
    PATH/{train,val,test}/<rank>/*.jpg    split by you; val or test may be missing
    PATH/{train,val,test}.txt             lines `path label`, or .csv, .tsv; label = 0 .. R-1
    PATH/NAME.csv, PATH/**/*.jpg          a table of paths and ranks; or one in each of train, ...
    PATH/**/25_0_1.jpg                    ranks in file names: label_pattern; or in {train,..}/

PATH/ranks.txt (or beside a list) names the ranks, one a line, lowest first; names with numbers need
none. Without a test part the val part is the test part too; without a val part 10 % of train are
held out for it. With groups (persons) no group is in two parts, and 10 % of them are held out.
Read after lists.py, labels.py, task.py and groups.py. Copy together with: those four, files.py.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .files import count_types, find_images, is_hidden, is_image, read_lines
from .groups import LEAVE_ONE_OUT, Parts, join_spellings, split_by_group
from .labels import (
    MAX_RANKS,
    PRESENT,
    Row,
    check_agreement,
    match_names,
    number_ranks,
    order_ranks,
    rank_key,
    rank_values,
)
from .lists import (
    LABEL_COLUMNS,
    Sample,
    check_labels,
    label_text,
    nfc,
    parse_rows,
    read_header,
    read_texts,
)
from .task import PARTS, REAL_LABELS, Options, Task, make_task

SPLITS = ("random", LEAVE_ONE_OUT)
PART_NAMES = {  # in upper or lower case; eval is whichever of val and test is missing
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
SPLIT_COLUMNS = {"split", "part", "set", "subset", "partition"}  # of names of parts
# of these, or of something else:
PERHAPS_SPLIT_COLUMNS = {"fold", "usage", "phase", "dataset", "mode", "is_train", "is_test"}
LIST_WORD = "train|val|test|dev|label|meta|annotation|split|fold"  # in names of lists

Sources = Sequence[Path | None]  # lists or folders of train, val, test


class Images(NamedTuple):
    """What lists or folders hold."""

    rank_names: list[str]
    parts: Parts
    groups: dict[str, str]  # {path: group}
    real_labels: dict[str, float]  # {path: label} of bins
    left_out: list[str]


def load(folder: Path, root: Path, options: Options) -> Task:
    """The Task of a folder; lists and their paths under `root` may replace those in the folder."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {root}, given as the data root; correct the path"
        )
    folders, files = _list_folder(folder)
    files = [file for file in files if file.suffix.lower() in (".txt", ".csv", ".tsv")]
    sources = options.lists or _find_parts({file: file.stem for file in files if file.is_file()})
    lists = [path for path in sources if path]
    if not lists and root.resolve() != folder.resolve():
        raise ValueError(
            f"{folder} holds its images, a data root ({root}) has no effect; leave it out: it is "
            "where the paths of lists start"
        )
    unread = [] if options.lists else [path for path in _find_lists(folder) if path not in lists]
    order = next(filter(None, map(_read_ranks, [*(path.parent for path in lists), folder])), None)
    _check_label_options(folder, options, lists, order)
    chosen = ("label_pattern", "group", "ranks", "bins")
    notes = [f"{key.replace('_', ' ')} {v}" for key in chosen if (v := getattr(options, key))]
    if lists:
        description = "own lists " + " ".join(path.name for path in lists)
        options = replace(options, lists=tuple(sources))
    elif sources := _find_part_dirs(folder, folders, files, options):
        description = "own folders"
        notes += _left_out("folders", [path for path in folders if path not in sources])
    else:
        description = f"own folders, split by seed {options.seed}, fold {options.fold}"
        sources = [folder, None, None]
    are_ranks = lists and not (options.ranks or options.bins)
    read = _read_rank_lists if are_ranks else _read_rows
    names, parts, groups, real_labels, left_out = read(folder, sources, root, options, order)
    if sum(part is not None for part in parts) > sum(map(bool, sources)):
        description = "own table, split by its column"
    if len(names) < 2:
        raise ValueError(f"{folder}: {len(names)} rank, but ordinal regression needs 2 or more")
    unread = [path for path in unread if f"labels of {path.name}" not in left_out]
    notes += left_out + _left_out("lists", unread)
    if description != "own table, split by its column":
        tables = [file for file in files if f"labels of {file.name}" in left_out]
        notes += _unused_columns(folder, lists, PERHAPS_SPLIT_COLUMNS)
        notes += _unused_columns(folder, tables, PERHAPS_SPLIT_COLUMNS | SPLIT_COLUMNS)
    if groups or options.split == LEAVE_ONE_OUT:
        groups = {path: groups[path] for part in parts for path, _ in part or () if groups}
        groups, spellings = join_spellings(groups)
        parts, split = split_by_group(folder, parts, groups, options)
        notes += spellings + split
    preset = dict(context="the rank of the image is", rank_names=names)
    preset["rank_values"] = rank_values(names)
    task = make_task(folder.resolve().name, preset, root, parts, options, description)
    protocol, num_groups = "; ".join([task.protocol, *notes]), len(set(groups.values()))
    return replace(task, protocol=protocol, real_labels=real_labels, num_groups=num_groups)


def _left_out(what: str, paths: list[Path]) -> list[str]:
    return [f"{what} left out: {', '.join(path.name for path in paths)}"] if paths else []


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
    folder: Path, lists: Sources, root: Path, options: Options, order: list[str] | None
) -> Images:
    """Lists whose labels are rank indices."""
    parts, groups, real_labels = options.read_lists(root, order and len(order)), {}, {}
    samples, first = [part for part in parts if part], next(path for path in lists if path)
    for part, path in enumerate(lists):
        if path and options.group:
            groups |= {row.path: row.group for row in _read_table(path, root, root, options, part)}
        elif path:
            _find_split(path, root, part)
    num_ranks = len(order) if order else 1 + max(max(part.labels) for part in samples)
    _check_num_ranks(folder, num_ranks, len(order or ()) or sum(map(len, samples)))
    if (path := first.parent / REAL_LABELS).is_file():  # beside the lists of a run
        real_labels = {image: float(text) for image, text in read_texts(path, root)}
        images = (image for part in samples for image, _ in part)
        if lacking := next((image for image in images if image not in real_labels), None):
            raise ValueError(f"{path} lacks {lacking}; restore it, or remove it")
    used = {path.split(os.sep)[0] for part in samples for path in part.iterate_paths()}
    unused = [p for p in _list_folder(folder)[0] if p.name not in used and folder == root]
    names = order or [str(rank) for rank in range(num_ranks)]
    return Images(names, parts, groups, real_labels, _left_out("folders", unused))


def _read_rows(
    folder: Path, sources: Sources, root: Path, options: Options, order: list[str] | None
) -> Images:
    """Folders, and lists, whose labels are text: names, or numbers."""
    rows, ranks, left_out = [], set(order or ()), []
    for part, source in enumerate(sources):
        if source is None:
            continue
        if source.is_file():
            new_rows, names, notes = _read_table(source, root, root, options, part), set(), []
        else:
            expected = None if source == folder else part
            new_rows, names, notes = _read_part(source, root, options, expected, ranks)
        if order:  # a label 1.0, read as 1, is the rank 1.0
            ranks_by_label = {label_text(name): name for name in order} | dict(zip(order, order))
            new_rows = [r._replace(label=ranks_by_label.get(r.label, r.label)) for r in new_rows]
        rows += new_rows
        ranks |= names | {row.label for row in new_rows}
        left_out += notes
    if sum(map(bool, sources)) > 1:
        check_labels([[row[:2] for row in rows]], lambda _, i: str(sources[rows[i].part]))
    if options.bins or options.ranks not in (None, PRESENT):
        names, rank_of, real_labels, outside = number_ranks(
            rows, options.ranks, options.bins, strict=bool(options.lists)
        )
        left_out += outside
    else:
        names, real_labels = order_ranks(folder, ranks, order), {}
        _check_num_ranks(folder, len(names), len(order or rows))
        index = {name: rank for rank, name in enumerate(names)}
        rank_of = {path: index[label] for path, label, _, _ in rows}
    parts = [[], [], []]
    for path, _, _, part in rows:
        if path in rank_of:
            parts[part].append(Sample(path, rank_of[path]))
    with_rows = {row.part for row in rows}  # also where none of its labels is a rank
    is_list = [source not in (None, folder) for source in sources]
    parts = [part if is_list[i] or i in with_rows else None for i, part in enumerate(parts)]
    groups = {path: group for path, _, group, _ in rows if group}
    return Images(names, parts, groups, real_labels, left_out)


def _check_num_ranks(folder: Path, num_ranks: int, num_images: int) -> None:
    """ValueError for labels that are dates or ids: more ranks than images, or than MAX_RANKS."""
    if num_ranks > (limit := min(MAX_RANKS, num_images)):
        raise ValueError(
            f"{folder}: {num_ranks:,} ranks, expected at most {limit:,}; labels are ranks, counted "
            "from 0: if these are dates or ids, write the rank in their place"
        )


def _read_part(
    part_dir: Path, root: Path, options: Options, part: int | None, ranks: set[str]
) -> tuple[list[Row], set[str], list[str]]:
    """(images, names of rank folders, what is left out). part None: a column may tell the parts."""
    folders, files = _list_folder(part_dir)
    tables = [file for file in files if file.suffix.lower() in (".csv", ".tsv")]
    names, folder_names = set(), {nfc(path.name) for path in folders}
    unknown = folder_names - ranks
    no_ranks = unknown and not any(map(rank_key, unknown))
    if options.label_pattern:
        images, others = find_images(part_dir)
        labels, unmatched = match_names(images, part_dir, options.label_pattern)
        some = ", ".join(map(ascii, unmatched[:3]))
        if not labels:
            got = f"of {len(unmatched):,} images, such as {some}" if unmatched else "(no images)"
            raise ValueError(f"{part_dir}: the label pattern matches no name {got}")
        rows = [Row(os.path.relpath(image, root), *labels[image], part or 0) for image in labels]
        left_out = []
        if unmatched:
            count = f"{len(unmatched):,} images that the pattern does not match"
            left_out.append(f"{count} left out, such as {some}")
    elif len(folders) < 2 and len(tables) == 1 or no_ranks and _find_table(part_dir, files):
        rows, others = _read_table(tables[0], part_dir, root, options, part), Counter()
        left_out = [f"labels of {os.path.relpath(tables[0], root)}"]
        images = {os.path.relpath(image, root) for image in find_images(part_dir)[0]}
        if unlisted := len(images - {row.path for row in rows}):
            left_out.append(f"{unlisted:,} images without a label left out")
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
        beside = [path for path in files if not is_image(path) and path.name.lower() != "ranks.txt"]
        rows, others = [], Counter(path.suffix.lower() or "no suffix" for path in beside)
        names, left_out = folder_names, []
        if all(map(rank_key, folder_names)):
            for path in beside:
                left_out += check_agreement(part_dir, path)
        for rank_dir in folders:
            if train := _find_parts({path: path.name for path in rank_dir.iterdir()})[0]:
                wanted = part_dir / train.name / rank_dir.name
                raise ValueError(f"{train}: the parts come first; expected {wanted}")
            images, others_of_rank = find_images(rank_dir)
            others += others_of_rank
            label = nfc(rank_dir.name)
            rows += [Row(os.path.relpath(path, root), label, None, part or 0) for path in images]
        if num_images := sum(map(is_image, files)):
            left_out.append(f"{num_images:,} images beside the folders of {part_dir.name} left out")
    if others:
        left_out.append(count_types(others))
    return rows, names, left_out


def _read_table(
    table: Path, folder: Path, root: Path, options: Options, part: int | None
) -> list[Row]:
    """The images of a list or table, whose paths are relative to `folder`."""
    split_column, part_of = _find_split(table, folder, part)
    columns = [column for column in (options.group, split_column) if column]
    rows = []
    for path, label, *cells in read_texts(table, folder, columns, options.allow_missing):
        path = path if folder == root else os.path.relpath(folder / path, root)
        group = cells[0] if options.group else None
        part_of_row = part_of[cells[-1].lower()] if split_column else part or 0
        rows.append(Row(path, label, group, part_of_row))
    return rows


def _find_split(table: Path, folder: Path, part: int | None) -> tuple[str | None, dict[str, int]]:
    """(column, {cell: part}) of the first column of names of parts; (None, {}) without one."""
    columns = SPLIT_COLUMNS | PERHAPS_SPLIT_COLUMNS
    for column in filter(columns.__contains__, read_header(table, folder)):
        is_perhaps = column in PERHAPS_SPLIT_COLUMNS
        try:
            rows = parse_rows(table, folder, [column])
            cells = dict.fromkeys(cell.lower() for *_, cell in rows)
        except ValueError:  # an empty cell, say
            if is_perhaps:
                continue
            raise
        parts = _find_parts({Path(cell): cell for cell in cells})
        index = {path.name: i for i, path in enumerate(parts) if path}
        if not index and (is_perhaps or len(cells) not in (2, 3)):
            continue  # of folds, say
        if is_perhaps and part is not None and len(cells) == 1:
            continue  # a list cut out of one part of another split
        if other := [cell for cell in cells if cell not in index]:
            raise ValueError(
                f"{table}: column {column} has {other[0]!r}, no name of a part; write train, val "
                "and test, or give the column another name"
            )
        if part is not None and {*index.values()} != {part}:
            raise ValueError(
                f"{table}: column {column} names other parts than this list; make train.csv, "
                "val.csv, test.csv"
            )
        return column, index
    return None, {}


def _find_table(folder: Path, files: list[Path]) -> list[Path]:
    """The one table among files, if its header names paths and labels; else []."""
    tables = [file for file in files if file.suffix.lower() in (".csv", ".tsv")]
    has_labels = len(tables) == 1 and {*LABEL_COLUMNS} & {*read_header(tables[0], folder)}
    return tables if has_labels else []


def _unused_columns(folder: Path, tables: list[Path], names: set[str]) -> list[str]:
    """Notes on columns of tables in use that may be a split, but are not read as one."""
    notes = []
    for table in tables:
        is_table = table.suffix.lower() in (".csv", ".tsv")
        header = read_header(table, folder) if is_table else ()
        if columns := names.intersection(header):
            notes.append(f"column {', '.join(sorted(columns))} of {table.name} not used")
    return notes


def _find_part_dirs(
    folder: Path, folders: list[Path], files: list[Path], options: Options
) -> Sources:
    """The folders of train, val and test; [] if there are none, or a table above has all of it."""

    def has_labels(part_dir: Path) -> bool:
        ranks, files = _list_folder(part_dir)
        return bool(ranks) or any(file.suffix.lower() in (".csv", ".tsv") for file in files)

    part_dirs = _find_parts({path: path.name for path in folders})
    if not any(part_dirs):
        return []
    if options.label_pattern or any(map(has_labels, filter(None, part_dirs))):
        return part_dirs
    if not (tables := _find_table(folder, files)):
        return part_dirs
    if _find_split(tables[0], folder, None)[0] is None:
        raise ValueError(
            f"{tables[0]} has the labels, but not the parts, which are folders; add a column split "
            "of train, val and test, or make train.csv, val.csv and test.csv"
        )
    return []


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


def _list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """(folders, other files) in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        entries = sorted((entry.path, entry.is_dir()) for entry in entries)
    entries = [(Path(path), is_dir) for path, is_dir in entries if not is_hidden(Path(path).name)]
    return [path for path, is_dir in entries if is_dir], [p for p, is_dir in entries if not is_dir]


def _find_lists(folder: Path) -> list[Path]:
    """Files that may be lists, by their names; not those that a run writes."""
    return [
        path
        for path in _list_folder(folder)[1]
        if path.suffix.lower() in (".txt", ".csv", ".tsv", ".json", ".jsonl")
        and re.search(LIST_WORD, path.stem.casefold())
        and path.name != REAL_LABELS
    ]


def _read_ranks(folder: Path) -> list[str] | None:
    path = next((path for path in folder.glob("*.*") if path.name.lower() == "ranks.txt"), None)
    lines = [*read_lines(path, comment=None)] if path else []
    for number, line in lines:
        if re.match("#[^# ]", line):
            raise ValueError(
                f"{path}:{number}: is {line!r} a comment or a rank? write a space after #, or give "
                "the rank another name"
            )
    names = path and [nfc(line) for _, line in lines if line[0] != "#"]
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"{path} names a rank twice; give one name a line, lowest rank first")
    return names
