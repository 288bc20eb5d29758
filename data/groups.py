"""Persons, or other groups, of your own images: none is in two parts.

    parts, notes = split_by_group(folder, [samples, None, None], {path: person}, options)

Read after task.py, before folder.py. Copy together with: task.py, lists.py, files.py.
"""

from collections.abc import Sequence
from pathlib import Path

from .lists import Sample, label_text
from .task import PARTS, Options, hold_out

LEAVE_ONE_OUT = "leave-one-group-out"
Parts = list[Sequence[Sample] | None]  # of train, val, test; None where there is none


def join_spellings(groups: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """({path: group}, note), in one spelling: 1, 01 and 1.0 are the same group; Anna, anna, too."""
    spellings: dict[str, set[str]] = {}
    for name in set(groups.values()):
        spellings.setdefault(label_text(name).casefold(), set()).add(name)
    joined = [sorted(names) for names in spellings.values() if len(names) > 1]
    some = " and ".join(map(repr, min(joined, default=())))
    notes = [f"{len(joined):,} groups have several spellings, such as {some}"] if joined else []
    first = {name: min(names) for names in spellings.values() for name in names}
    return {path: first[name] for path, name in groups.items()}, notes


def split_by_group(
    folder: Path, parts: Parts, groups: dict[str, str], options: Options
) -> tuple[Parts, list[str]]:
    """(parts, notes), val and test held out where they are missing; no group is in two of them."""

    def held_out(samples: Sequence[Sample], part: str) -> tuple[Sequence[Sample], Sequence[Sample]]:
        share = max(0.1, 1 / len({groups[path] for path, _ in samples}))
        return hold_out(samples, share, f"{part}/{options.salt}", groups.__getitem__)

    train, val, test = parts
    names = sorted(set(groups.values()))
    notes = [f"{len(names):,} groups, none in two parts"]
    if options.split == LEAVE_ONE_OUT:
        if not names:
            needed = "a group column, or (?P<group>...) in the label pattern"
            raise ValueError(f"{folder}: split {LEAVE_ONE_OUT} needs {needed}")
        if val or test:
            raise ValueError(f"{folder} has parts of its own, so split {LEAVE_ONE_OUT} is not made")
        if not 0 <= options.fold < len(names):
            raise ValueError(f"{folder} has no fold {options.fold}; give 0 .. {len(names) - 1}")
        name = names[options.fold]
        notes.append(f"test group {name!r}")
        test = [sample for sample in train if groups[sample.path] == name]
        train = [sample for sample in train if groups[sample.path] != name]
    elif train and val is None and test is None:
        train, test = held_out(train, "test")
    if train and val is None:
        train, val = held_out(train, "val")
    parts = [train, val, test]
    part_groups = [{groups[path] for path, _ in part or ()} for part in parts]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        if shared := part_groups[i] & part_groups[j]:
            raise ValueError(
                f"{folder}: group {min(shared)!r} is in both {PARTS[i]} and {PARTS[j]}; move its "
                "images into one part"
            )
    if not (train and val and (test or test is None)):
        counts = [f"{len(part or ()):,} {name}" for name, part in zip(PARTS, parts)]
        raise ValueError(
            f"{folder.name}: {' / '.join(counts)} images, and none may be empty: "
            f"{len(names)} groups are too few, train, val and test need one each"
        )
    return parts, notes
