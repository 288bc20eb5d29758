"""pytest tests/test_checkpoints.py -- a run that is cut off anywhere ends like an uninterrupted one."""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

import train
from clip_model import ModifiedResNet
from training.methods import LossModule

SETTINGS = {  # flags that change what a checkpoint has to hold
    "init": ["--init", "{source}"],
    "freeze": ["--freeze-image"],
    "coop": ["--method", "coop"],
    "linear": ["--method", "linear"],
    "regression": ["--method", "regression"],
    "official": ["--official"],
    "shots": ["--shots", "5"],
    "shift": ["--shift", "1,0.5"],
    "context": ["--context", "6"],
    "workers": ["--workers", "2"],
    "extras": "--ema 0.9 --accumulate 2 --warmup 1 --balanced --patience 1".split(),
}
REFUSED = {  # two methods, a flag without effect, and names of two tokens from base ranks of one
    ("coop", "linear"),
    ("coop", "regression"),
    ("linear", "regression"),
    ("linear", "context"),
    ("regression", "context"),
    ("init", "coop"),
}
PAIRS = [pair for pair in itertools.combinations(SETTINGS, 2) if pair not in REFUSED]
SAMPLE = {
    ("init", "freeze"),
    ("init", "regression"),
    ("freeze", "regression"),
    ("official", "shots"),
    ("linear", "workers"),
    ("freeze", "extras"),
}


def cut_off(monkeypatch, steps, argv):
    """Run until the loss was asked for `steps` times, then as if killed."""
    calls, forward = itertools.count(1), LossModule.forward

    def stop(self, images, labels):
        if next(calls) > steps:
            raise KeyboardInterrupt
        return forward(self, images, labels)

    monkeypatch.setattr(LossModule, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv)
    monkeypatch.setattr(LossModule, "forward", forward)


def check_equal_runs(run_dir, other_dir):
    """All that does not depend on time: weights, log, results, predictions, pictures."""
    saved, other = (torch.load(d / "last.pt", weights_only=True) for d in (run_dir, other_dir))
    assert all(torch.equal(value, other["model"][key]) for key, value in saved["model"].items())
    timing = {"images_per_s", "peak_mb"}
    for row, other_row in zip(saved["log"], other["log"], strict=True):
        assert {k: v for k, v in row.items() if k not in timing} == {
            k: v for k, v in other_row.items() if k not in timing
        }
    names = ["predictions-best.csv", *(f"splits/{part}.txt" for part in ("train", "val", "test"))]
    pictures = {path.name for path in (run_dir / "pictures").iterdir()}
    assert pictures == {path.name for path in (other_dir / "pictures").iterdir()}
    names += [f"pictures/{name}" for name in pictures]
    for name in names:
        assert (run_dir / name).read_bytes() == (other_dir / name).read_bytes(), name


@pytest.mark.parametrize(
    "pair",
    [p if p in SAMPLE else pytest.param(p, marks=pytest.mark.full) for p in PAIRS],
    ids="-".join,
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    stripes, finished_run, tmp_path, monkeypatch, pair
):
    forward = ModifiedResNet.forward  # which draws from the global generator, as dropout does
    monkeypatch.setattr(
        ModifiedResNet, "forward", lambda self, x: F.dropout(forward(self, x), 0.1, self.training)
    )
    flags = [word.format(source=finished_run[0]) for name in pair for word in SETTINGS[name]]
    argv = ["--data", str(stripes), *TINY, "--epochs", "2", "--save-every", "0", *flags, "--out"]
    whole = train.main([*argv, str(tmp_path / "whole")])
    steps = 7 if "extras" in pair else 5  # of 4 an epoch; 2 with --shots 5
    steps = 1 if "shots" in pair else steps
    cut_off(monkeypatch, steps, [*argv, str(tmp_path / "cut")])
    resumed = train.main([*argv, str(tmp_path / "cut")])
    assert resumed["test"] == whole["test"] and resumed["val"] == whole["val"]
    check_equal_runs(tmp_path / "whole", tmp_path / "cut")
    evaluated = train.main(["--eval", str(tmp_path / "cut")])
    assert evaluated["test"] == whole["test"]


def stop_run(*_):
    raise KeyboardInterrupt


def test_a_run_cut_off_in_validation_goes_on(stripes, tmp_path, monkeypatch):
    """last.pt was written after the last step of the epoch, whose batch is smaller than others."""
    argv = ["--data", str(stripes), *TINY, "--batch-size", "15", "--save-every", "0", "--out"]
    train.main([*argv, str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "predict_loader", stop_run)
        train.main([*argv, str(tmp_path / "cut")])
    train.main([*argv, str(tmp_path / "cut")])
    check_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_workers_do_not_change_the_run(stripes, tmp_path):
    for workers in ("0", "2"):
        train.main(
            ["--data", str(stripes), *TINY, "--workers", workers, "--out", str(tmp_path / workers)]
        )
    check_equal_runs(tmp_path / "0", tmp_path / "2")


def test_seconds_are_of_the_whole_run(stripes, tmp_path, monkeypatch):
    argv = ["--data", str(stripes), *TINY, "--save-every", "0", "--out", str(tmp_path / "run")]
    cut_off(monkeypatch, 2, argv)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    saved["seconds"] = 1000.0
    torch.save(saved, tmp_path / "run" / "last.pt")
    assert 1000 < train.main(argv)["seconds"] < 1100


def test_within_an_epoch_no_checkpoint_is_written_before_it_is_due(stripes, tmp_path, monkeypatch):
    argv = ["--data", str(stripes), *TINY, "--out", str(tmp_path / "run")]
    cut_off(monkeypatch, 2, argv)
    assert not (tmp_path / "run" / "last.pt").exists()
    shutil.rmtree(tmp_path / "run")
    cut_off(monkeypatch, 2, [*argv, "--save-every", "0"])
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["epoch"] == 0 and saved["progress"]["steps"] == 2
