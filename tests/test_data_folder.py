"""pytest tests/test_data_folder.py -- your own images: folders per rank, split folders, own lists."""

import dataclasses
import os

import numpy as np
import pytest
from data_makers import assert_disjoint, make_folders, make_lists, parts_of, paths, tiny

import data
from data import ImageList, Sample, load, read_list


def test_folder_per_rank_is_split_in_proportion(tmp_path):
    root = make_folders(tmp_path / "own", ["10", "9", "2.5 kg"])
    (root / "9" / "notes.txt").write_text("no image")
    tiny(root / ".hidden" / "x.jpg")
    tiny(root / "9" / "._x.jpg")
    task = load(root, seed=3)
    assert task.rank_names == ("2.5 kg", "9", "10") and task.rank_values == (0.0, 1.0, 2.0)
    for part, count in zip(parts_of(task), (16, 2, 2)):
        assert np.bincount([sample.label for sample in part]).tolist() == [count] * 3
    assert_disjoint(task)
    assert sum(map(len, parts_of(task))) == 60
    assert load(root, seed=3) == task and load(root, seed=4).test != task.test
    assert load(root, seed=3, fold=1).test != task.test
    assert task.protocol.startswith(
        "own: own folders, split by seed 3, fold 0: 48 train / 6 val / 6 test"
    )
    assert (task.root / task.train[0].path).is_file()


def test_numeric_names_are_values(tmp_path):
    assert load(make_folders(tmp_path / "own", ["16", "2", "-1.5"])).rank_values == (
        -1.5,
        2.0,
        16.0,
    )


def test_ranks_txt_orders_folders(tmp_path):
    root = make_folders(tmp_path / "own", ["good", "bad", "fair"])
    (root / "ranks.txt").write_text("bad\r\nfair\r\n\r\ngood\r\nexcellent\r\n")
    task = load(root)
    assert task.rank_names == ("bad", "fair", "good", "excellent")
    assert "1 of 4 ranks have no training image (excellent)" in task.protocol
    assert all(
        sample.path.startswith(("bad", "fair", "good")[sample.label]) for sample in task.train
    )


def test_split_folders(tmp_path):
    root = tmp_path / "own"
    for part, ranks in (("train", "123"), ("val", "12"), ("test", "13")):
        make_folders(root / part, ranks, 4)
    task = load(root)
    assert [len(part) for part in parts_of(task)] == [12, 8, 8] and task.num_ranks == 3
    assert {sample.label for sample in task.test} == {0, 2}
    assert all(path.startswith("val/") for path in paths(task.val)) and not task.val_is_test


@pytest.mark.parametrize(
    "parts, expected, same",
    [
        (["train", "test"], (18, 2, 20), False),
        (["train", "val"], (20, 20, 20), True),
        (["train"], (16, 2, 2), False),
    ],
)
def test_missing_parts(tmp_path, parts, expected, same):
    for part in parts:
        make_folders(tmp_path / "own" / part, ["1", "2"], 10)
    task = load(tmp_path / "own")
    assert tuple(map(len, parts_of(task))) == expected and task.val_is_test == same
    assert ("VAL IS TEST" in task.protocol) == same


@pytest.mark.parametrize("ending", [".txt", ".csv", ".tsv"])
def test_own_lists(tmp_path, ending):
    task = load(make_lists(tmp_path / "own", ending))
    assert [len(part) for part in parts_of(task)] == [10, 10, 10]
    assert task.rank_names == ("0", "1", "2") and task.train[1] == Sample(
        "some images/train 1.jpg", 1
    )
    assert f"own lists train{ending} val{ending} test{ending}" in task.protocol
    assert ImageList(task.train, task.root, image_size=16)[0][0].shape == (3, 16, 16)


def test_own_lists_given_elsewhere_with_root_and_ranks(tmp_path):
    images, lists = make_lists(tmp_path / "own"), tmp_path / "lists"
    lists.mkdir()
    (lists / "ranks.txt").write_text("low\nmid dle\nhigh\n")
    task = load(lists, images, lists=(images / "train.txt", None, images / "test.txt"))
    assert task.rank_names == ("low", "mid dle", "high") and task.root == images
    assert [len(part) for part in parts_of(task)] == [9, 1, 10]
    (lists / "ranks.txt").write_text("low\nhigh\n")
    with pytest.raises(
        ValueError, match=r"train.txt:3: label 2, but ranks are counted 0 .. 1 \(2 ranks\)"
    ):
        load(lists, images, lists=(images / "train.txt", None, None))


def test_write_lists_reads_back(tmp_path):
    root = make_lists(tmp_path / "own")
    tiny(root / "#1.jpg")
    other = tiny(tmp_path / "elsewhere" / "2.jpg")
    with (root / "train.txt").open("a") as file:
        file.write(f"./#1.jpg 0\n{root / '#1.jpg'} 0\n{other} 2\n../elsewhere/2.jpg 2\n")
    task = load(root)
    numbered = Sample("#1.jpg", 0)  # in one spelling where it is under the root
    others = Sample(str(other), 2), Sample("../elsewhere/2.jpg", 2)
    assert task.train[-4:] == (numbered, numbered, *others)
    task.write_lists(tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == ["ranks.txt", "test.txt", "train.txt", "val.txt"]
    for part in data.PARTS:
        assert tuple(read_list(tmp_path / "run" / f"{part}.txt", root, 3)) == getattr(task, part)
    assert load(tmp_path / "run", root).train == task.train


def test_written_lists_give_the_task_back(tmp_path):
    """So a run can be resumed from its own lists: the names of the ranks come with them."""
    root = make_folders(tmp_path / "own", ["2", "16", "9"])
    task = load(root, seed=3)
    task.write_lists(tmp_path / "run")
    again = load(root, lists=[tmp_path / "run" / f"{part}.txt" for part in data.PARTS])
    assert dataclasses.replace(again, protocol=task.protocol) == task
    assert again.rank_names == ("2", "9", "16")
