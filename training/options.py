"""Command line of train.py: flags in groups, the paper's defaults, and checks.

Read parse_args first; resolve_defaults fills in what dataset, method and machine decide.
Needs: data, ordinalclip, clip_model, training.checkpoints, .methods, .run_folder, .sweep.
"""

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

import data
from clip_model import MODELS
from ordinalclip import POSITIONS
from training.checkpoints import load_checkpoint
from training.methods import METHODS, init_state
from training.run_folder import (
    as_list,
    differing_settings,
    is_number,
    join_values,
    load_json,
    run_name,
)  # fmt: skip
from training.sweep import SWEEP_FLAGS, is_sweep

# xk-huang/OrdinalCLIP@ca10a20 configs/meta_cfgs/morph_compare.yaml, configs/default.yaml
PAPER = dict(
    clip="RN50", image_encoder="vgg16", image_weights="imagenet",
    epochs=100, batch_size=32, lr=1e-4, weight_decay=5e-4,
)  # fmt: skip
DATASET_DEFAULTS = {"demo": dict(clip="tiny", image_encoder="clip", epochs=9, lr=3e-3)}
INTERPOLATIONS = ("linear", "inverse", "none")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SEED = 2**32 - 1
WHY = {  # why a value is out of range
    "base_ranks": "; with 1 base rank every interpolated rank is the same vector",
    "epochs": "; --method zeroshot does without training",
    "warmup": "; it must be below --epochs",
}


def parse_args(argv: list[str] | None = None, description: str | None = None) -> Namespace:
    """The settings of a run, complete. SystemExit for flags that are wrong or have no effect."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    argv_flags = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    explicit_flags = {a.dest for a in parser._actions if argv_flags & {*a.option_strings}}
    for key in ("resume", "eval"):
        if getattr(args, key) == "":
            parser.error(f"--{key} is empty; give a run, or leave it out")
    if args.resume or args.eval:
        return args_from_checkpoint(args, explicit_flags, parser)
    if {"seed", "seeds"} <= explicit_flags:
        parser.error("--seed and --seeds: give one of them")
    if args.report and explicit_flags - {"report"}:
        parser.error("--report takes no other flag")
    return resolve_defaults(args, explicit_flags)


def build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=description, formatter_class=HelpFormatter
    )
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", default="demo", help=f"{', '.join(data.DATASETS)}, or a folder of your images")
    add("--data-root", help="where the release lies (default: data/NAME; demo: a cache folder)")
    add("--train-list", help="list file `path label`, instead of a split made here")
    add("--val-list", help="list file of validation images (default: a tenth of the training ones)")
    add("--test-list", help="list file of test images")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")
    group = parser.add_argument_group("labels of your own images: docs/datasets.md")
    add = group.add_argument
    for flag, help in data.LABEL_OPTIONS.items():
        add(flag, help=help)

    group = parser.add_argument_group("protocol")
    add = group.add_argument
    add("--split", help="morph2: random, subject-exclusive; own images: random, "
        "leave-one-group-out (default: the first)")  # fmt: skip
    add("--fold", type=fold_number, default=0, help="which split of the dataset; all: a run for "
        "each")  # fmt: skip
    add("--split-seed", type=int, default=1, help="of splits made here; all --seeds share them")
    add("--category", help="aesthetics: nature, animal, urban, people, each (a run for each), all")
    add("--label-rule", help="how labels follow from the release, where it leaves a choice: docs/")
    add("--shots", type=int, nargs="+", help="training images per rank; several: a run for each")
    add(
        "--shift",
        type=ranks_and_share,
        nargs="+",
        metavar="K,KEEP",
        help="keep this share of the K most frequent ranks' images; several: a run for each",
    )

    group = parser.add_argument_group("method")
    add = group.add_argument
    add("--method", default="ordinalclip", choices=METHODS, help="where rank prototypes come from")
    add(
        "--interp", default="linear", choices=INTERPOLATIONS, help="base ranks to ranks; none: CoOp"
    )
    add("--base-ranks", type=int, nargs="+", default=3, help="K; several values: a run for each")
    add("--context", help="words that start the prompt, or a number of random tokens (default: "
        "the dataset's words)")  # fmt: skip
    add("--rank-position", default="tail", choices=POSITIONS, help="rank after, amid, before "
        "context")  # fmt: skip
    add("--rank-init", choices=("random", "names"), help="(default: names for coop, else random)")
    add_with_paper_default(group, "--clip", str, f"{', '.join(MODELS)}, tiny, or a weights file")
    add("--tune", default="both", choices=("both", "rank", "context"), help="embeddings that learn")
    add("--regression-loss", default="l1", choices=("l1", "l2"), help="of --method regression")
    add("--official", action="store_true", help="the official code's target, pixels, ordinality")
    add(
        "--quick-gelu", action=argparse.BooleanOptionalAction, help="if a weights file does not say"
    )
    add("--trust-torchscript", action="store_true", help="open an unknown TorchScript archive")
    encoders = (
        "clip (the tower of --clip; the default for own images with --clip), vgg16, timm:NAME, "
        "torchvision:NAME"
    )
    add_with_paper_default(group, "--image-encoder", str, encoders)
    weights = "imagenet, none, or a state dict file; not for clip"
    add_with_paper_default(group, "--image-weights", str, weights)
    add("--freeze-image", action="store_true", help="train prompts only, on cached features")
    add("--init", metavar="CKPT", help="start from another run: its encoder, context, base ranks")

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add_with_paper_default(
        group, "--epochs", int, "passes over the training images, cosine schedule"
    )
    add_with_paper_default(group, "--batch-size", int, "images per step, over all processes")
    add_with_paper_default(group, "--lr", float, "learning rate of everything that trains")
    add_with_paper_default(group, "--weight-decay", float, "decoupled: p -= lr * decay * p")
    add("--lr-image", type=float, help="learning rate of the image encoder (default: --lr)")
    add("--lr-prompts", type=float, help="learning rate of the rank prototypes (default: --lr)")
    add("--warmup", type=int, default=0, help="epochs of rising learning rate before the cosine")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per optimizer step; ranks "
        "are matched to the images of one batch, not of all N")  # fmt: skip
    add("--ema", type=float, metavar="DECAY", help="validate and keep this moving average of the "
        "weights, such as 0.999")  # fmt: skip
    add("--patience", type=int, metavar="N", help="stop after N epochs without a lower validation "
        "MAE")  # fmt: skip
    add("--no-flip", action="store_true", help="do not mirror images: digits, text, left and right")
    add("--no-draft", action="store_true", help="decode large JPEGs in full, as --official does")
    add("--balanced", action="store_true", help="draw images of all ranks equally often")
    add("--seed", type=int, default=1, help="of weights, order, augmentation, --shots and --shift")
    add("--seeds", type=int, nargs="+", help="a run for each (paper: 1 27 42 128 114514)")

    group = parser.add_argument_group("where it runs, and runs that exist")
    add = group.add_argument
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=PRECISIONS, help="of the towers (default: bf16 on a GPU, else fp32)")
    add("--compile", action="store_true", help="torch.compile the image encoder")
    add("--workers", type=int, help="processes that read images (default: up to 8, leaving a core)")
    add("--out", help="folder of the run (default: runs/DATA-METHOD-...-seedS)")
    add("--save-every", type=float, default=10, metavar="MINUTES", help="write last.pt this often")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
        help="write figures and pictures for TensorBoard, too")  # fmt: skip
    add("--debug", action="store_true", help="show the traceback of every error")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with its own settings")
    add("--eval", metavar="CKPT", help="only test this checkpoint, with its own settings")
    add("--report", metavar="RUN", nargs="+", help="print finished runs, write report.md and .csv")
    add("--profile", action="store_true", help="print where a step's time and memory go, then end")
    return parser


def add_with_paper_default(
    group: argparse._ArgumentGroup, flag: str, type: type, help: str
) -> None:
    """A flag whose default depends on the dataset; resolve_defaults fills it in."""
    key = flag[2:].replace("-", "_")
    demo = DATASET_DEFAULTS["demo"].get(key, PAPER[key])
    help = f"{help} (default: {PAPER[key]}; demo: {demo})"
    group.add_argument(flag, type=type, help=help, default=argparse.SUPPRESS)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Omits "(default: None)" and "(default: False)"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def fold_number(text: str) -> int | str:
    if text != "all" and not is_number(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0, or all")
    return text if text == "all" else int(text)


def ranks_and_share(text: str) -> tuple[int, float]:
    try:
        ranks, share = text.split(",")
        return int(ranks), float(share)
    except ValueError:
        message = f"{text!r}: expected K,KEEP such as 10,0.2"
        raise argparse.ArgumentTypeError(message) from None


def resolve_defaults(args: Namespace, explicit_flags: set[str]) -> Namespace:
    """Fill in what the dataset, the method and the machine decide."""
    defaults = {**PAPER, **DATASET_DEFAULTS.get(args.data, {})}
    if args.data not in data.DATASETS and "clip" in args:
        defaults["image_encoder"] = "clip"
    for key, value in defaults.items():
        vars(args).setdefault(key, value)
    preset = data.DATASETS.get(args.data, {})  # written out or not, the same experiment
    args.split = args.split or preset.get("splits", ("random",))[0]
    args.label_rule = args.label_rule or preset.get("label_rules", (None,))[0]
    args.category = args.category or preset.get("categories", (None,))[0]
    for key in SWEEP_FLAGS:
        if len(values := as_list(getattr(args, key))) == 1:
            setattr(args, key, values[0])
    if args.method == "ordinalclip" and args.interp == "none":
        args.method = "coop"
    check_unused_flags(args, explicit_flags)
    args.no_draft |= args.official
    if args.method == "coop":
        args.interp = "none"
    if args.method == "zeroshot":
        args.epochs = 0
    for flag, is_set in (
        ("--method zeroshot", args.method == "zeroshot"),
        ("--freeze-image", args.freeze_image),
    ):
        if is_set and args.image_encoder != "clip":
            raise SystemExit(
                f"{flag} needs --image-encoder clip: the last layer of the others starts at random"
            )
    if args.rank_init is None:
        args.rank_init = "names" if args.interp == "none" else "random"
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.precision is None:
        has_bf16 = args.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        args.precision = "bf16" if has_bf16 else "fp32"
    if args.workers is None:
        args.workers = max(0, min(8, (os.cpu_count() or 1) - 1))
    check_values(args)
    given = dict(context=not is_number(args.context or "0"), rank_init=args.rank_init == "names")
    given = [key for key in given if given[key] and key in explicit_flags and has_prompts(args)]
    if args.init and (given or args.context is None):  # a run that goes on needs it no more
        state = init_state(args)
        if "prototypes.context_embeds" in state:
            if given:
                flag = f"--{given[0].replace('_', '-')}"
                raise SystemExit(
                    f"{flag} has no effect with --init, which copies prompts; remove it"
                )
            if args.context is None:  # as many random tokens; values are copied
                args.context = str(state["prototypes.context_embeds"].shape[-2])
    if args.out is None and not is_sweep(args):
        args.out = str(Path("runs") / run_name(args))
    return args


def has_prompts(args: Namespace) -> bool:
    return METHODS[args.method].has_prompts


def uses_clip(args: Namespace) -> bool:
    return METHODS[args.method].needs_clip or args.image_encoder == "clip"


def trains(args: Namespace) -> bool:
    return args.method != "zeroshot"


def augments(args: Namespace) -> bool:
    return trains(args) and not args.freeze_image


def interpolates(args: Namespace) -> bool:
    return args.method == "ordinalclip"


def has_own_images(args: Namespace) -> bool:
    return args.data not in data.DATASETS


def has_generated_split(args: Namespace) -> bool:
    if has_own_images(args):
        return not args.val_list and not args.test_list
    return not args.train_list and args.data != "demo"


# When a flag changes the result, and what decides that. Elsewhere it is refused: it would change
# the name of the run and look as if it had done something. Flags not named here always have effect.
BY_METHOD, BY_ENCODER = "--method {method}", "--image-encoder {image_encoder}"
HAS_EFFECT: dict[str, tuple[Callable[[Namespace], bool], str]] = {
    "interp": (lambda args: interpolates(args) or args.method == "coop", BY_METHOD),
    "base_ranks": (interpolates, BY_METHOD),
    "context": (lambda args: has_prompts(args) or args.method == "zeroshot", BY_METHOD),
    "rank_position": (has_prompts, BY_METHOD),
    "rank_init": (has_prompts, BY_METHOD),
    "tune": (has_prompts, BY_METHOD),
    "regression_loss": (lambda args: args.method == "regression", BY_METHOD),
    "clip": (uses_clip, f"{BY_METHOD} and {BY_ENCODER}"),
    "quick_gelu": (lambda a: uses_clip(a) and a.clip != "tiny", "--clip {clip} and " + BY_METHOD),
    "trust_torchscript": (
        lambda a: uses_clip(a) and a.clip != "tiny",
        "--clip {clip} and " + BY_METHOD,
    ),
    "image_weights": (lambda args: args.image_encoder != "clip", BY_ENCODER),
    "freeze_image": (trains, BY_METHOD),
    "epochs": (trains, BY_METHOD),
    "lr": (
        lambda a: trains(a) and not (a.lr_prompts and (a.lr_image or a.freeze_image)),
        BY_METHOD + " and rates of its own for all that trains",
    ),
    "weight_decay": (trains, BY_METHOD),
    "save_every": (trains, BY_METHOD),
    "warmup": (trains, BY_METHOD),
    "accumulate": (trains, BY_METHOD),
    "ema": (lambda args: trains(args) and args.ema != 0, BY_METHOD + " and DECAY {ema}"),
    "patience": (lambda a: trains(a) and a.patience < a.epochs, BY_METHOD + " and {epochs} epochs"),
    "balanced": (trains, BY_METHOD),
    "no_flip": (augments, "--freeze-image or " + BY_METHOD),
    "no_draft": (lambda args: not args.official, "--official"),
    "lr_image": (augments, "--freeze-image or " + BY_METHOD),
    "lr_prompts": (lambda args: trains(args) and args.method != "regression", BY_METHOD),
    "profile": (trains, BY_METHOD),
    "shots": (trains, BY_METHOD),
    "shift": (
        lambda args: trains(args) and all(keep != 1 for _, keep in as_list(args.shift)),
        BY_METHOD + " and its share of images",
    ),
    "seeds": (trains, BY_METHOD),
    "label_pattern": (
        lambda a: has_own_images(a) and not a.train_list,
        "--data {data} and its lists",
    ),
    "ranks": (has_own_images, "--data {data}"),
    "bins": (has_own_images, "--data {data}"),
    "group": (has_own_images, "--data {data}"),
    "split": (has_generated_split, "--data {data} and its lists"),
    "fold": (has_generated_split, "--data {data} and its lists"),
    "split_seed": (has_generated_split, "--data {data} and its lists"),
}


def check_unused_flags(args: Namespace, explicit_flags: set[str]) -> None:
    """SystemExit for flags that have no effect together with the others."""
    for key, (has_effect, decided_by) in HAS_EFFECT.items():
        if key in explicit_flags and not has_effect(args):
            flag, others = f"--{key.replace('_', '-')}", decided_by.format(**vars(args))
            raise SystemExit(f"{flag} has no effect with {others}; remove it")
    shifts = as_list(args.shift) if "shift" in explicit_flags else []
    if len({*shifts}) < len(shifts):  # 1,0.5 and 1,0.50
        raise SystemExit("--shift names a value twice; name each once")
    if args.method == "coop" and args.interp == "inverse":
        raise SystemExit("--interp inverse has no effect with --method coop; remove it")


def check_values(args: Namespace) -> None:
    """SystemExit for values out of range, before anything is read."""
    texts = {key: value for key, value in vars(args).items() if isinstance(value, str)}
    if empty := [key for key, value in texts.items() if not value.strip()]:
        raise SystemExit(f"--{empty[0].replace('_', '-')} is empty; give a value, or leave it out")
    context = args.context
    if context and not (is_number(context) and int(context) or any(map(str.isalpha, context))):
        raise SystemExit(f"--context {context!r}: expected words, or a number of tokens from 1")
    max_workers = max(64, 2 * (os.cpu_count() or 1))
    for key, low, high in (
        ("epochs", 0 if args.method == "zeroshot" else 1, 1_000_000),
        ("batch_size", 1, 1_000_000),
        ("lr", 1e-12, 1e3),
        ("lr_image", 1e-12, 1e3),
        ("lr_prompts", 1e-12, 1e3),
        ("warmup", 0, args.epochs - 1 if args.epochs else 1),
        ("accumulate", 1, 10_000),
        ("ema", 0.0, 0.999999),
        ("patience", 1, 1_000_000),
        ("weight_decay", 0, 1e3),
        ("workers", 0, max_workers),
        ("save_every", 0, 1e6),
        ("seed", 0, MAX_SEED),
        ("seeds", 0, MAX_SEED),
        ("split_seed", 0, MAX_SEED),
        ("base_ranks", 2 if args.method == "ordinalclip" else 1, 10_000),
        ("shots", 1, 1_000_000),
    ):
        values = [value for value in as_list(getattr(args, key)) if value is not None]
        for value in values:
            if not low <= value <= high:  # nan is in no range
                flag = f"--{key.replace('_', '-')} {value}"
                raise SystemExit(f"{flag}: expected {low} .. {high}{WHY.get(key, '')}")
        if len(set(values)) < len(values):
            flag = f"--{key.replace('_', '-')}"
            raise SystemExit(f"{flag} names a value twice: {join_values(values)}; name each once")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise SystemExit(f"--device {args.device!r}: expected cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise SystemExit(f"--device {args.device}: this machine has {count} CUDA device(s)")
    if device.type not in ("cpu", "cuda"):
        raise SystemExit(f"--device {args.device}: expected cpu, cuda or cuda:N")


def args_from_checkpoint(
    args: Namespace, explicit_flags: set[str], parser: argparse.ArgumentParser
) -> Namespace:
    """The settings of the run that --resume or --eval names, but for where it runs now."""
    machine_flags = {"device", "precision", "workers", "data_root"}
    machine_flags |= {"tensorboard"} if args.resume else set()
    if unexpected := explicit_flags - machine_flags - {"resume", "eval"}:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(unexpected))
        parser.error(
            f"{flags}: settings come from the checkpoint; leave them out, or start a new run"
        )
    path = Path(args.resume or args.eval)
    path = path / ("last.pt" if args.resume else "best.pt") if path.is_dir() else path
    config_path = path.parent / "config.json"
    if args.resume and not path.exists() and config_path.exists():  # cut off before last.pt
        settings = load_json(config_path, "settings")["settings"]
    else:
        settings = load_checkpoint(path, "settings", "model")["settings"]
    check_types(settings, parser, path)
    if config_path.exists():  # a checkpoint may have been copied from another run
        config = load_json(config_path, "settings")["settings"]
        if differing := differing_settings(settings, config):
            raise SystemExit(f"{path} is of another run than {config_path}: {differing}")
    saved = Namespace(**vars(parser.parse_args([])) | dict(no_draft=True) | settings)
    for name in explicit_flags & machine_flags:
        setattr(saved, name, getattr(args, name))
    saved.out = str(path.parent)
    saved.resume, saved.eval = args.resume and str(path), args.eval and str(path)
    return resolve_defaults(saved, set())


def check_types(settings: dict, parser: argparse.ArgumentParser, path: Path) -> None:
    """SystemExit for settings, of a file, that the flags would not have accepted."""
    for action in parser._actions:
        value = settings.get(action.dest)
        types = bool if action.nargs == 0 else action.type or str
        types = {float: (int, float)}.get(types, types if isinstance(types, type) else object)
        entries = as_list(value) if action.nargs == "+" else [value]
        if value is None and (action.dest not in settings or action.default is None):
            continue
        for entry in entries or [None]:
            if not isinstance(entry, types) or action.choices and entry not in action.choices:
                flag = f"--{action.dest.replace('_', '-')}"
                raise SystemExit(f"{path} is damaged: its {flag} is {value!r:.80}")
