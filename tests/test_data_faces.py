"""pytest tests/test_data_faces.py -- MORPH II and Adience in their original layout."""

import re
from pathlib import Path

import pytest
from data_makers import (
    AGES,
    MORPH_TABLE,
    adience_rows,
    all_paths,
    assert_disjoint,
    edit,
    make_adience,
    make_morph,
    morph_name,
    morph_rows,
    parts_of,
    paths,
)

from data import ImageList, Sample, load, morph2


@pytest.fixture(scope="module")
def morph(tmp_path_factory):
    return make_morph(tmp_path_factory.mktemp("morph") / "release")


@pytest.fixture(scope="module")
def big_morph(tmp_path_factory):
    return make_morph(tmp_path_factory.mktemp("morph") / "release", morph_rows(people=1600))


@pytest.fixture(scope="module")
def adience(tmp_path_factory):
    return make_adience(tmp_path_factory.mktemp("adience") / "release")


# ---------------------------------------------------------------------------------------- morph2


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
    assert all_paths(task) == whites
    assert (
        "all 150 (of 5,492 wanted) images of race W, random split, seed 1, fold 0" in task.protocol
    )
    assert "\n" not in task.protocol
    assert re.search(r"\d+ of 101 ranks have no training image \(0, 1, 2, \.\.\.\)", task.protocol)


def test_morph_folds_and_seeds(morph, big_morph):
    tests = [
        paths(load("morph2", morph, fold=fold, seed=seed).test)
        for fold, seed in [(0, 0), (1, 0), (0, 1), (0, 0)]
    ]
    assert tests[0] == tests[3] and tests[0] != tests[1] and tests[0] != tests[2]
    subsets = [
        all_paths(load("morph2", big_morph, fold=fold, seed=seed))
        for fold, seed in [(0, 0), (1, 0), (0, 1)]
    ]
    assert subsets[0] == subsets[1] != subsets[2]  # the draw depends on the seed alone
    assert load("morph2", morph, fold=7).protocol != load("morph2", morph).protocol


def test_morph_subject_exclusive(morph, big_morph):
    for root in (morph, big_morph):
        task = load("morph2", root, split="subject-exclusive", fold=3)
        people = [{Path(path).name[:6] for path in paths(part)} for part in parts_of(task)]
        assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])
        total = sum(map(len, parts_of(task)))
        assert len(task.test) == pytest.approx(total * 0.2, rel=0.15)
        assert len(task.val) == pytest.approx(total * 0.08, rel=0.4)
        assert "subject-exclusive split" in task.protocol
    assert all_paths(load("morph2", big_morph)) == all_paths(task)  # over the same drawn images


def test_morph_random_split_is_by_image(big_morph):
    task = load("morph2", big_morph)
    train, test = ({path[:13] for path in paths(part)} for part in (task.train, task.test))
    assert train & test


def test_morph_extension_case_on_disk(tmp_path):
    root = make_morph(tmp_path / "m", on_disk=lambda name: name.replace(".JPG", ".jpg"))
    task = load("morph2", root)
    assert all(sample.path.endswith(".jpg") for sample in task.train)
    assert ImageList(task.train, task.root, image_size=8)[0][0].shape == (3, 8, 8)


LIST_FORMATS = {  # header, line by image name, gender, age
    "path label": ("", "Album2/{name} {age}\n"),
    "setting A, spaces": (
        "race gender age filename database\r\n",
        "0 {male} {age} {name} morph\r\n",
    ),
    "setting A, commas": (
        ",race,gender,age,filename,database\r\n",
        "{i},0,{male},{age},{name},morph\r\n",
    ),
    "setting 3, tabs": ("filename\tfold\tage\tdatabase\n", "{name}\t0\t{age}\tmorph\n"),
    "elsewhere": ("", "../../datasets/Morph/image/{name} {age}\n"),
}


def morph_list(folder, rows, list_format="path label"):
    header, line = LIST_FORMATS[list_format]
    lines = [
        line.format(i=i, name=morph_name(p, n, g, a), male=int(g == "M"), age=a)
        for i, (p, n, _, g, a) in enumerate(rows)
    ]
    path = folder / f"{list_format.replace(' ', '_').replace(',', '')}_{len(rows)}_{rows[0][0]}.txt"
    path.write_text(header + "".join(lines), newline="")
    return path


@pytest.mark.parametrize("list_format", LIST_FORMATS)
def test_morph_public_lists(morph, tmp_path, list_format):
    rows = morph_rows()
    train, test = (morph_list(tmp_path, part, list_format) for part in (rows[:100], rows[100:]))
    task = load("morph2", morph, lists=(train, None, test))
    assert [len(part) for part in parts_of(task)] == [90, 10, 100]
    assert_disjoint(task)
    assert paths(task.test) == {f"Album2/{morph_name(p, n, g, a)}" for p, n, _, g, a in rows[100:]}
    assert {sample.label for sample in task.test} == {a for *_, a in rows[100:]}
    assert f"given lists {train.name} {test.name}" in task.protocol and not task.val_is_test


def test_morph_lists_with_val_equal_to_test_and_overlap(morph, tmp_path):
    rows = morph_rows()
    train, test = (morph_list(tmp_path, part) for part in (rows[:100], rows[90:]))
    task = load("morph2", morph, lists=(train, test, test))
    assert task.val_is_test and "VAL IS TEST" in task.protocol and task.val == task.test
    assert "10 images are in both train and val" in task.protocol
    assert "10 images are in both train and test" in task.protocol
    assert load("morph2", morph, lists=(str(train), str(test), None)).val_is_test
    other = morph_list(tmp_path, rows[150:])
    assert (
        "50 images are in both val and test"
        in load("morph2", morph, lists=(train, test, other)).protocol
    )


def test_morph_list_disagrees_with_the_release(morph, tmp_path):
    bad = tmp_path / "bad.txt"
    for text, message in [
        (
            "# two\n009000_0M16.JPG 16\n009000_0M16.JPG 18\n",
            r"bad.txt:3: 009000_0M16.JPG with age 18, but it has age 16",
        ),
        ("009001_0M16.JPG 16\n", r"bad.txt:1: 009001_0M16.JPG with age 16, but it is not in"),
    ]:
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            load("morph2", morph, lists=(bad, None, None))
    bad.write_text("009000_0M16.JPG 16\n")
    with pytest.raises(ValueError, match="no list or folder of training images"):
        load("morph2", morph, lists=(None, None, bad))


def test_morph_empty_table_and_no_white_person(tmp_path):
    table = edit(make_morph(tmp_path, morph_rows(6)) / MORPH_TABLE, ",W,", ",B,")
    with pytest.raises(ValueError, match="0 train / 0 val / 0 test images, and none may be empty"):
        load("morph2", tmp_path)
    table.write_text("")
    with pytest.raises(ValueError, match="csv:1: no column age, photo, race"):
        load("morph2", tmp_path)


def test_morph_contradictions(tmp_path):
    rows = [(9000, 0, "W", "M", 54), (9000, 1, "B", "M", 54), (9007, 0, "W", "F", 53)]
    table = make_morph(tmp_path, rows) / MORPH_TABLE
    photos, notes = morph2.read_release(table)
    assert len(photos) == 3 and notes == ["1 of 2 people have more than one race in the table"]
    edit(table, "1,06/14/1951", "1,06/14/1971")
    assert morph2.read_release(table)[1] == [
        "1 of 2 people have more than one race in the table",
        "1 of 2 people have more than one dob in the table",
        "1 of 3 rows have an age that their dob and doa contradict",
    ]
    table.write_text("race,age,photo\nW,54,Album2/009000_0M54.JPG\n")
    assert morph2.read_release(table)[1] == []


# --------------------------------------------------------------------------------------- adience

STRAY_RANKS = {
    "exact": [],
    "merged": [4, 4],
    "inside": [2, 4, 4, 0],  # 13, (25, 23), (27, 32) and 2
}


def test_adience_folds_are_published_ones_and_keep_people_apart(adience):
    tests = []
    for fold in range(5):
        task = load("adience", adience, fold=fold)
        assert [len(part) for part in parts_of(task)] == pytest.approx([147, 17, 41], abs=1)
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
        f"adience: label rule exact, five-fold split, seed 1, fold 4: {len(task.train)} train / "
        f"{len(task.val)} val / 41 test images"
    )
    assert load("adience", adience, fold=4, seed=2).val != task.val
    assert load("adience", adience, fold=4, seed=2).test == task.test


@pytest.mark.parametrize("rule", STRAY_RANKS)
def test_adience_label_rules(adience, rule):
    task = load("adience", adience, label_rule=rule, split="five-fold")
    labels = [sample.label for sample in task.test]
    expected = [*range(8)] * 5 + STRAY_RANKS[rule] + [0] * (rule != "merged")
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
def test_adience_other_folders(tmp_path, tables):
    root = make_adience(tmp_path, tables, "faces", "coarse_tilt_aligned_face")
    task = load("adience", root)
    assert task.root == root / "faces"
    assert task.test[1].path == "01@N03/coarse_tilt_aligned_face.1.1039_1_o.jpg"
    assert ImageList(task.train, task.root, image_size=8)[0][0].shape == (3, 8, 8)


def test_adience_contradictions(tmp_path):
    root = make_adience(tmp_path)
    table = root / "fold_3_data.txt"
    lines = table.read_text().split("\n")
    lines[-2] = lines[-2].replace("(0, 2)", "(4, 6)")
    table.write_text("\n".join(lines))
    with (root / "fold_4_data.txt").open("a") as file:
        file.write(lines[1] + "\n")
    notes = load("adience", root).notes
    pattern = "1 image has rows of different ranks: 3.@N03/landmark.*"
    assert any(re.fullmatch(pattern, note) for note in notes)
    assert f"1 person is in more than one fold: {lines[1].split(chr(9))[0]}" in notes


def test_adience_published_lists(adience, tmp_path):
    rows = [row for fold in (0, 1) for row in adience_rows(fold) if row[3] in AGES]
    for name, subset in (("age_train.txt", rows[41:]), ("age_test.txt", rows[:41])):
        (tmp_path / name).write_text(
            "".join(
                f"{user}/landmark_aligned_face.{face}.{image} {AGES.index(age)}\n"
                for user, image, face, age in subset
            )
        )
    lists = (tmp_path / "age_train.txt", None, tmp_path / "age_test.txt")
    task = load("adience", adience, lists=lists)
    assert paths(task.test) == paths(load("adience", adience).test) and len(task.train) > 30
    assert "adience: given lists age_train.txt age_test.txt: " in task.protocol
    (tmp_path / "age_test.txt").write_text("00@N03/landmark_aligned_face.0.1039_0_o.jpg 8\n")
    with pytest.raises(ValueError, match=r"age_test.txt:1: label 8, but .* 0 .. 7 \(8 ranks\)"):
        load("adience", adience, lists=lists)
