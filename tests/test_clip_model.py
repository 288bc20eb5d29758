"""pytest tests/test_clip_model.py -- both towers against frozen outputs of independent packages,
state dicts in every key layout, and each error that a user can meet. Offline, CPU."""

import math
import re

import pytest
import torch
from clip_shapes import (
    TINY,
    TINY_HUGGING_FACE,
    TINY_OPEN_CLIP,
    TINY_RESNET,
    equal,
    fill,
    inputs,
    resnet,
    text,
    vit,
)
from torch import nn

import clip_model
from clip_model import CLIP, MODELS, tiny_clip

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


# fmt: off
# Made with clip-anytorch 2.6.0 (OpenAI's clip/model.py) and torch 2.13.0, float32 on a CPU:
#     model = clip.model.CLIP(...).eval(); model.load_state_dict(fill(ARCHITECTURES[name][0]))
#     images, tokens = inputs(224); summary(model.encode_image(images), model.encode_text(tokens))
# It lies within 2e-6 of float64, row by row. The B/16 and the B/32 have the same text tower.
GOLDEN = {
    "RN50": [
        -0.70958477, 0.50339592, 0.3754968, -0.61280793, -0.21749568, 0.10586821, -1.0491759,
        1.2900115, 21.409371, -0.22313154, 1.0638964, -0.34668541, -0.94436419, -0.15410581,
        1.4433558, 0.31231484, -0.49657562, 23.718332, -0.29839757, 1.1768901, 0.30604687,
        -0.62111413, 0.11789703, 1.2412999, 0.6548726, -0.64641386, 23.293927],
    "ViT-B/32": [
        1.0801841, 0.91249025, -0.56895852, -0.60205197, 0.65901476, 1.1686324, 0.55776793,
        1.727497, 27.151893, 1.1817777, 0.32347989, -0.2088812, 0.49810672, 0.43927383,
        -0.40020299, -1.2511179, -1.0141641, 24.333285, 0.66269743, 0.46550375, 0.037614018,
        0.66222262, -0.73188913, -1.5939705, -1.3850009, -0.95217401, 23.598168],
    "ViT-B/16": [
        1.0210072, 1.3574147, -0.58992469, -0.23380166, 0.34754992, 1.4836648, -0.54096532,
        2.0657074, 27.357852, 1.1817777, 0.32347989, -0.2088812, 0.49810672, 0.43927383,
        -0.40020299, -1.2511179, -1.0141641, 24.333285, 0.66269743, 0.46550375, 0.037614018,
        0.66222262, -0.73188913, -1.5939705, -1.3850009, -0.95217401, 23.598168],
    "ViT-L/14": [
        -0.057828881, -0.030588776, -0.22218615, -0.13064004, -0.81404912, 1.4248946, -0.54592508,
        -0.61691093, 32.477402, -0.95554149, 0.25656164, 0.54558778, -1.3219817, 0.8408376,
        -0.28652626, -0.30501124, -0.34696305, 27.426482, -0.6394673, 0.23671442, 0.1059418,
        -0.24707069, 1.054373, 0.74769777, 0.68129748, -0.075886786, 28.662331],
}
# Made with transformers 5.23.0: CLIPModel of a CLIPConfig with widths 64 and 128, 2 layers, heads
# 64 wide and hidden_act as here, load_state_dict(fill(TINY_HUGGING_FACE)), get_text_features,
# get_image_features.
GOLDEN_HUGGING_FACE = {
    "quick_gelu": [
        -0.23068264, 1.076905, -0.46249634, -0.20039678, -1.1246815, 1.11836, 1.8990655,
        -1.2247448, 10.418422, -0.062903762, -1.095226, -1.2573123, 0.67088878, 1.6453333,
        0.34600678, -1.3995521, 1.4079218, 9.2041099, -0.25159383, -0.92802036, -0.56571954,
        -0.089711964, 2.0453291, 0.95420146, -0.88640428, 1.0637045, 8.8207142],
    "gelu": [
        -0.23258093, 1.0763738, -0.46629071, -0.20771733, -1.1238698, 1.1115844, 1.893393,
        -1.2310252, 10.411669, -0.06035769, -1.1001438, -1.2593343, 0.67954701, 1.6449594,
        0.34316593, -1.3896363, 1.3918444, 9.1918993, -0.24204016, -0.92486513, -0.56893802,
        -0.087261319, 2.0501838, 0.95318478, -0.87479788, 1.0589588, 8.8102542],
}
# Made with open_clip_torch 3.3.0: open_clip.model.CLIP(96, dict(layers=1, width=1280,
# head_width=80, patch_size=32, image_size=64), dict(width=64, heads=1, layers=1), quick_gelu=...)
# with fill(TINY_OPEN_CLIP).
GOLDEN_OPEN_CLIP = {
    "quick_gelu": [
        4.2579021, -2.3510962, -0.063649893, -6.3274002, 1.1510255, -0.026064664, -2.8350141,
        5.6644487, 33.5751, -0.36973396, 1.0379688, -0.43726593, 1.2629592, 0.39905301, 1.0930121,
        -1.1785969, -1.22413, 8.8100849, 0.042640995, -0.13334101, 0.16688921, 1.9129608,
        -2.6829503, 0.97583222, 0.45006001, -1.1351511, 8.8550781],
    "gelu": [
        4.2589898, -2.3528686, -0.058468342, -6.3230829, 1.1755772, -0.032322139, -2.8539577,
        5.6727638, 33.57957, -0.38243505, 1.0434841, -0.42649081, 1.2614466, 0.40374723, 1.1018993,
        -1.1884773, -1.2037449, 8.8087447, 0.040592715, -0.12886159, 0.16386238, 1.9104692,
        -2.702534, 0.97283709, 0.4518474, -1.1125895, 8.8617473],
}
# fmt: on


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name == "ViT-L/14")) for name in GOLDEN]
)
def test_full_size_equals_openai(name):
    clip = CLIP.from_state_dict(fill(ARCHITECTURES[name][0]))
    assert not clip.training and clip.image_size == 224
    assert clip.embed_dim == clip.text_projection.shape[1]
    assert (clip.context_length, clip.vocab_size) == (77, 49408)
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
    heads = {block.attn.num_heads for block in clip.transformer.resblocks}
    assert heads == {clip.text_projection.shape[0] // 64}


def test_models_have_urls_with_their_hash():
    assert list(MODELS) == list(ARCHITECTURES)
    for url, sha256 in MODELS.values():
        assert re.fullmatch(rf"https://[\w./-]+/{sha256}/[\w-]+\.pt", url) and len(sha256) == 64
    assert MODELS["ViT-L/14@336px"][0].endswith("/ViT-L-14-336px.pt")


# -------------------------------------------------------------------------------- the two towers
@pytest.fixture(scope="module")
def state():
    return fill(TINY)


@pytest.fixture(scope="module")
def clip(state):
    return CLIP.from_state_dict(state)


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
    distance = (clip.encode_text(changed) - short).norm(dim=1) / short.norm(dim=1)
    assert distance[0] > 0.01 and distance[1] < 1e-6


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
    grads = {name: parameter.grad for name, parameter in clip.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []


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
def test_wrong_images(vision):
    tower = tiny_clip(vision=vision).visual
    for images in (
        torch.zeros(2, 3, 32, 32),  # size
        torch.zeros(2, 1, 64, 64),  # channels
        torch.zeros(3, 64, 64),  # no batch
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
    ):
        got = rf"{images.dtype} {re.escape(str(tuple(images.shape)))}"
        with pytest.raises(ValueError, match=rf"{got}; expected float \(B, 3, 64, 64\): resize"):
            tower(images)


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
    got = rf"{tokens.dtype} {re.escape(str(tuple(tokens.shape)))}"
    with pytest.raises(ValueError, match=rf"{got}; expected int64 \(M, 77\), as the tokenizer"):
        clip.encode_text(tokens)


def test_wrong_arguments_of_tiny_clip():
    with pytest.raises(ValueError, match="vision='vgg'; expected 'resnet' or 'vit'"):
        tiny_clip(vision="vgg")
    message = "width=100; expected a multiple of 64, the width of CLIP's heads"
    with pytest.raises(ValueError, match=message):
        tiny_clip(width=100)


# ----------------------------------------------------------------------------------- state dicts
def to_half(state):
    return {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    }


def test_state_dicts_are_copied_as_float32(state, clip):
    assert equal(clip, state)
    mine = to_half(state)
    mine["visual.proj"] = mine["visual.proj"].T.contiguous().T  # not contiguous
    mine["ln_final.bias"] = torch.zeros(1).expand(64)
    before = torch.get_rng_state()
    loaded = CLIP.from_state_dict(mine)
    assert torch.equal(torch.get_rng_state(), before) and equal(loaded, mine)
    assert all(p.is_contiguous() and p.requires_grad for p in loaded.parameters())
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


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def custom_text_clip(state):
    """open_clip's names: all of the text tower under `text.`."""
    shared = ("visual.", "logit_scale")
    return {key if key.startswith(shared) else "text." + key: v for key, v in state.items()}


SCALARS = dict(input_resolution=64, context_length=torch.tensor(77), vocab_size=49408)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 3, "state_dict": prefixed(state, "module."), "optimizer": {}},
        custom_text_clip,
        lambda state: state | SCALARS | {"attn_mask": torch.zeros(77, 77)},
    ],
    ids=["open_clip checkpoint", "CustomTextCLIP", "extras"],
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


def with_zeros(key, *shape):
    return lambda state: state | {key: torch.zeros(shape)}


HF_STATE = fill(TINY_HUGGING_FACE)
HF_KEY = "text_model.encoder.layers.0.self_attn.k_proj"
NOT_A_WHOLE_CLIP = {  # name -> what is done to the state dict of TINY, the message
    "one missing": (
        lambda s: without(s, "visual.ln_post.bias"),
        'Missing key.*"visual.ln_post.bias"',
    ),
    "no embedding": (lambda s: without(s, "token_embedding"), "KeyError 'token_embedding.weight'"),
    "no projection": (lambda s: without(s, "text_projection"), "KeyError 'text_projection'"),
    "no first block": (
        lambda s: without(s, "transformer.resblocks.0."),
        "KeyError 'transformer.resblocks.0.mlp.c_fc.weight'",
    ),
    "projection": (with_zeros("visual.proj", 128, 97), "mismatch for visual.proj: .*97.*96"),
    "text positions": (
        with_zeros("positional_embedding", 77, 65),
        "mismatch for positional_embedding: .*65.*64",
    ),
    "image positions": (
        with_zeros("visual.positional_embedding", 16, 128),
        "mismatch .*16, 128.*10, 128",
    ),
    "dimensions": (with_zeros("visual.conv1.weight", 128, 768), "not enough values"),
    "vocabulary": (
        with_zeros("token_embedding.weight", 9, 64),
        "a vocabulary of 9; expected CLIP's 49408",
    ),
    "no keys": (lambda s: without(HF_STATE, HF_KEY), "Missing key"),
    "empty": (lambda s: {}, "KeyError.*got 0 entries"),
    "heads": (
        lambda s: fill(text(96, 100, 1) | vit(96, 64, 16, 128, 1)),
        "width=100; expected a multiple of 64",
    ),
}


@pytest.mark.parametrize("spoil, message", NOT_A_WHOLE_CLIP.values(), ids=NOT_A_WHOLE_CLIP)
def test_not_a_whole_clip(state, spoil, message):
    message = f"not a complete CLIP: .*{message}.*expected both towers.* choose other weights$"
    with pytest.raises(ValueError, match=message):
        CLIP.from_state_dict(spoil(dict(state)))


def test_the_activation_is_found_out_or_asked_for(state):
    with pytest.raises(ValueError, match="quick_gelu=None, and a state dict does not say its acti"):
        CLIP.from_state_dict(state, quick_gelu=None)
    clip = CLIP.from_state_dict(state | {"input_resolution": torch.tensor(64)}, quick_gelu=None)
    assert isinstance(clip.transformer.resblocks[0].mlp.gelu, clip_model.QuickGELU)
    with pytest.raises(TypeError, match="quick_gelu=None; expected True or False"):
        clip_model.Transformer(64, 1, quick_gelu=None)


def test_not_a_state_dict():
    with pytest.raises(ValueError, match=r"got a Linear; expected a dict, as model.state_dict\(\)"):
        CLIP.from_state_dict(nn.Linear(2, 2))
