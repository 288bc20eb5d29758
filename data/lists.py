"""List files and tables: read them, write them, and find their images on disk.

    samples = read_list("lists/train.txt", root="photos", num_ranks=5)   # [Sample(path, label)]
    write_list(Path("copy.txt"), samples)

A list is a .txt with lines `path label` (the label is the last word, so paths may hold spaces), a
.csv or a .tsv. Read this file first, then task.py. Copy together with: nothing (standard library).
"""

import csv
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PATH_COLUMNS = ("path", "image", "filename", "file", "file_name", "image_path", "photo")
LABEL_COLUMNS = ("label", "rank", "age", "class", "target")


class Sample(NamedTuple):
    path: str  # relative to the root of the images, or absolute
    label: int  # rank index, 0 .. R-1


def read_list(
    path: str | Path, root: str | Path, num_ranks: int | None = None, allow_missing: bool = False
) -> list[Sample]:
    """The samples of a list file, with paths relative to `root` as they are spelled on disk.

    A header is recognised by its names (PATH_COLUMNS, LABEL_COLUMNS) and selects the columns, also
    in a .txt. Raises ValueError for a line that does not parse or a label outside 0 .. num_ranks-1,
    FileNotFoundError for images that are not under `root`, unless allow_missing.
    """
    rows = parse_list(path)
    for line, _, label in rows:
        if label < 0 or num_ranks is not None and label >= num_ranks:
            highest = "" if num_ranks is None else f" .. {num_ranks - 1} ({num_ranks} ranks)"
            raise ValueError(f"{path}:{line}: label {label}, but ranks are counted 0{highest}")
    samples = [Sample(image, label) for _, image, label in rows]
    return resolve_paths(root, samples, path, allow_missing)


def parse_list(path: str | Path) -> list[tuple[int, str, int]]:
    """[(line number, image path, label)] of a list file, with any whole number as label."""
    lines, rows = read_lines(path), []
    delimiter, image, label, header = _columns(path, lines[0][1]) if lines else (None, 0, 1, 0)
    if not lines[header:]:
        raise ValueError(f"{path} lists no image; expected lines `path label`")
    for number, line in lines[header:]:
        cells = _cells(line, delimiter)
        if max(image, label) >= len(cells) or not cells[image]:
            raise ValueError(f"{path}:{number}: expected an image path and a label, got {line!r}")
        rank = parse_integer(cells[label])
        if rank is None:
            raise ValueError(
                f"{path}:{number}: label {cells[label]!r} is no whole number; labels "
                "are ranks, counted from 0"
            )
        rows.append((number, str(Path(cells[image])), rank))
    return rows


def _columns(path: str | Path, first_line: str) -> tuple[str | None, int, int, int]:
    """(delimiter, path column, label column, number of header lines), from a list's first line."""
    known = {".csv": ",", ".tsv": "\t"}.get(Path(path).suffix.lower())
    for delimiter in [known] if known else ["\t", ",", " "]:
        names = [cell.lower() for cell in _cells(first_line, delimiter)]
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
            f"one `label`; got {first_line!r}"
        )
    is_header = parse_integer(names[1]) is None and Path(names[0]).suffix not in IMAGE_TYPES
    return known, 0, 1, int(is_header)


def _cells(line: str, delimiter: str | None) -> list[str]:
    if delimiter is None:
        return line.rsplit(None, 1)
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def read_lines(path: str | Path, comment: str | None = "#") -> list[tuple[int, str]]:
    """[(line number, line)] of a UTF-8 text file, without blank lines and comments."""
    try:
        text = Path(path).read_text("utf-8-sig")  # drops a BOM; CRLF becomes LF
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    return [(n, line) for n, line in lines if line and not (comment and line.startswith(comment))]


def read_table(
    path: str | Path, delimiter: str, columns: Iterable[str]
) -> list[tuple[int, dict[str, str]]]:
    """[(line number, {column: cell})] of a table; ValueError if its header lacks one of columns."""
    (_, first), *lines = read_lines(path, comment=None) or [(1, "")]
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


def raise_if_any(errors: list[str]) -> None:
    """Raise all errors as one ValueError, up to twenty of them in full."""
    if errors:
        more = [f"... and {len(errors) - 20:,} more such lines"] * (len(errors) > 20)
        raise ValueError("\n".join(errors[:20] + more))


def parse_integer(text: str) -> int | None:
    """3 for '3' and '3.0', None for anything that is not a whole number."""
    return int(float(text)) if re.fullmatch(r"-?\d{1,9}(\.0*)?", text) else None


def is_image(name: str) -> bool:
    """Whether a file name is that of an image; hidden files such as macOS's ._x.jpg are not."""
    return os.path.splitext(name)[1].lower() in IMAGE_TYPES and not name.startswith(".")


def _lowercase_extension(name: str) -> str:
    stem, extension = os.path.splitext(name)
    return stem + extension.lower()


def resolve_paths(
    root: str | Path, samples: Iterable[Sample], source: str | Path, allow_missing: bool = False
) -> list[Sample]:
    """The samples with paths as on disk, where .JPG may be .jpg.

    One FileNotFoundError names `source` and all missing images, unless allow_missing.
    """
    samples, folders, resolved, missing = list(samples), {}, [], {}
    for path, label in samples:
        folder, name = os.path.split(path)
        if folder not in folders:
            names = os.listdir(Path(root, folder)) if Path(root, folder).is_dir() else []
            by_lowercase = {_lowercase_extension(entry): entry for entry in names}
            folders[folder] = by_lowercase | dict(zip(names, names))
        entry = folders[folder].get(name) or folders[folder].get(_lowercase_extension(name))
        resolved.append(Sample(os.path.join(folder, entry or name), label))
        if not entry:
            missing[path] = None
    if missing and not allow_missing:
        total = len({path for path, _ in samples})
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {total} images are not under "
            f"{root}, the first: {', '.join(map(repr, list(missing)[:3]))}"
        )
    return resolved


def write_list(path: str | Path, samples: Iterable[tuple[str, int]]) -> None:
    """Write lines `path label`, which read_list reads back; all of them or no file."""
    lines = (f"{image} {label}" for image, label in samples)
    write_lines(path, ("./" * line.startswith("#") + line for line in lines))  # not a comment


def write_lines(path: str | Path, lines: Iterable[object]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    atomic_write(path, lambda tmp_path: tmp_path.write_text(text, "utf-8"))


def atomic_write(path: str | Path, save: Callable[[Path], object]) -> None:
    """save(tmp_path), then move tmp_path onto path: `path` is never half written.

    OSError: a full disk (for which torch.save has a RuntimeError of its own), a removed folder.
    """
    tmp_path = Path(f"{path}.{os.getpid()}.part")
    if not tmp_path.parent.is_dir():
        raise FileNotFoundError(f"{tmp_path.parent} was removed, so {path} cannot be written there")
    try:
        save(tmp_path)
        os.replace(tmp_path, path)
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        raise OSError(f"{path} cannot be written; is the disk full? ({error})") from error
    finally:
        tmp_path.unlink(missing_ok=True)


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
