"""pytest tests/test_data_releases.py -- what the releases have in common; aesthetics and HCI."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_makers import (
    DECADES,
    HCI,
    MAKERS,
    MORPH_TABLE,
    SCORES,
    aesthetic_rows,
    all_paths,
    assert_disjoint,
    make_adience,
    make_aesthetics,
    make_hci,
    make_morph,
    morph_rows,
    parts_of,
    paths,
)

import data
from data import ImageList, load
from data.task import shuffled


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """{name: folder} of one small release of each dataset, read by many tests, changed by none."""
    folder = tmp_path_factory.mktemp("releases")
    return {name: make(folder / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def aesthetics(releases):
    return releases["aesthetics"]


@pytest.fixture(scope="module")
def hci(releases):
    return releases["hci"]


# --------------------------------------------------------------------------- what all have in common


def digest(samples):
    return hashlib.sha256("\n".join(sorted(paths(samples))).encode()).hexdigest()[:16]


def test_splits_are_frozen(releases):
    """The order of images must never change: published numbers depend on it."""
    assert shuffled("abcdefgh", "test/0/0") == list("hadbfgec")
    tasks = {name: load(name, root, fold=2, seed=1) for name, root in releases.items()}
    assert digest(tasks["morph2"].test) == "0146c488135cd9f2"
    assert digest(tasks["adience"].val) == "cd49feaa5184a7b4"
    assert digest(tasks["aesthetics"].test) == "4713d60eb23fde30"
    assert digest(tasks["hci"].test) == "8e6b32500ade8b15"


def test_all_bad_lines_are_reported_at_once(tmp_path):
    table = make_morph(tmp_path / "m", morph_rows(6)) / MORPH_TABLE
    header, *lines = table.read_text().split("\n")
    lines = [re.sub(r"([MF])\d\d\.JPG", r"\g<1>99.JPG", line) for line in lines]
    table.write_text("\n".join([header, *lines]))
    with pytest.raises(ValueError, match=r"csv:2: age 16, .*\n.*csv:3: age \d+, but the name of"):
        load("morph2", tmp_path / "m")
    root = make_aesthetics(tmp_path / "a", rows=[(str(i), "sea", "3") for i in range(25)])
    with pytest.raises(ValueError, match=r"'sea'.*\n\.\.\. and 5 more such lines") as error:
        load("aesthetics", root)
    assert str(error.value).count("expected a photo id") == 20


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "morph2",
            ["UNCW", "MORPH Album 2", "non-commercial", "Album2/009055_1M54.JPG", MORPH_TABLE],
        ),
        ("adience", ["aligned or ", "faces is not there", "talhassner.github.io"]),
        ("aesthetics", ["img_files or ", "is not there", "beauty-icwsm15-dataset.tsv.zip"]),
        ("hci", ["decade_database/1930s or ", "afb4c47b7da105c4afd1f27e06bea171"]),
    ],
)
def test_a_missing_release_says_where_to_get_it(tmp_path, name, words):
    root = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=" is not there.\n") as error:
        load(name, root)
    for word in (*words, "the data set demo", str(root)):
        assert word in str(error.value)


def test_parts_of_a_release_that_are_missing_are_named(tmp_path):
    (tmp_path / "aligned").mkdir()
    with pytest.raises(FileNotFoundError, match="fold_0_data.txt is not there"):
        load("adience", tmp_path)
    make_adience(tmp_path)
    (tmp_path / "fold_4_data.txt").unlink()
    with pytest.raises(FileNotFoundError, match="fold_4_data.txt is not there") as error:
        load("adience", tmp_path)
    assert "talhassner.github.io" in str(error.value) and str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="beauty-icwsm15-dataset.tsv is not there"):
        load("aesthetics", tmp_path)
    make_aesthetics(tmp_path, missing=[photo for photo, *_ in aesthetic_rows()])
    with pytest.raises(FileNotFoundError, match="none of its 223 images of category all is"):
        load("aesthetics", tmp_path)


@pytest.mark.parametrize(
    "name, image_dir, message",
    [
        ("morph2", "Album2", r"csv: \d+ of \d+ images are not under .*'Album2/0090"),
        ("adience", "aligned/30@N03", r"2 of 200 images are not under .*'30@N03/land"),
    ],
)
def test_missing_images_are_reported(tmp_path, name, image_dir, message):
    root = MAKERS[name](tmp_path)
    missing = sorted((root / image_dir).iterdir())[:4]
    for path in missing if name == "morph2" else missing[:2]:
        path.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load(name, root)
    assert load(name, root, allow_missing=True).train


@pytest.mark.parametrize("name", MAKERS)
def test_written_lists_are_read_back(releases, tmp_path, name):
    task = load(name, releases[name], fold=3)
    task.write_lists(tmp_path)
    again = load(name, releases[name], lists=[tmp_path / f"{part}.txt" for part in data.PARTS])
    assert parts_of(again) == parts_of(task) and again.rank_values == task.rank_values
    assert f"{name}: given lists train.txt val.txt test.txt" in again.protocol
    assert (tmp_path / "ranks.txt").read_text().split() == list(task.rank_names)


# ------------------------------------------------------------------------------------ aesthetics


@pytest.mark.parametrize(
    "category, sizes",
    [
        ("nature", (101 - 6 - 21, 6, 21)),
        ("animal", (61 - 4 - 13, 4, 13)),
        ("people", (30, 2, 8)),
        ("urban", (21 - 2 - 5, 2, 5)),
        ("all", (74 + 44 + 30 + 14, 14, 47)),
    ],
)
def test_aesthetics_sizes(aesthetics, category, sizes):
    tests = []
    for fold in range(5):
        task = load("aesthetics", aesthetics, category=category, fold=fold)
        assert tuple(map(len, parts_of(task))) == sizes
        assert_disjoint(task)
        tests.append(paths(task.test))
    assert len(set(map(frozenset, tests))) == 5 and task.root == aesthetics / "img_files"
    assert task.protocol.startswith(
        f"aesthetics: category {category}, label rule median, random split, seed 1, fold 4: "
    )
    assert task.num_ranks == 5 and task.rank_names[2] == "ordinary"
    names = {f"{p}.jpg" for p, k, _ in aesthetic_rows() if category in ("all", k.rstrip("s"))}
    assert all_paths(task) == names


def test_aesthetics_all_is_each_category_split_apart(aesthetics):
    whole, urban = load("aesthetics", aesthetics), load("aesthetics", aesthetics, category="urban")
    assert paths(urban.test) <= paths(whole.test) and paths(urban.val) <= paths(whole.val)
    assert load("aesthetics", aesthetics, seed=2).test != whole.test
    assert load("aesthetics", aesthetics, category="all", label_rule="median") == whole


@pytest.mark.parametrize("rule", ["median", "mean"])
def test_aesthetics_label_rules(aesthetics, rule):
    task = load("aesthetics", aesthetics, label_rule=rule)
    scores = {photo: scores for photo, _, scores in aesthetic_rows()}
    for sample in task.train + task.val + task.test:
        assert sample.label == SCORES[scores[Path(sample.path).stem]][rule == "mean"]
    assert f"label rule {rule}, " in task.protocol


@pytest.mark.parametrize("images, ending", [("images", ".png"), (".", ".jpeg"), (".", ".JPG")])
def test_aesthetics_missing_images_and_other_folders(tmp_path, images, ending):
    missing = [photo for photo, *_ in aesthetic_rows()][:50]
    root = make_aesthetics(tmp_path, images, missing=missing, ending=ending)
    task = load("aesthetics", root)
    assert "50 of 223 rows have no image: " in task.protocol
    assert not {Path(path).stem for path in paths(task.train)} & set(missing)
    assert "rows: 223 of 15,686 published" in task.notes
    assert "images of nature: 51 of 4,681 published" in task.notes
    nature = load("aesthetics", root, category="nature")
    assert "50 of 101 rows have no image: " in nature.protocol and len(nature.test) == 11
    assert "no image" not in load("aesthetics", root, category="urban").protocol
    assert ImageList(task.train, task.root, image_size=8)[0][0].shape == (3, 8, 8)


def test_aesthetics_lists_of_scores_are_refused(aesthetics, tmp_path):
    """As published with L2RCLIP: `<id>.png 3.0`, scores from 1."""
    path = tmp_path / "nature_train.txt"
    path.write_text("1.jpg 1.0\n2.jpg 4.0\n")
    with pytest.raises(
        ValueError, match="nature_train.txt:1: label 1.0 is a score of 1.0 .. 5.0; expected a rank"
    ):
        load("aesthetics", aesthetics, lists=(path, None, None))


def test_aesthetics_repeats(tmp_path):
    rows = aesthetic_rows()
    root = make_aesthetics(tmp_path, rows=[*rows, (rows[0][0], "animal", "5,5,5")])
    task = load("aesthetics", root)
    assert "1 rows repeat a photo; its first row counts" in task.notes
    assert f"1 photo has rows that contradict: {rows[0][0]}" in task.notes
    assert sum(map(len, parts_of(task))) == 223


# ------------------------------------------------------------------------------------------- hci


def test_hci_ten_splits(hci):
    tests = []
    for fold in range(10):
        task = load("hci", hci, fold=fold)
        for part, count in zip(parts_of(task), (210, 5, 50)):
            assert np.bincount([sample.label for sample in part]).tolist() == [count] * 5
        assert_disjoint(task)
        tests.append(frozenset(paths(task.test)))
    assert len(set(tests)) == 10 and load("hci", hci, seed=2, fold=9).test != task.test
    assert task.rank_names == DECADES and task.rank_values == (1930, 1940, 1950, 1960, 1970)
    assert all(path.startswith(DECADES[label]) for path, label in task.test)
    assert task.root == hci / HCI and task.notes == ()
    assert task.protocol == (
        "hci: random split, seed 1, fold 9: 1,050 train / 25 val / 250 test images"
    )


@pytest.mark.parametrize("folder", ["decade_database", "data/imgs/decade_database", "."])
def test_hci_other_folders_and_counts(tmp_path, folder):
    root = make_hci(tmp_path, folder, (56, 60, 56, 56, 56))
    task = load("hci", root)
    assert [len(part) for part in parts_of(task)] == [5 + 4, 25, 250]
    assert "release of 284 images where 1,325 are expected: " in task.protocol
    assert "images of the 1940s: 60 of 265 published" in task.notes
    assert ImageList(task.train, task.root, image_size=8)[0][0].shape == (3, 8, 8)
    image = sorted((root / folder / "1930s").glob("decade_*"))[0]
    shutil.copy(image, root / folder / "1970s" / image.name)
    assert f"1 file name is in more than one decade: {image.name}" in load("hci", root).notes


def test_hci_too_few_images(tmp_path):
    make_hci(tmp_path, counts=(56, 56, 55, 56, 56))
    with pytest.raises(ValueError, match="1950s: 55 images, expected 265, at least 56; unpack"):
        load("hci", tmp_path)
    shutil.rmtree(tmp_path / HCI / "1950s")
    with pytest.raises(ValueError, match="1950s: 0 images, expected 265"):
        load("hci", tmp_path)
