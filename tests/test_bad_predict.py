"""pytest tests/test_bad_predict.py -- predict.py on input that is wrong: one line, nothing lost."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from processes import run_python

import predict

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def exported(finished_run):
    return str(finished_run[0] / "exported.pt")


@pytest.fixture
def photo(stripes, tmp_path, monkeypatch):
    """In the current folder, which holds nothing else."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(stripes / "1 stripes" / "image 0.png", "a.png")
    return "a.png"


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.fixture
def no_model(monkeypatch):
    """What is wrong is said before the model is loaded."""
    monkeypatch.setattr(predict, "load", lambda *_: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ([""], "images is empty; give a value, or leave it out"),
        (["a.png", " "], "images is empty"),
        (["a.png", "--csv", ""], "csv is empty"),
        (["a.png", "--save-prototypes="], "save-prototypes is empty"),
        (["a.png", "--device="], "device is empty"),
        (["a.png", "--workers", "5000"], "--workers at least 0 and <= "),
    ],
)
def test_flags_that_say_nothing_are_refused(photo, no_model, flags, message, capsys):
    with pytest.raises(SystemExit):
        predict.main(["e.pt", *flags])
    assert message in capsys.readouterr().err
    assert os.listdir() == [photo]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--csv", "./a.png"], "--csv ./a.png is one of the inputs; give another file"),
        (["--explain", "linked.png"], "--explain linked.png is one of the inputs"),
        (["list.txt", "--json", "list.txt"], "--json list.txt is one of the inputs"),
        (["folder", "--csv", "folder/b.png"], "--csv folder/b.png is one of the inputs"),
        (["--save-prototypes", "e.pt"], "--save-prototypes e.pt is one of the inputs"),
        (["--csv", "x", "--json", "./x"], "--csv and --json are both ./x; give another file"),
        (["--json", "folder"], "--json folder is a folder or device; give the name of a file"),
        (["--csv", "/dev/null"], "--csv /dev/null is a folder or device"),
        (["--csv", "none/x.csv"], "--csv none/x.csv cannot be written .No such file or directory"),
        (
            ["--onnx", "a.png/x"],
            "--onnx a.png/x cannot be written .Not a directory.; give another folder",
        ),
        (
            ["--explain", "/proc/x.png"],
            "--explain /proc/x.png cannot be written .*; give another folder",
        ),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before(photo, no_model, flags, message):
    os.link(photo, "linked.png")
    os.mkdir("folder")
    shutil.copy(photo, "folder/b.png")
    Path("e.pt").touch()
    Path("list.txt").write_text("a.png")
    before = contents()
    with pytest.raises(SystemExit, match=f"^predict.py: {message}"):
        predict.main(["e.pt", photo, *flags])
    assert contents() == before


def test_an_output_of_before_is_written_again(photo, exported):
    for _ in range(2):
        assert predict.main([exported, photo, "--csv", "o.csv", "--device", "cpu"]) == 0
    assert len(open("o.csv").readlines()) == 2 and sorted(os.listdir()) == ["a.png", "o.csv"]


@pytest.mark.parametrize("device", ["xyz", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(photo, no_model, device):
    message = f"^predict.py: --device {device}: there is none; expected cpu, cuda or cuda:N$"
    with pytest.raises(SystemExit, match=message):
        predict.main(["e.pt", photo, "--device", device])


def test_any_locale_prints_any_rank_name(photo, exported):
    content = torch.load(exported, weights_only=True)
    content["rank_names"] = [f"{i} ä" for i in range(len(content["rank_names"]))]
    torch.save(content, "e.pt")
    argv = [os.path.abspath(name) for name in ("e.pt", photo)]
    code = """import runpy, sys; sys.stdout.reconfigure(encoding="ascii", errors="strict")
runpy.run_path("predict.py", run_name="__main__")"""
    flags = ["--csv", os.path.abspath("o.csv"), "--device", "cpu"]
    process = run_python(code, ROOT, *argv, *flags)
    assert process.returncode == 0 and r" \xe4 " in process.stdout, process.stderr
    assert " ä," in Path("o.csv").read_text("utf-8")


def test_a_list_that_is_not_there_is_named(photo, no_model):
    message = "^predict.py: there is no list README.txt; give images, folders, lists$"
    with pytest.raises(SystemExit, match=message):
        predict.main(["e.pt", "README.txt"])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("l.csv", "a.png;1\n", "1: expected an image path, .* separated by ','; got 'a.png;1'"),
        ("l.csv", "path\tlabel\na.png\t1\n", "1: expected .* got 'path.tlabel'"),
        ("l.tsv", "a.png,1\n", "1: expected an image path, .* separated by '.t'; got 'a.png,1'"),
        ("l.csv", "label,path\n1,a.png\n\n3\n", "4: expected an image path, .*; got '3'"),
        ("l.csv", ",1\n", "1: expected an image path, .*; got ',1'"),
        ("l.txt", "label path\n3\n", "2: expected an image path, .* separated by ' '; got '3'"),
    ],
)
def test_lists_with_other_separators_are_refused(photo, name, text, message):
    Path(name).write_text(text)
    with pytest.raises(ValueError, match=f"^{name}:{message}$"):
        predict.find_images([name])


@pytest.mark.parametrize(
    "name, text, paths",
    [
        ("l.txt", "my photo.avif\nmy photo.avif 3\nmy own\nnone.avif 1\n", None),
        ("l.csv", "b;1.png\n", ["b;1.png"]),
        ("l.csv", '"b;1.png"\n"c, d.png"\n', ["b;1.png", "c, d.png"]),
        ("l.txt", "A.png\na.PNG 1\n", ["A.png", "a.png"]),  # as training reads it
    ],
)
def test_lists_name_their_images_as_they_are_on_disk(photo, name, text, paths):
    for other in ("my photo.avif", "my own", "b;1.png"):
        shutil.copy(photo, other)
    Path(name).write_text(text)
    paths = paths or ["my photo.avif", "my photo.avif", "my own", "none.avif"]
    assert predict.find_images([name]) == paths


def test_missing_images_of_a_list_are_looked_for(photo, exported, capsys):
    Path("l.csv").write_text("a.png\nA.png\nb.png\n")
    assert predict.main([exported, "l.csv", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["file", "a.png"]
    assert err.splitlines() == [
        "l.csv: 2 of 3 images are not under ., the first: 'A.png', 'b.png' (there is './a.png': "
        "mind case, suffix, accents)",
        "not predicted: A.png: there is no such image",
        "not predicted: b.png: there is no such image",
    ]


def test_the_files_are_written_before_a_table_nobody_reads(photo, exported, monkeypatch):
    def fail(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(predict, "print_table", fail)
    with pytest.raises(SystemExit, match="Broken pipe"):
        predict.main([exported, photo, "--csv", "o.csv", "--json", "o.json", "--device", "cpu"])
    assert {"o.csv", "o.json"} < set(os.listdir())
