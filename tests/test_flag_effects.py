"""pytest tests/test_flag_effects.py -- HAS_EFFECT of training/options.py, both ways, on all methods.

A flag that is accepted changes what is trained or tested; one that is refused would change nothing.
"""

import itertools

import pytest
import torch
from conftest import TINY_MODEL

import train
from training import options
from training.loaders import make_loaders, prepare_batch, without_image_encoder
from training.methods import METHODS, build_run, warm_start
from training.optim import build_optimizer, build_schedule

VALUES = {  # flag: another value than the default
    "interp": "inverse",
    "base_ranks": "2",
    "context": "3",
    "rank_position": "front",
    "rank_init": "{other_rank_init}",
    "tune": "rank",
    "regression_loss": "l2",
    "official": None,
    "image_weights": "none",
    "freeze_image": None,
    "init": "{source}",
    "epochs": "2",
    "lr": "0.01",
    "weight_decay": "0.1",
    "lr_image": "0.01",
    "lr_prompts": "0.01",
    "warmup": "1",
    "no_flip": None,
    "balanced": None,
    "batch_size": "8",
    "shots": "3",
    "shift": "2,0.3",
    "seeds": "5",
    "seed": "5",
    "fold": "1",
    "split_seed": "2",
}
CASES = list(itertools.product(VALUES, METHODS))
# They change no figure of a zero-shot model, and are no mistake: few images fit a small GPU, and the
# seed is written into every run's name.
HARMLESS = {("batch_size", "zeroshot")}


def fingerprint(args):
    """Losses of two optimizer steps and the answers after them, on fixed settings `args`."""
    args.seed = args.seeds[0] if args.seeds else args.seed
    run = build_run(args)
    model, preprocess = run.model, run.preprocess
    if args.init:
        warm_start(args, model)
    train_loader, _, test_loader = make_loaders(run)
    numbers = []
    if args.epochs:
        optimizer = build_optimizer(args, model)
        build_schedule(args, optimizer)  # sets the learning rate of the first epoch
        target = "softmax10" if args.official else "normalized"
        model.train()
        step_model = without_image_encoder(model) if args.freeze_image else model
        for images, labels in itertools.islice(train_loader, 2):
            images = prepare_batch(images, args, preprocess)
            total = step_model.loss(images, labels, target=target)[0]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            numbers.append(total.detach()[None])
        numbers.append(torch.tensor([args.epochs, len(train_loader)]))
    eval_model = model.export().eval()
    if args.freeze_image:
        eval_model = without_image_encoder(eval_model)
    for images, labels in test_loader:
        probs = eval_model.predict(prepare_batch(images, args, preprocess))["probs"]
        numbers += [probs.flatten(), labels]
    return torch.cat(numbers)


def is_same(numbers, others):
    """But for rounding: convolutions of the same images differ in the last bit on some CPUs."""
    return len(numbers) == len(others) and torch.allclose(numbers, others, rtol=1e-5, atol=1e-6)


def parse(folder, tmp_path, method, flag=None, value=None, extra=()):
    argv = ["--data", str(folder), *TINY_MODEL, "--method", method, "--out", str(tmp_path / "out")]
    if method != "zeroshot":
        argv += ["--lr", "0.002", "--epochs", "1"]
    if flag:
        argv += [f"--{flag.replace('_', '-')}", *([value] if value else [])]
    return train.parse_args([*argv, *extra])


@pytest.mark.parametrize(
    "flag, method",
    [case if i % 7 == 0 else pytest.param(*case, marks=pytest.mark.full) for i, case in enumerate(CASES)],
)  # fmt: skip
def test_a_flag_changes_the_run_or_is_refused(
    gray, finished_run, tmp_path, monkeypatch, flag, method
):
    rank_init = "random" if method == "coop" else "names"
    value = VALUES[flag]
    value = value and value.format(source=finished_run[0], other_rank_init=rank_init)
    if (flag, method) == ("init", "coop"):  # names of several tokens do not fit the other run's
        extra = ["--rank-init", "random"]
    else:  # with one epoch there is none left to warm up in
        extra = ["--epochs", "2"] if flag == "warmup" and method != "zeroshot" else []
    plain = fingerprint(parse(gray, tmp_path, method, extra=extra))
    try:
        args = parse(gray, tmp_path, method, flag, value, extra)
    except SystemExit as error:
        assert "has no effect with" in str(error), error
        monkeypatch.setattr(options, "check_unused_flags", lambda args, explicit_flags: None)
        args = parse(gray, tmp_path, method, flag, value)
        if method == "coop" and flag == "interp":
            assert args.interp == "none"
        args.shots = None if method == "zeroshot" else args.shots  # fewer images, but none trains
        args.shift = None if method == "zeroshot" else args.shift
        assert is_same(fingerprint(args), plain)
    else:
        assert is_same(fingerprint(args), plain) == ((flag, method) in HARMLESS)


def test_every_flag_with_conditions_is_tried():
    untested = {"clip", "quick_gelu", "trust_torchscript", "save_every", "profile", "split"}
    untested |= {"accumulate", "ema", "patience"}  # test_optim.py
    untested |= {"label_pattern", "ranks", "bins", "group"}  # test_data_labels.py
    untested |= {"no_draft"}  # test_loaders.py
    flags = {key for keys, _, _ in options.HAS_EFFECT for key in keys.split()}
    assert flags - set(VALUES) == untested


@pytest.mark.parametrize("argv, message", [
    (["--method", "linear", "--image-encoder", "vgg16", "--clip", "RN50"],
     "--clip has no effect with --method linear and --image-encoder vgg16; remove it"),
    (["--clip", "tiny", "--image-encoder", "clip", "--quick-gelu"],
     "--quick-gelu has no effect with --clip tiny and --method ordinalclip; remove it"),
    (["--clip", "tiny", "--image-encoder", "clip", "--trust-torchscript"],
     "--trust-torchscript has no effect with --clip tiny and --method ordinalclip; remove it"),
    (["--method", "zeroshot", "--image-encoder", "clip", "--save-every", "5"],
     "--save-every has no effect with --method zeroshot; remove it"),
    (["--method", "zeroshot", "--image-encoder", "clip", "--profile"],
     "--profile has no effect with --method zeroshot; remove it"),
    (["--data", "demo", "--split", "random"], "--split has no effect with --data demo"),
    (["--data", "demo", "--label-pattern", "x"], "--label-pattern has no effect with --data demo"),
    (["--data", "demo", "--ranks", "1-9"], "--ranks has no effect with --data demo; remove it"),
    (["--data", "hci", "--bins", "3"], "--bins has no effect with --data hci; remove it"),
    (["--data", "morph2", "--group", "x"], "--group has no effect with --data morph2; remove it"),
    (["--data", ".", "--label-pattern", "x", "--train-list", "y"],
     "--label-pattern has no effect with --data . and its lists; remove it"),
    (["--data", ".", "--split", "random", "--train-list", "y", "--test-list", "z"],
     "--split has no effect with --data . and its lists; remove it"),
    (["--data", "demo", "--fold", "1"], "--fold has no effect with --data demo"),
    (["--data", "demo", "--split-seed", "2"], "--split-seed has no effect with --data demo"),
])  # fmt: skip
def test_flags_without_effect_are_refused(argv, message):
    with pytest.raises(SystemExit, match=message):
        train.parse_args(argv)
