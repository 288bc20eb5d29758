"""The datasets, each under a named protocol: lists of (image path, rank), and their images.

    task = load("demo")                  # or "morph2", "adience", "aesthetics", "hci", or a folder
    images = ImageList(task.train, task.root, image_size=224, train=True)
    image, label = images[0]                               # uint8 (3, 224, 224), rank index
    batch = normalize(image[None], CLIP_MEAN, CLIP_STD)    # float32 (1, 3, 224, 224)

Letters: B images, R ranks, S image size. Contents: presets, Task, load, read_list, read_image,
ImageList, normalize; then lists, splits, image modes, a reader per dataset, the demo, the check.

Own data is a folder in one of three layouts (names may hold spaces; ranks count from the lowest):
    PATH/<rank>/*.jpg                     split here: 80 / 10 / 10 %, in proportion within each rank
    PATH/{train,val,test}/<rank>/*.jpg    split by you; val or test may be missing
    PATH/{train,val,test}.txt             lines `path label`, or .csv, .tsv; label = 0 .. R-1
PATH/ranks.txt (or beside a list) names the ranks, one a line, in order; folders that start with a
number need none.
Without a test part val is the test part too; without a val part 10 % of train are held out for it.

Splits order the images by a hash of (seed, fold, path): the same on every machine and version.
Differs from the official code (xk-huang/OrdinalCLIP@ca10a20): validation images are not the test
images unless lists say so, and then the protocol does; labels are checked when read, and paths may
hold spaces (ordinalclip/runner/data.py#L70); every image mode is read as a person sees it, not only
RGB and L (#L96); the aspect ratio is kept (`squash=True`: as ordinalclip/runner/utils.py#L375).

`python data.py check NAME [ROOT]` reads a dataset, counts it, says where it differs from what is
published, and opens every image; `--out FOLDER` writes FOLDER/fold_K/{train,val,test}.txt.
Copy-paste: needs only this file, torch>=2.4, numpy, pillow.
"""

import argparse
import contextvars
import csv
import hashlib
import itertools
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS = {
    "demo": dict(
        context="age in years:",
        rank_names=tuple(str(years) for years in range(1, 31)),
        splits=("random",),
        folds=1,
        sizes=(2400, 300, 600),
    ),  # images of train, val, test
    "morph2": dict(
        context="age estimation: the age of the person is",
        rank_names=tuple(str(age) for age in range(101)),
        splits=("random", "subject-exclusive"),
        folds=5,  # 5 are published, more exist
        table="morph_2008_nonCommercial.csv",
        rows=55134,
        race="W",
        drawn=5492,
        test_share=0.2,  # "Setting A": 4,394 / 1,098
        get="""{missing} is not there.
MORPH Album 2 (2008, non-commercial release) is licensed by UNCW; request it at
https://uncw.edu/myuncw/research/innovation-commercialization/technology-portfolio/morph
and put it here, as published:
  {root}/
    morph_2008_nonCommercial.csv
    Album2/009055_1M54.JPG ...
To try things without it: --data demo""",
    ),
    "adience": dict(
        context="age estimation: the age group of the person is",
        rank_names=("0-2", "4-6", "8-13", "15-20", "25-32", "38-43", "48-53", "60-100"),
        ages=(
            "(0, 2)",
            "(4, 6)",
            "(8, 12)",
            "(15, 20)",
            "(25, 32)",
            "(38, 43)",
            "(48, 53)",
            "(60, 100)",
        ),  # as the tables spell the ranks
        typos={"(25, 23)": 4, "(27, 32)": 4},  # what "merged" adds
        splits=("five-fold",),
        folds=5,
        label_rules=("exact", "merged", "inside"),
        tables=(".", "folds", "original_txt_files"),
        images={"aligned": "landmark_aligned_face", "faces": "coarse_tilt_aligned_face"},
        rows=19487,
        counts=(2519, 2163, 2132, 1655, 4950, 2300, 830, 875),  # counts: "exact"
        fold_counts=(4316, 3101, 3339, 2975, 3693),
        merged_count=17470,
        get="""{missing} is not there.
Adience is free for research; its terms and the login to its files are at
https://talhassner.github.io/home/projects/Adience/Adience-data.html
Unpack aligned.tar.gz (or faces.tar.gz) and put the tables of the five folds beside it:
  {root}/
    fold_0_data.txt .. fold_4_data.txt
    aligned/30601258@N03/landmark_aligned_face.1.10399863183_a04f4c26a1_o.jpg ...
    or faces/30601258@N03/coarse_tilt_aligned_face.1.10399863183_a04f4c26a1_o.jpg ...
To try things without it: --data demo""",
    ),
    "aesthetics": dict(
        context="the aesthetic quality of the image is",
        rank_names=("unacceptable", "flawed", "ordinary", "professional", "exceptional"),
        splits=("random",),
        folds=5,
        label_rules=("median", "mean"),
        categories=("all", "nature", "animal", "urban", "people"),
        table="beauty-icwsm15-dataset.tsv",
        images=("img_files", "images", "."),
        counts=dict(nature=4681, animal=3670, urban=3639, people=3696),  # rows, 15,686 in all
        get="""{missing} is not there.
The ratings (Schifanella, Redi, Aiello, ICWSM 2015) are in
http://www.di.unito.it/~schifane/dataset/beauty-icwsm15/data/beauty-icwsm15-dataset.tsv.zip
The photos are on Flickr, each under its id; many are gone. Put what can be had here:
  {root}/
    beauty-icwsm15-dataset.tsv
    img_files/<flickr_photo_id>.jpg ...
To try things without it: --data demo""",
    ),
    "hci": dict(
        context="a photo taken in the",
        rank_names=("1930s", "1940s", "1950s", "1960s", "1970s"),
        rank_values=(1930.0, 1940.0, 1950.0, 1960.0, 1970.0),
        splits=("random",),
        folds=10,
        val=5,
        test=50,
        counts=(265,) * 5,  # of each decade
        images=(
            "decade_database",
            "data/imgs/decade_database",
            "HistoricalColor-ECCV2012/data/imgs/decade_database",
            ".",
        ),
        inside="1930s",  # what the images' folder holds
        get="""{missing} is not there.
The historical colour images (Palermo, Hays, Efros, ECCV 2012) are in
http://graphics.cs.cmu.edu/projects/historicalColor/HistoricalColor-ECCV2012-DecadeDatabase.tar
(md5 afb4c47b7da105c4afd1f27e06bea171). Unpack it, so that here lies
  {root}/
    HistoricalColor-ECCV2012/data/imgs/decade_database/1930s/decade_<32 hex digits>.jpg ...
To try things without it: --data demo""",
    ),
}
PARTS = ("train", "val", "test")
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PATH_COLUMNS = ("path", "image", "filename", "file", "file_name", "image_path", "photo")
LABEL_COLUMNS = ("label", "rank", "age", "class", "target")


class Sample(NamedTuple):
    path: str  # relative to the root, or absolute
    label: int  # rank index, 0 .. R-1


@dataclass(frozen=True)
class Task:
    """One dataset under one protocol."""

    name: str
    protocol: str  # one line, printed with every number
    root: Path
    rank_names: tuple[str, ...]  # R, lowest rank first
    rank_values: tuple[float, ...]  # R, what a rank is worth: age 16.0; or its index
    context: str  # the words before the rank in the prompt
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    val_is_test: bool = False
    notes: tuple[str, ...] = ()  # what is odd in the release; `check` prints them

    @property
    def num_ranks(self):
        return len(self.rank_names)

    def write_lists(self, folder):
        """Write {train,val,test}.txt (`path label`) and ranks.txt, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            _write_list(folder / f"{part}.txt", getattr(self, part))
        _write(folder / "ranks.txt", "".join(f"{name}\n" for name in self.rank_names))


def load(
    name_or_path,
    root=None,
    *,
    split=None,
    fold=0,
    seed=0,
    lists=None,
    category=None,
    label_rule=None,
):
    """The Task of a dataset in DATASETS, or of a folder of own data.

    root: where the release lies (default data/NAME; demo: a cache folder; own data: the folder).
    lists: (train, val or None, test or None), list files that decide the split; not for the demo.
        Their paths are relative to the images' folder (adience: aligned, hci: decade_database).
    split, category (aesthetics), label_rule (adience, aesthetics): default the preset's first.
    """
    name = str(name_or_path)
    if name not in DATASETS and not Path(name).is_dir():
        raise ValueError(
            f"there is no dataset or folder {name!r}; give {', '.join(DATASETS)} or a "
            "folder of own data"
        )
    preset = DATASETS.get(name, {})
    split = _choose(name, "split", split, preset.get("splits", ("random",)))
    category = _choose(name, "category", category, preset.get("categories"))
    rule = _choose(name, "label_rule", label_rule, preset.get("label_rules"))
    if lists is not None:
        lists = [path and Path(path) for path in lists]
    if name == "demo":
        return _load_demo(root, lists)
    if name not in DATASETS:
        return _load_own(Path(name), Path(root or name), fold, seed, lists)
    root = Path(root or f"data/{name}")
    if name == "morph2":
        return _load_morph2(root, split, fold, seed, lists)
    return _load_release(name, root, split, fold, seed, lists, category, rule)


def _choose(name, what, given, choices):
    if given is None or choices and given in choices:
        return given or choices and choices[0]
    if not choices:
        raise ValueError(f"{name} has no {what}, got {given!r}; leave it out")
    raise ValueError(f"{name} has no {what} {given!r}; give {' or '.join(choices)}")


def read_list(path, root, num_ranks=None):
    """The samples of a list file: .txt `path label` (the label is the last word), .csv or .tsv.

    A header is known by its names (PATH_COLUMNS, LABEL_COLUMNS) and picks the columns, also in a
    .txt. Images must lie under `root`, labels be 0 .. num_ranks-1.
    """
    rows = _parse_list(path)
    for line, _, label in rows:
        if label < 0 or num_ranks is not None and label >= num_ranks:
            highest = "" if num_ranks is None else f" .. {num_ranks - 1} ({num_ranks} ranks)"
            raise ValueError(f"{path}:{line}: label {label}, but ranks are counted 0{highest}")
    return _on_disk(root, [Sample(image, label) for _, image, label in rows], path)


def read_image(path):
    """An image of any mode as a person sees it, in RGB.

    Upright by its EXIF tag, first frame, transparency on white, 16 bits scaled to 8. What has no
    known white is refused: floating point, and 32-bit integers beyond 0 .. 65535.
    """
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # a copy would lose TIFF's tags
            return to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such image") from None
    except Exception as error:  # decoders raise many kinds
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def few_shot(task, shots, seed=0):
    """The task with `shots` training images of each rank, all where there are fewer; val and test stay.

    Source: xk-huang/OrdinalCLIP@ca10a20 ordinalclip/runner/data.py, generate_fewshot_dataset.
    """
    if shots < 1:
        raise ValueError(f"shots={shots}: expected at least 1 image of each rank")
    counts = np.bincount([sample.label for sample in task.train], minlength=task.num_ranks)
    fewer = (
        f" (all of the {(counts < shots).sum()} that have fewer)" if (counts < shots).any() else ""
    )
    return _fewer(
        task,
        {rank: shots for rank in range(task.num_ranks)},
        f"shots/{seed}",
        f"few-shot: {shots} of each rank{fewer}, drawn by seed {seed}",
    )


def shifted(task, ranks, keep, seed=0):
    """The task with the share `keep` (0 .. 1) of the training images of its most frequent `ranks`.

    At least one image of each stays, all of the other ranks; val and test stay as they are.
    Source: the same file, generate_distribution_shifted_dataset; paper: 10 to 40 ranks, 0.2 or 0.1.
    """
    if not 1 <= ranks <= task.num_ranks or not 0 < keep <= 1:
        raise ValueError(
            f"shift of {ranks} ranks to {keep}: expected 1 .. {task.num_ranks} ranks and "
            "a share above 0, at most 1"
        )
    counts = np.bincount([sample.label for sample in task.train], minlength=task.num_ranks)
    frequent = np.argsort(-counts, kind="stable")[:ranks].tolist()
    quota = {rank: max(1, int(counts[rank] * keep)) for rank in frequent}
    return _fewer(
        task,
        quota,
        f"shift/{seed}",
        f"shift: {keep:g} of the {ranks} most frequent ranks kept, drawn by seed {seed}",
    )


class ImageList(torch.utils.data.Dataset):
    """Samples as (uint8 tensor (3, S, S), label): resized, then cropped.

    The shorter side becomes round(S * 256 / 224); with squash both do, as in the official code.
    Training crops at random and mirrors half the time; otherwise the crop is the centre.
    Random numbers are torch's, so DataLoader's seeds govern them.
    """

    def __init__(
        self, samples, root, *, image_size=224, train=False, squash=False, resample="bicubic"
    ):
        if resample not in ("bicubic", "bilinear"):
            raise ValueError(f"resample={resample!r}; give bicubic or bilinear")
        self.samples, self.root = list(samples), Path(root)
        self.image_size, self.train, self.squash = image_size, train, squash
        self.resample = Image.Resampling[resample.upper()]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return self.prepare(read_image(self.root / path)), label

    def prepare(self, image):
        """An RGB image of any size -> uint8 (3, S, S)."""
        image = self._crop(self._resize(image))
        if self.train and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image))  # (S, S, 3)
        return pixels.permute(2, 0, 1).contiguous()  # (3, S, S)

    def _resize(self, image):
        side, short = round(self.image_size * 256 / 224), min(image.size)
        size = (side, side) if self.squash else tuple(side * edge // short for edge in image.size)
        return image.resize(size, self.resample)

    def _crop(self, image):
        room = [edge - self.image_size for edge in image.size]  # beyond the crop
        if self.train:
            left, top = (int(torch.randint(edge + 1, ())) for edge in room)
        else:
            left, top = (round(edge / 2) for edge in room)
        return image.crop((left, top, left + self.image_size, top + self.image_size))


def normalize(images, mean, std, dtype=torch.float32):
    """uint8 images (B, 3, H, W) -> (images / 255 - mean) / std (B, 3, H, W), on their device."""
    mean, std = (torch.tensor(rgb, device=images.device).view(3, 1, 1) for rgb in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std).to(dtype)


# -------------------------------------------------------------------------------------------- lists


def _parse_list(path):
    """[(line number, image path, label)]"""
    lines, rows = _lines(path), []
    delimiter, image, label, header = _columns(path, lines[0][1]) if lines else (None, 0, 1, 0)
    if not lines[header:]:
        raise ValueError(f"{path} lists no image; expected lines `path label`")
    for number, line in lines[header:]:
        cells = _cells(line, delimiter)
        if max(image, label) >= len(cells) or not cells[image]:
            raise ValueError(f"{path}:{number}: expected an image path and a label, got {line!r}")
        rank = _integer(cells[label])
        if rank is None:
            raise ValueError(
                f"{path}:{number}: label {cells[label]!r} is no whole number; labels "
                "are ranks, counted from 0"
            )
        rows.append((number, str(Path(cells[image])), rank))
    return rows


def _columns(path, first):
    """(delimiter, path column, label column, lines of header), from a list's first line."""
    known = {".csv": ",", ".tsv": "\t"}.get(Path(path).suffix.lower())
    for delimiter in [known] if known else ["\t", ",", " "]:
        names = [cell.lower() for cell in _cells(first, delimiter)]
        image, label = (
            next((names.index(name) for name in columns if name in names), None)
            for columns in (PATH_COLUMNS, LABEL_COLUMNS)
        )
        if image is not None and label is not None:
            return delimiter, image, label, 1
    if known is None:
        return None, 0, 1, 0  # path label
    if len(names) != 2:
        raise ValueError(
            f"{path}:1: {len(names)} columns, and no header that names one `path` and "
            f"one `label`; got {first!r}"
        )
    is_header = _integer(names[1]) is None and Path(names[0]).suffix not in IMAGE_TYPES
    return known, 0, 1, int(is_header)


def _cells(line, delimiter):
    if delimiter is None:
        return line.rsplit(None, 1)
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _lines(path, comment="#"):
    """[(number, line)] of a text file, without blank lines and comments."""
    try:
        text = Path(path).read_text("utf-8-sig")  # a BOM goes, CRLF becomes LF
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [
        (number, line)
        for number, line in lines
        if line and not (comment and line.startswith(comment))
    ]


def _read_table(path, delimiter, columns):
    """[(line number, {column: cell})] of a release's table, whose header must name the columns."""
    (_, first), *lines = _lines(path, comment=None) or [(1, "")]
    header = [cell.lower() for cell in _cells(first.lstrip("#"), delimiter)]  # #flickr_photo_id
    if missing := set(columns) - set(header):
        raise ValueError(
            f"{path}:1: no column {', '.join(sorted(missing))}; expected the header "
            f"of the release, got {first!r}"
        )
    return [
        (number, dict.fromkeys(header, "") | dict(zip(header, _cells(line, delimiter))))
        for number, line in lines
    ]


# `check` lists images that are not there, and counts on; whoever wants the data is refused.
_missing_listed = contextvars.ContextVar("missing_listed", default=False)


def _integer(text):
    """3 for '3' and '3.0', None for what is not a whole number."""
    return int(float(text)) if re.fullmatch(r"-?\d{1,9}(\.0*)?", text) else None


def _on_disk(root, samples, source):
    """The samples with paths as on disk (.JPG may be .jpg there); all missing ones in one error."""
    folders, found, missing = {}, [], {}
    for path, label in samples:
        folder, name = os.path.split(path)
        if folder not in folders:
            listed = os.listdir(Path(root, folder)) if Path(root, folder).is_dir() else []
            folders[folder] = {_plain(entry): entry for entry in listed} | dict(zip(listed, listed))
        entry = folders[folder].get(name) or folders[folder].get(_plain(name))
        found.append(Sample(os.path.join(folder, entry or name), label))
        if not entry:
            missing[path] = None
    if missing and not _missing_listed.get():
        total = len({path for path, _ in samples})
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {total} images are not under "
            f"{root}, the first: {', '.join(map(repr, list(missing)[:3]))}"
        )
    return found


def _plain(name):
    stem, extension = os.path.splitext(name)
    return stem + extension.lower()


def _write_list(path, samples):
    lines = (f"{image} {label}\n" for image, label in samples)
    _write(path, "".join("./" * line.startswith("#") + line for line in lines))  # not a comment


def _write(path, text):
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, "utf-8")
    os.replace(part, path)


# ------------------------------------------------------------------------------------------- splits


def _image(sample):
    return sample.path


def _hold_out(samples, share, salt, group=_image, stratify=True):
    """(rest, held): every 1/share-th group, in an order hashed from (salt, group), kept whole.

    stratify: from all ranks in proportion; otherwise blind to them.
    """
    groups = {}
    for sample in samples:
        groups.setdefault(group(sample), []).append(sample)
    order = _shuffled(groups, salt)
    if stratify:
        order.sort(key=lambda name: groups[name][0].label)  # stable: hashed within a rank
    cuts = [math.floor(i * share + 0.5) for i in range(len(order) + 1)]
    held = {name for name, before, after in zip(order, cuts, cuts[1:]) if after > before}
    return (
        [sample for sample in samples if group(sample) not in held],
        [sample for sample in samples if group(sample) in held],
    )


def _fewer(task, quota, salt, words):
    """The task with at most quota[rank] training images of the ranks it names, in their old order."""
    left, kept = dict(quota), set()
    for i in _shuffled(range(len(task.train)), salt):
        rank = task.train[i].label
        left[rank] = left.get(rank, len(task.train)) - 1
        if left[rank] >= 0:
            kept.add(i)
    train = tuple(sample for i, sample in enumerate(task.train) if i in kept)
    words = f"{task.protocol}; {words}: {len(train):,} train images"
    return replace(task, train=train, protocol=words)


def _shuffled(names, salt):
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).digest())


def _task(name, words, root, names, context, parts, salt, values=None, notes=()):
    """The Task. Parts that are None are made here; what is odd is said in the protocol."""
    train, val, test = parts
    if train is None:
        raise ValueError(f"{name}: there is no list or folder of training images; give one")
    if val is None and test is None:
        train, test = _hold_out(train, 0.1, f"test/{salt}")
        train, val = _hold_out(train, 1 / 9, f"val/{salt}")
    elif val is None:
        train, val = _hold_out(train, 0.1, f"val/{salt}")
    test = val if test is None else test
    counts = f"{len(train):,} train / {len(val):,} val / {len(test):,} test images"
    if not (train and val and test):
        raise ValueError(f"{name}: {counts}, and none may be empty; give more images or lists")
    paths = [{path for path, _ in samples} for samples in (train, val, test)]
    untrained = sorted(set(range(len(names))) - {sample.label for sample in train})
    protocol = "; ".join([f"{name}: {words}: {counts}", *_oddities(*paths, untrained, names)])
    numeric = all(re.fullmatch(r"-?\d+(\.\d+)?", rank) for rank in names)
    values = values or tuple(float(rank if numeric else i) for i, rank in enumerate(names))
    return Task(
        name,
        protocol,
        root,
        tuple(names),
        values,
        context,
        tuple(train),
        tuple(val),
        tuple(test),
        val_is_test=paths[1] == paths[2],
        notes=tuple(notes),
    )


def _oddities(train, val, test, untrained, names):
    if val == test:
        yield "VAL IS TEST: the validation images are the test images"
    elif val & test:
        yield f"{len(val & test):,} images are in both val and test"
    for part, others in (("val", val), ("test", test)):
        if train & others:
            yield f"{len(train & others):,} images are in both train and {part}"
    if untrained:
        some = ", ".join([names[i] for i in untrained[:3]] + ["..."] * (len(untrained) > 3))
        yield f"{len(untrained)} of {len(names)} ranks have no training image ({some})"


# -------------------------------------------------------------------------------------- image modes


def to_rgb(image):
    """A PIL image of any mode -> RGB, transparency on white. Raises ValueError where white is not known."""
    if image.mode == "F":
        raise ValueError("floating point has no known white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _from_integers(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _from_integers(image):
    gray = np.asarray(image).astype(np.int64)  # (H, W)
    if gray.min() < 0 or gray.max() > 65535:
        raise ValueError(f"{gray.min()} .. {gray.max()} has no known white; save it with 16 bits")
    clear = gray == image.info.get("transparency", -1)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF in which 0 is white
        gray = 65535 - gray
    gray = np.where(clear, 255, (gray + 128) // 257)  # 65535 = 255 * 257
    return Image.fromarray(gray.astype(np.uint8))


# ------------------------------------------------------------------------------------------ readers


def _load_morph2(root, split, fold, seed, lists):
    preset = DATASETS["morph2"]
    table = root / preset["table"]
    ages, races, notes = _read_morph2(table, preset)
    if lists:
        words, parts = _given(lists), [path and _match_morph2(path, ages) for path in lists]
    else:
        words, parts = _split_morph2(ages, races, preset, split, fold, seed)
    if len(ages) != preset["rows"]:
        words += f", release of {len(ages):,} images where {preset['rows']:,} are expected"
    parts = [samples and _on_disk(root, samples, table) for samples in parts]
    return _task(
        "morph2",
        words,
        root,
        preset["rank_names"],
        preset["context"],
        parts,
        f"{seed}/{fold}",
        notes=notes,
    )


def _given(lists):
    return "given lists " + " ".join(path.name for path in lists if path)


def _absent(preset, missing, root):
    return FileNotFoundError(preset["get"].format(missing=missing, root=root))


def _read_morph2(table, preset):
    """({photo: age}, {photo: race}, notes) of the release; photos are relative to its root."""
    if not table.is_file():
        raise _absent(preset, table, table.parent)
    ages, races, wrong, rows = {}, {}, [], _read_table(table, ",", ("race", "age", "photo"))
    for number, row in rows:
        photo, age = row["photo"], _integer(row["age"])
        name = re.fullmatch(r"\d+_\d+[MF](\d+)\.jpg", os.path.basename(photo), re.IGNORECASE)
        if name is None or age is None or not 0 <= age < len(preset["rank_names"]):
            wrong.append(
                f"{table}:{number}: expected an age of 0 .. 100 and a photo such as "
                f"Album2/009055_1M54.JPG, got {row['age']!r} and {photo!r}"
            )
            continue
        if int(name[1]) != age:
            wrong.append(f"{table}:{number}: age {age}, but the name of {photo} says {name[1]}")
        ages[photo], races[photo] = age, row["race"].upper()
    _refuse(wrong)
    return ages, races, [*_doubts([row for _, row in rows])]


def _refuse(wrong):
    """All wrong lines in one error, up to twenty of them in full."""
    if wrong:
        more = [f"... and {len(wrong) - 20:,} more such lines"] * (len(wrong) > 20)
        raise ValueError("\n".join(wrong[:20] + more))


def _doubts(rows):
    """Where the rows of MORPH's table contradict each other, by the columns that are there."""
    people = {}
    for row in rows:
        people.setdefault(os.path.basename(row["photo"]).split("_")[0], []).append(row)
    for column in ("race", "gender", "dob"):
        odd = sum(
            len({row[column] for row in photos if row.get(column)}) > 1
            for photos in people.values()
        )
        if odd:
            yield f"{odd:,} of {len(people):,} people have more than one {column} in the table"
    off = 0
    for row in rows:
        born, taken = (re.search(r"\d{4}", row.get(column, "")) for column in ("dob", "doa"))
        if born and taken:  # one year less before the birthday
            off += int(taken[0]) - int(born[0]) - int(float(row["age"])) not in (0, 1)
    if off:
        yield f"{off:,} of {len(rows):,} rows have an age that their dob and doa contradict"


def _split_morph2(ages, races, preset, split, fold, seed):
    photos = [photo for photo in ages if races[photo] == preset["race"]]
    drawn = _shuffled(photos, f"draw/{seed}")[: preset["drawn"]]
    share = f"{len(drawn):,} of {len(photos):,}"
    if len(photos) < preset["drawn"]:
        share = f"all {len(photos):,} (of {preset['drawn']:,} wanted)"
    words = f"{share} images of race {preset['race']}, {split} split, seed {seed}, fold {fold}"
    samples = [Sample(photo, ages[photo]) for photo in sorted(drawn)]
    group, salt = _person if split == "subject-exclusive" else _image, f"{seed}/{fold}"
    train, test = _hold_out(samples, preset["test_share"], f"test/{salt}", group, stratify=False)
    train, val = _hold_out(train, 0.1, f"val/{salt}", group)
    return words, [train, val, test]


def _person(sample):
    return os.path.basename(sample.path).split("_")[0]  # 009055_1M54.JPG


def _match_morph2(path, ages):
    """A list of MORPH images, found by file name wherever it says they lie; ages are checked."""
    photos = {_plain(os.path.basename(photo)): photo for photo in ages}
    samples = []
    for line, image, label in _parse_list(path):
        photo = photos.get(_plain(os.path.basename(image)))
        if photo is None or ages[photo] != label:
            found = "is not in the release" if photo is None else f"has age {ages[photo]} there"
            raise ValueError(f"{path}:{line}: {image} with age {label}, but it {found}")
        samples.append(Sample(photo, label))
    return samples


def _load_release(name, root, split, fold, seed, lists, category, rule):
    """adience, aesthetics or hci; paths are relative to `place`, the folder of the images."""
    preset, notes = DATASETS[name], []
    if not 0 <= fold < preset["folds"]:
        raise ValueError(f"{name} has no fold {fold}; give 0 .. {preset['folds'] - 1}")
    place = _image_folder(root, preset)
    if lists:
        if name == "aesthetics":
            _refuse_scores(filter(None, lists))
        words = _given(lists)
        parts = [path and read_list(path, place, len(preset["rank_names"])) for path in lists]
    else:
        make = dict(adience=_split_adience, aesthetics=_split_aesthetics, hci=_split_hci)[name]
        parts, said, notes = make(root, place, preset, fold, f"{seed}/{fold}", category, rule)
        chosen = [f"category {category}"] * bool(category) + [f"label rule {rule}"] * bool(rule)
        words = ", ".join([*chosen, f"{split} split, seed {seed}, fold {fold}", *said])
    return _task(
        name,
        words,
        place,
        preset["rank_names"],
        preset["context"],
        parts,
        f"{seed}/{fold}",
        preset.get("rank_values"),
        notes,
    )


def _refuse_scores(paths):
    """Public lists of the aesthetics hold scores 1.0 .. 5.0: read as ranks, all would be one too high."""
    for path in paths:
        for number, line in _lines(path):
            if score := re.search(r"[\s,](\d+\.\d+)$", line):
                raise ValueError(
                    f"{path}:{number}: label {score[1]} is a score of 1.0 .. 5.0; expected "
                    "a rank of 0 .. 4: subtract 1 and write a whole number"
                )


def _image_folder(root, preset):
    places, inside = [root / folder for folder in preset["images"]], preset.get("inside", "")
    for place in places:
        if (place / inside).is_dir():
            return place
    raise _absent(preset, " or ".join(map(str, places)), root)


def _unlike(what, got, published):
    return [f"{what}: {got:,} of {published:,} published"] * (got != published)


def _split_adience(root, place, preset, fold, salt, category, rule):
    rows, tables = _read_adience(root, place, preset)
    kept, notes = _label_adience(rows, rule, preset)
    samples = _on_disk(place, [sample for _, sample in kept], tables)
    rest, test = (
        [sample for (part, _), sample in zip(kept, samples) if (part == fold) == held]
        for held in (False, True)
    )
    train, val = _hold_out(rest, 0.1, f"val/{salt}", stratify=False)  # by image, as published
    return [train, val, test], [], notes


def _read_adience(root, place, preset):
    """[(fold, path under place, age as written)] of the five tables, and the folder they lie in."""
    folders = [root / folder for folder in preset["tables"]]
    tables = next((folder for folder in folders if (folder / "fold_0_data.txt").is_file()), root)
    rows, wrong, columns = [], [], ("user_id", "original_image", "face_id", "age")
    for fold in range(preset["folds"]):
        table = tables / f"fold_{fold}_data.txt"
        if not table.is_file():
            raise _absent(preset, table, root)
        for number, row in _read_table(table, "\t", columns):
            user, image, face, age = (row[column] for column in columns)
            if not (user and image and face):
                wrong.append(
                    f"{table}:{number}: expected {', '.join(columns)}, got {user!r}, "
                    f"{image!r}, {face!r}, {age!r}"
                )
            rows.append((fold, f"{user}/{preset['images'][place.name]}.{face}.{image}", age))
    _refuse(wrong)
    return rows, tables


def _label_adience(rows, rule, preset):
    """([(fold, Sample)], notes). Images may have several rows; only "merged" drops the repeats."""
    kept, left, ranks, repeats, people = [], Counter(), {}, 0, {}
    for fold, path, age in rows:
        people.setdefault(path.split("/")[0], set()).add(fold)
        rank = _adience_rank(age, rule, preset)
        if rank is None:
            left[age or "empty"] += 1
            continue
        repeats += path in ranks
        if rule != "merged" or path not in ranks:
            kept.append((fold, Sample(path, rank)))
        ranks.setdefault(path, set()).add(rank)
    ages = ", ".join(f"{age} x {count:,}" for age, count in left.most_common())
    return kept, [
        *_unlike("rows", len(rows), preset["rows"]),
        *_uncommon(kept, rule, preset),
        *[f"{repeats:,} rows repeat an image, {'left out' if rule == 'merged' else 'kept'}"]
        * (repeats > 0),
        *_several("image has rows", "images have rows", "of different ranks", ranks),
        *_several("person is", "people are", "in more than one fold", people),
        f"{sum(left.values()):,} rows left out, by age: {ages}",
    ]


def _several(one, many, what, found):
    """A note that names whatever has several values, up to three of them."""
    odd = sorted(name for name, values in found.items() if len(values) > 1)
    some = ", ".join(odd[:3]) + ", ..." * (len(odd) > 3)
    return [f"{len(odd):,} {one if len(odd) == 1 else many} {what}: {some}"] * bool(odd)


def _adience_rank(age, rule, preset):
    if rule != "inside":
        known = dict(zip(preset["ages"], range(8))) | (preset["typos"] if rule == "merged" else {})
        return known.get(age)
    if not re.fullmatch(r"\d+|\(\d+, ?\d+\)", age):
        return None
    ends = [int(end) for end in re.findall(r"\d+", age)]  # one age is its own interval
    ranges = [tuple(map(int, name.split("-"))) for name in preset["rank_names"]]
    # (25, 23) counts as 25-32, as in the public code that has this rule
    return next(
        (i for i, (low, high) in enumerate(ranges) if low <= ends[0] and ends[-1] <= high), None
    )


def _uncommon(kept, rule, preset):
    """Where the labelled rows differ in number from the published lists."""
    if rule == "merged":
        return _unlike("images", len(kept), preset["merged_count"])
    if rule == "inside":
        return []  # no list of it is published
    ranks, folds = (
        Counter(each) for each in ([sample.label for _, sample in kept], [fold for fold, _ in kept])
    )
    notes = _unlike("labelled rows", len(kept), sum(preset["counts"]))
    for i, (name, published) in enumerate(zip(preset["rank_names"], preset["counts"])):
        notes += _unlike(f"rank {name}", ranks[i], published)
    for fold, published in enumerate(preset["fold_counts"]):
        notes += _unlike(f"fold {fold}", folds[fold], published)
    return notes


def _split_aesthetics(root, place, preset, fold, salt, category, rule):
    table = root / preset["table"]
    if not table.is_file():
        raise _absent(preset, table, root)
    rows, notes = _read_aesthetics(table, rule, preset)
    images = {
        Path(name).stem: name
        for name in sorted(os.listdir(place))
        if Path(name).suffix.lower() in IMAGE_TYPES and not name.startswith(".")
    }
    chosen = [kind for kind in preset["counts"] if category in ("all", kind)]
    parts, wanted = [[], [], []], sum(kind in chosen for kind, _ in rows.values())
    for kind in chosen:  # each category is split by itself
        photos = [photo for photo, row in rows.items() if row[0] == kind and photo in images]
        for part, some in zip(parts, _cut_aesthetics(photos, salt)):
            part += [Sample(images[photo], rows[photo][1]) for photo in some]
        notes += _unlike(f"images of {kind}", len(photos), preset["counts"][kind])
    gone = wanted - sum(map(len, parts))
    if gone == wanted:
        raise FileNotFoundError(
            f"{table}: none of its {wanted:,} images of category {category} is "
            f"there; expected {place}/<flickr_photo_id>.jpg"
        )
    return parts, [f"{gone:,} of {wanted:,} rows have no image"] * bool(gone), notes


def _cut_aesthetics(photos, salt):
    """(train, val, test): ceil(5 %) to val, ceil(20 %) to test, blind to the ranks."""
    order = _shuffled(photos, salt)
    test, val = -(-len(order) // 5), -(-len(order) // 20)
    return order[test + val :], order[test : test + val], order[:test]


def _read_aesthetics(table, rule, preset):
    """({photo id: (category, rank)}, notes)"""
    columns, rows, all_rows, wrong = ("flickr_photo_id", "category", "beauty_scores"), {}, {}, []
    lines = _read_table(table, "\t", columns)
    for number, row in lines:
        photo, kind, scores = (row[column] for column in columns)
        kind = {"animals": "animal"}.get(kind, kind)
        rated = re.fullmatch("[1-5](, ?[1-5])*", scores)
        if not (photo and rated) or kind not in preset["counts"]:
            wrong.append(
                f"{table}:{number}: expected a photo id, a category (nature, people, "
                f"animals, urban) and scores such as 3,2,4 of 1 .. 5, got {photo!r}, "
                f"{row['category']!r}, {scores!r}"
            )
            continue
        rank = _aesthetic_rank([int(score) for score in scores.split(",")], rule)
        rows.setdefault(photo, (kind, rank))
        all_rows.setdefault(photo, set()).add((kind, rank))
    _refuse(wrong)
    repeats = len(lines) - len(rows)
    notes = _unlike("rows", len(lines), sum(preset["counts"].values()))
    notes += [f"{repeats:,} rows repeat a photo; its first row counts"] * bool(repeats)
    return rows, notes + _several("photo has rows", "photos have rows", "that contradict", all_rows)


def _aesthetic_rank(scores, rule):
    """The median rounded down, or the mean rounded to even; scores count from 1, ranks from 0."""
    if rule == "median":
        return int(statistics.median(scores)) - 1
    return round(statistics.mean(scores)) - 1


def _split_hci(root, place, preset, fold, salt, category, rule):
    parts, notes, val, test = [[], [], []], [], preset["val"], preset["test"]
    for rank, (decade, published) in enumerate(zip(preset["rank_names"], preset["counts"])):
        listed = sorted(os.listdir(place / decade)) if (place / decade).is_dir() else []
        images = [
            f"{decade}/{name}"
            for name in listed
            if Path(name).suffix.lower() in IMAGE_TYPES and not name.startswith(".")
        ]
        if len(images) <= val + test:
            raise ValueError(
                f"{place / decade}: {len(images)} images, expected {published}, at "
                f"least {val + test + 1}; unpack the release again"
            )
        order = _shuffled(images, salt)
        for part, some in zip(parts, (order[test + val :], order[test : test + val], order[:test])):
            part += [Sample(path, rank) for path in some]
        notes += _unlike(f"images of the {decade}", len(images), published)
    decades = {}
    for sample in itertools.chain(*parts):
        decades.setdefault(os.path.basename(sample.path), set()).add(sample.label)
    notes += _several("file name is", "file names are", "in more than one decade", decades)
    found, published = sum(map(len, parts)), sum(preset["counts"])
    said = [f"release of {found:,} images where {published:,} are expected"] * (found != published)
    return parts, said, notes


def _load_own(folder, root, fold, seed, lists):
    lists = lists or [
        next(
            (
                folder / f"{part}{end}"
                for end in (".txt", ".csv", ".tsv")
                if (folder / f"{part}{end}").is_file()
            ),
            None,
        )
        for part in PARTS
    ]
    beside = [path.parent for path in lists if path] + [folder]  # a list's own ranks.txt rules
    names = next(filter(None, (_read_ranks(place / "ranks.txt") for place in beside)), None)
    if any(lists):
        words = "own lists " + " ".join(path.name for path in lists if path)
        parts = [path and read_list(path, root, names and len(names)) for path in lists]
        top = max(sample.label for samples in parts if samples for sample in samples)
        names = names or [str(rank) for rank in range(top + 1)]
    else:
        places = [folder / part if (folder / part).is_dir() else None for part in PARTS]
        words = "own folders" if any(places) else f"own folders, split by seed {seed}, fold {fold}"
        places = places if any(places) else [folder, None, None]
        names = _order_ranks(folder, places, names)
        parts = [place and _list_folders(place, root, names) for place in places]
    if len(names) < 2:
        raise ValueError(f"{folder}: {len(names)} rank, but ordinal regression needs 2 or more")
    name, context = folder.resolve().name, "the rank of the image is"
    return _task(name, words, root, names, context, parts, f"{seed}/{fold}")


def _read_ranks(path):
    names = [name for _, name in _lines(path)] if path.is_file() else None
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"{path} names a rank twice; give one name a line, lowest rank first")
    return names


def _order_ranks(folder, places, names):
    """The ranks in order: ranks.txt's, or the rank folders by the number they start with."""
    found = sorted(
        {
            entry.name
            for place in places
            if place
            for entry in place.iterdir()
            if entry.is_dir() and not entry.name.startswith((".", "__"))
        }
    )
    if not found:
        raise ValueError(f"{folder} holds neither train.txt (.csv, .tsv) nor one folder per rank")
    if names is None:
        starts = [re.match(r"-?\d+(\.\d+)?", name) for name in found]
        order = {float(start[0]): name for start, name in zip(starts, found) if start}
        names = [order[number] for number in sorted(order)]
    if strange := [name for name in found if name not in names]:
        raise ValueError(
            f"{folder}: the order of rank folder {strange[0]!r} is not known; name it "
            f"in {folder / 'ranks.txt'}, one rank a line, lowest first"
        )
    return names


def _list_folders(place, root, names):
    return [
        Sample(os.path.relpath(image, root), rank)
        for rank, name in enumerate(names)
        for image in sorted((place / name).rglob("*"))
        if image.suffix.lower() in IMAGE_TYPES and not image.name.startswith(".")
    ]


def _load_demo(root, lists):
    if lists:
        raise ValueError("the demo has lists of its own; leave yours out, or load its folder")
    preset = DATASETS["demo"]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(root or Path(cache, "ordinalclip", "demo-v1"))
    if not (root / "demo-v1").is_file():
        _make_demo(root, preset["sizes"])
    parts = [read_list(root / f"{part}.txt", root, len(preset["rank_names"])) for part in PARTS]
    return _task(
        "demo",
        "drawn cross-sections of trees, one fixed split",
        root,
        preset["rank_names"],
        preset["context"],
        parts,
        "",
    )


# --------------------------------------------------------------------------------------------- demo


def _make_demo(root, sizes, seed=0):
    """Draw the demo beside `root`, and move it there once it is whole."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not the demo; give a new or an empty folder")
    print(f"drawing {sum(sizes):,} images into {root}", file=sys.stderr)
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _draw_parts(work, sizes, seed)
        work.chmod(0o755)  # mkdtemp's is private
        work.rename(root)  # fails if another process was first
    except OSError:
        if not (root / "demo-v1").is_file():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _draw_parts(folder, sizes, seed):
    names, first = DATASETS["demo"]["rank_names"], 0
    (folder / "images").mkdir()
    for part, size in zip(PARTS, sizes):
        weight = 2 + np.sin(np.linspace(0, np.pi, len(names)))  # 1 : 1.5, most in the middle
        ranks = np.searchsorted(np.cumsum(weight / weight.sum()), (np.arange(size) + 0.5) / size)
        ranks = np.random.default_rng([seed, first]).permutation(ranks).tolist()
        jobs = [(folder, first + i, int(names[rank]), seed) for i, rank in enumerate(ranks)]
        with ThreadPoolExecutor(4) as pool:  # numpy and Pillow free the GIL
            _write_list(folder / f"{part}.txt", zip(pool.map(_draw_file, *zip(*jobs)), ranks))
        first += size
    _write(folder / "ranks.txt", "".join(f"{name}\n" for name in names))
    _write(folder / "demo-v1", f"{sizes}\n")  # the mark of a whole demo


def _draw_file(folder, index, years, seed):
    rng = np.random.default_rng([seed, index, 1])
    image, kind = Image.fromarray(_draw_trunk(years, rng)), "png" if rng.random() < 0.25 else "jpg"
    path = f"images/{index:05d}.{kind}"
    image.save(folder / path, **dict(png=dict(compress_level=1), jpg=dict(quality=92))[kind])
    return path


def _draw_trunk(years, rng, side=96, fine=2):
    """A cross-section with a ring a year, (side, side, 3) uint8; drawn `fine` times too large.

    A point lies at t = 0 .. 1 from the pith to the bark: t shrinks the outline and moves its centre
    1 - t of the way to the pith, so growth is wider on one side, as in a leaning tree.
    """
    axis = (np.arange(side * fine, dtype=np.float32) + 0.5) / fine - side / 2  # px of the result
    x, y = axis - rng.uniform(-2, 2), axis[:, None] - rng.uniform(-2, 2)
    radius = rng.uniform(max(11, 1.4 * years), min(44, 14 + 6 * years))  # size alone says little
    edge = radius * _around(x, y, 1 + _waves(rng, (2, 3, 5, 8), 0.035))  # (H, W), centre to bark
    bark = edge + rng.uniform(1.2, 3.2) * _around(x, y, 1 + rng.normal(0, 0.2, 160))
    pith, light = _toward(radius * rng.uniform(0, 0.35), rng), _toward(1, rng)
    dx, dy = x - pith[0], y - pith[1]
    along, span = dx * pith[0] + dy * pith[1], edge * edge - (pith[0] ** 2 + pith[1] ** 2)
    t = (along + np.sqrt(along * along + span * (dx * dx + dy * dy))) / span  # (H, W)
    wavy = t * (1 + 0.02 * _clouds(rng, len(t), 7))
    wavy *= _around(dx, dy, 1 + _waves(rng, (3, 6, 9, 14), 0.008))
    color = np.minimum(wavy * 2048, 2047).astype(np.int32)  # (H, W), row in _colors
    color[t > 1] = 2048
    rays = (1 + _around(dx, dy, rng.normal(0, 0.035, 256)) * t) * _cracks(dx, dy, t, rng)
    shade = np.where(t > 1, 1 + 0.3 * _clouds(rng, len(t), 60), rays)
    ground = x * x + y * y > bark * bark
    color[ground] = 2049
    texture = [height * _clouds(rng, len(t), grid) for height, grid in ((12, 6), (9, 24), (7, 80))]
    shadow = bark + 5 - np.hypot(x + 4 * light[0], y + 4 * light[1])
    shade[ground] = ((1 + sum(texture) / 100) * (1 - 0.055 * np.clip(shadow, 0, 10)))[ground]
    shade *= 1 - rng.uniform(0.1, 0.5) / side * (x * light[0] + y * light[1])
    image = _colors(years, rng).take(color, 0) * shade[..., None]  # (H, W, 3)
    image = sum(image[i::fine, j::fine] for i in range(fine) for j in range(fine)) / fine**2
    image += rng.uniform(1, 5) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _colors(years, rng):
    """Wood from pith to bark, each ring darkening to its end; then bark; then ground, (2050, 3)."""
    depth = np.linspace(0, 1, 2048)
    width = rng.lognormal(0, 0.28, years) * np.linspace(1.25, 0.8, years)
    ring = np.interp(depth, np.append(0, np.cumsum(width) / width.sum()), np.arange(years + 1))
    year = np.minimum(ring.astype(int), years - 1)
    late = (ring - year) ** rng.uniform(1.5, 4) * rng.uniform(0.55, 1, years)[year]
    late = late[:, None] * (1 - rng.uniform(0.38, 0.58) * np.array([1.08, 1, 0.85]))
    heart = rng.uniform(0, 0.3) / (1 + np.exp((depth - rng.uniform(0.2, 0.8)) * 30))
    heart = heart[:, None] * np.array([0.7, 1, 1.2])
    pales = [(226, 190, 142), (214, 166, 112), (233, 206, 165), (205, 148, 108)]
    wood = np.array(pales[rng.integers(4)]) * (1 - late) * (1 - heart)
    bark = np.array([84, 62, 45]) * rng.uniform(0.6, 1.15)
    moss, litter, sand, stone = (104, 118, 72), (128, 104, 78), (176, 158, 128), (122, 124, 126)
    ground = (moss, litter, sand, stone, (206, 210, 214))[rng.integers(5)]  # the last is frost
    return (np.vstack([wood, bark, ground]) * rng.uniform(0.93, 1.07, 3)).astype(np.float32)


def _cracks(dx, dy, t, rng):
    """Up to two cracks of drying, open at the bark: 1 on sound wood, less in a crack, (H, W)."""
    shade = 1
    for _ in range(rng.integers(0, 3)):
        cos, sin = _toward(1, rng)
        across = np.abs(dx * sin - dy * cos + rng.uniform(-1, 1) * np.sin(t * 9))
        width = rng.uniform(0.5, 1.4) * (t - rng.uniform(0, 0.7)) * (dx * cos + dy * sin > 0)
        shade = shade * (1 - 0.65 * np.clip(1.5 * (width - across) + 0.5, 0, 1) * (width > 0))
    return shade


def _clouds(rng, size, grid):
    """Smooth noise, about -1 .. 1, (size, size)."""
    noise = Image.fromarray(rng.uniform(-1, 1, (grid, grid)).astype(np.float32))
    return np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))


def _waves(rng, cycles, height):
    """A closed curve of a few waves, at 512 angles."""
    angle = np.linspace(0, 2 * np.pi, 512, endpoint=False)
    return sum(
        height * rng.normal() / math.sqrt(n) * np.sin(n * angle + rng.uniform(0, 7)) for n in cycles
    )


def _around(x, y, values):
    """The values, given at equal angles, at the angle of each point (H, W)."""
    turn = np.arctan2(y, x) * (len(values) / (2 * math.pi))
    return values.astype(np.float32).take(turn.astype(np.int32), mode="wrap")


def _toward(length, rng):
    """A vector of that length in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    return length * math.cos(angle), length * math.sin(angle)


# -------------------------------------------------------------------------------------------- check


def _check(task):
    """Count a dataset and open all its images; the number of those missing or unreadable."""
    print(task.protocol, *(f"note: {note}" for note in task.notes), sep="\n")
    labels = [[sample.label for sample in getattr(task, part)] for part in PARTS]
    counts = [np.bincount(part, minlength=task.num_ranks) for part in labels]
    print(f"{'rank':>12} {'train':>7} {'val':>7} {'test':>7} {'all':>7}")
    for name, *row in zip(task.rank_names, *counts):
        if any(row):
            print(f"{name:>12} {row[0]:7} {row[1]:7} {row[2]:7} {sum(row):7}")
    paths = sorted({task.root / sample.path for part in PARTS for sample in getattr(task, part)})
    with ThreadPoolExecutor() as pool:
        errors = [error for error in pool.map(_read_error, paths) if error]
    print(*errors, f"{len(paths) - len(errors):,} of {len(paths):,} images can be read", sep="\n")
    return len(errors)


def _read_error(path):
    try:
        read_image(path)
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Read a dataset, count it and open every image.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("name", help=f"{', '.join(DATASETS)}, or a folder of own data")
    parser.add_argument("root", nargs="?", help="where the release lies, default data/NAME")
    parser.add_argument("--split", help="default the dataset's first: see DATASETS")
    parser.add_argument(
        "--seed", type=int, default=1, help="of splits made here, default 1 as in training"
    )
    parser.add_argument("--category", help="aesthetics: all, nature, animal, urban or people")
    parser.add_argument(
        "--label-rule", help="adience: exact, merged or inside; aesthetics: median or mean"
    )
    parser.add_argument("--out", help="folder for the lists of all folds: fold_K/train.txt ...")
    args = parser.parse_args(argv)
    options = dict(
        split=args.split, seed=args.seed, category=args.category, label_rule=args.label_rule
    )
    try:
        told = _missing_listed.set(True)
        try:
            task = load(args.name, args.root, **options)
        finally:
            _missing_listed.reset(told)
        unread = _check(task)
        for fold in range(DATASETS.get(args.name, {}).get("folds", 1)) if args.out else ():
            folder = Path(args.out, f"fold_{fold}")
            load(args.name, args.root, fold=fold, **options).write_lists(folder)
            print(f"lists: {folder}")
        return 1 if unread else 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())


def atomic_write(path, save):
    """save(tmp_path), then tmp_path takes the name of path: a cut leaves no half-written file."""
    tmp_path = path.with_name(path.name + ".part")
    try:
        save(tmp_path)
        os.replace(tmp_path, path)
    finally:
        tmp_path.unlink(missing_ok=True)


distribution_shift = shifted
make_demo = _make_demo


def read_paths(path):
    """The image paths of a list file, as they are spelled; labels are ignored and may be absent."""
    delimiter, rows = {".csv": ",", ".tsv": "\t"}.get(Path(path).suffix.lower()), []
    for _, line in _lines(path):
        is_path = not delimiter and Path(line).suffix.lower() in IMAGE_TYPES
        rows.append([line] if is_path else _cells(line, delimiter))
    names = [cell.lower() for cell in rows[0]] if rows else []
    column = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
    rows = rows if column is None else rows[1:]
    return [row[column or 0] for row in rows if len(row) > (column or 0)]
