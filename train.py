"""Train, evaluate and compare: OrdinalCLIP, CoOp, linear and zero-shot on one dataset under one protocol.

    python train.py --data demo                              # generated images, minutes on a CPU
    python train.py --data morph2 --interp linear            # the paper's main run
    python train.py --data my/folder --clip RN50             # own data: see data.py
    python train.py --resume runs/NAME                       # go on where last.pt stopped
    python train.py --eval runs/NAME/best.pt                 # test a checkpoint again
    torchrun --nproc-per-node 4 train.py --data morph2       # the same batches, over four GPUs

Read top to bottom: recipes, arguments, main, model, training, evaluation, checkpoints, distribution.
A run writes runs/NAME/: config.json, splits/*.txt, log.csv, last.pt, best.pt, exported.pt, results.json,
predictions-best.csv. The epoch is chosen on validation images; the test images are looked at once, at the end.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, Subset

import data
from backbones import build_image_encoder
from clip_model import CLIP, MODELS, download, tiny_clip
from ordinalclip import (
    POSITIONS,
    FixedPrototypes,
    LinearPrototypes,
    OrdinalCLIP,
    RankPrompts,
    ordinality,
    ordinality_chance,
)
from tokenizer import Tokenizer

# xk-huang/OrdinalCLIP@ca10a20 configs/meta_cfgs/morph_compare.yaml, configs/default.yaml
PAPER = dict(
    clip="RN50", image_encoder="vgg16", image_weights="imagenet",
    epochs=100, batch_size=32, lr=1e-4, weight_decay=5e-4,
)  # fmt: skip
RECIPES = {  # what differs from the paper's
    "demo": dict(clip="tiny", image_encoder="clip", epochs=9, lr=3e-3),
}
METHODS = ("ordinalclip", "coop", "linear", "zeroshot")
INTERPOLATIONS = ("linear", "inverse", "none")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LINEAR_DIM, LINEAR_SCALE = 1024, math.log(100)  # of the linear baseline where no CLIP is loaded


def parse_args(argv=None):
    show = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0], formatter_class=show)
    add = parser.add_argument

    def recipe(flag, kind, meaning):  # default depends on the dataset
        key = flag[2:].replace("-", "_")
        demo = RECIPES["demo"].get(key, PAPER[key])
        add(flag, type=kind, help=f"{meaning} (default: {PAPER[key]}; demo: {demo})", default=argparse.SUPPRESS)

    # what
    add("--data", default="demo", help=f"{', '.join(data.DATASETS)}, or a folder of your own images")
    add("--data-root", help="where the release lies (default: data/NAME; the demo has a cache folder)")
    add("--split", default="random", help="protocol of the split: random; morph2 also subject-exclusive")
    add("--fold", type=int, default=0, help="which of the random splits")
    add("--train-list", help="list file `path label`, instead of a split made here")
    add("--val-list", help="list file of validation images; default: a tenth of the training images")
    add("--test-list", help="list file of test images")
    # method
    add("--method", default="ordinalclip", choices=METHODS, help="what the rank prototypes come from")
    add("--interp", default="linear", choices=INTERPOLATIONS, help="base ranks to ranks; none: CoOp")
    add("--base-ranks", type=int, default=3, help="number of base rank embeddings, K")
    add("--context", help="words that start the prompt, or a number of random tokens (default: the dataset's)")
    add("--rank-position", default="tail", choices=POSITIONS, help="the rank after, amid or before the context")
    add("--rank-init", choices=("random", "names"), help="(default: names for coop, else random)")
    recipe("--clip", str, f"{', '.join(MODELS)}, tiny, or a weights file")
    add("--quick-gelu", action=argparse.BooleanOptionalAction, help="activation, where a weights file does not say")
    add("--trust-torchscript", action="store_true", help="open a TorchScript archive of unknown origin")
    recipe("--image-encoder", str, "clip (the tower of --clip), vgg16, timm:NAME, torchvision:NAME")
    recipe("--image-weights", str, "imagenet, none, or a state dict file; not for clip")
    # optimisation
    recipe("--epochs", int, "passes over the training images; learning rate falls by a cosine")
    recipe("--batch-size", int, "images per step, over all processes")
    recipe("--lr", float, "learning rate of everything that trains")
    recipe("--weight-decay", float, "decoupled decay: p -= lr * decay * p")
    add("--seed", type=int, default=1, help="of weights, order and augmentation, and of random splits")
    # where
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=PRECISIONS, help="of the towers (default: bf16 on a GPU that has it, else fp32)")
    add("--workers", type=int, help="processes that read images (default: up to 8, leaving one core)")
    add("--out", help="folder of the run (default: runs/DATA-METHOD-...-seedS)")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with its own settings")
    add("--eval", metavar="CKPT", help="only test this best.pt or last.pt, with its own settings")

    args = parser.parse_args(argv)
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    given = {action.dest for action in parser._actions if words & {*action.option_strings}}
    if args.resume or args.eval:
        return from_checkpoint(args, given, parser)
    return complete(args)


def complete(args):
    """Fill in what the dataset, the method and the machine decide."""
    for key, value in {**PAPER, **RECIPES.get(args.data, {})}.items():
        vars(args).setdefault(key, value)
    if args.method == "coop":
        args.interp = "none"
    if args.method == "zeroshot":
        args.epochs = 0
    if args.rank_init is None:
        args.rank_init = "names" if args.interp == "none" else "random"
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.precision is None:
        fast = args.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        args.precision = "bf16" if fast else "fp32"
    if args.workers is None:
        args.workers = max(0, min(8, (os.cpu_count() or 1) - 1))
    if args.out is None:
        args.out = str(Path("runs") / run_name(args))
    return args


def from_checkpoint(args, given, parser):
    """The settings of the run that --resume or --eval names, but for where it runs now."""
    here = {"device", "precision", "workers", "data_root"}
    if extra := given - here - {"resume", "eval"}:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(extra))
        parser.error(f"{flags}: settings come from the checkpoint; leave them out, or start a new run")
    path = Path(args.resume or args.eval)
    path = path / ("last.pt" if args.resume else "best.pt") if path.is_dir() else path
    saved = argparse.Namespace(**load_checkpoint(path, "settings")["settings"])
    for name in given & here:
        setattr(saved, name, getattr(args, name))
    saved.out, saved.resume, saved.eval = str(path.parent), args.resume and str(path), args.eval and str(path)
    return complete(saved)


def run_name(args):
    name = [Path(args.data).name, args.method]
    if args.method == "ordinalclip":
        name += [args.interp] + ([f"K{args.base_ranks}"] if args.interp != "none" else [])
    return "-".join([*name, *([f"fold{args.fold}"] if args.fold else []), f"seed{args.seed}"])


# ------------------------------------------------------------------------------------------------- main


def main(argv=None):
    args = parse_args(argv)
    start_processes(args)
    try:
        return test_only(args) if args.eval else train(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args):
    """One run from the data to results.json."""
    out, began = Path(args.out), time.time()
    refuse_to_overwrite(out, args)
    task = load_task(args)
    torch.manual_seed(args.seed)
    model, preprocess = build_model(args, task)
    groups = param_groups(model)
    train_loader, val_loader, test_loader = loaders(args, task, preprocess)
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
    results = test(args, task, model, preprocess, val_loader, test_loader, out, began)
    if is_main():
        export(out / "exported.pt", args, task, model, preprocess, results)
        save_json(out / "results.json", results)
    return results


def test_only(args):
    """--eval: a checkpoint on the test images of its run; writes eval-NAME.json beside it."""
    path, began = Path(args.eval), time.time()
    task = load_task(args)
    model, preprocess = build_model(args, task)
    restore(model, load_checkpoint(path, "model"))
    _, val_loader, test_loader = loaders(args, task, preprocess)
    results = test(args, task, model, preprocess, val_loader, test_loader, path.parent, began, f"eval-{path.stem}")
    if is_main():
        save_json(path.parent / f"eval-{path.stem}.json", results)
    return results


def refuse_to_overwrite(out, args):
    if args.resume:
        if (out / "results.json").exists():
            raise SystemExit(f"{out} is finished, see {out / 'results.json'}; --eval tests it again")
    elif out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} holds a run; --resume {out} goes on with it, --out elsewhere starts anew")


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
            args.data, args.data_root, split=args.split, fold=args.fold, seed=args.seed, lists=lists
        )
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
    return model.to(args.device, memory_format=torch.channels_last), preprocess  # faster convolutions


def assemble(args, task):
    needs_clip = args.method != "linear" or args.image_encoder == "clip"
    clip = load_clip(args) if needs_clip else None
    dim = clip.embed_dim if clip else LINEAR_DIM
    if args.image_encoder == "clip":
        encoder = clip.visual.requires_grad_(True)
        preprocess = dict(image_size=clip.image_size, mean=data.CLIP_MEAN, std=data.CLIP_STD)
    else:
        weights = None if args.image_weights == "none" else args.image_weights
        encoder = build_image_encoder(args.image_encoder, dim, weights=weights, download=download)
        preprocess = dict(image_size=encoder.image_size, mean=encoder.mean, std=encoder.std)
    scale = clip.logit_scale if clip else LINEAR_SCALE
    return OrdinalCLIP(encoder, build_prototypes(args, task, clip, dim), scale), preprocess


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
        prompts = [f"{context} {name}." for name in task.rank_names]
        with torch.no_grad():
            return FixedPrototypes(clip.encode_text(tokenizer(prompts, clip.context_length)))
    names = [tokenizer.encode(name) for name in task.rank_names]
    return RankPrompts(
        clip, task.num_ranks,
        context=int(context) if context.isdigit() else torch.tensor(tokenizer.encode(context)),
        rank_tokens=names if args.rank_init == "names" else None,
        interp=args.interp, num_base_ranks=args.base_ranks, rank_position=args.rank_position,
    )  # fmt: skip


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
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(epoch)
    group = dist.group.WORLD if dist.is_initialized() else None
    params = [p for g in optimizer.param_groups for p in g["params"]]
    sums, seen, began, shown = torch.zeros(4, device=args.device), 0, time.time(), 0.0
    for step, (images, labels) in enumerate(loader, 1):
        images, labels = to_device(images, args, preprocess), labels.to(args.device, non_blocking=True)
        with autocast(args):
            total, i2t, t2i = model.loss(images, labels, group=group)
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
            print(f"\r  epoch {epoch}  {step}/{len(loader)}  {speed} ", end="", file=sys.stderr, flush=True)
    loss, i2t, t2i = (sums[:3] / sums[3]).tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss is {loss} in epoch {epoch}; try a lower --lr or --precision fp32")
    return dict(loss=loss, i2t=i2t, t2i=t2i, images_per_s=seen / (time.time() - began))


def print_epoch(row, epochs, eta, best):
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(clear, end="", file=sys.stderr, flush=True)
    print(
        f"epoch {row['epoch']:3d}/{epochs}  loss {row['loss']:.3f} (i2t {row['i2t']:.3f} t2i {row['t2i']:.3f})  "
        f"val MAE {row['val_mae_expected']:.3f} expected {row['val_mae_argmax']:.3f} argmax  "
        f"acc {row['val_acc_argmax']:.1%}  {row['images_per_s']:.0f} img/s  {row['peak_mb']:.0f} MB  "
        f"eta {eta // 60:.0f}:{eta % 60:02.0f}{'  *' if best else ''}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------- evaluation


def test(args, task, model, preprocess, val_loader, test_loader, out, began, name="best"):
    """Metrics of the test images (and of the validation images once more), printed and returned."""
    probs, labels = predictions(args, model, preprocess, test_loader)
    val = metrics(*predictions(args, model, preprocess, val_loader)) if len(val_loader) else None
    with torch.no_grad():
        prototypes = model.prototypes().float()
    results = dict(
        data=task.name,
        protocol=task.protocol,
        method=run_name(args),
        images=dict(train=len(task.train), val=len(task.val), test=len(task.test)),
        val_is_test=task.val_is_test,
        test=metrics(probs, labels),
        val=val,
        majority=majority_metrics(task),
        ordinality=ordinality(prototypes) if task.num_ranks > 2 else None,
        ordinality_chance=ordinality_chance(task.num_ranks) if task.num_ranks > 2 else None,
        seconds=round(time.time() - began, 1),
        settings=settings_of(args),
        **provenance(),
    )
    if is_main():
        save_predictions(out / f"predictions-{name}.csv", task, probs)
        print_results(results)
    return results


@torch.no_grad()
def predictions(args, model, preprocess, loader):
    """-> probs (M, R) and labels (M,) of all the loader's images, on the CPU, in order."""
    average_buffers(model)
    frozen = model.export().eval()  # the text tower runs once
    probs, labels = [], []
    for images, batch_labels in loader:
        with autocast(args):
            probs.append(frozen.predict(to_device(images, args, preprocess))["probs"].cpu())
        labels.append(batch_labels)
    return all_processes(torch.cat(probs)), all_processes(torch.cat(labels))  # (M, R), (M,)


def metrics(probs, labels):
    """Errors in ranks, of the expected and of the most probable rank; probs (M, R), labels (M,)."""
    ranks = torch.arange(probs.shape[1], dtype=torch.float64)
    labels = labels.double()
    answers = dict(expected=probs.double() @ ranks, argmax=probs.argmax(1).double())  # (M,) each
    mae = {f"mae_{k}": (answer - labels).abs().mean().item() for k, answer in answers.items()}
    acc = {f"acc_{k}": (a.round() == labels).double().mean().item() for k, a in answers.items()}
    return mae | acc


def majority_metrics(task):
    """What always answering the most frequent training rank gives on the test images."""
    train = torch.tensor([sample.label for sample in task.train])
    labels = torch.tensor([sample.label for sample in task.test])
    rank = train.bincount(minlength=task.num_ranks).argmax()
    probs = torch.nn.functional.one_hot(rank.expand(len(labels)), task.num_ranks)
    found = metrics(probs, labels)
    return dict(rank=task.rank_names[rank], mae=found["mae_argmax"], acc=found["acc_argmax"])


def print_results(results):
    test, majority = results["test"], results["majority"]
    print(f"\n{results['protocol']}")
    if results["val_is_test"]:
        print("NOTE: the epoch was chosen on the test images themselves, as this protocol has it")
    print(
        f"test   MAE {test['mae_expected']:.3f} expected {test['mae_argmax']:.3f} argmax   "
        f"accuracy {test['acc_expected']:.1%} expected {test['acc_argmax']:.1%} argmax\n"
        f"always {majority['rank']!r}: MAE {majority['mae']:.3f}   accuracy {majority['acc']:.1%}"
    )
    if results["ordinality"] is not None:
        print(f"ordinality {results['ordinality']:.1%} (chance {results['ordinality_chance']:.0%})")


def save_predictions(path, task, probs):
    ranks = torch.arange(task.num_ranks, dtype=probs.dtype)
    save_csv(path, [
        dict(path=s.path, label=task.rank_names[s.label], rank=task.rank_names[int(p.argmax())],
             expected_rank_index=f"{float(p @ ranks):.4f}", prob=f"{float(p.max()):.4f}")
        for s, p in zip(task.test, probs)
    ])  # fmt: skip


# ------------------------------------------------------------------------------------- images to device


def loaders(args, task, preprocess):
    """Train, validation and test loaders of (uint8 images (B, 3, S, S), labels (B,))."""
    if args.batch_size % num_processes():
        raise SystemExit(f"--batch-size {args.batch_size} is over all processes: {num_processes()} must divide it")
    made = []
    for part in data.PARTS:
        training = part == "train"
        images = data.ImageList(
            getattr(task, part), task.root, image_size=preprocess["image_size"], train=training
        )
        sampler = None
        if dist.is_initialized() and training:
            sampler = DistributedSampler(images, seed=args.seed)
        elif dist.is_initialized():
            images = Subset(images, range(dist.get_rank(), len(images), num_processes()))
        made.append(DataLoader(
            images, args.batch_size // num_processes(), shuffle=training and sampler is None,
            sampler=sampler, num_workers=args.workers, pin_memory=args.device.startswith("cuda"),
        ))  # fmt: skip
    return made


def to_device(images, args, preprocess):
    """Pixels travel as bytes and are normalised where they are used."""
    images = images.to(args.device, non_blocking=True)
    images = data.normalize(images, preprocess["mean"], preprocess["std"])
    return images.contiguous(memory_format=torch.channels_last)


def autocast(args):
    dtype = PRECISIONS[args.precision]
    return torch.autocast(args.device.split(":")[0], dtype) if dtype else contextlib.nullcontext()


# -------------------------------------------------------------------------------------- files of the run


def settings_of(args):
    return {key: value for key, value in vars(args).items() if key not in ("resume", "eval")}


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
        raise SystemExit(f"{path} is no checkpoint of this script for that use: it holds no {needed!r}")
    return saved


def restore(model, saved):
    model.load_state_dict(saved["model"])


def export(path, args, task, model, preprocess, results):
    """Image encoder, prototypes and what is needed to use them: no text tower, no vocabulary."""
    exported = model.export()
    content = dict(
        format="ordinalclip-1",
        image_encoder=args.image_encoder,
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


def write(path, writer):
    """A file appears under its name only when it is whole."""
    part = path.with_name(path.name + ".part")
    try:
        writer(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def provenance():
    """What a figure depends on beside the settings."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        commit=git.stdout.strip() or None, torch=str(torch.__version__), python=platform.python_version(),
        gpu=gpu, processes=num_processes(),
    )  # fmt: skip


def describe(args, task, model, groups, preprocess):
    if not is_main():
        return
    counts = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    trained = ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "nothing"
    print(
        f"{task.protocol}\n"
        f"method {run_name(args)}   ranks {task.num_ranks}   context {args.context or task.context!r}\n"
        f"image encoder {args.image_encoder} {preprocess['image_size']} px   clip {args.clip}   trains {trained}\n"
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
    main()
