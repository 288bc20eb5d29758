"""Adience: faces in 8 age groups, in the five published folds, no person in two of them.

The tables hold more ages than the eight groups; --label-rule decides: `exact` takes only the
groups, `merged` also (25, 23) and (27, 32), each image once, `inside` every age or interval that
lies inside a group. Read after lists.py and task.py. Copy together with: those two, files.py.
"""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from .files import raise_if_any
from .lists import Sample, read_table, resolve_paths
from .task import Options, Task, conflict_warning, count_warning, find_path, hold_out, make_task

PRESET = dict(
    context="age estimation: the age group of the person is",
    # the paper's names; the tables write (8, 12) for 8-13
    rank_names=("0-2", "4-6", "8-13", "15-20", "25-32", "38-43", "48-53", "60-100"),
    splits=("five-fold",),
    folds=5,
    label_rules=("exact", "merged", "inside"),
)
INTERVALS = [(0, 2), (4, 6), (8, 12), (15, 20), (25, 32), (38, 43), (48, 53), (60, 100)]
RANK_OF_AGE = {str(interval): rank for rank, interval in enumerate(INTERVALS)}  # "(0, 2)": 0
RANK_OF_TYPO = {"(25, 23)": 4, "(27, 32)": 4}
TABLE_DIRS = (".", "folds", "original_txt_files")
FILE_STEMS = {"aligned": "landmark_aligned_face", "faces": "coarse_tilt_aligned_face"}
# The published numbers, of ranks and folds under `exact`:
NUM_ROWS, NUM_MERGED = 19487, 17470
RANK_COUNTS = (2519, 2163, 2132, 1655, 4950, 2300, 830, 875)
FOLD_COUNTS = (4316, 3101, 3339, 2975, 3693)
HOW_TO_GET = """Adience is free for research; its terms and the login to its files are at
https://talhassner.github.io/home/projects/Adience/Adience-data.html
Unpack aligned.tar.gz (or faces.tar.gz) and put the tables of the five folds beside it:
  {root}/
    fold_0_data.txt .. fold_4_data.txt
    aligned/30601258@N03/landmark_aligned_face.1.10399863183_a04f4c26a1_o.jpg ...
    or faces/30601258@N03/coarse_tilt_aligned_face.1.10399863183_a04f4c26a1_o.jpg ..."""


class Face(NamedTuple):
    fold: int
    path: str  # under the image folder
    age: str  # as written
    rank: int | None = None


def load(root: Path, options: Options) -> Task:
    """The Task, with paths relative to root/aligned or root/faces; `fold` is the test part."""
    image_dir, notes = find_path(root, FILE_STEMS, HOW_TO_GET), []
    if options.lists:
        parts = options.read_lists(image_dir, len(PRESET["rank_names"]), allow_conflicts=True)
    else:
        rows, notes = _label(_read_release(root, image_dir), options.label_rule)
        images = ((row.path, row) for row in rows)
        test, rest = [], []
        for path, row in resolve_paths(image_dir, images, root, options.allow_missing):
            (test if row.fold == options.fold else rest).append(Sample(path, row.rank))
        parts = [*hold_out(rest, 0.1, f"val/{options.salt}", stratify=False), test]  # by image
    return make_task("adience", PRESET, image_dir, parts, options, notes=notes)


def _read_release(root: Path, image_dir: Path) -> list[Face]:
    """The rows of the five tables."""
    rows, errors, columns = [], [], ("user_id", "original_image", "face_id", "age")
    for fold in range(PRESET["folds"]):
        tables = [f"{folder}/fold_{fold}_data.txt" for folder in TABLE_DIRS]
        table = find_path(root, tables, HOW_TO_GET)
        for number, row in read_table(table, "\t", columns):
            user, image, face, age = (row[column] for column in columns)
            if not (user and image and face):
                errors.append(
                    f"{table}:{number}: expected {', '.join(columns)}, got {user!r}, "
                    f"{image!r}, {face!r}, {age!r}"
                )
            rows.append(Face(fold, f"{user}/{FILE_STEMS[image_dir.name]}.{face}.{image}", age))
    raise_if_any(errors)
    return rows


def _label(rows: list[Face], rule: str) -> tuple[list[Face], list[str]]:
    """(rows with ranks, notes). Only `merged` drops the further rows of an image."""
    labelled, unlabelled, ranks, repeats, people = [], Counter(), {}, 0, {}
    for row in rows:
        people.setdefault(row.path.split("/")[0], set()).add(row.fold)
        rank = _rank(row.age, rule)
        if rank is None:
            unlabelled[row.age or "empty"] += 1
            continue
        repeats += row.path in ranks
        if rule != "merged" or row.path not in ranks:
            labelled.append(row._replace(rank=rank))
        ranks.setdefault(row.path, set()).add(rank)
    ages = ", ".join(f"{age} x {count:,}" for age, count in unlabelled.most_common())
    notes = count_warning("rows", len(rows), NUM_ROWS) + _count_warnings(labelled, rule)
    action = "left out" if rule == "merged" else "kept"
    notes += [f"{repeats:,} rows repeat an image, {action}"] * bool(repeats)
    notes += conflict_warning("image has rows", "images have rows", "of different ranks", ranks)
    notes += conflict_warning("person is", "people are", "in more than one fold", people)
    notes.append(f"{unlabelled.total():,} rows left out, by age: {ages}")
    return labelled, notes


def _rank(age: str, rule: str) -> int | None:
    """The rank of an age as written, None if the rule leaves it out."""
    if rule != "inside":
        return (RANK_OF_AGE | (RANK_OF_TYPO if rule == "merged" else {})).get(age)
    if not re.fullmatch(r"\d+|\(\d+, ?\d+\)", age):
        return None
    ends = [int(end) for end in re.findall(r"\d+", age)]  # one age is its own interval
    for rank, name in enumerate(PRESET["rank_names"]):
        low, high = map(int, name.split("-"))
        # (25, 23) counts as 25-32, as in the public code that has this rule
        if low <= ends[0] and ends[-1] <= high:
            return rank
    return None


def _count_warnings(rows: list[Face], rule: str) -> list[str]:
    """Where the labelled rows differ in number from the published lists."""
    if rule == "merged":
        return count_warning("images", len(rows), NUM_MERGED)
    if rule == "inside":
        return []  # no list of it is published
    by_rank, by_fold = Counter(row.rank for row in rows), Counter(row.fold for row in rows)
    notes = count_warning("labelled rows", len(rows), sum(RANK_COUNTS))
    for rank, (name, expected) in enumerate(zip(PRESET["rank_names"], RANK_COUNTS)):
        notes += count_warning(f"rank {name}", by_rank[rank], expected)
    for fold, expected in enumerate(FOLD_COUNTS):
        notes += count_warning(f"fold {fold}", by_fold[fold], expected)
    return notes
