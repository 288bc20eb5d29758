"""pytest tests/test_optim.py -- the optimizer, its schedule, and what may be added to the paper's."""

import copy
import dataclasses
import math
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import TINY, tiny_run
from PIL import Image
from torch import nn

import data
import train
from evaluation.metrics import compute_metrics
from training import loaders
from training.checkpoints import TrainingState
from training.methods import LossModule
from training.optim import build_average, build_schedule, epochs_without_progress


def learning_rates(epochs, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = build_schedule(Namespace(epochs=epochs, warmup=warmup), optimizer)
    rates = []
    for _ in range(epochs):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_the_learning_rate_rises_then_falls_as_a_cosine():
    cosine = [1 + math.cos(math.pi * i / 4) for i in range(4)]
    assert learning_rates(4, 0) == pytest.approx(cosine)
    assert learning_rates(7, 3) == pytest.approx([0.5, 1.0, 1.5, *cosine])


def test_encoder_and_prompts_have_learning_rates_of_their_own(gray):
    run = tiny_run(gray, "--lr-image", "0.25")
    run.args.lr_prompts = 0.5  # without --lr, which would have no effect
    state = TrainingState(run, 0.0, None)
    rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
    assert rates == dict(image_encoder=0.25, prototypes=0.5)


def test_gradients_of_several_batches_are_averaged(gray, monkeypatch):
    """56 images, batches of 16 in groups of 3: 16, 16, 16 and 8."""
    run = tiny_run(gray, "--accumulate", "3", "--save-every", "1000")
    model = run.model
    state = TrainingState(run, 0.0, None)
    gradients, weights = [], [copy.deepcopy(model)]

    def step(self):
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        weights.append(copy.deepcopy(model))
        self.optimizer.zero_grad()

    monkeypatch.setattr(TrainingState, "step", step)
    loader = train.make_loaders(run)[0]
    train.train_one_epoch(run, LossModule(model, "normalized"), state, loader, 1)
    batches = [batch for batch in loader]
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 8] and len(gradients) == 2
    for group, expected, start in zip((batches[:3], batches[3:]), gradients, weights):
        start.train().zero_grad()
        for images, labels in group:
            images = loaders.prepare_batch(images, run.args, run.preprocess)
            (start.loss(images, labels)[0] / len(group)).backward()
        actual = [p.grad for p in start.parameters() if p.grad is not None]
        assert len(actual) == len(expected) > 10
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_the_average_is_the_exponential_one():
    model = nn.BatchNorm1d(1)
    average, expected = build_average(Namespace(ema=0.375), model), None
    for n, value in enumerate((1.0, 5.0, -3.0, 4.0, 2.0, 7.0, 8.0, 9.0)):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        average.update_parameters(model)
        decay = min(0.375, (1 + n) / (10 + n))  # of the last three: 0.375
        expected = value if n == 0 else decay * expected + (1 - decay) * value
    assert average.module.weight.item() == average.module.running_mean.item()
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert build_average(Namespace(ema=None), model) is None


def test_the_average_of_a_short_run_has_left_its_start():
    model = nn.Linear(1, 1)
    average = build_average(Namespace(ema=0.9999), model)
    for value in [0.0] + [1.0] * 100:
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
    assert average.module.weight.item() > 0.999  # with 0.9999 from the start: 0.01


def test_the_averaged_weights_are_validated_and_saved(gray, tmp_path):
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "run")]
    train.main([*argv, "--ema", "0.5"])
    best, last = (torch.load(tmp_path / "run" / f"{name}.pt") for name in ("best", "last"))
    for key, value in best["model"].items():
        assert torch.equal(value, last["average"][f"module.{key}"])
    key = "prototypes.context_embeds"
    assert not torch.equal(best["model"][key], last["model"][key])


def test_epochs_without_progress():
    def log(*errors):
        return [dict(val_mae_argmax=error) for error in errors]

    assert epochs_without_progress([]) == 0
    assert epochs_without_progress(log(3, 2, 1)) == 0
    assert epochs_without_progress(log(3, 1, 2, 1)) == 2  # an equal one is no progress


def test_a_run_without_progress_stops(gray, tmp_path, monkeypatch):
    fixed = dict.fromkeys(compute_metrics(torch.eye(4), torch.arange(4)), 0.5)
    monkeypatch.setattr(train, "part_metrics", lambda task, part, probs, labels: fixed)
    argv = ["--data", str(gray), *TINY, "--epochs", "6", "--out", str(tmp_path / "run")]
    train.main([*argv, "--patience", "2"])
    assert len(train.torch.load(tmp_path / "run" / "last.pt")["log"]) == 3
    (tmp_path / "run" / "results.json").unlink()
    train.main(["--resume", str(tmp_path / "run")])
    assert len(train.torch.load(tmp_path / "run" / "last.pt")["log"]) == 3


def test_balanced_draws_all_ranks_equally_often(gray):
    run = tiny_run(gray, "--balanced")
    gray_task = run.task
    sampler, num_images = train.make_loaders(run)[0].sampler, len(gray_task.train)
    counts = torch.tensor([s.label for s in gray_task.train]).bincount()
    assert counts.max() > 3 * counts.min()
    drawn = []
    for epoch in range(1, 51):
        sampler.set_epoch(epoch)
        drawn += [gray_task.train[key % num_images].label for key in sampler]
    assert len(drawn) == 50 * num_images
    assert len({*sampler}) == num_images  # each draw of an image has a crop of its own
    shares = torch.tensor(drawn).bincount() / len(drawn)
    assert (shares - 0.25).abs().max() < 0.04, shares  # 2800 draws: standard deviation 0.008


@pytest.mark.parametrize("flags, orders", [((), {True, False}), (("--no-flip",), {True})])
def test_images_are_mirrored_half_the_time_or_never(gray, tmp_path, flags, orders):
    pixels = torch.zeros(96, 96, 3, dtype=torch.uint8)
    pixels[:, 48:] = 255  # dark on the left
    Image.fromarray(pixels.numpy()).save(tmp_path / "half.png")
    samples = (data.Sample("half.png", 0),) * 20
    run = tiny_run(gray, *flags)
    run = dataclasses.replace(run, task=dataclasses.replace(run.task, train=samples, root=tmp_path))
    loader = train.make_loaders(run)[0]
    images = torch.cat([batch for batch, _ in loader])
    assert {bool(image[:, :, 0].max() < image[:, :, -1].min()) for image in images} == orders


def test_compile_compiles_the_image_encoder(gray, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    model = tiny_run(gray, "--compile").model
    assert compiled == [model.image_encoder]


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_equals_the_plain_one(gray, tmp_path):
    results = [
        train.main(["--data", str(gray), *TINY, "--out", str(tmp_path / name), *flags])
        for name, flags in (("plain", ()), ("compiled", ("--compile", "--ema", "0.9")))
    ]
    plain = train.main(["--data", str(gray), *TINY, "--out", str(tmp_path / "e"), "--ema", "0.9"])
    compiled, plain, other = (
        {name: value for name, value in run["test"].items() if value is not None}
        for run in (results[1], plain, results[0])
    )
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert other != plain
