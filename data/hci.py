"""Historical colour images: photos of five decades, 265 of each; public.

Ten random splits of 210 / 5 / 50 images a decade. The shortest release: the one to copy for a new
dataset. Read after lists.py and task.py. Copy together with: those two, files.py, download.py.
"""

import os
from pathlib import Path

from .download import Release
from .files import is_image
from .lists import Sample
from .task import Options, Task, conflict_warning, count_warning, find_path, make_task, split_counts

PRESET = dict(
    context="a photo taken in the",
    rank_names=("1930s", "1940s", "1950s", "1960s", "1970s"),
    rank_values=(1930.0, 1940.0, 1950.0, 1960.0, 1970.0),
    splits=("random",),
    folds=10,
)
NUM_IMAGES, NUM_VAL, NUM_TEST = 265, 5, 50  # of each decade
IMAGE_DIRS = (
    "decade_database",
    "data/imgs/decade_database",
    "HistoricalColor-ECCV2012/data/imgs/decade_database",
    ".",
)
DECADE_DIRS = [f"{name}/1930s" for name in IMAGE_DIRS]
PROJECT = "http://graphics.cs.cmu.edu/projects/historicalColor"
URL = f"{PROJECT}/HistoricalColor-ECCV2012-DecadeDatabase.tar"
MD5 = "afb4c47b7da105c4afd1f27e06bea171"  # as in dlordinal's loader; no sha256 is published
HOW_TO_GET = f"""The historical colour images (Palermo, Hays, Efros, ECCV 2012) are in
{URL}
(md5 {MD5}). python -m data hci --download unpacks it here; or do it yourself:
  {{root}}/
    HistoricalColor-ECCV2012/data/imgs/decade_database/1930s/decade_<32 hex digits>.jpg ..."""


def load(root: Path, options: Options) -> Task:
    """The Task, with paths relative to the folder that holds the decades."""
    image_dir = find_path(root, DECADE_DIRS, HOW_TO_GET).parent
    if options.lists:
        parts = options.read_lists(image_dir, len(PRESET["rank_names"]))
        return make_task("hci", PRESET, image_dir, parts, options)
    parts, notes, decades_by_name = [[], [], []], [], {}
    for rank, decade in enumerate(PRESET["rank_names"]):
        folder = image_dir / decade
        names = _image_names(folder)
        if len(names) <= NUM_VAL + NUM_TEST:
            raise ValueError(
                f"{folder}: {len(names)} images, expected {NUM_IMAGES}, at "
                f"least {NUM_VAL + NUM_TEST + 1}; unpack the release again"
            )
        paths = [f"{decade}/{name}" for name in names]
        for part, subset in zip(parts, split_counts(paths, NUM_VAL, NUM_TEST, options.salt)):
            part += [Sample(path, rank) for path in subset]
        notes += count_warning(f"images of the {decade}", len(names), NUM_IMAGES)
        for name in names:
            decades_by_name.setdefault(name, []).append(decade)
    notes += conflict_warning(
        "file name is", "file names are", "in more than one decade", decades_by_name
    )
    description, num_images = options.describe(), sum(map(len, parts))
    expected = NUM_IMAGES * len(PRESET["rank_names"])
    if num_images != expected:
        description += f", release of {num_images:,} images where {expected:,} are expected"
    return make_task("hci", PRESET, image_dir, parts, options, description, notes)


def _image_names(folder: Path) -> list[str]:
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [name for name in names if is_image(folder / name)]


def count_differences(root: Path) -> list[str]:
    """The decades under root that lack images, or have too many."""
    first = next((root / name for name in DECADE_DIRS if (root / name).exists()), root / "1930s")
    notes = []
    for decade in PRESET["rank_names"]:
        num_images = len(_image_names(first.parent / decade))
        notes += count_warning(f"images of the {decade}", num_images, NUM_IMAGES)
    return notes


DOWNLOAD = Release(
    URL,
    "none is known for the collection; the photos belong to their photographers. "
    "Cite Palermo, Hays, Efros (ECCV 2012)",
    count_differences,
    MD5,
)
