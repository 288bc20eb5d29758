"""pytest tests/test_profile.py -- the table of --profile; how long things take is not tested."""

import re

import pytest
import torch
from conftest import TINY, tiny_run
from torch.optim.swa_utils import AveragedModel

import train
from training import profile
from training.checkpoints import TrainingState
from training.loaders import make_loaders, prepare_batch
from training.methods import LossModule

PARTS = ["waiting for data", "transfer", "image tower", "text tower", "matching", "optimiser"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(profile, "STEPS", 3)


def profiled(gray, tmp_path, *flags):
    """{part: figures} of the printed table, and its other lines."""
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "run"), *flags]
    lines = train.main([*argv, "--profile"]).splitlines()
    rows = {line[:16].strip(): line[16:].replace("%", "").split() for line in lines[2:8]}
    return {part: [float(cell) for cell in cells] for part, cells in rows.items()}, lines


def test_the_table_has_each_part_and_no_run_begins(gray, tmp_path, capsys):
    rows, lines = profiled(gray, tmp_path)
    assert "\n".join(lines) in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert list(rows) == PARTS
    assert sum(row[2] for row in rows.values()) == pytest.approx(100, abs=0.5)
    step = float(re.search(r"in all ([\d.]+) ms a step", lines[8])[1])
    assert sum(row[0] + row[1] for row in rows.values()) == pytest.approx(step, abs=0.1)
    assert all(rows[part][0] > 0 for part in PARTS)
    assert [part for part in PARTS if rows[part][1] > 0] == [
        "image tower",
        "text tower",
        "matching",
    ]
    assert lines[0].startswith("gray-ordinalclip-linear-K3-seed1   cpu fp32, 96 px, batch 16")


def test_memory_is_that_of_the_tensors(gray, tmp_path):
    rows, _ = profiled(gray, tmp_path)
    model = tiny_run(gray).model
    size = sum(p.nbytes for p in model.image_encoder.parameters()) / 2**20
    weights, gradients, state, saved = rows["image tower"][3:]
    assert gradients == pytest.approx(size, abs=0.01) and weights >= gradients
    assert state == pytest.approx(2 * size, abs=0.02)  # two moments
    assert saved > 16 * 3 * 96 * 96 * 4 / 2**20  # more than the images of the batch
    frozen = sum(p.nbytes for p in model.prototypes._text[0].parameters()) / 2**20
    assert rows["text tower"][3] >= frozen > 100 * rows["text tower"][4]


def test_what_does_not_run_takes_nothing(gray, tmp_path):
    rows, _ = profiled(gray, tmp_path, "--freeze-image")
    assert rows["image tower"][3:] == [0, 0, 0, 0] and rows["matching"][0] > 0
    rows, _ = profiled(gray, tmp_path, "--method", "regression")
    assert rows["rank prototypes"] == [0, 0, 0] and rows["matching"][0] > 0


def test_on_a_gpu_a_step_without_waiting_is_timed_too(gray, tmp_path, monkeypatch):
    """No GPU is needed: waiting for one is counted."""

    class OnGpu(profile.StepProfiler):
        is_cuda = property(lambda self: True, lambda self, value: None)

    waits = []
    monkeypatch.setattr(profile, "StepProfiler", OnGpu)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    _, lines = profiled(gray, tmp_path)
    assert re.fullmatch(r"without waiting between the parts [\d.]+ ms a step", lines[9])
    assert len(waits) > 3 * len(PARTS) and set(waits) == {"cpu"}


@pytest.mark.parametrize("method", ["ordinalclip", "linear", "regression"])
def test_a_profiled_step_is_one_of_training(gray, method):
    runs = [tiny_run(gray, "--method", method) for _ in range(3)]
    images, labels = next(iter(make_loaders(runs[0])[0]))
    runs[0].model.train()
    batch = prepare_batch(images, runs[0].args, runs[0].preprocess)
    LossModule(runs[0].model, "normalized")(batch, labels)[0].backward()
    TrainingState(runs[0], 0, None).step()
    profile.StepProfiler(runs[1]).step(images, labels)
    plain, timed, first = (list(run.model.parameters()) for run in runs)
    assert len(plain) == len(timed) and all(map(torch.equal, plain, timed))
    assert sum(not torch.equal(*pair) for pair in zip(timed, first)) > 2


def test_of_several_runs_the_first_is_profiled(gray, tmp_path):
    _, lines = profiled(gray, tmp_path, "--seeds", "7", "5")
    assert lines[0].startswith("gray-ordinalclip-linear-K3-seed7 ")


def test_under_torchrun_it_is_refused(gray, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "world_size", lambda: 2)
    with pytest.raises(SystemExit, match="measures one process, torchrun started 2; start it with"):
        profiled(gray, tmp_path)


def test_steps_of_several_batches_are_refused(gray, tmp_path):
    with pytest.raises(SystemExit, match="times steps of one batch; leave --accumulate out"):
        profiled(gray, tmp_path, "--accumulate", "2")


def test_the_average_of_the_weights_is_timed_too(gray, tmp_path, monkeypatch):
    updates = []
    monkeypatch.setattr(AveragedModel, "update_parameters", lambda self, model: updates.append(1))
    profiled(gray, tmp_path, "--ema", "0.9")
    assert len(updates) == profile.WARM_UP + 3


@pytest.mark.full
def test_a_compiled_tower_is_timed(gray, tmp_path):
    rows, _ = profiled(gray, tmp_path, "--compile")
    assert rows["image tower"][0] > 0 and rows["image tower"][1] > 0 and rows["image tower"][6] > 0
