"""pytest tests/test_exports.py -- regression models, and ONNX, which needs onnx and onnxscript."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from test_predict import NAMES, PREPROCESS, export, image_of

import data
import predict
from clip_model import tiny_clip
from ordinalclip import Regression

METADATA = dict(
    rank_names=NAMES,
    rank_values=[0.0, 1.0, 2.0, 5.0],
    image_size=64,
    mean=list(PREPROCESS["mean"]),
    std=list(PREPROCESS["std"]),
)


@pytest.fixture
def exported(finished_run):
    return str(finished_run[0] / "exported.pt")


def regression_file(path):
    """An exported regression model, and the model."""
    encoder = tiny_clip(vision="vit").visual
    torch.manual_seed(0)
    model = Regression(encoder, 128, 4, "l1").eval()
    pixels = torch.stack([predict._read_pixels(PREPROCESS, image_of(i)) for i in range(6)])
    with torch.no_grad():  # answers of noise that lie apart, around 1.5
        model.head.weight.mul_(20)
        answers = model(data.normalize(pixels, data.CLIP_MEAN, data.CLIP_STD))
        model.head.bias.sub_(answers.mean() - 1.5)
    export(path, encoder, state_dict=model.state_dict())
    return model


def test_labels_of_another_shape_are_refused_by_regression():
    model = Regression(torch.nn.Flatten(), 12, 4, "l1")
    images = torch.zeros(2, 3, 2, 2)
    assert model.loss(images, torch.tensor([0, 3]), impl="torch")[0].item() == 1.5
    with pytest.raises(ValueError, match="got labels .2, 1. for 2 images"):
        model.loss(images, torch.tensor([[0], [3]]))


def test_a_regression_model_predicts_like_the_others(tmp_path):
    path, images = tmp_path / "e.pt", [image_of(i) for i in range(6)]
    model = regression_file(path)
    predictor = predict.load(path)
    answers = predictor(images)
    pixels = torch.stack([predict._read_pixels(PREPROCESS, image) for image in images])
    with torch.no_grad():
        exact = model(data.normalize(pixels, data.CLIP_MEAN, data.CLIP_STD)).clamp(0, 3)
    torch.testing.assert_close(answers["expected"], exact)
    assert exact.std() > 0.05 and answers["rank"].tolist() == exact.round().long().tolist()
    assert answers["name"] == [NAMES[rank] for rank in exact.round().long()]
    torch.testing.assert_close(answers["probs"] @ torch.arange(4.0), exact)
    with pytest.raises(SystemExit) as caught:
        predict.main([str(path), "--save-prototypes", str(tmp_path / "p.pt")])
    assert str(caught.value) == (
        f"predict.py: {path} is of a regression run, which has no prototypes"
    )
    content = torch.load(path, weights_only=True)
    torch.save(content | dict(rank_values=[1.0]), path)
    with pytest.raises(ValueError, match="4 rank_names, 1 rank_values; expected"):
        predict.load(path)


HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))


@pytest.mark.skipif(HAS_ONNX, reason="onnx is installed")
def test_missing_onnx_is_named(exported, tmp_path):
    with pytest.raises(SystemExit, match="--onnx needs two packages .*pip install onnx onnxscript"):
        predict.main([exported, "--onnx", str(tmp_path / "m.onnx")])
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        predict.export_onnx(predict.load(exported), tmp_path / "m.onnx")


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx and onnxscript")
@pytest.mark.parametrize("name", ["resnet", "vit", "regression"])
def test_onnx_answers_like_pytorch(tmp_path, name, monkeypatch):
    import onnx.reference

    if name == "regression":
        model = regression_file(tmp_path / "e.pt")
    else:
        model = export(tmp_path / "e.pt", tiny_clip(vision=name).visual)
    assert predict.main([str(tmp_path / "e.pt"), "--onnx", str(tmp_path / "m.onnx")]) == 0
    session = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "m.onnx"))
    entries = onnx.load(tmp_path / "m.onnx").metadata_props
    metadata = {entry.key: json.loads(entry.value) for entry in entries if entry.key in METADATA}
    assert metadata == METADATA
    images = torch.randn(5, 3, 64, 64)
    probs, expected = map(torch.from_numpy, session.run(None, dict(images=images.numpy())))
    want = model.predict(images)
    torch.testing.assert_close(probs, want["probs"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(expected, want["expected"], atol=1e-4, rtol=1e-3)

    wrong = [np.zeros((3, 4), "f4"), np.zeros(3, "f4")]
    monkeypatch.setattr(onnx.reference.ReferenceEvaluator, "run", lambda *_: wrong)
    with pytest.raises(ValueError, match="the ONNX model answers"):
        predict.export_onnx(predict.load(tmp_path / "e.pt"), tmp_path / "n.onnx")
    assert not list(tmp_path.glob("n.onnx*"))
