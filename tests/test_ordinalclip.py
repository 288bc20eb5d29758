"""pytest tests/test_ordinalclip.py -- interpolation, prompts, model and ordinality."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ordinalclip
from clip_model import tiny_clip
from kernels import matching_loss
from ordinalclip import (
    FixedPrototypes,
    LinearPrototypes,
    OrdinalCLIP,
    RankPrompts,
    Regression,
    encode_prompts,
    interpolation_weights,
    ordinality,
    ordinality_chance,
)

CONTEXT = torch.tensor([320, 1125, 539, 518, 3001])
NAMES = [[1000 + i] if i % 3 else [1000 + i, 2000 + i] for i in range(7)]  # of one or two tokens


@pytest.fixture(scope="module")
def clip():
    return tiny_clip(embed_dim=48, width=128, layers=3)


@pytest.fixture(scope="module")
def clip64():
    return tiny_clip(embed_dim=48, width=128, layers=2).double()


# ------------------------------------------------------------------------------------ interpolation
def test_weights_are_those_of_the_paper():
    linear, inverse = (interpolation_weights(101, 3, interp) for interp in ("linear", "inverse"))
    rows = {0: (2 / 3, 1 / 3, 0), 25: (3 / 7, 3 / 7, 1 / 7), 50: (1 / 4, 1 / 2, 1 / 4)}
    for rank, row in rows.items():
        torch.testing.assert_close(linear[rank], torch.tensor(row), atol=1e-6, rtol=0)
    torch.testing.assert_close(inverse[25], torch.tensor([3 / 7, 3 / 7, 1 / 7]), atol=1e-6, rtol=0)
    for base, rank in enumerate((0, 50, 100)):
        assert inverse[rank, base] > 1 - 1e-6  # passes through its base ranks
    two = interpolation_weights(11, 2, "linear")  # K = 2 is plain linear interpolation
    torch.testing.assert_close(two[:, 1], torch.arange(11) / 10)


@pytest.mark.parametrize("interp", ["linear", "inverse"])
def test_weights_are_finite_and_sum_to_one(interp):
    for ranks in (2, 3, 5, 30, 101, 500):
        for bases in {1, 2, 3, 4, 9, ranks - 1, ranks} - {0} & set(range(ranks + 1)):
            weights = interpolation_weights(ranks, bases, interp)
            assert weights.shape == (ranks, bases) and weights.dtype == torch.float32
            assert torch.isfinite(weights).all() and (weights >= 0).all()
            ones = torch.ones(ranks).double()
            torch.testing.assert_close(weights.double().sum(1), ones, atol=1e-6, rtol=0)
            torch.testing.assert_close(weights, weights.flip(0, 1))  # no end is preferred


@pytest.mark.parametrize(
    "args, message",
    [
        ((1, 1, "linear"), "num_ranks=1: an order needs at least 2"),
        ((5, 6, "linear"), "num_base_ranks=6: expected 1 to num_ranks=5"),
        ((5, 0, "inverse"), "num_base_ranks=0: expected 1 to num_ranks=5"),
        ((5, 3, "normal"), "interp='normal': expected linear or inverse"),
    ],
)
def test_weights_refuse(args, message):
    with pytest.raises(ValueError, match=message):
        interpolation_weights(*args)


# ------------------------------------------------------------------------ prompts against 77 tokens
def sentences(prompts, clip, position, lengths):
    """R x 77 embeddings, token by token as the official code lays them out; positions of [EOT]."""
    table, num_context = clip.token_embedding.weight.detach(), prompts.context_embeds.shape[-2]
    contexts = prompts.context_embeds.expand(len(lengths), num_context, -1)
    cut = {"tail": num_context, "middle": num_context // 2, "front": 0}[position]
    rows = []
    for context, weights, length in zip(contexts, prompts.weights, lengths):
        name = sum(w * e for w, e in zip(weights, prompts.rank_embeds))[:length]
        sot, full_stop, eot = table[[49406, 269, 49407]][:, None]
        words = torch.cat([sot, context[:cut], name, context[cut:], full_stop, eot])
        rows.append(torch.cat([words, table[0].expand(77 - len(words), -1)]))
    return torch.stack(rows), [num_context + length + 2 for length in lengths]


def encode_77(clip, embeds, eot):
    """CLIP's text tower over all 77 tokens, attention written out."""
    x = embeds + clip.positional_embedding
    mask = torch.full((77, 77), -math.inf, dtype=x.dtype).triu(1)
    for block in clip.transformer.resblocks:
        h = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        h = h.reshape(len(x), 77, 3, block.attn.num_heads, -1)
        q, k, v = h.permute(2, 0, 3, 1, 4)  # (R, heads, 77, W/heads) each
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + mask
        h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), 77, -1)
        x = x + block.attn.out_proj(h)
        x = x + block.mlp(block.ln_2(x))
    return clip.ln_final(x)[torch.arange(len(x)), eot] @ clip.text_projection


SPECIFIC = dict(rank_specific_context=True)
PROMPTS = {
    "tail": dict(context=CONTEXT),
    "middle": dict(context=CONTEXT, rank_position="middle", interp="inverse", num_base_ranks=4),
    "front": dict(context=6, rank_position="front", tokens_per_rank=2),
    **{
        f"names, {position}": dict(
            context=CONTEXT, rank_tokens=NAMES, interp="none", rank_position=position
        )
        for position in ("tail", "middle", "front")
    },
    "specific": dict(context=CONTEXT, **SPECIFIC),
    "specific, names": dict(
        context=3, rank_position="middle", rank_tokens=NAMES, tokens_per_rank=3, **SPECIFIC
    ),
    "no context": dict(context=0),
}


@pytest.mark.parametrize("options", PROMPTS.values(), ids=PROMPTS)
def test_prototypes_and_gradients_equal_those_of_77_tokens(clip64, options):
    torch.manual_seed(0)
    prompts = RankPrompts(clip64, 7, **options).double()
    lengths = [options.get("tokens_per_rank", 1)] * 7
    if options.get("interp") == "none":
        lengths = [len(name) for name in NAMES]
    embeds, eot = sentences(prompts, clip64, options.get("rank_position", "tail"), lengths)
    expected = encode_77(clip64, embeds, eot)  # (R, D)
    got = prompts()
    assert got.shape == (7, 48)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

    weight = torch.randn(7, 48, dtype=torch.float64)
    params = [prompts.context_embeds, prompts.rank_embeds]
    grads = [torch.autograd.grad((out * weight).sum(), params) for out in (got, expected)]
    for name, a, b in zip(("context", "rank"), *grads):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)
        assert b.numel() == 0 or b.abs().max() > 0


def test_shared_tokens_are_encoded_once(clip):
    """R=101 with 10 context tokens: 11 + 101 * 3 rows go through the tower, not 101 * 77."""
    prompts = RankPrompts(clip, 101, context=10)
    rows, mlp = [], clip.transformer.resblocks[1].mlp
    hook = mlp.register_forward_hook(lambda _, x, y: rows.append(x[0].shape))
    prompts()
    hook.remove()
    assert rows == [(11 + 101 * 3, 128)]


def test_padding_behind_eot_does_not_matter(clip):
    torch.manual_seed(0)
    shared, own, eot = torch.randn(4, 128), torch.randn(3, 5, 128), torch.tensor([1, 4, 2])
    other = own.clone()
    other[0, 2:], other[2, 3:] = 9.0, -9.0
    features = encode_prompts(clip, shared, own, eot)
    torch.testing.assert_close(features, encode_prompts(clip, shared, other, eot))


def test_encode_prompts_refuses_what_the_tower_cannot_read(clip):
    with pytest.raises(ValueError, match="prompts of 80 tokens; the tower reads 77"):
        encode_prompts(clip, torch.zeros(70, 128), torch.zeros(2, 10, 128), torch.tensor([9, 9]))


# -------------------------------------------------------------------------------------- RankPrompts
def test_only_context_and_ranks_train(clip):
    clip = copy.deepcopy(clip).requires_grad_(True)
    prompts = RankPrompts(clip, 9, context=CONTEXT)
    assert set(prompts.state_dict()) == {"context_embeds", "rank_embeds", "_extra_state"}
    assert {name for name, _ in prompts.named_parameters()} == {"context_embeds", "rank_embeds"}
    prompts.train().requires_grad_(True)()[:, 0].sum().backward()
    modules = ("transformer", "positional_embedding", "ln_final", "text_projection")
    text = [p for name, p in clip.named_parameters() if name.split(".")[0] in modules]
    assert len(text) > 30 and all(p.grad is None and not p.requires_grad for p in text)
    assert all(p.grad.abs().sum() > 0 for p in prompts.parameters())
    assert all(p.requires_grad for p in clip.visual.parameters())  # the image tower is left alone


def test_the_text_tower_moves_with_the_prompts(clip):
    clip = copy.deepcopy(clip)
    prompts = RankPrompts(clip, 9, context=CONTEXT)
    before = prompts()
    prompts.double()
    assert clip.text_projection.dtype == torch.float64 and prompts().dtype == torch.float64
    torch.testing.assert_close(prompts().float(), before, rtol=1e-4, atol=1e-4)


def test_averages_of_equal_state_dicts_load(clip):
    """Moving averages, soups, and casts move the settings that the extra state holds by a little."""
    torch.manual_seed(0)
    prompts = RankPrompts(clip, 101, context=CONTEXT, rank_tokens=[[500]] * 101, interp="none")
    state = prompts.state_dict()
    soup = {name: sum(value * (1 / 7) for _ in range(7)) for name, value in state.items()}
    moving = dict(state)
    for _ in range(20):
        moving = {name: 0.9 * moving[name] + 0.1 * state[name] for name in state}
    assert not torch.equal(moving["_extra_state"], state["_extra_state"])
    for other in (soup, moving, {name: value.bfloat16() for name, value in state.items()}):
        prompts.load_state_dict(other)


@pytest.mark.parametrize("decay", [0.9999, 0.9])
def test_averages_of_buffers_leave_the_prompts_as_they_are(clip, decay):
    torch.manual_seed(0)
    prompts = RankPrompts(clip, 30, context=8)
    average = AveragedModel(prompts, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(20):
        average.update_parameters(prompts)
    torch.testing.assert_close(average.module(), prompts())


def test_ranks_are_interpolated_in_float32_under_autocast(clip):
    torch.manual_seed(0)
    prompts = RankPrompts(clip, 101, context=CONTEXT)
    expected = prompts.prompt_embeds()[1]
    with torch.autocast("cpu", torch.bfloat16):
        own = prompts.prompt_embeds()[1]
        score = ordinality(prompts.rank_embeds[:, 0])
    assert torch.equal(own, expected)
    assert score == ordinality(prompts.rank_embeds[:, 0])


def test_a_half_precision_tower_is_used_as_it_is(clip):
    half = copy.deepcopy(clip).bfloat16()
    torch.manual_seed(0)
    prompts = RankPrompts(half, 9, context=CONTEXT)
    assert prompts.rank_embeds.dtype == torch.float32 and prompts().dtype == torch.bfloat16
    torch.manual_seed(0)
    cosine = F.cosine_similarity(prompts().float(), RankPrompts(clip, 9, context=CONTEXT)())
    assert (cosine > 0.995).all()


def test_base_ranks_start_at_the_names_nearest_their_positions(clip):
    table = clip.token_embedding.weight
    names = [[500 + i] for i in range(101)]
    prompts = RankPrompts(clip, 101, context=CONTEXT, rank_tokens=names, num_base_ranks=3)
    torch.testing.assert_close(prompts.rank_embeds[:, 0], table[[500, 550, 600]])
    options = dict(context=CONTEXT, rank_tokens=NAMES, num_base_ranks=2)
    name = table[[1000, 2000]]  # of two tokens
    prompts = RankPrompts(clip, 7, **options)
    torch.testing.assert_close(prompts.rank_embeds[0, 0], name.mean(0))
    prompts = RankPrompts(clip, 7, **options, tokens_per_rank=2)
    torch.testing.assert_close(prompts.rank_embeds[0], name)


def test_free_ranks_start_at_their_names_and_the_context_at_its_words(clip):
    table = clip.token_embedding.weight
    prompts = RankPrompts(clip, 7, context=CONTEXT, rank_tokens=NAMES, interp="none")
    assert prompts.rank_embeds.shape == (7, 2, 128)
    torch.testing.assert_close(prompts.rank_embeds[3], table[[1003, 2003]])
    torch.testing.assert_close(prompts.rank_embeds[1, 0], table[1001])
    torch.testing.assert_close(prompts.context_embeds, table[CONTEXT])
    own = RankPrompts(clip, 7, context=CONTEXT, rank_specific_context=True)
    torch.testing.assert_close(own.context_embeds[4], table[CONTEXT])


def test_untrained_coop_is_zero_shot(clip):
    """With free ranks at their names, prototypes are text features of the written-out prompts."""
    prompts = RankPrompts(clip, 7, context=CONTEXT, rank_tokens=NAMES, interp="none")
    tokens = torch.zeros(7, 77, dtype=torch.long)
    for row, name in zip(tokens, NAMES):
        ids = [49406, *CONTEXT.tolist(), *name, 269, 49407]
        row[: len(ids)] = torch.tensor(ids)
    torch.testing.assert_close(prompts(), clip.encode_text(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(interp="cubic"), "interp='cubic': expected linear or inverse; RankPrompts: or none"),
        (dict(rank_position="end"), "rank_position='end': expected tail, middle or front"),
        (dict(tokens_per_rank=0), "tokens_per_rank=0: expected at least 2 ranks and 1 token"),
        (dict(num_ranks=0, interp="none"), "num_ranks=0, tokens_per_rank=1: expected at least 2"),
        (dict(num_base_ranks=8), "num_base_ranks=8: expected 1 to num_ranks=7"),
        (dict(rank_tokens=NAMES[:3]), "rank_tokens holds 3 names; expected num_ranks=7"),
        (dict(rank_tokens=NAMES[:6] + [[]]), r"a name of rank_tokens is \[\]; expected token ids"),
        (
            dict(rank_tokens=NAMES[:6] + [[49408]]),
            r"a name of rank_tokens is \[49408\]; expected token ids",
        ),
        (dict(context=75), "a prompt of 79 tokens, .* the text tower reads 77"),
        (dict(context=-1), "context=-1: expected a number of tokens or their ids"),
        (dict(context=torch.zeros(2, 3).long()), r"context is tensor.*expected token ids \(N,\)"),
        (dict(context=torch.rand(3)), r"context is tensor.*; expected token ids"),
        (dict(context=10_000), "context=10000: expected a number of tokens or their ids"),
        (dict(context="the age is"), "context is 'the age is'; expected token ids"),
        (dict(context=["the", "age"]), r"context is \['the', 'age'\]; expected token ids"),
        (dict(context=[49406, 320]), r"context is \[49406, 320\]; .* without \[SOT\], \["),
        (dict(context=[320, 49407]), r"context is \[320, 49407\]; .* without \[SOT\], \["),
        (dict(context=[320, 0, 0]), r"context is \[320, 0, 0\]; .* and padding"),
        (dict(rank_tokens="1234567"), "a name of rank_tokens is '1'; expected token ids"),
        (dict(rank_tokens=list("1234567")), "a name of rank_tokens is '1'; expected token ids"),
        (dict(rank_tokens=NAMES[:6] + [[5, 49407]]), "a name of rank_tokens is .*EOT"),
        (dict(rank_tokens=NAMES[:6] + [[5, 0]]), "a name of rank_tokens is .*padding"),
    ],
)
def test_prompts_refuse(clip, options, message):
    with pytest.raises(ValueError, match=message):
        RankPrompts(clip, **{"num_ranks": 7, "context": CONTEXT, **options})


# -------------------------------------------------------------------------------------- OrdinalCLIP
def model_of(clip, **options):
    torch.manual_seed(0)
    return OrdinalCLIP(clip.visual, RankPrompts(clip, 9, context=4, **options), clip.logit_scale)


def test_logits_loss_and_prediction_agree(clip):
    model = model_of(clip).eval()
    images, labels = torch.randn(6, 3, 64, 64), torch.tensor([0, 3, 3, 8, 1, 0])
    logits = model(images)
    features, prototypes = model.image_encoder(images), model.prototypes()
    scale = clip.logit_scale.exp()
    cosine = F.cosine_similarity(features[:, None], prototypes[None], dim=-1)
    torch.testing.assert_close(logits, scale * cosine, rtol=1e-3, atol=1e-3)
    total, i2t, t2i = model.loss(images, labels)
    torch.testing.assert_close(total, i2t + t2i)
    torch.testing.assert_close(i2t, F.cross_entropy(logits, labels), rtol=1e-4, atol=1e-4)
    expected = matching_loss(features, prototypes, labels, scale, target="softmax10")
    got = model.loss(images, labels, target="softmax10")[1:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    prediction = model.predict(images)
    torch.testing.assert_close(prediction["probs"], logits.softmax(1))
    assert torch.equal(prediction["rank"], logits.argmax(1))
    torch.testing.assert_close(prediction["expected"], logits.softmax(1) @ torch.arange(9.0))


def test_export_gives_the_same_logits_without_the_text_tower(clip):
    model = model_of(clip).eval()
    exported = model.export()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(exported(images), model(images))
    assert not exported.training
    assert model.export(copy=False).image_encoder is model.image_encoder
    names = set(exported.state_dict())
    assert {"prototypes.prototypes", "logit_scale"} <= names
    assert all(name.startswith(("image_encoder.", "prototypes.", "logit_scale")) for name in names)
    calls = []
    hook = clip.transformer.register_forward_hook(lambda *_: calls.append(1))
    ln = clip.ln_final.register_forward_hook(lambda *_: calls.append(1))
    exported.predict(images)
    assert not calls
    model.prototypes()
    assert calls
    hook.remove(), ln.remove()


def regression_model():
    return Regression(torch.nn.Flatten(), 12, 700, "l2")


@pytest.mark.parametrize("build", [lambda clip: model_of(clip), lambda _: regression_model()])
def test_an_export_in_use_leaves_the_model_in_training(clip, build):
    model = build(clip).train()
    model.export().eval().requires_grad_(False)
    assert all(module.training for module in model.image_encoder.modules())
    assert all(p.requires_grad for p in model.image_encoder.parameters())


def test_regression_answers_in_float32_under_autocast():
    """bfloat16 would hold 700 as one of 696, 700, 704."""
    model = regression_model()
    torch.nn.init.constant_(model.head.weight, 0.0)
    torch.nn.init.constant_(model.head.bias, 701.5 / 2)
    images = torch.zeros(2, 3, 2, 2)
    hooks = []
    model.head.register_forward_hook(lambda *_: hooks.append(1))
    for cast in (model, copy.deepcopy(model).to(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            answer = cast.predict(images.to(cast.head.weight.dtype))
        assert answer["expected"].dtype == torch.float32
        torch.testing.assert_close(answer["probs"].sum(1), torch.ones(2))
    assert model(images).tolist() == [350.75, 350.75] and len(hooks) == 3


@pytest.mark.parametrize(
    "labels, message",
    [
        ([1, 2], "labels is a list; expected rank indices"),
        (torch.tensor([1.0, 2.0]), "labels are torch.float32; expected integer"),
        (torch.tensor([True, False]), "labels are torch.bool; expected integer"),
        (torch.tensor([1, 2]).to(torch.uint16), "labels are torch.uint16; expected integer"),
        (torch.tensor([1, 700]), r"labels run from 1 to 700; expected rank indices 0\.\.699"),
        (torch.tensor([[1], [2]]), r"got labels \(2, 1\) for 2 images"),
    ],
)
def test_regression_refuses_other_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        regression_model().loss(torch.zeros(2, 3, 2, 2), labels)


def test_regression_has_gradients_per_image():
    model, labels = regression_model(), torch.tensor([3, 650])
    images = torch.randn(2, 3, 2, 2)

    def loss(params, image, label):
        model_loss = lambda *x: model.loss(*x)[0]  # noqa: E731
        return torch.func.functional_call(
            Wrapped(model, model_loss), params, (image[None], label[None])
        )

    params = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, images, labels)
    model.loss(images, labels)[0].backward()
    torch.testing.assert_close(grads["model.head.weight"].mean(0), model.head.weight.grad)


def test_prompts_have_gradients_per_image():
    x, p = torch.randn(4, 8), torch.randn(5, 8)
    labels = torch.tensor([0, 4, 2, 2])

    def loss(p, x, label):
        return matching_loss(x[None], p, label[None], 10.0)[0]

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(p, x, labels)
    p.requires_grad_()
    matching_loss(x, p, labels, 10.0)[0].backward()
    torch.testing.assert_close(grads.mean(0), p.grad)


class Wrapped(torch.nn.Module):
    def __init__(self, model, function):
        super().__init__()
        self.model, self.forward = model, function


def test_regression_of_no_images_has_no_loss():
    total, *_ = regression_model().loss(torch.zeros(0, 3, 2, 2), torch.zeros(0, dtype=torch.long))
    assert total.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_has_the_same_temperature(clip, dtype):
    model = model_of(copy.deepcopy(clip))
    scale = model.logit_scale.clone()
    model.to(dtype)
    assert model.logit_scale.dtype == torch.float32 and torch.equal(model.logit_scale, scale)
    assert model.prototypes.rank_embeds.dtype == dtype
    assert model.double().logit_scale.dtype == torch.float64
    learned = model_of(copy.deepcopy(clip))
    learned.logit_scale = torch.nn.Parameter(learned.logit_scale)
    learned.logit_scale.grad = torch.ones(())
    learned.to(dtype)  # a parameter is converted with its gradient
    assert learned.logit_scale.grad.dtype == learned.logit_scale.dtype


def test_an_unknown_regression_loss_is_refused():
    with pytest.raises(ValueError, match="loss_type='l3': expected l1 or l2"):
        Regression(torch.nn.Flatten(), 12, 4, "l3")


def test_training_moves_what_should_train_and_nothing_else(clip):
    model = model_of(copy.deepcopy(clip).requires_grad_(True))
    tower = model.prototypes._text[0]
    frozen = copy.deepcopy(tower.state_dict())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.RAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(torch.randn(8, 3, 64, 64), torch.arange(8))[0].backward()
        optimizer.step()
    assert all(torch.equal(value, frozen[key]) for key, value in tower.state_dict().items())
    after = model.state_dict()
    differing = {key for key in before if not torch.equal(after[key], before[key])}
    assert {"prototypes.context_embeds", "prototypes.rank_embeds"} <= differing
    assert "logit_scale" not in differing
    assert any(key.startswith("image_encoder.") for key in differing)


def test_the_temperature_is_a_copy_and_can_be_set_free(clip):
    model = model_of(clip)
    assert not model.logit_scale.requires_grad and model.logit_scale is not clip.logit_scale
    assert "logit_scale" in model.state_dict() and "logit_scale" not in dict(
        model.named_parameters()
    )
    model.logit_scale.requires_grad_()  # is no parameter: an optimizer would not see it
    with pytest.raises(ValueError, match="model.logit_scale = nn.Parameter"):
        model.loss(torch.randn(4, 3, 64, 64), torch.arange(4))
    model.logit_scale = nn.Parameter(model.logit_scale)
    assert "logit_scale" in dict(model.named_parameters())
    model.loss(torch.randn(4, 3, 64, 64), torch.arange(4))[0].backward()
    assert model.logit_scale.grad.abs() > 0
    model = OrdinalCLIP(clip.visual, LinearPrototypes(3, 48), math.log(7))
    assert model.logit_scale.exp().item() == pytest.approx(7)


def test_linear_prototypes_train(clip):
    model = OrdinalCLIP(clip.visual, LinearPrototypes(9, 48), clip.logit_scale)
    model.loss(torch.randn(4, 3, 64, 64), torch.arange(4))[0].backward()
    assert model.prototypes.weight.shape == (9, 48) and model.prototypes.weight.grad.abs().sum() > 0


def test_fixed_prototypes_are_a_copy():
    tensor = torch.randn(4, 8, requires_grad=True)
    fixed = FixedPrototypes(tensor)
    assert torch.equal(fixed(), tensor)
    assert not fixed().requires_grad and not list(fixed.parameters())
    with pytest.raises(ValueError, match=r"prototypes torch.float32 \(8,\); expected float \(R"):
        FixedPrototypes(tensor[0])
    with pytest.raises(ValueError, match=r"got prototypes torch.int64 \(4, 8\); expected float"):
        FixedPrototypes(tensor.long())


# --------------------------------------------------------------------------------------- ordinality
def brute_force(prototypes, span, official):
    s = F.cosine_similarity(prototypes[:, None].double(), prototypes[None].double(), dim=-1)
    n, wins = len(s), []
    for i in range(n):
        for j in range(n):
            if official and i <= j < n - 1 and j - i < span:
                wins.append(s[i, j] > s[i, j + 1])
            if not official and i < j < n - 1 and j + 1 - i <= span:
                wins.append(s[i, j] > s[i, j + 1])
            if not official and 0 < j < i and i - (j - 1) <= span:
                wins.append(s[i, j] > s[i, j - 1])
    return sum(map(float, wins)) / len(wins)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("span", [2, 3, 8, None])
def test_ordinality_counts_what_it_says(official, span):
    torch.manual_seed(1)
    smooth = torch.randn(9, 16).cumsum(0)
    for prototypes in (torch.randn(9, 16), smooth):
        expected = brute_force(prototypes, span or 8, official)
        assert ordinality(prototypes, span, official) == pytest.approx(expected, abs=1e-12)


def test_ordinality_of_an_arc_is_one_and_of_its_shuffle_is_not():
    angles = torch.linspace(0, 1.5, 12)
    arc = torch.stack([angles.cos(), angles.sin()], 1)
    assert ordinality(arc) == ordinality(arc.flip(0)) == ordinality(5 * arc, official=True) == 1
    assert ordinality(arc[torch.tensor([5, 0, 9, 2, 7, 11, 1, 4, 10, 3, 8, 6])]) < 0.7
    arc[3, 0] = math.nan  # is larger than nothing: it would score 0
    assert math.isnan(ordinality(arc))


def test_chance_levels_are_those_of_random_prototypes():
    torch.manual_seed(0)
    for span, official in ((None, False), (4, False), (None, True), (1, True), (2, True)):
        mean = sum(ordinality(torch.randn(61, 64), span, official) for _ in range(40)) / 40
        assert mean == pytest.approx(ordinality_chance(61, span, official), abs=0.02)
    assert ordinality_chance(61, official=True) == pytest.approx((60 + 1770 / 2) / 1830)
    assert ordinality_chance(61, 1, official=True) == 1


@pytest.mark.parametrize(
    "ranks, span, official", [(2, None, False), (9, 1, False), (9, 9, False), (9, 0, True)]
)
def test_ordinality_refuses(ranks, span, official):
    message = f"R={ranks}, span=.*: expected R >= 3, span {1 + (not official)} to R-1"
    with pytest.raises(ValueError, match=message):
        ordinality(torch.randn(ranks, 4), span, official)


def test_the_docstring_example_runs():
    import doctest

    failed, attempted = doctest.testmod(ordinalclip)
    assert failed == 0 and attempted > 5
