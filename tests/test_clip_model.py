# python -m pytest tests/test_clip_model.py -q        (offline, CPU)
"""Both towers at full size against frozen outputs of independent implementations, every file format and key
layout, downloads from a server on 127.0.0.1, and each error that a user can meet."""

import hashlib
import http.server
import json
import math
import re
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import clip_model
from clip_model import CLIP, MODELS, download, read_safetensors, tiny_clip

# ------------------------------------------------------------------- weights of the right shapes, by numpy
POOL = (
    np.random.RandomState(0).standard_normal(1_000_003).astype(np.float32)
)  # a prime: rows never align


def fill(shapes):
    """{name: shape} -> a state dict, the same on every machine: names in sorted order, sane scales."""
    pool, starts, state = np.concatenate([POOL, POOL]), np.random.RandomState(1), {}
    for name in sorted(shapes):
        shape, start = shapes[name], starts.randint(len(POOL))
        z = np.resize(pool[start : start + len(POOL)], shape)
        if name.endswith("num_batches_tracked"):
            z = np.zeros(shape, np.int64)
        elif name == "logit_scale":
            z = np.full(shape, math.log(100), np.float32)
        elif name.endswith("running_var"):
            z = 1 + 0.2 * abs(z)
        elif name.endswith("weight") and len(shape) == 1:  # of a norm
            z = 1 + 0.1 * z
        elif name.endswith(("bias", "embedding", "embedding.weight", "running_mean")):
            z = 0.1 * z
        else:
            z *= np.float32(math.prod(shape[1:]) ** -0.5)
        state[name] = torch.from_numpy(z)
    return state


def blocks(prefix, width, layers):
    layer = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    return {f"{prefix}.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


def text(dim, width, layers=12):
    return blocks("transformer.resblocks", width, layers) | {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "logit_scale": (),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, dim),
    }


def vit(dim, image_size, patch, width, layers):
    return blocks("visual.transformer.resblocks", width, layers) | {
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((image_size // patch) ** 2 + 1, width),
        "visual.proj": (width, dim),
        **{
            f"visual.{norm}.{kind}": (width,)
            for norm in ("ln_pre", "ln_post")
            for kind in ("weight", "bias")
        },
    }


def resnet(dim, image_size, layers, width):
    shapes, top = {}, 32 * width

    def conv(conv_name, norm_name, channels_in, channels_out, kernel):
        shapes[f"visual.{conv_name}.weight"] = (channels_out, channels_in, kernel, kernel)
        shapes[f"visual.{norm_name}.num_batches_tracked"] = ()
        for kind in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"visual.{norm_name}.{kind}"] = (channels_out,)

    for i, sizes in enumerate([(3, width // 2), (width // 2, width // 2), (width // 2, width)], 1):
        conv(f"conv{i}", f"bn{i}", *sizes, 3)
    channels_in = width
    for stage, count in enumerate(layers):
        channels = width * 2**stage
        for i in range(count):
            block = f"layer{stage + 1}.{i}."
            conv(block + "conv1", block + "bn1", channels_in, channels, 1)
            conv(block + "conv2", block + "bn2", channels, channels, 3)
            conv(block + "conv3", block + "bn3", channels, 4 * channels, 1)
            if i == 0:
                conv(block + "downsample.0", block + "downsample.1", channels_in, 4 * channels, 1)
            channels_in = 4 * channels
    for name, size in (("q", top), ("k", top), ("v", top), ("c", dim)):
        shapes[f"visual.attnpool.{name}_proj.weight"] = (size, top)
        shapes[f"visual.attnpool.{name}_proj.bias"] = (size,)
    return shapes | {"visual.attnpool.positional_embedding": ((image_size // 32) ** 2 + 1, top)}


# name -> shapes, number of parameters (counted on openai/CLIP's classes), image size
ARCHITECTURES = {
    "RN50": (text(1024, 512) | resnet(1024, 224, (3, 4, 6, 3), 64), 102_007_137, 224),
    "RN101": (text(512, 512) | resnet(512, 224, (3, 4, 23, 3), 64), 119_688_033, 224),
    "RN50x4": (text(640, 640) | resnet(640, 288, (4, 6, 10, 6), 80), 178_300_601, 288),
    "RN50x16": (text(768, 768) | resnet(768, 384, (6, 8, 18, 8), 96), 290_979_217, 384),
    "RN50x64": (text(1024, 1024) | resnet(1024, 448, (3, 15, 36, 10), 128), 623_258_305, 448),
    "ViT-B/32": (text(512, 512) | vit(512, 224, 32, 768, 12), 151_277_313, 224),
    "ViT-B/16": (text(512, 512) | vit(512, 224, 16, 768, 12), 149_620_737, 224),
    "ViT-L/14": (text(768, 768) | vit(768, 224, 14, 1024, 24), 427_616_513, 224),
    "ViT-L/14@336px": (text(768, 768) | vit(768, 336, 14, 1024, 24), 427_944_193, 336),
}
TINY = text(96, 64, 2) | vit(96, 64, 16, 128, 2)
TINY_RESNET = text(96, 64, 1) | resnet(96, 64, (1, 2, 1, 1), 16)
# ViT-H's width, whose heads are 80 wide, with open_clip's names (which are OpenAI's)
TINY_OPEN_CLIP = text(96, 64, 1) | vit(96, 64, 32, 1280, 1)


def hugging_face(dim, widths, image_size, patch, layers):
    """Shapes of a Hugging Face CLIPModel with text and vision `widths`."""
    shapes = {
        "logit_scale": (),
        "text_projection.weight": (dim, widths[0]),
        "visual_projection.weight": (dim, widths[1]),
        "text_model.embeddings.token_embedding.weight": (49408, widths[0]),
        "text_model.embeddings.position_embedding.weight": (77, widths[0]),
        "vision_model.embeddings.class_embedding": (widths[1],),
        "vision_model.embeddings.patch_embedding.weight": (widths[1], 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (
            (image_size // patch) ** 2 + 1,
            widths[1],
        ),
    }
    linear = {f"self_attn.{name}_proj": (1, 1) for name in "qkv"} | {
        "self_attn.out_proj": (1, 1),
        "mlp.fc1": (4, 1),
        "mlp.fc2": (1, 4),
    }
    norms = [
        "text_model.final_layer_norm",
        "vision_model.pre_layrnorm",
        "vision_model.post_layernorm",
    ]
    for tower, width in zip(("text_model", "vision_model"), widths):
        for prefix in (f"{tower}.encoder.layers.{i}." for i in range(layers)):
            norms += [prefix + "layer_norm1", prefix + "layer_norm2"]
            for name, (rows, columns) in linear.items():
                shapes[f"{prefix}{name}.weight"] = (rows * width, columns * width)
                shapes[f"{prefix}{name}.bias"] = (rows * width,)
    for norm in norms:
        width = widths[norm.startswith("vision")]
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    return shapes


TINY_HUGGING_FACE = hugging_face(96, (64, 128), 64, 16, 2)


def inputs(image_size):
    images = torch.from_numpy(np.resize(POOL, (1, 3, image_size, image_size)))
    tokens = torch.zeros(2, 77, dtype=torch.long)
    for row, length in zip(tokens, (9, 30)):
        row[:length] = torch.from_numpy(np.random.RandomState(length).randint(300, 49000, length))
        row[0], row[length - 1] = 49406, 49407
    return images, tokens


def summary(image_features, text_features):
    """Eight values and the norm of each feature vector."""
    rows = torch.cat([image_features, text_features]).double()
    return torch.cat([rows[:, :8], rows.norm(dim=1, keepdim=True)], 1).flatten()


@torch.no_grad()
def outputs(clip):
    images, tokens = inputs(clip.image_size)
    return summary(clip.encode_image(images), clip.encode_text(tokens))


def close(got, golden):
    """Relative error at most 1e-5: of the values, and of each norm."""
    got, golden = got.double().reshape(3, 9), torch.tensor(golden, dtype=torch.double).reshape(3, 9)
    values = (got - golden)[:, :8].norm(dim=1) <= 1e-5 * golden[:, :8].norm(dim=1)
    norms = (got - golden)[:, 8].abs() <= 1e-5 * golden[:, 8]
    return bool(values.all() and norms.all())


# Made with clip-anytorch 2.6.0 (OpenAI's clip/model.py) and torch 2.13.0, float32 on a CPU:
#     model = clip.model.CLIP(...).eval(); model.load_state_dict(fill(ARCHITECTURES[name][0]))
#     images, tokens = inputs(224); summary(model.encode_image(images), model.encode_text(tokens))
# It lies within 2e-6 of float64, row by row. The B/16 and the B/32 have the same text tower.
GOLDEN = {
    "RN50": [
        -0.70958477,
        0.50339592,
        0.3754968,
        -0.61280793,
        -0.21749568,
        0.10586821,
        -1.0491759,
        1.2900115,
        21.409371,
        -0.22313154,
        1.0638964,
        -0.34668541,
        -0.94436419,
        -0.15410581,
        1.4433558,
        0.31231484,
        -0.49657562,
        23.718332,
        -0.29839757,
        1.1768901,
        0.30604687,
        -0.62111413,
        0.11789703,
        1.2412999,
        0.6548726,
        -0.64641386,
        23.293927,
    ],
    "ViT-B/32": [
        1.0801841,
        0.91249025,
        -0.56895852,
        -0.60205197,
        0.65901476,
        1.1686324,
        0.55776793,
        1.727497,
        27.151893,
        1.1817777,
        0.32347989,
        -0.2088812,
        0.49810672,
        0.43927383,
        -0.40020299,
        -1.2511179,
        -1.0141641,
        24.333285,
        0.66269743,
        0.46550375,
        0.037614018,
        0.66222262,
        -0.73188913,
        -1.5939705,
        -1.3850009,
        -0.95217401,
        23.598168,
    ],
    "ViT-B/16": [
        1.0210072,
        1.3574147,
        -0.58992469,
        -0.23380166,
        0.34754992,
        1.4836648,
        -0.54096532,
        2.0657074,
        27.357852,
        1.1817777,
        0.32347989,
        -0.2088812,
        0.49810672,
        0.43927383,
        -0.40020299,
        -1.2511179,
        -1.0141641,
        24.333285,
        0.66269743,
        0.46550375,
        0.037614018,
        0.66222262,
        -0.73188913,
        -1.5939705,
        -1.3850009,
        -0.95217401,
        23.598168,
    ],
    "ViT-L/14": [
        -0.057828881,
        -0.030588776,
        -0.22218615,
        -0.13064004,
        -0.81404912,
        1.4248946,
        -0.54592508,
        -0.61691093,
        32.477402,
        -0.95554149,
        0.25656164,
        0.54558778,
        -1.3219817,
        0.8408376,
        -0.28652626,
        -0.30501124,
        -0.34696305,
        27.426482,
        -0.6394673,
        0.23671442,
        0.1059418,
        -0.24707069,
        1.054373,
        0.74769777,
        0.68129748,
        -0.075886786,
        28.662331,
    ],
}
# Made with transformers 5.23.0: CLIPModel of a CLIPConfig with widths 64 and 128, 2 layers, heads 64 wide and
# hidden_act as here, load_state_dict(fill(TINY_HUGGING_FACE)), get_text_features, get_image_features.
GOLDEN_HUGGING_FACE = {
    "quick_gelu": [
        -0.23068264,
        1.076905,
        -0.46249634,
        -0.20039678,
        -1.1246815,
        1.11836,
        1.8990655,
        -1.2247448,
        10.418422,
        -0.062903762,
        -1.095226,
        -1.2573123,
        0.67088878,
        1.6453333,
        0.34600678,
        -1.3995521,
        1.4079218,
        9.2041099,
        -0.25159383,
        -0.92802036,
        -0.56571954,
        -0.089711964,
        2.0453291,
        0.95420146,
        -0.88640428,
        1.0637045,
        8.8207142,
    ],
    "gelu": [
        -0.23258093,
        1.0763738,
        -0.46629071,
        -0.20771733,
        -1.1238698,
        1.1115844,
        1.893393,
        -1.2310252,
        10.411669,
        -0.06035769,
        -1.1001438,
        -1.2593343,
        0.67954701,
        1.6449594,
        0.34316593,
        -1.3896363,
        1.3918444,
        9.1918993,
        -0.24204016,
        -0.92486513,
        -0.56893802,
        -0.087261319,
        2.0501838,
        0.95318478,
        -0.87479788,
        1.0589588,
        8.8102542,
    ],
}
# Made with open_clip_torch 3.3.0: open_clip.model.CLIP(96, dict(layers=1, width=1280, head_width=80,
# patch_size=32, image_size=64), dict(width=64, heads=1, layers=1), quick_gelu=...) with fill(TINY_OPEN_CLIP).
GOLDEN_OPEN_CLIP = {
    "quick_gelu": [
        4.2579021,
        -2.3510962,
        -0.063649893,
        -6.3274002,
        1.1510255,
        -0.026064664,
        -2.8350141,
        5.6644487,
        33.5751,
        -0.36973396,
        1.0379688,
        -0.43726593,
        1.2629592,
        0.39905301,
        1.0930121,
        -1.1785969,
        -1.22413,
        8.8100849,
        0.042640995,
        -0.13334101,
        0.16688921,
        1.9129608,
        -2.6829503,
        0.97583222,
        0.45006001,
        -1.1351511,
        8.8550781,
    ],
    "gelu": [
        4.2589898,
        -2.3528686,
        -0.058468342,
        -6.3230829,
        1.1755772,
        -0.032322139,
        -2.8539577,
        5.6727638,
        33.57957,
        -0.38243505,
        1.0434841,
        -0.42649081,
        1.2614466,
        0.40374723,
        1.1018993,
        -1.1884773,
        -1.2037449,
        8.8087447,
        0.040592715,
        -0.12886159,
        0.16386238,
        1.9104692,
        -2.702534,
        0.97283709,
        0.4518474,
        -1.1125895,
        8.8617473,
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_full_size_equals_openai(name):
    clip = CLIP.from_state_dict(fill(ARCHITECTURES[name][0]))
    assert not clip.training and clip.image_size == 224
    assert (clip.embed_dim, clip.context_length, clip.vocab_size) == (
        clip.text_projection.shape[1],
        77,
        49408,
    )
    assert close(outputs(clip), GOLDEN[name])


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(
    "shapes, golden",
    [(TINY_HUGGING_FACE, GOLDEN_HUGGING_FACE), (TINY_OPEN_CLIP, GOLDEN_OPEN_CLIP)],
    ids=["hugging face", "open_clip"],
)
def test_tiny_equals_other_packages_with_the_right_activation_only(shapes, golden, activation):
    got = outputs(CLIP.from_state_dict(fill(shapes), quick_gelu=activation == "quick_gelu"))
    assert [name for name in golden if close(got, golden[name])] == [activation]


def test_the_comparison_rejects_wrong_outputs():
    golden = GOLDEN["RN50"]
    exact = torch.tensor(golden)
    assert close(exact, golden) and close(exact * (1 + 1e-6), golden)
    assert not close(exact * 0, golden)
    assert not close(exact * (1 + 3e-5), golden)
    assert not close(exact.reshape(3, 9)[[0, 2, 1]], golden)  # texts swapped
    for i in range(27):
        wrong = exact.clone()
        wrong[i] += 0.01
        assert not close(wrong, golden)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_of_every_model_of_openai(name):
    shapes, parameters, image_size = ARCHITECTURES[name]
    with torch.device("meta"):  # shapes without memory
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        clip = CLIP(**clip_model._architecture(state, quick_gelu=True))
    assert {key: tuple(value.shape) for key, value in clip.state_dict().items()} == shapes
    assert sum(value.numel() for value in clip.parameters()) == parameters
    assert clip.image_size == image_size
    assert {block.attn.num_heads for block in clip.transformer.resblocks} == {
        clip.text_projection.shape[0] // 64
    }


def test_models_have_urls_with_their_hash():
    assert list(MODELS) == list(ARCHITECTURES)
    for url, sha256 in MODELS.values():
        assert (
            re.fullmatch(r"https://[\w./-]+/" + sha256 + r"/[\w-]+\.pt", url) and len(sha256) == 64
        )
    assert MODELS["ViT-L/14@336px"][0].endswith("/ViT-L-14-336px.pt")


# ------------------------------------------------------------------------------------------- the two towers
@pytest.fixture(scope="module")
def state():
    return fill(TINY)


@pytest.fixture(scope="module")
def clip(state):
    return CLIP.from_state_dict(state)


def equal(clip, state):
    """Whether the model holds these values, as float32."""
    got = clip.state_dict()
    return got.keys() == state.keys() and all(
        got[key].dtype == (torch.float32 if value.is_floating_point() else value.dtype)
        and torch.equal(got[key], value.to(got[key].dtype))
        for key, value in state.items()
    )


def test_text_is_causal_and_ends_at_the_last_eot(clip):
    _, tokens = inputs(64)
    short = clip.encode_text(tokens)
    noise = tokens.clone()
    noise[0, 9:], noise[1, 30:] = 77, 78  # after [EOT]
    noise = torch.cat([noise, torch.full((1, 77), 5)])
    noise[2, 76] = 49407  # the full 77
    assert torch.allclose(clip.encode_text(noise)[:2], short, rtol=0, atol=2e-5)
    assert torch.allclose(clip.encode_text(tokens[:, :30].int()), short, rtol=0, atol=1e-6)
    changed = tokens.clone()
    changed[0, 1] += 1
    moved = (clip.encode_text(changed) - short).norm(dim=1) / short.norm(dim=1)
    assert moved[0] > 0.01 and moved[1] < 1e-6


@pytest.mark.parametrize("vision", ["resnet", "vit"])
def test_tiny_clip_is_the_same_for_the_same_seed_and_learns(vision):
    before = torch.get_rng_state()
    clip, same, other = (tiny_clip(seed, vision=vision) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(clip, same.state_dict()) and not equal(clip, other.state_dict())
    assert not clip.training and math.isclose(clip.logit_scale.exp().item(), 30, rel_tol=1e-6)
    images, tokens = inputs(64)
    image_features, text_features = clip.encode_image(images), clip.encode_text(tokens)
    assert image_features.shape == (1, 128) and text_features.shape == (2, 128)
    assert torch.equal(clip.visual(images), image_features)
    (clip.logit_scale * image_features @ text_features.T).sum().backward()
    without = [
        name
        for name, parameter in clip.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vision", ["resnet", "vit"])
def test_half_precision(vision, dtype):
    clip, (images, tokens) = tiny_clip(vision=vision), inputs(64)
    with torch.no_grad():
        exact = clip.encode_image(images), clip.encode_text(tokens)
        with torch.autocast("cpu", dtype):
            mixed = clip.encode_image(images), clip.encode_text(tokens)
        clip.to(dtype)
        half = clip.encode_image(images.to(dtype)), clip.encode_text(tokens)
    for want, *others in zip(exact, mixed, half):
        for got in others:
            assert got.dtype == dtype and (got.float() - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("vision", ["resnet", "vit"])
@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(2, 1, 64, 64),
        torch.zeros(3, 64, 64),
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
    ],
    ids=["size", "channels", "no batch", "uint8"],
)
def test_wrong_images(vision, images):
    message = rf"{images.dtype} {re.escape(str(tuple(images.shape)))}; expected float \(B, 3, 64, 64\): resize"
    with pytest.raises(ValueError, match=message):
        tiny_clip(vision=vision).visual(images)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(77, dtype=torch.long),
        torch.zeros(2, 78, dtype=torch.long),
        torch.zeros(2, 77),
        torch.zeros(0, 77, dtype=torch.long),
    ],
    ids=["no batch", "too long", "float", "none"],
)
def test_wrong_tokens(clip, tokens):
    message = rf"{tokens.dtype} {re.escape(str(tuple(tokens.shape)))}; expected int64 \(M, 77\), as the tokenizer"
    with pytest.raises(ValueError, match=message):
        clip.encode_text(tokens)


def test_wrong_arguments_of_tiny_clip():
    with pytest.raises(ValueError, match="vision='vgg'; expected 'resnet' or 'vit'"):
        tiny_clip(vision="vgg")
    with pytest.raises(
        ValueError, match="width=100; expected a multiple of 64, the width of CLIP's heads"
    ):
        tiny_clip(width=100)


# ------------------------------------------------------------------------------------------ state dicts
def test_state_dicts_are_copied_as_float32(state, clip):
    assert equal(clip, state)
    mine = {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    }
    mine["visual.proj"] = mine["visual.proj"].T.contiguous().T  # not contiguous
    mine["ln_final.bias"] = torch.zeros(1).expand(64)
    before = torch.get_rng_state()
    loaded = CLIP.from_state_dict(mine)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(loaded, mine) and all(
        p.is_contiguous() and p.requires_grad for p in loaded.parameters()
    )
    torch.set_default_dtype(torch.float64)
    try:
        again = CLIP.from_state_dict(loaded.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert equal(again, mine) and mine["visual.proj"].any()  # shares no memory with either


def test_resnet_without_counters():
    whole = fill(TINY_RESNET)
    lean = {key: value for key, value in whole.items() if not key.endswith("num_batches_tracked")}
    assert len(lean) < len(whole) and equal(CLIP.from_state_dict(lean), whole)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"module." + key: value for key, value in state.items()},
        lambda state: {"_orig_mod.module." + key: value for key, value in state.items()},
        lambda state: {
            "epoch": 3,
            "state_dict": {"module." + k: v for k, v in state.items()},
            "optimizer": {},
        },
        lambda state: {"model": state},
        lambda state: {
            key if key.startswith(("visual.", "logit_scale")) else "text." + key: value
            for key, value in state.items()
        },  # open_clip's CustomTextCLIP
        lambda state: (
            state
            | {
                "input_resolution": 64,
                "context_length": torch.tensor(77),
                "vocab_size": 49408,
                "attn_mask": torch.zeros(77, 77),
            }
        ),
    ],
    ids=["DataParallel", "compiled", "open_clip checkpoint", "wrapped", "CustomTextCLIP", "extras"],
)
def test_wrapped_and_prefixed(state, wrap):
    assert equal(CLIP.from_state_dict(wrap(state)), state)


def test_hugging_face_with_position_ids():
    theirs = fill(TINY_HUGGING_FACE)
    old = theirs | {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    ours = CLIP.from_state_dict(theirs)
    assert equal(CLIP.from_state_dict(old), ours.state_dict())
    assert torch.equal(ours.visual.proj, theirs["visual_projection.weight"].T)


def without(state, *prefixes):
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def hugging_face_tower(*prefixes):
    return {
        key: value for key, value in fill(TINY_HUGGING_FACE).items() if key.startswith(prefixes)
    }


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: without(s, "visual.ln_post.bias"), r'Missing key.*"visual.ln_post.bias"'),
        (lambda s: without(s, "visual."), r"KeyError\('visual.positional_embedding'\)"),
        (lambda s: without(s, "token_embedding"), r"KeyError\('token_embedding.weight'\)"),
        (
            lambda s: without(s, "transformer.resblocks.0."),
            r"KeyError\('transformer.resblocks.0.mlp.c_fc.weight'\)",
        ),
        (
            lambda s: s | {"visual.proj": torch.zeros(128, 97)},
            r"mismatch for visual.proj: .*97.*96",
        ),
        (
            lambda s: s | {"positional_embedding": torch.zeros(77, 65)},
            r"mismatch for positional_embedding: .*65.*64",
        ),
        (
            lambda s: s | {"visual.positional_embedding": torch.zeros(16, 128)},
            r"mismatch .*16, 128.*10, 128",
        ),
        (lambda s: s | {"visual.conv1.weight": torch.zeros(128, 768)}, "not enough values"),
        (
            lambda s: s | {"visual.proj": np.zeros((128, 96))},
            "visual.proj.* received <class .*numpy.ndarray",
        ),
        (lambda s: s | {"logit_bias": torch.zeros(())}, r'Unexpected key.*"logit_bias"'),  # SigLIP
        (
            lambda s: s | {"token_embedding.weight": torch.zeros(9, 64)},
            "vocabulary of 9; expected CLIP's 49408",
        ),
        (
            lambda s: without(s, "visual.") | {"visual.trunk.norm.weight": torch.zeros(9)},
            "KeyError",
        ),  # timm
        (lambda s: hugging_face_tower("text_"), r"KeyError\('visual.positional_embedding'\)"),
        (
            lambda s: hugging_face_tower("vision_", "visual_"),
            r"KeyError\('token_embedding.weight'\)",
        ),
        (
            lambda s: without(
                fill(TINY_HUGGING_FACE), "text_model.encoder.layers.0.self_attn.k_proj"
            ),
            "Missing key",
        ),
        (lambda s: {}, "KeyError.*got 0 entries"),
        (
            lambda s: fill(text(96, 100, 1) | vit(96, 64, 16, 128, 1)),
            "width=100; expected a multiple of 64",
        ),
    ],
    ids=[
        "one missing",
        "no image tower",
        "no text tower",
        "no first block",
        "projection",
        "text positions",
        "image positions",
        "dimensions",
        "numpy",
        "SigLIP",
        "vocabulary",
        "timm",
        "text model only",
        "vision model only",
        "no keys",
        "empty",
        "heads",
    ],
)
def test_not_a_whole_clip(state, spoil, message):
    message = f"(?s)not a whole CLIP: .*{message}.*expected both towers.* choose other weights"
    with pytest.raises(ValueError, match=message):
        CLIP.from_state_dict(spoil(dict(state)))


def test_not_a_state_dict():
    with pytest.raises(
        ValueError, match=r"got a Linear; expected a dict, as model.state_dict\(\) gives"
    ):
        CLIP.from_state_dict(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------- files
SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def safetensors_bytes(state, pad=0):
    """The format as its specification has it: header length, JSON, raw little-endian tensors."""
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = dict(
            dtype=SAFETENSORS_NAMES[tensor.dtype],
            shape=list(tensor.shape),
            data_offsets=[len(raw), len(raw) + len(data)],
        )
        raw += data
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8 + pad)
    return len(header).to_bytes(8, "little") + header + raw


class Nest(nn.Module):
    """A module with the parameters and buffers of a state dict under their names, and more buffers."""

    def __init__(self, state, **extras):
        super().__init__()
        for key, value in state.items():
            *path, name = key.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, Nest({}))
                module = module._modules[part]
            if key.endswith(("num_batches_tracked", "running_mean", "running_var")):
                module.register_buffer(name, value)
            else:
                module.register_parameter(name, nn.Parameter(value))
        for name, value in extras.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x):
        return x


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """-> path, state dict of a TorchScript archive like OpenAI's: fp16 under their names, three more entries."""
    path = tmp_path_factory.mktemp("archive") / "resnet.pt"
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in fill(TINY_RESNET).items()
    }
    nest = Nest(half, input_resolution=64, context_length=77, vocab_size=49408)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(nest, torch.zeros(1)).save(str(path))
    return path, half


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_torchscript_archive(archive, monkeypatch):
    path, half = archive
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(
        ValueError, match=f"TorchScript.*{sha256}, is not in MODELS; .*pass trust_torchscript=True"
    ):
        CLIP.from_pretrained(path)
    trusted = CLIP.from_pretrained(
        path, trust_torchscript=True
    )  # no quick_gelu needed: it is OpenAI's
    assert (
        equal(trusted, half)
        and type(trusted.transformer.resblocks[0].mlp.gelu) is clip_model.QuickGELU
    )
    monkeypatch.setitem(MODELS, "known", ("http://127.0.0.1/", sha256))
    assert equal(CLIP.from_pretrained(path), half)
    gelu = CLIP.from_pretrained(path, quick_gelu=False)
    assert type(gelu.transformer.resblocks[0].mlp.gelu) is nn.GELU


@pytest.mark.parametrize(
    "name, save",
    [
        ("zip.pt", torch.save),
        (
            "old.pt",
            lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
        ),
        ("model.SAFETENSORS", lambda state, path: path.write_bytes(safetensors_bytes(state))),
        (
            "unaligned.safetensors",
            lambda state, path: path.write_bytes(safetensors_bytes(state, pad=3)),
        ),
    ],
    ids=["zip", "not zip", "safetensors", "unaligned"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format(state, tmp_path, monkeypatch, name, save, dtype):
    saved = {key: value.to(dtype) for key, value in state.items()}
    save(saved, tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = CLIP.from_pretrained(f"~/{name}", quick_gelu=True)
    (tmp_path / name).write_bytes(b"")  # it is not needed any more
    assert equal(loaded, saved) and not loaded.training
    assert torch.isfinite(outputs(loaded)).all()


def test_read_safetensors(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "é": torch.randn(2, 3, 4).bfloat16(),
    }
    path = tmp_path / "some.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    got = read_safetensors(path)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_damaged_and_foreign_files(state, archive, tmp_path):
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    whole = {
        "safetensors": safetensors_bytes(state),
        "ts.pt": archive[0].read_bytes(),
        **{name: (tmp_path / name).read_bytes() for name in ("zip.pt", "old.pt")},
    }
    bad = {
        f"{i}.{kind}": data[:size]
        for kind, data in whole.items()
        for i, size in enumerate([0, 4, 300, len(data) // 2, len(data) - 9])
    }
    bad["junk.safetensors"] = whole["safetensors"] + b"junk"
    bad["types.safetensors"] = safetensors_bytes({"a": torch.zeros(2)}).replace(b"F32", b"F99")
    bad["list.safetensors"] = (2).to_bytes(8, "little") + b"[]"
    bad["page.pt"] = bad["page.safetensors"] = (
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    )
    bad["lfs.bin"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name, data in bad.items():
        path = tmp_path / f"bad {name}"
        path.write_bytes(data)
        message = rf"(?s)cannot read {path} \({len(data)} bytes\): \w+ .*expected a state dict .*damaged, get it again"
        with pytest.raises(ValueError, match=message):
            CLIP.from_pretrained(path, quick_gelu=True, trust_torchscript=True)
    with pytest.raises(ValueError, match=r"\d+ bytes of tensors, its header says \d+"):
        read_safetensors(tmp_path / "bad junk.safetensors")


def test_objects_are_never_unpickled(tmp_path):
    for i, value in enumerate([nn.Linear(2, 2), {"a": Path("/")}, [1, 2], torch.zeros(2)]):
        path = tmp_path / f"{i}.pt"
        torch.save(value, path)
        with pytest.raises(
            ValueError, match=r"(?s)expected a state dict.*save its state_dict\(\) alone"
        ) as caught:
            CLIP.from_pretrained(path, quick_gelu=True)
        assert "`False`" not in str(caught.value) and "weights_only=False" not in str(caught.value)
    assert "weights_only=False" not in Path(clip_model.__file__).read_text()


def test_folders(state, tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    message = (
        f"no weights at '{tmp_path}'; expected one of RN50, .* or a file, or a folder with model.safetensors "
        ".*weights in parts must be merged"
    )
    with pytest.raises(FileNotFoundError, match=message):
        CLIP.from_pretrained(tmp_path)
    names = [
        "open_clip_pytorch_model.bin",
        "pytorch_model.bin",
        "open_clip_model.safetensors",
        "model.safetensors",
    ]
    for i, name in enumerate(names):  # each is preferred to the ones before
        moved = state | {"ln_final.bias": state["ln_final.bias"] + i}
        if name.endswith("bin"):
            torch.save(moved, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(safetensors_bytes(moved))
        assert equal(CLIP.from_pretrained(str(tmp_path), quick_gelu=False), moved)
    with pytest.raises(
        FileNotFoundError, match="no weights at 'RN51'; expected one of RN50, .*ViT-L/14@336px"
    ):
        CLIP.from_pretrained("RN51")


@pytest.fixture
def tiny_folder(state, tmp_path):
    torch.save(state, tmp_path / "pytorch_model.bin")
    return tmp_path


GELU = {
    "model_type": "clip",
    "text_config": {"hidden_act": "gelu"},
    "vision_config": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize(
    "configs, expected",
    [
        ({"config.json": GELU}, nn.GELU),
        (
            {"config.json": {"model_type": "clip", "text_config": None}},
            clip_model.QuickGELU,
        ),  # the default there
        ({"open_clip_config.json": {"model_cfg": {"embed_dim": 96}}}, nn.GELU),  # and here
        ({"open_clip_config.json": {"model_cfg": {"quick_gelu": True}}}, clip_model.QuickGELU),
        ({"config.json": GELU, "open_clip_config.json": {"model_cfg": {}}}, nn.GELU),
        (
            {"config.json": {"model_type": "other"}, "open_clip_config.json": {"model_cfg": {}}},
            nn.GELU,
        ),
        ({}, r"say \[\]"),
        ({"config.json": {"model_type": "other"}}, r"say \[\]"),
        ({"config.json": GELU | {"vision_config": {}}}, r"say \['gelu', 'quick_gelu'\]"),
        (
            {"config.json": GELU, "open_clip_config.json": {"model_cfg": {"quick_gelu": True}}},
            r"say \['gelu', 'quick_gelu'\]",
        ),
        (
            {"config.json": {"model_type": "clip", "text_config": {"hidden_act": "relu"}}},
            r"\['quick_gelu', 'relu'\]",
        ),
        (
            {"config.json": {"model_type": "clip", "text_config": {"hidden_act": None}}},
            r"say \['None', 'quick_gelu'\]",
        ),
    ],
)
def test_activation_from_the_config_beside_the_weights(tiny_folder, configs, expected):
    for name, config in configs.items():
        (tiny_folder / name).write_text(json.dumps(config))
    if isinstance(expected, str):
        message = f"activation of .*bin is unknown: .*{expected}; expected gelu or quick_gelu: pass quick_gelu=True"
        with pytest.raises(ValueError, match=message):
            CLIP.from_pretrained(tiny_folder)
    else:
        clip = CLIP.from_pretrained(tiny_folder)
        assert {type(module.gelu) for module in clip.modules() if hasattr(module, "gelu")} == {
            expected
        }


def test_damaged_config(tiny_folder):
    (tiny_folder / "config.json").write_text("<html>")
    message = r"config.json is no JSON \(.*char 0\).*; expected a model's config: get it again"
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(tiny_folder)


# ---------------------------------------------------------------------------------------------- download
DATA = POOL.tobytes()[:3_000_000]
SHA256 = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.data in the way that server.mode says; notes the Range headers."""

    def do_GET(self):
        mode, data, wanted = self.server.mode, self.server.data, self.headers.get("Range")
        self.server.ranges.append(wanted)
        if mode == "404":
            return self.send_error(404)
        if mode == "garbage":
            return self.wfile.write(b"what?\r\n\r\n")
        begin = int(wanted[len("bytes=") : -1]) if wanted and mode != "no ranges" else 0
        if begin and begin >= len(data):
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        if mode != "no length":
            self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        time.sleep(0.3 if mode == "slow" else 0)
        self.wfile.write(data[begin : begin + 1_000_000 if mode == "cut" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.mode, server.data, server.ranges = "whole", DATA, []
        server.url = f"http://127.0.0.1:{server.server_port}/some/model.pt"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("mode", ["whole", "no ranges", "no length"])
def test_download_once(server, tmp_path, mode):
    server.mode = mode
    path = download(server.url, SHA256, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "model.pt" and path.read_bytes() == DATA
    assert download(server.url, SHA256, path.parent) == path and server.ranges == [None]
    assert not (path.parent / "model.pt.part").exists()


def test_download_goes_to_the_home_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download(server.url, SHA256) == tmp_path / ".cache" / "clip" / "model.pt"
    assert download(server.url, SHA256, "~/other") == tmp_path / "other" / "model.pt"


def test_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.mode = "cut"
    for _ in range(2):
        with pytest.raises(
            ConnectionError, match=r"closed after \d+ of 3000000 bytes.*\nRun again to go on"
        ):
            download(server.url, SHA256, tmp_path)
        assert not (tmp_path / "model.pt").exists()
    assert (tmp_path / "model.pt.part").stat().st_size == 2_000_000
    assert download(server.url, SHA256, tmp_path).read_bytes() == DATA
    assert server.ranges == [None, "bytes=1000000-", "bytes=2000000-"]


@pytest.mark.parametrize(
    "mode, part",
    [("no ranges", DATA[:5000]), ("no ranges", b"x" * 5000), ("whole", DATA), ("whole", b"")],
    ids=["no ranges", "no ranges, stale", "whole already", "empty"],
)
def test_part_from_before(server, tmp_path, mode, part):
    server.mode = mode
    (tmp_path / "model.pt.part").write_bytes(part)
    assert download(server.url, SHA256, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("size", [5000, 4_000_000])
def test_stale_part_is_dropped(server, tmp_path, size):
    (tmp_path / "model.pt.part").write_bytes(b"x" * size)
    with pytest.raises(
        ValueError, match=f"model.pt.part has sha256 [0-9a-f]{{64}}, expected {SHA256}; .*run again"
    ):
        download(server.url, SHA256, tmp_path)
    assert not (tmp_path / "model.pt").exists()
    assert download(server.url, SHA256, tmp_path).read_bytes() == DATA


def test_wrong_file(server, tmp_path):
    server.data = b"<html>log in first</html>"
    got = hashlib.sha256(server.data).hexdigest()
    with pytest.raises(ValueError, match=f"has sha256 {got}, expected {SHA256}; .*run again"):
        download(server.url, SHA256, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    (tmp_path / "model.pt").write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"model.pt has sha256 .*, expected {SHA256}; .*delete it"):
        download(server.url, SHA256, tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == b"mine"  # not ours to delete


@pytest.mark.parametrize(
    "mode, reason", [("404", "HTTPError 404"), ("garbage", "BadStatusLine|RemoteDisconnected")]
)
def test_server_without_the_file(server, tmp_path, mode, reason):
    server.mode = mode
    with pytest.raises(
        ConnectionError, match=f"cannot download {server.url} to {tmp_path}/model.pt: .*({reason})"
    ):
        download(server.url, SHA256, tmp_path)


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/ViT.pt"
        monkeypatch.setitem(MODELS, "ViT", (url, SHA256))
        message = (
            rf"(?s)cannot download {url} to {tmp_path}/ViT.pt: .*refused.*choose another cache_dir, or put the "
            rf"file \(sha256 {SHA256}\) there yourself"
        )
        with pytest.raises(ConnectionError, match=message):
            CLIP.from_pretrained("ViT", cache_dir=tmp_path)


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConnectionError, match="(?s)(NotADirectory|FileExists)Error.*choose another cache_dir"
    ):
        download(server.url, SHA256, tmp_path / "file" / "folder")
    assert server.ranges == []


@pytest.mark.skipif(clip_model.fcntl is None, reason="no file locks on this system")
def test_several_at_once_download_once(server, tmp_path):
    server.mode, paths = "slow", []
    threads = [
        threading.Thread(target=lambda: paths.append(download(server.url, SHA256, tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [tmp_path / "model.pt"] * 3 and server.ranges == [None]


def test_progress_on_a_terminal_only(server, tmp_path, capsys, monkeypatch):
    download(server.url, SHA256, tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    download(server.url, SHA256, tmp_path / "b")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"\r{server.url}: ") and err.endswith("2 of 2 MiB\n")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_from_pretrained_by_name(server, archive, tmp_path, monkeypatch):
    path, half = archive
    server.data = path.read_bytes()
    monkeypatch.setitem(MODELS, "tiny", (server.url, hashlib.sha256(server.data).hexdigest()))
    for _ in range(2):
        assert equal(CLIP.from_pretrained("tiny", cache_dir=tmp_path), half)
    assert server.ranges == [None]
