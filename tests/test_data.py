"""pytest tests/test_data.py -- load, the list of datasets, the folder pasted alone, `python -m data`."""

import os
import re
import shutil
from pathlib import Path

import pytest
from data_makers import (
    HCI,
    make_adience,
    make_aesthetics,
    make_folders,
    make_hci,
    make_lists,
    parts_of,
    tiny,
)
from processes import run_python, run_script

import data
from data import load, make_demo
from data.__main__ import main

PACKAGE = Path(data.__file__).parent


@pytest.fixture
def pasted(tmp_path):
    """A folder with nothing of the project but data/*.py."""
    (tmp_path / "alone" / "data").mkdir(parents=True)
    for file in PACKAGE.glob("*.py"):
        shutil.copy(file, tmp_path / "alone" / "data")
    return tmp_path / "alone"


def test_public_names():
    folds = {name: preset["folds"] for name, preset in data.DATASETS.items()}
    assert folds == dict(demo=1, morph2=5, adience=5, aesthetics=5, hci=10)
    assert data.shifted is data.distribution_shift
    for name in (
        "CLIP_MEAN CLIP_STD IMAGENET_MEAN IMAGENET_STD DATASETS PARTS IMAGE_TYPES PATH_COLUMNS "
        "LABEL_COLUMNS Sample Task load read_list read_image few_shot distribution_shift ImageList "
        "normalize to_rgb atomic_write make_demo"
    ).split():
        assert hasattr(data, name), name


def test_a_release_lies_beside_its_file_by_default(pasted):
    """data/hci.py is imported although there is a folder data/hci/."""
    make_hci(pasted / "data" / "hci", counts=(56,) * 5)
    code = (
        "import data; from data.__main__ import main; t = data.load('hci')\n"
        "print(t.root, len(t.test), data.hci.__file__); main(['hci'])"
    )
    process = run_python(code, pasted)
    first_line, *_, last_line = process.stdout.splitlines()
    assert first_line == f"data/hci/{HCI} 250 {pasted / 'data' / 'hci.py'}", process.stderr
    assert last_line == "280 of 280 images can be read"


def test_a_new_dataset_is_one_new_file(pasted):
    (pasted / "data" / "weather.py").write_text(
        "from .files import is_image\n"
        "from .lists import Sample\n"
        "from .task import Options, Task, find_path, make_task\n"
        "PRESET = dict(context='the wind is', rank_names=('calm', 'breeze', 'storm'),\n"
        "              splits=('random',), folds=3)\n"
        "def load(root, options):\n"
        "    photos = find_path(root, ['photos'], 'Ask the weather service for {root}/photos.')\n"
        "    names = sorted(path.name for path in photos.iterdir() if is_image(path))\n"
        "    samples = [Sample(name, 'cbs'.index(name[0])) for name in names]\n"
        "    return make_task('weather', PRESET, photos, [samples, None, None], options)\n"
    )
    process = run_script(["-m", "data", "weather"], pasted)
    assert process.returncode == 1 and "Ask the weather service for data/weather" in process.stderr
    make_folders(pasted / "data" / "weather" / "raw", "cbs", 10)
    (pasted / "data" / "weather" / "photos").mkdir()
    for path in (pasted / "data" / "weather" / "raw").rglob("a*"):
        path.rename(pasted / "data" / "weather" / "photos" / (path.parent.name + path.name))
    process = run_script(["-m", "data", "weather", "--out", "lists"], pasted)
    assert process.returncode == 0, process.stderr
    assert "weather: random split, seed 1, fold 0: 24 train / 3 val / 3 test" in process.stdout
    assert "30 of 30 images can be read" in process.stdout
    assert sorted(os.listdir(pasted / "lists")) == ["fold_0", "fold_1", "fold_2"]


# ---------------------------------------------------------------------------------------- python -m data


def test_check(tmp_path, capsys):
    make_demo(tmp_path / "demo", (60, 30, 30))
    assert main(["demo", "--data-root", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "60 train / 30 val / 30 test" in out and "120 of 120 images can be read" in out
    assert re.search(r"^ +30 +\d+ +\d+ +\d+ +\d+$", out, re.MULTILINE)
    root = make_lists(tmp_path / "own")
    (root / "some images" / "val 3.jpg").write_bytes(b"no")
    process = run_script(["-m", "data", str(root)], PACKAGE.parent)
    assert process.returncode == 1 and "29 of 30 images can be read" in process.stdout
    assert "val 3.jpg cannot be read as an image" in process.stdout


def test_check_names_what_is_wrong(tmp_path, capsys):
    assert main(["morph2", "--data-root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}")
    assert main(["nothing"]) == 1


def test_check_says_what_differs_and_writes_the_lists(tmp_path, capsys):
    adience, hci = make_adience(tmp_path / "a"), make_hci(tmp_path / "h")
    aesthetics = make_aesthetics(tmp_path / "b")
    command = ["adience", "--data-root", str(adience), "--seed", "1", "--label-rule", "merged"]
    assert main([*command, "--out", str(tmp_path / "adience")]) == 0
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
    command = ["aesthetics", "--data-root", str(aesthetics), "--category", "urban"]
    command += ["--split", "random"]
    assert main([*command, "--out", str(tmp_path / "urban")]) == 0
    out = capsys.readouterr().out
    assert "category urban" in out and "note: images of urban: 21 of 3,639 published" in out
    assert len((tmp_path / "urban" / "fold_4" / "test.txt").read_text().splitlines()) == 5
    assert main(["hci", "--data-root", str(hci)]) == 0
    out = capsys.readouterr().out
    assert "note" not in out and re.search("^ +1930s +210 +5 +50 +265$", out, re.MULTILINE)
    assert main(["hci", "--data-root", str(hci), "--category", "urban"]) == 1
    assert "error: hci has no category, got 'urban'" in capsys.readouterr().err


def test_check_names_broken_images_of_a_release(tmp_path, capsys):
    root = make_hci(tmp_path, counts=(56,) * 5)
    broken = sorted((root / HCI / "1960s").glob("decade_*"))[0]
    broken.write_bytes(b"no")
    assert main(["hci", "--data-root", str(root), "--out", str(tmp_path / "lists")]) == 1
    out = capsys.readouterr().out
    assert f"{broken} cannot be read as an image" in out and "279 of 280 images can be read" in out
    assert "note: images of the 1960s: 56 of 265 published" in out
    assert (tmp_path / "lists" / "fold_9" / "val.txt").is_file()


def test_check_lists_missing_images_and_counts_on(tmp_path, capsys):
    root = make_adience(tmp_path)
    missing = sorted((root / "aligned" / "30@N03").iterdir())[:2]
    for path in missing:
        path.unlink()
    assert main(["adience", "--data-root", str(root), "--out", str(tmp_path / "lists")]) == 1
    out, err = capsys.readouterr()
    assert "198 of 200 images can be read" in out and "note: rows: 245 of 19,487 published" in out
    assert all(f"{path}: there is no such image" in out for path in missing)
    assert "2 of 200 images are not under" in err and not (tmp_path / "lists").exists()
    with pytest.raises(FileNotFoundError, match="are not under"):  # only check goes on without them
        load("adience", root)


def test_check_lists_missing_images_of_an_own_table(tmp_path, capsys):
    rows = [f"{i}.png,{i % 4}" for i in range(40)]
    for i in range(38):
        tiny(tmp_path / f"{i}.png", (5 * i, 20, 30))
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert all(f"{tmp_path / name}: there is no such image" in out for name in ("38.png", "39.png"))
    assert "38 of 40 images can be read" in out
    with pytest.raises(FileNotFoundError, match="38.png"):
        load(tmp_path)
