"""pytest tests/test_progress.py -- the line of progress, on a terminal and in a log; TensorBoard."""

import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import train
from training import progress
from training.progress import ProgressLine
from training.run_folder import read_log


@pytest.fixture
def clock(monkeypatch):
    """Seconds, in a list of one: what the program's clock says."""
    seconds = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture
def terminal(monkeypatch, capsys):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)


def test_a_terminal_shows_one_line_that_goes_away(clock, terminal, capsys):
    line = ProgressLine("features")
    line(0, 4000)
    clock[0] += 0.2
    line(10, 4000)
    assert capsys.readouterr().err == ""  # too early
    clock[0] += 0.3
    line(100, 4000)
    text = "features  100/4,000 images  200 images/s  0:00:20 left"
    assert capsys.readouterr().err == "\r\033[K  " + text
    clock[0] += 9999.5
    line(2000, 4000)
    assert capsys.readouterr().err.endswith("2,000/4,000 images  0 images/s  2:46:40 left")
    line(4000, 4000)
    assert capsys.readouterr().err == "\r\033[K"


def test_a_log_gets_a_plain_line_a_minute(clock, capsys):
    line = ProgressLine("epoch 2/9", start=50)
    for _ in range(130):
        clock[0] += 1
        line(int(clock[0]) - 950, 650)
    assert capsys.readouterr().err == (
        "epoch 2/9  110/650 images  1 images/s  0:09:00 left\n"
        "epoch 2/9  170/650 images  1 images/s  0:08:00 left\n"
    )
    clock[0] += 99
    line(650, 650)
    assert capsys.readouterr().err == "epoch 2/9  650/650 images  3 images/s  0:00:00 left\n"


def test_other_processes_print_nothing(clock, terminal, capsys, monkeypatch):
    monkeypatch.setattr(progress, "is_main", lambda: False)
    line = ProgressLine("features")
    clock[0] += 60
    line(1, 2)
    line(2, 2)
    assert capsys.readouterr().err == ""


@pytest.fixture
def calls(monkeypatch):
    """[(title, images before, done, total)] of all lines."""
    calls = []
    monkeypatch.setattr(
        ProgressLine,
        "__call__",
        lambda self, done, total: calls.append((self.title, self.start, done, total)),
    )
    return calls


def test_checks_epochs_and_predictions_count_their_images(gray, tmp_path, calls):
    results = train.main(
        ["--data", str(gray), *TINY, "--epochs", "2", "--out", str(tmp_path / "a")]
    )
    assert results["images"] == dict(train=56, val=7, test=7)
    epochs = [[(f"epoch {epoch}/2", 0, done, 56) for done in (16, 32, 48, 56)] for epoch in (1, 2)]
    predictions = [("predicting", 0, 7, 7)]
    opened = [("images opened", 0, done, 70) for done in range(1, 71)]
    assert calls == opened + epochs[0] + predictions + epochs[1] + 3 * predictions


def test_an_epoch_that_was_cut_off_counts_from_there(gray, tmp_path, calls, monkeypatch):
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "a")]
    answers = [False, True]  # saved after the second step, then cut off

    def is_save_due(state):
        if not answers:
            raise KeyboardInterrupt
        return answers.pop(0)

    with monkeypatch.context() as patch:
        patch.setattr(train.TrainingState, "is_save_due", is_save_due)
        with pytest.raises(KeyboardInterrupt):
            train.main(argv)
    assert calls[-1] == ("epoch 1/1", 0, 48, 56)
    calls.clear()
    train.main(argv)
    assert calls[:2] == [("epoch 1/1", 32, 48, 56), ("epoch 1/1", 32, 56, 56)]


def test_what_is_printed_at_the_end_stands_on_a_line_of_its_own(gray, tmp_path, terminal, capsys):
    argv = ["--data", str(gray), *TINY, "--lr", "1000", "--out", str(tmp_path / "a")]
    with pytest.raises(SystemExit, match="is nan|not finite"):
        train.main(argv)
    assert capsys.readouterr().err.endswith("\r\033[K")


def test_features_count_their_images(gray, tmp_path, calls):
    argv = ["--data", str(gray), *TINY, "--freeze-image", "--out", str(tmp_path / "a")]
    train.main(argv)
    features = [call for call in calls if call[0] == "features"]
    assert features == [
        *[("features", 0, done, 56) for done in (16, 32, 48, 56)], *[("features", 0, 7, 7)] * 2
    ]  # fmt: skip


class Writer:
    """Stands in for torch.utils.tensorboard.SummaryWriter, which takes and checks the same."""

    written = []

    def __init__(self, log_dir, purge_step=None):
        self.written.append(("open", Path(log_dir).name, purge_step))

    def add_scalar(self, tag, value, step):
        self.written.append((tag, float(value), step))

    def add_image(self, tag, pixels, step, dataformats):
        assert dataformats == "HWC" and pixels.dtype == torch.uint8
        self.written.append((tag, pixels.numpy(), step))

    def flush(self):
        self.written.append(("flush",))

    def close(self):
        self.written.append(("close",))


@pytest.fixture
def written(monkeypatch):
    """What reached TensorBoard."""
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "written", [])
    return Writer.written


def test_tensorboard_gets_figures_and_pictures(gray, tmp_path, written):
    out = tmp_path / "a"
    argv = ["--data", str(gray), *TINY, "--epochs", "2", "--tensorboard", "--out", str(out)]
    results = train.main(argv)
    log = read_log(out)
    first = {tag: value for tag, value, step in (w for w in written if len(w) == 3) if step == 1}
    for name, value in log[0].items():
        tag = name.replace("val_", "val/") if name.startswith("val_") else f"train/{name}"
        if name == "epoch" or math.isnan(value):
            assert tag not in first
        else:
            assert first[tag] == pytest.approx(value)
    last = {tag: value for tag, value, step in (w for w in written if len(w) == 3) if step == 2}
    assert last["test/mae_argmax"] == results["test"]["mae_argmax"]
    pictures = {path.stem: Image.open(path) for path in (out / "pictures").iterdir()}
    assert len(pictures) == 6
    for name, picture in pictures.items():
        assert np.array_equal(last[name], picture)
    opened = [w for w in written if w[0] == "open"]
    assert opened == [("open", "tensorboard", 1), ("open", "tensorboard", None)]
    assert [w for w in written if w in (("flush",), ("close",))] == [
        ("flush",), ("flush",), ("close",), ("flush",), ("close",)
    ]  # fmt: skip


def test_tensorboard_goes_on_where_the_run_does(gray, tmp_path, written):
    out = tmp_path / "a"
    argv = ["--data", str(gray), *TINY, "--epochs", "2", "--out", str(out)]
    train.main([*argv, "--tensorboard"])
    (out / "results.json").unlink()
    del written[:]
    train.main(["--resume", str(out)])  # its settings are kept
    assert ("open", "tensorboard", 3) in written
    (out / "results.json").unlink()
    del written[:]
    train.main(["--resume", str(out), "--no-tensorboard"])
    train.main(["--eval", str(out)])
    assert written == []


def test_tensorboard_that_is_not_installed_is_named_at_the_start(gray, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "a")]
    message = r"--tensorboard needs the package tensorboard \(.*\); pip install tensorboard$"
    with pytest.raises(SystemExit, match=message):
        train.main([*argv, "--tensorboard"])
    assert not (tmp_path / "a").exists()
    train.main(argv)


@pytest.mark.parametrize("flags, context", [
    ([], "'the rank of the image is'"),
    (["--context", "4"], "4 tokens"),
    (["--init", "{source}"], "6 tokens of {source}"),
    (["--init", "{source}", "--method", "regression"], "none"),
])  # fmt: skip
def test_the_header_names_the_context(gray, finished_run, tmp_path, capsys, flags, context):
    names = dict(source=finished_run[0])
    flags = [word.format(**names) for word in flags]
    train.main(["--data", str(gray), *TINY, *flags, "--out", str(tmp_path / "run")])
    assert f"   context {context.format(**names)}\n" in capsys.readouterr().out
