"""The datasets, each under a named protocol: lists of (image path, rank), and their images.

    task = load("demo")                  # or "morph2", "adience", "aesthetics", "hci", or a folder
    images = ImageList(task.train, task.root, image_size=224, train=True)
    image, label = images[0]                               # uint8 (3, 224, 224), rank index
    batch = normalize(image[None], CLIP_MEAN, CLIP_STD)    # float32 (1, 3, 224, 224)

A new dataset is one new file: data/NAME.py with a dict PRESET (context, rank_names, splits, folds;
rank_values, label_rules, categories, any_fold where it has them) and load(root, options) -> Task;
perhaps default_root(), HOW_TO_GET, DOWNLOAD.
`python -m data NAME` counts and opens a release; folder.py describes your own images.

Differs from the official code (xk-huang/OrdinalCLIP@ca10a20): validation images are not the test
images unless lists say so, and then the protocol does; labels are checked when read, and paths may
hold spaces (ordinalclip/runner/data.py#L70).
Read this file, then files.py, lists.py, task.py, images.py and one release: hci.py is the shortest.
Copy together with: nothing but this folder; needs torch>=2.4, numpy, pillow.
"""

# ruff: noqa: F401 (names for `import data`)
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import folder
from .check import check_images
from .demo import make_demo
from .files import IMAGE_TYPES, atomic_write, cache_dir, count_types, find_images
from .groups import LEAVE_ONE_OUT
from .images import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageList,
    normalize,
    read_image,
    to_rgb,
)
from .lists import LABEL_COLUMNS, PATH_COLUMNS, Sample, Samples, read_list, read_paths
from .task import PARTS, Options, Task, distribution_shift, few_shot

LABEL_OPTIONS = {  # flags of train.py and `python -m data`, for own images
    "--label-pattern": "regular expression of the label in file names: '^(\\d+)_' reads "
    "25_0_1.jpg; with (?P<group>...) for the person",
    "--ranks": "LOW-HIGH such as 0-100, each number a rank; or present: the labels that occur",
    "--bins": "for real-valued labels: number of equal bins, or their edges 0,1.5,3,10",
    "--group": "column of a list or table that names the person: none is in two parts",
}

shifted = distribution_shift  # its former name

_names = [file.name for file in pkgutil.iter_modules(__path__) if file.name != "__main__"]
_modules = {name: importlib.import_module(f".{name}", __name__) for name in _names}
_modules = {name: module for name, module in _modules.items() if hasattr(module, "PRESET")}
DATASETS: dict[str, dict[str, Any]] = {name: module.PRESET for name, module in _modules.items()}


def load(
    name_or_path: str | Path,
    root: str | Path | None = None,
    *,
    split: str | None = None,
    fold: int = 0,
    seed: int = 1,
    lists: Sequence[str | Path | None] | None = None,
    category: str | None = None,
    label_rule: str | None = None,
    allow_missing: bool = False,
    label_pattern: str | None = None,
    ranks: str | None = None,
    bins: str | None = None,
    group: str | None = None,
) -> Task:
    """The Task of a dataset in DATASETS, or of a folder of your own images.

    root: where the release lies (default data/NAME; demo: a cache folder; own images: the folder).
    lists: (train, val or None, test or None), list files that decide the split; not for the demo.
        Their paths are relative to the folder of images (adience: aligned, hci: decade_database).
    split, category (aesthetics), label_rule (adience, aesthetics): default the preset's first.
    allow_missing: list images that are not on disk instead of raising FileNotFoundError.
    Of own images alone: label_pattern: regular expression of the label in file names; ranks:
        "16-77" or "present"; bins: "20", or edges "0,1.5,3", of real-valued labels; group: the
        column of a list or table that names the person; split: also "leave-one-group-out".
    Raises ValueError for unknown names and options, and for tables or lists that do not parse.
    """
    name = str(name_or_path)
    if name not in DATASETS and not Path(name).is_dir():
        choices = f"{', '.join(DATASETS)} or a folder of own data"
        raise ValueError(f"there is no dataset or folder {name!r}; give {choices}")
    preset = DATASETS.get(name, {})
    if preset and not preset.get("any_fold") and not 0 <= fold < preset["folds"]:
        raise ValueError(f"{name} has no fold {fold}; give 0 .. {preset['folds'] - 1}")
    split = _check_option(name, "split", split, preset.get("splits", folder.SPLITS))
    category = _check_option(name, "category", category, preset.get("categories"))
    label_rule = _check_option(name, "label_rule", label_rule, preset.get("label_rules"))
    lists = lists and tuple(path and Path(path) for path in lists)
    own = dict(label_pattern=label_pattern, ranks=ranks, bins=bins, group=group)
    for option, value in own.items() if preset else ():
        _check_option(name, option, value, None)
    options = Options(split, fold, seed, lists, category, label_rule, allow_missing, **own)
    if name not in DATASETS and fold < 0:
        raise ValueError(f"{name} has no fold {fold}; give a number from 0")
    if name not in DATASETS:
        return folder.load(Path(name), Path(root or name), options)
    default_root = getattr(_modules[name], "default_root", lambda: f"data/{name}")
    return _modules[name].load(Path(root or default_root()), options)


def _check_option(
    name: str, option: str, value: str | None, choices: Sequence[str] | None
) -> str | None:
    """The value, by default the first choice; None if the dataset has no such option."""
    if value is None:
        return choices[0] if choices else None
    if choices and value in choices:
        return value
    if not choices:
        raise ValueError(f"{name} has no {option}, got {value!r}; leave it out")
    raise ValueError(f"{name} has no {option} {value!r}; give {' or '.join(choices)}")
