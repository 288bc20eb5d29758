"""Files: which are images and which a tool's own; text in UTF-8, written whole or not at all.

    images, other_types = find_images("photos")    # sorted paths, {suffix: files of other types}

Read first. Copy together with: nothing; needs pillow. The files of data/ find each other as parts
of one package: copy them into a folder that is imported.
"""

import io
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from PIL import Image, ImageFile

# Images by their suffix; all other files by their content, as far as Pillow reads it.
IMAGE_TYPES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm",
    ".pgm",
)  # fmt: skip
TOOL_FILES = {  # what file managers, archives and servers leave beside images, in lower case
    "__macosx", "__pycache__", "_vti_cnf", "@__thumb", "@eadir", "@recycle", "@tmp", "#recycle",
    "#snapshot", "recycler", "$recycle.bin", "lost+found", "found.000", "system volume information",
    "temporary items", "network trash folder", "thumbs.db", "ehthumbs.db", "desktop.ini",
    "picasa.ini", "icon\r",
}  # fmt: skip


def cache_dir() -> Path:
    """The folder of the demo, of what is known of checked images, of frozen features."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ordinalclip")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a tool's own: .ipynb_checkpoints, ._x.jpg, x~.jpg, @eaDir."""
    is_digits = name[:1] == "." and name[1:].isdecimal()  # .5 is a rank
    is_backup = os.path.splitext(name)[0].endswith("~")  # x~.png
    is_tool = is_backup or name.lower() in TOOL_FILES
    return is_tool or name.startswith((".", "~$")) and not is_digits


def is_image(path: str | Path) -> bool:
    """Whether a file is an image, by a familiar suffix or by content; never a hidden one."""
    suffix = os.path.splitext(path)[1].lower()
    if is_hidden(os.path.basename(path)):
        return False
    if suffix in IMAGE_TYPES:
        return True
    if not os.path.isfile(path):  # a pipe would be waited for
        return False
    of_suffix = Image.registered_extensions().get(suffix)
    # formats without a signature take almost any file for theirs; of MPEG only the size is read
    formats = [
        name
        for name, (_, has_signature) in Image.OPEN.items()
        if name != "MPEG" and (has_signature or name == of_suffix)
    ]
    try:
        with Image.open(path, formats=formats) as image:
            return not isinstance(image, ImageFile.StubImageFile)
    except Exception:  # decoders raise many types, all of which mean no
        return False


def find_images(folder: str | Path) -> tuple[list[Path], Counter[str]]:
    """(images in a folder and its subfolders, sorted; {suffix: number of files of other types})."""

    def fail(error: OSError) -> None:  # a folder that may not be read is not an empty one
        raise error

    images, other_types, visited = [], Counter(), set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        is_loop = os.path.realpath(parent) in visited
        visited.add(os.path.realpath(parent))
        folders[:] = [] if is_loop else [name for name in folders if not is_hidden(name)]
        for name in [] if is_loop else names:
            if is_image(os.path.join(parent, name)):
                images.append(Path(parent, name))
            elif not is_hidden(name):
                other_types[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    return sorted(images), other_types


def count_types(other_types: Counter[str]) -> str:
    """`3 files of other types left out (.md 2, .pdf 1)`; of find_images."""
    types = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(other_types.items()))
    return f"{other_types.total():,} files of other types left out ({types})"


def read_lines(path: str | Path, comment: str | None = "#") -> Iterator[tuple[int, str]]:
    """(line number, line) of a UTF-8 text file, without blank lines, comments, Excel's `sep=,`."""
    content = Path(path).read_bytes()
    try:
        content.decode()
        nul = content.find(b"\0")
    except UnicodeDecodeError as error:
        nul = error.start
    if nul >= 0:
        line = content.count(b"\n", 0, nul) + 1
        raise ValueError(f"{path}:{line}: this is not UTF-8 text; save the file as UTF-8")
    for number, line in enumerate(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig"), 1):  # no BOM
        line = line.strip()
        if number == 1 and line[:4] == "sep=" and len(line) == 5:
            continue
        if line and not (comment and line.startswith(comment)):
            yield number, line


def write_lines(path: str | Path, lines: Iterable[object]) -> None:
    def save(tmp_path):
        with open(tmp_path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    atomic_write(path, save)


def atomic_write(path: str | Path, save: Callable[[Path], object]) -> None:
    """save(tmp_path), then move tmp_path onto path: `path` is never half written.

    OSError: a full disk (for which torch.save has a RuntimeError of its own), a removed folder.
    """
    tmp_path = Path(f"{path}.{secrets.token_hex(4)}.part")
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


def raise_if_any(errors: list[str]) -> None:
    """Raise all errors as one ValueError, up to twenty of them in full."""
    if errors:
        more = [f"... and {len(errors) - 20:,} more such lines"] * (len(errors) > 20)
        raise ValueError("\n".join(errors[:20] + more))
