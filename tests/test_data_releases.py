"""pytest tests/test_data_releases.py -- MORPH II, Adience, aesthetics, HCI in their original layout."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_makers import (
    AESTHETICS_TABLE,
    AGES,
    DECADES,
    HCI,
    MAKERS,
    MORPH_TABLE,
    SCORES,
    adience_rows,
    aesthetic_rows,
    all_paths,
    assert_disjoint,
    edit,
    make_adience,
    make_aesthetics,
    make_hci,
    make_morph,
    morph_name,
    morph_rows,
    parts_of,
    paths,
)

import data
from data import ImageList, Sample, load, morph2
from data.task import shuffled


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """{name: folder} of one small release of each dataset, read by many tests, changed by none."""
    folder = tmp_path_factory.mktemp("releases")
    return {name: make(folder / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def morph(releases):
    return releases["morph2"]


@pytest.fixture(scope="module")
def adience(releases):
    return releases["adience"]


@pytest.fixture(scope="module")
def aesthetics(releases):
    return releases["aesthetics"]


@pytest.fixture(scope="module")
def hci(releases):
    return releases["hci"]


@pytest.fixture(scope="module")
def big_morph(tmp_path_factory):
    return make_morph(tmp_path_factory.mktemp("morph") / "release", morph_rows(people=1600))


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


@pytest.mark.parametrize(
    "name, file, old, new, message",
    [
        (
            "morph2",
            MORPH_TABLE,
            ",16,0,,Album2",
            ",17,0,,Album2",
            r"csv:2: age 17, but the name of Album2/009000_0M16.JPG says 16",
        ),
        ("morph2", MORPH_TABLE, ",16,0,,Album2", ",,0,,Album2", r"csv:2: .* age of 0 .. 100 .* ''"),
        ("morph2", MORPH_TABLE, ",16,0,,Album2", ",x,0,,Album2", r"csv:2: .*0 .. 100 .* got 'x'"),
        ("morph2", MORPH_TABLE, ",16,0,,Album2", ",160,0,,Album2", r"csv:2: .* 100 .* got '160'"),
        (
            "morph2",
            MORPH_TABLE,
            ",16,0,,Album2/009000_0M16.JPG",
            ",16,0,,face.JPG",
            r"csv:2: expected .* got '16' and 'face.JPG'",
        ),
        (
            "morph2",
            MORPH_TABLE,
            ",16,0,,Album2/009000_0M16.JPG",
            ",16",
            r"csv:2: expected .* got '16' and ''",
        ),
        (
            "morph2",
            MORPH_TABLE,
            "race,",
            "ethnicity,",
            r"csv:1: no column race; expected the header",
        ),
        ("morph2", MORPH_TABLE, "age,age_diff", "years,age_diff", r"csv:1: no column age"),
        ("morph2", MORPH_TABLE, "glasses,photo", "glasses,picture", r"csv:1: no column photo"),
        (
            "adience",
            "fold_2_data.txt",
            "\tface_id\t",
            "\tface\t",
            "fold_2_data.txt:1: no column face_id; expected the header",
        ),
        (
            "adience",
            "fold_2_data.txt",
            "20@N03\t1039_0_o.jpg\t0",
            "20@N03\t\t0",
            "fold_2_data.txt:2: expected user_id, .* ''",
        ),
        (
            "aesthetics",
            AESTHETICS_TABLE,
            "#flickr_photo_id",
            "#id",
            "tsv:1: no column flickr_photo_id; expected the header",
        ),
        (
            "aesthetics",
            AESTHETICS_TABLE,
            "7000001\tnature",
            "7000001\tsea",
            "tsv:3: expected a photo id, a category .* 'sea'",
        ),
        (
            "aesthetics",
            AESTHETICS_TABLE,
            "7000001\tnature\t2,3",
            "7000001\tnature\t2,6",
            "tsv:3: .* of 1 .. 5, got .*'2,6'",
        ),
        (
            "aesthetics",
            AESTHETICS_TABLE,
            "7000001\tnature\t2,3",
            "7000001\tnature",
            "tsv:3: expected .* ''",
        ),
    ],
)
def test_bad_tables(tmp_path, name, file, old, new, message):
    edit(MAKERS[name](tmp_path / "release") / file, old, new)
    with pytest.raises(ValueError, match=message):
        load(name, tmp_path / "release")


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
    for word in (*words, "--data demo", str(root)):
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


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("adience", dict(fold=5), "adience has no fold 5; give 0 .. 4"),
        ("adience", dict(fold=-1), "adience has no fold -1; give 0 .. 4"),
        ("aesthetics", dict(fold=5), "aesthetics has no fold 5; give 0 .. 4"),
        ("hci", dict(fold=10), "hci has no fold 10; give 0 .. 9"),
        ("adience", dict(split="random"), "no split 'random'; give five-fold"),
        ("hci", dict(split="five-fold"), "hci has no split 'five-fold'; give random"),
        ("adience", dict(label_rule="mean"), "'mean'; give exact or merged or inside"),
        ("aesthetics", dict(label_rule="exact"), "'exact'; give median or mean"),
        (
            "aesthetics",
            dict(category="sea"),
            "aesthetics has no category 'sea'; give all or nature or animal or urban or people",
        ),
        ("hci", dict(category="all"), "hci has no category, got 'all'; leave it out"),
        ("hci", dict(label_rule="mean"), "hci has no label_rule, got 'mean'; leave it out"),
        ("adience", dict(category=""), "adience has no category, got ''; leave it out"),
        ("morph2", dict(label_rule="exact"), "morph2 has no label_rule, got 'exact'"),
    ],
)
def test_options_that_a_dataset_does_not_have(releases, name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, releases[name], **options)


@pytest.mark.parametrize("name", MAKERS)
def test_written_lists_are_read_back(releases, tmp_path, name):
    task = load(name, releases[name], fold=3)
    task.write_lists(tmp_path)
    again = load(name, releases[name], lists=[tmp_path / f"{part}.txt" for part in data.PARTS])
    assert parts_of(again) == parts_of(task) and again.rank_values == task.rank_values
    assert f"{name}: given lists train.txt val.txt test.txt" in again.protocol
    assert (tmp_path / "ranks.txt").read_text().split() == list(task.rank_names)


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
    ages, _, notes = morph2.read_release(table)
    assert len(ages) == 3 and notes == ["1 of 2 people have more than one race in the table"]
    edit(table, "1,06/14/1951", "1,06/14/1971")
    assert morph2.read_release(table)[2] == [
        "1 of 2 people have more than one race in the table",
        "1 of 2 people have more than one dob in the table",
        "1 of 3 rows have an age that their dob and doa contradict",
    ]
    table.write_text("race,age,photo\nW,54,Album2/009000_0M54.JPG\n")
    assert morph2.read_release(table)[2] == []


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
        f"aesthetics: category {category}, label rule median, random split, seed 0, fold 4: "
    )
    assert task.num_ranks == 5 and task.rank_names[2] == "ordinary"
    names = {f"{p}.jpg" for p, k, _ in aesthetic_rows() if category in ("all", k.rstrip("s"))}
    assert all_paths(task) == names


def test_aesthetics_all_is_each_category_split_apart(aesthetics):
    whole, urban = load("aesthetics", aesthetics), load("aesthetics", aesthetics, category="urban")
    assert paths(urban.test) <= paths(whole.test) and paths(urban.val) <= paths(whole.val)
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
    assert len(set(tests)) == 10 and load("hci", hci, seed=1, fold=9).test != task.test
    assert task.rank_names == DECADES and task.rank_values == (1930, 1940, 1950, 1960, 1970)
    assert all(path.startswith(DECADES[label]) for path, label in task.test)
    assert task.root == hci / HCI and task.notes == ()
    assert task.protocol == (
        "hci: random split, seed 0, fold 9: 1,050 train / 25 val / 250 test images"
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
