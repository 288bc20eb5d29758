"""Train, evaluate and compare OrdinalCLIP, CoOp, linear, regression and zero-shot under one protocol.

    python train.py --data demo                              # generated images, minutes on a CPU
    python train.py --data morph2 --interp linear            # the paper's main run
    python train.py --data my/folder --clip RN50             # own data: see data.py
    python train.py --resume runs/NAME                       # go on where last.pt stopped
    python train.py --eval runs/NAME/best.pt                 # test a checkpoint again
    python train.py --data adience --fold all                # five runs, mean and deviation at the end
    python train.py --report runs/*                          # finished runs beside the paper's figures
    torchrun --nproc-per-node 4 train.py --data morph2       # the same batches, over four GPUs

Read top to bottom: recipes, arguments, main, model, training, evaluation, report, checkpoints, distribution.
A run writes runs/NAME/: config.json, splits/*.txt, log.csv, last.pt, best.pt, exported.pt, results.json,
predictions-best.csv, pictures/*.png. The epoch is chosen on validation images; the test images are looked at
once, at the end.
"""

import argparse
import contextlib
import copy
import csv
import hashlib
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

import data
from backbones import build_image_encoder
from clip_model import CLIP, MODELS, download, tiny_clip
from kernels import unit
from ordinalclip import (
    POSITIONS,
    FixedPrototypes,
    LinearPrototypes,
    OrdinalCLIP,
    RankPrompts,
    ordinality,
    ordinality_chance,
)
from predict import draw_curves, draw_error_by_rank, draw_matrices, draw_sheet, write
from tokenizer import Tokenizer

# xk-huang/OrdinalCLIP@ca10a20 configs/meta_cfgs/morph_compare.yaml, configs/default.yaml
PAPER = dict(
    clip="RN50",
    image_encoder="vgg16",
    image_weights="imagenet",
    epochs=100,
    batch_size=32,
    lr=1e-4,
    weight_decay=5e-4,
)
RECIPES = {  # what differs from the paper's
    "demo": dict(clip="tiny", image_encoder="clip", epochs=9, lr=3e-3)
}
METHODS = (
    "linear",
    "regression",
    "zeroshot",
    "coop",
    "ordinalclip",
)  # in the order of the paper's rows
INTERPOLATIONS = ("linear", "inverse", "none")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LINEAR_DIM, LINEAR_SCALE = 1024, math.log(100)  # of the baselines where no CLIP is loaded
CUMULATIVE = 5  # ranks off that still count in the cumulative score CS(5)
SPANS = (2, 4, 8, 16, 32)  # of the ordinality scores beside the whole one
MANY, FEW = (
    100,
    20,
)  # training images of a rank above, below which it is many-, few-shot (Yang et al., ICML 2021)
FILES = (
    "config.json",
    "splits",
    "log.csv",
    "best.pt",
    "best.pt.part",
    "predictions-best.csv",
    "pictures",
    "exported.pt",
)
NEEDS_CLIP = "needs --image-encoder clip: the last layer of the others starts at random"
LISTS = ("base_ranks", "shots", "shift")  # settings that may have several values: a run for each
MACHINE = (
    "device",
    "precision",
    "workers",
    "data_root",
    "out",
    "seeds",
)  # that make no other experiment


def parse_args(argv=None):
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=about, formatter_class=ShowDefaults
    )
    add = parser.add_argument

    def recipe(flag, kind, meaning):  # default depends on the dataset
        key = flag[2:].replace("-", "_")
        demo = RECIPES["demo"].get(key, PAPER[key])
        add(
            flag,
            type=kind,
            help=f"{meaning} (default: {PAPER[key]}; demo: {demo})",
            default=argparse.SUPPRESS,
        )

    # what
    add(
        "--data", default="demo", help=f"{', '.join(data.DATASETS)}, or a folder of your own images"
    )
    add(
        "--data-root",
        help="where the release lies (default: data/NAME; the demo has a cache folder)",
    )
    add(
        "--split",
        help="protocol of the split (default: the first); morph2: random, subject-exclusive",
    )
    add(
        "--fold",
        type=fold_number,
        default=0,
        help="which of the dataset's splits, or all: one run each",
    )
    add(
        "--split-seed",
        type=int,
        default=1,
        help="of splits made here, so that all --seeds share them",
    )
    add(
        "--category",
        help="aesthetics: nature, animal, urban, people, each (a run for each) or all (as one)",
    )
    add(
        "--label-rule",
        help="how labels follow from the release, where it leaves a choice: see data.py",
    )
    add(
        "--shots", type=int, nargs="+", help="training images of each rank; several: a run for each"
    )
    add(
        "--shift",
        type=ranks_and_share,
        nargs="+",
        metavar="K,KEEP",
        help="keep this share of the K most frequent ranks' training images; several: a run for each",
    )
    add("--train-list", help="list file `path label`, instead of a split made here")
    add(
        "--val-list", help="list file of validation images; default: a tenth of the training images"
    )
    add("--test-list", help="list file of test images")
    # method
    add(
        "--method",
        default="ordinalclip",
        choices=METHODS,
        help="what the rank prototypes come from",
    )
    add(
        "--interp", default="linear", choices=INTERPOLATIONS, help="base ranks to ranks; none: CoOp"
    )
    add(
        "--base-ranks",
        type=int,
        nargs="+",
        default=3,
        help="base rank embeddings, K; several: a run for each",
    )
    add(
        "--context",
        help="words that start the prompt, or a number of random tokens (default: the dataset's)",
    )
    add(
        "--rank-position",
        default="tail",
        choices=POSITIONS,
        help="the rank after, amid or before the context",
    )
    add("--rank-init", choices=("random", "names"), help="(default: names for coop, else random)")
    recipe("--clip", str, f"{', '.join(MODELS)}, tiny, or a weights file")
    add(
        "--tune",
        default="both",
        choices=("both", "rank", "context"),
        help="prompt embeddings that learn",
    )
    add("--regression-loss", default="l1", choices=("l1", "l2"), help="of --method regression")
    add(
        "--official",
        action="store_true",
        help="the official code's target, pixels and ordinality: see README",
    )
    add(
        "--quick-gelu",
        action=argparse.BooleanOptionalAction,
        help="where a weights file does not say",
    )
    add(
        "--trust-torchscript",
        action="store_true",
        help="open a TorchScript archive of unknown origin",
    )
    recipe("--image-encoder", str, "clip (the tower of --clip), vgg16, timm:NAME, torchvision:NAME")
    recipe("--image-weights", str, "imagenet, none, or a state dict file; not for clip")
    add(
        "--freeze-image",
        action="store_true",
        help="train prompts only, on cached features of centre crops",
    )
    add(
        "--init",
        metavar="CKPT",
        help="start from best.pt of another run: its encoder, context, resampled ranks",
    )
    # optimisation
    recipe("--epochs", int, "passes over the training images; learning rate falls by a cosine")
    recipe("--batch-size", int, "images per step, over all processes")
    recipe("--lr", float, "learning rate of everything that trains")
    recipe("--weight-decay", float, "decoupled decay: p -= lr * decay * p")
    add("--seed", type=int, default=1, help="of weights, order, augmentation, --shots and --shift")
    add("--seeds", type=int, nargs="+", help="several runs (paper: 1 27 42 128 114514)")
    # where
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the towers (default: bf16 on a GPU that has it, else fp32)",
    )
    add(
        "--workers",
        type=int,
        help="processes that read images (default: up to 8, leaving one core)",
    )
    add("--out", help="folder of the run (default: runs/DATA-METHOD-...-seedS)")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with its own settings")
    add("--eval", metavar="CKPT", help="only test this best.pt or last.pt, with its own settings")
    add(
        "--report",
        metavar="RUN",
        nargs="+",
        help="only print finished runs as tables, and write report.md",
    )

    args = parser.parse_args(argv)
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    given = {action.dest for action in parser._actions if words & {*action.option_strings}}
    if args.resume or args.eval:
        return from_checkpoint(args, given, parser)
    if {"seed", "seeds"} <= given:
        parser.error("--seed and --seeds: give one of them")
    if args.report and given - {"report"}:
        parser.error("--report takes no other flag")
    return complete(args)


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Those that are values; "(default: None)" says nothing."""

    def _get_help_string(self, action):
        return (
            action.help
            if action.default is None or action.default is False
            else super()._get_help_string(action)
        )


def fold_number(text):
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0, or all")
    return text if text == "all" else int(text)


def ranks_and_share(text):
    try:
        ranks, share = text.split(",")
        return int(ranks), float(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected K,KEEP such as 10,0.2") from None


def complete(args):
    """Fill in what the dataset, the method and the machine decide."""
    for key, value in {**PAPER, **RECIPES.get(args.data, {})}.items():
        vars(args).setdefault(key, value)
    preset = data.DATASETS.get(args.data, {})
    args.split = (
        args.split or preset.get("splits", ("random",))[0]
    )  # written out or not, the same experiment
    args.label_rule = args.label_rule or preset.get("label_rules", (None,))[0]
    args.category = args.category or preset.get("categories", (None,))[0]
    for key in LISTS:
        if len(values := as_list(getattr(args, key))) == 1:
            setattr(args, key, values[0])
    if args.method == "ordinalclip" and args.interp == "none":
        args.method = "coop"
    refuse_idle(args)
    if args.method == "coop":
        args.interp = "none"
    if args.method == "zeroshot":
        args.epochs = 0
        if args.image_encoder != "clip":
            raise SystemExit(f"--method zeroshot {NEEDS_CLIP}")
    if args.rank_init is None:
        args.rank_init = "names" if args.interp == "none" else "random"
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.precision is None:
        fast = args.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        args.precision = "bf16" if fast else "fp32"
    if args.workers is None:
        args.workers = max(0, min(8, (os.cpu_count() or 1) - 1))
    if 1 in as_list(args.base_ranks) and args.method == "ordinalclip" and args.interp != "none":
        raise SystemExit(
            "--base-ranks 1 makes all ranks alike, so nothing can be told apart; give 2 or more"
        )
    if args.freeze_image and args.image_encoder != "clip":
        raise SystemExit(f"--freeze-image {NEEDS_CLIP}")
    if (
        args.init
        and args.context is None
        and "prototypes.context_embeds" in (state := init_state(args))
    ):
        args.context = str(
            state["prototypes.context_embeds"].shape[-2]
        )  # so many tokens; values are copied
    if args.out is None and not several(args):
        args.out = str(Path("runs") / run_name(args))
    return args


def refuse_idle(args):
    """Flags that would change nothing, yet make another experiment by name."""
    prompts, ours = args.method in ("ordinalclip", "coop"), args.method == "ordinalclip"
    for flag, idle in (
        ("--tune", args.tune != "both" and not prompts),
        ("--interp", args.interp == "inverse" and not ours),
        ("--base-ranks", args.base_ranks != 3 and not ours),
    ):
        if idle:
            raise SystemExit(f"{flag} says nothing to --method {args.method}; leave it out")
    if args.fold and args.train_list:
        raise SystemExit(f"--fold {args.fold} says nothing to given lists; leave it out")
    if args.epochs < 1 and args.method != "zeroshot":
        raise SystemExit(
            f"--epochs {args.epochs}: expected at least 1; --method zeroshot does without training"
        )


def as_list(value):
    return value if isinstance(value, list) else [value]


def several(args):
    return args.fold == "all" or args.category == "each" or bool(args.seeds) or several_values(args)


def several_values(args):
    return any(isinstance(getattr(args, key), list) for key in LISTS)


def categories(name):
    """What --category each runs through; (None,) where a dataset has none."""
    return [
        kind for kind in data.DATASETS.get(name, {}).get("categories", (None,)) if kind != "all"
    ]


def from_checkpoint(args, given, parser):
    """The settings of the run that --resume or --eval names, but for where it runs now."""
    here = {"device", "precision", "workers", "data_root"}
    if extra := given - here - {"resume", "eval"}:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(extra))
        parser.error(
            f"{flags}: settings come from the checkpoint; leave them out, or start a new run"
        )
    path = Path(args.resume or args.eval)
    path = path / ("last.pt" if args.resume else "best.pt") if path.is_dir() else path
    saved = argparse.Namespace(
        **vars(parser.parse_args([])) | load_checkpoint(path, "settings")["settings"]
    )
    for name in given & here:
        setattr(saved, name, getattr(args, name))
    saved.out, saved.resume, saved.eval = (
        str(path.parent),
        args.resume and str(path),
        args.eval and str(path),
    )
    return complete(saved)


def run_name(args):
    return f"{table_name(args)}-seed{args.seed}"


def table_name(args):
    """What the runs of one command have in common."""
    name = [Path(args.data).name, *([args.category] if args.category else []), method_name(args)]
    preset = data.DATASETS.get(args.data, {})
    name += [args.split] if args.split != preset.get("splits", ("random",))[0] else []
    name += [args.label_rule] if args.label_rule != preset.get("label_rules", (None,))[0] else []
    name += [f"split{args.split_seed}"] if args.split_seed != 1 else []
    name += ["shots" + joined(args.shots)] if args.shots else []
    name += (
        ["shift" + "+".join("{}-{:g}".format(*shift) for shift in as_list(args.shift))]
        if args.shift
        else []
    )
    return "-".join([*name, *([f"fold{args.fold}"] if args.fold else [])])


def joined(values):
    return "-".join(map(str, as_list(values)))


def method_name(args):
    """What differs between the rows of a table."""
    name = [args.method]
    if args.method == "ordinalclip":
        name += [args.interp] + (["K" + joined(args.base_ranks)] if args.interp != "none" else [])
    if args.method == "regression":
        name += [args.regression_loss]
    name += [f"tune-{args.tune}"] if args.tune != "both" else []
    name += ["warm"] if args.init else ["random-context"] if (args.context or "").isdigit() else []
    name += ["frozen"] if args.freeze_image else []
    name += [args.rank_position] if args.rank_position != "tail" else []
    name += ["own-words"] if args.context and not args.context.isdigit() else []
    name += ["official"] if args.official else []
    return "-".join(name)


# ------------------------------------------------------------------------------------------------- main


def main(argv=None):
    """-> results of the run; a list of them where there are several; tables with --report."""
    args = parse_args(argv)
    if args.report:
        return report(args.report)
    start_processes(args)
    try:
        if args.eval:
            return test_only(args)
        if several(args):
            return train_several(args)
        return train(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def command_line():
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; --resume RUN goes on after its last whole epoch, and so does the same "
            "command where it was of several runs"
        ) from None


def train_several(args):
    """A run for each combination of values. What is finished is read, what was begun goes on."""
    folds = (
        range(data.DATASETS.get(args.data, {}).get("folds", 5))
        if args.fold == "all"
        else [args.fold]
    )
    kinds = categories(args.data) if args.category == "each" else [args.category]
    if kinds == [None] and args.category:
        raise SystemExit(f"--category each: {args.data} has no categories; leave it out")
    lists, runs = [as_list(getattr(args, key)) for key in LISTS], []
    for fold, kind, *chosen, seed in itertools.product(
        folds, kinds, *lists, args.seeds or [args.seed]
    ):
        run = copy.copy(args)
        vars(run).update(zip(LISTS, chosen), fold=fold, category=kind, seed=seed)
        run.out = str(Path(args.out or "runs") / run_name(run))
        runs.append(run)
    if several_values(args):  # a wrong value is told before the first run, not after it
        for run in {joined([run.base_ranks, run.shots, run.shift]): run for run in runs}.values():
            num_ranks = load_task(run).num_ranks
            if run.method == "ordinalclip" and run.base_ranks > num_ranks:
                raise SystemExit(
                    f"--base-ranks {run.base_ranks}, but {args.data} has {num_ranks} ranks; give fewer"
                )
    results = [finished(run) or train(unfinished(run)) for run in runs]
    if is_main():
        report([run.out for run in runs], f"report-{table_name(args)}.md")
    return results


def finished(args):
    """Results of the run in args.out if it is there and whole, with the settings asked for."""
    path = Path(args.out) / "results.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    refuse_other_settings(args, results)
    if is_main():
        print(f"{args.out} is finished, its results are read")
    return results


def refuse_other_settings(args, results):
    wanted, found = (
        comparable(json.loads(json.dumps(settings_of(args)))),
        comparable(results["settings"]),
    )
    if differing := [key for key in wanted if wanted[key] != found.get(key)]:
        raise SystemExit(
            f"{args.out} is finished, but with another --{differing[0].replace('_', '-')}: "
            f"{found.get(differing[0])!r}, not {wanted[differing[0]]!r}; give another --out"
        )


def unfinished(args):
    """The same, going on from last.pt where there is one."""
    last = Path(args.out) / "last.pt"
    args.resume = str(last) if last.exists() else None
    return args


def comparable(settings):
    return {key: value for key, value in settings.items() if key not in MACHINE}


def train(args):
    """One run from the data to results.json."""
    out, began = Path(args.out), time.time()
    refuse_to_overwrite(out, args)
    task = load_task(args)
    torch.manual_seed(args.seed)
    model, preprocess = build_model(args, task)
    if args.init and not args.resume:
        warm_start(args, model)
    start = similarity_matrix(model) if args.epochs else None
    groups = param_groups(model)
    train_loader, val_loader, test_loader = loaders(args, task, preprocess, model)
    describe(args, task, model, groups, preprocess)
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
        task.write_lists(out / "splits")
        save_json(
            out / "config.json",
            dict(settings=settings_of(args), protocol=task.protocol, **provenance()),
        )

    if args.epochs == 0:
        save_checkpoint(out / "best.pt", model, args, epoch=0)
    else:
        fit(args, model, groups, preprocess, train_loader, val_loader, out)
    wait_for_main()  # it writes best.pt
    restore(model, load_checkpoint(out / "best.pt", "model"))
    results = test(args, task, model, preprocess, val_loader, test_loader, out, began, start)
    if is_main():
        if args.method != "regression":  # which has no prototypes
            export(out / "exported.pt", args, task, model, preprocess, results)
        save_json(out / "results.json", results)
    return results


def test_only(args):
    """--eval: a checkpoint on the test images of its run; writes eval-NAME.json beside it."""
    path, began = Path(args.eval), time.time()
    task = load_task(args)
    torch.manual_seed(args.seed)
    model, preprocess = build_model(args, task)
    again = args.epochs and not args.init
    start = similarity_matrix(model) if again else None  # the same seed, the same start
    restore(model, load_checkpoint(path, "model"))
    _, val_loader, test_loader = loaders(args, task, preprocess, model)
    out, name = path.parent, f"eval-{path.stem}"
    results = test(args, task, model, preprocess, val_loader, test_loader, out, began, start, name)
    if is_main():
        save_json(out / f"{name}.json", results)
        print(f"written to {out}: {name}.json, predictions-{name}.csv, pictures-{name}/")
    return results


def refuse_to_overwrite(out, args):
    if args.resume:
        if (out / "results.json").exists():
            raise SystemExit(
                f"{out} is finished, see {out / 'results.json'}; --eval tests it again"
            )
    elif (out / "results.json").exists():
        refuse_other_settings(args, json.loads((out / "results.json").read_text()))
        raise SystemExit(
            f"{out} holds a finished run; --eval {out} tests it again, --out starts anew elsewhere"
        )
    elif (out / "last.pt").exists():
        raise SystemExit(
            f"{out} holds a run; --resume {out} goes on with it, --out elsewhere starts anew"
        )
    elif out.exists() and (others := {path.name for path in out.iterdir()} - set(FILES)):
        raise SystemExit(f"{out} holds other files ({sorted(others)[0]} ...); give another --out")


def load_task(args):
    """The dataset under its protocol; a run that exists is read back from its own lists."""
    lists = (args.train_list, args.val_list, args.test_list)
    if args.resume or args.eval:
        splits = Path(args.out) / "splits"
        lists = tuple(splits / f"{part}.txt" for part in data.PARTS)
    if args.data == "demo" and (args.resume or args.eval) or not any(lists):
        lists = None  # the demo has one split
    elif lists[0] is None:
        raise SystemExit("--val-list and --test-list need a --train-list")
    with main_process_first(), told_plainly():  # it draws the demo, the others find it
        task = data.load(
            args.data,
            args.data_root,
            split=args.split,
            fold=args.fold,
            seed=args.split_seed,
            lists=lists,
            category=args.category,
            label_rule=args.label_rule,
        )
        if lists is None or not (
            args.resume or args.eval
        ):  # else the lists of the run are these images
            task = data.few_shot(task, args.shots, args.seed) if args.shots is not None else task
            task = data.shifted(task, *args.shift, args.seed) if args.shift else task
    if args.resume or args.eval:  # the same images, so the same protocol
        with told_plainly():
            config = json.loads((Path(args.out) / "config.json").read_text())
        task = replace(task, protocol=config["protocol"])
    return task


@contextlib.contextmanager
def told_plainly():
    """What is wrong with a user's files or names, without the traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train.py: {error}") from error


# ------------------------------------------------------------------------------------------------ model


def build_model(args, task):
    """-> the model on its device, and how its images are prepared."""
    with told_plainly():
        model, preprocess = assemble(args, task)
    return model.to(
        args.device, memory_format=torch.channels_last
    ), preprocess  # faster convolutions


def assemble(args, task):
    needs_clip = args.method not in ("linear", "regression") or args.image_encoder == "clip"
    clip = load_clip(args) if needs_clip else None
    dim = clip.embed_dim if clip else LINEAR_DIM
    if args.image_encoder == "clip":
        encoder = clip.visual.requires_grad_(True)
        preprocess = dict(image_size=clip.image_size, mean=data.CLIP_MEAN, std=data.CLIP_STD)
    else:
        weights = None if args.image_weights == "none" else args.image_weights
        encoder = build_image_encoder(args.image_encoder, dim, weights=weights, download=download)
        preprocess = dict(image_size=encoder.image_size, mean=encoder.mean, std=encoder.std)
    if args.official:  # xk-huang/OrdinalCLIP@ca10a20 ordinalclip/runner/utils.py#L370-L400
        preprocess |= dict(
            mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD, squash=True, resample="bilinear"
        )
    if args.freeze_image:
        encoder.requires_grad_(False)
    if args.method == "regression":
        return Regression(encoder, dim, task.num_ranks, args.regression_loss), preprocess
    scale = clip.logit_scale if clip else LINEAR_SCALE
    return OrdinalCLIP(encoder, build_prototypes(args, task, clip, dim), scale), preprocess


class Regression(nn.Module):
    """The paper's regression baseline: one neuron that says the rank index, with L1 or L2 loss.

    It starts at the middle rank. `predict` puts the probability on the two ranks beside the answer, so that the
    expected rank is the answer (within 0..R-1) and the most probable one the nearest.
    """

    def __init__(self, image_encoder, dim, num_ranks, loss):
        super().__init__()
        self.image_encoder, self.num_ranks, self.kind = image_encoder, num_ranks, loss
        self.neuron = nn.Linear(dim, 1)
        nn.init.constant_(self.neuron.bias, (num_ranks - 1) / 2)

    def forward(self, images):
        """Images (B, 3, H, W) -> rank indices (B,), of any size."""
        return self.neuron(self.image_encoder(images).float())[:, 0]

    def loss(self, images, labels, *, target=None, group=None):
        """Images (B, 3, H, W), rank indices (B,) -> (mean loss, the same, 0).

        With `group` the loss is that of all its processes, and gradients are each one's share, as OrdinalCLIP's.
        `target` is OrdinalCLIP's column target: here there are no columns.
        """
        error = self(images) - labels
        total = (error.abs() if self.kind == "l1" else error.square()).mean() / num_processes()
        if group is not None:
            whole = total.detach().clone()
            dist.all_reduce(whole, group=group)
            total = total + (whole - total.detach())
        return total, total, torch.zeros_like(total)

    @torch.no_grad()
    def predict(self, images):
        """Images (B, 3, H, W) -> dict(probs (B, R))."""
        ranks = torch.arange(self.num_ranks, device=images.device)
        answers = self(images).clamp(0, self.num_ranks - 1)[:, None]  # (B, 1)
        return dict(probs=(1 - (answers - ranks).abs()).clamp_min(0))

    def export(self):
        return self


def load_clip(args):
    if args.clip == "tiny":
        return tiny_clip(image_size=96)
    with main_process_first():  # it downloads, the others find the file
        return CLIP.from_pretrained(
            args.clip, quick_gelu=args.quick_gelu, trust_torchscript=args.trust_torchscript
        )


def build_prototypes(args, task, clip, dim):
    if args.method == "linear":
        return LinearPrototypes(task.num_ranks, dim)
    tokenizer, context = Tokenizer(), args.context or task.context
    if args.method == "zeroshot":
        prompts = [zeroshot_prompt(args, task, name) for name in task.rank_names]
        with torch.no_grad():
            return FixedPrototypes(clip.encode_text(tokenizer(prompts, clip.context_length)))
    names = [tokenizer.encode(name) for name in task.rank_names]
    prompts = RankPrompts(
        clip,
        task.num_ranks,
        context=int(context) if context.isdigit() else torch.tensor(tokenizer.encode(context)),
        rank_tokens=names if args.rank_init == "names" else None,
        interp=args.interp,
        num_base_ranks=args.base_ranks,
        rank_position=args.rank_position,
    )
    prompts.rank_embeds.requires_grad_(args.tune != "context")
    prompts.context_embeds.requires_grad_(args.tune != "rank")
    return prompts


def zeroshot_prompt(args, task, name):
    return f"{args.context or task.context} {name}."


def init_state(args):
    path = Path(args.init)
    return load_checkpoint(path / "best.pt" if path.is_dir() else path, "model")["model"]


def warm_start(args, model):
    """Copy the image encoder and the prompt of another run; its base ranks are resampled to the number of ours.

    Base embeddings lie at equal distances from the lowest rank to the highest, in both runs, so rank c of R starts
    where rank c (R_old - 1) / (R - 1) of the other run ended.
    """
    state, own = init_state(args), model.state_dict()
    taken = {key: value for key, value in state.items() if key.startswith("image_encoder.")}
    if "prototypes.context_embeds" in state and "prototypes.context_embeds" in own:
        taken["prototypes.context_embeds"] = state["prototypes.context_embeds"]
        ranks, (num_base, *_) = state["prototypes.rank_embeds"], own["prototypes.rank_embeds"].shape
        rows = ranks.permute(1, 2, 0)  # (K, T, W) -> (T, W, K)
        rows = nn.functional.interpolate(rows, num_base, mode="linear", align_corners=True)
        taken["prototypes.rank_embeds"] = rows.permute(2, 0, 1)
    for key, value in taken.items():
        if key not in own or own[key].shape != value.shape:
            found = tuple(own[key].shape) if key in own else "nothing of that name"
            raise SystemExit(
                f"--init {args.init}: {key} is {tuple(value.shape)} there, here {found}; "
                "use the same --image-encoder, --clip and number of context tokens"
            )
    model.load_state_dict(own | taken)
    if is_main():
        prompts = " and prompts" if "prototypes.rank_embeds" in taken else ""
        print(f"starts with the image encoder{prompts} of {args.init}")


def param_groups(model):
    """One optimizer group per part; every parameter that trains is in exactly one."""
    groups = [
        dict(name=name, params=[p for p in part.parameters() if p.requires_grad])
        for name, part in model.named_children()
    ]
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable
    return [group for group in groups if group["params"]]


# --------------------------------------------------------------------------------------------- training


def fit(args, model, groups, preprocess, train_loader, val_loader, out):
    """Trains; leaves last.pt and best.pt, the epoch with the lowest validation MAE (argmax)."""
    optimizer = torch.optim.RAdam(
        groups, lr=args.lr, weight_decay=args.weight_decay, decoupled_weight_decay=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.precision == "fp16")
    parts = dict(optimizer=optimizer, schedule=schedule, scaler=scaler)
    log, first = [], 1
    if args.resume:
        saved = load_checkpoint(args.resume, "log")
        restore(model, saved)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        log, first = saved["log"], saved["epoch"] + 1

    began = time.time()
    for epoch in range(first, args.epochs + 1):
        torch.manual_seed(args.seed * 1_000_003 + epoch)  # so a resumed run draws the same
        row = dict(epoch=epoch, lr=schedule.get_last_lr()[0])
        row |= train_epoch(args, model, optimizer, scaler, preprocess, train_loader, epoch)
        schedule.step()
        probs, labels = predictions(args, model, preprocess, val_loader)
        row |= {f"val_{name}": value for name, value in metrics(probs, labels).items()}
        row |= dict(peak_mb=peak_memory(args.device))
        best = all(row["val_mae_argmax"] < other["val_mae_argmax"] for other in log)
        log.append(row)
        if is_main():
            eta = (time.time() - began) / (epoch - first + 1) * (args.epochs - epoch)
            print_epoch(row, args.epochs, eta, best)
            if best:
                save_checkpoint(out / "best.pt", model, args, epoch=epoch)
            save_csv(out / "log.csv", log)
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(out / "last.pt", model, args, epoch=epoch, log=log, **states)


def train_epoch(args, model, optimizer, scaler, preprocess, loader, epoch):
    """-> mean losses and images per second of one pass."""
    model.train()
    target = "softmax10" if args.official else "normalized"
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(epoch)
    group = dist.group.WORLD if dist.is_initialized() else None
    params = [p for g in optimizer.param_groups for p in g["params"]]
    sums, seen, began, shown = torch.zeros(4, device=args.device), 0, time.time(), 0.0
    step_model = on_features(model) if args.freeze_image else model
    for step, (images, labels) in enumerate(loader, 1):
        images, labels = (
            to_device(images, args, preprocess),
            labels.to(args.device, non_blocking=True),
        )
        with autocast(args):
            total, i2t, t2i = step_model.loss(images, labels, target=target, group=group)
        optimizer.zero_grad()
        scaler.scale(total).backward()
        if group is not None:
            sum_gradients(params)
        scaler.step(optimizer)
        scaler.update()
        sums += torch.stack([total, i2t, t2i, total.new_ones(())]).detach() * len(labels)
        seen += len(labels) * num_processes()
        if is_main() and sys.stderr.isatty() and time.time() - shown > 0.25:
            shown = time.time()
            speed = f"{seen / (shown - began):.0f} images/s"
            print(
                f"\r  epoch {epoch}  {step}/{len(loader)}  {speed} ",
                end="",
                file=sys.stderr,
                flush=True,
            )
    loss, i2t, t2i = (sums[:3] / sums[3]).tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"loss is {loss} in epoch {epoch}; try a lower --lr or --precision fp32"
        )
    return dict(loss=loss, i2t=i2t, t2i=t2i, images_per_s=seen / (time.time() - began))


def print_epoch(row, epochs, eta, best):
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(clear, end="", file=sys.stderr, flush=True)
    print(
        f"epoch {row['epoch']:3d}/{epochs}  "
        f"loss {row['loss']:.3f} (i2t {row['i2t']:.3f} t2i {row['t2i']:.3f})  "
        f"val MAE {row['val_mae_expected']:.3f} expected {row['val_mae_argmax']:.3f} argmax  "
        f"acc {row['val_acc_argmax']:.1%}  {row['images_per_s']:.0f} img/s  {row['peak_mb']:.0f} MB  "
        f"eta {eta // 60:.0f}:{eta % 60:02.0f}{'  *' if best else ''}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------- evaluation


def test(args, task, model, preprocess, val_loader, test_loader, out, began, start, name="best"):
    """Metrics of the test images (and of the validation images once more), printed and returned."""
    probs, labels = predictions(args, model, preprocess, test_loader)
    val = metrics(*predictions(args, model, preprocess, val_loader)) if len(val_loader) else None
    zeroshot = args.method == "zeroshot"
    results = dict(
        data=task.name,
        protocol=task.protocol,
        method=run_name(args),
        images=dict(train=len(task.train), val=len(task.val), test=len(task.test)),
        val_is_test=task.val_is_test,
        prompt=zeroshot_prompt(args, task, task.rank_names[0]) if zeroshot else None,
        test=metrics(probs, labels),
        val=val,
        majority=majority_metrics(task),
        per_rank=per_rank_metrics(task, probs, labels),
        long_tail=long_tail_metrics(task, probs, labels),
        **ordinality_scores(args, task, model),
        seconds=round(time.time() - began, 1),
        settings=settings_of(args),
        **provenance(),
    )
    if is_main():
        save_predictions(out / f"predictions-{name}.csv", task, probs)
        folder = out / ("pictures" if name == "best" else f"pictures-{name}")
        save_pictures(
            folder,
            task,
            model,
            preprocess,
            start,
            probs,
            labels,
            results["per_rank"],
            read_log(out),
        )
        print_results(results)
    return results


@torch.no_grad()
def ordinality_scores(args, task, model):
    """Of all ranks, and of comparisons within a few spans, each beside what unordered prototypes get."""
    if args.method == "regression" or task.num_ranks < 3:
        return dict(ordinality=None, ordinality_chance=None, ordinality_spans={})
    prototypes, official = model.prototypes().float(), args.official
    if official and task.name == "morph2":
        prototypes = prototypes[15:76]  # scripts/vis_ordinality.py: ages 15 to 75
    spans = [span for span in SPANS if span < len(prototypes) - 1]

    def both(span):
        return ordinality(prototypes, span, official), ordinality_chance(
            len(prototypes), span, official
        )

    score, chance = both(None)
    return dict(
        ordinality=score,
        ordinality_chance=chance,
        ordinality_spans={str(span): dict(zip(("score", "chance"), both(span))) for span in spans},
    )


@torch.no_grad()
def predictions(args, model, preprocess, loader):
    """-> probs (M, R) and labels (M,) of all the loader's images, on the CPU, in order."""
    average_buffers(model)
    frozen = model.export().eval()  # the text tower runs once
    frozen = on_features(frozen) if args.freeze_image else frozen
    probs, labels = [], []
    for images, batch_labels in loader:
        with autocast(args):
            probs.append(frozen.predict(to_device(images, args, preprocess))["probs"].cpu())
        labels.append(batch_labels)
    return all_processes(torch.cat(probs)), all_processes(torch.cat(labels))  # (M, R), (M,)


def metrics(probs, labels):
    """Errors in ranks, of the expected and of the most probable rank; probs (M, R), labels (M,).

    mae; acc: rounded answer = label; cs: cumulative score CS(5), share of errors <= 5; qwk: quadratic weighted
    kappa of the rounded answers.
    """
    labels, found = labels.double(), {}
    answers = dict(expected=expected_rank(probs), argmax=probs.argmax(1).double())  # (M,) each
    rules = dict(mae=mean_error, acc=accuracy, cs=cumulative_score, qwk=weighted_kappa)
    for name, rule in rules.items():
        found |= {f"{name}_{kind}": float(rule(answer, labels)) for kind, answer in answers.items()}
    return found


def expected_rank(probs):
    return probs.double() @ torch.arange(probs.shape[1], dtype=torch.float64)  # (M, R) -> (M,)


def mean_error(answers, labels):
    return (answers - labels).abs().mean()


def accuracy(answers, labels):
    return (answers.round() == labels).double().mean()


def cumulative_score(answers, labels):
    return ((answers - labels).abs() <= CUMULATIVE).double().mean()


def weighted_kappa(answers, labels):
    """1 - squared error / squared error of the same answers dealt out at random (Cohen 1968)."""
    answers = answers.round()
    by_chance = (
        answers.var(correction=0) + labels.var(correction=0) + (answers.mean() - labels.mean()) ** 2
    )
    return 1 - (answers - labels).square().mean() / by_chance if by_chance > 0 else torch.ones(())


def per_rank_metrics(task, probs, labels):
    """One row per rank that occurs in the test images."""
    train = torch.tensor([sample.label for sample in task.train]).bincount(minlength=task.num_ranks)
    rows = []
    for rank in labels.unique().tolist():
        here = labels == rank
        found = metrics(probs[here], labels[here])
        rows.append(
            dict(
                rank=task.rank_names[rank],
                train_images=int(train[rank]),
                test_images=int(here.sum()),
                mae_expected=found["mae_expected"],
                mae_argmax=found["mae_argmax"],
            )
        )
    return rows


def long_tail_metrics(task, probs, labels):
    """MAE of ranks with many, some and few training images."""
    count = torch.tensor([sample.label for sample in task.train]).bincount(
        minlength=task.num_ranks
    )[labels]
    groups = {f"many (>{MANY})": count > MANY, f"few (<{FEW})": count < FEW}
    groups[f"some ({FEW}..{MANY})"] = (count >= FEW) & (count <= MANY)
    return {
        name: dict(test_images=int(here.sum()), **metrics(probs[here], labels[here]))
        for name, here in groups.items()
        if here.any()
    }


def majority_metrics(task):
    """What always answering the most frequent training rank gives on the test images."""
    train = torch.tensor([sample.label for sample in task.train])
    labels = torch.tensor([sample.label for sample in task.test])
    counts = train.bincount(minlength=task.num_ranks)
    frequent = (counts == counts.max()).nonzero()[:, 0]
    rank = frequent[len(frequent) // 2]  # of several, as with --shots, the one in the middle
    probs = torch.nn.functional.one_hot(rank.expand(len(labels)), task.num_ranks)
    found = metrics(probs, labels)
    return dict(rank=task.rank_names[rank], mae=found["mae_argmax"], acc=found["acc_argmax"])


def print_results(results):
    test, majority = results["test"], results["majority"]
    print(f"\n{results['protocol']}")
    if results["prompt"]:
        print(f"prompt of the first rank: {results['prompt']!r}")
    if results["val_is_test"]:
        print("NOTE: the epoch was chosen on the test images themselves, as this protocol has it")
    print(
        f"test   MAE {test['mae_expected']:.3f} expected {test['mae_argmax']:.3f} argmax   "
        f"accuracy {test['acc_expected']:.1%} expected {test['acc_argmax']:.1%} argmax\n"
        f"CS({CUMULATIVE}) {test['cs_expected']:.1%} expected {test['cs_argmax']:.1%} argmax   "
        f"weighted kappa {test['qwk_expected']:.3f} expected {test['qwk_argmax']:.3f} argmax\n"
        f"always {majority['rank']!r}: MAE {majority['mae']:.3f}   accuracy {majority['acc']:.1%}"
    )
    if len(results["long_tail"]) > 1:
        groups = (f"{name} {row['mae_argmax']:.3f}" for name, row in results["long_tail"].items())
        print(f"MAE (argmax) by training images of the rank: {', '.join(groups)}")
    if results["ordinality"] is not None:
        spans = (f"{span}: {row['score']:.1%}" for span, row in results["ordinality_spans"].items())
        print(
            f"ordinality {results['ordinality']:.1%} (chance {results['ordinality_chance']:.0%}); "
            f"within spans of {', '.join(spans)}"
        )


def save_predictions(path, task, probs):
    ranks = torch.arange(task.num_ranks, dtype=probs.dtype)
    save_csv(
        path,
        [
            dict(
                path=s.path,
                label=task.rank_names[s.label],
                rank=task.rank_names[int(p.argmax())],
                expected_rank_index=f"{float(p @ ranks):.4f}",
                prob=f"{float(p.max()):.4f}",
            )
            for s, p in zip(task.test, probs)
        ],
    )


@torch.no_grad()
def similarity_matrix(model):
    """Cosines between the prototypes (R, R), or None where there are none."""
    if isinstance(model, Regression):
        return None
    rows = unit(model.prototypes()).cpu()
    return rows @ rows.T


def save_pictures(folder, task, model, preprocess, start, probs, labels, per_rank, log):
    """similarity, confusion, distribution, error, sheet, curves as PNG; start: similarity before training."""
    folder.mkdir(exist_ok=True)
    names, axes = task.rank_names, ("predicted rank", "true rank")
    means = mean_probs(probs, labels)
    pictures = dict(
        confusion=draw_matrices([confusion(probs, labels)], ["test images, counted"], names, axes),
        distribution=draw_matrices(
            [means], ["mean probability of each rank"], names, axes, (0, float(means.max()))
        ),
        error=draw_error_by_rank(per_rank),
        sheet=draw_sheet(best_and_worst(task, preprocess, probs, labels)),
    )
    end = similarity_matrix(model)
    if end is not None:
        both = [(start, "similarity before training")] if start is not None else []
        both += [(end, "similarity of the prototypes")]
        pictures["similarity"] = draw_matrices(*zip(*both), names, ("rank", "rank"))
    if log:
        pictures["curves"] = draw_curves(log)
    for name, picture in pictures.items():
        write(folder / f"{name}.png", lambda part: picture.save(part, "PNG"))


def confusion(probs, labels):
    """Counts (R, R): row the true rank, column the most probable one."""
    size = probs.shape[1]
    return torch.bincount(labels * size + probs.argmax(1), minlength=size**2).view(size, size)


def mean_probs(probs, labels):
    """Mean distribution of the images of each true rank (R, R); zero rows for ranks without images."""
    hit = nn.functional.one_hot(labels, probs.shape[1]).to(probs)  # (M, R)
    return hit.T @ probs / hit.sum(0).clamp_min(1)[:, None]


def best_and_worst(task, preprocess, probs, labels, count=6):
    """The test images whose expected rank is nearest to and farthest from the label, for draw_sheet."""
    pixels = {
        key: preprocess[key] for key in ("image_size", "squash", "resample") if key in preprocess
    }
    images, expected = data.ImageList(task.test, task.root, **pixels), expected_rank(probs)
    order = (expected - labels).abs().argsort(stable=True).tolist()

    def shown(i):
        rank, label = task.rank_names[int(expected[i].round())], task.rank_names[labels[i]]
        return images[i][0], f"expected {rank}\ntrue {label}"

    return [
        ("best predictions", [shown(i) for i in order[:count]]),
        ("worst predictions", [shown(i) for i in order[::-1][:count]]),
    ]


def read_log(out):
    """Rows of log.csv as numbers; none where nothing was trained."""
    if not (out / "log.csv").exists():
        return []
    with open(out / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------- images to device


def loaders(args, task, preprocess, model):
    """Train, validation and test loaders of (uint8 images (B, 3, S, S), labels (B,)).

    With --freeze-image of (features (B, D), labels (B,)).
    """
    if args.batch_size % num_processes():
        raise SystemExit(
            f"--batch-size {args.batch_size} is over all processes: {num_processes()} must divide it"
        )
    made, pixels = [], {key: preprocess[key] for key in ("squash", "resample") if key in preprocess}
    for part in data.PARTS:
        training = part == "train"
        images = data.ImageList(
            getattr(task, part),
            task.root,
            image_size=preprocess["image_size"],
            train=training and not args.freeze_image,
            **pixels,
        )
        if args.freeze_image:
            images = cached_features(args, images, preprocess, model)
        sampler = None
        if dist.is_initialized() and training:
            sampler = DistributedSampler(images, seed=args.seed)
        elif dist.is_initialized():
            images = Subset(images, range(dist.get_rank(), len(images), num_processes()))
        made.append(
            DataLoader(
                images,
                args.batch_size // num_processes(),
                shuffle=training and sampler is None,
                sampler=sampler,
                num_workers=0 if args.freeze_image else args.workers,
                pin_memory=args.device.startswith("cuda"),
            )
        )
    return made


def cached_features(args, images, preprocess, model):
    """The frozen encoder's [(feature (D,), label)] of all the images; computed once per encoder and list."""
    encoder, digest = model.image_encoder, hashlib.sha256()
    for key, value in encoder.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().float().numpy().tobytes())
    for sample in images.samples:
        stat = (images.root / sample.path).stat()
        digest.update(f"{sample.path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    digest.update(
        repr((sorted(preprocess.items()), args.precision, str(images.root.resolve()))).encode()
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "ordinalclip" / "features" / f"{digest.hexdigest()}.pt"
    with main_process_first():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            features = compute_features(args, images, preprocess, encoder)
            write(path, lambda part: torch.save(features, part))
    features = torch.load(path, map_location="cpu", weights_only=True)
    return list(zip(features, (sample.label for sample in images.samples)))


@torch.no_grad()
def compute_features(args, images, preprocess, encoder):
    encoder.eval()
    features = []
    for batch, _ in DataLoader(images, args.batch_size, num_workers=args.workers):
        with autocast(args):
            features.append(encoder(to_device(batch, args, preprocess)).float().cpu())
    return torch.cat(features)  # (M, D)


def on_features(model):
    """The same model (shared, not copied), reading features (B, D) instead of images."""
    other = copy.copy(model)
    other._modules = dict(model._modules, image_encoder=nn.Identity())
    return other


def to_device(images, args, preprocess):
    """Pixels travel as bytes and are normalised where they are used; features stay as they are."""
    images = images.to(args.device, non_blocking=True)
    if images.dim() == 2:
        return images
    images = data.normalize(images, preprocess["mean"], preprocess["std"])
    return images.contiguous(memory_format=torch.channels_last)


def autocast(args):
    dtype = PRECISIONS[args.precision]
    return torch.autocast(args.device.split(":")[0], dtype) if dtype else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------- report


def few_shots(number):
    return f"{number} shot" + "s" * (number > 1)


def printed(rows, figures, digits=2):
    """{row: figure as the paper prints it}; of a pair the second is the deviation over folds."""
    pairs = (figure if isinstance(figure, tuple) else (figure,) for figure in figures)
    return {
        row: " ± ".join(f"{number:.{digits}f}" for number in pair) for row, pair in zip(rows, pairs)
    }


# The paper's tables, data: {column: {row: figure}}; the paper does not say whether its MAE is that of the expected
# or of the most probable rank. All tables: xk-huang/OrdinalCLIP, branch gh-pages, images/image*.png.
OURS, OVERALL = "ordinalclip-linear-K3", "overall"  # the paper's plain mean over the categories
TUNED = (
    "tune-rank-random-context",
    "tune-context-random-context",
    "random-context",
    "tune-rank",
    "tune-context",
)
ROWS, FEW_ROWS = ("linear", "zeroshot", "coop", OURS), ("linear", "coop", OURS)
PAPER_MAE = {
    "morph2": {
        "all": {
            **printed(ROWS, (2.63, 14.45, 2.39, 2.32)),
            **printed(
                [f"ordinalclip-linear-K{k}" for k in (2, 4, 5, 6, 7, 8, 9)],
                (2.38, 2.38, 2.36, 2.39, 2.38, 2.40, 2.41),
            ),
            **printed(
                [f"ordinalclip-inverse-K{k}" for k in range(2, 10)],
                (2.39, 2.38, 2.39, 2.40, 2.39, 2.35, 2.38, 2.38),
            ),
            **printed([f"coop-{tuned}" for tuned in TUNED], (2.58, 2.44, 2.39, 2.41, 2.39)),
            **printed([f"{OURS}-{tuned}" for tuned in TUNED], (2.38, 2.37, 2.36, 2.34, 2.34)),
        },
        **{
            few_shots(shots): printed(FEW_ROWS, maes)
            for shots, *maes in (
                (1, 8.04, 5.09, 4.94),
                (2, 6.00, 4.50, 4.36),
                (4, 4.66, 3.81, 3.55),
                (8, 3.91, 3.57, 3.31),
                (16, 3.57, 3.23, 3.07),
                (32, 3.06, 2.87, 2.76),
                (64, 2.84, 2.61, 2.57),
            )
        },
        **{
            f"shift {ranks}-{gone}": printed(FEW_ROWS, maes)
            for ranks, gone, *maes in (
                (10, 80, 2.88, 2.71, 2.61),
                (10, 90, 2.98, 2.85, 2.67),
                (20, 80, 3.46, 2.98, 2.77),
                (20, 90, 3.68, 3.51, 3.06),
                (30, 80, 3.19, 3.06, 2.86),
                (30, 90, 4.06, 3.36, 3.21),
                (40, 80, 3.28, 2.99, 2.84),
                (40, 90, 3.65, 3.30, 3.12),
            )
        },
    },
    "adience": {"all": printed(ROWS, ((0.56, 0.09), (1.50, 0.20), (0.50, 0.08), (0.47, 0.06)))},
    "hci": {"all": printed(ROWS, ((0.80, 0.03), (1.48, 0.03), (0.76, 0.06), (0.67, 0.03)))},
    "aesthetics": {
        category: printed(ROWS, maes, 3)
        for category, *maes in (
            ("nature", 0.338, 0.438, 0.285, 0.273),
            ("animal", 0.381, 0.737, 0.298, 0.279),
            ("urban", 0.364, 0.683, 0.294, 0.277),
            ("people", 0.377, 1.063, 0.330, 0.291),
            ("overall", 0.365, 0.730, 0.302, 0.280),
        )
    },
}
PAPER_ACC = {
    "adience": {"all": printed(ROWS, ((56.0, 5.9), (25.4, 3.5), (60.6, 5.5), (61.2, 4.2)), 1)},
    "hci": {"all": printed(ROWS, ((42.56, 3.04), (26.08, 0.56), (51.90, 2.60), (56.44, 1.66)))},
    "aesthetics": {
        category: printed(ROWS, accs)
        for category, *accs in (
            ("nature", 72.76, 63.33, 72.74, 73.65),
            ("animal", 70.44, 36.78, 71.46, 72.85),
            ("urban", 70.12, 49.84, 72.14, 73.20),
            ("people", 70.80, 24.79, 69.34, 72.50),
            ("overall", 71.03, 43.69, 71.42, 73.05),
        )
    },
}
TABLES = (  # title, where in results, factor, digits, the paper's figures
    ("MAE, expected rank", ("test", "mae_expected"), 1, 3, PAPER_MAE),
    ("MAE, most probable rank", ("test", "mae_argmax"), 1, 3, PAPER_MAE),
    ("Accuracy, most probable rank, %", ("test", "acc_argmax"), 100, 2, PAPER_ACC),
    (f"Cumulative score CS({CUMULATIVE}), expected rank, %", ("test", "cs_expected"), 100, 1, {}),
    ("Quadratic weighted kappa, expected rank", ("test", "qwk_expected"), 1, 3, {}),
    ("Ordinality of the prototypes, %", ("ordinality",), 100, 1, {}),
)


def report(paths, name="report.md"):
    """Markdown tables, method x column, mean +- standard deviation over runs; written beside the runs as well.

    The paper's figure stands beside runs under its protocol (split, label rule, prompt); their encoder, epochs and
    the size of their data are in the list of runs, and need not be the paper's.
    """
    runs = [read_run(path) for path in sorted({path.resolve() for path in result_files(paths)})]
    if not runs:
        raise SystemExit(
            f"no results.json in {', '.join(map(str, paths))}; give folders of finished runs"
        )
    name_rows(runs)
    place = Path(os.path.commonpath([run["path"].parent for run in runs]))
    blocks = []
    for key in dict.fromkeys(table_key(run["settings"]) for run in runs):
        blocks.append(
            report_data(key, [run for run in runs if table_key(run["settings"]) == key], place)
        )
    text = "\n".join(blocks)
    write(place / name, lambda part: part.write_text(text))
    print(text + f"\nwritten to {place / name}")
    return text


def result_files(paths):
    """results.json of each folder, or of the folders in it."""
    for path in map(Path, paths):
        own = path / "results.json"
        yield from [own] if own.exists() else sorted(path.glob("*/results.json"))


def read_run(path):
    results = json.loads(path.read_text())
    settings = dict(init=None) | results["settings"]  # what runs of earlier versions do not hold
    settings["split"] = settings["split"] or "random"
    return results | dict(path=path.parent, settings=settings)


def table_key(settings):
    split = "given lists" if settings.get("train_list") else settings["split"]
    return settings["data"], settings.get("label_rule"), split


def column_name(settings):
    words = {None: [], "all": ["all categories"]}.get(
        settings.get("category"), [settings.get("category")]
    )
    words += [few_shots(settings["shots"])] if settings.get("shots") else []
    if settings.get("shift"):
        ranks, keep = settings["shift"]
        words += [f"shift {ranks}-{round(100 * (1 - keep))}"]
    return " ".join(words) or "all"


def name_rows(runs):
    """row = the method, and what else differs between runs that would share a cell: those are not averaged.

    Within a cell epochs and the like agree; from column to column they may change (fewer shots, more epochs).
    """
    for run in runs:
        run["row"] = method_name(argparse.Namespace(**run["settings"]))
        run["column"] = column_name(run["settings"])
    cells = {}
    for run in runs:
        cells.setdefault((table_key(run["settings"]), run["row"], run["column"]), []).append(run)
    for cell in cells.values():
        settings = [comparable(run["settings"]) for run in cell]
        differing = [
            key
            for key in settings[0]
            if key not in ("seed", "fold")
            and any(other.get(key) != settings[0][key] for other in settings)
        ]
        for run in cell:
            run["row"] += "".join(f" {key}={run['settings'][key]}" for key in differing)


def report_data(key, runs, place):
    """The tables of one dataset under one protocol, what they rest on, and a link to each run."""
    ordered = sorted(runs, key=lambda run: METHODS.index(run["settings"]["method"]))
    rows, columns = list(dict.fromkeys(run["row"] for run in ordered)), columns_of(key, runs)
    lines = ["## " + " ".join(str(word) for word in key if word), ""]
    for title, where, factor, digits, paper in TABLES:
        paper = paper.get(paper_key(key), {})
        known = any(row in paper.get(column, ()) for row in rows for column in columns)
        lines += [title + " (the paper's in brackets)" * known, ""]
        lines += ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            cells = []
            for column in columns:
                values = figures(key, [run for run in runs if run["row"] == row], column, where)
                cells.append(
                    cell([v * factor for v in values], digits, paper.get(column, {}).get(row))
                )
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [describe_run(run, os.path.relpath(run["path"], place)) for run in runs]
    return "\n".join(lines) + "\n"


def describe_run(run, link):
    settings, shown = run["settings"], ("seed", "fold", "image_encoder", "clip", "epochs")
    said = [f"{word.replace('_', ' ')} {settings[word]}" for word in shown if word in settings]
    said += [f"commit {run['commit']}", f"{run['seconds']} s"]
    said += [f"prompt {run['prompt']!r}"] if run.get("prompt") else []
    said += (
        [f"ordinality by chance {run['ordinality_chance']:.0%}"]
        if run.get("ordinality_chance")
        else []
    )
    if majority := run.get("majority"):
        said += [
            f"always {majority['rank']!r} MAE {majority['mae']:.3f} accuracy {majority['acc']:.1%}"
        ]
    said += [
        f"MAE (argmax) of ranks with {name} training images {tail['mae_argmax']:.3f}"
        for name, tail in run.get("long_tail", {}).items()
    ]
    return f"- [{link}]({link}/results.json): {', '.join(said)}; {run['protocol']}"


def columns_of(key, runs):
    """Columns that runs fill: all images, shots, shifts; of each the categories as in the paper, and their mean."""
    columns, (first, *others) = {run["column"] for run in runs}, categories(key[0])
    order = [first, *others, OVERALL]
    for name in [name for name in columns if others and name.split()[0] == first]:
        if all(name.replace(first, other, 1) in columns for other in others):
            columns.add(name.replace(first, OVERALL, 1))

    def place(name):
        kind = name.split()[0]
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        return "shift" in name, numbers, order.index(kind) if kind in order else -1

    return sorted(columns, key=place)


def figures(key, runs, column, where):
    """A figure of each run in the column; overall: of each seed and fold, the mean over the categories."""
    overall = column.split()[0] == OVERALL
    parts = (
        [column.replace(OVERALL, kind, 1) for kind in categories(key[0])] if overall else [column]
    )
    found = {}
    for run in runs:
        if run["column"] in parts:
            one = (run["settings"]["seed"], run["settings"]["fold"]) if overall else run["path"]
            found.setdefault(one, {})[run["column"]] = look_up(run, where)
    return [
        statistics.mean(values.values())
        for values in found.values()
        if len(values) == len(parts) and None not in values.values()
    ]


def paper_key(key):
    """The dataset of a table under the paper's protocol, else None."""
    name, rule, split = key
    preset = data.DATASETS.get(name, {})
    usual = preset.get("splits", ("random",))[0], preset.get("label_rules", (None,))[0]
    return name if (split, rule) == usual else None


def look_up(run, where):
    """run[where[0]][where[1]]...: one figure of a run's results."""
    for key in where:
        run = run[key]
    return run


def cell(values, digits, theirs):
    """Mean +- sample standard deviation, number of runs, the paper's figure."""
    if not values:
        return "-" if theirs is None else f"- [{theirs}]"
    text = f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}"  # + 0.0: no -0.000
    text += (
        f" ± {statistics.stdev(values):.{digits}f} (n={len(values)})"
        if len(values) > 1
        else " (n=1)"
    )
    return text if theirs is None else f"{text} [{theirs}]"


# -------------------------------------------------------------------------------------- files of the run


def settings_of(args):
    return {
        key: value for key, value in vars(args).items() if key not in ("resume", "eval", "report")
    }


def save_checkpoint(path, model, args, **more):
    if is_main():
        content = dict(model=model.state_dict(), settings=settings_of(args), **more)
        write(path, lambda part: torch.save(content, part))


def load_checkpoint(path, needed):
    if not Path(path).is_file():
        raise SystemExit(f"no checkpoint at {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own
        raise SystemExit(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(saved, dict) or needed not in saved:
        raise SystemExit(
            f"{path} is no checkpoint of this script for that use: it holds no {needed!r}"
        )
    return saved


def restore(model, saved):
    model.load_state_dict(saved["model"])


def export(path, args, task, model, preprocess, results):
    """Image encoder, prototypes and what is needed to use them: no text tower, no vocabulary."""
    exported = model.export()
    content = dict(
        format="ordinalclip-1",
        image_encoder=args.image_encoder,
        quick_gelu=any(type(m).__name__ == "QuickGELU" for m in exported.image_encoder.modules()),
        state_dict=exported.state_dict(),
        rank_names=list(task.rank_names),
        rank_values=list(task.rank_values),
        preprocess=preprocess,
        results=results,
    )
    write(path, lambda part: torch.save(content, part))


def save_json(path, content):
    write(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))


def save_csv(path, rows):
    def writer(part):
        with open(part, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)

    write(path, writer)


def provenance():
    """What a figure depends on beside the settings."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        commit=git.stdout.strip() or None,
        torch=str(torch.__version__),
        python=platform.python_version(),
        gpu=gpu,
        processes=num_processes(),
    )


def describe(args, task, model, groups, preprocess):
    if not is_main():
        return
    counts = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    trained = (
        ", ".join(f"{name} {count:,}" for name, count in counts.items())
        if args.epochs
        else "nothing"
    )
    print(
        f"{task.protocol}\n"
        f"method {run_name(args)}   ranks {task.num_ranks}   context {args.context or task.context!r}\n"
        f"image encoder {args.image_encoder} {preprocess['image_size']} px   clip {args.clip}   "
        f"trains {trained}\n"
        f"{args.device} {args.precision}, {num_processes()} process(es)   -> {args.out}"
    )


def peak_memory(device):
    """MB: of the GPU's allocator, or of this process (nan where the system does not say)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ----------------------------------------------------------------------------------- many processes


def start_processes(args):
    """Under torchrun: one process per GPU (or CPU process), joined in a group."""
    if "WORLD_SIZE" not in os.environ:
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0


def num_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_main():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_process_first():
    """The others wait until the main process is through, or has failed (then they fail alike)."""
    if not is_main():
        wait_for_main()
    try:
        yield
    finally:
        if is_main():
            wait_for_main()


def sum_gradients(params):
    """Each process holds its share of the gradient of the global loss: the whole is the sum."""
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, grad in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(grad.view_as(p))


def average_buffers(model):
    """Batch norm statistics of all processes, so that they evaluate one and the same model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= num_processes()


def all_processes(rows):
    """Rows (M / P, ...) that process p took as p, p + P, ... -> all (M, ...), in order."""
    if not dist.is_initialized():
        return rows
    shares = [None] * num_processes()
    dist.all_gather_object(shares, rows)
    whole = rows.new_empty(sum(map(len, shares)), *rows.shape[1:])
    for p, share in enumerate(shares):
        whole[p :: len(shares)] = share
    return whole


if __name__ == "__main__":
    command_line()
