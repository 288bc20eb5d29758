"""pytest tests/test_data_labels.py -- labels in file names and in bins, ranks within limits, groups."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import TINY
from data_makers import assert_disjoint, make_folders, parts_of, tiny

import data
import train
from data import load
from data.__main__ import main
from evaluation.metrics import mae_in_unit

UTKFACE = r"^(\d+)_"
FGNET = r"(?i)^(?P<group>\d+)A(?P<label>\d+)"
AGEDB = r"^\d+_(?P<group>.+)_(?P<label>\d+)_[mf]"


def make_utkface(root, ages=(1, 25, 26, 30, 116), count=10):
    """As released: age_gender_race_date.jpg.chip.jpg; of a few the race is missing."""
    for age in ages:
        for i in range(count):
            race = f"{i % 5}_" if i else ""
            tiny(root / f"{age}_{i % 2}_{race}20170116174525{i:03}.jpg.chip.jpg", (2 * age,) * 3)
    return root


def make_fgnet(root, people=6, ages=(2, 5, 8, 43)):
    """As released: images/001A02.JPG, a letter where a person has several of an age, points/."""
    for person in range(1, people + 1):
        for age in ages:
            letter = "a" if age == 43 else ""
            tiny(root / "images" / f"{person:03}A{age:02}{letter}.JPG", (5 * age, person, 0))
    (root / "points").mkdir()
    (root / "points" / "001a02.pts").write_text("version: 1\n")
    return root


def make_afad(root, ages=(15, 16, 18, 40, 75)):
    """As released: <age>/111 (male) and 112 (female); a list of all images beside the ages."""
    for age in ages:
        for gender in (111, 112):
            for i in range(5):
                tiny(root / str(age) / str(gender) / f"{age}{i}-0.jpg", (3 * age, gender, i))
    (root / "AFAD-Full.txt").write_text("./15/111/150-0.jpg\n")
    return root


def make_table(root, header, rows, name="labels.csv"):
    """Images with a table of (image, *cells)."""
    for i, (image, *_) in enumerate(rows):
        tiny(root / image, (9 * i % 255, i, 0))
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    (root / name).write_text("\n".join(lines) + "\n")
    return root


def people_rows(count=5, images=4):
    """(image, weight, person): real labels 0.25 .. 9.75 or so."""
    return [
        (f"p{person} {i}.jpg", 0.25 + (person * images + i) / 2, f"0{person}")
        for person in range(count)
        for i in range(images)
    ]


def counts(part, num_ranks):
    return np.bincount([sample.label for sample in part], minlength=num_ranks).tolist()


# --- labels in file names, ranks within limits ---


def test_labels_in_file_names_are_split_as_folders_are(tmp_path):
    root = make_utkface(tmp_path / "UTKFace")
    tiny(root / "face.jpg")
    tiny(root / ".hidden" / "7_0_0_2017.jpg")
    (root / "README").write_text("x")
    task = load(root, label_pattern=UTKFACE, seed=3)
    assert task.rank_names == ("1", "25", "26", "30", "116")
    assert task.rank_values == (1, 25, 26, 30, 116)
    for part, count in zip(parts_of(task), (8, 1, 1)):
        assert counts(part, 5) == [count] * 5
    assert_disjoint(task)
    assert all(task.rank_names[rank] == path.split("_")[0] for path, rank in task.train)
    assert task.protocol == (
        r"UTKFace: own folders, split by seed 3, fold 0: 40 train / 5 val / 5 test images; "
        r"label pattern ^(\d+)_; 1 images that the pattern does not match left out, such as "
        "'face.jpg'; 1 files of other types left out (no suffix 1)"
    )
    assert load(root, label_pattern=UTKFACE, seed=3, fold=1).test != task.test


def test_ranks_within_limits(tmp_path):
    root = make_utkface(tmp_path / "UTKFace")
    task = load(root, label_pattern=UTKFACE, ranks="0-116")
    assert task.num_ranks == 117 and task.rank_names[25] == "25" and task.targets("test") is None
    assert all(path.startswith(f"{rank}_") for path, rank in task.train)
    task = load(root, label_pattern=UTKFACE, ranks="21-60")
    assert task.rank_names[0] == "21" and task.rank_names[-1] == "60"
    assert sum(map(len, parts_of(task))) == 30
    assert "20 images with labels outside 21 .. 60 left out (1" in task.protocol


def test_folders_within_limits_as_afad_lies(tmp_path):
    root = make_afad(tmp_path / "AFAD-Full")
    task = load(root, ranks="15-40")
    assert task.num_ranks == 26 and sum(map(len, parts_of(task))) == 40
    assert all(path.split("/")[0] == task.rank_names[rank] for path, rank in task.train)
    assert "10 images with labels outside 15 .. 40 left out (75 of 75/111/7" in task.protocol
    assert load(root).rank_names == ("15", "16", "18", "40", "75")


def test_labels_in_file_names_of_parts_and_of_folders(tmp_path):
    for part in ("train", "test"):
        make_utkface(tmp_path / "own" / part)
    task = load(tmp_path / "own", label_pattern=UTKFACE)
    assert [len(part) for part in parts_of(task)] == [45, 5, 50]
    assert all(path.startswith("test/") for path, _ in task.test)
    for i in range(40):  # with a / in it, the pattern is searched in the path
        tiny(tmp_path / "people" / f"anna {i % 4}" / f"{i % 2 + 3} years {i}.jpg")
    task = load(tmp_path / "people", label_pattern=r"^(?P<group>[^/]+)/(\d+)")
    assert task.rank_names == ("3", "4") and task.num_groups == 4


def test_names_of_ranks_in_file_names_take_their_order_from_ranks_txt(tmp_path):
    names = ("tre\u0300s bad", "good")  # an accent apart from its letter, as on macOS
    for i in range(40):
        tiny(tmp_path / f"{names[i % 2]} {i}.jpg")
    (tmp_path / "ranks.txt").write_text("tr\u00e8s bad\ngood\n", "utf-8")
    task = load(tmp_path, label_pattern=r"^(\D+) ")
    assert task.rank_names == ("tr\u00e8s bad", "good") and len(task.train) == 32


@pytest.mark.parametrize("name, pattern", [("0_MariaCallas_35_f.jpg", AGEDB), ("001A02.JPG", FGNET),
                                           ("010a07b.jpg", FGNET)])  # fmt: skip
def test_names_of_releases(tmp_path, name, pattern):
    labels, unmatched = data.folder.match_names([tmp_path / name], tmp_path, pattern)
    expected = {"0": ("35", "MariaCallas"), "00": ("2", "001"), "01": ("7", "010")}
    expected = expected[name[: 1 + (pattern == FGNET)]]
    assert labels == {tmp_path / name: expected} and not unmatched


# --- groups ---


def people_of(part):
    return {path.split("/")[-1][:3] for path, _ in part}


def test_no_person_is_in_two_parts(tmp_path):
    root = make_fgnet(tmp_path / "FGNET", people=20)
    task = load(root, label_pattern=FGNET, ranks="0-69")
    people = [people_of(part) for part in parts_of(task)]
    assert [len(group) for group in people] == [16, 2, 2] and len(set.union(*people)) == 20
    assert task.num_groups == 20 and "; 20 groups, none in two parts" in task.protocol
    assert task.protocol.endswith(
        "1 files of other types left out (.pts 1); 20 groups, none in two parts"
    )
    assert load(root, label_pattern=FGNET, ranks="0-69", fold=1).test != task.test


def test_each_person_is_left_out_once(tmp_path):
    root, tests = make_fgnet(tmp_path / "FGNET", people=3), []
    options = dict(label_pattern=FGNET, split="leave-one-group-out")
    for fold in range(3):
        task = load(root, fold=fold, **options)
        assert [len(people_of(part)) for part in parts_of(task)] == [1, 1, 1]
        assert_disjoint(task)
        assert f"; test group '00{fold + 1}'" in task.protocol
        tests += people_of(task.test)
    assert tests == ["001", "002", "003"]
    with pytest.raises(ValueError, match=r"FGNET has no fold 3; give 0 .. 2$"):
        load(root, fold=3, **options)
    tiny(root / "images" / "004A99.JPG")  # outside: no fold of its own
    assert load(root, ranks="0-69", **options).num_groups == 3
    assert main([str(root), "--label-pattern", FGNET, "--split", "leave-one-group-out",
                 "--out", str(tmp_path / "lists")]) == 0  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "lists").iterdir()) == [
        "fold_0", "fold_1", "fold_2", "fold_3"
    ]  # fmt: skip


def test_a_column_names_the_person(tmp_path):
    root = make_table(tmp_path / "own", "file,rank,Person ID", [
        (image, i % 4, person) for i, (image, _, person) in enumerate(people_rows())
    ])  # fmt: skip
    task = load(root, group="person id")
    assert [len({path[:2] for path, _ in part}) for part in parts_of(task)] == [3, 1, 1]
    (root / "labels.csv").rename(tmp_path / "all.csv")
    listed = load(root, group="person id", lists=(tmp_path / "all.csv", None, None))
    assert parts_of(listed) == parts_of(task) and listed.num_groups == 5
    out = load(root, group="person id", lists=(tmp_path / "all.csv", None, None), fold=2,
               split="leave-one-group-out")  # fmt: skip
    assert {path[:2] for path, _ in out.test} == {"p2"} and "test group '02'" in out.protocol


def test_the_column_of_lists_of_all_parts_is_a_check(tmp_path):
    rows = [(image, i % 4, person) for i, (image, _, person) in enumerate(people_rows(3))]
    for part, person in (("train", 0), ("val", 1), ("test", 2)):
        make_table(tmp_path / "own", "path,label,who", rows[4 * person :][:4], f"{part}.csv")
    task = load(tmp_path / "own", group="who")
    assert [len(part) for part in parts_of(task)] == [4, 4, 4]
    assert "; 3 groups, none in two parts" in task.protocol
    (tmp_path / "own" / "val.csv").unlink()
    with pytest.raises(ValueError, match="own: 0 train / 4 val / 4 test images, and none may be"):
        load(tmp_path / "own", group="who")  # one person is left, and cannot be in two parts


@pytest.mark.parametrize("spellings", [("5", "05"), ("7", "7.0"), ("Anna", "anna"),
                                       ("caf\u00e9", "cafe\u0301")])  # fmt: skip
def test_a_person_in_two_spellings_is_one(tmp_path, spellings):
    rows = [(image, i % 2, person) for i, (image, _, person) in enumerate(people_rows(3))]
    odd = [(f"odd {i}.jpg", i % 2, spellings[i % 2]) for i in range(4)]
    root = make_table(tmp_path / "own", "path,label,who", rows[4:] + odd)
    task = load(root, group="who")
    assert task.num_groups == 3 and "; 1 groups have several spellings, such as " in task.protocol
    assert sorted(sum("odd" in path for path, _ in part) for part in parts_of(task)) == [0, 0, 4]
    for part, row in (("train", odd[0]), ("test", odd[1])):
        make_table(tmp_path / "two", "path,label,who", [row], f"{part}.csv")
    with pytest.raises(ValueError, match="is in both .* and test; move"):
        load(tmp_path / "two", group="who", ranks="0-1")


# --- real-valued labels ---


@pytest.mark.parametrize("bins, names", [
    ("2", ["0.25 to 5", "5 to 9.75"]),
    ("3", ["0.25 to 3.417", "3.417 to 6.583", "6.583 to 9.75"]),
    ("-1,0.5,2.75,1e1", ["-1 to 0.5", "0.5 to 2.75", "2.75 to 10"]),
])  # fmt: skip
def test_bins(tmp_path, bins, names):
    rows = people_rows()
    task = load(make_table(tmp_path / "own", "path,value,who", rows), bins=bins)
    edges = [[float(end) for end in name.split(" to ")] for name in names]
    assert list(task.rank_names) == names
    assert task.rank_values == pytest.approx([(low + high) / 2 for low, high in edges])
    values = {image: value for image, value, _ in rows}
    for part in data.PARTS:
        for (path, rank), target in zip(getattr(task, part), task.targets(part), strict=True):
            assert target == values[path]
            low, high = edges[rank]
            assert low <= target < high or target == high == edges[-1][1]
    assert f"; bins {bins}" in task.protocol


def test_limits_of_bins_and_values_outside(tmp_path):
    root = make_table(tmp_path / "own", "path,value,who", people_rows())
    task = load(root, bins="4", ranks="0-8")
    assert task.rank_names == ("0 to 2", "2 to 4", "4 to 6", "6 to 8")
    assert "4 images with labels outside 0 .. 8 left out (8.25 of p4 0.jpg, " in task.protocol
    assert sum(map(len, parts_of(task))) == 16


def test_lists_of_real_labels_and_of_ages(tmp_path):
    rows = people_rows()
    make_table(tmp_path / "own", "path,score", [row[:2] for row in rows], "train.csv")
    task = load(tmp_path / "own", bins="2")
    assert counts(task.train, 2) == [8, 8] and task.protocol.startswith("own: own lists train.csv:")
    ages = [(image, 16 + 2 * i) for i, (image, _, _) in enumerate(rows)]
    make_table(tmp_path / "own", "path,age", ages, "train.csv")
    task = load(tmp_path / "own", ranks="16-77")
    assert task.rank_names[0] == "16" and task.num_ranks == 62
    assert task.train[0].label == dict(ages)[task.train[0].path] - 16
    task = load(tmp_path / "own", ranks="present")
    assert task.rank_names == tuple(str(age) for _, age in ages) and task.rank_values[1] == 18


def test_written_lists_give_bins_back(tmp_path):
    root = make_table(tmp_path / "own", "path,value,who", people_rows())
    task = load(root, bins="3", group="who")
    task.write_lists(tmp_path / "run")
    again = load(root, lists=[tmp_path / "run" / f"{part}.txt" for part in data.PARTS])
    assert parts_of(again) == parts_of(task) and again.rank_names == task.rank_names
    assert again.rank_values == task.rank_values and again.real_labels == task.real_labels
    (tmp_path / "run" / "real_labels.txt").write_text(f"{task.train[0].path} 1.5\n")
    message = f"real_labels.txt lacks {task.train[1].path}; restore it, or remove it"
    with pytest.raises(ValueError, match=message):
        load(root, lists=[tmp_path / "run" / f"{part}.txt" for part in data.PARTS])


def test_mae_in_the_unit_of_the_labels():
    probs, values = torch.tensor([[1, 0, 0], [0, 0.5, 0.5]]), torch.tensor([1.0, 4.0, 10.0])
    assert mae_in_unit(probs, values, torch.tensor([3.0, 8.0])) == (2 + 1) / 2


# --- one command each ---


def test_a_run_on_names_with_gaps_says_mae_in_years(tmp_path, capsys):
    root = make_utkface(tmp_path / "UTKFace")
    argv = ["--data", str(root), "--label-pattern", UTKFACE, *TINY, "--out", str(tmp_path / "run")]
    results = train.main(argv)
    rows = list(csv.DictReader((tmp_path / "run" / "predictions-best.csv").open()))
    errors = [abs(float(row["expected_value"]) - float(row["label_value"])) for row in rows]
    assert results["test"]["mae_value"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert all(row["label_value"] == f"{row['path'].split('_')[0]}.0" for row in rows)
    assert f"MAE in the unit of the labels {results['test']['mae_value']:.4g} (always" in (
        capsys.readouterr().out
    )
    assert "in the unit of the labels" in train.main(["--report", str(tmp_path / "run")])


def test_a_run_on_bins_is_tested_again_and_exported(tmp_path):
    root = make_table(tmp_path / "own", "path,value,who", people_rows(10))
    run_dir = tmp_path / "run"
    results = train.main(["--data", str(root), "--bins", "0,2,5,30", *TINY, "--out", str(run_dir)])
    assert results["val"]["mae_value"] and "val_mae_value" in (run_dir / "log.csv").read_text()
    majority = results["majority"]
    assert majority["rank"] == "5 to 30" and majority["mae_value"] > 0
    assert (run_dir / "splits" / data.task.REAL_LABELS).exists()
    again = train.main(["--eval", str(run_dir)])
    assert again["test"] == pytest.approx(results["test"], nan_ok=True)
    assert torch.load(run_dir / "exported.pt")["rank_values"] == [1, 3.5, 17.5]
    (run_dir / "results.json").unlink()
    assert train.main(["--resume", str(run_dir)])["test"] == pytest.approx(results["test"])


def test_leave_one_person_out_is_one_command(tmp_path):
    root = make_fgnet(tmp_path / "FGNET", people=3)
    argv = ["--data", str(root), "--label-pattern", FGNET, "--ranks", "0-69", *TINY]
    argv += ["--split", "leave-one-group-out", "--fold", "all", "--out", str(tmp_path / "runs")]
    results = train.main(argv)
    for run, person in zip(results, ("001", "002", "003"), strict=True):
        assert f"; test group '{person}'" in run["protocol"]
    assert train.main(argv) == [
        json.loads(json.dumps(run)) for run in results
    ]  # read, not run again


def test_a_run_on_folders_within_limits(tmp_path):
    root = make_afad(tmp_path / "AFAD-Full")
    argv = ["--data", str(root), "--ranks", "15-40", *TINY, "--out", str(tmp_path / "run")]
    assert "mae_value" not in train.main(argv)["test"]  # ranks are years


# --- bad use ---

PARENTHESES = (
    "expected one capture group, or (?P<label>...), and perhaps (?P<group>...); write (?:...) for "
    "other parentheses"
)
NUMBER = "expected a number of bins, 2 .. 10,000, or rising edges such as 0,1.5,3,10"
LIMITS = "expected whole numbers LOW-HIGH, at most 10,000 ranks, such as 16-77, or present"
BAD = [  # (folder, options, message)
    ("names", dict(label_pattern="("), "label pattern '(' is no regular expression: missing ), "
     "unterminated subpattern at position 0"),
    ("names", dict(label_pattern="^_"), f"label pattern '^_': {PARENTHESES}"),
    ("names", dict(label_pattern="(.)_(.)"), f"label pattern '(.)_(.)': {PARENTHESES}"),
    ("names", dict(label_pattern="(?P<age>.)"), f"label pattern '(?P<age>.)': {PARENTHESES}"),
    ("names", dict(label_pattern="(?P<group>.)"), f"label pattern '(?P<group>.)': {PARENTHESES}"),
    ("names", dict(label_pattern="^x(.)"), "{root}: the label pattern matches no name of 20 images, "
     "such as '1_0.jpg', '1_1.jpg', '1_2.jpg'"),
    ("empty", dict(label_pattern="(.)"), "{root}: the label pattern matches no name (no images)"),
    ("names", dict(label_pattern=UTKFACE, group="x"), "group column 'x', but a label pattern: write "
     "(?P<group>...) in it"),
    ("names", dict(label_pattern=UTKFACE, ranks="50-60"), "20 labels are not within 50 .. 60, such as "
     "1 of 1_0.jpg, 1 of 1_1.jpg, 1 of 1_2.jpg"),
    ("names", dict(label_pattern="(jpg)$"), "{root}: the order of rank 'jpg' is not known; "
     "name the ranks in {root}/ranks.txt, one a line, lowest first"),
    ("names", dict(label_pattern="^(1)_"), "{root}: 1 rank, but ordinal regression needs 2 or more"),
    ("names", dict(label_pattern="(jpg)", ranks="1-2"),
     "label 'jpg' of 1_0.jpg is no number, as ranks and bins need"),
    ("names", dict(label_pattern=UTKFACE, split="leave-one-group-out"), "{root}: split "
     "leave-one-group-out needs a group column, or (?P<group>...) in the label pattern"),
    *(("table", dict(ranks=ranks), f"ranks {ranks!r}: {LIMITS}")
      for ranks in ("x", "9-1", "1-1", "5", "1.5-9", "0-10000", "1-2-3")),
    *(("table", dict(bins=bins), f"bins {bins!r}: {NUMBER}")
      for bins in ("x", "1", "0", "-3", "2.5", "1,2", "3,2,1", "1,1,2", "1,,2", "10001", "nan")),
    ("table", dict(bins="1,2,3", ranks="1-3"),
     "ranks '1-3' has no effect with bins '1,2,3'; remove it"),
    ("table", dict(bins="3", ranks="present"),
     "ranks 'present' has no effect with bins '3'; remove it"),
    ("table", dict(ranks="0-9"), "label 0.25 of p0 0.jpg is no whole number; give bins"),
    ("table", dict(group="x"), "{root}/labels.csv:1: expected a header with the columns path and x; "
     "got 'path,value,who'"),
    ("same", dict(bins="3"), "bins '3', but all labels are 3; give their edges"),
    ("train", dict(bins="1,2,3"), "16 labels are not within 1 .. 3, such as 0.25 of p0 0.jpg, "
     "0.75 of p0 1.jpg, 3.25 of p1 2.jpg"),
    ("train", dict(ranks="0-9"), "label 0.25 of p0 0.jpg is no whole number; give bins"),
    ("train", dict(label_pattern=UTKFACE),
     "{root}/train.csv has the labels, a label pattern has no effect; remove one"),
    ("train", {}, "{root}/train.csv:2: label '0.25' is no whole number; labels are ranks, counted "
     "from 0 (own images: see --ranks, --bins)"),
    ("who", dict(group="who", bins="2"),
     "{root}/train.csv:3: expected an image path and a label and a who, got 'a.jpg,2,'"),
    ("twice", dict(group="who"), "{root}: group 'anna' is in both train and test; move its images "
     "into one part"),
    ("twice", dict(group="who", split="leave-one-group-out"),
     "{root} has parts of its own, so split leave-one-group-out is not made"),
    ("folders", dict(group="who"), "{root} has no table with the group column 'who'"),
    ("folders", dict(bins="2"), "label 'bad' of bad/a 0.PNG is no number, as ranks and bins need"),
    ("ranks", dict(bins="2"), "{root}: ranks.txt names the ranks; remove it, or ranks and bins"),
    ("ranks", dict(ranks="1-2"), "{root}: ranks.txt names the ranks; remove it, or ranks and bins"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad_folders(tmp_path_factory):
    root, rows = tmp_path_factory.mktemp("bad"), people_rows()
    (root / "empty").mkdir()
    for name in (f"{age}_{i}.jpg" for age in (1, 2) for i in range(10)):
        tiny(root / "names" / name)
    make_table(root / "table", "path,value,who", rows)
    make_table(root / "train", "path,value,who", rows, "train.csv")
    make_table(root / "same", "path,value", [(image, 3) for image, _, _ in rows])
    make_table(root / "who", "path,label,who", [("b.jpg", 1, "x"), ("a.jpg", 2, "")], "train.csv")
    for part in ("train", "test"):
        two = [(f"{part}{i}.jpg", i, "anna" if i else part) for i in range(2)]
        make_table(root / "twice", "path,label,who", two, f"{part}.csv")
    for name in ("folders", "ranks"):
        make_folders(root / name, ["good", "bad"], 2)
    (root / "ranks" / "ranks.txt").write_text("bad\ngood\n")
    return root


@pytest.mark.parametrize("folder, options, message", BAD)
def test_bad_use_is_named_in_one_line(bad_folders, folder, options, message):
    root = bad_folders / folder
    with pytest.raises(ValueError) as error:
        load(root, **options)
    text = str(error.value)
    assert text == message.replace("{root}", str(root)) and "\n" not in text


def test_bad_use_on_the_command_line(bad_folders, tmp_path):
    argv = ["--data", str(bad_folders / "names"), *TINY, "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as error:
        train.main([*argv, "--label-pattern", "^_"])
    assert error.value.code == f"train.py: label pattern '^_': {PARENTHESES}"
    with pytest.raises(SystemExit, match="--bins is empty; give a value, or leave it out"):
        train.main([*argv, "--bins="])
    with pytest.raises(SystemExit, match="train.py: bins '-1,0': expected a number of bins"):
        train.main([*argv, "--label-pattern", UTKFACE, "--bins=-1,0"])
    assert not (tmp_path / "run").exists()
