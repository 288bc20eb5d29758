"""Image aesthetics (beauty-icwsm15): Flickr photos in 5 ranks and 4 categories.

Five random splits of 75 / 5 / 20 % within each category. Each photo has several scores;
--label-rule takes their `median` (rounded down) or `mean` (rounded, halves to even).
Read after lists.py and task.py. Copy together with: those two, files.py, download.py.
"""

import math
import os
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from .download import Release
from .files import is_image, raise_if_any, read_lines
from .lists import Sample, read_table
from .task import Options, Task, conflict_warning, count_warning, find_path, make_task, split_counts

PRESET = dict(
    context="the aesthetic quality of the image is",
    rank_names=("unacceptable", "flawed", "ordinary", "professional", "exceptional"),
    splits=("random",),
    folds=5,
    label_rules=("median", "mean"),
    categories=("all", "nature", "animal", "urban", "people"),
)
TABLE = "beauty-icwsm15-dataset.tsv"
IMAGE_DIRS = ("img_files", "images", ".")
COUNTS = dict(nature=4681, animal=3670, urban=3639, people=3696)  # published rows, 15,686 in all
COLUMNS = ("flickr_photo_id", "category", "beauty_scores")
URL = f"http://www.di.unito.it/~schifane/dataset/beauty-icwsm15/data/{TABLE}.zip"
PHOTOS = """The photos are on Flickr, each under its id; many are gone. Put what can be had here:
  {root}/
    img_files/<flickr_photo_id>.jpg ..."""
HOW_TO_GET = f"""The ratings (Schifanella, Redi, Aiello, ICWSM 2015) are in
{URL}
python -m data aesthetics --download unpacks them here; or do it yourself:
  {{root}}/
    {TABLE}
{PHOTOS}"""


def load(root: Path, options: Options) -> Task:
    """The Task, with paths relative to the folder of the photos; photos may be missing."""
    image_dir = find_path(root, IMAGE_DIRS, HOW_TO_GET)
    if options.lists:
        _check_labels_are_ranks(filter(None, options.lists))
        parts = options.read_lists(image_dir, len(PRESET["rank_names"]))
        return make_task("aesthetics", PRESET, image_dir, parts, options)
    table = find_path(root, [TABLE], HOW_TO_GET)
    rows, notes = _read_release(table, options.label_rule)
    images = {
        Path(name).stem: name
        for name in sorted(os.listdir(image_dir))
        if is_image(image_dir / name)
    }
    categories = [name for name in COUNTS if options.category in ("all", name)]
    parts, num_rows = [[], [], []], sum(category in categories for category, _ in rows.values())
    for name in categories:  # each is split by itself
        photos = [photo for photo, row in rows.items() if row[0] == name and photo in images]
        num_val, num_test = math.ceil(len(photos) / 20), math.ceil(len(photos) / 5)
        for part, subset in zip(parts, split_counts(photos, num_val, num_test, options.salt)):
            part += [Sample(images[photo], rows[photo][1]) for photo in subset]
        notes += count_warning(f"images of {name}", len(photos), COUNTS[name])
    num_missing = num_rows - sum(map(len, parts))
    if num_missing == num_rows:
        raise FileNotFoundError(
            f"{table}: none of its {num_rows:,} images of category {options.category} is "
            f"there; expected {image_dir}/<flickr_photo_id>.jpg"
        )
    description = options.describe()
    if num_missing:
        description += f", {num_missing:,} of {num_rows:,} rows have no image"
    return make_task("aesthetics", PRESET, image_dir, parts, options, description, notes)


def _read_release(table: Path, rule: str) -> tuple[dict[str, tuple[str, int]], list[str]]:
    """({photo id: (category, rank)}, notes)"""
    rows, errors = {}, []
    lines = read_table(table, "\t", COLUMNS)
    for number, row in lines:
        photo, category, scores = (row[column] for column in COLUMNS)
        category = {"animals": "animal"}.get(category, category)
        is_rating = re.fullmatch("[1-5](, ?[1-5])*", scores)
        if not (photo and is_rating and category in COUNTS):
            errors.append(
                f"{table}:{number}: expected a photo id, a category (nature, people, "
                f"animals, urban) and scores such as 3,2,4 of 1 .. 5, got {photo!r}, "
                f"{row['category']!r}, {scores!r}"
            )
            continue
        scores = [int(score) for score in scores.split(",")]
        score = (
            int(statistics.median(scores)) if rule == "median" else round(statistics.mean(scores))
        )
        rank = score - 1  # scores count from 1, ranks from 0
        rows.setdefault(photo, []).append((category, rank))
    raise_if_any(errors)
    repeats = len(lines) - len(rows)
    notes = count_warning("rows", len(lines), sum(COUNTS.values()))
    notes += [f"{repeats:,} rows repeat a photo; its first row counts"] * bool(repeats)
    notes += conflict_warning("photo has rows", "photos have rows", "that contradict", rows)
    return {photo: several[0] for photo, several in rows.items()}, notes


def _check_labels_are_ranks(paths: Iterable[Path]) -> None:
    """Refuse public lists with scores 1.0 .. 5.0: read as ranks, all would be one too high."""
    for path in paths:
        for number, line in read_lines(path):
            if score := re.search(r"[\s,](\d+\.\d+)$", line):
                raise ValueError(
                    f"{path}:{number}: label {score[1]} is a score of 1.0 .. 5.0; expected "
                    "a rank of 0 .. 4: subtract 1 and write a whole number"
                )


def count_differences(root: Path) -> list[str]:
    """[] if root holds the table with as many rows as published."""
    table = root / TABLE
    rows = read_table(table, "\t", COLUMNS) if table.is_file() else []
    return count_warning("rows of ratings", len(rows), sum(COUNTS.values()))


DOWNLOAD = Release(
    URL,
    "none is known for the ratings; each photo has its own, on its page at Flickr. "
    "Cite Schifanella, Redi, Aiello (ICWSM 2015)",
    count_differences,  # no checksum of the archive is published
    further=f"{PHOTOS}\n(flickr.photos.getSizes of Flickr's API, with a key, gives the addresses)",
)
