"""pytest tests/test_methods.py -- what each method builds, --official, and --init."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_run
from PIL import Image

import data
import train
from clip_model import tiny_clip
from evaluation.evaluate import ordinality_scores
from evaluation.metrics import expected_rank
from ordinalclip import OrdinalCLIP, RankPrompts, interpolation_weights
from tokenizer import Tokenizer
from training.loaders import make_loaders
from training.methods import METHODS, init_state, needs_clip
from training.optim import param_groups


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_regression_is_one_neuron(gray, loss):
    model = tiny_run(gray, "--method", "regression", "--regression-loss", loss).model
    images, labels = torch.randn(6, 3, 96, 96), torch.tensor([0, 1, 2, 3, 1, 0])
    answers = model.head(model.image_encoder(images))[:, 0]
    total, same, zero = model.loss(images, labels)
    error = answers - labels
    assert torch.allclose(
        total, error.abs().mean() if loss == "l1" else error.square().mean(), rtol=1e-5
    )
    assert total == same and zero == 0
    model.eval()
    answers = model(images).clamp(0, 3).double()
    probs = model.predict(images)["probs"]
    assert torch.allclose(probs.sum(1), torch.ones(6)) and (probs >= 0).all()
    assert torch.allclose(expected_rank(probs), answers, atol=1e-5)
    assert torch.equal(probs.argmax(1).double(), answers.round())


def test_every_trainable_parameter_is_in_exactly_one_group():
    clip = tiny_clip()
    model = OrdinalCLIP(clip.visual, RankPrompts(clip, 5, context=2), clip.logit_scale)
    groups = param_groups(model)
    assert [group["name"] for group in groups] == ["image_encoder", "prototypes"]
    model.logit_scale = torch.nn.Parameter(model.logit_scale)  # as docs/own_code.md has it
    groups = param_groups(model)
    assert [group["name"] for group in groups] == ["image_encoder", "prototypes", "temperature"]
    assert groups[2]["params"] == [model.logit_scale]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("encoder", ["clip", "vgg16"])
def test_which_runs_load_a_clip(method, encoder):
    loads = method not in ("linear", "regression") or encoder == "clip"
    assert needs_clip(SimpleNamespace(method=method, image_encoder=encoder)) == loads


def test_official_pixels_and_ordinality(gray):
    run = tiny_run(gray, "--official")
    assert run.preprocess["mean"] == data.IMAGENET_MEAN and run.preprocess["squash"]
    assert run.preprocess["resample"] == "bilinear"
    images = make_loaders(run)[0].dataset.images
    assert images.squash and images.resample == Image.Resampling.BILINEAR
    scores = ordinality_scores(run)
    assert scores["ordinality_chance"] > 0.5  # the diagonal counts there


def official_step(model, images, labels, steps, lr, decay):
    """The official run from equal weights: logits, loss and RAdam steps, transcribed from its formulas.

    Own transcription of xk-huang/OrdinalCLIP@ca10a20: 77 tokens per rank with padding, softmax(10 one-hot) targets,
    KL summed over present ranks / their number, cross-entropy, RAdam (Liu et al. 2020) with decay p -= decay lr p.
    """
    prompts, text = model.prototypes, model.prototypes._text[0]
    params = {
        name: p.detach().clone().requires_grad_()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    table = tiny_clip(vision="vit", image_size=96).token_embedding.weight.detach()
    ranks, history = len(prompts.weights), []
    weights = interpolation_weights(ranks, 3, "linear")
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}
    for step in range(1, steps + 1):
        context, base = params["prototypes.context_embeds"], params["prototypes.rank_embeds"]
        rows = torch.einsum("rk,ktw->rtw", weights, base)
        num = 1 + len(context) + 1 + 2
        sentence = torch.stack([torch.cat([table[[49406]], context, row, table[[269, 49407]],
                                           table[[0]].expand(77 - num, -1)]) for row in rows])  # fmt: skip
        x = (sentence + text.positional_embedding).transpose(0, 1)
        mask = torch.full((77, 77), -math.inf).triu(1)
        for block in text.blocks:
            y = block.ln_1(x)
            x = x + F.multi_head_attention_forward(
                y, y, y, y.shape[-1], block.attn.num_heads, block.attn.in_proj_weight, block.attn.in_proj_bias,
                None, None, False, 0.0, block.attn.out_proj.weight, block.attn.out_proj.bias, attn_mask=mask,
                need_weights=False,
            )[0]  # fmt: skip
            x = x + block.mlp(block.ln_2(x))
        texts = text.ln_final(x.transpose(0, 1))[:, num - 1] @ text.text_projection
        encoder = {
            k.removeprefix("image_encoder."): p
            for k, p in params.items()
            if k.startswith("image_encoder.")
        }
        features = torch.func.functional_call(model.image_encoder, encoder, (images,))
        features, texts = (t / t.norm(dim=-1, keepdim=True) for t in (features, texts))
        logits = model.logit_scale.exp() * features @ texts.t()
        target = F.one_hot(labels, ranks).float() * 10
        target, present = target.t().softmax(-1), F.one_hot(labels, ranks).sum(0) > 0
        target = target * present[:, None]
        kl = F.kl_div(logits.t().log_softmax(-1), target, reduction="sum") / present.sum()
        loss = F.cross_entropy(logits, labels) + kl
        history.append((logits.detach(), loss.item()))
        grads = torch.autograd.grad(loss, params.values())
        with torch.no_grad():
            for (name, p), grad in zip(params.items(), grads):
                m, v = state[name]
                m.mul_(0.9).add_(grad, alpha=0.1)
                v.mul_(0.999).addcmul_(grad, grad, value=0.001)
                longest = 2 / (1 - 0.999) - 1
                length = longest - 2 * step * 0.999**step / (1 - 0.999**step)
                p.sub_(decay * lr * p)
                if length >= 5:
                    rate = math.sqrt((1 - 0.999**step) * (length - 4) / (longest - 4) * (length - 2) / length
                                     * longest / (longest - 2)) / (1 - 0.9**step)  # fmt: skip
                    p.addcdiv_(m, v.sqrt() + 1e-8, value=-lr * rate)
                else:
                    p.add_(m, alpha=-lr / (1 - 0.9**step))
    return history, params


def test_official_logits_loss_and_steps_equal_its_formulas():
    model = rewound()
    torch.manual_seed(4)
    images, labels = torch.randn(8, 3, 96, 96), torch.tensor([0, 0, 3, 6, 6, 6, 2, 2])
    history, _ = official_step(model, images, labels, steps=8, lr=1e-3, decay=5e-4)
    optimizer = torch.optim.RAdam(
        param_groups(model), lr=1e-3, weight_decay=5e-4, decoupled_weight_decay=True
    )
    for step, (logits, loss) in enumerate(history):
        total, _, _ = model.loss(images, labels, target="softmax10")
        if step == 0:
            assert (model(images) - logits).norm() <= 1e-5 * logits.norm()
            assert total.item() == pytest.approx(loss, rel=1e-5)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if step == 0:
            first = {
                name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
            }
        assert total.item() == pytest.approx(loss, rel=2e-3)  # rounding grows from step to step
    _, once = official_step(rewound(), images, labels, steps=1, lr=1e-3, decay=5e-4)
    start = dict(rewound().named_parameters())
    for name in (
        "prototypes.context_embeds",
        "prototypes.rank_embeds",
    ):  # the step itself, not where it ends
        step = once[name] - start[name]
        assert (first[name] - once[name]).norm() <= 5e-5 * step.norm() and step.norm() > 1e-3, name
    ours, theirs = (
        torch.cat([(new[n] - start[n]).flatten() for n in once]) for new in (first, once)
    )
    assert (
        ours - theirs
    ).norm() <= 1e-3 * theirs.norm()  # steps near the rounding of large weights
    assert all((first[n] - once[n]).norm() <= 1e-5 * once[n].norm() for n in once)


def rewound():
    """The model of the test above as it was at first."""
    fresh = tiny_clip(vision="vit", image_size=96)
    torch.manual_seed(3)
    prompts = RankPrompts(
        fresh, 7, context=torch.tensor(Tokenizer().encode("age of the person is"))
    )
    return OrdinalCLIP(fresh.visual.requires_grad_(True), prompts, fresh.logit_scale)


@pytest.fixture(scope="module")
def source(gray, tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "run"
    train.main(["--data", str(gray), *TINY, "--out", str(out)])
    return out / "best.pt", torch.load(out / "best.pt", weights_only=True)["model"]


@pytest.fixture()
def seven(tmp_path):
    """Another dataset, of seven ranks."""
    for rank in range(7):
        (tmp_path / "seven" / str(rank)).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 16), (30 * rank, i, 9)).save(
                tmp_path / "seven" / str(rank) / f"{i}.png"
            )
    return tmp_path / "seven"


def warm(monkeypatch, *argv):
    """(initial state, final results) of a run."""
    start, begin = {}, train.warm_start

    def spy(args, model):
        begin(args, model)
        start.update({key: value.clone() for key, value in model.state_dict().items()})

    monkeypatch.setattr(train, "warm_start", spy)
    return start, train.main([*argv])


@pytest.mark.parametrize("base_ranks", [3, 5])
def test_warm_start_on_other_ranks(source, seven, tmp_path, monkeypatch, base_ranks):
    path, state = source
    out = str(tmp_path / "warm")
    start, results = warm(monkeypatch, "--data", str(seven), *TINY, "--init", str(path), "--out", out,
                          "--base-ranks", str(base_ranks))  # fmt: skip
    for key in state:
        if key.startswith("image_encoder.") or key == "prototypes.context_embeds":
            assert torch.equal(start[key], state[key])
    old, new = state["prototypes.rank_embeds"], start["prototypes.rank_embeds"]
    assert (
        len(new) == base_ranks and torch.equal(new[0], old[0]) and torch.allclose(new[-1], old[-1])
    )
    if base_ranks == 5:
        assert torch.allclose(new[1], (old[0] + old[1]) / 2, atol=1e-7)
    assert (
        train.main(["--eval", out, "--workers", "0"])["test"] == results["test"]
    )  # needs the source no more
    assert init_state(str(path.parent)).keys() == state.keys()  # its gray will do


def test_warm_start_of_a_baseline_takes_the_encoder_alone(source, seven, tmp_path, monkeypatch):
    start, _ = warm(monkeypatch, "--data", str(seven), *TINY, "--method", "linear", "--init", str(source[0]),
                    "--out", str(tmp_path / "l"))  # fmt: skip
    assert all(
        torch.equal(start[key], value)
        for key, value in source[1].items()
        if key.startswith("image_encoder.")
    )
    assert start["prototypes.weight"].shape[0] == 7


@pytest.mark.parametrize("flag, value", [("--context", "the shade is"), ("--rank-init", "names")])
def test_prompt_words_beside_a_copied_prompt_are_refused(source, seven, tmp_path, flag, value):
    argv = ["--data", str(seven), *TINY, "--init", str(source[0]), flag, value]
    with pytest.raises(SystemExit, match=f"^{flag} has no effect with --init, which copies"):
        train.main(argv)


def test_warm_start_of_another_shape_is_told_plainly(source, seven, tmp_path):
    argv = ["--data", str(seven), *TINY, "--init", str(source[0]), "--out", str(tmp_path / "l")]
    with pytest.raises(
        SystemExit, match=r"context_embeds is \(\d+, \d+\) there, here \(2, \d+\); use the same"
    ):
        train.main([*argv, "--context", "2"])
