"""Task: one dataset under one protocol; how it is split, and how its training part is reduced.

A protocol is one line of text that names every choice behind the numbers: rule, split, seed, fold,
counts, and whatever is unusual (VAL IS TEST, overlaps, ranks without training images).

Splits order the images by a hash of (seed, fold, path): the same on every machine and version.
A release's file (morph2.py, ...) reads its tables and ends in `make_task`. Read after lists.py.
Copy together with: lists.py, files.py.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .files import write_lines
from .lists import Sample, Samples, check_labels, check_names, parse_number, read_list, write_list

PARTS = ("train", "val", "test")
REAL_LABELS = "real_labels.txt"


@dataclass(frozen=True)
class Task:
    """One dataset under one protocol."""

    name: str
    protocol: str  # one line, printed with every number
    root: Path
    rank_names: tuple[str, ...]  # R, lowest rank first
    rank_values: tuple[float, ...]  # R, what a rank is worth: age 16.0; or its index
    context: str  # the words before the rank in the prompt
    train: Sequence[Sample]  # becomes Samples, which workers share
    val: Sequence[Sample]
    test: Sequence[Sample]
    val_is_test: bool = False
    notes: tuple[str, ...] = ()  # where the release differs from what is published or from itself
    real_labels: dict[str, float] = field(default_factory=dict, hash=False)  # {path: label} of bins
    num_groups: int = 0  # persons, say, of whom none is in two parts
    file_digests: dict[str, str] = field(default_factory=dict, hash=False)  # of check_images
    images_digest: str = ""  # of all paths and labels, before some were left out of train

    def __post_init__(self) -> None:
        for part in PARTS:
            object.__setattr__(self, part, Samples(getattr(self, part)))

    @property
    def num_ranks(self) -> int:
        return len(self.rank_names)

    def targets(self, part: str) -> list[float] | None:
        """The labels of a part in their own unit; None where ranks are one unit apart."""
        consecutive = tuple(self.rank_values[0] + i for i in range(self.num_ranks))
        if not self.real_labels and self.rank_values == consecutive:
            return None
        real, values = self.real_labels, self.rank_values
        return [real[path] if real else values[rank] for path, rank in getattr(self, part)]

    def write_lists(self, folder: str | Path) -> None:
        """Write {train,val,test}.txt (`path label`) and ranks.txt; each file atomically.

        Of ranks that are bins also real_labels.txt.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            write_list(folder / f"{part}.txt", getattr(self, part))
        write_lines(folder / "ranks.txt", self.rank_names)
        if self.real_labels:
            paths = dict.fromkeys(sample.path for part in PARTS for sample in getattr(self, part))
            write_list(folder / REAL_LABELS, ((path, self.real_labels[path]) for path in paths))


@dataclass(frozen=True)
class Options:
    """What the caller of `load` chose, passed on to the dataset's own `load(root, options)`."""

    split: str = "random"
    fold: int = 0
    seed: int = 1
    lists: tuple[Path | None, ...] | None = None  # of train, val, test; they replace the split
    category: str | None = None
    label_rule: str | None = None
    allow_missing: bool = False  # keep images in the lists that are not on disk
    # Of own images (folder.py, groups.py, labels.py):
    label_pattern: str | None = None
    ranks: str | None = None
    bins: str | None = None
    group: str | None = None  # column

    @property
    def salt(self) -> str:
        return f"{self.seed}/{self.fold}"

    def describe(self) -> str:
        """The part of the protocol that these options decide."""
        if self.lists:
            return "given lists " + " ".join(path.name for path in self.lists if path)
        rules = [f"category {self.category}"] * bool(self.category)
        rules += [f"label rule {self.label_rule}"] * bool(self.label_rule)
        return ", ".join([*rules, f"{self.split} split, seed {self.seed}, fold {self.fold}"])

    def read_lists(
        self, root: Path, num_ranks: int | None, allow_conflicts: bool = False
    ) -> list[Samples | None]:
        """The samples of each list file, None for a list that is None."""
        options = num_ranks, self.allow_missing, allow_conflicts
        parts = [path and read_list(path, root, *options) for path in self.lists]
        if not allow_conflicts and sum(map(bool, parts)) > 1:
            check_labels(parts, lambda part, _: str(self.lists[part]))
        return parts


def make_task(
    name: str,
    preset: Mapping[str, Any],
    root: Path,
    parts: Sequence[Sequence[Sample] | None],
    options: Options,
    description: str | None = None,
    notes: Iterable[str] = (),
) -> Task:
    """The Task of (train, val, test) samples, with a protocol that begins with the description.

    Without val and test 10 % of train are held out for each; without val 10 % are held out for it;
    without test val is the test part too. preset: rank_names, context and maybe rank_values.
    Raises ValueError if there are no training images, if a part is empty, or for a file name that
    no list can hold.
    """
    if parts[0] is None:
        raise ValueError(f"{name}: there is no list or folder of training images; give one")
    parts = [part if part is None else Samples(part) for part in parts]
    train, val, test = parts
    check_names(chain.from_iterable(part.iterate_paths() for part in parts if part))
    warnings = []
    for part, samples in zip(PARTS, parts) if options.lists or description else ():
        if samples and (repeats := np.count_nonzero(np.diff(np.sort(samples.keys())) == 0)):
            what = f"lines of the {part} list" if options.lists else f"rows for {part}"
            warnings.append(f"{repeats:,} of {len(samples):,} {what} repeat an image")
    if val is None and test is None:
        train, test = hold_out(train, 0.1, f"test/{options.salt}")
        train, val = hold_out(train, 1 / 9, f"val/{options.salt}")
    elif val is None:
        train, val = hold_out(train, 0.1, f"val/{options.salt}")
    test = val if test is None else test
    counts = f"{len(train):,} train / {len(val):,} val / {len(test):,} test images"
    if not (train and val and test):
        raise ValueError(f"{name}: {counts}, and none may be empty; give more images or lists")
    names, samples = tuple(preset["rank_names"]), [train, val, test]
    for rank in names:
        if rank.strip() != rank or rank[:1] in ("", "#", "\ufeff") or len(rank.splitlines()) > 1:
            raise ValueError(
                f"{name}: the rank {rank!r} is empty, starts with # or ends in a space, which no "
                "ranks.txt can hold; rename it"
            )
    values = tuple(map(rank_value, names))
    values = tuple(map(float, range(len(names)))) if None in values else values
    values = preset.get("rank_values") or values
    val_is_test, overlaps = _find_overlaps(samples)
    warnings += overlaps
    if untrained := [names[rank] for rank in sorted({*range(len(names))} - {*train.labels})]:
        some = ", ".join(untrained[:3] + ["..."] * (len(untrained) > 3))
        warnings.append(f"{len(untrained)} of {len(names)} ranks have no training image ({some})")
    protocol = f"{name}: {description or options.describe()}: {counts}"
    protocol, context = "; ".join([protocol, *warnings]), preset["context"]
    return Task(name, protocol, root, names, values, context, *samples, val_is_test, tuple(notes))


def _find_overlaps(parts: list[Samples]) -> tuple[bool, list[str]]:
    """(whether val is test, warnings)"""
    keys = [np.unique(part.keys(), return_index=True)[0] for part in parts]  # by sorting
    if val_is_test := np.array_equal(keys[1], keys[2]):
        warnings, pairs = ["VAL IS TEST: the validation images are the test images"], []
    else:
        warnings, pairs = [], [(1, 2)]
    for i, j in (*pairs, (0, 1), (0, 2)):
        if count := len(np.intersect1d(keys[i], keys[j], assume_unique=True)):
            warnings.append(f"{count:,} images are in both {PARTS[i]} and {PARTS[j]}")
    return val_is_test, warnings


def rank_value(name: str) -> float | None:
    """16.0 of `16`, the middle of a bin such as `0 to 1.5`, None of other names."""
    ends = [parse_number(end) for end in name.split(" to ")]
    return None if None in ends or len(ends) > 2 else sum(ends) / len(ends)


def few_shot(task: Task, shots: int, seed: int = 1) -> Task:
    """The task with `shots` training images of each rank, all where there are fewer.

    val and test stay as they are. Raises ValueError for shots < 1.
    Source: xk-huang/OrdinalCLIP@ca10a20 ordinalclip/runner/data.py, generate_fewshot_dataset.
    """
    if shots < 1:
        raise ValueError(f"shots={shots}: expected at least 1 image of each rank")
    counts = Counter(task.train.labels)
    num_smaller = sum(counts[rank] < shots for rank in range(task.num_ranks))
    smaller = f" (all of the {num_smaller} that have fewer)" * bool(num_smaller)
    description = f"few-shot: {shots} of each rank{smaller}, drawn by seed {seed}"
    quota = dict.fromkeys(range(task.num_ranks), shots)
    return _subsample_train(task, quota, f"shots/{seed}", description)


def distribution_shift(task: Task, ranks: int, keep: float, seed: int = 1) -> Task:
    """The task with the share `keep` (0 .. 1) of the training images of its most frequent `ranks`.

    At least one image of each stays, and all of the other ranks; val and test stay as they are.
    Source: the same file, generate_distribution_shifted_dataset; paper: 10 to 40 ranks, 0.2 or 0.1.
    """
    if not 1 <= ranks <= task.num_ranks or not 0 < keep <= 1:
        raise ValueError(
            f"shift of {ranks} ranks to {keep}: expected 1 .. {task.num_ranks} ranks and "
            "a share above 0, at most 1"
        )
    counts = Counter(task.train.labels)
    most_frequent = sorted(range(task.num_ranks), key=lambda rank: -counts[rank])[:ranks]
    description = f"shift: {keep:g} of the {ranks} most frequent ranks kept, drawn by seed {seed}"
    quota = {rank: max(1, int(counts[rank] * keep)) for rank in most_frequent}
    return _subsample_train(task, quota, f"shift/{seed}", description)


def _subsample_train(task: Task, quota: dict[int, int], salt: str, description: str) -> Task:
    """The task with at most quota[rank] training images of those ranks, in their old order."""
    remaining, kept_indices = dict(quota), set()
    for i in shuffled(range(len(task.train)), salt):
        rank = task.train.labels[i]
        remaining[rank] = remaining.get(rank, len(task.train)) - 1
        if remaining[rank] >= 0:
            kept_indices.add(i)
    train = Samples(sample for i, sample in enumerate(task.train) if i in kept_indices)
    protocol = f"{task.protocol}; {description}: {len(train):,} train images"
    return replace(task, train=train, protocol=protocol)


def hold_out(
    samples: Sequence[Sample], share: float, salt: str, group: Callable = str, stratify: bool = True
) -> tuple[Samples, Samples]:
    """(rest, held-out samples): every 1/share-th group, in an order hashed from (salt, group).

    group: path -> str; samples of one group stay together, by default each is its own.
    stratify: from all ranks in proportion; otherwise blind to them.
    """
    samples = Samples(samples)
    names = samples if group is str else Samples((group(path), 0) for path, _ in samples)
    _, first, groups = np.unique(names.keys(), return_index=True, return_inverse=True)
    by_digest = _digests(names.encoded_paths(), salt)[first].argsort(kind="stable")
    if stratify:  # stable: hashed within a rank
        by_digest = by_digest[np.array(samples.labels)[first[by_digest]].argsort(kind="stable")]
    is_held_out = np.zeros(len(first), bool)
    is_held_out[by_digest] = np.diff(np.floor(np.arange(len(first) + 1) * share + 0.5)) > 0
    mask = is_held_out[groups]
    return samples.select(~mask), samples.select(mask)


def _digests(names: Iterable[bytes], salt: str) -> np.ndarray:
    """sha256 of salt/name, (M,) of bytes."""
    digests, salted = bytearray(), hashlib.sha256(f"{salt}/".encode())
    for name in names:
        digest = salted.copy()
        digest.update(name)
        digests += digest.digest()
    return np.frombuffer(digests, "S32")


def shuffled(names: Iterable[Any], salt: str) -> list[Any]:
    """The names in the order of their hashes with the salt."""
    names = list(names)
    return [names[i] for i in _digests((str(n).encode() for n in names), salt).argsort()]


def split_counts(names: Iterable[str], num_val: int, num_test: int, salt: str) -> list[list[str]]:
    """[train, val, test]: that many names for val and test, blind to their ranks."""
    order, end = shuffled(names, salt), num_test + num_val
    return [order[end:], order[num_test:end], order[:num_test]]


def find_path(root: Path, names: Iterable[str], how_to_get: str) -> Path:
    """The first root/name that exists; otherwise FileNotFoundError with the text how_to_get."""
    paths = [root / name for name in names]
    if existing := [path for path in paths if path.exists()]:
        return existing[0]
    raise FileNotFoundError(
        f"{' or '.join(map(str, paths))} is not there.\n{how_to_get.format(root=root)}\n"
        "To try things without it: the data set demo"
    )


def count_warning(what: str, count: int, expected: int) -> list[str]:
    """[] or a note that a count is not the published one."""
    return [f"{what}: {count:,} of {expected:,} published"] * (count != expected)


def conflict_warning(one: str, many: str, problem: str, values: Mapping[str, Any]) -> list[str]:
    """[] or a note with up to three of the names that have several different values."""
    odd = sorted(name for name, several in values.items() if len(set(several)) > 1)
    some = ", ".join(odd[:3]) + ", ..." * (len(odd) > 3)
    return [f"{len(odd):,} {one if len(odd) == 1 else many} {problem}: {some}"] * bool(odd)
