"""python -m pytest tests/test_data.py -q        (offline, CPU)

Releases are made here in their original layout with tiny images; every image mode is compared with
the colours a person sees.
"""

import dataclasses
import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from data import ImageList, Sample, load, normalize, read_image, read_list

HEADER = "id_num,picture_num,dob,doa,race,gender,facial_hair,age,age_diff,glasses,photo"


def paths(samples):
    return {sample.path for sample in samples}


def tiny(path, color=(200, 100, 50), size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def parts_of(task):
    return task.train, task.val, task.test


def assert_disjoint(task):
    train, val, test = map(paths, parts_of(task))
    assert not (train & val or train & test or val & test)


# ---------------------------------------------------------------------------------------- morph2


def morph_rows(people=40, photos=5):
    """(id, picture number, race, gender, age) of a small release; every 4th person is black."""
    return [
        (
            9000 + 7 * person,
            photo,
            "B" if person % 4 == 3 else "W",
            "MF"[person % 2],
            16 + (person * 3 + photo) % 50,
        )
        for person in range(people)
        for photo in range(photos)
    ]


def morph_name(person, photo, gender, age):
    return f"{person:06d}_{photo}{gender}{age:02d}.JPG"


def make_morph(root, rows, on_disk=lambda name: name):
    (root / "Album2").mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("RGB", (4, 5), (200, 100, 50)).save(picture, "JPEG")
    lines = [HEADER]
    for person, photo, race, gender, age in rows:
        name = morph_name(person, photo, gender, age)
        (root / "Album2" / on_disk(name)).write_bytes(picture.getvalue())
        lines.append(
            f"{person},{photo},06/14/1951,12/04/2005,{race},{gender},,{age},{photo},,Album2/{name}"
        )
    (root / "morph_2008_nonCommercial.csv").write_text("\r\n".join(lines) + "\r\n", newline="")
    return root


@pytest.fixture(scope="module")
def morph(tmp_path_factory):
    return make_morph(tmp_path_factory.mktemp("morph") / "release", morph_rows())


@pytest.fixture(scope="module")
def big_morph(tmp_path_factory):
    return make_morph(tmp_path_factory.mktemp("morph") / "release", morph_rows(people=1600))


def test_morph_setting_a_counts(big_morph):
    task = load("morph2", big_morph)
    assert [len(part) for part in parts_of(task)] == [4394 - 439, 439, 1098]
    assert_disjoint(task)
    assert "5,492 of 6,000 images of race W" in task.protocol
    assert "release of 8,000 images where 55,134 are expected" in task.protocol
    assert task.num_ranks == 101 and task.rank_names[16] == "16" and task.rank_values[16] == 16.0
    assert task.context == "age estimation: the age of the person is" and not task.val_is_test
    for sample in task.train[:20]:
        assert sample.label == int(re.search(r"[MF](\d+)\.JPG$", sample.path)[1])


def test_morph_only_race_w_and_all_of_it_when_few(morph):
    task = load("morph2", morph)
    whites = {
        f"Album2/{morph_name(p, n, g, a)}" for p, n, race, g, a in morph_rows() if race == "W"
    }
    assert set().union(*map(paths, parts_of(task))) == whites
    assert (
        "all 150 (of 5,492 wanted) images of race W, random split, seed 0, fold 0" in task.protocol
    )
    assert "\n" not in task.protocol
    assert re.search(r"\d+ of 101 ranks have no training image \(0, 1, 2, \.\.\.\)", task.protocol)


def test_morph_folds_and_seeds(morph, big_morph):
    tests = [
        paths(load("morph2", morph, fold=fold, seed=seed).test)
        for fold, seed in [(0, 0), (1, 0), (0, 1), (0, 0)]
    ]
    assert tests[0] == tests[3] and tests[0] != tests[1] and tests[0] != tests[2]
    everyone = [
        set().union(*map(paths, parts_of(load("morph2", big_morph, fold=fold, seed=seed))))
        for fold, seed in [(0, 0), (1, 0), (0, 1)]
    ]
    assert everyone[0] == everyone[1] != everyone[2]  # the draw hangs on the seed alone


def test_splits_are_frozen(morph):
    """The order of images must never change: published numbers hang on it."""
    assert data._shuffled("abcdefgh", "test/0/0") == list("hadbfgec")
    test = "\n".join(sorted(paths(load("morph2", morph, seed=1, fold=2).test)))
    assert hashlib.sha256(test.encode()).hexdigest()[:16] == "0146c488135cd9f2"


def test_morph_subject_exclusive(morph, big_morph):
    for root in (morph, big_morph):
        task = load("morph2", root, split="subject-exclusive", fold=3)
        people = [{Path(path).name[:6] for path in paths(part)} for part in parts_of(task)]
        assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
        total = sum(map(len, parts_of(task)))
        assert len(task.test) == pytest.approx(total * 0.2, rel=0.15)
        assert len(task.val) == pytest.approx(total * 0.08, rel=0.4)
        assert "subject-exclusive split" in task.protocol
    same = set().union(*map(paths, parts_of(load("morph2", big_morph))))
    assert same == set().union(*map(paths, parts_of(task)))  # over the same drawn images


def test_morph_random_split_is_by_image(big_morph):
    task = load("morph2", big_morph)
    train, test = ({path[:13] for path in paths(part)} for part in (task.train, task.test))
    assert train & test


def test_morph_extension_case_on_disk(tmp_path):
    root = make_morph(
        tmp_path / "m", morph_rows(), on_disk=lambda name: name.replace(".JPG", ".jpg")
    )
    task = load("morph2", root)
    assert all(sample.path.endswith(".jpg") for sample in task.train)
    assert ImageList(task.train, task.root, image_size=8)[0][0].shape == (3, 8, 8)


def morph_lists(folder, rows, kind):
    names = [(morph_name(p, n, g, a), race, g, a) for p, n, race, g, a in rows]
    if kind == "path label":
        text = "".join(f"Album2/{name} {age}\n" for name, _, _, age in names)
    elif kind == "setting A, spaces":
        text = "race gender age filename database\r\n" + "".join(
            f"0 {int(g == 'M')} {age} {name} morph\r\n" for name, _, g, age in names
        )
    elif kind == "setting A, commas":
        text = ",race,gender,age,filename,database\r\n" + "".join(
            f"{i},0,{int(g == 'M')},{age},{name},morph\r\n"
            for i, (name, _, g, age) in enumerate(names)
        )
    elif kind == "setting 3, tabs":
        text = "filename\tfold\tage\tdatabase\n" + "".join(
            f"{name}\t0\t{age}\tmorph\n" for name, _, _, age in names
        )
    else:
        text = "".join(f"../../datasets/Morph/image/{name} {age}\n" for name, _, _, age in names)
    path = folder / f"{kind.replace(' ', '_').replace(',', '')}_{len(rows)}_{rows[0][0]}.txt"
    path.write_text(text, newline="")
    return path


@pytest.mark.parametrize(
    "kind", ["path label", "setting A, spaces", "setting A, commas", "setting 3, tabs", "elsewhere"]
)
def test_morph_public_lists(morph, tmp_path, kind):
    rows = morph_rows()
    train, test = morph_lists(tmp_path, rows[:100], kind), morph_lists(tmp_path, rows[100:], kind)
    task = load("morph2", morph, lists=(train, None, test))
    assert [len(part) for part in parts_of(task)] == [90, 10, 100]
    assert_disjoint(task)
    assert paths(task.test) == {f"Album2/{morph_name(p, n, g, a)}" for p, n, _, g, a in rows[100:]}
    assert {sample.label for sample in task.test} == {a for *_, a in rows[100:]}
    assert f"given lists {train.name} {test.name}" in task.protocol and not task.val_is_test


def test_morph_lists_with_val_equal_to_test_and_overlap(morph, tmp_path):
    rows = morph_rows()
    train, test = (morph_lists(tmp_path, part, "path label") for part in (rows[:100], rows[90:]))
    task = load("morph2", morph, lists=(train, test, test))
    assert task.val_is_test and "VAL IS TEST" in task.protocol and task.val == task.test
    assert "10 images are in both train and val" in task.protocol
    assert "10 images are in both train and test" in task.protocol
    assert load("morph2", morph, lists=(str(train), str(test), None)).val_is_test
    other = morph_lists(tmp_path, rows[150:], "path label")
    assert (
        "50 images are in both val and test"
        in load("morph2", morph, lists=(train, test, other)).protocol
    )


def test_morph_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load("morph2", tmp_path / "nowhere")
    for words in (
        "UNCW",
        "MORPH Album 2",
        "non-commercial",
        "Album2/009055_1M54.JPG",
        "--data demo",
        str(tmp_path / "nowhere"),
        "morph_2008_nonCommercial.csv",
    ):
        assert words in str(error.value)


def edited(tmp_path, change):
    root = make_morph(tmp_path / "m", morph_rows(6))
    table = root / "morph_2008_nonCommercial.csv"
    lines = table.read_text().split("\n")
    table.write_text("\n".join(change(lines)))
    return root, table


@pytest.mark.parametrize(
    "old, new, words",
    [
        (
            ",16,0,,Album2",
            ",17,0,,Album2",
            r"csv:2: age 17, but the name of Album2/009000_0M16.JPG says 16",
        ),
        (",16,0,,Album2", ",,0,,Album2", r"csv:2: expected an age of 0 .. 100 .* got ''"),
        (",16,0,,Album2", ",x,0,,Album2", r"csv:2: expected an age of 0 .. 100 .* got 'x'"),
        (",16,0,,Album2", ",160,0,,Album2", r"csv:2: expected an age of 0 .. 100 .* got '160'"),
        (
            ",16,0,,Album2/009000_0M16.JPG",
            ",16,0,,face.JPG",
            r"csv:2: expected .* got '16' and 'face.JPG'",
        ),
        (",16,0,,Album2/009000_0M16.JPG", ",16", r"csv:2: expected .* got '16' and ''"),
        ("race,", "ethnicity,", r"csv:1: no column race; expected the header"),
        ("age,age_diff", "years,age_diff", r"csv:1: no column age"),
        ("photo", "picture", r"csv:1: no column photo"),
    ],
)
def test_morph_bad_table(tmp_path, old, new, words):
    root, _ = edited(
        tmp_path, lambda lines: [lines[0].replace(old, new), lines[1].replace(old, new), *lines[2:]]
    )
    with pytest.raises(ValueError, match=words):
        load("morph2", root)


def test_morph_empty_table_and_no_white_person(tmp_path):
    root, table = edited(tmp_path, lambda lines: [line.replace(",W,", ",B,") for line in lines])
    with pytest.raises(ValueError, match="0 train / 0 val / 0 test images, and none may be empty"):
        load("morph2", root)
    table.write_text("")
    with pytest.raises(ValueError, match="csv:1: no column age, photo, race"):
        load("morph2", root)


def test_morph_images_missing(tmp_path):
    root = make_morph(tmp_path / "m", morph_rows())
    gone = sorted((root / "Album2").iterdir())[:4]
    for path in gone:
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"csv: \d+ of \d+ images are not under .*'Album2/0090"
    ):
        load("morph2", root)


def test_morph_list_disagrees_with_the_release(morph, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("# two\n009000_0M16.JPG 16\n009000_0M16.JPG 18\n")
    with pytest.raises(
        ValueError, match=r"bad.txt:3: 009000_0M16.JPG with age 18, but it has age 16"
    ):
        load("morph2", morph, lists=(bad, None, None))
    bad.write_text("009001_0M16.JPG 16\n")
    with pytest.raises(
        ValueError, match=r"bad.txt:1: 009001_0M16.JPG with age 16, but it is not in"
    ):
        load("morph2", morph, lists=(bad, None, None))
    bad.write_text("009000_0M16.JPG 16\n")
    with pytest.raises(ValueError, match="no list or folder of training images"):
        load("morph2", morph, lists=(None, None, bad))


# ---------------------------------------------------------------------------------------- adience


ADIENCE = (
    "user_id original_image face_id age gender x y dx dy tilt_ang fiducial_yaw_angle fiducial_score"
)
AGES = "(0, 2)|(4, 6)|(8, 12)|(15, 20)|(25, 32)|(38, 43)|(48, 53)|(60, 100)".split("|")
STRAYS = ["None", "35", "13", "(25, 23)", "(27, 32)", "(8, 23)", "3", "2"]
RULES = {  # rank of each stray
    "exact": [],
    "merged": [4, 4],
    "inside": [2, 4, 4, 0],  # 13, (25, 23), (27, 32) and 2
}


def picture():
    held = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(held, "JPEG")
    return held.getvalue()


PICTURE = picture()


def adience_rows(fold):
    """(user, image, face, age): 3 users a fold, every age and stray, one row repeated."""
    rows = [
        (f"{fold}{i % 3}@N03", f"1039_{i}_o.jpg", str(i % 7), age)
        for i, age in enumerate(AGES * 5 + STRAYS)
    ]
    return rows + rows[:1]


def make_adience(root, tables=".", images="aligned", stem="landmark_aligned_face"):
    (root / tables).mkdir(parents=True, exist_ok=True)
    for fold in range(5):
        lines = ["\t".join(ADIENCE.split())]
        for user, image, face, age in adience_rows(fold):
            path = root / images / user / f"{stem}.{face}.{image}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PICTURE)
            lines.append("\t".join([user, image, face, age, "f", *"1234", "-115", "30", "17"]))
        text = "\r\n".join(lines) + "\r\n"
        (root / tables / f"fold_{fold}_data.txt").write_text(text, newline="")
    return root


@pytest.fixture(scope="module")
def adience(tmp_path_factory):
    return make_adience(tmp_path_factory.mktemp("adience") / "release")


def test_adience_folds_are_published_ones_and_keep_people_apart(adience):
    tests = []
    for fold in range(5):
        task = load("adience", adience, fold=fold)
        assert [len(part) for part in parts_of(task)] == pytest.approx([148, 16, 41], abs=1)
        assert sum(map(len, parts_of(task))) == 5 * 41
        assert_disjoint(task)
        users = [{Path(path).parent.name for path in paths(part)} for part in parts_of(task)]
        assert users[2] == {f"{fold}{i}@N03" for i in range(3)} and not users[2] & users[0]
        assert users[1] <= users[0]  # val is drawn by image
        tests.append(paths(task.test))
    assert len(set().union(*tests)) == 200 == sum(map(len, tests))
    assert task.root == adience / "aligned" and task.num_ranks == 8
    assert task.rank_names[2] == "8-13" and task.rank_values == tuple(map(float, range(8)))
    assert task.test[2] == Sample("42@N03/landmark_aligned_face.2.1039_2_o.jpg", 2)
    assert task.test[0] == task.test[40]  # a repeated row stays, as in the published lists
    assert task.protocol == (
        f"adience: label rule exact, five-fold split, seed 0, fold 4: {len(task.train)} train / "
        f"{len(task.val)} val / 41 test images"
    )
    assert load("adience", adience, fold=4, seed=1).val != task.val
    assert load("adience", adience, fold=4, seed=1).test == task.test


@pytest.mark.parametrize("rule", RULES)
def test_adience_label_rules(adience, rule):
    task = load("adience", adience, label_rule=rule, split="five-fold")
    labels = [sample.label for sample in task.test]
    expected = [*range(8)] * 5 + RULES[rule] + [0] * (rule != "merged")
    assert labels == expected and f"label rule {rule}" in task.protocol
    assert ("5 rows repeat an image, left out" in task.notes) == (rule == "merged")


def test_adience_notes(adience):
    notes = load("adience", adience).notes
    for note in (
        "rows: 245 of 19,487 published",
        "labelled rows: 205 of 17,424 published",
        "rank 0-2: 30 of 2,519 published",
        "fold 1: 41 of 3,101 published",
        "5 rows repeat an image, kept",
        "40 rows left out, by age: None x 5, 35 x 5, 13 x 5, (25, 23) x 5, (27, 32) x 5, "
        "(8, 23) x 5, 3 x 5, 2 x 5",
    ):
        assert note in notes
    assert not any("different ranks" in note or "more than one fold" in note for note in notes)
    merged = load("adience", adience, label_rule="merged").notes
    assert "images: 210 of 17,470 published" in merged


@pytest.mark.parametrize("tables", ["folds", "original_txt_files"])
def test_adience_other_places(tmp_path, tables):
    root = make_adience(tmp_path, tables, "faces", "coarse_tilt_aligned_face")
    task = load("adience", root)
    assert task.root == root / "faces"
    assert task.test[1].path == "01@N03/coarse_tilt_aligned_face.1.1039_1_o.jpg"
    assert ImageList(task.train, task.root, image_size=8)[0][0].shape == (3, 8, 8)


def test_adience_contradictions_and_missing_images(tmp_path):
    root = make_adience(tmp_path)
    table = root / "fold_3_data.txt"
    lines = table.read_text().split("\n")
    lines[-2] = lines[-2].replace("(0, 2)", "(4, 6)")
    table.write_text("\n".join(lines))
    (root / "fold_4_data.txt").write_text(
        (root / "fold_4_data.txt").read_text().rstrip("\n") + "\n" + lines[1] + "\n"
    )
    notes = load("adience", root).notes
    assert any(
        re.fullmatch("1 image has rows of different ranks: 3.@N03/landmark.*", note)
        for note in notes
    )
    assert f"1 person is in more than one fold: {lines[1].split(chr(9))[0]}" in notes
    first, second, *_ = sorted((root / "aligned" / "30@N03").iterdir())
    first.unlink()
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 200 images are not under .*'30@N03/land"):
        load("adience", root)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("\tface_id\t", "\tface\t", "fold_2_data.txt:1: no column face_id; expected the header"),
        ("20@N03\t1039_0_o.jpg\t0", "20@N03\t\t0", "fold_2_data.txt:2: expected user_id, .* ''"),
    ],
)
def test_adience_bad_tables(tmp_path, old, new, words):
    table = make_adience(tmp_path) / "fold_2_data.txt"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(ValueError, match=words):
        load("adience", tmp_path)


def test_adience_not_there(tmp_path):
    for missing in ("aligned or .*faces", "fold_0_data.txt", "fold_4_data.txt"):
        with pytest.raises(FileNotFoundError, match=f"{missing} is not there.*") as error:
            load("adience", tmp_path)
        assert "talhassner.github.io" in str(error.value) and str(tmp_path) in str(error.value)
        if missing.startswith("aligned"):
            (tmp_path / "aligned").mkdir()
        else:
            make_adience(tmp_path)
            (tmp_path / "fold_4_data.txt").unlink()


def test_adience_published_lists(adience, tmp_path):
    rows = [row for fold in (0, 1) for row in adience_rows(fold) if row[3] in AGES]
    for name, some in (("age_train.txt", rows[41:]), ("age_test.txt", rows[:41])):
        (tmp_path / name).write_text(
            "".join(
                f"{user}/landmark_aligned_face.{face}.{image} {AGES.index(age)}\n"
                for user, image, face, age in some
            )
        )
    lists = (tmp_path / "age_train.txt", None, tmp_path / "age_test.txt")
    task = load("adience", adience, lists=lists)
    assert paths(task.test) == paths(load("adience", adience).test) and len(task.train) > 30
    assert "adience: given lists age_train.txt age_test.txt: " in task.protocol
    (tmp_path / "age_test.txt").write_text("00@N03/landmark_aligned_face.0.1039_0_o.jpg 8\n")
    with pytest.raises(ValueError, match=r"age_test.txt:1: label 8, but .* 0 .. 7 \(8 ranks\)"):
        load("adience", adience, lists=lists)


# --------------------------------------------------------------------------------------- aesthetics


KINDS = {"nature": 101, "people": 40, "animals": 61, "urban": 21}
SCORES = {  # median, mean
    "1,2,3,3,2": (1, 1),
    "2,3": (1, 1),  # 2.5: down; to even
    "3,4": (2, 3),  # 3.5: down; to even
    "1,2,3,4": (1, 1),
    "5,5,5,5,1": (4, 3),
    "1, 1, 1, 1, 1": (0, 0),
    "4,4,4,4,5": (3, 3),
}


def aesthetic_rows():
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    scores = list(SCORES)
    return [(str(7_000_000 + i), kind, scores[i % 7]) for i, kind in enumerate(kinds)]


def make_aesthetics(root, images="img_files", rows=None, gone=(), ending=".jpg"):
    (root / images).mkdir(parents=True, exist_ok=True)
    lines = ["#flickr_photo_id\tcategory\tbeauty_scores"]
    for photo, kind, scores in rows or aesthetic_rows():
        lines.append(f"{photo}\t{kind}\t{scores}")
        if photo not in gone:
            (root / images / f"{photo}{ending}").write_bytes(PICTURE)
    text = "\r\n".join(lines) + "\r\n"
    (root / "beauty-icwsm15-dataset.tsv").write_text(text, newline="")
    (root / images / "._7000000.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def aesthetics(tmp_path_factory):
    return make_aesthetics(tmp_path_factory.mktemp("aesthetics") / "release")


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
        f"aesthetics: category {category}, label rule median, random split, seed 0, fold 4: "
    )
    assert task.num_ranks == 5 and task.rank_names[2] == "ordinary"
    names = {f"{p}.jpg" for p, k, _ in aesthetic_rows() if category in ("all", k.rstrip("s"))}
    assert set().union(*map(paths, parts_of(task))) == names


def test_aesthetics_all_is_each_category_split_apart(aesthetics):
    whole, first = load("aesthetics", aesthetics), load("aesthetics", aesthetics, category="urban")
    assert paths(first.test) <= paths(whole.test) and paths(first.val) <= paths(whole.val)
    assert load("aesthetics", aesthetics, seed=1).test != whole.test
    assert load("aesthetics", aesthetics, category="all", label_rule="median") == whole


@pytest.mark.parametrize("rule", ["median", "mean"])
def test_aesthetics_label_rules(aesthetics, rule):
    task = load("aesthetics", aesthetics, label_rule=rule)
    scores = {photo: scores for photo, _, scores in aesthetic_rows()}
    for sample in task.train + task.val + task.test:
        assert sample.label == SCORES[scores[Path(sample.path).stem]][rule == "mean"]
    assert f"label rule {rule}, " in task.protocol


@pytest.mark.parametrize("images, ending", [("images", ".png"), (".", ".jpeg"), (".", ".JPG")])
def test_aesthetics_missing_images_and_other_places(tmp_path, images, ending):
    gone = [photo for photo, *_ in aesthetic_rows()][:50]
    root = make_aesthetics(tmp_path, images, gone=gone, ending=ending)
    task = load("aesthetics", root)
    assert "50 of 223 rows have no image: " in task.protocol
    assert not {Path(path).stem for path in paths(task.train)} & set(gone)
    assert "rows: 223 of 15,686 published" in task.notes
    assert "images of nature: 51 of 4,681 published" in task.notes
    nature = load("aesthetics", root, category="nature")
    assert "50 of 101 rows have no image: " in nature.protocol and len(nature.test) == 11
    assert "no image" not in load("aesthetics", root, category="urban").protocol
    assert ImageList(task.train, task.root, image_size=8)[0][0].shape == (3, 8, 8)


def test_aesthetics_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="img_files or .* is not there") as error:
        load("aesthetics", tmp_path / "nowhere")
    assert "beauty-icwsm15-dataset.tsv.zip" in str(error.value)
    with pytest.raises(FileNotFoundError, match="beauty-icwsm15-dataset.tsv is not there"):
        load("aesthetics", tmp_path)
    make_aesthetics(tmp_path, gone=[photo for photo, *_ in aesthetic_rows()])
    with pytest.raises(FileNotFoundError, match="none of its 223 images of category all is"):
        load("aesthetics", tmp_path)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("#flickr_photo_id", "#id", "tsv:1: no column flickr_photo_id; expected the header"),
        ("7000001\tnature", "7000001\tsea", "tsv:3: expected a photo id, a category .* 'sea'"),
        ("7000001\tnature\t2,3", "7000001\tnature\t2,6", "tsv:3: .* of 1 .. 5, got .*'2,6'"),
        ("7000001\tnature\t2,3", "7000001\tnature", "tsv:3: expected .* ''"),
    ],
)
def test_aesthetics_bad_table(tmp_path, old, new, words):
    table = make_aesthetics(tmp_path) / "beauty-icwsm15-dataset.tsv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(ValueError, match=words):
        load("aesthetics", tmp_path)


def test_all_wrong_lines_are_told_at_once(tmp_path):
    root, _ = edited(
        tmp_path, lambda lines: [re.sub(r"([MF])\d\d\.JPG", r"\g<1>99.JPG", line) for line in lines]
    )
    with pytest.raises(ValueError, match=r"csv:2: age 16, .*\n.*csv:3: age \d+, but the name of"):
        load("morph2", root)
    root = make_aesthetics(tmp_path / "a", rows=[(str(i), "sea", "3") for i in range(25)])
    with pytest.raises(ValueError, match=r"'sea'.*\n\.\.\. and 5 more such lines") as error:
        load("aesthetics", root)
    assert str(error.value).count("expected a photo id") == 20


def test_aesthetics_lists_of_scores_are_refused(aesthetics, tmp_path):
    """As published with L2RCLIP: `<id>.png 3.0`, scores from 1."""
    path = tmp_path / "nature_train.txt"
    path.write_text("1.jpg 1.0\n2.jpg 4.0\n")
    with pytest.raises(
        ValueError, match="nature_train.txt:1: label 1.0 is a score of 1.0 .. 5.0; expected a rank"
    ):
        load("aesthetics", aesthetics, lists=(path, None, None))


def test_aesthetics_repeats_and_lists(tmp_path):
    rows = aesthetic_rows()
    root = make_aesthetics(tmp_path, rows=[*rows, (rows[0][0], "animal", "5,5,5")])
    task = load("aesthetics", root)
    assert "1 rows repeat a photo; its first row counts" in task.notes
    assert f"1 photo has rows that contradict: {rows[0][0]}" in task.notes
    assert sum(map(len, parts_of(task))) == 223
    task.write_lists(tmp_path / "lists")
    lists = [tmp_path / "lists" / f"{part}.txt" for part in data.PARTS]
    again = load("aesthetics", root, lists=lists)
    assert parts_of(again) == parts_of(task)
    assert "aesthetics: given lists train.txt val.txt test.txt: " in again.protocol


# ---------------------------------------------------------------------------------------- hci


DECADES = ("1930s", "1940s", "1950s", "1960s", "1970s")
HCI = "HistoricalColor-ECCV2012/data/imgs/decade_database"


def make_hci(root, folder=HCI, counts=(265,) * 5):
    for decade, count in zip(DECADES, counts):
        place = root / folder / decade
        place.mkdir(parents=True)
        (place / "._decade_0.jpg").write_bytes(b"")
        (place / ".DS_Store").write_bytes(b"")
        for i in range(count):
            name = hashlib.md5(f"{decade}{i}".encode()).hexdigest()
            (place / f"decade_{name}.jpg").write_bytes(PICTURE)
    return root


@pytest.fixture(scope="module")
def hci(tmp_path_factory):
    return make_hci(tmp_path_factory.mktemp("hci") / "release")


def test_hci_ten_splits(hci):
    tests = []
    for fold in range(10):
        task = load("hci", hci, fold=fold)
        for part, count in zip(parts_of(task), (210, 5, 50)):
            assert np.bincount([sample.label for sample in part]).tolist() == [count] * 5
        assert_disjoint(task)
        tests.append(frozenset(paths(task.test)))
    assert len(set(tests)) == 10 and load("hci", hci, seed=1, fold=9).test != task.test
    assert task.rank_names == DECADES and task.rank_values == (1930, 1940, 1950, 1960, 1970)
    assert all(path.startswith(DECADES[label]) for path, label in task.test)
    assert task.root == hci / HCI and task.notes == ()
    assert task.protocol == (
        "hci: random split, seed 0, fold 9: 1,050 train / 25 val / 250 test images"
    )


@pytest.mark.parametrize("folder", ["decade_database", "data/imgs/decade_database", "."])
def test_hci_other_places_and_counts(tmp_path, folder):
    task = load("hci", make_hci(tmp_path, folder, (56, 60, 56, 56, 56)))
    assert [len(part) for part in parts_of(task)] == [5 + 4, 25, 250]
    assert "release of 284 images where 1,325 are expected: " in task.protocol
    assert "images of the 1940s: 60 of 265 published" in task.notes
    assert ImageList(task.train, task.root, image_size=8)[0][0].shape == (3, 8, 8)


def test_hci_too_few_and_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="decade_database or .* is not there") as error:
        load("hci", tmp_path)
    assert "afb4c47b7da105c4afd1f27e06bea171" in str(error.value)
    make_hci(tmp_path, counts=(56, 56, 55, 56, 56))
    with pytest.raises(ValueError, match="1950s: 55 images, expected 265, at least 56; unpack"):
        load("hci", tmp_path)
    for path in (tmp_path / HCI / "1950s").iterdir():
        path.unlink()
    (tmp_path / HCI / "1950s").rmdir()
    with pytest.raises(ValueError, match="1950s: 0 images, expected 265"):
        load("hci", tmp_path)


def test_hci_lists(hci, tmp_path):
    task = load("hci", hci, fold=3)
    task.write_lists(tmp_path)
    again = load("hci", hci, lists=[tmp_path / f"{part}.txt" for part in data.PARTS])
    assert parts_of(again) == parts_of(task) and again.rank_values == task.rank_values


# ---------------------------------------------------------------------------------------- options


def test_options_of_datasets(adience, aesthetics, hci, morph):
    for name, root, options, words in [
        ("adience", adience, dict(fold=5), "adience has no fold 5; give 0 .. 4"),
        ("adience", adience, dict(fold=-1), "adience has no fold -1; give 0 .. 4"),
        ("aesthetics", aesthetics, dict(fold=5), "aesthetics has no fold 5; give 0 .. 4"),
        ("hci", hci, dict(fold=10), "hci has no fold 10; give 0 .. 9"),
        ("adience", adience, dict(split="random"), "no split 'random'; give five-fold"),
        ("hci", hci, dict(split="five-fold"), "hci has no split 'five-fold'; give random"),
        ("adience", adience, dict(label_rule="mean"), "'mean'; give exact or merged or inside"),
        ("aesthetics", aesthetics, dict(label_rule="exact"), "'exact'; give median or mean"),
        (
            "aesthetics",
            aesthetics,
            dict(category="sea"),
            "aesthetics has no category 'sea'; give all or nature or animal or urban or people",
        ),
        ("hci", hci, dict(category="all"), "hci has no category, got 'all'; leave it out"),
        ("hci", hci, dict(label_rule="mean"), "hci has no label_rule, got 'mean'; leave it out"),
        ("adience", adience, dict(category=""), "adience has no category, got ''; leave it out"),
        ("morph2", morph, dict(label_rule="exact"), "morph2 has no label_rule, got 'exact'"),
    ]:
        with pytest.raises(ValueError, match=words):
            load(name, root, **options)
    with pytest.raises(ValueError, match="has no category, got 'all'; leave it out"):
        load(adience, category="all")  # a folder of own data
    folds = {name: preset["folds"] for name, preset in data.DATASETS.items()}
    assert folds == dict(demo=1, morph2=5, adience=5, aesthetics=5, hci=10)
    assert load("morph2", morph, fold=7).protocol != load("morph2", morph).protocol


def test_new_splits_are_frozen(adience, aesthetics, hci):
    """As for morph2: published numbers hang on the order of the images."""
    val = sorted(paths(load("adience", adience, fold=2, seed=1).val))
    tests = [
        sorted(paths(load(name, root, fold=2, seed=1).test))
        for name, root in (("aesthetics", aesthetics), ("hci", hci))
    ]
    digests = [hashlib.sha256("\n".join(some).encode()).hexdigest()[:16] for some in (val, *tests)]
    assert digests == ["cd49feaa5184a7b4", "4713d60eb23fde30", "8e6b32500ade8b15"]


def test_morph_contradictions(tmp_path):
    rows = [(9000, 0, "W", "M", 54), (9000, 1, "B", "M", 54), (9007, 0, "W", "F", 53)]
    table = make_morph(tmp_path, rows) / "morph_2008_nonCommercial.csv"
    ages, _, notes = data._read_morph2(table, data.DATASETS["morph2"])
    assert len(ages) == 3 and notes == ["1 of 2 people have more than one race in the table"]
    table.write_text(table.read_text().replace("1,06/14/1951", "1,06/14/1971"))
    notes = data._read_morph2(table, data.DATASETS["morph2"])[2]
    assert notes == [
        "1 of 2 people have more than one race in the table",
        "1 of 2 people have more than one dob in the table",
        "1 of 3 rows have an age that their dob and doa contradict",
    ]
    table.write_text("race,age,photo\nW,54,Album2/009000_0M54.JPG\n")
    assert data._read_morph2(table, data.DATASETS["morph2"])[2] == []


# ---------------------------------------------------------------------------------------- own data


def make_folders(root, ranks, count=20):
    for rank in ranks:
        for i in range(count):
            tiny(root / rank / f"a {i}.{'jpg' if i % 2 else 'PNG'}")
    return root


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


@pytest.mark.parametrize(
    "ranks, text, words",
    [
        (["good", "bad"], None, "order of rank folder 'bad' is not known; name it in .*ranks.txt"),
        (["1", "bad"], None, "order of rank folder 'bad' is not known"),
        (["1 a", "1 b"], None, "order of rank folder '1 a' is not known"),
        (["good", "bad"], "good\n", "order of rank folder 'bad' is not known"),
        (["good", "bad"], "good\nbad\ngood\n", "ranks.txt names a rank twice"),
        (["7"], None, "1 rank, but ordinal regression needs 2 or more"),
        ([], None, "holds neither train.txt .* nor one folder per rank"),
    ],
)
def test_bad_folders(tmp_path, ranks, text, words):
    root = make_folders(tmp_path / "own", ranks, 3)
    root.mkdir(exist_ok=True)
    if text:
        (root / "ranks.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        load(root)


def test_too_few_images(tmp_path):
    with pytest.raises(ValueError, match="2 train / 0 val / 0 test images, and none may be empty"):
        load(make_folders(tmp_path / "own", ["1", "2"], 1))


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


def test_no_training_part(tmp_path):
    make_folders(tmp_path / "own" / "test", ["1", "2"], 10)
    with pytest.raises(ValueError, match="no list or folder of training images"):
        load(tmp_path / "own")
    (tmp_path / "own" / "val.txt").write_text("test/1/a 0.PNG 0\n")
    with pytest.raises(ValueError, match="no list or folder of training images|needs 2 or more"):
        load(tmp_path / "own")


def make_lists(root, ending=".txt", count=10):
    tables = dict(train=[], val=[], test=[])
    for part, rows in tables.items():
        for i in range(count):
            tiny(root / "some images" / f"{part} {i}.jpg")
            rows.append((f"some images/{part} {i}.jpg", i % 3))
        text = {
            ".txt": "".join(f"{path} {label}\n" for path, label in rows),
            ".csv": "path,label\n" + "".join(f'"{path}",{label}\n' for path, label in rows),
            ".tsv": "".join(f"{path}\t{label}\n" for path, label in rows),
        }[ending]
        (root / f"{part}{ending}").write_text(text)
    return root


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
    (root / "train.txt").write_text(
        (root / "train.txt").read_text() + f"./#1.jpg 0\n{root / '#1.jpg'} 2\n"
    )
    task = load(root)
    assert task.train[-2:] == (Sample("#1.jpg", 0), Sample(str(root / "#1.jpg"), 2))
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


# ---------------------------------------------------------------------------------------- lists


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.jpg", "b c.jpg", "d.JPG", "e,f.jpg"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, "JPEG")
    return tmp_path


@pytest.mark.parametrize(
    "name, text",
    [
        ("l.txt", "a.jpg 0\nb c.jpg 1\nd.JPG 2\n"),
        ("l.txt", "\ufeffa.jpg 0\r\n\r\n# said\r\n  b c.jpg   1  \r\nd.jpg\t2"),
        ("l.txt", "./a.jpg 0.0\nb c.jpg 1.0\nd.JPG 2.\n"),
        ("l.txt", "path\tlabel\na.jpg\t0\nb c.jpg\t1\nd.JPG\t2\n"),
        ("l.txt", "label,x,file\n0,,a.jpg\n1,,b c.jpg\n2,,d.JPG\n"),
        ("l.csv", "a.jpg,0\nb c.jpg,1\n# said\nd.jpg, 2\n"),
        ("l.csv", "\ufeffscore,Image,Label\r\n.5,a.jpg,0\r\n.1,b c.jpg,1\r\n.2,d.JPG,2\r\n"),
        ("l.csv", "picture,score\na.jpg,0\nb c.jpg,1\nd.JPG,2\n"),
        ("l.TSV", "age\tfilename\n0\ta.jpg\n1\tb c.jpg\n2\td.JPG\n"),
    ],
)
def test_list_formats(pictures, name, text):
    (pictures / name).write_bytes(text.encode())
    expected = [Sample("a.jpg", 0), Sample("b c.jpg", 1), Sample("d.JPG", 2)]
    assert read_list(pictures / name, pictures, 3) == expected


def test_csv_quotes(pictures):
    (pictures / "l.csv").write_text('"e,f.jpg",1\n')
    assert read_list(pictures / "l.csv", pictures) == [Sample("e,f.jpg", 1)]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("l.txt", "a.jpg 0\na.jpg\n", "l.txt:2: expected an image path and a label, got 'a.jpg'"),
        ("l.txt", "# x\n\na.jpg,1\n", "l.txt:3: expected an image path and a label"),
        ("l.txt", "a.jpg one\n", "l.txt:1: label 'one' is no whole number"),
        ("l.txt", "a.jpg 1.5\n", "l.txt:1: label '1.5' is no whole number"),
        ("l.txt", "a.jpg inf\n", "l.txt:1: label 'inf' is no whole number"),
        (
            "l.txt",
            "a.jpg 0\nb c.jpg 3\n",
            r"l.txt:2: label 3, but ranks are counted 0 .. 2 \(3 ranks\)",
        ),
        ("l.txt", "a.jpg -1\n", r"l.txt:1: label -1, but ranks are counted 0 .. 2"),
        ("l.csv", "path,label\na.jpg\n", "l.csv:2: expected an image path and a label"),
        ("l.csv", "path,label\n,1\n", "l.csv:2: expected an image path and a label"),
        ("l.csv", "a.jpg,x\n", "l.csv:1: label 'x' is no whole number"),
        (
            "l.csv",
            "name,x,y\na.jpg,1,2\n",
            "l.csv:1: 3 columns, and no header that names one `path`",
        ),
        ("l.txt", "\n# only words\n", "l.txt lists no image; expected lines `path label`"),
        ("l.csv", "path,label\n", "l.csv lists no image; expected lines `path label`"),
        (
            "l.txt",
            "x.jpg 0\na.jpg 1\nsub/y.jpg 2\n",
            r"l.txt: 2 of 3 images are not under .*, the first: 'x.jpg', 'sub/y.jpg'",
        ),
    ],
)
def test_bad_lists(pictures, name, text, words):
    (pictures / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_list(pictures / name, pictures, 3)


def test_negative_label_without_a_number_of_ranks(pictures):
    (pictures / "l.txt").write_text("a.jpg -2\n")
    with pytest.raises(ValueError, match="l.txt:1: label -2, but ranks are counted 0$"):
        read_list(pictures / "l.txt", pictures)


def test_list_in_another_encoding(pictures):
    (pictures / "l.txt").write_bytes("é.jpg 0\n".encode("latin-1"))
    with pytest.raises(ValueError, match="l.txt is not UTF-8 text .*; save it as UTF-8"):
        read_list(pictures / "l.txt", pictures)


# ---------------------------------------------------------------------------------------- load


def test_unknown_names_splits_and_lists(tmp_path):
    with pytest.raises(
        ValueError, match="folder 'morph'; give demo, morph2, adience, aesthetics, hci or a folder"
    ):
        load("morph")
    with pytest.raises(
        ValueError, match="morph2 has no split 'rand'; give random or subject-exclusive"
    ):
        load("morph2", split="rand")
    with pytest.raises(ValueError, match="has no split 'subject-exclusive'; give random"):
        load(tmp_path, split="subject-exclusive")
    with pytest.raises(ValueError, match="the demo has lists of its own"):
        load("demo", tmp_path, lists=("a.txt", None, None))


# ---------------------------------------------------------------------------------------- images


def saved(path, image, **options):
    image.save(path, **options)
    return np.asarray(read_image(path)).astype(int)


def png(path, depth, kind, rows, *chunks):
    """A PNG of any bit depth, written by hand; Pillow writes few of them."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    width = {1: 8}.get(depth, 2)
    head = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )
    return np.asarray(read_image(path)).astype(int)


GRAY16 = np.array([[0, 128, 129, 257], [32768, 40000, 65406, 65535]], np.uint16)
GRAY8 = np.array([[0, 0, 1, 1], [128, 156, 254, 255]])


@pytest.mark.parametrize(
    "mode, color, seen",
    [
        ("RGB", (10, 120, 250), (10, 120, 250)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 120, 250, 255), (10, 120, 250)),
        ("RGBA", (10, 120, 250, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 250, 51), (204, 224, 254)),
        ("LA", (100, 0), (255, 255, 255)),
        ("LA", (0, 51), (204, 204, 204)),
        ("LA", (9, 255), (9, 9, 9)),
    ],
)
def test_png_modes(tmp_path, mode, color, seen):
    assert (
        saved(tmp_path / "x.png", Image.new(mode, (3, 2), color)).tolist() == [[list(seen)] * 3] * 2
    )


@pytest.mark.parametrize(
    "ending, options",
    [
        ("png", {}),
        ("gif", {}),
        ("png", dict(transparency=1)),
        ("gif", dict(transparency=1)),
        ("png", dict(transparency=bytes([255, 51, 255]))),
    ],
)
def test_palettes(tmp_path, ending, options):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([250, 0, 0, 0, 100, 250, 5, 6, 7])
    blue = {1: [255, 255, 255], None: [0, 100, 250]}.get(
        options.get("transparency"), [204, 224, 254]
    )
    assert saved(tmp_path / f"x.{ending}", image, **options)[0].tolist() == [
        [250, 0, 0],
        blue,
        [5, 6, 7],
    ]


def test_palette_with_alpha(tmp_path):
    image = Image.new("PA", (2, 1))
    image.putpalette([250, 0, 0, 0, 100, 250])
    image.putpixel((0, 0), (1, 255))
    image.putpixel((1, 0), (1, 51))
    assert np.asarray(data.to_rgb(image))[0].tolist() == [[0, 100, 250], [204, 224, 254]]


@pytest.mark.parametrize(
    "mode, ending",
    [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"), ("I", "tif"), ("I;16", "pgm")],
)
def test_sixteen_bits_are_scaled(tmp_path, mode, ending):
    raw = GRAY16.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    image = Image.frombytes(mode, (4, 2), raw.tobytes())
    seen = saved(tmp_path / f"x.{ending}", image)
    assert (seen == GRAY8[..., None]).all()


def test_sixteen_bit_pngs(tmp_path):
    wide = [struct.pack(">2H", 40000, 20000)] * 2
    assert png(tmp_path / "g.png", 16, 0, wide)[0].tolist() == [[156] * 3, [78] * 3]
    clear = (b"tRNS", struct.pack(">H", 20000))
    assert png(tmp_path / "t.png", 16, 0, wide, clear)[0].tolist() == [[156] * 3, [255] * 3]
    color = [struct.pack(">6H", 40000, 20000, 0, 65535, 257, 514)]
    assert png(tmp_path / "c.png", 16, 2, color)[0].tolist() == [[156, 78, 0], [255, 1, 2]]
    alpha = [struct.pack(">4H", 40000, 65535, 40000, 0)]
    assert png(tmp_path / "a.png", 16, 4, alpha)[0].tolist() == [[156] * 3, [255] * 3]


def test_gray_pngs_with_one_transparent_gray(tmp_path):
    eight = png(tmp_path / "8.png", 8, 0, [bytes([100, 200])], (b"tRNS", struct.pack(">H", 100)))
    assert eight[0].tolist() == [[255] * 3, [200] * 3]
    one = png(tmp_path / "1.png", 1, 0, [b"\xa0"], (b"tRNS", struct.pack(">H", 0)))
    assert (one == 255).all()


def test_tiff_in_which_zero_is_white(tmp_path):
    image = Image.frombytes("I;16", (4, 2), GRAY16.astype("<u2").tobytes())
    assert (
        saved(tmp_path / "x.tif", image, tiffinfo={262: 0}) - (255 - GRAY8[..., None]) == 0
    ).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "RGB"])
def test_jpeg_modes(tmp_path, mode):
    """A CMYK JPEG is stored inverted, with Adobe's marker; what is seen is the colour."""
    color = Image.new("RGB", (16, 16), (40, 90, 200))
    image = color.convert(mode)
    if mode == "CMYK":
        image = Image.new("CMYK", (16, 16), (215, 165, 55, 0))
    seen = saved(tmp_path / "x.jpg", image, quality=100)
    expected = [87, 87, 87] if mode == "L" else [40, 90, 200]
    assert np.abs(seen - expected).max() <= 3
    if mode == "CMYK":
        assert b"Adobe" in (tmp_path / "x.jpg").read_bytes()[:64]


def test_ycck_jpeg(tmp_path):
    """Photoshop's other CMYK: the same bytes read as luma, chroma, chroma, black."""
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (16, 16), (255 - 80, 127, 127, 0)).save(path, quality=100, subsampling=0)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"Adobe") + 11] = 2  # the transform: YCCK
    path.write_bytes(raw)
    assert np.abs(np.asarray(read_image(path)).astype(int) - (255 - 80)).max() <= 3


@pytest.mark.parametrize(
    "tag, turn",
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (6, lambda a: np.rot90(a, -1)),
        (8, np.rot90),
    ],
)
def test_exif_orientation(tmp_path, tag, turn):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x112] = tag
    seen = saved(tmp_path / "x.png", Image.fromarray(pixels), exif=exif)
    assert (seen == turn(pixels)).all()
    wide = Image.frombytes("I;16", (4, 2), GRAY16.astype("<u2").tobytes())
    assert (saved(tmp_path / "y.png", wide, exif=exif)[..., 0] == turn(GRAY8)).all()


def test_animation_gives_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ((250, 0, 0), (0, 250, 0))]
    for ending in ("gif", "png", "webp"):
        seen = saved(
            tmp_path / f"x.{ending}",
            frames[0],
            save_all=True,
            append_images=frames[1:],
            lossless=True,
        )
        assert (seen == [250, 0, 0]).all()


@pytest.mark.parametrize(
    "mode, value, words",
    [
        ("F", 0.5, "x.tif cannot be read as an image: floating point has no known white"),
        ("I", 70000, "x.tif cannot be read as an image: 70000 .. 70000 has no known white"),
        ("I", -5, "-5 .. -5 has no known white"),
    ],
)
def test_numbers_without_a_white(tmp_path, mode, value, words):
    with pytest.raises(ValueError, match=words):
        saved(tmp_path / "x.tif", Image.new(mode, (2, 2), value))


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_truncated_and_missing(tmp_path, ending):
    path = tmp_path / f"x y.{ending}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=f"x y.{ending} cannot be read as an image"):
        read_image(path)
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"x y.{ending} cannot be read as an image"):
        read_image(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"x y.{ending}: there is no such image"):
        read_image(path)


def test_broken_images_are_never_patched_up():
    assert "LOAD_TRUNCATED" not in Path(data.__file__).read_text()


# ---------------------------------------------------------------------------------------- ImageList


@pytest.fixture
def gradient(tmp_path):
    """A 90 x 60 image in which every pixel differs."""
    x, y = np.meshgrid(np.arange(90), np.arange(60))
    Image.fromarray(np.stack([x * 2, y * 4, (x + y)], -1).astype(np.uint8)).save(tmp_path / "g.png")
    return tmp_path


def test_centre_crop_is_exact(gradient):
    image, label = ImageList([Sample("g.png", 3)], gradient, image_size=56)[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 56, 56) and label == 3
    assert image.is_contiguous()
    resized = read_image(gradient / "g.png").resize((96, 64), Image.Resampling.BICUBIC)
    assert (image.permute(1, 2, 0).numpy() == np.asarray(resized)[4:60, 20:76]).all()


def test_no_resampling_when_the_size_fits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image, _ = ImageList([Sample(str(tmp_path / "x.png"), 0)], "elsewhere", image_size=56)[0]
    assert (image.permute(1, 2, 0).numpy() == pixels[4:60, 12:68]).all()


def test_squash_and_bilinear(gradient):
    image, _ = ImageList(
        [Sample("g.png", 0)], gradient, image_size=56, squash=True, resample="bilinear"
    )[0]
    resized = read_image(gradient / "g.png").resize((64, 64), Image.Resampling.BILINEAR)
    assert (image.permute(1, 2, 0).numpy() == np.asarray(resized)[4:60, 4:60]).all()
    with pytest.raises(ValueError, match="resample='nearest'; give bicubic or bilinear"):
        ImageList([], gradient, resample="nearest")


@pytest.mark.parametrize("size", [1, 32, 64, 96, 224, 336])
def test_sizes(gradient, size):
    for train in (False, True):
        image, _ = ImageList([Sample("g.png", 0)], gradient, image_size=size, train=train)[0]
        assert image.shape == (3, size, size)


def test_training_crops_and_mirrors(gradient):
    """Every crop is a window of the resized image, half of them mirrored, all places reached."""
    images = ImageList([Sample("g.png", 0)], gradient, image_size=14, train=True)
    whole = np.asarray(read_image(gradient / "g.png").resize((24, 16), Image.Resampling.BICUBIC))
    windows = {
        whole[top : top + 14, left : left + 14].tobytes(): (top, left, 0)
        for top in range(3)
        for left in range(11)
    }
    windows |= {
        whole[top : top + 14, left : left + 14][:, ::-1].tobytes(): (top, left, 1)
        for top in range(3)
        for left in range(11)
    }
    torch.manual_seed(0)
    seen = [windows[images[0][0].permute(1, 2, 0).numpy().tobytes()] for _ in range(800)]
    assert len(set(seen)) == 66 and 0.45 < np.mean([mirrored for *_, mirrored in seen]) < 0.55


def test_workers_and_seeds(gradient):
    images = ImageList([Sample("g.png", i) for i in range(8)], gradient, image_size=14, train=True)

    def batches(workers, seed):
        loader = torch.utils.data.DataLoader(
            images, 4, num_workers=workers, generator=torch.Generator().manual_seed(seed)
        )
        torch.manual_seed(seed)
        return torch.cat([batch for batch, _ in loader])

    assert batches(0, 1).equal(batches(0, 1)) and not batches(0, 1).equal(batches(0, 2))
    assert batches(2, 1).equal(batches(2, 1)) and len(images) == 8


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    kept = images.clone()
    for mean, std in ((data.CLIP_MEAN, data.CLIP_STD), (data.IMAGENET_MEAN, data.IMAGENET_STD)):
        out = normalize(images, mean, std)
        exact = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(
            std
        ).double().view(3, 1, 1)
        assert out.dtype == torch.float32 and (out - exact).abs().max() < 1e-6
        half = normalize(images, mean, std, torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half.equal(out.bfloat16())
    assert images.equal(kept)


# ---------------------------------------------------------------------------------------- demo


SIZES = (60, 30, 30)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "x" / "demo-v1"
    data._make_demo(folder, SIZES)
    return folder


def pixels(folder):
    return [np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())]


def test_demo(demo):
    task = load("demo", demo)
    assert tuple(map(len, parts_of(task))) == SIZES and task.num_ranks == 30
    assert task.rank_names[0] == "1" and task.rank_values[29] == 30.0
    assert task.protocol == (
        "demo: drawn cross-sections of trees, one fixed split: 60 train / 30 val / 30 test images"
    )
    assert_disjoint(task)
    assert {sample.label for sample in task.train} == set(range(30))
    assert {Path(path).suffix for path in paths(task.train)} == {".jpg", ".png"}
    assert all(image.shape == (96, 96, 3) for image in pixels(demo))
    assert load("demo", demo, seed=5, fold=2) == task
    assert load(demo).train == task.train  # it is laid out as own data
    assert ImageList(task.train, task.root, image_size=64)[0][0].shape == (3, 64, 64)


def test_demo_is_the_same_every_time(demo, tmp_path):
    data._make_demo(tmp_path / "again", SIZES)
    data._make_demo(tmp_path / "other", SIZES, seed=1)
    for part in data.PARTS:
        assert (demo / f"{part}.txt").read_text() == (
            tmp_path / "again" / f"{part}.txt"
        ).read_text()
    assert all(np.array_equal(a, b) for a, b in zip(pixels(demo), pixels(tmp_path / "again")))
    assert not all(np.array_equal(a, b) for a, b in zip(pixels(demo), pixels(tmp_path / "other")))


def test_demo_goes_to_the_cache_and_is_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(data.DATASETS["demo"], "sizes", SIZES)
    task = load("demo")
    assert task.root == tmp_path / "ordinalclip" / "demo-v1" and os.listdir(task.root.parent) == [
        "demo-v1"
    ]
    monkeypatch.setattr(data, "_draw_trunk", None)
    assert load("demo") == task
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(
        data, "_make_demo", lambda root, sizes: (_ for _ in ()).throw(OSError(str(root)))
    )
    with pytest.raises(OSError, match="home/.cache/ordinalclip/demo-v1"):
        load("demo")


def test_demo_interrupted_is_redone(tmp_path, monkeypatch):
    draw, calls = data._draw_file, []

    def stop_at_the_tenth(*job):
        calls.append(job)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return draw(*job)

    monkeypatch.setattr(data, "_draw_file", stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        data._make_demo(tmp_path / "demo", SIZES)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(data, "_draw_file", draw)
    data._make_demo(tmp_path / "demo", SIZES)
    assert len(load("demo", tmp_path / "demo").train) == 60


def test_demo_killed_while_drawing_leaves_nothing_that_is_taken_for_whole(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import data; from pathlib import Path\n"
        "data._write_list = lambda *_: os._exit(9)\n"
        "data._make_demo(Path(sys.argv[2]), (4, 2, 2))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(data.__file__).parent), str(tmp_path / "d")]
    )
    assert done.returncode == 9 and not (tmp_path / "d").exists()
    data._make_demo(tmp_path / "d", SIZES)
    assert len(load("demo", tmp_path / "d").train) == 60


def test_demo_two_at_once(tmp_path, monkeypatch):
    draw = data._draw_parts

    def meanwhile_another(work, sizes, seed):
        monkeypatch.setattr(data, "_draw_parts", draw)
        data._make_demo(tmp_path / "demo", sizes)
        draw(work, sizes, seed)

    monkeypatch.setattr(data, "_draw_parts", meanwhile_another)
    data._make_demo(tmp_path / "demo", SIZES)
    assert os.listdir(tmp_path) == ["demo"] and len(load("demo", tmp_path / "demo").test) == 30


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
        data._make_demo(tmp_path / "new", (2, 1, 1))
    assert sorted(os.listdir(tmp_path)) == ["file", "mine"]


def test_demo_with_an_image_gone_says_so(tmp_path):
    data._make_demo(tmp_path / "d", SIZES)
    next((tmp_path / "d" / "images").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="1 of .* images are not under"):
        load("demo", tmp_path / "d")


def test_demo_rings_can_be_counted():
    """From the pith outwards the brightness of a young tree falls off at the end of each year."""
    rng = np.random.default_rng
    late = [np.diff(data._colors(5, rng(seed))[:2048].sum(1)).clip(min=0) for seed in range(5)]
    for rise in late:
        assert (rise > rise.max() * 0.1).sum() == 4  # jumps back to pale: 5 years, 4 times


# ---------------------------------------------------------------------------------------- check


def run_check(*arguments):
    command = [sys.executable, data.__file__, "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_check(demo, tmp_path, capsys):
    assert data.main(["check", "demo", str(demo)]) == 0
    out = capsys.readouterr().out
    assert "60 train / 30 val / 30 test" in out and "120 of 120 images can be read" in out
    assert re.search(r"^ +30 +\d+ +\d+ +\d+ +\d+$", out, re.MULTILINE)
    root = make_lists(tmp_path / "own")
    (root / "some images" / "val 3.jpg").write_bytes(b"no")
    done = run_check(root)
    assert done.returncode == 1 and "29 of 30 images can be read" in done.stdout
    assert "val 3.jpg cannot be read as an image" in done.stdout


def test_check_names_what_is_wrong(tmp_path, capsys):
    assert data.main(["check", "morph2", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}")
    assert data.main(["check", "nothing"]) == 1


def test_check_says_what_differs_and_writes_the_lists(adience, hci, aesthetics, tmp_path, capsys):
    command = ["check", "adience", str(adience), "--seed", "1", "--label-rule", "merged"]
    assert data.main([*command, "--out", str(tmp_path / "adience")]) == 0
    out = capsys.readouterr().out
    assert "adience: label rule merged, five-fold split, seed 1, fold 0: " in out
    assert "note: images: 210 of 17,470 published\n" in out and "210 of 210 images can be" in out
    assert "note: 30 rows left out, by age: None x 5, " in out
    assert re.search(r"^ +60-100 +\d+ +\d+ +5 +25$", out, re.MULTILINE)
    assert sorted(os.listdir(tmp_path / "adience")) == [f"fold_{fold}" for fold in range(5)]
    lists = [tmp_path / "adience" / "fold_3" / f"{part}.txt" for part in data.PARTS]
    task = load("adience", adience, fold=3, seed=1, label_rule="merged")
    assert parts_of(load("adience", adience, lists=lists)) == parts_of(task)
    assert (lists[0].parent / "ranks.txt").read_text().split() == list(task.rank_names)
    command = ["check", "aesthetics", str(aesthetics), "--category", "urban", "--split", "random"]
    assert data.main([*command, "--out", str(tmp_path / "urban")]) == 0
    out = capsys.readouterr().out
    assert "category urban" in out and "note: images of urban: 21 of 3,639 published" in out
    assert len((tmp_path / "urban" / "fold_4" / "test.txt").read_text().splitlines()) == 5
    assert data.main(["check", "hci", str(hci)]) == 0
    out = capsys.readouterr().out
    assert "note" not in out and re.search("^ +1930s +210 +5 +50 +265$", out, re.MULTILINE)
    assert data.main(["check", "hci", str(hci), "--category", "urban"]) == 1
    assert "error: hci has no category, got 'urban'" in capsys.readouterr().err


def test_check_names_broken_images_of_a_release(tmp_path, capsys):
    root = make_hci(tmp_path, counts=(56,) * 5)
    broken = sorted((root / HCI / "1960s").glob("decade_*"))[0]
    broken.write_bytes(b"no")
    assert data.main(["check", "hci", str(root), "--out", str(tmp_path / "lists")]) == 1
    out = capsys.readouterr().out
    assert f"{broken} cannot be read as an image" in out and "279 of 280 images can be read" in out
    assert "note: images of the 1960s: 56 of 265 published" in out
    assert (tmp_path / "lists" / "fold_9" / "val.txt").is_file()


def test_check_lists_missing_images_and_counts_on(tmp_path, capsys):
    root = make_adience(tmp_path)
    gone = sorted((root / "aligned" / "30@N03").iterdir())[:2]
    for path in gone:
        path.unlink()
    assert data.main(["check", "adience", str(root), "--out", str(tmp_path / "lists")]) == 1
    out, err = capsys.readouterr()
    assert "198 of 200 images can be read" in out and "note: rows: 245 of 19,487 published" in out
    assert all(f"{path}: there is no such image" in out for path in gone)
    assert "2 of 200 images are not under" in err and not (tmp_path / "lists").exists()
    with pytest.raises(FileNotFoundError, match="are not under"):  # only check goes on without them
        load("adience", root)


def test_hci_tells_of_a_name_in_two_decades(tmp_path):
    root = make_hci(tmp_path, counts=(56,) * 5)
    image = sorted((root / HCI / "1930s").glob("decade_*"))[0]
    shutil.copy(image, root / HCI / "1970s" / image.name)
    assert f"1 file name is in more than one decade: {image.name}" in load("hci", root).notes


def test_imports():
    used = set(re.findall(r"^(?:import|from) (\w+)", Path(data.__file__).read_text(), re.MULTILINE))
    assert used - set(sys.stdlib_module_names) == {"numpy", "torch", "PIL"}
