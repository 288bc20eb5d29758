"""pytest tests/test_data_folder.py -- your own images: folders per rank, split folders, own lists."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from data_makers import (
    all_paths,
    assert_disjoint,
    jpeg,
    make_folders,
    make_lists,
    parts_of,
    paths,
    tiny,
)
from PIL import Image

import data
import train
from data import ImageList, Sample, check_images, load, read_list
from data.__main__ import main


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


def test_ranks_txt_orders_folders(tmp_path):
    root = make_folders(tmp_path / "own", ["good", "bad", "fair"])
    (root / "Ranks.TXT").write_text("bad\r\nfair\r\n\r\ngood\r\nexcellent\r\n")
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


# --- what real folders hold ---


@pytest.mark.parametrize(
    "ranks",
    [
        ["7", "030", "1e2"],
        ["-1", "3", "+5"],
        [".5", "1.0", "1.5"],
        ["\u221210", "\u22125"],
        ["No.5", "No.10"],
        ["\uff12", "\uff11\uff10"],
        ["3 years", "10_years"],
        ["under_18", "18-30", "31+"],
        ["age9", "Age10"],
        ["0_none", "1_mild", "2_severe disease"],
        ["1st", "2nd", "3rd", "4th"],
        ["under 1 year", "1 year", "2-3 years old", "5 years and older"],
        ["18 years", "20", "60+"],
        ["[0,5)", "[5,10)", "[10,20)"],
        ["-10 to -5", "-5 to 0", "1,000-2,000", "3,000-12,000"],
        ["500-1,000", "1,001-1,500"],
    ],
)
def test_names_with_numbers_are_in_their_order(tmp_path, ranks):
    assert load(make_folders(tmp_path / "own", ranks, 4)).rank_names == tuple(ranks)


@pytest.mark.parametrize("values", [(0.5, 1, 1.5), (-1.5, 3, 5), (7, 30, 100)])
def test_plain_numbers_are_values(tmp_path, values):
    names = [f"{value:+g}".replace("+0.", ".") for value in values]
    assert load(make_folders(tmp_path / "own", names, 4)).rank_values == values


@pytest.mark.parametrize("val", ["valid", "VALIDATION", "dev", "Eval"])
@pytest.mark.parametrize("train_name, test", [("Train", "Testing"), ("TRAINING", "test")])
def test_parts_by_their_usual_names(tmp_path, train_name, val, test):
    for i, part in enumerate((train_name, val, test)):
        make_folders(tmp_path / part, ["1", "2"], i + 2)
    assert [len(part) for part in parts_of(load(tmp_path))] == [4, 6, 8]


def test_what_tools_leave_beside_images_is_not_read(tmp_path):
    for part in ("train", "test"):
        make_folders(tmp_path / "own" / part, ["1", "2"], 10)
    expected = load(tmp_path / "own")
    folders = (
        ".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails", "#recycle", "#snapshot", ".git",
        "$RECYCLE.BIN", "@__thumb", "_vti_cnf", "System Volume Information", "lost+found",
    )  # fmt: skip
    files = (
        "._a 1.jpg",
        "a 1~.jpg",
        "Thumbs.db",
        "desktop.ini",
        ".DS_Store",
        "Icon\r",
        "~$a 1.jpg",
        "Picasa.ini",
    )
    for parent in ("", "train", "train/1", "test/2"):
        for name in folders:
            tiny(tmp_path / "own" / parent / name / "1" / "a 1.jpg")
            tiny(tmp_path / "own" / parent / name / "a 1.jpg")
        for name in files:
            (tmp_path / "own" / parent / name).write_bytes(jpeg())
    assert load(tmp_path / "own") == expected and "left out" not in expected.protocol


def test_images_are_known_by_content(tmp_path):
    root = make_folders(tmp_path / "own", ["1", "2"], 6)
    names = "a.jfif b.jpe c.jp2 d.avif e.tiff f g.dat h.PNG i.jpg.bak".split()
    formats = dict(zip(names, "JPEG JPEG JPEG2000 AVIF TIFF PNG WEBP PNG JPEG".split()))
    for name, image_format in formats.items():
        Image.new("RGB", (8, 8)).save(root / "2" / name, image_format)
    others = ("x.pdf", "y.svg", "z.HEIC", "b.heic", "no suffix")
    for name in others:
        (root / "1" / name).write_bytes(b"%PDF-1.4")
    task, errors = check_images(load(root))
    assert not errors and all_paths(task) >= {f"2/{name}" for name in names}
    assert sum(map(len, parts_of(task))) == 12 + len(names)
    wanted = "5 files of other types left out (.heic 2, .pdf 1, .svg 1, no suffix 1)"
    assert f"; {wanted}; " in task.protocol


def test_a_pipe_and_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    root, scandir = make_folders(tmp_path / "own", ["1", "2"], 6), os.scandir
    os.mkfifo(root / "1" / "pipe")
    assert "1 files of other types left out (no suffix 1)" in load(root).protocol

    def refuse(path):
        if os.path.basename(path) == "2":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="Permission denied: '.*/own/2'"):
        load(root)


def test_images_without_a_label_are_counted(tmp_path):
    make_folders(tmp_path / "own", ["photos"], 12)
    rows = "".join(
        f"./photos/../photos/a {i}.{'jpg' if i % 2 else 'PNG'},{i % 2}\n" for i in range(10)
    )
    (tmp_path / "own" / "labels.csv").write_text("path,label\n" + rows)
    assert load(tmp_path / "own").protocol.endswith("; 2 images without a label left out")


def test_a_table_beside_folders_that_says_the_same(tmp_path):
    root = make_folders(tmp_path / "own", ["01", "2"], 10)
    (root / "labels.csv").write_text("path,label\n01/a 0.PNG,1\n2/a 0.PNG,2.0\n")
    assert load(root).rank_names == ("01", "2")
    (root / "labels.csv").write_text("rank,description\n2,good\n")
    assert load(root).rank_names == ("01", "2")


@pytest.mark.parametrize("delimiter", [";", "|"])
def test_a_table_beside_numbered_folders_with_another_delimiter_is_refused(tmp_path, delimiter):
    root = make_folders(tmp_path / "own", ["1", "2"], 10)
    rows = ("filename,score", "1/a 0.PNG,0", "2/a 0.PNG,3")
    (root / "ratings.csv").write_text("\n".join(rows).replace(",", delimiter))
    with pytest.raises(ValueError, match="ratings.csv:1: expected two columns, or a header"):
        load(root)


def test_ranks_txt_does_not_hide_that_a_table_says_otherwise(tmp_path):
    root = make_folders(tmp_path / "own", ["1", "2"], 10)
    (root / "ranks.txt").write_text("0\n1\n2\n3\n")
    (root / "ratings.csv").write_text("filename,score\n1/a 0.PNG,0\n2/a 0.PNG,3\n")
    with pytest.raises(ValueError, match="ratings.csv says '0' of 1/a 0.PNG, but folders lie"):
        load(root)


def test_a_table_beside_a_later_part_is_compared_too(tmp_path):
    root = tmp_path / "own"
    for part in ("train", "test"):
        make_folders(root / part, ["1", "2"], 10)
    (root / "test" / "ratings.csv").write_text("filename,score\n1/a 0.PNG,0\n2/a 0.PNG,3\n")
    with pytest.raises(ValueError, match="ratings.csv says '0' of 1/a 0.PNG, but folders lie"):
        load(root)


@pytest.mark.parametrize("column", ["split", "Part", "set", "subset", "fold", "partition"])
def test_a_column_is_the_split(tmp_path, column):
    make_folders(tmp_path / "own", ["photos"], 12)
    parts = ["training", "training", "Val", "test"]
    rows = [f"photos/{path.name},{i % 2},{parts[i // 2 % 4]}" for i, path in
            enumerate(sorted((tmp_path / "own" / "photos").iterdir()))]  # fmt: skip
    table = tmp_path / "own" / "labels.csv"
    table.write_text("\n".join([f"path,label,{column}", *rows]))
    task = load(tmp_path / "own")
    expected = dict(row.split(",")[::2] for row in rows)
    for part, name in zip(parts_of(task), ("training", "Val", "test")):
        assert paths(part) == {path for path in expected if expected[path] == name}
    assert task.protocol.startswith("own: own table, split by its column: 8 train / 2 val / 2 test")
    table.write_text(table.read_text().replace("Val", "training").replace("test", "training"))
    assert "split by seed 1" in load(tmp_path / "own").protocol
    table.write_text(table.read_text().replace("training", "3"))  # folds of a cross validation
    assert "split by seed 1" in load(tmp_path / "own").protocol


@pytest.mark.parametrize("column", ["fold", "split", "Usage"])
def test_a_column_that_may_be_a_split_is_named_if_it_is_not_used(tmp_path, column):
    make_folders(tmp_path / "own", ["photos"], 12)
    images = sorted((tmp_path / "own" / "photos").iterdir())
    rows = [f"photos/{path.name},{i % 2},{i % 5}" for i, path in enumerate(images)]
    table = tmp_path / "own" / "labels.csv"
    table.write_text("\n".join(["sep=,", f"path,label,{column}", *rows]))  # as Excel writes it
    protocol = load(tmp_path / "own").protocol
    assert protocol.endswith(f"; column {column.lower()} of labels.csv not used")
    rows = [f"{row[:-1]}{['Train', 'train', 'val', 'TEST'][i % 4]}" for i, row in enumerate(rows)]
    table.write_text("\n".join([f"path,label,{column}", *rows]))
    task = load(tmp_path / "own")
    assert "own table, split by its column" in task.protocol and "not used" not in task.protocol
    assert [len(part) for part in parts_of(task)] == [6, 3, 3]


@pytest.mark.parametrize("names", [("siteA", "siteB"), ("train", "test"), ("images", "masks")])
def test_a_table_beside_folders_that_are_no_ranks_is_read(tmp_path, names):
    make_folders(tmp_path / "own", names, 10)
    images = [path for name in names for path in sorted((tmp_path / "own" / name).iterdir())]
    rows = [f"{path.parent.name}/{path.name},{i % 3}" for i, path in enumerate(images)]
    header, split = "path,label", ""
    if names[0] == "train":
        rows = [f"{row},{row.split('/')[0]}" for row in rows]
        header, split = "path,label,split", "own table, split by its column"
    (tmp_path / "own" / "labels.csv").write_text("\n".join([header, *rows]))
    task = load(tmp_path / "own")
    assert task.rank_names == ("0", "1", "2") and split in task.protocol
    expected = {row.split(",")[0]: int(row.split(",")[1]) for row in rows}
    assert {path: label for part in parts_of(task) for path, label in part} == expected
    assert "labels of labels.csv" in task.protocol


def test_ranks_are_named_as_the_table_spells_them(tmp_path):
    make_folders(tmp_path / "own", ["photos"], 12)
    images = sorted((tmp_path / "own" / "photos").iterdir())
    rows = [f"photos/{path.name},{('1.0', '1.5', '2.0')[i % 3]}" for i, path in enumerate(images)]
    (tmp_path / "own" / "labels.csv").write_text("\n".join(["path,label", *rows]))
    (tmp_path / "own" / "ranks.txt").write_text("1.0\n1.5\n2.0\n")
    task = load(tmp_path / "own")
    assert task.rank_names == ("1.0", "1.5", "2.0") and task.rank_values == (1, 1.5, 2)
    assert {label for path, label in task.train if path == f"photos/{images[1].name}"} <= {1}


def test_lists_that_may_not_be_of_labels_are_named(tmp_path):
    root = make_folders(tmp_path / "own", ["1", "2"], 10)
    (root / "sizes.csv").write_text("file,size\n1/a 0.PNG,1\n1/a 1.jpg,1024\n")
    (root / "bad.txt").write_text("1/a 1.jpg blurry\n")
    (root / "log.txt").write_text("1/a 1.jpg 1\n" + "\xe9" * 300 + " 2\n", "utf-8")
    os.symlink("nowhere", root / "labels.txt")
    protocol = load(root).protocol
    for name, label in (("sizes.csv", "'1024'"), ("bad.txt", "'blurry'")):
        assert f"; {name}, which says {label} of 1/a" in protocol
    assert "log.txt" not in protocol
    (root / "persons.csv").write_bytes(b"file,label\n\xe9.jpg,2\n")  # may contradict the folders
    with pytest.raises(ValueError, match="persons.csv:2: this is not UTF-8 text"):
        load(root)


def test_a_table_in_another_encoding_that_is_not_needed(tmp_path):
    for name in ("named", "parts"):
        parts = ("train/", "test/") if name == "parts" else ("",)
        make_folders(tmp_path / name, [f"{part}{rank}" for part in parts for rank in ("a", "b")], 9)
        (tmp_path / name / "ranks.txt").write_text("a\nb\n")
        (tmp_path / name / "x.csv").write_bytes(b"file,label\n\xe9.jpg,2\n")
        load(tmp_path / name)
    (tmp_path / "named" / "ranks.txt").unlink()  # now it may have the labels
    with pytest.raises(ValueError, match="x.csv:2: this is not UTF-8 text"):
        load(tmp_path / "named")


def test_a_table_beside_parts_that_a_pattern_labels_is_not_read(tmp_path):
    for part in ("train", "val", "test"):
        for i in range(6):
            tiny(tmp_path / part / f"{i % 3}_{i}.png")
    (tmp_path / "meta.csv").write_text("file,age,fold\ntrain/0_0.png,9,1\n")
    task = load(tmp_path, label_pattern=r"^(\d)_")
    assert "own folders: 6 train / 6 val / 6 test images" in task.protocol
    shutil.copytree(tmp_path / "train", tmp_path / "own")
    shutil.copy(tmp_path / "meta.csv", tmp_path / "own")
    assert "not used" not in load(tmp_path / "own", label_pattern=r"^(\d)_").protocol


def test_empty_cells_of_a_column_that_is_no_split(tmp_path):
    make_folders(tmp_path, ["photos"], 12)
    rows = [f"photos/{path.name},{i % 2},{'' if i else 'FFHQ'}"
            for i, path in enumerate(sorted((tmp_path / "photos").iterdir()))]  # fmt: skip
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,dataset", *rows]))
    assert load(tmp_path).protocol.endswith("; column dataset of labels.csv not used")
    lists = {part: rows[i::3] for i, part in enumerate(("train", "val", "test"))}
    for part, lines in lists.items():
        lines = [f"{line.rsplit(',', 1)[0]},Training" for line in lines]
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,label,usage", *lines]))
    protocol = load(tmp_path).protocol
    assert "own lists train.csv val.csv test.csv: 4 train" in protocol
    assert "; column usage of train.csv not used; column usage of val.csv not used" in protocol
    for part in ("val", "test"):
        (tmp_path / f"{part}.csv").unlink()
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text.replace("Training", "test", 1))
    with pytest.raises(ValueError, match="train.csv: column usage names other parts than this"):
        load(tmp_path)


def test_what_lies_beside_folders_of_ranks_is_counted(tmp_path):
    root = make_folders(tmp_path / "own", ["1", "2"], 10)
    for name in ("README.md", "paper.pdf", "notes"):
        (root / name).write_text("1/0.jpg is a picture")
    (root / "sizes.csv").write_text("path,width,height\n1/a 0.PNG,8,8\n")
    counted = "4 files of other types left out (.csv 1, .md 1, .pdf 1, no suffix 1)"
    assert load(root).protocol.endswith(f"; {counted}")


@pytest.mark.parametrize(
    "val, test, counts", [(9, 9, "24 train / 0 val / 0 test"), (9, 1, "24 train / 0 val / 8 test"),
                          (1, 9, "24 train / 8 val / 0 test")])  # fmt: skip
@pytest.mark.parametrize("options", [dict(ranks="0-2"), dict(bins="0,1,2.5")])
def test_a_part_whose_labels_are_all_outside_is_not_replaced(tmp_path, options, val, test, counts):
    rows = ["path,label,split"]
    for i in range(40):
        tiny(tmp_path / "im" / f"{i}.png")
        label, part = {0: (val, "val"), 1: (test, "test")}.get(i % 5, (i % 3, "train"))
        rows.append(f"im/{i}.png,{label},{part}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=f"{counts} images, and none may be empty"):
        load(tmp_path, **options)


def test_a_table_without_a_training_part(tmp_path):
    rows = [f"{tiny(tmp_path / f'{i}.png').name},{i % 3},test" for i in range(12)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(ValueError, match="there is no list or folder of training images; give one"):
        load(tmp_path)


def test_folders_that_are_no_part_are_named(tmp_path):
    root = make_lists(tmp_path / "own")
    make_folders(root / "test", ["0", "1"], 2)
    assert load(root).protocol.endswith("; folders left out: test")
    make_folders(tmp_path / "two" / "train", ["0", "1"], 20)
    tiny(tmp_path / "two" / "more" / "0" / "x.png")
    assert load(tmp_path / "two").protocol.endswith("; folders left out: more")


@pytest.mark.parametrize(
    "name", ["val_list.txt", "train_split.txt", "labels.txt", "metadata.jsonl"]
)
def test_lists_that_are_not_read_are_named(tmp_path, name):
    make_lists(tmp_path / "lists", ".csv")
    make_folders(tmp_path / "folders", ["1", "2"], 10)
    make_folders(tmp_path / "table", ["photos"], 10)
    (tmp_path / "table" / "labels.csv").write_text(
        "\n".join(f"photos/{path.name},{i % 2}" for i, path in
                  enumerate((tmp_path / "table" / "photos").iterdir()))
    )  # fmt: skip
    for folder in ("lists", "folders", "table"):
        assert "lists left out" not in load(tmp_path / folder).protocol
        (tmp_path / folder / name).write_text("x")
        assert load(tmp_path / folder).protocol.endswith(f"; lists left out: {name}")


def test_an_image_that_is_listed_twice_is_counted(tmp_path):
    root = make_lists(tmp_path / "own")
    for name, repeats in (("train", 10), ("val", 1)):
        lines = (root / f"{name}.txt").read_text().splitlines()[:repeats]
        with (root / f"{name}.txt").open("a") as file:
            file.writelines(
                line.replace("some images/", "some images/../some images/./") + "\n"
                for line in lines
            )
    task = load(root)
    assert (
        "10 of 20 lines of the train list repeat an image; 1 of 11 lines of the val"
        in task.protocol
    )
    assert len(task.train) == 20 and len(paths(task.train)) == 10


def test_copies_and_unreadable_images_are_reported_before_training(tmp_path, capsys):
    root, run_dir = tmp_path / "own", tmp_path / "run"
    for i in range(60):
        part = "test" if i % 2 else "train"
        tiny(root / part / str(i % 3) / f"{i}.png", (i, 2 * i, i), (64, 64))
    shutil.copy(root / "train" / "1" / "4.png", root / "test" / "1" / "x.png")
    shutil.copy(root / "train" / "2" / "8.png", root / "train" / "0" / "y.png")
    copies = (
        "; 1 images of test have the same bytes as others of train, such as test/1/x.png",
        "; 1 images have copies of another rank, such as train/0/y.png and train/2/8.png",
    )
    assert main([str(root)]) == 0
    out = capsys.readouterr().out
    assert all(text in out.splitlines()[0] for text in copies)

    broken = [
        path for path in sorted(root.rglob("*.png")) if int(path.stem.strip("xy") or 0) % 4 > 1
    ]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    argv = ["--data", str(root), "--out", str(run_dir), *TINY]
    with pytest.raises(SystemExit, match="^train.py: 30 images of .* cannot be read; fix") as error:
        train.main(argv)
    lines = str(error.value).splitlines()[1:]
    assert sorted(line.split(" cannot be read")[0] for line in lines) == list(map(str, broken))
    assert not (run_dir / "log.csv").exists()

    train.main([*argv, "--skip-bad"])
    before_training = capsys.readouterr().out.split("epoch ")[0]
    for path in root.glob("test/*/*"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="fix or remove them, without them a part is empty:"):
        train.main([*argv, "--skip-bad", "--out", str(tmp_path / "other")])
    results = json.loads((run_dir / "results.json").read_text("utf-8"))
    protocol, num = results["protocol"], results["images"]
    used = f"so {num['train']} train / {num['val']} val / {num['test']} test images are used"
    for text in (*copies, f"; 30 unreadable images left out, {used}"):
        assert text in before_training and text in protocol


def test_shots_are_drawn_of_images_that_can_be_read(gray, tmp_path):
    root = shutil.copytree(gray, tmp_path / "gray")
    images = sorted((root / "1 gray").iterdir())
    for path in images[1:]:
        path.write_bytes(b"")
    images[-1].unlink()
    lists = [f"{path.relative_to(root)} {path.parent.name[0]}" for path in root.rglob("*.png")]
    for part in ("train", "val"):
        (root / f"{part}.txt").write_text("\n".join([*lists, f"1 gray/{images[-1].name} 1"]))
    argv = ["--data", str(root), *TINY, "--skip-bad", "--shots", "1"]
    for seed in ("1", "2", "3"):
        out = tmp_path / seed
        results = train.main([*argv, "--seed", seed, "--out", str(out)])
        assert results["images"]["train"] == 4
        trained = (out / "splits" / "train.txt").read_text().splitlines()
        assert f"1 gray/{images[0].name} 1" in trained


def test_accents_composed_or_decomposed(tmp_path):
    """macOS parts a letter from its accent; archives keep it so."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for i in range(20):
        tiny(tmp_path / "a" / f"{composed} {i}.png")
        tiny(
            tmp_path
            / "b"
            / ("train", "test")[i // 10]
            / f"1 {(composed, decomposed)[i // 10]}"
            / f"{i}.png"
        )
        tiny(tmp_path / "b" / ("train", "test")[i // 10] / "2" / f"{i}.png")
    (tmp_path / "a" / "train.txt").write_text(
        "".join(f"{decomposed} {i}.png {i % 2}\n" for i in range(20)), "utf-8"
    )
    assert all_paths(load(tmp_path / "a")) == {f"{composed} {i}.png" for i in range(20)}
    assert load(tmp_path / "b").rank_names == (f"1 {composed}", "2")
    tiny(tmp_path / "a" / f"{decomposed} 3.png")
    assert f"{decomposed} 3.png" in all_paths(
        load(tmp_path / "a")
    )  # as it is spelled, if that is there


@pytest.mark.skipif(not shutil.which("localedef"), reason="makes a locale")
def test_text_is_utf8_where_the_locale_is_not(tmp_path):
    """Windows' cp1252 has a letter for most bytes: what is misread gives no error."""
    command = ["localedef", "-i", "en_US", "-f", "CP1252", str(tmp_path / "en.cp1252")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no definition of cp1252")
    root = make_folders(tmp_path / "own", ["1", "2"], 10)
    (root / "ranks.txt").write_text("1\n2\n3 é日\n", "utf-8")
    make_folders(tmp_path / "other", ["1 é", "2"], 10)
    code = (
        "import sys; from data.__main__ import main\n"
        "import locale; print(locale.getpreferredencoding(False))\n"
        f"main([{str(root)!r}, '--out', {str(tmp_path / 'lists')!r}]); main([{str(tmp_path / 'other')!r}])"
    )
    env = dict(LC_ALL="en.cp1252", LOCPATH=str(tmp_path), PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(train.__file__).parent,
        env=os.environ | env,
        capture_output=True,
        encoding="cp1252",
    )
    assert process.stdout.lower().startswith("cp1252"), process.stderr
    names = (tmp_path / "lists" / "fold_0" / "ranks.txt").read_text("utf-8").splitlines()
    assert names == ["1", "2", "3 é日"]
    wanted = (
        r"error: the file name '1 \xc3\xa9/a 0.PNG' cannot be read in this locale; set PYTHONUTF8=1"
    )
    assert process.stderr.splitlines()[-1] == wanted


def test_a_row_of_a_table_that_is_repeated_is_counted(tmp_path):
    root = make_folders(tmp_path / "own", ["photos"], 20)
    names = sorted(path.name for path in (root / "photos").iterdir())
    rows = [f"photos/{name},{i % 2}" for i, name in enumerate(names)]
    (root / "labels.csv").write_text("\n".join(["path,label", *rows, *rows]))
    assert re.search(r"; 20 of 40 rows for train repeat an image", load(root).protocol)


@pytest.mark.parametrize("name", ["#1", "1 "])
def test_a_rank_that_no_list_of_ranks_can_hold_is_refused(tmp_path, name):
    make_folders(tmp_path / "own", [name, "2"], 12)
    with pytest.raises(ValueError, match="which no ranks.txt can hold; rename it"):
        load(tmp_path / "own")


def test_a_data_root_without_lists_is_refused(tmp_path):
    root = make_folders(tmp_path / "own", ["1", "2"], 12)
    with pytest.raises(ValueError, match="a data root .* has no effect; leave it out"):
        load(root, tmp_path)
    assert load(root, root / ".." / "own").num_ranks == 2


@pytest.mark.parametrize(
    "names, values",
    [
        (["20 years", "30 years", "60 years"], [20, 30, 60]),
        (["age 1", "age 5"], [1, 5]),
        (["10-19", "20-29"], [0, 1]),  # two numbers
        (["10", "20", "30+"], [0, 1, 2]),
        (["5", "6 years"], [0, 1]),  # perhaps of one unit
    ],
)
def test_the_value_of_a_rank_is_the_number_in_its_name(tmp_path, names, values):
    task = load(make_folders(tmp_path / "own", names, 12))
    assert task.rank_names == tuple(names) and list(task.rank_values) == values


def test_decades_of_two_centuries_have_no_values(tmp_path):
    root = make_folders(tmp_path / "own", ["80s", "90s", "2000s"], 12)
    assert load(root).rank_values == (0, 1, 2)
    root = make_folders(tmp_path / "years", ["1980s", "2000s"], 12)
    assert load(root).rank_values == (1980, 2000)


def test_a_line_of_ranks_that_may_be_a_comment_is_refused(tmp_path):
    root = make_folders(tmp_path / "own", ["a", "b"], 12)
    (root / "ranks.txt").write_text("# lowest first\n#1 worst\na\nb\n")
    with pytest.raises(ValueError, match="ranks.txt:2: is '#1 worst' a comment or a rank?"):
        load(root)
    (root / "ranks.txt").write_text("# lowest first\n#\n## ranks\na\nb\n")
    assert load(root).rank_names == ("a", "b")


def test_ranks_in_months_and_years_have_no_values(tmp_path):
    root = make_folders(tmp_path / "own", ["6 months", "10 years"], 12)
    (root / "ranks.txt").write_text("6 months\n10 years\n")
    assert load(root).rank_values == (0, 1)


@pytest.mark.parametrize("name", ["photo age {} nr {}.png", "image set {} {}.png"])
def test_an_image_called_like_a_header_is_an_image(tmp_path, name):
    root = make_folders(tmp_path / "own", ["photos"], 20)
    for i, path in enumerate(sorted((root / "photos").iterdir())):
        path.rename(root / name.format(i % 2, i))
    task = load(root, label_pattern=r"(?:age|set) (\d)")
    task.write_lists(tmp_path / "splits")
    lists = [tmp_path / "splits" / f"{part}.txt" for part in ("train", "val", "test")]
    again = load(root, lists=lists)
    assert [*again.train] == [*task.train] and again.rank_names == task.rank_names


def test_an_image_after_a_hash_is_not_passed_over(tmp_path):
    root = make_folders(tmp_path / "own", ["1"], 2)
    first, second = sorted((root / "1").iterdir())
    first.rename(root / "1" / "#1.png")
    (root / "1" / "list.txt").write_text(f"# of today\n#1.png\n{second.name}\n")
    with pytest.raises(ValueError, match=r"list.txt:2: '#1.png' is a comment, but there is such"):
        data.read_paths(root / "1" / "list.txt")
    (root / "1" / "list.txt").write_text(f"# of today\n./#1.png\n{second.name}\n")
    assert data.read_paths(root / "1" / "list.txt") == ["#1.png", second.name]


@pytest.mark.parametrize("labels", [["1/5", "2/5", "4/5"], ["1/2", "2/3", "3/10"]])
def test_fractions_of_several_denominators_have_no_order_by_their_numerators(tmp_path, labels):
    root = make_folders(tmp_path / "own", ["photos"], 30)
    names = sorted(path.name for path in (root / "photos").iterdir())
    rows = [f"photos/{name},{labels[i % 3]}" for i, name in enumerate(names)]
    (root / "labels.csv").write_text("\n".join(["path,label", *rows]))
    if labels[0] == "1/5":
        assert load(root).rank_names == tuple(labels)
    else:
        with pytest.raises(ValueError, match="1/2 and 2/3 may be fractions or dates; name the"):
            load(root)
