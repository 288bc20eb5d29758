"""pytest tests/test_data_fuzz.py -- lists and images, changed at random; -m full for 100,000 of them.

Each gives a good result or one line that says what is wrong: no traceback, no hang, no more
memory than the largest image that Pillow opens.
"""

import io
import random
import resource
import struct
import time

import numpy as np
import pytest
from data_makers import parts_of
from PIL import Image

import data
from data.images import TRANSPOSE
from data.task import Options, make_task

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of odd EXIF
CASES = [600, pytest.param(100_000, marks=pytest.mark.full)]


@pytest.fixture(autouse=True)
def memory():
    """Pillow opens images of up to 179 million pixels, which take up to 9 bytes each: 1.6 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{growth / 1000:.0f} MB")
    assert growth < 1_700_000  # kB


def change_bytes(rng, content):
    """The bytes with some of them replaced, removed, repeated or inserted."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        start = rng.randrange(len(content) + 1)
        end = start + rng.choice([1, 1, 2, 4, 16, 200])
        change = rng.choice(["flip", "flip", "replace", "remove", "repeat", "insert", "cut"])
        if change == "flip" and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif change == "replace":
            content[start:end] = rng.choice([b"\0", b"\xff", b"\x7f"]) * len(content[start:end])
        elif change == "remove":
            del content[start:end]
        elif change == "repeat":
            content[start:start] = content[start:end]
        elif change == "insert":
            content[start:start] = rng.randbytes(end - start)
        elif change == "cut" and rng.random() < 0.2:
            del content[start:]
    return bytes(content)


# --- lists ---

PATHS = [
    "0/x.png", "0/a b.JPG", "1/caf\u00e9.png", "1/x, y.png", '1/"q".png', "2/#1.png", "2/x.png",
    "2/no suffix",
]  # fmt: skip
SPELLINGS = [  # of the same file, and of none
    "{}", "./{}", "0/../{}", "0//../{}", " {}", "{} ", "{}/", "{}x", "/{}", "~/{}", "C:\\{}", "{}\t",
    "\ufeff{}", "nowhere/{}", "x" * 5000 + "/{}", "../own/{}", "{root}/{}", "", ".", "..", "/", "0",
    "/dev/zero", "*.png", "http://host/{}", "label", "path", "# {}", "\u202e{}", "{}\x0b{}",
]  # fmt: skip
LABELS = [
    "0", "1", "2", "03", "1.0", "2.", "-1", "+1", "1e2", "1.5", "nan", "inf", "", "one", "3 years",
    "\uff12", "\u00b2", "\u0661", "9" * 50, "9" * 5000, "20240131", "0x1", "1,0", "1 000", "None",
    "True", "1_0", "- 1", "\u22121", "1\u00a0",
]  # fmt: skip
HEADERS = ["path{}label", "label{}path", "Image{} Age", "file_name{}x{}rank", "id{}n", "path{}path"]


def random_list(rng, delimiter, root):
    """(the bytes of a list in which anything may be odd, the samples it lists if nothing is)."""
    oddness = rng.choice([0, 0.02, 0.2])  # how often a part of a line is odd
    lines, samples = [rng.choice(HEADERS[:2]).replace("{}", delimiter)] * (rng.random() < 0.3), []
    reverse = bool(lines) and lines[0].startswith("label")
    for _ in range(rng.randrange(1, 20)):
        path = rng.choice(PATHS)
        cells = [path, path[0]]
        samples.append((path, int(path[0])))
        if rng.random() < oddness:
            cells[0] = rng.choice(SPELLINGS).replace("{root}", str(root)).replace("{}", path)
        elif delimiter != " " and (delimiter in path or '"' in path):
            cells[0] = '"' + path.replace('"', '""') + '"'
        if rng.random() < oddness:
            cells[1] = rng.choice(LABELS)
        if reverse:
            cells.reverse()
        if rng.random() < oddness:
            cells = rng.choice([cells[::-1], cells[:1], cells * 2, ["x", *cells], [*cells, ""]])
        lines.append(delimiter.join(cells))
    text = rng.choice(["\n", "\n", "\r\n", "\r", "\n\n", "\n# x\n"]).join(lines)
    text = rng.choice(["", "", "\ufeff", "# comment\n"]) + text
    if rng.random() < oddness:
        text = rng.choice(['"', "sep=,\n", "\u200b", rng.choice(HEADERS) + "\n"]) + text
    codec = rng.choice(["utf-16", "latin-1", "cp1252", "utf-8-sig"])
    content = text.encode(codec if rng.random() < oddness else "utf-8", "replace")
    content = change_bytes(rng, content) if rng.random() < oddness else content
    return content, None if oddness else samples


@pytest.mark.parametrize("cases", CASES)
def test_lists(tmp_path, cases):
    rng, root, longest = random.Random(cases), tmp_path / "own", 0
    for path in PATHS:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / path, "PNG")
    refused = read = 0
    for _ in range(cases):
        suffix, delimiter = rng.choice([(".txt", " "), (".csv", ","), (".tsv", "\t")])
        lists = [root / f"{part}{suffix}" for part in data.PARTS[: rng.choice([1, 2, 3])]]
        contents, expected = zip(*(random_list(rng, delimiter, root) for _ in lists))
        for file, content in zip(lists, contents):
            file.write_bytes(content)
        start = time.monotonic()
        try:
            task = data.load(root, allow_missing=(allow_missing := rng.random() < 0.3))
            read += 1
            check_task(task, lists, expected, allow_missing)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(error).isprintable() and 0 < len(str(error)) < 5000, (str(error), contents)
        except Exception as error:
            raise AssertionError(contents) from error
        longest = max(longest, time.monotonic() - start)
        for file in lists:
            file.unlink()
    print(f"{cases} lists: {refused} refused in one line, {read} read; longest {longest:.2f} s")
    assert refused > cases // 5 and read > cases // 10 and longest < 30


def check_task(task, lists, expected, allow_missing):
    """Each line of the lists gave one sample, of something that is there; else AssertionError."""
    parts = [list(part) for part in parts_of(task)]
    if len(lists) == 1:
        parts = [sorted(sum(parts, []))]
    samples = [sample for part in parts for sample in part]
    assert all(0 <= label < task.num_ranks for _, label in samples)
    assert allow_missing or all((task.root / path).exists() for path, _ in samples)
    for file, part, same in zip(lists, parts, expected):
        content = file.read_bytes().decode("utf-8-sig").replace("\r", "\n").split("\n")
        lines = [line for line in map(str.strip, content) if line and line[0] != "#"]
        assert len(lines) - 1 <= len(part) <= len(lines)  # the first may be a header
        if same is not None:
            assert part == (sorted(same) if len(lists) == 1 else same)


# --- images ---


def make_images():
    """[(suffix, bytes)] of small images in each format, with and without EXIF."""
    rng, images = np.random.default_rng(0), []
    noise = rng.integers(0, 255, (24, 40, 4), np.uint8)
    modes = [(noise[..., :3], "RGB"), (noise, "RGBA"), (noise[..., 0], "L"), (noise[..., 1], "P")]
    exif = b"Exif\0\0" + make_exif(random.Random(0), 6)
    wide = Image.frombytes("I;16", (20, 24), noise[..., :1].tobytes())
    for suffix, mode, options in [
        ("jpg", 0, {}), ("jpg", 0, dict(progressive=True)), ("jpg", 2, dict(exif=exif)),
        ("png", 0, {}), ("png", 1, dict(exif=exif)), ("png", 3, dict(transparency=3)),
        ("bmp", 0, {}), ("bmp", 3, {}), ("gif", 3, {}), ("gif", 2, dict(save_all=True)),
        ("tif", 0, {}), ("tif", 1, dict(compression="tiff_lzw")), ("tif", 0, dict(exif=exif)),
        ("tif", 0, dict(compression="jpeg")), ("tif", 2, dict(compression="tiff_adobe_deflate")),
        ("webp", 0, {}), ("webp", 1, dict(lossless=True, exif=exif)), ("tif", None, {}),
        ("png", None, {}),
    ]:  # fmt: skip
        image = wide if mode is None else Image.fromarray(modes[mode][0])
        if modes[mode or 0][1] == "P":
            image = image.convert("P")
        if "save_all" in options:
            options = options | dict(append_images=[image.rotate(90)])
        image.save(
            buffer := io.BytesIO(), {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix), **options
        )
        images.append((suffix, buffer.getvalue()))
    return images


def make_exif(rng, orientation):
    """EXIF of an orientation and odd entries."""
    order = rng.choice("<>")
    entries = [struct.pack(order + "HHIHH", 274, 3, 1, orientation, 0)]
    for _ in range(rng.randrange(6)):
        tag = rng.choice([34665, 34853, 40965, 282, 296, 306, 37500, 513, 514, 330, 700, 65535])
        value = rng.choice([b"72\0\0", b"\xff" * 4, b"\0\0\0\x08", b"\x08\0\0\0", rng.randbytes(4)])
        count = rng.choice([0, 1, 2, 4, 5, 1000, 2**31, 2**32 - 1])
        entries.append(struct.pack(order + "HHI", tag, rng.choice(range(15)), count) + value)
    rng.shuffle(entries)
    next_ifd = rng.choice([0, 0, 8, 2**32 - 1, 2**31])
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    body = struct.pack(order + "H", len(entries)) + b"".join(entries)
    return head + body + struct.pack(order + "I", next_ifd) + rng.randbytes(rng.randrange(40))


@pytest.mark.parametrize("cases", CASES)
def test_images(tmp_path, cases):
    """What passes the check before training gives a tensor; what does not is named in one line."""
    rng, images, longest = random.Random(cases), make_images(), 0
    refused = read = 0
    for first in range(0, cases, 50):
        samples = []
        for i in range(first, min(first + 50, cases)):
            suffix, content = rng.choice(images)
            samples.append(data.Sample(f"{i}.{suffix}", i % 2))
            (tmp_path / samples[-1].path).write_bytes(change_bytes(rng, content))
        preset = dict(rank_names=["0", "1"], context="")
        task = make_task("x", preset, tmp_path, [samples, samples, samples], Options())
        start = time.monotonic()
        task, errors = data.check_images(task)
        for error in errors.values():
            assert error.startswith(f"{tmp_path}") and error.isprintable(), error
        for image, _ in data.ImageList(task.train, tmp_path, image_size=16):
            assert image.shape == (3, 16, 16)
        longest = max(longest, time.monotonic() - start)
        refused, read = refused + len(errors), read + len(task.train)
        for sample in samples:
            (tmp_path / sample.path).unlink()
    print(f"{cases} images: {refused} refused in one line, {read} read; longest {longest:.2f} s")
    assert refused > cases // 5 and read > cases // 5 and refused + read == cases and longest < 30


@pytest.mark.parametrize("cases", [300, pytest.param(20_000, marks=pytest.mark.full)])
def test_good_photos_with_odd_exif_are_read_and_turned(tmp_path, cases):
    """Text where a number belongs, dangling and circular pointers, counts of billions."""
    rng, path = random.Random(cases), tmp_path / "x"
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    plain = {}
    for name in ("JPEG", "PNG", "WEBP"):
        Image.fromarray(pixels).save(path, name)
        plain[name] = data.read_image(path)
    for _ in range(cases):
        name, orientation = rng.choice(sorted(plain)), rng.randrange(1, 9)
        exif, method = make_exif(rng, orientation), TRANSPOSE.get(orientation)
        Image.fromarray(pixels).save(path, name, exif=b"Exif\0\0" + exif)
        expected = plain[name] if method is None else plain[name].transpose(method)
        image = data.read_image(path)
        assert image.size == expected.size and image.tobytes() == expected.tobytes(), (name, exif)
    print(f"{cases} good photos with odd EXIF: all read, and turned as they should be")
