"""pytest tests/test_protocols.py -- folds, seeds, shots, shift, methods, metrics, --official and the report of train.py."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import train
from clip_model import tiny_clip
from ordinalclip import OrdinalCLIP, RankPrompts, interpolation_weights
from tokenizer import Tokenizer

TINY = "--clip tiny --image-encoder clip --batch-size 16 --workers 0 --device cpu --lr 0.002 --epochs 1".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images of gray levels in 4 ranks; the second rank has four times as many as the others."""
    root = tmp_path_factory.mktemp("gray") / "gray"
    rng = np.random.RandomState(0)
    for rank, count in enumerate((10, 40, 10, 10)):
        (root / f"{rank} gray").mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(60 + 40 * rank, 12, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{rank} gray" / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def counts(task):
    return np.bincount([sample.label for sample in task.train], minlength=task.num_ranks).tolist()


# ------------------------------------------------------------------------------------------ protocols


def test_few_shot_draws_by_seed_and_leaves_the_rest(folder):
    task = data.load(folder)
    four, other = data.few_shot(task, 4, seed=1), data.few_shot(task, 4, seed=2)
    assert counts(four) == [4] * 4 and four.val == task.val and four.test == task.test
    assert set(four.train) < set(task.train) and set(four.train) != set(other.train)
    assert four.train == data.few_shot(task, 4, seed=1).train
    twenty = data.few_shot(task, 20)
    assert counts(twenty) == [8, 20, 8, 8]  # where there are fewer, all, and it says so
    assert (
        "few-shot: 20 of each rank (all of the 3 that have fewer), drawn by seed 0: 44 train"
        in twenty.protocol
    )
    assert "few-shot: 4 of each rank, drawn by seed 1: 16 train images" in four.protocol
    with pytest.raises(ValueError, match="shots=0: expected at least 1"):
        data.few_shot(task, 0)


def test_shift_thins_out_the_most_frequent_ranks(folder):
    task = data.load(folder)
    assert counts(task) == [8, 32, 8, 8]
    assert counts(data.shifted(task, 1, 0.2)) == [8, 6, 8, 8]  # int(32 * 0.2)
    assert counts(data.shifted(task, 2, 0.1)) == [1, 3, 8, 8]  # at least one; ties by rank
    assert "shift: 0.2 of the 1 most frequent ranks kept" in data.shifted(task, 1, 0.2).protocol
    for ranks, keep in ((0, 0.5), (5, 0.5), (1, 0), (1, 1.5)):
        with pytest.raises(ValueError, match="expected 1 .. 4 ranks and a share above 0"):
            data.shifted(task, ranks, keep)


def test_seeds_and_folds_are_one_command_and_finished_runs_are_read(
    folder, tmp_path, monkeypatch, capsys
):
    argv = [
        "--data",
        str(folder),
        *TINY,
        "--out",
        str(tmp_path / "runs"),
        "--seeds",
        "1",
        "27",
        "--fold",
        "all",
    ]
    results = train.main(argv)
    assert [(r["settings"]["fold"], r["settings"]["seed"]) for r in results] == [
        (fold, seed) for fold in range(5) for seed in (1, 27)
    ]
    assert results[0]["protocol"] == results[1]["protocol"]  # seeds share the split, folds do not
    assert results[0]["protocol"] != results[2]["protocol"]
    assert results[0]["test"] != results[1]["test"]
    values = [r["test"]["mae_argmax"] for r in results]
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} (n=10)" in capsys.readouterr().out
    (tmp_path / "runs" / "gray-ordinalclip-linear-K3-fold3-seed27" / "results.json").unlink()
    trained, run = [], train.train
    monkeypatch.setattr(
        train, "train", lambda args: trained.append((args.fold, args.seed)) or run(args)
    )
    again = train.main(argv)
    assert trained == [(3, 27)]  # and it goes on from its last.pt, where nothing is left to train
    assert [r["test"] for r in again] == [r["test"] for r in results]
    with pytest.raises(SystemExit, match="is finished, but with another --lr: 0.002, not 0.5"):
        train.main([*argv, "--lr", "0.5"])


def test_few_shot_and_shift_reach_the_training(folder, tmp_path):
    few = train.main(["--data", str(folder), *TINY, "--out", str(tmp_path / "few"), "--shots", "2"])
    assert few["images"] == dict(train=8, val=7, test=7)
    assert len((tmp_path / "few" / "splits" / "train.txt").read_text().splitlines()) == 8
    assert (
        train.main(["--eval", str(tmp_path / "few"), "--workers", "0"])["images"] == few["images"]
    )
    thin = train.main(
        ["--data", str(folder), *TINY, "--out", str(tmp_path / "thin"), "--shift", "1,0.2"]
    )
    assert thin["images"]["train"] == 30 and thin["settings"]["shift"] in ((1, 0.2), [1, 0.2])


def test_a_default_written_out_is_the_same_experiment(folder, tmp_path):
    argv = ["--data", str(folder), *TINY, "--out", str(tmp_path / "runs"), "--seeds", "1"]
    assert train.main(argv)[0]["test"] == train.main([*argv, "--split", "random"])[0]["test"]
    args = train.parse_args(["--data", "aesthetics"])
    assert (args.split, args.label_rule, args.category) == ("random", "median", "all")


def test_a_run_cut_off_before_its_first_last_pt_is_begun_again(folder, tmp_path):
    argv = ["--data", str(folder), *TINY, "--out", str(tmp_path / "run")]
    results = train.main(argv)
    for name in ("results.json", "last.pt"):
        (tmp_path / "run" / name).unlink()
    assert train.main(argv)["test"] == results["test"]
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(
        SystemExit, match="holds a run; --resume .* goes on with it, --out elsewhere"
    ):
        train.main(argv)
    (tmp_path / "run" / "last.pt").rename(tmp_path / "run" / "thesis.txt")
    with pytest.raises(SystemExit, match="holds other files .thesis.txt ....; give another --out"):
        train.main(argv)


# -------------------------------------------------------------------------------------------- methods


def build(folder, tmp_path, *options):
    args = train.parse_args(["--data", str(folder), "--out", str(tmp_path / "x"), *TINY, *options])
    torch.manual_seed(args.seed)
    return train.build_model(args, train.load_task(args))[0]


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_regression_is_one_neuron(folder, tmp_path, loss):
    model = build(folder, tmp_path, "--method", "regression", "--regression-loss", loss)
    images, labels = torch.randn(6, 3, 96, 96), torch.tensor([0, 1, 2, 3, 1, 0])
    answers = model.neuron(model.image_encoder(images))[:, 0]
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
    assert torch.allclose(train.expected_rank(probs), answers, atol=1e-5)
    assert torch.equal(probs.argmax(1).double(), answers.round())


def test_regression_runs_and_learns(folder, tmp_path):
    out = tmp_path / "regression"
    results = train.main(
        ["--data", str(folder), *TINY, "--method", "regression", "--epochs", "4", "--out", str(out)]
    )
    assert results["ordinality"] is None and not (out / "exported.pt").exists()
    log = torch.load(out / "last.pt", weights_only=True)["log"]
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize(
    "tune, learnt", [("rank", {"rank_embeds"}), ("context", {"context_embeds"})]
)
def test_prompt_ablations_train_what_they_say(folder, tmp_path, tune, learnt):
    start = build(folder, tmp_path, "--tune", tune).state_dict()
    train.main(["--data", str(folder), *TINY, "--tune", tune, "--out", str(tmp_path / "run")])
    end = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    moved = {
        key.split(".")[1]
        for key in start
        if key.startswith("prototypes.") and not torch.equal(start[key], end[key])
    }
    assert moved == learnt


def test_zero_shot_says_its_prompt(folder, tmp_path, capsys):
    train.main(
        [
            "--data",
            str(folder),
            *TINY,
            "--method",
            "zeroshot",
            "--context",
            "a shade of",
            "--out",
            str(tmp_path / "z"),
        ]
    )
    out = capsys.readouterr().out
    assert "prompt of the first rank: 'a shade of 0 gray.'" in out and "trains nothing\n" in out
    assert (
        json.loads((tmp_path / "z" / "results.json").read_text())["prompt"] == "a shade of 0 gray."
    )


def test_a_frozen_encoder_stays_and_its_features_are_computed_once(folder, tmp_path, monkeypatch):
    calls, compute = [], train.compute_features
    monkeypatch.setattr(train, "compute_features", lambda *args: calls.append(1) or compute(*args))
    start = build(folder, tmp_path, "--freeze-image").image_encoder.state_dict()
    argv = ["--data", str(folder), *TINY, "--freeze-image", "--out"]
    results = train.main([*argv, str(tmp_path / "a")])
    assert len(calls) == 3  # train, val, test
    again = train.main([*argv, str(tmp_path / "b")])
    assert len(calls) == 3 and again["test"] == results["test"]
    end = torch.load(tmp_path / "a" / "best.pt", weights_only=True)["model"]
    assert all(torch.equal(value, end[f"image_encoder.{key}"]) for key, value in start.items())
    whole = torch.load(tmp_path / "a" / "exported.pt", weights_only=True)["state_dict"]
    assert any(key.startswith("image_encoder.") for key in whole)


def test_features_give_the_logits_that_images_give(folder, tmp_path):
    model = build(folder, tmp_path, "--freeze-image").eval()
    images = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        features = model.image_encoder(images)
        assert torch.equal(train.on_features(model)(features), model(images))
    assert not isinstance(model.image_encoder, torch.nn.Identity)


@pytest.mark.parametrize("argv, message", [
    (["--freeze-image", "--image-encoder", "vgg16"], "--freeze-image needs --image-encoder clip"),
    (["--shots", "0"], "shots=0: expected at least 1"),
    (["--base-ranks", "2", "9"], "--base-ranks 9, but .* has 4 ranks; give fewer"),
    (["--shots", "1", "-1"], "shots=-1: expected at least 1"),
    (["--method", "coop", "--base-ranks", "2", "4"], "--base-ranks says nothing to --method coop"),
    (["--method", "linear", "--interp", "inverse"], "--interp says nothing to --method linear"),
    (["--method", "regression", "--tune", "rank"], "--tune says nothing to --method regression"),
    (["--train-list", "x.txt", "--fold", "all"], "--fold all says nothing to given lists"),
    (["--epochs", "0"], "--epochs 0: expected at least 1"),
    (["--base-ranks", "4", "1"], "--base-ranks 1 makes all ranks alike"),
    (["--method", "zeroshot", "--image-encoder", "vgg16"], "--method zeroshot needs --image-encoder clip"),
    (["--report", "none"], "no results.json in none"),
])  # fmt: skip
def test_mistakes_are_told_plainly(folder, tmp_path, argv, message):
    first = (
        [] if "--report" in argv else ["--data", str(folder), *TINY, "--out", str(tmp_path / "o")]
    )
    with pytest.raises(SystemExit, match=message):
        train.main([*first, *argv])


@pytest.mark.parametrize("argv, message", [
    (["--report", "x", "--lr", "1"], "--report takes no other flag"),
    (["--seed", "1", "--seeds", "1", "2"], "--seed and --seeds: give one of them"),
    (["--fold", "some"], "'some': expected a number from 0, or all"),
    (["--shift", "ten"], "'ten': expected K,KEEP such as 10,0.2"),
])  # fmt: skip
def test_wrong_flags_are_refused(capsys, argv, message):
    with pytest.raises(SystemExit):
        train.parse_args(argv)
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- warm start


@pytest.fixture(scope="module")
def source(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "run"
    train.main(["--data", str(folder), *TINY, "--out", str(out)])
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
    assert (
        train.init_state(SimpleNamespace(init=str(path.parent))).keys() == state.keys()
    )  # its folder will do


def test_warm_start_of_a_baseline_takes_the_encoder_alone(source, seven, tmp_path, monkeypatch):
    start, _ = warm(monkeypatch, "--data", str(seven), *TINY, "--method", "linear", "--init", str(source[0]),
                    "--out", str(tmp_path / "l"))  # fmt: skip
    assert all(
        torch.equal(start[key], value)
        for key, value in source[1].items()
        if key.startswith("image_encoder.")
    )
    assert start["prototypes.weight"].shape[0] == 7


def test_warm_start_of_another_shape_is_told_plainly(source, seven, tmp_path):
    argv = [
        "--data",
        str(seven),
        *TINY,
        "--init",
        str(source[0]),
        "--out",
        str(tmp_path / "l"),
        "--context",
        "2",
    ]
    with pytest.raises(
        SystemExit, match=r"context_embeds is \(\d+, \d+\) there, here \(2, \d+\); use the same"
    ):
        train.main(argv)


# -------------------------------------------------------------------------------------------- metrics


def kappa(answers, labels, num_ranks):
    """Quadratic weighted kappa from the confusion matrix, as in Cohen's definition."""
    seen = np.zeros((num_ranks, num_ranks))
    np.add.at(seen, (labels, answers), 1)
    by_chance = np.outer(seen.sum(1), seen.sum(0)) / len(labels)
    weight = np.subtract.outer(np.arange(num_ranks), np.arange(num_ranks)) ** 2
    return 1 - (weight * seen).sum() / (weight * by_chance).sum()


def test_cumulative_score_and_kappa():
    rng = np.random.RandomState(3)
    labels = rng.randint(0, 20, 200)
    answers = (labels + rng.randint(-8, 9, 200)).clip(0, 19)
    found = train.metrics(F.one_hot(torch.tensor(answers), 20).float(), torch.tensor(labels))
    assert found["qwk_argmax"] == pytest.approx(kappa(answers, labels, 20), abs=1e-9)
    assert found["qwk_expected"] == pytest.approx(found["qwk_argmax"])
    assert (
        found["cs_argmax"] == pytest.approx((abs(answers - labels) <= 5).mean())
        and found["cs_argmax"] < 1
    )
    assert train.metrics(torch.eye(3)[:1], torch.tensor([0]))["qwk_argmax"] == 1  # one image, right
    assert train.metrics(torch.eye(3)[:1], torch.tensor([2]))["qwk_argmax"] == 0


def test_per_rank_and_long_tail(folder):
    task = data.load(folder)
    labels = torch.tensor([0, 1, 1, 3])
    probs = F.one_hot(torch.tensor([1, 1, 3, 3]), 4).float()
    rows = train.per_rank_metrics(task, probs, labels)
    assert [(row["rank"], row["train_images"], row["test_images"], row["mae_argmax"]) for row in rows] == [
        ("0 gray", 8, 1, 1.0), ("1 gray", 32, 2, 1.0), ("3 gray", 8, 1, 0.0),
    ]  # fmt: skip
    tail = train.long_tail_metrics(task, probs, labels)
    assert tail["few (<20)"]["test_images"] == 2 and tail["few (<20)"]["mae_argmax"] == 0.5
    assert tail["some (20..100)"]["test_images"] == 2 and tail["some (20..100)"]["mae_argmax"] == 1


# ------------------------------------------------------------------------------------------- official


def test_official_pixels_and_ordinality(folder, tmp_path):
    args = train.parse_args(
        ["--data", str(folder), "--out", str(tmp_path / "o"), *TINY, "--official"]
    )
    task = train.load_task(args)
    model, preprocess = train.build_model(args, task)
    assert (
        preprocess["mean"] == data.IMAGENET_MEAN
        and preprocess["squash"]
        and preprocess["resample"] == "bilinear"
    )
    images = train.loaders(args, task, preprocess, model)[0].dataset
    assert images.squash and images.resample == Image.Resampling.BILINEAR
    scores = train.ordinality_scores(args, task, model)
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
        for block in text.transformer.resblocks:
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
        train.param_groups(model), lr=1e-3, weight_decay=5e-4, decoupled_weight_decay=True
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


def test_official_takes_its_column_target(folder, tmp_path, monkeypatch):
    seen, loss = [], OrdinalCLIP.loss

    def spy(self, *args, **options):
        seen.append(options["target"])
        return loss(self, *args, **options)

    monkeypatch.setattr(OrdinalCLIP, "loss", spy)
    train.main(["--data", str(folder), *TINY, "--out", str(tmp_path / "o"), "--official"])
    assert set(seen) == {"softmax10"}
    train.main(["--data", str(folder), *TINY, "--out", str(tmp_path / "p")])
    assert set(seen) == {"softmax10", "normalized"}


# --------------------------------------------------------------------------------------------- report


def write_run(place, mae, **settings):
    base = dict(data="morph2", category=None, label_rule=None, split="random", method="ordinalclip", interp="linear",
                base_ranks=3, rank_position="tail", tune="both", freeze_image=False, official=False, context=None, shots=None, shift=None,
                seed=1, fold=0, lr=1e-4, regression_loss="l1")  # fmt: skip
    results = dict(test=dict(mae_expected=mae, mae_argmax=mae + 0.1, acc_argmax=0.5, cs_expected=0.9, qwk_expected=0.8), ordinality=0.9, commit="abc",
                   seconds=3, protocol="a protocol", majority=dict(rank="31", mae=7.0, acc=0.25), settings=base | settings)  # fmt: skip
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps(results))


def test_the_report_has_the_papers_layout(tmp_path, capsys):
    for seed, mae in ((1, 2.0), (27, 2.5), (42, 3.0)):
        write_run(tmp_path / f"a{seed}", mae, seed=seed)
    write_run(tmp_path / "b", 4.0, shots=4)
    write_run(tmp_path / "c", 5.0, method="coop", interp="none")
    write_run(tmp_path / "d", 6.0, shift=[10, 0.2])
    text = train.main(["--report", str(tmp_path)])
    assert text in capsys.readouterr().out and (tmp_path / "report.md").read_text() == text
    lines = text.splitlines()
    assert lines[4] == "| method | all | 4 shots | shift 10-80 |"
    assert (
        lines[7]
        == "| ordinalclip-linear-K3 | 2.500 ± 0.500 (n=3) [2.32] | 4.000 (n=1) [3.55] | 6.000 (n=1) [2.61] |"
    )
    assert lines[6] == "| coop | 5.000 (n=1) [2.39] | - [3.81] | - [2.71] |"
    assert (
        "- [a27](a27/results.json): seed 27, fold 0, commit abc, 3 s, always '31' MAE 7.000 accuracy 25.0%; a protocol"
        in lines
    )
    assert (
        "Cumulative score CS(5), expected rank, %" in lines
        and "Quadratic weighted kappa, expected rank" in lines
    )


def test_the_papers_figure_stands_beside_its_protocol_only(tmp_path):
    write_run(tmp_path / "a", 2.0, split="subject-exclusive")
    write_run(tmp_path / "b", 3.0, rank_position="front")
    write_run(tmp_path / "c", 4.0, context="years:")
    write_run(tmp_path / "d", 5.0, train_list="train.txt")
    assert "[2.32]" not in "".join(
        line for line in train.report([tmp_path]).splitlines() if "(n=1)" in line
    )


def test_runs_that_differ_are_not_averaged(tmp_path):
    write_run(tmp_path / "a", 2.0)
    write_run(tmp_path / "b", 4.0, seed=2, lr=1e-3)
    text = train.report([tmp_path])
    assert "| ordinalclip-linear-K3 lr=0.0001 | 2.000 (n=1) |" in text
    assert "| ordinalclip-linear-K3 lr=0.001 | 4.000 (n=1) |" in text


def test_the_papers_figures_are_where_they_belong():
    """A few read off the tables again."""
    morph = train.PAPER_MAE["morph2"]
    assert (
        morph["all"]["ordinalclip-inverse-K7"] == "2.35"
        and morph["all"]["ordinalclip-linear-K9"] == "2.41"
    )
    assert morph["all"]["coop-tune-rank-random-context"] == "2.58"
    assert morph["all"]["ordinalclip-linear-K3-tune-context"] == "2.34"
    assert morph["64 shots"][train.OURS] == "2.57" and morph["shift 40-90"]["linear"] == "3.65"
    assert (
        train.PAPER_ACC["adience"]["all"]["zeroshot"] == "25.4 ± 3.5"
        and train.PAPER_MAE["hci"]["all"]["coop"] == "0.76 ± 0.06"
    )
    assert train.PAPER_ACC["aesthetics"]["people"]["zeroshot"] == "24.79"
    assert train.PAPER_MAE["aesthetics"]["animal"]["linear"] == "0.381"


@pytest.mark.parametrize("figures", [train.PAPER_MAE["aesthetics"], train.PAPER_ACC["aesthetics"]])
def test_the_papers_overall_is_the_mean_of_its_categories(figures):
    kinds = ("nature", "animal", "urban", "people")
    assert list(figures) == [*kinds, "overall"]
    for row, overall in figures["overall"].items():
        mean = sum(float(figures[kind][row]) for kind in kinds) / 4
        assert abs(mean - float(overall)) < (0.011 if float(overall) > 1 else 0.0011), (
            row
        )  # as rounded in print


def test_aesthetics_is_one_table_with_the_categories_and_their_mean(tmp_path):
    maes = dict(nature=(0.1, 0.3), animal=(0.2, 0.4), urban=(0.3, 0.3), people=(0.6, 0.8))
    for kind, (first, second) in maes.items():
        for fold, mae in enumerate((first, second)):
            shared = dict(data="aesthetics", label_rule="median", category=kind)
            write_run(tmp_path / f"{kind}{fold}", mae, fold=fold, **shared)
            if (kind, fold) != ("people", 1):
                write_run(
                    tmp_path / f"coop-{kind}{fold}",
                    mae + 1,
                    fold=fold,
                    method="coop",
                    interp="none",
                    **shared,
                )
    write_run(tmp_path / "few", 3.0, shots=4, **shared)
    write_run(tmp_path / "whole", 4.0, data="aesthetics", label_rule="median", category="all")
    lines = train.report([tmp_path]).splitlines()
    assert [line for line in lines if line.startswith("## ")] == ["## aesthetics median random"]
    assert (
        lines[4]
        == "| method | all categories | nature | animal | urban | people | overall | people 4 shots |"
    )
    rows = {
        cells[1]: cells[2:-1]
        for cells in ([word.strip() for word in line.split("|")] for line in lines[6:8])
    }
    assert rows["ordinalclip-linear-K3"] == [
        "4.000 (n=1)", "0.200 ± 0.141 (n=2) [0.273]", "0.300 ± 0.141 (n=2) [0.279]", "0.300 ± 0.000 (n=2) [0.277]",
        "0.700 ± 0.141 (n=2) [0.291]", "0.375 ± 0.106 (n=2) [0.280]", "3.000 (n=1)"]  # fmt: skip
    assert rows["coop"][4:6] == [
        "1.600 (n=1) [0.330]",
        "1.300 (n=1) [0.302]",
    ]  # fold 1 lacks people


def test_a_row_of_a_table_is_one_command(monkeypatch):
    seen = []
    monkeypatch.setattr(
        train,
        "train",
        lambda args: seen.append((args.shots, args.shift, args.seed, Path(args.out).name)),
    )
    reports = []
    monkeypatch.setattr(train, "load_task", lambda run: SimpleNamespace(num_ranks=101))
    monkeypatch.setattr(train, "report", lambda runs, name: reports.append(name))
    train.main(["--data", "morph2", "--base-ranks", "2", "9"])
    assert [run[3] for run in seen] == [f"morph2-ordinalclip-linear-K{k}-seed1" for k in (2, 9)]
    assert reports.pop() == "report-morph2-ordinalclip-linear-K2-9.md"
    seen.clear()
    train.main(["--data", "morph2", "--shots", "1", "4", "--seeds", "1", "27"])
    assert [run[:3] for run in seen] == [(1, None, 1), (1, None, 27), (4, None, 1), (4, None, 27)]
    seen.clear()
    train.main(["--data", "morph2", "--method", "coop", "--shift", "10,0.2", "40,0.1"])
    assert seen == [
        (None, (10, 0.2), 1, "morph2-coop-shift10-0.2-seed1"),
        (None, (40, 0.1), 1, "morph2-coop-shift40-0.1-seed1"),
    ]
    alone = train.parse_args(
        ["--data", "morph2", "--shots", "4", "--shift", "10,0.2", "--base-ranks", "5"]
    )
    assert (alone.shots, alone.shift, alone.base_ranks) == (4, (10, 0.2), 5) and not train.several(
        alone
    )


def test_an_interrupted_run_says_how_to_go_on(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "main", interrupted)
    with pytest.raises(
        SystemExit, match="interrupted; --resume RUN goes on after its last whole epoch"
    ):
        train.command_line()


def test_a_run_named_twice_counts_once(tmp_path):
    write_run(tmp_path / "a", 2.0)
    assert "(n=1)" in train.report([tmp_path, tmp_path / "a"])


def test_category_each_runs_all_four_and_refuses_other_data(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        train, "train", lambda args: seen.append((args.category, args.fold, args.seed, args.out))
    )
    monkeypatch.setattr(train, "report", lambda runs, name: seen.append(name))
    train.main(["--data", "aesthetics", "--category", "each", "--fold", "all", "--seed", "3"])
    kinds = ["nature", "animal", "urban", "people"]
    assert [run[:3] for run in seen[:-1]] == [
        (kind, fold, 3) for fold in range(5) for kind in kinds
    ]
    assert seen[1][3] == str(Path("runs/aesthetics-animal-ordinalclip-linear-K3-seed3"))
    assert (
        len({run[3] for run in seen[:-1]}) == 20
        and seen[-1] == "report-aesthetics-each-ordinalclip-linear-K3-foldall.md"
    )
    with pytest.raises(SystemExit, match="--category each: hci has no categories; leave it out"):
        train.main(["--data", "hci", "--category", "each"])


# ------------------------------------------------------------------------------------------- pictures


def test_every_run_and_every_evaluation_draws_its_pictures(source, folder):
    out = source[0].parent
    names = {"similarity", "confusion", "distribution", "error", "sheet", "curves"}
    assert {path.stem for path in (out / "pictures").glob("*.png")} == names
    train.main(["--eval", str(out), "--workers", "0"])
    for name in names:
        drawn, again = (
            Image.open(out / place / f"{name}.png") for place in ("pictures", "pictures-eval-best")
        )
        assert drawn.width >= 500 and len(drawn.convert("L").getcolors()) > 10, name
        assert np.array_equal(drawn, again), (
            name
        )  # the state before training comes back from the seed


def test_a_baseline_without_prototypes_or_training_draws_what_it_has(folder, tmp_path):
    for method, missing in (("regression", "similarity"), ("zeroshot", "curves")):
        out = tmp_path / method
        train.main(["--data", str(folder), *TINY, "--method", method, "--out", str(out)])
        assert (
            len(list((out / "pictures").iterdir())) == 5
            and not (out / "pictures" / f"{missing}.png").exists()
        )


def test_confusion_and_distribution():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.1, 0.4]])
    labels = torch.tensor([0, 2, 2])
    assert train.confusion(probs, labels).tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]
    expected = torch.tensor([[0.7, 0.2, 0.1], [0, 0, 0], [0.3, 0.2, 0.5]])
    assert torch.allclose(train.mean_probs(probs, labels), expected)


def test_a_matrix_is_drawn_with_its_rows_downwards_and_darker_where_larger():
    matrix = torch.zeros(20, 20)
    matrix[3, 15] = 1  # true rank 3, predicted 15
    picture = np.asarray(
        train.draw_matrices([matrix], ["t"], [str(i) for i in range(20)], ("x", "y")).convert("L")
    )
    area = picture[56:456, 120:520].reshape(20, 20, 20, 20).mean((1, 3))  # cells of 20 x 20 pixels
    assert np.unravel_index(area.argmin(), area.shape) == (3, 15) and area[3, 15] < 60
    assert np.delete(area.ravel(), 3 * 20 + 15).min() > 200


def test_the_sheet_shows_the_nearest_and_the_farthest(folder):
    task = data.load(folder)
    labels = torch.tensor([sample.label for sample in task.test])
    probs = F.one_hot(labels, 4).float()
    probs[2] = torch.eye(4)[3 - labels[2]]  # one is wrong by 1 or 3
    best, worst = train.best_and_worst(task, dict(image_size=96), probs, labels, count=1)
    name = task.rank_names
    assert worst[1][0][1] == f"expected {name[3 - labels[2]]}\ntrue {name[labels[2]]}"
    rank, true = best[1][0][1].split("\n")
    assert rank.removeprefix("expected ") == true.removeprefix("true ")
