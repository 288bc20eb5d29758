"""Task: one dataset under one protocol; how it is split, and how its training part is reduced.

A protocol is one line of text that names every choice behind the numbers: rule, split, seed, fold,
counts, and whatever is unusual (VAL IS TEST, overlaps, ranks without training images).

Splits order the images by a hash of (seed, fold, path): the same on every machine and version.
A release's file (morph2.py, ...) reads its tables and ends in `make_task`. Read after lists.py.
Copy together with: lists.py.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .files import write_lines
from .lists import Sample, check_labels, check_names, read_list, write_list

PARTS = ("train", "val", "test")


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
    notes: tuple[str, ...] = ()  # where the release differs from what is published or from itself

    @property
    def num_ranks(self) -> int:
        return len(self.rank_names)

    def write_lists(self, folder: str | Path) -> None:
        """Write {train,val,test}.txt (`path label`) and ranks.txt; each file atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            write_list(folder / f"{part}.txt", getattr(self, part))
        write_lines(folder / "ranks.txt", self.rank_names)


@dataclass(frozen=True)
class Options:
    """What the caller of `load` chose, passed on to the dataset's own `load(root, options)`."""

    split: str = "random"
    fold: int = 0
    seed: int = 0
    lists: tuple[Path | None, ...] | None = None  # of train, val, test; they replace the split
    category: str | None = None
    label_rule: str | None = None
    allow_missing: bool = False  # keep images in the lists that are not on disk

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
    ) -> list[list[Sample] | None]:
        """The samples of each list file, None for a list that is None."""
        lists = [path and Path(path) for path in self.lists]
        options = num_ranks, self.allow_missing, allow_conflicts
        parts = [path and read_list(path, root, *options) for path in lists]
        if not allow_conflicts:
            check_labels((str(path), s) for path, part in zip(lists, parts) for s in part or ())
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
    train, val, test = parts
    if train is None:
        raise ValueError(f"{name}: there is no list or folder of training images; give one")
    check_names(path for part in parts for path, _ in part or ())
    repeats = [*_repeats(parts)] if options.lists else []
    if val is None and test is None:
        train, test = hold_out(train, 0.1, f"test/{options.salt}")
        train, val = hold_out(train, 1 / 9, f"val/{options.salt}")
    elif val is None:
        train, val = hold_out(train, 0.1, f"val/{options.salt}")
    test = val if test is None else test
    counts = f"{len(train):,} train / {len(val):,} val / {len(test):,} test images"
    if not (train and val and test):
        raise ValueError(f"{name}: {counts}, and none may be empty; give more images or lists")
    names, samples = tuple(preset["rank_names"]), [tuple(part) for part in (train, val, test)]
    numeric = all(re.fullmatch(r"[-+]?(\d+(\.\d+)?|\.\d+)", name) for name in names)
    values = tuple(float(name if numeric else i) for i, name in enumerate(names))
    values = preset.get("rank_values", values)
    paths = [{path for path, _ in part} for part in samples]
    untrained = sorted(set(range(len(names))) - {sample.label for sample in train})
    warnings = split_warnings(*paths, [names[rank] for rank in untrained], len(names))
    protocol = "; ".join(
        [f"{name}: {description or options.describe()}: {counts}", *repeats, *warnings]
    )
    context, val_is_test = preset["context"], paths[1] == paths[2]
    return Task(name, protocol, root, names, values, context, *samples, val_is_test, tuple(notes))


def _repeats(parts: Sequence[Sequence[Sample] | None]) -> Iterator[str]:
    """How many lines of each list repeat an image."""
    for part, samples in zip(PARTS, parts):
        if repeats := len(samples or ()) - len({path for path, _ in samples or ()}):
            yield f"{repeats:,} of {len(samples):,} lines of the {part} list repeat an image"


def split_warnings(
    train: set[str], val: set[str], test: set[str], untrained: list[str], num_ranks: int
) -> Iterator[str]:
    """Overlaps between the paths of the three parts, and the names of ranks without training."""
    if val == test:
        yield "VAL IS TEST: the validation images are the test images"
    elif val & test:
        yield f"{len(val & test):,} images are in both val and test"
    for part, others in (("val", val), ("test", test)):
        if train & others:
            yield f"{len(train & others):,} images are in both train and {part}"
    if untrained:
        some = ", ".join(untrained[:3] + ["..."] * (len(untrained) > 3))
        yield f"{len(untrained)} of {num_ranks} ranks have no training image ({some})"


def few_shot(task: Task, shots: int, seed: int = 0) -> Task:
    """The task with `shots` training images of each rank, all where there are fewer.

    val and test stay as they are. Raises ValueError for shots < 1.
    Source: xk-huang/OrdinalCLIP@ca10a20 ordinalclip/runner/data.py, generate_fewshot_dataset.
    """
    if shots < 1:
        raise ValueError(f"shots={shots}: expected at least 1 image of each rank")
    counts = Counter(sample.label for sample in task.train)
    num_smaller = sum(counts[rank] < shots for rank in range(task.num_ranks))
    smaller = f" (all of the {num_smaller} that have fewer)" * bool(num_smaller)
    description = f"few-shot: {shots} of each rank{smaller}, drawn by seed {seed}"
    quota = dict.fromkeys(range(task.num_ranks), shots)
    return _subsample_train(task, quota, f"shots/{seed}", description)


def distribution_shift(task: Task, ranks: int, keep: float, seed: int = 0) -> Task:
    """The task with the share `keep` (0 .. 1) of the training images of its most frequent `ranks`.

    At least one image of each stays, and all of the other ranks; val and test stay as they are.
    Source: the same file, generate_distribution_shifted_dataset; paper: 10 to 40 ranks, 0.2 or 0.1.
    """
    if not 1 <= ranks <= task.num_ranks or not 0 < keep <= 1:
        raise ValueError(
            f"shift of {ranks} ranks to {keep}: expected 1 .. {task.num_ranks} ranks and "
            "a share above 0, at most 1"
        )
    counts = Counter(sample.label for sample in task.train)
    most_frequent = sorted(range(task.num_ranks), key=lambda rank: -counts[rank])[:ranks]
    description = f"shift: {keep:g} of the {ranks} most frequent ranks kept, drawn by seed {seed}"
    quota = {rank: max(1, int(counts[rank] * keep)) for rank in most_frequent}
    return _subsample_train(task, quota, f"shift/{seed}", description)


def _subsample_train(task: Task, quota: dict[int, int], salt: str, description: str) -> Task:
    """The task with at most quota[rank] training images of those ranks, in their old order."""
    remaining, kept_indices = dict(quota), set()
    for i in shuffled(range(len(task.train)), salt):
        rank = task.train[i].label
        remaining[rank] = remaining.get(rank, len(task.train)) - 1
        if remaining[rank] >= 0:
            kept_indices.add(i)
    train = tuple(sample for i, sample in enumerate(task.train) if i in kept_indices)
    protocol = f"{task.protocol}; {description}: {len(train):,} train images"
    return replace(task, train=train, protocol=protocol)


def hold_out(
    samples: Sequence[Sample], share: float, salt: str, group: Callable = str, stratify: bool = True
) -> tuple[list[Sample], list[Sample]]:
    """(rest, held-out samples): every 1/share-th group, in an order hashed from (salt, group).

    group: path -> str; samples of one group stay together, by default each is its own.
    stratify: from all ranks in proportion; otherwise blind to them.
    """
    groups = {}
    for sample in samples:
        groups.setdefault(group(sample.path), []).append(sample)
    order = shuffled(groups, salt)
    if stratify:
        order.sort(key=lambda name: groups[name][0].label)  # stable: hashed within a rank
    cuts = [math.floor(i * share + 0.5) for i in range(len(order) + 1)]
    held_out = {name for name, before, after in zip(order, cuts, cuts[1:]) if after > before}
    parts = [], []
    for sample in samples:
        parts[group(sample.path) in held_out].append(sample)
    return parts


def shuffled(names: Iterable[Any], salt: str) -> list[Any]:
    """The names in the order of their hashes with the salt."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).digest())


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
        "To try things without it: --data demo"
    )


def count_warning(what: str, count: int, expected: int) -> list[str]:
    """[] or a note that a count is not the published one."""
    return [f"{what}: {count:,} of {expected:,} published"] * (count != expected)


def conflict_warning(one: str, many: str, problem: str, values: Mapping[str, Any]) -> list[str]:
    """[] or a note with up to three of the names that have several different values."""
    odd = sorted(name for name, several in values.items() if len(set(several)) > 1)
    some = ", ".join(odd[:3]) + ", ..." * (len(odd) > 3)
    return [f"{len(odd):,} {one if len(odd) == 1 else many} {problem}: {some}"] * bool(odd)
