"""pytest tests/test_data_demo.py -- the drawn trees: the same every time, whole or not there."""

import os
from pathlib import Path

import numpy as np
import pytest
from data_makers import assert_disjoint, parts_of, paths
from PIL import Image
from processes import run_python

import data
from data import ImageList, load, make_demo
from data import demo as demo_module

SIZES = (60, 8, 8)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "x" / "demo-v1"
    make_demo(folder, SIZES)
    return folder


def pixels(folder):
    return [np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())]


def test_demo(demo):
    task = load("demo", demo)
    assert tuple(map(len, parts_of(task))) == SIZES and task.num_ranks == 30
    assert task.rank_names[0] == "1" and task.rank_values[29] == 30.0
    assert task.protocol == (
        "demo: drawn cross-sections of trees, one fixed split: 60 train / 8 val / 8 test images"
    )
    assert_disjoint(task)
    assert {sample.label for sample in task.train} == set(range(30))
    assert {Path(path).suffix for path in paths(task.train)} == {".jpg", ".png"}
    assert all(image.shape == (96, 96, 3) for image in pixels(demo))
    assert load("demo", demo, seed=5, fold=2) == task
    assert load(demo).train == task.train  # it is laid out as own data
    assert ImageList(task.train, task.root, image_size=64)[0][0].shape == (3, 64, 64)


def test_demo_is_the_same_every_time(demo, tmp_path):
    make_demo(tmp_path / "again", SIZES)
    make_demo(tmp_path / "other", SIZES, seed=1)
    for part in data.PARTS:
        assert (demo / f"{part}.txt").read_text() == (
            tmp_path / "again" / f"{part}.txt"
        ).read_text()
    assert all(np.array_equal(a, b) for a, b in zip(pixels(demo), pixels(tmp_path / "again")))
    assert not all(np.array_equal(a, b) for a, b in zip(pixels(demo), pixels(tmp_path / "other")))


def test_demo_goes_to_the_cache_and_is_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_module, "SIZES", SIZES)
    task = load("demo")
    assert task.root == tmp_path / "ordinalclip" / "demo-v1" and os.listdir(task.root.parent) == [
        "demo-v1"
    ]
    monkeypatch.setattr(demo_module, "_draw_trunk", None)
    assert load("demo") == task
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(
        demo_module, "make_demo", lambda root, sizes: (_ for _ in ()).throw(OSError(str(root)))
    )
    with pytest.raises(OSError, match="home/.cache/ordinalclip/demo-v1"):
        load("demo")


def test_demo_interrupted_is_redone(tmp_path, monkeypatch):
    draw, calls = demo_module._draw_trunk, []

    def stop_at_the_tenth(*job):
        calls.append(job)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return draw(*job)

    monkeypatch.setattr(demo_module, "_draw_trunk", stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path / "demo", SIZES)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(demo_module, "_draw_trunk", draw)
    make_demo(tmp_path / "demo", SIZES)
    assert len(load("demo", tmp_path / "demo").train) == 60


def test_demo_killed_while_drawing_leaves_nothing_that_is_read_as_whole(tmp_path):
    code = (
        "import os, sys, data; from pathlib import Path\n"
        "data.demo.write_list = lambda *_: os._exit(9)\n"
        "data.make_demo(Path(sys.argv[1]), (4, 2, 2))"
    )
    process = run_python(code, Path(data.__file__).parents[1], str(tmp_path / "d"))
    assert process.returncode == 9 and not (tmp_path / "d").exists()
    make_demo(tmp_path / "d", (4, 2, 2))
    assert len(load("demo", tmp_path / "d").train) == 4


def test_demo_two_at_once(tmp_path, monkeypatch):
    draw = demo_module._draw_parts

    def meanwhile_another(work, sizes, seed):
        monkeypatch.setattr(demo_module, "_draw_parts", draw)
        make_demo(tmp_path / "demo", sizes)
        draw(work, sizes, seed)

    monkeypatch.setattr(demo_module, "_draw_parts", meanwhile_another)
    make_demo(tmp_path / "demo", SIZES)
    assert os.listdir(tmp_path) == ["demo"] and len(load("demo", tmp_path / "demo").test) == 8


def test_demo_writes_over_nothing(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(
            FileExistsError, match=f"{name} exists and is not the demo; give a new or an empty"
        ):
            load("demo", tmp_path / name)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        make_demo(tmp_path / "new", (2, 1, 1))
    assert sorted(os.listdir(tmp_path)) == ["file", "mine"]


def test_demo_with_a_missing_image_says_so(tmp_path):
    make_demo(tmp_path / "d", SIZES)
    next((tmp_path / "d" / "images").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="1 of .* images are not under"):
        load("demo", tmp_path / "d")


def test_demo_rings_can_be_counted():
    """From the pith outwards the brightness of a young tree falls off at the end of each year."""
    rng = np.random.default_rng
    late = [
        np.diff(demo_module._colors(5, rng(seed))[:2048].sum(1)).clip(min=0) for seed in range(5)
    ]
    for rise in late:
        assert (rise > rise.max() * 0.1).sum() == 4  # jumps back to pale: 5 years, 4 times
