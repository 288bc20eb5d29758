"""pytest tests/test_download.py -- `python -m data NAME --download`, from a server on this machine."""

import hashlib
import http.server
import io
import os
import re
import resource
import signal
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from data_makers import HCI, PICTURE, all_paths, make_hci

import data
from data import load
from data.__main__ import main

CUT = 1_000_000  # bytes, after which a server stops
NUM_IMAGES = 60  # of a decade, instead of 265
PHOTO = PICTURE + bytes(6000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.data in the way that server.mode says, and notes what it was asked for."""

    def do_GET(self):
        mode, content = self.server.mode, self.server.data
        wanted = self.headers["Range"]
        self.server.requests.append(wanted)
        if mode == "404":
            return self.send_error(404)
        if mode == "garbage":
            return self.wfile.write(b"what?\r\n\r\n")
        start = int(wanted[len("bytes=") : -1]) if wanted and mode != "no ranges" else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if mode != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : CUT if mode in ("cut", "Ctrl-C") else None])
        if mode == "Ctrl-C":
            while not self.server.part.is_file() or self.server.part.stat().st_size < CUT // 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.mode, server.requests = "whole", []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def tar(files, links=()):
    """A tar archive of {name: bytes} and [(name, target of a symbolic link)]."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hci_tar(tmp_path_factory):
    """300 images and the hidden files that lie between them."""
    root = make_hci(tmp_path_factory.mktemp("hci"), counts=(NUM_IMAGES,) * 5)
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(root)) for path in files]
    content = tar({name: PHOTO if name.endswith("jpg") else b"" for name in names})
    assert len(content) > 2 * CUT
    return content


def table(num_rows):
    names = [n + "s" * (n == "animal") for n, c in data.aesthetics.COUNTS.items() for _ in range(c)]
    rows = [f"{7_000_000 + i}\t{name}\t3,2,4,3,3" for i, name in enumerate(names[:num_rows])]
    return "\n".join(["#flickr_photo_id\tcategory\tbeauty_scores", *rows]) + "\n"


@pytest.fixture
def hci(server, hci_tar, tmp_path, monkeypatch):
    """The root for a server with the whole release."""
    monkeypatch.setattr(data.hci, "NUM_IMAGES", NUM_IMAGES)
    return serve(server, monkeypatch, "hci", tmp_path, hci_tar, md5(hci_tar))


@pytest.fixture
def aesthetics(server, tmp_path, monkeypatch):
    content = zipped({data.aesthetics.TABLE: table(15_686), "__MACOSX/._x.tsv": "x"})
    return serve(server, monkeypatch, "aesthetics", tmp_path, content, None)


def md5(content):
    return hashlib.md5(content).hexdigest()


def serve(server, monkeypatch, name, tmp_path, content, digest):
    module = getattr(data, name)
    file = module.URL.rsplit("/", 1)[1]
    release = module.DOWNLOAD._replace(url=f"{server.url}/{file}", md5=digest)
    monkeypatch.setattr(module, "DOWNLOAD", release)
    server.data, root = content, tmp_path / "new" / name
    server.archive, server.part = root / file, root / f"{file}.part"
    return root


def fetch(root, capsys, name=None):
    """(exit code, stdout, stderr) of the command."""
    code = main([name or root.name, "--download", "--data-root", str(root)])
    return code, *capsys.readouterr()


def assert_error(result, message):
    code, _, err = result
    assert code == 1 and re.fullmatch(f"error: {message}\n", err), err


def files_in(root):
    return [path for path in root.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------- what is fetched


@pytest.mark.parametrize("mode", ["whole", "no ranges", "no length"])
def test_hci(server, hci, capsys, mode):
    server.mode = mode
    code, out, err = fetch(hci, capsys)
    assert code == 0 and err == "" and f"{hci}: complete" in out
    assert re.match(f"licence: .*Cite .*\n{server.url}/Hist.*tar -> {hci}\n", out)
    assert len(files_in(hci)) == 5 * NUM_IMAGES and {path.name for path in hci.iterdir()} == {
        HCI[:24]
    }
    assert len(all_paths(load("hci", hci))) == 5 * NUM_IMAGES
    code, out, _ = fetch(hci, capsys)
    assert code == 0 and out.startswith(f"{hci}: everything is there already, nothing fetched")
    assert server.requests == [None]


def test_aesthetics(server, aesthetics, capsys):
    for expected in ("complete", "everything is there already, nothing fetched"):
        code, out, err = fetch(aesthetics, capsys)
        assert code == 0 and err == "" and f"{aesthetics}: {expected}\n" in out
        assert f"{aesthetics}/\n    img_files/<flickr_photo_id>.jpg" in out and "API" in out
    assert server.requests == [None]
    assert files_in(aesthetics) == [aesthetics / data.aesthetics.TABLE]
    (aesthetics / "img_files").mkdir()
    for i in range(40):
        (aesthetics / "img_files" / f"{7_000_000 + i}.jpg").write_bytes(PICTURE)
    assert "15,646 of 15,686 rows have no image" in load("aesthetics", aesthetics).protocol


def test_the_addresses_are_those_of_the_releases():
    assert data.hci.DOWNLOAD.url in data.hci.HOW_TO_GET
    assert data.hci.DOWNLOAD.md5 in data.hci.HOW_TO_GET
    assert data.aesthetics.DOWNLOAD.url in data.aesthetics.HOW_TO_GET


@pytest.mark.parametrize(
    "name, words",
    [
        ("morph2", "request it at\nhttps://uncw.edu/(.|\n)*Album2/"),
        ("adience", "its terms and the login(.|\n)*talhassner.github.io(.|\n)*aligned/"),
        ("demo", "drawn on first use"),
        ("hcl", "drawn on first use"),
    ],
)
def test_what_is_not_to_be_fetched(tmp_path, capsys, name, words):
    message = f"{name} has no download, unlike hci and aesthetics; (.|\n)*{words}(.|\n)*"
    assert_error(fetch(tmp_path / "x", capsys, name), message)
    assert not (tmp_path / "x").exists()


def test_other_options_have_no_effect_and_are_refused(capsys):
    for flag in ("--seed", "--label-rule", "--out"):
        assert main(["hci", "--download", flag, "7"]) == 1
        message = f"error: {flag} has no effect on --download; leave it out\n"
        assert capsys.readouterr() == ("", message)


# ------------------------------------------------------------------------------------ cut off


@pytest.mark.parametrize("mode", ["whole", "no ranges"])
def test_a_cut_download_goes_on(server, hci, hci_tar, capsys, mode):
    server.mode = "cut"
    message = (
        f"cannot fetch {server.url}/Hist.*tar to {server.part}: cut off after 1,000,000 of "
        f"{len(hci_tar):,} bytes; run again to resume, or get {server.archive} yourself"
    )
    assert_error(fetch(hci, capsys), message)
    assert server.part.read_bytes() == hci_tar[:CUT] and files_in(hci) == [server.part]
    server.mode = mode
    assert fetch(hci, capsys)[0] == 0 and server.requests == [None, f"bytes={CUT}-"]
    assert len(files_in(hci)) == 5 * NUM_IMAGES


def test_a_download_that_was_whole_but_not_unpacked(server, hci, hci_tar, capsys):
    hci.mkdir(parents=True)
    server.part.write_bytes(hci_tar)
    assert fetch(hci, capsys)[0] == 0 and len(files_in(hci)) == 5 * NUM_IMAGES


def test_ctrl_c_says_how_to_go_on(server, hci, hci_tar, capsys):
    server.mode = "Ctrl-C"
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, err = fetch(hci, capsys)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert code == 130 and err == "interrupted; the same command resumes where it was\n"
    size = server.part.stat().st_size
    assert CUT // 2 <= size <= CUT and files_in(hci) == [server.part]
    server.mode = "whole"
    assert fetch(hci, capsys)[0] == 0 and server.requests[1] == f"bytes={size}-"


def test_missing_images_come_back(server, hci, capsys):
    fetch(hci, capsys)
    photos = files_in(hci / HCI / "1940s")
    for path in photos[:9]:
        path.unlink()
    code, out, _ = fetch(hci, capsys)
    assert code == 0 and f"{hci}: complete" in out and len(photos) == NUM_IMAGES
    assert all(path.read_bytes() == PHOTO for path in photos)


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "mode, reason", [("404", "HTTP Error 404: .*"), ("garbage", "(what|Remote end closed).*")]
)
def test_a_server_without_the_file(server, hci, capsys, mode, reason):
    server.mode = mode
    message = f"cannot fetch {server.url}/Hist.*: {reason}; run again .*"
    result = fetch(hci, capsys)
    assert_error(result, message)
    assert result[1].startswith("licence: ") and files_in(hci) == []


def test_no_network(server, hci, capsys):
    server.shutdown()
    server.server_close()
    assert_error(fetch(hci, capsys), "cannot fetch .*refused.*; run again to resume, or get .*")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is full needs Linux")
def test_a_full_disk(server, hci, capsys):
    hci.mkdir(parents=True)
    server.part.symlink_to("/dev/full")
    message = f"cannot fetch .* to {server.part}: .*No space left.*; run again to resume, .*"
    assert_error(fetch(hci, capsys), message)


def test_a_disk_that_is_full_while_unpacking(server, hci, monkeypatch, capsys):
    content = tar({"1930s/a.jpg": PICTURE, "1930s/b.jpg": bytes(2_000_000)})
    serve(server, monkeypatch, "hci", hci.parents[1], content, md5(content))
    hci.mkdir(parents=True)
    server.archive.write_bytes(content)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        result = fetch(hci, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_error(result, f"cannot unpack {server.archive}: .*too large; run again to resume")
    assert files_in(hci) == [server.archive]


def test_another_file_than_expected(server, hci, hci_tar, capsys):
    server.data = b"<html>log in first</html>"
    for _ in range(2):  # no byte of it is kept
        message = (
            f"{server.part}: md5 {md5(server.data)}, expected {md5(hci_tar)}; deleted; run "
            f"again, or get {server.archive} yourself"
        )
        assert_error(fetch(hci, capsys), message)
        assert files_in(hci) == [] and server.requests.pop() is None


def test_an_archive_put_there_by_hand(server, hci, hci_tar, capsys):
    hci.mkdir(parents=True)
    server.archive.write_bytes(hci_tar[:CUT])
    message = f"{server.archive}: md5 {md5(hci_tar[:CUT])}, expected .*; get it again"
    assert_error(fetch(hci, capsys), message)
    server.archive.write_bytes(hci_tar)
    assert fetch(hci, capsys)[0] == 0 and server.requests == []
    assert server.archive.exists() and len(files_in(hci)) == 5 * NUM_IMAGES + 1


ROWS = table(15_686)
ZIP = zipped({data.aesthetics.TABLE: ROWS})


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<html>log in first</html>", "cut short, or no archive"),
        (ZIP[:-100], "cut short, or no archive"),
        (ZIP[:2000] + bytes(9) + ZIP[2009:], "cut short, or no archive"),
        (tar({"x": ROWS.encode()})[:1000], "cut short, or no archive"),
        (zipped({data.aesthetics.TABLE: table(99)}), "rows of ratings: 99 of 15,686 published"),
        (zipped({"other.tsv": ROWS}), "rows of ratings: 0 of 15,686 published"),
        (zipped({data.aesthetics.TABLE: "a\tb\n"}), ".*no column .*; expected the header .*"),
    ],
)
def test_without_a_checksum_the_content_decides(server, aesthetics, capsys, content, message):
    server.data = content
    message = f"{server.part}: {message}; deleted; run again, or get {server.archive} yourself"
    assert_error(fetch(aesthetics, capsys), message)
    assert files_in(aesthetics) == []


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize("name", ["../evil.jpg", "1930s/../../evil.jpg", "{tmp}/evil.jpg"])
def test_no_path_leaves_the_folder(server, hci, tmp_path, monkeypatch, capsys, pack, name):
    content = pack({"1930s/good.jpg": PICTURE, name.format(tmp=tmp_path): PICTURE})
    serve(server, monkeypatch, "hci", tmp_path, content, md5(content))
    message = ".*part: '.*evil.jpg' leads out of the folder; nothing is unpacked; deleted; .*"
    assert_error(fetch(hci, capsys), message)
    assert files_in(tmp_path) == []


def test_links_are_not_unpacked(server, hci, tmp_path, monkeypatch, capsys):
    files = {"1930s/good.jpg": PICTURE, "1930s/./twice.jpg": PICTURE}
    content = tar(files, [("1930s/link.jpg", "/etc/hostname"), ("1940s", str(tmp_path))])
    serve(server, monkeypatch, "hci", tmp_path, content, md5(content))
    code, out, _ = fetch(hci, capsys)
    assert code == 0 and f"{hci}: images of the 1930s: 2 of 60 published; images of the 1940" in out
    assert {str(path.relative_to(hci)) for path in hci.rglob("*")} == {
        "1930s",
        "1930s/good.jpg",
        "1930s/twice.jpg",
    }


def test_a_file_that_is_there_is_not_replaced(server, aesthetics, capsys):
    aesthetics.mkdir(parents=True)
    mine = aesthetics / data.aesthetics.TABLE
    mine.write_text(table(100))
    for _ in range(2):
        message = f"{mine} is not as released; move it away and run again"
        assert_error(fetch(aesthetics, capsys), message)
        assert mine.read_text() == table(100) and sorted(files_in(aesthetics))[0] == mine
    mine.rename(aesthetics / "mine.tsv")
    assert fetch(aesthetics, capsys)[0] == 0 and mine.read_text() == ROWS
    assert server.requests == [None, *[f"bytes={len(server.data)}-"] * 2]


def test_progress_on_a_terminal_only(server, hci, hci_tar, capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    _, _, err = fetch(hci, capsys)
    size = f"{len(hci_tar) / 1e6:.1f}"
    assert err.startswith("\r0.3 of ") and err.endswith(f"\r{size} of {size} MB, 100%\n")
    server.mode, server.archive = "no length", Path(hci, "x")
    (hci / HCI).rename(hci / "elsewhere")
    assert fetch(hci, capsys)[2].endswith(f"\r{size} MB\n")
