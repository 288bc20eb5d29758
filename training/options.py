"""Command line of train.py: flags in groups, the paper's defaults, and checks.

Read parse_args first; resolve_defaults fills in what dataset, method and machine decide.
Needs: data, ordinalclip, clip_model, training.checkpoints, .loaders, .methods, .progress,
.run_folder, .sweep.
"""

import argparse
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

import data
from clip_model import MODELS
from ordinalclip import INTERPOLATIONS, POSITIONS
from training.checkpoints import load_checkpoint
from training.loaders import PRECISIONS
from training.methods import CONTEXT_KEY, METHODS, init_state, needs_clip
from training.progress import summary_writer
from training.run_folder import (
    as_list,
    data_name,
    dataset_defaults,
    differing_settings,
    flag_of,
    is_digits,
    load_json,
    run_name,
)
from training.sweep import SWEEP_FLAGS, is_sweep

# xk-huang/OrdinalCLIP@ca10a20 configs/meta_cfgs/morph_compare.yaml, configs/default.yaml
PAPER = dict(
    clip="RN50", image_encoder="vgg16", image_weights="imagenet",
    epochs=100, batch_size=32, lr=1e-4, weight_decay=5e-4,
)  # fmt: skip
DATASET_DEFAULTS = {"demo": dict(clip="tiny", image_encoder="clip", epochs=9, lr=3e-3)}
MAX_SEED = 2**32 - 1


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The settings of a run, complete. SystemExit for flags that are wrong or have no effect."""
    parser = build_parser()
    args = parser.parse_args(argv)
    argv_flags = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    explicit_flags = {a.dest for a in parser._actions if argv_flags & {*a.option_strings}}
    if args.resume or args.eval:
        return args_from_checkpoint(args, explicit_flags, parser)
    if {"seed", "seeds"} <= explicit_flags:
        parser.error("--seed and --seeds: give one of them")
    if args.report and explicit_flags - {"report", "debug"}:
        parser.error("--report takes no other flag")
    return resolve_defaults(args, explicit_flags)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train and compare OrdinalCLIP, CoOp, linear, regression and zero-shot under "
        "one protocol.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )

    add = parser.add_argument_group("data").add_argument
    add("--data", default="demo", help=f"{', '.join(data.DATASETS)}, or a folder of your images")
    add("--data-root", help="where the release lies (default: data/NAME; demo: a cache folder)")
    add("--train-list", help="list file `path label`, instead of a split made here")
    add("--val-list", help="list file of validation images (default: a tenth of the training ones)")
    add("--test-list", help="list file of test images")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")

    add = parser.add_argument_group("labels of your own images: docs/datasets.md").add_argument
    for flag, help in data.LABEL_OPTIONS.items():
        add(flag, help=help)

    add = parser.add_argument_group("protocol").add_argument
    add("--split", help="morph2: random, subject-exclusive; own images: random, "
        "leave-one-group-out (default: the first)")  # fmt: skip
    add("--fold", type=fold_number, default=0, help="number of the split; all: a run for each")
    add("--split-seed", type=int, default=1, help="of splits made here; all --seeds share them")
    add("--category", help="aesthetics: nature, animal, urban, people, each (a run for each), all")
    add("--label-rule", help="adience, aesthetics: how labels follow from the "
        "release (docs/datasets.md)")  # fmt: skip
    add("--shots", type=int, nargs="+", help="training images per rank; several: a run for each")
    add("--shift", type=ranks_and_share, nargs="+", metavar="RANKS,KEEP", help="keep this "
        "share of the images of the most frequent RANKS; several: a run for each")  # fmt: skip

    add = parser.add_argument_group("method").add_argument
    add("--method", default="ordinalclip", choices=METHODS, help="where rank prototypes come from")
    add(
        "--interp", default="linear", choices=INTERPOLATIONS, help="base ranks to ranks; none: CoOp"
    )
    add("--base-ranks", type=int, nargs="+", default=3, help="K; several values: a run for each")
    add("--context", help="words that start the prompt, or a number of random tokens (default: "
        "the dataset's words)")  # fmt: skip
    add("--rank-position", default="tail", choices=POSITIONS, help="after, amid, before context")
    add("--rank-init", choices=("random", "names"), help="(default: names for coop, else random)")
    add("--clip", help=f"{', '.join(MODELS)}, tiny, or a weights file")
    add("--tune", default="both", choices=("both", "rank", "context"), help="embeddings that learn")
    add("--regression-loss", default="l1", choices=("l1", "l2"), help="of --method regression")
    add("--official", action="store_true", help="the official code's target, pixels, ordinality")
    add("--quick-gelu", action=argparse.BooleanOptionalAction, help="where weights do not say")
    add("--trust-torchscript", action="store_true", help="open an unknown TorchScript archive")
    add("--image-encoder", help="vgg16, timm:NAME, torchvision:NAME, or clip: the tower of --clip, "
        "the default for own images with it")  # fmt: skip
    add("--image-weights", help="imagenet, none, or a state dict file; not for clip")
    add("--freeze-image", action="store_true", help="train prompts only, on cached features")
    add("--init", metavar="CKPT", help="start from another run: its encoder, context, base ranks")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, help="passes over the training images, cosine schedule")
    add("--batch-size", type=int, help="images per step, over all processes")
    add("--lr", type=float, help="learning rate of everything that trains")
    add("--weight-decay", type=float, help="decoupled: p -= lr * decay * p")
    add("--lr-image", type=float, help="learning rate of the image encoder (default: --lr)")
    add("--lr-prompts", type=float, help="learning rate of the rank prototypes (default: --lr)")
    add("--warmup", type=int, default=0, help="epochs of rising learning rate before the cosine")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per optimizer step; ranks "
        "are matched to the images of one batch, not of all N")  # fmt: skip
    add("--ema", type=float, metavar="DECAY", help="validate and keep this moving average of the "
        "weights, such as 0.999")  # fmt: skip
    add("--patience", type=int, metavar="N", help="stop N epochs after the lowest validation MAE")
    add("--no-flip", action="store_true", help="do not mirror images: digits, text, left and right")
    add("--no-draft", action="store_true", help="decode large JPEGs in full, as --official does")
    add("--balanced", action="store_true", help="draw images of all ranks equally often")
    add("--seed", type=int, default=1, help="of weights, order, augmentation, --shots and --shift")
    add("--seeds", type=int, nargs="+", help="a run for each (paper: 1 27 42 128 114514)")

    add = parser.add_argument_group("where it runs, and runs that exist").add_argument
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=PRECISIONS, help="of the towers (default: bf16 on a GPU, else fp32)")
    add("--compile", action="store_true", help="torch.compile the image encoder")
    add("--workers", type=int, help="processes that read images (default: up to 8, leaving a core)")
    add("--out", help="folder of the run (default: runs/DATA-METHOD-...-seedS)")
    add("--save-every", type=float, default=10, metavar="MINUTES", help="write last.pt this often")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="write figures "
        "and pictures for TensorBoard, too")  # fmt: skip
    add("--debug", action="store_true", help="show the traceback of every error")
    add("--resume", metavar="RUN", help="resume the run in this folder, with its own settings")
    add("--eval", metavar="CKPT", help="only test this checkpoint, with its own settings")
    add("--report", metavar="RUN", nargs="+", help="print finished runs, write report.md and .csv")
    add("--profile", action="store_true", help="print where a step's time and memory go, then end")
    return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: ...)", of PAPER where the dataset decides; not None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.dest in PAPER:
            default = PAPER[action.dest]
            demo = DATASET_DEFAULTS["demo"].get(action.dest, default)
            of_demo = f"; demo: {demo}" if demo != default else ""
            return f"{action.help} (default: {default}{of_demo})"
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def fold_number(text: str) -> int | str:
    if text != "all" and not is_digits(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0, or all")
    return text if text == "all" else int(text)


def ranks_and_share(text: str) -> tuple[int, float]:
    try:
        ranks, share = text.split(",")
        return int(ranks), float(share)
    except ValueError:
        message = f"{text!r}: expected RANKS,KEEP such as 10,0.2"
        raise argparse.ArgumentTypeError(message) from None


def resolve_defaults(args: Namespace, explicit_flags: set[str]) -> Namespace:
    """Fill in what the dataset, the method and the machine decide."""
    args.data = data_name(args.data)
    defaults = PAPER | DATASET_DEFAULTS.get(args.data, {}) | dataset_defaults(args.data)
    if has_own_images(args) and args.clip is not None:
        defaults["image_encoder"] = "clip"
    defaults["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    defaults["workers"] = min(8, (os.cpu_count() or 1) - 1)
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
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
    if args.rank_init is None:
        args.rank_init = "names" if args.interp == "none" else "random"
    if args.precision is None:
        has_bf16 = args.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        args.precision = "bf16" if has_bf16 else "fp32"
    check_values(args)
    if args.init and args.context is None and args.method != "zeroshot":
        # as many random tokens; values are copied
        state = init_state(args.init)
        if CONTEXT_KEY in state:  # a resumed run does not need --init
            args.context = str(state[CONTEXT_KEY].shape[-2])
    if args.out is None and not is_sweep(args):
        args.out = str(Path("runs") / run_name(args))
    if not args.resume and not args.eval:
        check_out(args)
    return args


def check_out(args: Namespace) -> None:
    """SystemExit if the run would lie in the folder of own images, and be read as some of them."""
    out, folder = Path(args.out or "runs").resolve(), Path(args.data).resolve()
    if not has_own_images(args) or args.train_list or not out.is_relative_to(folder):
        return
    entries = [*folder.glob("*")]
    has_parts = any(path.stem.lower() in ("train", "training") for path in entries)
    has_table = any(path.suffix.lower() in (".csv", ".tsv") for path in entries)
    other_folders = [path for path in entries if path.is_dir() and not out.is_relative_to(path)]
    if has_parts or has_table and len(other_folders) < 2:  # these say what is data
        return
    raise SystemExit(
        f"--out {args.out or 'runs'} lies in --data {args.data}, where folders are data; give "
        "another --out"
    )


def has_own_images(args: Namespace) -> bool:
    return args.data not in data.DATASETS


def has_generated_split(args: Namespace) -> bool:
    if has_own_images(args):
        return not args.val_list and not args.test_list
    return not args.train_list and args.data != "demo"


def has_prompts(args: Namespace) -> bool:
    return METHODS[args.method].has_prompts


def copies_prompts(args: Namespace) -> bool:
    return bool(args.init) and has_prompts(args) and CONTEXT_KEY in init_state(args.init)


def trains(args: Namespace) -> bool:
    return args.method != "zeroshot"


# When flags change the result, and what decides that. Elsewhere they are refused: they would change
# the name of the run and look as if they had done something. Flags not named always have one.
BY_METHOD, BY_ENCODER = "--method {method}", "--image-encoder {image_encoder}"
BY_DATA, BY_LISTS = "--data {data}", "--data {data} and its lists"
BY_INIT = "--init, which copies prompts"
HAS_EFFECT: list[tuple[str, Callable[[Namespace], bool], str]] = [
    ("interp", lambda a: a.method == "ordinalclip" or a.method == "coop" and a.interp == "none",
        BY_METHOD),
    ("base_ranks", lambda a: a.method == "ordinalclip", BY_METHOD),
    ("context", lambda a: has_prompts(a) or a.method == "zeroshot", BY_METHOD),
    ("context", lambda a: is_digits(a.context) or not copies_prompts(a), BY_INIT),
    ("rank_init", lambda a: a.rank_init == "random" or not copies_prompts(a), BY_INIT),
    ("rank_init rank_position tune", has_prompts, BY_METHOD),
    ("regression_loss", lambda a: a.method == "regression", BY_METHOD),
    ("clip", needs_clip, f"{BY_METHOD} and {BY_ENCODER}"),
    ("quick_gelu trust_torchscript", lambda a: needs_clip(a) and a.clip != "tiny",
        f"--clip {{clip}} and {BY_METHOD}"),
    ("image_weights", lambda a: a.image_encoder != "clip", BY_ENCODER),
    ("freeze_image epochs weight_decay save_every warmup accumulate balanced profile shots seed "
        "seeds",
        trains, BY_METHOD),
    ("lr", lambda a: trains(a) and not (a.lr_prompts and (a.lr_image or a.freeze_image)),
        f"{BY_METHOD} and rates of its own for all that trains"),
    ("lr_prompts", lambda a: trains(a) and a.method != "regression", BY_METHOD),
    ("lr_image no_flip", lambda a: trains(a) and not a.freeze_image,
        f"--freeze-image or {BY_METHOD}"),
    ("ema", lambda a: trains(a) and a.ema != 0, f"{BY_METHOD} and DECAY {{ema}}"),
    ("patience", lambda a: trains(a) and a.patience < a.epochs,
        f"{BY_METHOD} and {{epochs}} epochs"),
    ("shift", lambda a: trains(a) and all(keep != 1 for _, keep in as_list(a.shift)),
        f"{BY_METHOD} and its share of images"),
    ("no_draft", lambda a: not a.official, "--official"),
    ("ranks bins group", has_own_images, BY_DATA),
    ("label_pattern", lambda a: has_own_images(a) and not a.train_list, BY_LISTS),
    ("split fold split_seed", has_generated_split, BY_LISTS),
]  # fmt: skip


def check_unused_flags(args: Namespace, explicit_flags: set[str]) -> None:
    """SystemExit for flags that have no effect together with the others."""
    for keys, has_effect, decided_by in HAS_EFFECT:
        for key in keys.split():
            if key in explicit_flags and not has_effect(args):
                others = decided_by.format(**vars(args))
                raise SystemExit(f"{flag_of(key)} has no effect with {others}; remove it")


def check_values(args: Namespace) -> None:
    """SystemExit for values out of range, before anything is read."""
    for key, value in vars(args).items():
        if isinstance(value, str) and not value.strip():
            raise SystemExit(f"{flag_of(key)} is empty; give a value, or leave it out")
    if args.image_encoder != "clip" and (args.freeze_image or not trains(args)):
        flag = "--freeze-image" if args.freeze_image else "--method zeroshot"
        raise SystemExit(
            f"{flag} needs --image-encoder clip: the last layer of the others starts at random"
        )
    context = args.context
    may_be_number = args.method != "zeroshot"  # which learns none
    is_number = may_be_number and is_digits(context or "") and int(context) > 0
    if context and not (is_number or any(map(str.isalpha, context))):
        number = ", or a number of tokens from 1" if may_be_number else ""
        raise SystemExit(f"--context {context!r}: expected words{number}")
    for keys, low, high, why in (
        ("epochs", 1 if trains(args) else 0, 1_000_000,
            "; --method zeroshot does without training"),
        ("batch_size patience shots", 1, 1_000_000, ""),
        ("lr lr_image lr_prompts", 1e-12, 1e3, ""),
        ("weight_decay", 0, 1e3, ""),
        ("warmup", 0, max(0, args.epochs - 1), "; it must be below --epochs"),
        ("accumulate", 1, 10_000, ""),
        ("ema", 0.0, 0.999999, ""),
        ("workers", 0, max(64, 2 * (os.cpu_count() or 1)), ""),
        ("save_every", 0, 1e6, ""),
        ("seed seeds split_seed", 0, MAX_SEED, ""),
        ("base_ranks", 2 if args.method == "ordinalclip" else 1, 10_000,
            "; with 1 base rank every interpolated rank is the same vector"),
    ):  # fmt: skip
        for key in keys.split():
            for value in as_list(getattr(args, key)):
                if value is not None and not low <= value <= high:  # nan is in no range
                    raise SystemExit(f"{flag_of(key)} {value}: expected {low} .. {high}{why}")
    for key in (*SWEEP_FLAGS, "seeds"):
        values = as_list(getattr(args, key))
        if repeated := [value for value in values if values.count(value) > 1]:
            value = str(repeated[0]).strip("()").replace(" ", "")
            raise SystemExit(f"{flag_of(key)} names {value} twice; name each value once")
    if args.tensorboard and not args.eval:
        summary_writer()  # it is installed, or the program ends here
    if not re.fullmatch(r"(cpu|cuda)(:(0|[1-9][0-9]*))?", args.device):
        raise SystemExit(f"--device {args.device!r}: expected cpu, cuda or cuda:N")
    count, index = torch.cuda.device_count(), int(args.device.partition(":")[2] or 0)
    if args.device.startswith("cuda") and index >= count:
        raise SystemExit(f"--device {args.device}: this machine has {count} CUDA device(s)")


def args_from_checkpoint(
    args: Namespace, explicit_flags: set[str], parser: argparse.ArgumentParser
) -> Namespace:
    """The settings of the run that --resume or --eval names, but for where it runs now."""
    machine_flags = {"device", "precision", "workers", "data_root", "debug"}
    machine_flags |= {"tensorboard"} if args.resume else set()
    if unexpected := explicit_flags - machine_flags - {"resume", "eval"}:
        flags = ", ".join(map(flag_of, sorted(unexpected)))
        parser.error(
            f"{flags}: settings come from the checkpoint; leave them out, or start a new run"
        )
    path = Path(args.resume or args.eval)
    path = path / ("last.pt" if args.resume else "best.pt") if path.is_dir() else path
    config_path = path.parent / "config.json"
    if args.resume and not path.exists() and config_path.exists():  # interrupted before last.pt
        settings = load_json(config_path)["settings"]
    else:
        settings = load_checkpoint(path, "settings", "model")["settings"]
    check_types(settings, parser, path)
    if config_path.exists():  # a checkpoint may have been copied from another run
        config = load_json(config_path)["settings"]
        if differing := differing_settings(settings, config):
            raise SystemExit(f"{path} is of another run than {config_path}: {differing}")
    saved = Namespace(**vars(parser.parse_args([])) | dict(no_draft=True) | settings)
    for name in explicit_flags & machine_flags:
        setattr(saved, name, getattr(args, name))
    saved.out, saved.seeds = str(path.parent), None  # one run, perhaps of several
    saved.shift = saved.shift and tuple(saved.shift)  # a list in config.json
    saved.resume, saved.eval = args.resume and str(path), args.eval and str(path)
    return resolve_defaults(saved, set())


def check_types(settings: dict, parser: argparse.ArgumentParser, path: Path) -> None:
    """SystemExit for settings, of a file, that the flags would not have accepted."""
    special = {float: (int, float), fold_number: (int, str), ranks_and_share: (tuple, list)}
    for action in parser._actions:
        key, value = action.dest, settings.get(action.dest)
        if value is None and (key not in settings or action.default is None and key not in PAPER):
            continue
        types = bool if action.nargs == 0 else special.get(action.type, action.type or str)
        if key == "seeds":  # all of the command
            types = list
        is_choice = not action.choices or value in action.choices
        is_pair = key != "shift" or isinstance(value, types) and len(value) == 2
        if not isinstance(value, types) or not is_choice or not is_pair:
            raise SystemExit(f"{path} is damaged: its {flag_of(key)} is {value!r:.80}")
