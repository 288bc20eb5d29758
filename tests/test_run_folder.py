"""pytest tests/test_run_folder.py -- what is written where, and when a folder is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from processes import run_python
from test_checkpoints import check_equal_runs

import data
import train
from clip_model import tiny_clip
from evaluation.report import write_report
from training.methods import LossModule
from training.options import check_out
from training.run_folder import differing_settings, lock_run_dir, provenance, run_name


def test_a_finished_run_is_not_written_over(finished_run, stripes):
    out, _ = finished_run
    with pytest.raises(
        SystemExit, match="is finished with other settings: --epochs 3, not 5. Choose another --out"
    ):
        train.main(["--data", str(stripes), "--out", str(out), *TINY, "--epochs", "5"])
    with pytest.raises(
        SystemExit, match="is finished, see .*results.json; --eval .* tests it again, another --out"
    ):
        train.main(["--data", str(stripes), "--out", str(out), *TINY, "--epochs", "3"])
    with pytest.raises(SystemExit, match="is finished, see .*results.json"):
        train.main(["--resume", str(out)])


def test_a_half_written_file_never_gets_the_name(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"whole")

    def broken(part):
        part.write_bytes(b"ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        data.atomic_write(path, broken)
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_away_from_its_run_is_told_plainly(finished_run, tmp_path):
    (tmp_path / "best.pt").write_bytes((finished_run[0] / "best.pt").read_bytes())
    with pytest.raises(SystemExit, match="splits/train.txt is missing; restore it, or repeat"):
        train.main(["--eval", str(tmp_path / "best.pt")])


def test_a_checkpoint_in_the_folder_of_another_run_is_refused(finished_run, gray, tmp_path):
    out = tmp_path / "run"
    train.main(["--data", str(gray), *TINY, "--out", str(out)])
    (out / "results.json").unlink()
    for name, command in (("best.pt", "--eval"), ("last.pt", "--resume")):
        shutil.copy(finished_run[0] / name, out / name)
        message = f"{name} is of another run than .*config.json: --data '.*gray', not '.*stripes'; "
        with pytest.raises(SystemExit, match=message + "--epochs 1, not 3$"):
            train.main([command, str(out)])


def test_relative_data_away_from_the_folder_of_the_start_is_explained(gray, tmp_path, monkeypatch):
    monkeypatch.chdir(gray.parent)
    train.main(["--data", "gray", *TINY, "--out", str(tmp_path / "run")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        train.main(["--eval", str(tmp_path / "run")])
    assert error.value.code == (
        f"the images of {tmp_path / 'run'} lay in 'gray', which is not there; give --data-root, "
        f"or go to the folder in which the run was started (now {tmp_path})"
    )


def test_a_run_is_tested_and_resumed_where_its_images_lie_now(gray, tmp_path):
    run_dir = tmp_path / "run"
    folder = shutil.copytree(gray, tmp_path / "gray")
    results = train.main(["--data", str(folder), *TINY, "--out", str(run_dir)])
    folder.rename(tmp_path / "moved")
    moved = ["--data-root", str(tmp_path / "moved")]
    assert train.main(["--eval", str(run_dir), *moved])["test"] == results["test"]
    (run_dir / "results.json").unlink()
    assert train.main(["--resume", str(run_dir), *moved])["test"] == results["test"]
    (run_dir / "results.json").unlink()
    (tmp_path / "moved" / "0 gray" / "0.png").write_bytes(
        (tmp_path / "moved" / "3 gray" / "0.png").read_bytes()
    )
    with pytest.raises(SystemExit, match="changed since the run started"):
        train.main(["--resume", str(run_dir), *moved])


def test_a_folder_is_the_same_with_a_slash_behind_it(gray, tmp_path, monkeypatch):
    argv = [*TINY, "--out", str(tmp_path / "runs"), "--seeds"]
    train.main(["--data", f"{gray}/", *argv, "1"])
    train.main(["--data", str(gray), *argv, "1", "2"])
    report = next((tmp_path / "runs").glob("report-*.md")).read_text()
    assert report.count("(n=2)") > 3 and "(n=1)" not in report
    monkeypatch.chdir(gray)
    assert run_name(train.parse_args(["--data", ".", *TINY, "--out", str(tmp_path)]))[:5] == "gray-"


def test_a_run_of_an_earlier_version_has_the_slash_in_its_files(gray, tmp_path):
    run_dir = tmp_path / "run"
    results = train.main(["--data", str(gray), *TINY, "--out", str(run_dir)])
    for name in ("best.pt", "last.pt"):
        saved = torch.load(run_dir / name, weights_only=True)
        saved["settings"]["data"] += "/"
        torch.save(saved, run_dir / name)
    config = json.loads((run_dir / "config.json").read_text())
    config["settings"]["data"] += "/"
    (run_dir / "config.json").write_text(json.dumps(config))
    assert train.main(["--eval", str(run_dir)])["test"] == results["test"]
    (run_dir / "results.json").unlink()
    assert train.main(["--resume", str(run_dir)])["test"] == results["test"]


@pytest.mark.parametrize("seeds", [[], ["--seeds", "1", "2"]])
def test_a_run_among_the_images_is_refused(gray, tmp_path, monkeypatch, seeds):
    """Its folder would be a rank, its pictures images, for the next run."""
    folder = shutil.copytree(gray, tmp_path / "gray")
    monkeypatch.chdir(folder)
    for argv, out in ((["--data", "."], "runs"), (["--data", str(folder), "--out", "x/y"], "x/y")):
        with pytest.raises(SystemExit, match=f"--out {out}.* lies in --data .*, where folders are"):
            train.main([*argv, *TINY, *seeds])
    assert {path.suffix for path in folder.iterdir()} <= {""} and not (folder / "runs").exists()
    lists = {part: f"{part}.txt" for part in ("train", "val", "test")}
    for i, name in enumerate(lists.values()):
        images = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))[i::3]
        lines = (f"{path} {str(path)[0]}\n" for path in images)
        (folder / name).write_text("".join(lines))
    train.main(["--data", ".", *TINY, *seeds])  # whose lists say what is data
    for name in lists.values():
        (folder / name).unlink()
    shutil.rmtree(folder / "runs")
    args = Namespace(data=".", out=None, train_list=None)
    (folder / "notes.csv").write_text("photo,camera\n")
    with pytest.raises(SystemExit, match="where folders are data"):
        check_out(args)
    (folder / "train").mkdir()
    check_out(args)  # {train,val,test}/ say it, too
    for path in [*folder.iterdir()][1:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "runs").mkdir()
    (folder / "labels.csv").write_text("path,label\n")
    check_out(args)  # and so does a table of one folder of images


def test_a_checkpoint_of_another_epoch_than_the_best_is_refused(gray, tmp_path):
    """In a copy of a run that goes on, best.pt may be older than last.pt."""
    run_dir = tmp_path / "run"
    train.main(["--data", str(gray), *TINY, "--epochs", "3", "--out", str(run_dir)])
    (run_dir / "results.json").unlink()
    best = torch.load(run_dir / "best.pt", weights_only=True)
    other = best | dict(epoch=best["epoch"] % 3 + 1)
    torch.save(other, run_dir / "best.pt")
    message = (
        f"best.pt is of epoch {other['epoch']}, but the best epoch of last.pt is {best['epoch']}"
    )
    with pytest.raises(SystemExit, match=message + "; restore it, or remove last.pt"):
        train.main(["--resume", str(run_dir)])
    (run_dir / "best.pt").unlink()
    with pytest.raises(SystemExit, match="best.pt is missing, but the best epoch of last.pt is"):
        train.main(["--resume", str(run_dir)])
    torch.save(best | dict(epoch=4), run_dir / "best.pt")  # cut between the two: repeated
    train.main(["--resume", str(run_dir)])


def test_a_run_that_may_not_be_written_is_not_tested(finished_run, monkeypatch):
    monkeypatch.setattr(train.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(SystemExit, match=r"may not be written; --eval writes there: copy the run"):
        train.main(["--eval", str(finished_run[0])])


def test_the_same_command_goes_on_wherever_it_was_cut_off(gray, tmp_path):
    run_dir = tmp_path / "run"
    argv = ["--data", str(gray), *TINY, "--out", str(run_dir)]
    results = train.main(argv)
    for names in (
        ["exported.pt", "pictures"],  # after the test images
        ["log.csv", "pictures/curves.png"],  # last.pt is written before the log
        ["last.pt", "log.csv"],
        ["last.pt", "log.csv", "best.pt", "config.json"],
    ):
        for name in ["results.json", *names]:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in (run_dir, *run_dir.glob("pictures")):
            (path / "sheet.png.7.part").write_bytes(b"half")
        assert train.main(argv)["test"] == results["test"]
        assert not [*run_dir.rglob("*.part")]
        assert (run_dir / "log.csv").exists() and (run_dir / "pictures" / "curves.png").exists()
    (run_dir / "results.json").unlink()
    assert train.main(["--resume", str(run_dir)])["test"] == results["test"]


def test_other_settings_than_the_run_was_started_with_are_refused(gray, tmp_path):
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "runs"), "--seeds", "1"]
    train.main(argv)
    (next((tmp_path / "runs").glob("*/results.json"))).unlink()
    with pytest.raises(SystemExit) as error:
        train.main([*argv, "--lr", "0.5", "--batch-size", "8", "--epochs", "2"])
    for words in ("was started with other settings", "--lr 0.002, not 0.5", "--batch-size 16, not 8",
                  "--epochs 1, not 2"):  # fmt: skip
        assert words in str(error.value)
    train.main([*argv, "--workers", "1", "--save-every", "3"])  # these change no result


def test_other_files_are_not_written_over(gray, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="is not empty and is not a run folder .it holds thesis"):
        train.main(["--data", str(gray), *TINY, "--out", str(tmp_path / "run")])


def test_lists_that_changed_since_the_run_started_are_refused(gray, tmp_path):
    for part, ranks in (("train", "0123"), ("test", "13")):
        lines = [f"{rank} gray/{i}.png {rank}" for rank in ranks for i in range(8)]
        (tmp_path / f"{part}.txt").write_text("\n".join(lines) + "\n")
    lists = [f"--train-list={tmp_path}/train.txt", f"--test-list={tmp_path}/test.txt"]
    run_dir = tmp_path / "run"
    argv = ["--data", str(gray), *TINY, *lists, "--out", str(run_dir)]
    train.main(argv)
    (run_dir / "results.json").unlink()
    for path, command in (
        (tmp_path / "test.txt", argv),
        (run_dir / "splits" / "test.txt", ["--resume", str(run_dir)]),
        (run_dir / "splits" / "test.txt", ["--eval", str(run_dir)]),
    ):
        text = path.read_text()
        path.write_text(text.split("\n", 1)[1])
        with pytest.raises(
            SystemExit, match="the list of test images changed since the run started"
        ):
            train.main(command)
        path.write_text(text)
    train.main(argv)


def test_images_that_were_replaced_since_the_run_started_are_refused(gray, tmp_path):
    folder = shutil.copytree(gray, tmp_path / "gray")
    argv = ["--data", str(folder), *TINY, "--out", str(tmp_path / "runs"), "--seeds"]
    train.main([*argv, "1"])
    run_dir = tmp_path / "runs" / "gray-ordinalclip-linear-K3-seed1"
    image, other = folder / "0 gray" / "0.png", folder / "3 gray" / "0.png"
    pixels = image.read_bytes()
    image.write_bytes(other.read_bytes())
    for command in ([*argv, "1", "2"], ["--eval", str(run_dir)]):
        with pytest.raises(SystemExit, match="pixels of (train|val|test) images changed since"):
            train.main(command)
    image.write_bytes(pixels)  # the bytes count, not their date
    train.main(["--eval", str(run_dir)])


@pytest.mark.parametrize("name", ["clip.pt", "clip/pytorch_model.bin"])
def test_weights_that_were_replaced_between_runs_of_a_sweep_are_refused(gray, tmp_path, name):
    (tmp_path / "clip").mkdir()
    path = tmp_path / name
    torch.save(tiny_clip(seed=0).state_dict(), path)
    weights = path if path.parent == tmp_path else path.parent
    argv = ["--data", str(gray), *TINY, "--clip", str(weights), "--quick-gelu"]
    train.main([*argv, "--out", str(tmp_path / "runs"), "--seeds", "1"])
    torch.save(tiny_clip(seed=1).state_dict(), path)
    with pytest.raises(
        SystemExit, match="the file of --clip changed since the run started; restore"
    ):
        train.main([*argv, "--out", str(tmp_path / "runs"), "--seeds", "1", "2"])
    train.main([*argv, "--out", str(tmp_path / "runs" / "other"), "--seed", "2"])
    assert "(n=2)" not in write_report([tmp_path / "runs"])


def test_a_run_goes_on_without_the_file_that_it_was_initialised_from(finished_run, gray, tmp_path):
    source = shutil.copytree(finished_run[0], tmp_path / "source")
    argv = ["--data", str(gray), *TINY, "--init", str(source), "--out", str(tmp_path / "run")]
    train.main(argv)
    (source / "best.pt").write_bytes((finished_run[0] / "last.pt").read_bytes())
    train.main(["--eval", str(tmp_path / "run")])
    (tmp_path / "run" / "results.json").unlink()
    train.main(argv)


def test_a_finished_run_is_not_taken_for_one_of_another_precision(gray, tmp_path):
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path), "--seeds", "1", "2"]
    train.main(argv)
    message = "is finished with --precision fp32, not bf16. Choose another --out, or give --prec"
    with pytest.raises(SystemExit, match=message):
        train.main([*argv, "--precision", "bf16"])


def test_ranks_that_changed_since_the_run_started_are_refused(gray, tmp_path):
    lines = [f"{rank} gray/{i}.png {rank}" for rank in range(4) for i in range(10)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "ranks.txt").write_text("dark\nmiddle\nlight\nwhite\n")
    lists, run_dir = ["--train-list", str(tmp_path / "train.txt")], tmp_path / "run"
    argv = ["--data", str(gray), *TINY, *lists, "--out", str(run_dir)]
    train.main(argv)
    (run_dir / "results.json").unlink()
    for path, command in (
        (tmp_path / "ranks.txt", argv),
        (run_dir / "splits" / "ranks.txt", ["--resume", str(run_dir)]),
        (run_dir / "splits" / "ranks.txt", ["--eval", str(run_dir)]),
    ):
        text = path.read_text()
        path.write_text("white\nlight\nmiddle\ndark\n")
        with pytest.raises(SystemExit, match="the ranks, their names or order, changed since the"):
            train.main(command)
        path.write_text(text)
    train.main(argv)


def test_labels_that_changed_within_their_bins_are_refused(gray, tmp_path):
    rows = [f"{rank} gray/{i}.png,{10 * rank + i / 10}" for rank in range(4) for i in range(10)]
    table, run_dir = tmp_path / "train.csv", tmp_path / "run"
    table.write_text("\n".join(["path,label", *rows]) + "\n")
    argv = ["--data", str(gray), *TINY, "--train-list", str(table), "--bins", "0,10,20,30,40"]
    argv += ["--out", str(run_dir)]
    train.main(argv)
    train.main(["--eval", str(run_dir)])  # the labels are read from splits/ as they were written
    config = (run_dir / "config.json").read_text()
    (run_dir / "results.json").unlink()
    table.write_text(table.read_text().replace(",30.5\n", ",33.25\n"))
    with pytest.raises(SystemExit, match="the labels in the bins changed since the run started"):
        train.main(argv)
    older = json.loads(config)
    digests = older.pop("digests")
    older["splits"] = {part: digests[part] for part in data.PARTS}  # their name then
    (run_dir / "config.json").write_text(json.dumps(older))
    (run_dir / "last.pt").unlink()
    train.main(argv)  # runs of earlier versions wrote no digest of them


def test_two_processes_do_not_write_one_run(gray, tmp_path):
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "run")]
    with lock_run_dir(train.parse_args(argv)):
        with pytest.raises(SystemExit, match="another process is writing this run; wait for it"):
            train.main(argv)
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()  # nothing was written
    train.main(argv)


@pytest.mark.parametrize("out", ["file", "file/under", "/proc/run"])
def test_an_out_that_cannot_be_a_folder_is_refused(gray, tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"--out .*; choose another --out"):
        train.main(["--data", str(gray), *TINY, "--out", str(tmp_path / out)])


def test_a_run_without_its_config_goes_on_with_its_own_settings_only(gray, tmp_path):
    folder, run_dir = shutil.copytree(gray, tmp_path / "gray"), tmp_path / "run"
    argv = ["--data", str(folder), *TINY, "--out", str(run_dir)]
    results = train.main(argv)
    for name in ("config.json", "results.json"):
        (run_dir / name).unlink()
    with pytest.raises(
        SystemExit, match="was started with other settings: --lr 0.002, not 0.3. Ch"
    ):
        train.main([*argv, "--lr", "0.3"])
    for command in ("--resume", "--eval"):
        with pytest.raises(SystemExit, match="config.json is missing; repeat the command of the"):
            train.main([command, str(run_dir)])
    (folder / "0 gray" / "0.png").rename(folder / "0 gray" / "new.png")
    with pytest.raises(SystemExit, match="images changed since the run started"):
        train.main(argv)
    (folder / "0 gray" / "new.png").rename(folder / "0 gray" / "0.png")
    assert not (run_dir / "config.json").exists()
    saved = torch.load(run_dir / "last.pt", weights_only=True)
    del saved["digests"]  # as earlier versions wrote it
    torch.save(saved, run_dir / "last.pt")
    assert train.main(argv)["test"] == results["test"]


def test_without_git_the_commit_is_null(monkeypatch):
    def missing(*args, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert provenance()["commit"] is None


def check_goes_on_after(argv, whole, out):
    """The same command, with room on the disk again, ends like the uninterrupted run."""
    assert not [*out.rglob("*.part")]
    train.main(argv)
    check_equal_runs(whole, out)


@pytest.fixture(scope="module")
def whole_run(stripes, tmp_path_factory):
    """(flags, folder, number of files that were written) of a run that nothing disturbs."""
    argv = ["--data", str(stripes), *TINY, "--out"]
    folder, paths, atomic_write = tmp_path_factory.mktemp("whole") / "run", [], data.atomic_write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            data, "atomic_write", lambda path, save: paths.append(path) or atomic_write(path, save)
        )
        train.main([*argv, str(folder)])
    return argv, folder, len(paths)


@pytest.mark.parametrize("write", [1, 5, 8, pytest.param(0, marks=pytest.mark.full)])
def test_a_disk_that_is_full_loses_nothing(whole_run, tmp_path, monkeypatch, write):
    """The n-th file of a run cannot be written; with 0, each one in turn."""
    argv, whole, num_writes = whole_run
    assert num_writes >= 13  # config, log, 3 x .pt, results, predictions, 6 pictures
    atomic_write, paths = data.atomic_write, []

    def full_disk(path, save):
        paths.append(path)
        if len(paths) == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        atomic_write(path, save)

    monkeypatch.setattr(data, "atomic_write", full_disk)
    for failing in [write] if write else range(1, num_writes + 1):  # noqa: B007
        out = tmp_path / f"run{failing}"
        paths.clear()
        with pytest.raises(SystemExit, match="train.py: .*No space left on device: '.*run"):
            train.main([*argv, str(out)])
        check_goes_on_after([*argv, str(out)], whole, out)


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_line(whole_run, tmp_path):
    """torch.save has an error of its own for a full disk; here, for a limit of the file size."""
    pytest.importorskip("resource")
    argv = [*whole_run[0], str(tmp_path / "run")]
    code = f"""import resource, train
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1)); train.main({argv!r})"""
    process = run_python(code, Path(train.__file__).parent)
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert "best.pt cannot be written; is the disk full?" in process.stderr
    assert not [*(tmp_path / "run").rglob("*.part")]
    check_goes_on_after(argv, whole_run[1], tmp_path / "run")


def test_a_run_folder_that_is_removed_is_one_line(stripes, tmp_path, monkeypatch):
    run_dir, forward = tmp_path / "run", LossModule.forward

    def remove(self, images, labels):
        shutil.rmtree(run_dir, ignore_errors=True)
        return forward(self, images, labels)

    monkeypatch.setattr(LossModule, "forward", remove)
    with pytest.raises(SystemExit, match="run was removed, so .*best.pt cannot be written there"):
        train.main(["--data", str(stripes), *TINY, "--out", str(run_dir)])


def run_in_c_locale(*commands):
    """train.py, once a command, until one fails; a line --- on stderr before each.

    Text is ASCII by default, which Python does not mend with these settings.
    """
    code = f"""import runpy, sys
for sys.argv in {[["train.py", *map(str, words)] for words in commands]}:
    print("---", file=sys.stderr)
    runpy.run_path("train.py", run_name="__main__")"""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(train.__file__).parent,
        env=dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
        capture_output=True,
        encoding="utf-8",
    )


def test_text_files_are_utf8_in_any_locale(stripes, tmp_path):
    folder, run_dir = shutil.copytree(stripes, tmp_path / "lines"), tmp_path / "runs" / "a"
    (folder / "ranks.txt").write_text("1 ligne é\n2 stripes\n3 stripes\n4 stripes\n", "utf-8")
    lines = [f"{i} stripes/image {k}.png {i - 1}" for i in range(1, 5) for k in range(20)]
    (folder / "train.csv").write_text("\n".join(["# é", *lines]).replace("png ", "png,"), "utf-8")
    named = shutil.copytree(stripes, tmp_path / "named")
    (named / "1 stripes" / "image 0.png").rename(named / "1 stripes" / "imagé 0.png")
    argv = ["--data", folder, *TINY, "--out", run_dir]
    refused = ["--data", named, *TINY, "--out", tmp_path / "b"]
    process = run_in_c_locale(argv, ["--eval", run_dir], ["--report", run_dir], refused)
    assert (run_dir / "report.md").exists() or (run_dir.parent / "report.md").exists()
    assert "1 ligne é" in (run_dir / "splits" / "ranks.txt").read_text("utf-8")
    assert "1 ligne é" in (run_dir / "predictions-best.csv").read_text("utf-8")
    assert process.stderr.split("---\n")[4:] == [
        "train.py: the file name '1 stripes/imag\\udcc3\\udca9 0.png' cannot be read in this "
        "locale; set PYTHONUTF8=1\n"
    ], process.stderr


def test_settings_are_compared_as_json_has_them():
    """last.pt holds tuples, config.json lists."""
    assert not differing_settings(dict(shift=(1, 0.5)), dict(shift=(1, 0.5)))
    assert not differing_settings(dict(shift=(1, 0.5)), dict(shift=[1, 0.5]))
    assert "--shift" in differing_settings(dict(shift=(1, 0.5)), dict(shift=[1, 0.25]))
