"""pytest tests/test_weights_fuzz.py -- exported files and checkpoints, changed at random; -m full for
thousands of them."""

import copy
import random
import re
import shutil

import pytest
import torch

import predict
import train
from clip_model import tiny_clip
from clip_weights import load_file
from ordinalclip import FixedPrototypes, OrdinalCLIP
from training.checkpoints import NEEDED_TO_RESUME, load_checkpoint, load_state

NAN = float("nan")


def save(rng, content, path, change):
    """Write content to path, cut off or with bits flipped where the change is that."""
    torch.save(content, path)
    data = bytearray(path.read_bytes())
    if change == "cut":
        data = data[: rng.randrange(len(data))]
    for _ in range(rng.choice([1, 3, 20]) if change == "flip" else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def mutate(rng, content, path):
    """Write content, changed at random, to path; returns what was done."""
    state = dict(content["state_dict"])
    key = rng.choice(sorted(state))
    change = rng.choice(["flip", "cut", "rename", "shape", "dtype", "drop", "fill", "entry"])
    if change == "rename":
        state[key[::-1]] = state.pop(key)
    elif change == "shape":
        shape = [rng.choice([0, 1, 2, size, size + 1]) for size in state[key].shape]
        state[key] = torch.zeros(rng.choice([shape, shape[1:], [*shape, 2]]))
    elif change == "dtype":
        state[key] = state[key].to(rng.choice([torch.int64, torch.float16, torch.complex64]))
    elif change == "drop":
        del state[key]
    elif change == "fill":
        value = rng.choice([NAN, float("inf"), 3e38, -3e38, 0.0])
        state[key] = torch.full(state[key].shape, value)
    content = content | {"state_dict": state}
    if change == "entry":
        key = rng.choice(sorted(content))
        content[key] = rng.choice([None, 0, 1.5, "x", [], {}, [NAN], (1, 2, 3), torch.zeros(2)])
    save(rng, content, path, change)
    return change


@pytest.mark.parametrize("cases", [40, pytest.param(3000, marks=pytest.mark.full)])
def test_mutated_exported_files(tmp_path, cases):
    """Each gives the answers of the whole file, other finite ones, or one line that names it."""
    rng, path, encoder = random.Random(cases), tmp_path / "x.pt", tiny_clip(image_size=32).visual
    whole = OrdinalCLIP(encoder, FixedPrototypes(torch.randn(4, 128)), 3.0).eval()
    content = dict(
        format="ordinalclip-1", image_encoder="clip", quick_gelu=True, state_dict=whole.state_dict(),
        rank_names=list("abcd"), rank_values=[0.0, 1.0, 2.0, 3.0],
        preprocess=dict(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3),
    )  # fmt: skip
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    refused = answered = 0
    for _ in range(cases):
        change = mutate(rng, content, path)
        try:
            predictor = predict.load(path)
            if predictor.preprocess["image_size"] == 32:
                assert predictor.predict(pixels)["probs"].isfinite().all()
            answered += 1
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and "weights_only" not in str(error), change
            assert str(path) in str(error) or "the model answers nan" in str(error), change
    print(f"{cases} mutated exported files: {refused} refused in one line, {answered} answered")
    assert refused > cases // 3 and answered > 0 and refused + answered == cases


def mutate_checkpoint(rng, content, path):
    """Write a checkpoint, changed at random at any depth, to path; returns what was done."""
    content = copy.deepcopy(content)
    part = content
    while True:
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = rng.choice(keys)
        deeper = isinstance(part[key], (dict, list)) and len(part[key])
        if not deeper or rng.random() < 0.3:
            break
        part = part[key]
    change = rng.choice(["flip", "cut", "drop", "entry", "rename", "shape", "nan"])
    value = part[key]
    if change == "drop":
        del part[key]
    elif change == "entry":
        part[key] = rng.choice([None, 0, -1, 1.5, NAN, "x", [], {}, [1], torch.zeros(2)])
    elif change == "rename" and isinstance(part, dict):
        part[str(key)[::-1] + "_"] = part.pop(key)
    elif change == "shape" and torch.is_tensor(value):
        part[key] = torch.zeros([size + 1 for size in value.shape] or [2])
    elif change == "nan" and torch.is_tensor(value) and value.is_floating_point():
        part[key] = torch.full_like(value, NAN)
    save(rng, content, path, change)
    return f"{change} {key}"


@pytest.mark.parametrize("cases", [20, pytest.param(3000, marks=pytest.mark.full)])
def test_mutated_checkpoints(finished_run, tmp_path, monkeypatch, cases):
    """--resume and --eval end as they should or in one line: no traceback."""
    rng, run_dir = random.Random(cases), tmp_path / "run"
    contents = {
        name: torch.load(finished_run[0] / name, weights_only=True)
        for name in ("last.pt", "best.pt")
    }
    monkeypatch.setattr(train, "evaluate_test_set", lambda *_: {})  # what is tested is the reading
    monkeypatch.setattr(train, "save_model", lambda *_: None)
    refused = read = 0
    for _ in range(cases):
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(finished_run[0], run_dir, ignore=shutil.ignore_patterns("pictures"))
        (run_dir / "results.json").unlink()
        name, flag = rng.choice([("last.pt", "--resume"), ("best.pt", "--eval")])
        change = mutate_checkpoint(rng, contents[name], run_dir / name)
        try:
            train.main([flag, str(run_dir)])
            read += 1
        except SystemExit as error:
            refused += 1
            assert "\n" not in str(error) and "weights_only" not in str(error), (flag, change)
        except Exception as error:
            raise AssertionError(f"{flag} {change}") from error
    print(f"{cases} mutated checkpoints: {refused} refused in one line, {read} read")
    assert refused > cases // 3 and read > 0 and refused + read == cases


@pytest.mark.parametrize("cases", [200, pytest.param(100_000, marks=pytest.mark.full)])
def test_reading_mutated_checkpoints(finished_run, tmp_path, cases):
    """The reading alone, of a model so small that many can be read."""
    rng, path, model = random.Random(cases), tmp_path / "last.pt", torch.nn.Linear(3, 2)
    content = torch.load(finished_run[0] / "last.pt", weights_only=True)
    content |= dict(model=model.state_dict(), optimizer={}, initial_similarity=torch.eye(2))
    refused = read = 0
    for _ in range(cases):
        change = mutate_checkpoint(rng, content, path)
        try:
            saved = load_checkpoint(path, *NEEDED_TO_RESUME)
            load_state(model, saved["model"], path)
            assert all(value.isfinite().all() for value in model.parameters()), change
            read += 1
        except SystemExit as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error), (change, error)
        except Exception as error:
            raise AssertionError(change) from error
    print(f"{cases} small checkpoints: {refused} refused in one line, {read} read")
    assert refused > cases // 3 and read > 0 and refused + read == cases


def test_a_flipped_bit_anywhere_is_found_or_harmless(tmp_path):
    """torch.load does not compare checksums; load_file does."""
    path, tensors = tmp_path / "x.pt", {"a": torch.arange(2000.0), "b": [1, "two"]}
    torch.save(tensors, path)
    data, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            got = load_file(path, "it")
            assert torch.equal(got["a"], tensors["a"]) and got["b"] == tensors["b"]
        except ValueError as error:
            assert re.match(rf"{path} \(\d+ bytes\) cannot be read: ", str(error))
            refused += 1
    assert refused > 150
