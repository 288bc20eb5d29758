"""pytest tests/test_weights_fuzz.py -- exported files and checkpoints, changed at random; -m full for
thousands of them."""

import random
import re

import pytest
import torch

import predict
from clip_model import tiny_clip
from clip_weights import load_file
from ordinalclip import FixedPrototypes, OrdinalCLIP

NAN = float("nan")


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
    torch.save(content, path)
    data = bytearray(path.read_bytes())
    if change == "cut":
        data = data[: rng.randrange(len(data))]
    for _ in range(rng.choice([1, 3, 20]) if change == "flip" else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
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
