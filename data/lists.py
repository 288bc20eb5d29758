"""List files and tables: read them, write them, and find their images on disk.

    samples = read_list("lists/train.txt", root="photos", num_ranks=5)   # [Sample(path, label)]
    write_list(Path("copy.txt"), samples)

A list is a .txt with lines `path label` (the label is the last word, so paths may hold spaces), a
.csv or a .tsv. Read after files.py, before task.py. Copy together with: files.py.
"""

import csv
import functools
import math
import os
import re
import sys
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .files import IMAGE_TYPES, read_lines, write_lines

PATH_COLUMNS = ("path", "image", "filename", "file", "file_name", "image_path", "photo")
LABEL_COLUMNS = ("label", "rank", "age", "class", "target", "value", "score")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Sample(NamedTuple):
    path: str  # relative to the root of the images, or absolute
    label: int  # rank index, 0 .. R-1


class Samples(Sequence[Sample]):
    """Samples in three buffers: a million take 60 MB, which processes share as they read them.

    As Python objects they would take three times that, and again in each process, since reading an
    object counts a reference in its memory. Slices are tuples.
    """

    def __init__(self, samples: Iterable[tuple[str, int]] = ()) -> None:
        if isinstance(samples, Samples):
            vars(self).update(vars(samples))
            return
        paths, self.ends, self.labels = bytearray(), array("q", [0]), array("q")
        for path, label in samples:
            paths += path.encode("utf-8", "surrogatepass")
            self.ends.append(len(paths))
            self.labels.append(label)
        self.paths = bytes(paths)  # UTF-8, one after the other

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice) -> Sample | tuple[Sample, ...]:
        index = range(len(self))[index]
        if isinstance(index, range):
            return tuple(self[i] for i in index)
        path = self.paths[self.ends[index] : self.ends[index + 1]]
        return Sample(path.decode("utf-8", "surrogatepass"), self.labels[index])

    def __iter__(self) -> Iterator[Sample]:
        return map(Sample, self.iterate_paths(), self.labels)

    def __eq__(self, other: object) -> bool:
        is_as_long = isinstance(other, Sequence) and len(self) == len(other)
        return is_as_long and all(a == b for a, b in zip(self, other))

    def __hash__(self) -> int:
        return hash((self.paths, bytes(self.labels)))

    def __add__(self, other: Iterable[Sample]) -> "Samples":
        return Samples(chain(self, other))

    def encoded_paths(self) -> Iterator[bytes]:
        return map(self.paths.__getitem__, map(slice, self.ends, islice(self.ends, 1, None)))

    def iterate_paths(self) -> Iterator[str]:
        return (path.decode("utf-8", "surrogatepass") for path in self.encoded_paths())

    def select(self, mask: np.ndarray) -> "Samples":
        """The samples where mask (M,) is True."""
        lengths, selected = np.diff(self.ends), Samples()
        selected.paths = np.frombuffer(self.paths, np.uint8)[np.repeat(mask, lengths)].tobytes()
        selected.ends.frombytes(lengths[mask].cumsum().tobytes())
        selected.labels.frombytes(np.array(self.labels)[mask].tobytes())
        return selected

    def keys(self) -> np.ndarray:
        """64-bit hashes (M,) of the paths, the same ones within a process and its workers."""
        return np.fromiter(map(hash, self.encoded_paths()), np.int64, len(self))


def read_list(
    path: str | Path,
    root: str | Path,
    num_ranks: int | None = None,
    allow_missing: bool = False,
    allow_conflicts: bool = False,
) -> Samples:
    """The samples of a list file, with paths relative to `root` as they are spelled on disk.

    A header is recognised by its names (PATH_COLUMNS, LABEL_COLUMNS) and selects the columns, also
    in a .txt. Raises ValueError for a line that does not parse, a label outside 0 .. num_ranks-1 or
    (unless allow_conflicts) two labels of one image, FileNotFoundError for images that are not
    under `root`, unless allow_missing.
    """
    lines = array("q")

    def rows():
        for line, image, label in parse_list(path, root):
            if not 0 <= label < (2**63 if num_ranks is None else num_ranks):
                highest = "" if num_ranks is None else f" .. {num_ranks - 1} ({num_ranks} ranks)"
                raise ValueError(f"{path}:{line}: label {label}, but ranks are counted 0{highest}")
            lines.append(line)
            yield image, label

    samples = Samples(resolve_paths(root, rows(), path, allow_missing))
    if not allow_conflicts:
        check_labels([samples], lambda _, i: f"{path}:{lines[i]}")
    return samples


def check_labels(
    parts: Sequence[Sequence[tuple[Any, ...]] | None], where: Callable[[int, int], str]
) -> None:
    """ValueError if an image has two labels, or cells; where(part, i): where it is listed."""
    parts, first = [part or () for part in parts], {}
    starts = np.cumsum([0, *map(len, parts)])
    paths = (sample[0] for part in parts for sample in part)
    keys = np.fromiter(map(hash, paths), np.int64, starts[-1])
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    for row in np.flatnonzero(counts[inverse] > 1):  # few, so that this takes little memory
        part = int(np.searchsorted(starts, row, "right")) - 1
        i = int(row - starts[part])
        image, *cells = parts[part][i]
        other_cells, *other = first.setdefault(image, (cells, part, i))
        for cell, other_cell in zip(cells, other_cells):
            if cell != other_cell:
                raise ValueError(
                    f"{where(part, i)}: {image} has label {cell}, but {where(*other)} says "
                    f"{other_cell}"
                )


def parse_list(path: str | Path, root: str | Path | None = None) -> Iterator[tuple[int, str, int]]:
    """(line number, image path, label) of a list file, with any whole number as label."""
    for number, image, text in parse_rows(path, root):
        if (label := parse_integer(text)) is None:
            raise ValueError(
                f"{path}:{number}: label {text[:99]!r} is no whole number; labels are ranks, "
                "counted from 0 (own images: see --ranks, --bins)"
            )
        yield number, image, label


def read_texts(
    path: str | Path, root: str | Path, columns: Sequence[str] = (), allow_missing: bool = False
) -> list[tuple[str, ...]]:
    """[(path, label as text, in one spelling, *cells of columns)] of a list file.

    Errors: those of read_list, but for the values of labels.
    """
    lines = array("q")

    def rows():
        for line, image, label, *cells in parse_rows(path, root, columns):
            lines.append(line)
            yield image, (label_text(label), *cells)

    rows = [(image, *cells) for image, cells in resolve_paths(root, rows(), path, allow_missing)]
    check_labels([rows], lambda _, i: f"{path}:{lines[i]}")
    return rows


def parse_rows(
    path: str | Path, root: str | Path | None = None, columns: Sequence[str] = ()
) -> Iterator[tuple[Any, ...]]:
    """(line number, image path, label as written, *cells of columns) of a list file.

    A first line that starts with a file under `root` is an image, not a header; a # line that does
    is an error.
    """
    lines, number = _uncommented(path, root), None
    first = [*islice(lines, 1)]
    first_line = first[0][1] if first else ""
    delimiter, image, label, is_header = _columns(path, first_line, root)
    header = [cell.lower() for cell in _cells(first_line, delimiter)]
    indices = [image, label]
    for column in columns:
        if not is_header or column.strip().lower() not in header:
            raise ValueError(
                f"{path}:1: expected a header with the columns path and {column}; got "
                f"{first_line[:200]!r}"
            )
        indices.append(header.index(column.strip().lower()))
    select, width, last = itemgetter(*indices), len(header), max(indices)
    for number, line in chain(first[is_header:], lines):
        cells = _cells(line, delimiter)
        values = select(cells) if last < len(cells) else ("",)
        # more cells than in the first line: an unquoted path or number with a comma
        if "" in values or any(cells[width:]):
            expected = " and a ".join(["an image path", "label", *columns])
            raise ValueError(f"{path}:{number}: expected {expected}, got {line[:200]!r}")
        name = values[0]
        yield number, str(Path(name)) if name[-1] == "/" else name, *values[1:]
    if number is None:
        raise ValueError(f"{path} lists no image; expected lines `path label`")


def _columns(
    path: str | Path, first_line: str, root: str | Path | None = None
) -> tuple[str | None, int, int, int]:
    """(delimiter, path column, label column, number of header lines), from a list's first line."""
    known = DELIMITERS.get(Path(path).suffix.lower())
    if not known and root and _starts_with_image(first_line, root, None):
        return None, 0, 1, 0
    for delimiter in [known] if known else ["\t", ",", " "]:
        names = [cell.lower() for cell in _cells(first_line, delimiter)]
        image = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
        labels = [name for name in names if name in LABEL_COLUMNS]
        if image is not None and labels:
            if len(labels) > 1 and labels.count("label") != 1:
                raise ValueError(
                    f"{path}:1: each of the columns {', '.join(labels)} may be the label; name one "
                    "of them `label`"
                )
            label = "label" if "label" in labels else labels[0]
            return delimiter, image, names.index(label), 1
    if known is None or not first_line:
        return None, 0, 1, 0  # path label
    if len(names) != 2:
        raise ValueError(
            f"{path}:1: expected two columns, or a header that names one `path` and one `label`, "
            f"separated by {known!r}; got {first_line[:200]!r}"
        )
    is_header = parse_number(names[1]) is None and Path(names[0]).suffix not in IMAGE_TYPES
    if is_header and root is not None:
        cells = _cells(first_line, known)
        [(name, _)] = resolve_paths(root, [cells], path, allow_missing=True)
        is_header = not os.path.isfile(os.path.join(root, name))
    return known, 0, 1, int(is_header)


def _starts_with_image(line: str, root: str | Path, *delimiters: str | None) -> bool:
    """Whether a line is of an image, although it may also be a header or a comment."""
    names = [cell for delimiter in delimiters for cell in _cells(line, delimiter)[:1]]
    return any(os.path.isfile(os.path.join(root, name)) for name in names)


def _uncommented(path: str | Path, root: str | Path | None) -> Iterator[tuple[int, str]]:
    """(line number, line) without comments; ValueError for one that starts with a file's name."""
    for number, line in read_lines(path, comment=None):
        if line[0] != "#":
            yield number, line
        elif root and _starts_with_image(line, root, None, "\t", ","):
            raise ValueError(
                f"{path}:{number}: {line[:200]!r} is a comment, but there is such an image; write "
                "./ before it, or remove the line"
            )


def read_header(path: str | Path, root: str | Path) -> list[str]:
    """The columns of a list, in lower case; [] where none is of paths."""
    first_line = next((line for _, line in read_lines(path)), "")
    if _starts_with_image(first_line, root, None):
        return []
    rows = ([cell.lower() for cell in _cells(first_line, delimiter)] for delimiter in "\t,;| ")
    return next((names for names in rows if {*names} & {*PATH_COLUMNS}), [])


def _cells(line: str, delimiter: str | None) -> list[str]:
    if delimiter is None:
        return line.rsplit(None, 1)
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]
    except csv.Error:  # a cell of more than 131,072 characters
        return []


def read_table(
    path: str | Path, delimiter: str, columns: Iterable[str]
) -> list[tuple[int, dict[str, str]]]:
    """[(line number, {column: cell})] of a table; ValueError if its header lacks one of columns."""
    (_, first), *lines = [*read_lines(path, comment=None)] or [(1, "")]
    header = [cell.lower() for cell in _cells(first.lstrip("#"), delimiter)]  # #flickr_photo_id
    if missing := set(columns) - set(header):
        raise ValueError(
            f"{path}:1: no column {', '.join(sorted(missing))}; expected the header of the "
            f"release, got {first!r}"
        )
    return [
        (number, dict.fromkeys(header, "") | dict(zip(header, _cells(line, delimiter))))
        for number, line in lines
    ]


@functools.lru_cache
def parse_integer(text: str) -> int | None:
    """3 for '3' and '3.0', None for anything that is not a whole number."""
    return int(text.split(".")[0]) if re.fullmatch(r"[-+]?\d{1,99}(\.0*)?", text) else None


def parse_number(text: str) -> float | None:
    """A finite number in decimal digits, perhaps with an exponent; None for anything else."""
    number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text.strip(), re.I | re.A)
    return float(text) if number and math.isfinite(float(text)) else None


def resolve_paths(
    root: str | Path,
    samples: Iterable[tuple[str, Any]],
    source: str | Path,
    allow_missing: bool = False,
) -> Iterator[tuple[str, Any]]:
    """The samples with paths as on disk: .JPG may be .jpg, accents decomposed, and a/../b is b.

    One FileNotFoundError at the end names `source` and all missing images, unless allow_missing.
    """
    folders, keys, missing = {}, array("q"), {}
    for path, label in samples:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = [*_open_folder(root, folder, source), None]
        prefix, names, loose_names = folders[folder]
        if (entry := name) not in names:
            if loose_names is None:  # most lists need none
                loose_names = {_loosely(name): name for name in names} | {n: n for n in names}
                folders[folder][2] = loose_names
            entry = loose_names.get(_loosely(name))
        if not (entry or allow_missing):
            missing[path] = None
        keys.append(hash(path))
        yield prefix + (entry or name), label
    if missing:
        total, names = len(set(keys)), [name[:200] for name in missing]
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {total} images are not under {root}, the first: "
            f"{', '.join(map(ascii, names[:3]))} ({_why_missing(str(root), names[0])})"
        )


def label_text(text: str) -> str:
    """A label in one spelling: 3 of 3.0 and 03."""
    number = parse_integer(text)
    return nfc(text) if number is None else str(number)


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # accents as one character: macOS parts them


def _loosely(name: str) -> str:
    stem, extension = os.path.splitext(nfc(name))
    return stem + extension.lower()


def _open_folder(root: str | Path, folder: str, source: str | Path) -> tuple[str, set[str]]:
    """(folder relative to root, in one spelling, with a slash; the names in it)."""
    base, path = os.path.abspath(root), os.path.join(os.path.abspath(root), folder)
    try:
        names = os.listdir(path) if os.path.isdir(path) else []
    except UnicodeEncodeError as error:
        raise ValueError(f"{source}: this locale has no {folder!a}; set PYTHONUTF8=1") from error
    simple = os.path.normpath(path)  # another folder, if a link comes before ..
    if names and os.path.isdir(simple) and os.path.samefile(simple, path):
        is_inside = os.path.join(simple, "").startswith(os.path.join(base, ""))
        folder = os.path.relpath(simple, base) if is_inside else os.path.normpath(folder)
        folder = "" if folder == "." else folder
    return os.path.join(folder, ""), set(names)


def _why_missing(folder: str, path: str) -> str:
    """Where the first part of a path that is missing differs from what is there."""
    for name in Path(path.replace("\\", "/")).parts:
        entries = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        if name not in entries:
            spelling = os.path.splitext(_loosely(name))[0].casefold()
            for entry in entries:
                if os.path.splitext(_loosely(entry))[0].casefold() == spelling:
                    entry = os.path.join(folder, entry)
                    return f"there is {entry!a}: mind case, suffix, accents"
                if os.path.exists(os.path.join(folder, entry, name)):
                    return f"there is {os.path.join(folder, entry, name)!a}"
            return f"{folder!a} holds no {name!a}"
        folder = os.path.join(folder, name)
    return "write / where the list has a backslash"


def write_list(path: str | Path, samples: Iterable[tuple[str, int]]) -> None:
    """Write lines `path label`, which read_list reads back; all of them or no file."""
    lines = (f"{image} {label}" for image, label in samples)
    # "./": neither a comment nor a BOM
    write_lines(path, ("./" * line.startswith(("#", "\ufeff")) + line for line in lines))


def check_names(paths: Iterable[str]) -> None:
    """ValueError for the first path that write_list cannot write so that it is read back."""
    is_utf8 = sys.getfilesystemencoding() == "utf-8"  # else a name may be misread without an error
    faults = {
        r"[\n\r]": "holds a line break",
        r"^\s|\s$": "starts or ends with a space",
        "[\ud800-\udfff]" if is_utf8 else "[^\0-\x7f]": "is not UTF-8 text",
    }
    for path in paths:
        if path.isprintable() and path == path.strip() and (is_utf8 or path.isascii()):
            continue  # nearly all; four times as fast
        for pattern, fault in faults.items():
            if re.search(pattern, path):
                advice = "rename the file"
                if fault.endswith("text") and not is_utf8:
                    fault, advice = "cannot be read in this locale", "set PYTHONUTF8=1"
                raise ValueError(f"the file name {path!a} {fault}; {advice}")


def read_paths(path: str | Path, allow_missing: bool = False) -> list[str]:
    """The image paths of a list file, as on disk; labels are ignored and may be absent.

    Errors: ValueError for a line without a path and for another separator; as of read_list.
    """
    delimiter = DELIMITERS.get(Path(path).suffix.lower())
    root, column, images = Path(path).parent, None, []
    for number, line in _uncommented(path, root):
        is_image = Path(line).suffix.lower() in IMAGE_TYPES or os.path.isfile(root / line)
        cells = [line] if is_image and not delimiter else _cells(line, delimiter)
        if column is None:  # the first line
            names = [cell.lower() for cell in cells]
            header = [names.index(name) for name in PATH_COLUMNS if name in names]
            column = (*header, 0)[0]
            if header:
                continue
            if delimiter and cells == [line] and re.search("[;,\t]", line) and not is_image:
                cells = []
        if not "".join(cells[column : column + 1]):
            expected = f"an image path, columns separated by {delimiter or ' '!r}"
            raise ValueError(f"{path}:{number}: expected {expected}; got {line[:200]!r}")
        images.append((cells[column], 0))
    return [image for image, _ in resolve_paths(root, images, path, allow_missing)]
