"""Releases that may be fetched freely: `python -m data hci --download`.

The archive grows as ROOT/NAME.part, so that an interrupted download resumes where it stopped. It is
checked by its md5, or, where none is published, by the counts of what it holds; then unpacked into
a hidden folder of ROOT and moved file by file. Files that are already in ROOT are never replaced.
A dataset takes part by a constant DOWNLOAD in its file; HOW_TO_GET is printed for the others.

Read after hci.py. Copy together with: files.py.
"""

import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from .files import is_hidden

CHUNK, TIMEOUT = 1 << 18, 60  # bytes; seconds without a byte


class Release(NamedTuple):
    url: str  # of a .tar or .zip, unpacked under the root
    licence: str
    differences: Callable[[Path], list[str]]  # a root -> where it differs from the published counts
    md5: str | None = None
    further: str = ""  # what the archive lacks, and where {root} takes it


def download(name: str, dataset: Any, root: Path) -> None:
    """Fetch a release into `root`, unless it is there; say which licence it has before.

    dataset: its module, None for own images. ValueError: not to be fetched, or wrong content;
    FileExistsError: a file in root differs; other OSErrors: network and disk, run again to resume.
    """
    release = getattr(dataset, "DOWNLOAD", None)
    if release is None:
        how_to_get = getattr(dataset, "HOW_TO_GET", "the demo is drawn on first use")
        raise ValueError(
            f"{name} has no download, unlike hci and aesthetics; {how_to_get.format(root=root)}"
        )
    if not release.differences(root):
        print(f"{root}: everything is there already, nothing fetched")
    else:
        print(f"licence: {release.licence}\n{release.url} -> {root}", flush=True)
        archive = root / release.url.rsplit("/", 1)[1]
        path, advice = archive, "get it again"
        if not archive.is_file():  # not put there by hand
            path = Path(f"{archive}.part")
            advice = f"deleted; run again, or get {archive} yourself"
            _fetch(release.url, path)
        try:
            _unpack(path, release, root)
        except ValueError as error:
            if path != archive:
                path.unlink()  # more bytes would not make wrong ones right
            raise ValueError(f"{path}: {error}; {advice}") from error
        if path != archive:
            path.unlink()
        print(f"{root}: {'; '.join(release.differences(root)) or 'complete'}")
    print(release.further.format(root=root))


def _fetch(url: str, part: Path) -> None:
    """Append to `part` what it lacks; all of it anew from a server that knows no ranges."""
    start, total = part.stat().st_size if part.is_file() else 0, None
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            size = start if is_rest else 0
            if response.headers["Content-Length"]:
                total = size + int(response.headers["Content-Length"])
            with open(part, "ab" if is_rest else "wb") as file:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    size += len(chunk)
                    if sys.stderr.isatty():
                        of = f" of {total / 1e6:,.1f} MB, {size / total:4.0%}" if total else " MB"
                        print(f"\r{size / 1e6:,.1f}{of}", end="", file=sys.stderr, flush=True)
        if total and size < total:
            raise ConnectionError(f"cut off after {size:,} of {total:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416:
            return  # no byte after these: the archive was complete
        reason = " ".join(str(error).split())  # what a server says may have several lines
        again = f"run again to resume, or get {part.with_suffix('')} yourself"
        raise ConnectionError(f"cannot fetch {url} to {part}: {reason}; {again}") from error
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)


def _unpack(path: Path, release: Release, root: Path) -> None:
    """Move the archive's files under root, all or (if anything is wrong with them) none."""
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if release.md5 not in (None, md5):
        raise ValueError(f"md5 {md5}, expected {release.md5}")
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=root) as name:
        folder = Path(name)
        try:
            _extract(path, folder)
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError("cut short, or no archive") from error
        except OSError as error:
            raise OSError(f"cannot unpack {path}: {error}; run again to resume") from error
        # an archive with the right md5 is the release, whatever it holds
        if not release.md5 and (differences := release.differences(folder)):
            raise ValueError("; ".join(differences))
        files = [file for file in folder.rglob("*") if file.is_file()]
        targets = [root / file.relative_to(folder) for file in files]
        for file, target in zip(files, targets):
            if target.exists() and target.read_bytes() != file.read_bytes():
                raise FileExistsError(f"{target} is not as released; move it away and run again")
        for file, target in zip(files, targets):
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


def _extract(path: Path, folder: Path) -> None:
    """The files of an archive, without hidden ones, links and devices."""
    for name, source in _members(path):
        target = Path(os.path.normpath(folder / name))
        if not target.is_relative_to(folder):
            raise ValueError(f"{name!r} leads out of the folder; nothing is unpacked")
        if not any(map(is_hidden, target.relative_to(folder).parts)):
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, content) of each file in an archive."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, archive.open(info)
    else:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if info.isfile():
                    yield info.name, archive.extractfile(info)
