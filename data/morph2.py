"""MORPH Album 2 (2008, non-commercial release): ages 0 .. 100 as ranks, licensed by UNCW.

The paper's "Setting A": 5,492 images of race W, drawn by the seed, 80 / 20 at random
(`random`: a person may be in both), or with people kept apart (`subject-exclusive`).
Read after lists.py and task.py. Copy together with: those two, files.py.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .files import raise_if_any
from .lists import Sample, Samples, parse_integer, parse_list, read_table, resolve_paths
from .task import Options, Task, find_path, hold_out, make_task, shuffled

PRESET = dict(
    context="age estimation: the age of the person is",
    rank_names=tuple(str(age) for age in range(101)),
    splits=("random", "subject-exclusive"),
    folds=5,
    any_fold=True,  # 5 are published; other numbers are further splits
)
TABLE = "morph_2008_nonCommercial.csv"
NUM_ROWS = 55134
RACE, NUM_IMAGES, TEST_SHARE = "W", 5492, 0.2  # 4,394 / 1,098
HOW_TO_GET = """MORPH Album 2 (2008, non-commercial release) is licensed by UNCW; request it at
https://uncw.edu/myuncw/research/innovation-commercialization/technology-portfolio/morph
and put it here, as published:
  {root}/
    morph_2008_nonCommercial.csv
    Album2/009055_1M54.JPG ..."""

Photos = dict[str, tuple[int, str]]  # {photo: (age, race)}


def load(root: Path, options: Options) -> Task:
    """The Task; lists of MORPH images, wherever they say that these lie, may replace the split."""
    table = find_path(root, [TABLE], HOW_TO_GET)
    photos, notes = read_release(table)
    if options.lists:
        description = options.describe()
        parts = [path and _match_list(path, photos) for path in options.lists]
    else:
        description, parts = _split(photos, options)
    if len(photos) != NUM_ROWS:
        description += f", release of {len(photos):,} images where {NUM_ROWS:,} are expected"
    parts = [
        samples and Samples(resolve_paths(root, samples, table, options.allow_missing))
        for samples in parts
    ]
    return make_task("morph2", PRESET, root, parts, options, description, notes)


def read_release(table: Path) -> tuple[Photos, list[str]]:
    """({photo: (age, race)}, notes) of the table; photos are relative to its folder."""
    photos, errors, rows = {}, [], read_table(table, ",", ("race", "age", "photo"))
    for number, row in rows:
        photo, age = row["photo"], parse_integer(row["age"])
        name = re.fullmatch(r"\d+_\d+[MF](\d+)\.jpg", os.path.basename(photo), re.IGNORECASE)
        if name is None or age is None or not 0 <= age < len(PRESET["rank_names"]):
            errors.append(
                f"{table}:{number}: expected an age of 0 .. 100 and a photo such as "
                f"Album2/009055_1M54.JPG, got {row['age']!r} and {photo!r}"
            )
            continue
        if int(name[1]) != age:
            errors.append(f"{table}:{number}: age {age}, but the name of {photo} says {name[1]}")
        photos[photo] = age, row["race"].upper()
    raise_if_any(errors)
    return photos, [*table_inconsistencies([row for _, row in rows])]


def table_inconsistencies(rows: list[dict[str, str]]) -> Iterator[str]:
    """One person with several races, genders or birth dates; ages that do not match the dates."""
    people = {}
    for row in rows:
        people.setdefault(subject_id(row["photo"]), []).append(row)
    for column in ("race", "gender", "dob"):
        odd = sum(
            len({row[column] for row in photos if row.get(column)}) > 1
            for photos in people.values()
        )
        if odd:
            yield f"{odd:,} of {len(people):,} people have more than one {column} in the table"
    num_wrong_ages = 0
    for row in rows:
        birth, photo = (re.search(r"\d{4}", row.get(column, "")) for column in ("dob", "doa"))
        if birth and photo:  # one year less before the birthday
            num_wrong_ages += int(photo[0]) - int(birth[0]) - int(float(row["age"])) not in (0, 1)
    if num_wrong_ages:
        share = f"{num_wrong_ages:,} of {len(rows):,} rows"
        yield f"{share} have an age that their dob and doa contradict"


def subject_id(path: str) -> str:
    return os.path.basename(path).split("_")[0]  # 009055_1M54.JPG


def _split(photos: Photos, options: Options) -> tuple[str, list[Sequence[Sample]]]:
    """(description, [train, val, test]) of the images of one race."""
    names = [photo for photo, (_, race) in photos.items() if race == RACE]
    subset = shuffled(names, f"draw/{options.seed}")[:NUM_IMAGES]
    share = f"{len(subset):,} of {len(names):,}"
    if len(names) < NUM_IMAGES:
        share = f"all {len(names):,} (of {NUM_IMAGES:,} wanted)"
    group = subject_id if options.split == "subject-exclusive" else str
    samples = [Sample(photo, photos[photo][0]) for photo in sorted(subset)]
    rest, test = hold_out(samples, TEST_SHARE, f"test/{options.salt}", group, stratify=False)
    train, val = hold_out(rest, 0.1, f"val/{options.salt}", group)
    return f"{share} images of race {RACE}, {options.describe()}", [train, val, test]


def _match_list(path: Path, photos: Photos) -> list[Sample]:
    """A list of MORPH images, matched by file name; ValueError where its ages are not ours."""
    by_name = {os.path.basename(photo).lower(): (photo, age) for photo, (age, _) in photos.items()}
    samples = []
    for line, image, label in parse_list(path):
        photo, age = by_name.get(os.path.basename(image).lower(), (None, None))
        if age != label:
            reason = "is not in the release" if photo is None else f"has age {age} there"
            raise ValueError(f"{path}:{line}: {image} with age {label}, but it {reason}")
        samples.append(Sample(photo, label))
    return samples
