"""List files and tables: read them, write them, and find their images on disk.

    samples = read_list("lists/train.txt", root="photos", num_ranks=5)   # [Sample(path, label)]
    write_list(Path("copy.txt"), samples)

A list is a .txt with lines `path label` (the label is the last word, so paths may hold spaces), a
.csv or a .tsv. Read after files.py, before task.py. Copy together with: files.py.
"""

import csv
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .files import IMAGE_TYPES, read_lines, write_lines

PATH_COLUMNS = ("path", "image", "filename", "file", "file_name", "image_path", "photo")
LABEL_COLUMNS = ("label", "rank", "age", "class", "target", "value", "score")


class Sample(NamedTuple):
    path: str  # relative to the root of the images, or absolute
    label: int  # rank index, 0 .. R-1


def read_list(
    path: str | Path,
    root: str | Path,
    num_ranks: int | None = None,
    allow_missing: bool = False,
    allow_conflicts: bool = False,
) -> list[Sample]:
    """The samples of a list file, with paths relative to `root` as they are spelled on disk.

    A header is recognised by its names (PATH_COLUMNS, LABEL_COLUMNS) and selects the columns, also
    in a .txt. Raises ValueError for a line that does not parse, a label outside 0 .. num_ranks-1 or
    (unless allow_conflicts) two labels of one image, FileNotFoundError for images that are not
    under `root`, unless allow_missing.
    """
    rows = parse_list(path)
    for line, _, label in rows:
        if label < 0 or num_ranks is not None and label >= num_ranks:
            highest = "" if num_ranks is None else f" .. {num_ranks - 1} ({num_ranks} ranks)"
            raise ValueError(f"{path}:{line}: label {label}, but ranks are counted 0{highest}")
    samples = [Sample(image, label) for _, image, label in rows]
    samples = resolve_paths(root, samples, path, allow_missing)
    if not allow_conflicts:
        check_labels((f"{path}:{row[0]}", sample) for row, sample in zip(rows, samples))
    return samples


def check_labels(samples: Iterable[tuple[str, Sample]]) -> None:
    """ValueError if an image has two labels; samples: (where it is listed, Sample)."""
    first = {}
    for where, (image, label) in samples:
        other, other_label = first.setdefault(image, (where, label))
        if label != other_label:
            raise ValueError(f"{where}: {image} has label {label}, but {other} says {other_label}")


def parse_list(path: str | Path) -> list[tuple[int, str, int]]:
    """[(line number, image path, label)] of a list file, with any whole number as label."""
    rows = []
    for number, image, text in parse_rows(path):
        label = parse_integer(text)
        if label is None:
            what = f"label {text[:99]!r} is no whole number"
            advice = "labels are ranks, counted from 0 (own images: see --ranks, --bins)"
            raise ValueError(f"{path}:{number}: {what}; {advice}")
        rows.append((number, image, label))
    return rows


def read_texts(
    path: str | Path, root: str | Path, column: str | None = None, allow_missing: bool = False
) -> list[Sample]:
    """The samples of a list file with labels as text, 3.0 as 3; or with the cells of a column.

    Errors: those of read_list, but for the values of labels.
    """
    rows = parse_rows(path, column)
    integers = [None if column else parse_integer(text) for _, _, text in rows]
    texts = [text if n is None else str(n) for (_, _, text), n in zip(rows, integers)]
    samples = [Sample(image, text) for (_, image, _), text in zip(rows, texts)]
    samples = resolve_paths(root, samples, path, allow_missing)
    check_labels((f"{path}:{line}", sample) for (line, _, _), sample in zip(rows, samples))
    return samples


def parse_rows(path: str | Path, column: str | None = None) -> list[tuple[int, str, str]]:
    """[(line number, image path, label as written)] of a list file; or a column for the label."""
    lines, rows = read_lines(path), []
    first_line = lines[0][1] if lines else ""
    delimiter, image, label, header = _columns(path, first_line, column)
    width = len(_cells(first_line, delimiter))
    if not lines[header:]:
        raise ValueError(f"{path} lists no image; expected lines `path label`")
    for number, line in lines[header:]:
        cells = _cells(line, delimiter)
        is_short = max(image, label) >= len(cells) or not cells[image] or not cells[label]
        if is_short or any(cells[width:]):  # an unquoted path or number with a comma
            got = repr(line[:200])
            raise ValueError(
                f"{path}:{number}: expected an image path and a {column or 'label'}, got {got}"
            )
        rows.append((number, str(Path(cells[image])), cells[label]))
    return rows


def _columns(
    path: str | Path, first_line: str, column: str | None = None
) -> tuple[str | None, int, int, int]:
    """(delimiter, path column, label column, number of header lines), from a list's first line."""
    label_columns = (column.strip().lower(),) if column else LABEL_COLUMNS
    known = {".csv": ",", ".tsv": "\t"}.get(Path(path).suffix.lower())
    for delimiter in [known] if known else ["\t", ",", " "]:
        names = [cell.lower() for cell in _cells(first_line, delimiter)]
        image, label = (
            next((names.index(name) for name in columns if name in names), None)
            for columns in (PATH_COLUMNS, label_columns)
        )
        if image is not None and label is not None:
            return delimiter, image, label, 1
    if column:
        raise ValueError(
            f"{path}:1: expected a header with the columns path and {column}; got "
            f"{first_line[:200]!r}"
        )
    if known is None or not first_line:
        return None, 0, 1, 0  # path label
    if len(names) != 2:
        raise ValueError(
            f"{path}:1: expected two columns, or a header that names one `path` and one `label`, "
            f"separated by {known!r}; got {first_line[:200]!r}"
        )
    is_header = parse_integer(names[1]) is None and Path(names[0]).suffix not in IMAGE_TYPES
    return known, 0, 1, int(is_header)


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
    (_, first), *lines = read_lines(path, comment=None) or [(1, "")]
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


def parse_integer(text: str) -> int | None:
    """3 for '3' and '3.0', None for anything that is not a whole number."""
    return int(text.split(".")[0]) if re.fullmatch(r"[-+]?\d{1,99}(\.0*)?", text) else None


def parse_number(text: str) -> float | None:
    """A finite number in decimal digits, perhaps with an exponent; None for anything else."""
    number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text.strip(), re.I | re.A)
    return float(text) if number and math.isfinite(float(text)) else None


def resolve_paths(
    root: str | Path, samples: Iterable[Sample], source: str | Path, allow_missing: bool = False
) -> list[Sample]:
    """The samples with paths as on disk: .JPG may be .jpg, accents decomposed, and a/../b is b.

    One FileNotFoundError names `source` and all missing images, unless allow_missing.
    """
    samples, folders, resolved, missing = list(samples), {}, [], {}
    for path, label in samples:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = _open_folder(root, folder, source)
        spelled, names = folders[folder]
        entry = names.get(name) or names.get(_loosely(name))
        resolved.append(Sample(os.path.join(spelled, entry or name), label))
        if not entry:
            missing[path] = None
    if missing and not allow_missing:
        total, names = len({path for path, _ in samples}), [name[:200] for name in missing]
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {total} images are not under {root}, the first: "
            f"{', '.join(map(ascii, names[:3]))} ({_why_missing(str(root), names[0])})"
        )
    return resolved


def _loosely(name: str) -> str:
    stem, extension = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem + extension.lower()


def _open_folder(root: str | Path, folder: str, source: str | Path) -> tuple[str, dict[str, str]]:
    """(folder relative to root, in one spelling, {name as it may be written: name on disk})."""
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
    return folder, {_loosely(name): name for name in names} | dict(zip(names, names))


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
        for pattern, fault in faults.items():
            if re.search(pattern, path):
                advice = "rename the file"
                if fault.endswith("text") and not is_utf8:
                    fault, advice = "cannot be read in this locale", "set PYTHONUTF8=1"
                raise ValueError(f"the file name {path!a} {fault}; {advice}")


def read_paths(path: str | Path) -> list[str]:
    """The image paths of a list file, as they are spelled; labels are ignored and may be absent."""
    delimiter, rows = {".csv": ",", ".tsv": "\t"}.get(Path(path).suffix.lower()), []
    for _, line in read_lines(path):
        is_path = not delimiter and Path(line).suffix.lower() in IMAGE_TYPES
        rows.append([line] if is_path else _cells(line, delimiter))
    names = [cell.lower() for cell in rows[0]] if rows else []
    column = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
    rows = rows if column is None else rows[1:]
    return [row[column or 0] for row in rows if len(row) > (column or 0)]
