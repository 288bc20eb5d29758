"""Historical colour images: photos of five decades, 265 of each; public.

Ten random splits of 210 / 5 / 50 images a decade. The shortest release: the one to copy for a new
dataset. Read after lists.py and task.py. Copy together with: those two.
"""

import os
from pathlib import Path

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
HOW_TO_GET = """The historical colour images (Palermo, Hays, Efros, ECCV 2012) are in
http://graphics.cs.cmu.edu/projects/historicalColor/HistoricalColor-ECCV2012-DecadeDatabase.tar
(md5 afb4c47b7da105c4afd1f27e06bea171). Unpack it, so that here lies
  {root}/
    HistoricalColor-ECCV2012/data/imgs/decade_database/1930s/decade_<32 hex digits>.jpg ..."""


def load(root: Path, options: Options) -> Task:
    """The Task, with paths relative to the folder that holds the decades."""
    image_dir = find_path(root, [f"{name}/1930s" for name in IMAGE_DIRS], HOW_TO_GET).parent
    if options.lists:
        parts = options.read_lists(image_dir, len(PRESET["rank_names"]))
        return make_task("hci", PRESET, image_dir, parts, options)
    parts, notes, decades_by_name = [[], [], []], [], {}
    for rank, decade in enumerate(PRESET["rank_names"]):
        folder = image_dir / decade
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        names = [name for name in names if is_image(folder / name)]
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
