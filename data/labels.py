"""Labels of your own images: in file names, as numbers, in bins; the order of ranks by their names.

    labels, unmatched = match_names(images, folder, "(?P<group>[0-9]+)A([0-9]+)")  # 001A02
    names, ranks, values, notes = number_ranks(rows, bins="0,1.5,3,10")

Read after lists.py. Copy together with: lists.py, files.py.
"""

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from .lists import LABEL_COLUMNS, label_text, parse_number, parse_rows, read_header, read_texts

MAX_RANKS = 10_000
PRESENT = "present"  # ranks: the labels that occur, in order
REAL = r"(-?\d+(?:\.\d+)?)"

# fold_1 and fold_2 are no ranks, and neither are part1 and part2; 3 parts may be one
PART_WORD = r"part|subset|batch|session|.*(?<![a-z])(train|test|valid|fold|split)"
# Ranks such as `1 bad`, `2 good` are ordered although their words differ, if no word is one of
# these units and no number is left out.
UNITS = (
    "mg g kg t lb oz mm cm m km in inch inche ft feet l ml ms s sec second min minute h hr hour d "
    "day w wk week mo month y yo yr year decade century k b am pm ad bc bce ce"
).split()
# `5` and `6 years` are ordered, too; `5` and `6 months` are not.
UNITS_LEFT_OUT = {("year",), ("yr",), ("y",), ("yo",), ("kg",)}
NO_UNITS = "to and or more less older younger over under up plus old st nd rd th".split()
NUMBER = (
    r"(?:(?<!\w)[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|(?:\d+(?:\.\d+)?|(?<!\w)\.\d+)(?:e[+-]?\d+)?)"
)
BELOW, ABOVE = ("<", "≤", "under", "below", "up to"), (">", "≥", "over", "above")


class Row(NamedTuple):
    """An image whose label is text, not yet a rank."""

    path: str  # relative to the root of the images
    label: str
    group: str | None = None
    part: int = 0  # index in PARTS


def match_names(
    images: Iterable[Path], folder: Path, pattern: str
) -> tuple[dict[Path, tuple[str, str | None]], list[str]]:
    """({image: (label, group or None)}, names that the pattern does not match).

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
    label_group, labels, unmatched = names.get("label") or unnamed.pop(), {}, []
    for image in images:
        name = image.relative_to(folder).as_posix() if "/" in pattern else image.name
        match = expression.search(name)
        label = match and match[label_group]
        group = match and match["group"] if "group" in names else None
        if label and (group or "group" not in names):
            labels[image] = (label_text(label), group)
        else:
            unmatched.append(name)
    return labels, unmatched


def number_ranks(
    rows: Iterable[Row], ranks: str | None = None, bins: str | None = None, strict: bool = True
) -> tuple[list[str], dict[str, int], dict[str, float], list[str]]:
    """(names of ranks, {path: rank}, {path: real label} of bins, notes).

    ranks: LOW-HIGH, each whole number a rank, or the limits of the bins. bins: a number of equal
    ones, by default from the lowest label to the highest, or their edges; a bin holds its lower
    edge, the last one both. Labels outside are an error, or, if not strict, left out and counted in
    the notes. ValueError: labels or options that do not parse.
    """
    numbers = {}
    for row in rows:
        if (number := parse_number(row.label)) is None:
            raise ValueError(
                f"label {row.label!r} of {row.path} is no number, as ranks and bins need"
            )
        numbers[row.path] = number
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
    rank_of = {
        path: min(bisect_right(edges, number), len(names)) - 1
        for path, number in numbers.items()
        if edges[0] <= number <= edges[-1]
    }
    outside = [path for path in numbers if path not in rank_of]
    limits = f"{_text(edges[0])} .. {_text(edges[-1])}"
    some = ", ".join(f"{_text(numbers[path])} of {path}" for path in outside[:3])
    if outside and (strict or not rank_of):
        raise ValueError(f"{len(outside):,} labels are not within {limits}, such as {some}")
    note = f"{len(outside):,} images with labels outside {limits} left out ({some})"
    return names, rank_of, numbers if bins else {}, [note] if outside else []


def parse_ranks(text: str, are_limits: bool = False) -> tuple[float, float]:
    """(16.0, 77.0) of 16-77. Limits of bins may be fractions."""
    match = re.fullmatch(f"{REAL}-{REAL}", text, re.ASCII)
    low, high = map(float, match.groups()) if match else (0, 0)
    if low >= high or not are_limits and (low % 1 or high % 1 or high - low >= MAX_RANKS):
        what = "LOW-HIGH" if are_limits else f"whole numbers LOW-HIGH, at most {MAX_RANKS:,} ranks,"
        raise ValueError(f"ranks {text!r}: expected {what} such as 16-77, or {PRESENT}")
    return low, high


def parse_bins(text: str, ranks: str | None, numbers: Iterable[float]) -> list[float]:
    """Edges, rising, one more than bins."""
    edges = [parse_number(edge) for edge in text.split(",")]
    is_rising = None not in edges and edges == sorted(set(edges)) and len(edges) <= MAX_RANKS
    is_digits = len(edges) == 1 and edges[0] in range(2, MAX_RANKS + 1)
    if not is_rising or len(edges) < 3 and not is_digits:
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


def check_agreement(folder: Path, file: Path) -> list[str]:
    """ValueError if a table has other labels than the folders of ranks that it lies beside.

    Of a list that does not say what its second column is, a note.
    """
    suffix = file.suffix.lower()
    if suffix not in (".csv", ".tsv", ".txt"):
        return []
    try:
        has_labels = bool({*LABEL_COLUMNS} & {*read_header(file, folder)})
    except (ValueError, OSError):
        if suffix == ".txt":  # a README in another encoding
            return []
        raise
    try:
        first = islice(parse_rows(file, folder), 100)  # a log of a million lines is no list
        is_list = has_labels or any(os.path.isfile(folder / path) for _, path, _ in first)
        rows = read_texts(file, folder, allow_missing=True) if is_list else []
    except (ValueError, OSError):
        if has_labels:
            raise
        return []
    for path, label in rows:
        if label == label_text(Path(path).parts[0]):
            continue
        if has_labels:
            raise ValueError(
                f"{file} says {label!r} of {path}, but folders lie beside it: for the labels of "
                f"the table give --train-list {file} --ranks present, else move it away"
            )
        if os.path.isfile(folder / path):
            return [f"{file.name}, which says {label!r} of {path}, is not read"]
    return []


def order_ranks(folder: Path, names: Iterable[str], order: list[str] | None) -> list[str]:
    """The ranks in order: that of ranks.txt, or by the numbers in their names.

    ValueError where there is none: a name without a number, two of one number, months and years.
    """
    how = f"name the ranks in {folder / 'ranks.txt'}, one a line, lowest first"
    keys = {}
    if order is None:
        if parts := [name for name in sorted(names) if re.match(PART_WORD, name.casefold())]:
            raise ValueError(f"{folder}: {parts[0]!r} may be a part or a rank; {how}")
        keys = {name: key for name in sorted(names) if (key := rank_key(name))}
        word = next((key.word for key in keys.values()), "")  # "class" of "class 3"
        by_number = {key.number: name for name, key in keys.items() if key.word == word}
        order = [by_number[number] for number in sorted(by_number)]
    if unknown := sorted(set(names) - set(order)):
        raise ValueError(f"{folder}: the order of rank {unknown[0]!r} is not known; {how}")
    units = {key.units: name for name, key in keys.items()}
    counted = [{(i + first, 0) for i in range(len(units))} for first in (0, 1)]
    is_counted = {key.number for key in keys.values()} in counted
    is_counted &= not any(word in UNITS for unit in units for word in unit)
    if len(units) > 1 and not is_counted and units.keys() - UNITS_LEFT_OUT != {()}:
        pair = " and ".join(map(repr, sorted(units.values())[:2]))
        raise ValueError(f"{folder}: the ranks {pair} have different units; {how}")
    fractions = [name for name in keys if re.search(r"\d\s*/\s*\d", name)]
    if len({keys[name].end for name in fractions}) > 1:  # 1/2 and 2/3
        raise ValueError(
            f"{folder}: {' and '.join(fractions[:2])} may be fractions or dates; {how}"
        )
    ends = [(keys[name].end, name) for name in order if name in keys and keys[name].end is not None]
    for (end, name), (next_end, next_name) in zip(ends, ends[1:]):  # Q1 2021, Q2 2020
        if end > next_end:
            raise ValueError(f"{folder}: is rank {name!r} below {next_name!r}? {how}")
    return order


def rank_values(names: Iterable[str]) -> tuple[float, ...] | None:
    """20.0 of `20 years`, for all ranks, in order; None unless each has one number, and they rise,
    in the same unit."""
    keys = [rank_key(name) for name in names]
    numbers = [key.number[0] for key in keys if key and key.number[1] == 0 and key.end is None]
    if any(key and key.units == ("s",) for key in keys) and min(numbers, default=0) < 1000:
        return None  # 80s, 90s, 2000s
    is_one_unit = None not in keys and len({(key.word, key.units) for key in keys}) == 1
    is_rising = len(numbers) == len(keys) and numbers == sorted({*numbers})
    return tuple(numbers) if is_one_unit and is_rising else None


class RankKey(NamedTuple):
    number: tuple[float, int]  # and -1 below it, 1 above it, else 0
    word: str  # before the number
    units: tuple[str, ...]  # words after it
    end: float | None  # second number: 30 of 18-30


def rank_key(name: str) -> RankKey | None:
    """None without a number, and where it may be read in two ways: 1,5 and 00s and minus 2."""
    name = name.casefold().replace("\u2212", "-")
    match = re.match(rf"(\D*?)({NUMBER})(\s*\+)?(.*)", name)
    without_thousands = re.sub(r"(?<![\d,.])[1-9]\d{0,2}(,\d{3})+(?![\d,])", "", name)
    is_odd = re.search(r"^[^(\[]*\d,\d|^00s|^(minus|negative)\b", without_thousands)
    if not match or is_odd:
        return None
    before, number = match[1].strip(" _-([#"), float(match[2].replace(",", ""))
    side = -1 if before in BELOW else int(before in ABOVE or bool(match[3]))
    words = (re.sub(r"(?<=..)s$", "", word) for word in re.findall(r"[^\W\d_]+", match[4]))
    units = tuple(word for word in words if word not in NO_UNITS)
    second = re.search(NUMBER, re.sub(r"^\s*[-\u2013]\s*", "", match[4]))
    end = float(second[0].replace(",", "")) if second else None
    return RankKey((number, side), before * (side == 0), units, end)
