"""pytest tests/test_loaders.py -- batches over processes, features of a frozen encoder."""

import pytest
import torch
from conftest import TINY

import train
from training import loaders
from training.loaders import load_task, make_loaders, without_image_encoder
from training.methods import build_model


def build(folder, tmp_path, *flags):
    """The model of a run before training."""
    args = train.parse_args(["--data", str(folder), "--out", str(tmp_path / "x"), *TINY, *flags])
    torch.manual_seed(args.seed)
    return build_model(args, load_task(args))[0]


def test_batches_are_shared_out_evenly(monkeypatch):
    args = train.parse_args(["--batch-size", "9"])
    monkeypatch.setattr(loaders, "world_size", lambda: 2)
    with pytest.raises(SystemExit, match="--batch-size 9 is over all processes: 2 must divide it"):
        make_loaders(args, None, {}, None)


def test_a_frozen_encoder_stays_and_its_features_are_computed_once(gray, tmp_path, monkeypatch):
    calls, compute = [], loaders.compute_features
    monkeypatch.setattr(
        loaders, "compute_features", lambda *args: calls.append(1) or compute(*args)
    )
    start = build(gray, tmp_path, "--freeze-image").image_encoder.state_dict()
    argv = ["--data", str(gray), *TINY, "--freeze-image", "--out"]
    results = train.main([*argv, str(tmp_path / "a")])
    assert len(calls) == 3  # train, val, test
    again = train.main([*argv, str(tmp_path / "b")])
    assert len(calls) == 3 and again["test"] == results["test"]
    end = torch.load(tmp_path / "a" / "best.pt", weights_only=True)["model"]
    assert all(torch.equal(value, end[f"image_encoder.{key}"]) for key, value in start.items())
    whole = torch.load(tmp_path / "a" / "exported.pt", weights_only=True)["state_dict"]
    assert any(key.startswith("image_encoder.") for key in whole)


def test_features_give_the_logits_that_images_give(gray, tmp_path):
    model = build(gray, tmp_path, "--freeze-image").eval()
    images = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        features = model.image_encoder(images)
        assert torch.equal(without_image_encoder(model)(features), model(images))
    assert not isinstance(model.image_encoder, torch.nn.Identity)
