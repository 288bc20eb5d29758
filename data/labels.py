"""Labels of your own images: in file names, as numbers within limits, as real numbers in bins.

    rows, unmatched = match_names(images, folder, "(?P<group>[0-9]+)A([0-9]+)")  # 001A02
    names, parts, values, notes = number_ranks([samples, None, None], bins="0,1.5,3,10")

Read after lists.py. Copy together with: lists.py, files.py.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

from .lists import Sample, parse_integer, parse_number

MAX_RANKS = 10_000
PRESENT = "present"  # ranks: the labels that occur, in order
REAL = r"(-?\d+(?:\.\d+)?)"


def match_names(
    images: Iterable[Path], folder: Path, pattern: str
) -> tuple[list[tuple[Path, str, str | None]], list[str]]:
    """([(image, label, group or None)], names that the pattern does not match).

    The regular expression is searched in the file name, or, if it holds a /, in the path below
    `folder`. Its one capture group, or (?P<label>...), is the label (02 is 2), (?P<group>...) the
    person. ValueError for another expression.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"label pattern {pattern!r} is no regular expression: {error}") from error
    names = dict(expression.groupindex)
    unnamed = set(range(1, expression.groups + 1)) - set(names.values())
    if names.keys() - {"label", "group"} or ("label" not in names and len(unnamed) != 1):
        raise ValueError(
            f"label pattern {pattern!r}: expected one capture group, or (?P<label>...), and "
            "perhaps (?P<group>...); write (?:...) for other parentheses"
        )
    label_group, rows, unmatched = names.get("label") or unnamed.pop(), [], []
    for image in images:
        name = image.relative_to(folder).as_posix() if "/" in pattern else image.name
        match = expression.search(name)
        label = match and match[label_group]
        group = match and match["group"] if "group" in names else None
        if label and (group or "group" not in names):
            number = parse_integer(label)
            rows.append((image, label if number is None else str(number), group))
        else:
            unmatched.append(name)
    return rows, unmatched


def number_ranks(
    parts: Sequence[Sequence[Sample] | None],
    ranks: str | None = None,
    bins: str | None = None,
    strict: bool = True,
) -> tuple[list[str], list[list[Sample] | None], dict[str, float], list[str]]:
    """(names of ranks, parts with rank indices, {path: real label} of bins, notes).

    parts: samples with labels as text. ranks: LOW-HIGH, each whole number a rank, or the limits of
    the bins. bins: a number of equal ones, by default from the lowest label to the highest, or
    their edges; a bin holds its lower edge, the last one both. Labels outside are an error, or, if
    not strict, left out and counted in the notes. ValueError: labels or options that do not parse.
    """
    numbers = {}
    for path, text in (sample for part in parts for sample in part or ()):
        if (number := parse_number(text)) is None:
            raise ValueError(f"label {text!r} of {path} is no number, as ranks and bins need")
        numbers[path] = number
    if bins:
        edges = parse_bins(bins, ranks, numbers.values())
        names = [f"{_text(low)} to {_text(high)}" for low, high in zip(edges, edges[1:])]
    else:
        low, high = parse_ranks(ranks)
        edges = range(int(low), int(high) + 1)
        names = [str(rank) for rank in edges]
        if fractions := [path for path, number in numbers.items() if number % 1]:
            number = _text(numbers[fractions[0]])
            raise ValueError(f"label {number} of {fractions[0]} is no whole number; give bins")
    outside = [path for path, number in numbers.items() if not edges[0] <= number <= edges[-1]]
    limits = f"{_text(edges[0])} .. {_text(edges[-1])}"
    some = ", ".join(f"{_text(numbers[path])} of {path}" for path in outside[:3])
    if outside and (strict or len(outside) == len(numbers)):
        raise ValueError(f"{len(outside):,} labels are not within {limits}, such as {some}")
    notes = [f"{len(outside):,} images with labels outside {limits} left out ({some})"]
    left_out = set(outside)
    parts = [
        part
        and [
            Sample(path, min(bisect_right(edges, numbers[path]), len(names)) - 1)
            for path, _ in part
            if path not in left_out
        ]
        for part in parts
    ]
    return names, parts, numbers if bins else {}, notes * bool(outside)


def parse_ranks(text: str, are_limits: bool = False) -> tuple[float, float]:
    """(16.0, 77.0) of 16-77. Limits of bins may be fractions."""
    match = re.fullmatch(f"{REAL}-{REAL}", text, re.ASCII)
    low, high = map(float, match.groups()) if match else (0, 0)
    if low >= high or not are_limits and (low % 1 or high % 1 or high - low >= MAX_RANKS):
        raise ValueError(f"ranks {text!r}: expected LOW-HIGH such as 16-77, or {PRESENT}")
    return low, high


def parse_bins(text: str, ranks: str | None, numbers: Iterable[float]) -> list[float]:
    """Edges, rising, one more than bins."""
    edges = [parse_number(edge) for edge in text.split(",")]
    is_rising = None not in edges and edges == sorted(set(edges)) and len(edges) <= MAX_RANKS
    is_number = len(edges) == 1 and edges[0] in range(2, MAX_RANKS + 1)
    if not is_rising or len(edges) < 3 and not is_number:
        raise ValueError(
            f"bins {text!r}: expected a number of bins, 2 .. {MAX_RANKS:,}, or rising edges such "
            "as 0,1.5,3,10"
        )
    if len(edges) > 2 and ranks or ranks == PRESENT:
        raise ValueError(f"ranks {ranks!r} has no effect with bins {text!r}; remove it")
    if len(edges) > 2:
        return edges
    low, high = parse_ranks(ranks, are_limits=True) if ranks else (min(numbers), max(numbers))
    if low == high:
        raise ValueError(f"bins {text!r}, but all labels are {_text(low)}; give their edges")
    num_bins = int(edges[0])
    width = (high - low) / num_bins
    digits = 3 - math.floor(math.log10(width))  # names of bins have no more than they need
    return [low, *(round(low + width * i, digits) for i in range(1, num_bins)), high]


def _text(number: float) -> str:
    return str(int(number)) if number == int(number) else repr(number)
