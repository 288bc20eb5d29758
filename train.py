"""Train and compare OrdinalCLIP, CoOp, linear, regression and zero-shot under one protocol.

    python train.py --data demo                              # generated images, minutes on a CPU
    python train.py --data morph2 --interp linear            # the paper's main run
    python train.py --data my/folder --clip RN50             # own data: docs/datasets.md
    python train.py --resume runs/NAME                       # go on where last.pt stopped
    python train.py --eval runs/NAME/best.pt                 # test a checkpoint again
    python train.py --data adience --fold all                # five runs, their mean at the end
    python train.py --report runs/*                          # finished runs beside the paper's
    torchrun --nproc-per-node 4 train.py --data morph2       # the same batches, over four GPUs

Read top to bottom: main, train (one run, in the order of the paper), train_one_epoch, the rest.
Settings are in training/options.py, methods in training/methods.py. A run writes runs/NAME/:
config.json, splits/*.txt, log.csv, last.pt, best.pt, exported.pt, results.json,
predictions-best.csv, pictures/*.png.
"""

import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from evaluation.evaluate import evaluate_test_set, predict_loader, similarity_matrix
from evaluation.metrics import compute_metrics
from evaluation.report import write_report
from training import options
from training.distributed import barrier, data_parallel, init_distributed, is_main, world_size
from training.loaders import (
    autocast,
    exit_on_user_error,
    load_task,
    make_loaders,
    prepare_batch,
    without_image_encoder,
)
from training.methods import LossModule, build_model, param_groups, warm_start
from training.options import expand_runs, has_sweep_values, is_sweep
from training.run_folder import (
    Run,
    check_run_dir_is_free,
    export_model,
    join_values,
    load_checkpoint,
    load_finished_results,
    peak_memory,
    provenance,
    run_name,
    save_checkpoint,
    save_csv,
    save_json,
    settings_dict,
    table_name,
)


def parse_args(argv: list[str] | None = None) -> Namespace:
    return options.parse_args(argv, description=__doc__.split("\n\n")[0])


def main(argv: list[str] | None = None) -> dict | list[dict] | str:
    """-> results of the run; a list of them where there are several; tables with --report."""
    args = parse_args(argv)
    if args.report:
        return write_report(args.report)
    init_distributed(args)
    try:
        if args.eval:
            return evaluate_checkpoint(args)
        return train_sweep(args) if is_sweep(args) else train(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args: Namespace) -> dict[str, Any]:
    """One run, in the order of the paper: ranks, model, matching loss, best epoch, test."""
    start_time = time.time()
    check_run_dir_is_free(args)

    # 1. Images and their ranks, under a named protocol (paper, section 4.1)
    task = load_task(args)
    # 2. Image encoder, rank prototypes, temperature (sections 3.1 to 3.3)
    torch.manual_seed(args.seed)
    with exit_on_user_error():
        model, preprocess = build_model(args, task)
    if args.init and not args.resume:
        warm_start(args, model)
    run = Run(args, task, model, preprocess)
    initial_similarity = similarity_matrix(model) if args.epochs else None
    train_loader, val_loader, test_loader = make_loaders(args, task, preprocess, model)
    print_run_header(run)
    write_config(run)
    # 3. RAdam and a cosine over all epochs; 4. match images to ranks and ranks to images (Eq. 4),
    # keep the epoch with the lowest validation MAE
    if args.epochs == 0:
        save_checkpoint(run.dir / "best.pt", model, args, epoch=0)
    else:
        fit(run, train_loader, val_loader)
    # 5. The test images are looked at once, with the best epoch
    barrier()  # the main process writes best.pt
    model.load_state_dict(load_checkpoint(run.dir / "best.pt", "model")["model"])
    results = evaluate_test_set(run, val_loader, test_loader, start_time, initial_similarity)
    if is_main():
        if args.method != "regression":  # which has no prototypes
            export_model(run.dir / "exported.pt", run, results)
        save_json(run.dir / "results.json", results)
    return results


def fit(run: Run, train_loader: DataLoader, val_loader: DataLoader) -> None:
    """All epochs; leaves last.pt, and best.pt: the lowest validation MAE (argmax)."""
    args, model = run.args, run.model
    optimizer = torch.optim.RAdam(
        param_groups(model), lr=args.lr, weight_decay=args.weight_decay, decoupled_weight_decay=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.precision == "fp16")
    training_state = dict(optimizer=optimizer, schedule=schedule, scaler=scaler)
    log, start_epoch = [], 1
    if args.resume:
        saved = load_checkpoint(args.resume, "log")
        model.load_state_dict(saved["model"])
        for name, part in training_state.items():
            part.load_state_dict(saved[name])
        log, start_epoch = saved["log"], saved["epoch"] + 1

    loss_module = LossModule(
        without_image_encoder(model) if args.freeze_image else model,
        "softmax10" if args.official else "normalized",
    )
    loss_module = data_parallel(loss_module)
    start_time = time.time()
    for epoch in range(start_epoch, args.epochs + 1):
        torch.manual_seed(args.seed * 1_000_003 + epoch)  # so a resumed run draws the same
        row = dict(epoch=epoch, lr=schedule.get_last_lr()[0])
        row |= train_one_epoch(run, loss_module, optimizer, scaler, train_loader, epoch)
        schedule.step()
        val = compute_metrics(*predict_loader(run, val_loader))
        row |= {f"val_{name}": value for name, value in val.items()}
        row |= dict(peak_mb=peak_memory(args.device))
        is_best = row["val_mae_argmax"] < min((r["val_mae_argmax"] for r in log), default=math.inf)
        log.append(row)
        if is_main():
            seconds = (time.time() - start_time) / (epoch - start_epoch + 1)
            print_epoch(row, args.epochs, seconds * (args.epochs - epoch), is_best)
            if is_best:
                save_checkpoint(run.dir / "best.pt", model, args, epoch=epoch)
            save_csv(run.dir / "log.csv", log)
            states = {name: part.state_dict() for name, part in training_state.items()}
            save_checkpoint(run.dir / "last.pt", model, args, epoch=epoch, log=log, **states)


def train_one_epoch(
    run: Run,
    loss_module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: DataLoader,
    epoch: int,
) -> dict[str, float]:
    """-> mean losses, images per second of one pass. FloatingPointError: loss is not finite."""
    args = run.args
    run.model.train()
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(epoch)
    loss_sums = torch.zeros(4, device=args.device)
    num_images, start_time, last_print = 0, time.time(), 0.0
    for step, (images, labels) in enumerate(loader, 1):
        images = prepare_batch(images, args, run.preprocess)
        labels = labels.to(args.device, non_blocking=True)
        with autocast(args):
            total, i2t, t2i = loss_module(images, labels)
        optimizer.zero_grad()
        scaler.scale(total * world_size()).backward()  # DistributedDataParallel averages
        scaler.step(optimizer)
        scaler.update()
        losses = torch.stack([total, i2t, t2i, total.new_ones(())])
        loss_sums += losses.detach() * len(labels)
        num_images += len(labels) * world_size()
        if is_main() and sys.stderr.isatty() and time.time() - last_print > 0.25:
            last_print = time.time()
            speed = f"{num_images / (last_print - start_time):.0f} images/s"
            line = f"\r  epoch {epoch}  {step}/{len(loader)}  {speed} "
            print(line, end="", file=sys.stderr, flush=True)
    loss, i2t, t2i = (loss_sums[:3] / loss_sums[3]).tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"loss is {loss} in epoch {epoch}; try a lower --lr or --precision fp32"
        )
    images_per_s = num_images / (time.time() - start_time)
    return dict(loss=loss, i2t=i2t, t2i=t2i, images_per_s=images_per_s)


def evaluate_checkpoint(args: Namespace) -> dict[str, Any]:
    """--eval: a checkpoint on the test images of its run; writes eval-NAME.json beside it."""
    start_time = time.time()
    saved = load_checkpoint(args.eval, "model")
    task = load_task(args)
    torch.manual_seed(args.seed)
    with exit_on_user_error():
        model, preprocess = build_model(args, task)
    run = Run(args, task, model, preprocess)
    same_initialisation = args.epochs and not args.init
    initial_similarity = similarity_matrix(model) if same_initialisation else None
    model.load_state_dict(saved["model"])
    _, val_loader, test_loader = make_loaders(args, task, preprocess, model)
    name = f"eval-{Path(args.eval).stem}"
    results = evaluate_test_set(run, val_loader, test_loader, start_time, initial_similarity, name)
    if is_main():
        save_json(run.dir / f"{name}.json", results)
        print(f"written to {run.dir}: {name}.json, predictions-{name}.csv, pictures-{name}/")
    return results


def train_sweep(args: Namespace) -> list[dict[str, Any]]:
    """A run for each combination of values. Finished runs are read, interrupted ones resumed."""
    runs = expand_runs(args)
    if has_sweep_values(args):  # check every value before the first run, not after it
        for run in {
            join_values([run.base_ranks, run.shots, run.shift]): run for run in runs
        }.values():
            num_ranks = load_task(run).num_ranks
            if run.method == "ordinalclip" and run.base_ranks > num_ranks:
                raise SystemExit(
                    f"--base-ranks {run.base_ranks}, but {args.data} has {num_ranks} ranks; "
                    "give fewer"
                )
    results = []
    for run in runs:
        last = Path(run.out) / "last.pt"
        run_results = load_finished_results(run)
        if run_results is None:
            run.resume = str(last) if last.exists() else None
            run_results = train(run)
        results.append(run_results)
    if is_main():
        write_report([run.out for run in runs], f"report-{table_name(args)}.md")
    return results


def write_config(run: Run) -> None:
    """config.json and splits/: what the run is, before it starts."""
    if is_main():
        run.dir.mkdir(parents=True, exist_ok=True)
        run.task.write_lists(run.dir / "splits")
        config = dict(settings=settings_dict(run.args), protocol=run.task.protocol, **provenance())
        save_json(run.dir / "config.json", config)


def print_run_header(run: Run) -> None:
    if not is_main():
        return
    args, task = run.args, run.task
    counts = [
        f"{group['name']} {sum(p.numel() for p in group['params']):,}"
        for group in param_groups(run.model)
    ]
    trained = ", ".join(counts) if args.epochs else "nothing"
    print(
        f"{task.protocol}\n"
        f"method {run_name(args)}   ranks {task.num_ranks}   "
        f"context {args.context or task.context!r}\n"
        f"image encoder {args.image_encoder} {run.preprocess['image_size']} px   "
        f"clip {args.clip}   trains {trained}\n"
        f"{args.device} {args.precision}, {world_size()} process(es)   -> {args.out}"
    )


def print_epoch(row: dict[str, float], epochs: int, eta: float, is_best: bool) -> None:
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(clear, end="", file=sys.stderr, flush=True)
    print(
        f"epoch {row['epoch']:3d}/{epochs}  "
        f"loss {row['loss']:.3f} (i2t {row['i2t']:.3f} t2i {row['t2i']:.3f})  "
        f"val MAE {row['val_mae_expected']:.3f} expected {row['val_mae_argmax']:.3f} argmax  "
        f"acc {row['val_acc_argmax']:.1%}  {row['images_per_s']:.0f} img/s  "
        f"{row['peak_mb']:.0f} MB  eta {eta // 60:.0f}:{eta % 60:02.0f}{'  *' if is_best else ''}",
        flush=True,
    )


def cli() -> None:
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; --resume RUN goes on after its last whole epoch, and so does the same "
            "command where it was of several runs"
        ) from None


if __name__ == "__main__":
    cli()
