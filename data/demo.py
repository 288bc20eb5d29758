"""The demo: cross-sections of trees that are drawn on first use; the rank is the number of rings.

2,400 / 300 / 600 images of 96 x 96 pixels, 1 .. 30 years, the same on every machine, in
$XDG_CACHE_HOME/ordinalclip/demo-v1. Contents: load, make_demo, and the drawing from _draw_trunk
down. Dims: H, W height and width of the image while it is drawn.
Read after lists.py and task.py. Copy together with: those two, files.py; needs numpy, pillow.
"""

import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from .files import cache_dir, write_lines
from .lists import write_list
from .task import PARTS, Options, Task, make_task

PRESET = dict(
    context="age in years:",
    rank_names=tuple(str(years) for years in range(1, 31)),
    splits=("random",),
    folds=1,
    any_fold=True,
)
SIZES = (2400, 300, 600)  # images of train, val, test
Array, Generator = np.ndarray, np.random.Generator


def default_root() -> Path:
    return cache_dir() / "demo-v1"


def load(root: Path, options: Options) -> Task:
    """The Task; draws the images unless they are there. Its one split has no seeds and folds."""
    if options.lists:
        raise ValueError("the demo has lists of its own; leave yours out, or load its folder")
    if not (root / "demo-v1").is_file():
        make_demo(root, SIZES)
    lists = tuple(root / f"{part}.txt" for part in PARTS)
    parts = replace(options, lists=lists).read_lists(root, len(PRESET["rank_names"]))
    description = "drawn cross-sections of trees, one fixed split"
    return make_task("demo", PRESET, root, parts, options, description)


def make_demo(root: Path, sizes: Sequence[int], seed: int = 0) -> None:
    """Draw the demo beside `root`, and move it there once it is complete.

    sizes: images of train, val, test. Raises FileExistsError if root holds anything else.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not the demo; give a new or an empty folder")
    print(f"drawing {sum(sizes):,} images into {root}", file=sys.stderr)
    root.parent.mkdir(parents=True, exist_ok=True)
    tmp_dir = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _draw_parts(tmp_dir, sizes, seed)
        tmp_dir.chmod(0o755)  # mkdtemp's is private
        tmp_dir.rename(root)  # fails if another process was first
    except OSError:
        if not (root / "demo-v1").is_file():
            raise
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)


def _draw_parts(folder: Path, sizes: Sequence[int], seed: int) -> None:
    def draw(index: int, rank: int) -> str:
        rng = np.random.default_rng([seed, index, 1])
        image = Image.fromarray(_draw_trunk(int(names[rank]), rng))
        path = f"images/{index:05d}." + ("png" if rng.random() < 0.25 else "jpg")
        options = dict(compress_level=1) if path.endswith("png") else dict(quality=92)
        image.save(folder / path, **options)
        return path

    names, first = PRESET["rank_names"], 0
    (folder / "images").mkdir()
    for part, size in zip(PARTS, sizes):
        weight = 2 + np.sin(np.linspace(0, np.pi, len(names)))  # 1 : 1.5, most in the middle
        ranks = np.searchsorted(np.cumsum(weight / weight.sum()), (np.arange(size) + 0.5) / size)
        ranks = np.random.default_rng([seed, first]).permutation(ranks).tolist()
        with ThreadPoolExecutor(4) as pool:  # numpy and Pillow free the GIL
            paths = pool.map(draw, range(first, first + size), ranks)
            write_list(folder / f"{part}.txt", zip(paths, ranks))
        first += size
    write_lines(folder / "ranks.txt", names)
    write_lines(folder / "demo-v1", [sizes])  # last: marks a complete demo


def _draw_trunk(years: int, rng: Generator, side: int = 96, supersample: int = 2) -> Array:
    """A cross-section with a ring a year, (side, side, 3) uint8; drawn larger, then averaged.

    A point lies at t = 0 .. 1 from the pith to the bark: t shrinks the outline and moves its centre
    1 - t of the way to the pith, so growth is wider on one side, as in a leaning tree.
    """
    axis = (
        np.arange(side * supersample, dtype=np.float32) + 0.5
    ) / supersample - side / 2  # px of the result
    x, y = axis - rng.uniform(-2, 2), axis[:, None] - rng.uniform(-2, 2)
    radius = rng.uniform(max(11, 1.4 * years), min(44, 14 + 6 * years))  # size alone says little
    edge = radius * _at_angle(x, y, 1 + _waves(rng, (2, 3, 5, 8), 0.035))  # (H, W), centre to bark
    bark = edge + rng.uniform(1.2, 3.2) * _at_angle(x, y, 1 + rng.normal(0, 0.2, 160))
    pith, light = _random_vector(radius * rng.uniform(0, 0.35), rng), _random_vector(1, rng)
    dx, dy = x - pith[0], y - pith[1]
    along, span = dx * pith[0] + dy * pith[1], edge * edge - (pith[0] ** 2 + pith[1] ** 2)
    t = (along + np.sqrt(along * along + span * (dx * dx + dy * dy))) / span  # (H, W)
    wavy = t * (1 + 0.02 * _clouds(rng, len(t), 7))
    wavy *= _at_angle(dx, dy, 1 + _waves(rng, (3, 6, 9, 14), 0.008))
    color = np.minimum(wavy * 2048, 2047).astype(np.int32)  # (H, W), row in _colors
    color[t > 1] = 2048
    rays = (1 + _at_angle(dx, dy, rng.normal(0, 0.035, 256)) * t) * _cracks(dx, dy, t, rng)
    shade = np.where(t > 1, 1 + 0.3 * _clouds(rng, len(t), 60), rays)
    ground = x * x + y * y > bark * bark
    color[ground] = 2049
    texture = [height * _clouds(rng, len(t), grid) for height, grid in ((12, 6), (9, 24), (7, 80))]
    shadow = bark + 5 - np.hypot(x + 4 * light[0], y + 4 * light[1])
    shade[ground] = ((1 + sum(texture) / 100) * (1 - 0.055 * np.clip(shadow, 0, 10)))[ground]
    shade *= 1 - rng.uniform(0.1, 0.5) / side * (x * light[0] + y * light[1])
    image = _colors(years, rng).take(color, 0) * shade[..., None]  # (H, W, 3)
    steps = [(i, j) for i in range(supersample) for j in range(supersample)]
    image = sum(image[i::supersample, j::supersample] for i, j in steps) / supersample**2
    image += rng.uniform(1, 5) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _colors(years: int, rng: Generator) -> Array:
    """Wood from pith to bark, each ring darkening to its end; then bark; then ground, (2050, 3)."""
    depth = np.linspace(0, 1, 2048)
    width = rng.lognormal(0, 0.28, years) * np.linspace(1.25, 0.8, years)
    ring = np.interp(depth, np.append(0, np.cumsum(width) / width.sum()), np.arange(years + 1))
    year = np.minimum(ring.astype(int), years - 1)
    late = (ring - year) ** rng.uniform(1.5, 4) * rng.uniform(0.55, 1, years)[year]
    late = late[:, None] * (1 - rng.uniform(0.38, 0.58) * np.array([1.08, 1, 0.85]))
    heart = rng.uniform(0, 0.3) / (1 + np.exp((depth - rng.uniform(0.2, 0.8)) * 30))
    heart = heart[:, None] * np.array([0.7, 1, 1.2])
    pales = [(226, 190, 142), (214, 166, 112), (233, 206, 165), (205, 148, 108)]
    wood = np.array(pales[rng.integers(4)]) * (1 - late) * (1 - heart)
    bark = np.array([84, 62, 45]) * rng.uniform(0.6, 1.15)
    moss, litter, sand, stone = (104, 118, 72), (128, 104, 78), (176, 158, 128), (122, 124, 126)
    ground = (moss, litter, sand, stone, (206, 210, 214))[rng.integers(5)]  # the last is frost
    return (np.vstack([wood, bark, ground]) * rng.uniform(0.93, 1.07, 3)).astype(np.float32)


def _cracks(dx: Array, dy: Array, t: Array, rng: Generator) -> Array:
    """Up to two cracks of drying, open at the bark: 1 on sound wood, less in a crack, (H, W)."""
    shade = 1
    for _ in range(rng.integers(0, 3)):
        cos, sin = _random_vector(1, rng)
        across = np.abs(dx * sin - dy * cos + rng.uniform(-1, 1) * np.sin(t * 9))
        width = rng.uniform(0.5, 1.4) * (t - rng.uniform(0, 0.7)) * (dx * cos + dy * sin > 0)
        shade = shade * (1 - 0.65 * np.clip(1.5 * (width - across) + 0.5, 0, 1) * (width > 0))
    return shade


def _clouds(rng: Generator, size: int, grid: int) -> Array:
    """Smooth noise, about -1 .. 1, (size, size)."""
    noise = Image.fromarray(rng.uniform(-1, 1, (grid, grid)).astype(np.float32))
    return np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))


def _waves(rng: Generator, cycles: Sequence[int], height: float) -> Array:
    """A closed curve of a few waves, at 512 angles."""
    angle = np.linspace(0, 2 * np.pi, 512, endpoint=False)
    return sum(
        height * rng.normal() / math.sqrt(n) * np.sin(n * angle + rng.uniform(0, 7)) for n in cycles
    )


def _at_angle(x: Array, y: Array, values: Array) -> Array:
    """Look up a periodic curve (values at equal angles) at the polar angle of each point."""
    turn = np.arctan2(y, x) * (len(values) / (2 * math.pi))
    return values.astype(np.float32).take(turn.astype(np.int32), mode="wrap")


def _random_vector(length: float, rng: Generator) -> tuple[float, float]:
    """A vector of that length in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    return length * math.cos(angle), length * math.sin(angle)
