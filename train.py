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
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while importing ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evaluation.evaluate import evaluate_test_set, predict_loader, similarity_matrix
from evaluation.metrics import compute_metrics
from evaluation.report import write_report
from training import options
from training.checkpoints import (
    NEEDED_TO_RESUME,
    TrainingState,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
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
from training.progress import ProgressLine, print_epoch, print_run_header
from training.run_folder import (
    Run,
    check_run_dir,
    check_same_images,
    export_model,
    join_values,
    load_finished_results,
    lock_run_dir,
    peak_memory,
    save_csv,
    save_json,
    table_name,
    write_config,
)


def parse_args(argv: list[str] | None = None) -> Namespace:
    return options.parse_args(argv, description=__doc__.split("\n\n")[0])


def main(argv: list[str] | None = None) -> dict | list[dict] | str:
    """-> results of the run; a list of them where there are several; tables with --report.

    SystemExit for user errors: bad flags or files, a full disk, a loss that is not finite.
    """
    args = parse_args(argv)
    try:
        if args.report:
            return write_report(args.report)
        init_distributed(args)
        if args.eval:
            return evaluate_checkpoint(args)
        return train_sweep(args) if is_sweep(args) else train(args)
    except (OSError, FloatingPointError) as error:
        if args.debug:
            raise
        last_line = str(error).splitlines()[-1]  # before it, the traceback of a worker process
        raise SystemExit(f"train.py: {last_line}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args: Namespace) -> dict[str, Any]:
    """One run, from where its folder stands: a new one, or an unfinished one that goes on."""
    with lock_run_dir(Path(args.out)):
        check_run_dir(args)
        return train_run(args)


def train_run(args: Namespace) -> dict[str, Any]:
    """The run in the order of the paper: ranks, model, matching loss, best epoch, test."""
    start_time = time.time()
    # 1. Images and their ranks, under a named protocol (paper, section 4.1)
    task = load_task(args)
    check_same_images(args, task)
    # 2. Image encoder, rank prototypes, temperature (sections 3.1 to 3.3)
    torch.manual_seed(args.seed)
    with exit_on_user_error():
        model, preprocess = build_model(args, task)
    run = Run(args, task, model, preprocess)
    saved = None
    if (run.dir / "last.pt").exists():  # before the loaders: features are of this encoder
        saved = load_checkpoint(run.dir / "last.pt", *NEEDED_TO_RESUME)
        load_model(model, saved["model"], run.dir / "last.pt")
        start_time -= saved["seconds"]
    elif args.init:
        warm_start(args, model)
    initial_similarity = saved["initial_similarity"] if saved else None
    if args.epochs and not saved:
        initial_similarity = similarity_matrix(model)
    train_loader, val_loader, test_loader = make_loaders(args, task, preprocess, model)
    print_run_header(run)
    write_config(run)
    # 3. RAdam and a cosine over all epochs; 4. match images to ranks and ranks to images (Eq. 4),
    # keep the epoch with the lowest validation MAE
    if args.epochs == 0:
        save_checkpoint(run.dir / "best.pt", model, args, epoch=0)
    else:
        fit(run, train_loader, val_loader, saved, start_time, initial_similarity)
    # 5. The test images are looked at once, with the best epoch
    barrier()  # the main process writes best.pt
    load_model(model, load_checkpoint(run.dir / "best.pt", "model")["model"], run.dir / "best.pt")
    results = evaluate_test_set(run, val_loader, test_loader, start_time, initial_similarity)
    if is_main():
        if args.method != "regression":  # which has no prototypes
            export_model(run.dir / "exported.pt", run, results)
        save_json(run.dir / "results.json", results)
    return results


def fit(
    run: Run,
    train_loader: DataLoader,
    val_loader: DataLoader,
    saved: dict[str, Any] | None,
    start_time: float,
    initial_similarity: Tensor | None,
) -> None:
    """All epochs; leaves last.pt, and best.pt: the lowest validation MAE (argmax).

    saved: last.pt of the run, from which it goes on, perhaps within an epoch.
    """
    args, model = run.args, run.model
    optimizer = torch.optim.RAdam(
        param_groups(model), lr=args.lr, weight_decay=args.weight_decay, decoupled_weight_decay=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.precision == "fp16")
    state = TrainingState(run, optimizer, schedule, scaler, start_time, initial_similarity)
    if saved:
        state.load(saved)
    loss_module = LossModule(
        without_image_encoder(model) if args.freeze_image else model,
        "softmax10" if args.official else "normalized",
    )
    loss_module = data_parallel(loss_module)
    log, start_epoch, fit_start = state.log, len(state.log) + 1, time.time()
    for epoch in range(start_epoch, args.epochs + 1):
        torch.manual_seed(args.seed * 1_000_003 + epoch)  # of dropout; images have seeds of theirs
        row = dict(epoch=epoch, lr=schedule.get_last_lr()[0])
        row |= train_one_epoch(run, loss_module, state, train_loader, epoch)
        schedule.step()
        val = compute_metrics(*predict_loader(run, val_loader))
        row |= {f"val_{name}": value for name, value in val.items()}
        row |= dict(peak_mb=peak_memory(args.device))
        is_best = row["val_mae_argmax"] < min((r["val_mae_argmax"] for r in log), default=math.inf)
        log.append(row)
        if is_main():
            seconds = (time.time() - fit_start) / (epoch - start_epoch + 1)
            print_epoch(row, args.epochs, seconds * (args.epochs - epoch), is_best)
            if is_best:  # before last.pt: a run cut off between the two repeats the epoch
                save_checkpoint(run.dir / "best.pt", model, args, epoch=epoch)
            state.save()
            save_csv(run.dir / "log.csv", log)


def train_one_epoch(
    run: Run, loss_module: nn.Module, state: TrainingState, loader: DataLoader, epoch: int
) -> dict[str, float]:
    """-> mean losses and images per second. FloatingPointError: a loss is not finite.

    Goes on where `state` says that the epoch was cut off.
    """
    args, optimizer, scaler = run.args, state.optimizer, state.scaler
    run.model.train()
    loss_sums = torch.zeros(4, device=args.device)
    steps = state.start_epoch(loss_sums)
    loader.sampler.epoch, loader.sampler.start = epoch, steps * loader.batch_size
    num_steps = steps + len(loader)
    progress = ProgressLine(f"epoch {epoch}", num_steps)
    num_images, start_time = 0, time.time()
    for step, (images, labels) in enumerate(loader, steps + 1):
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
        progress.update(step, num_images)
        if state.is_save_due():
            check_finite(loss_sums, epoch, step)
            state.save_within_epoch(step, loss_sums)
    check_finite(loss_sums, epoch, num_steps)
    loss, i2t, t2i = (loss_sums[:3] / loss_sums[3]).tolist()
    images_per_s = num_images / (time.time() - start_time)
    return dict(loss=loss, i2t=i2t, t2i=t2i, images_per_s=images_per_s)


def check_finite(loss_sums: Tensor, epoch: int, step: int) -> None:
    """FloatingPointError naming the first loss that is not finite; last.pt stays as it was."""
    for name, value in zip(("loss", "i2t", "t2i"), loss_sums.tolist()):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} in epoch {epoch}, by step {step}; try a lower --lr or "
                "--precision fp32. --resume goes on from the last checkpoint"
            )


def evaluate_checkpoint(args: Namespace) -> dict[str, Any]:
    """--eval: a checkpoint on the test images of its run; writes eval-NAME.json beside it."""
    start_time = time.time()
    saved = load_checkpoint(args.eval, "model")
    task = load_task(args)
    check_same_images(args, task)
    torch.manual_seed(args.seed)
    with exit_on_user_error():
        model, preprocess = build_model(args, task)
    run = Run(args, task, model, preprocess)
    same_initialisation = args.epochs and not args.init
    initial_similarity = similarity_matrix(model) if same_initialisation else None
    load_model(model, saved["model"], args.eval)
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
    check_sweep(args, runs)
    results = [load_finished_results(run) or train(run) for run in runs]
    if is_main():
        write_report([run.out for run in runs], f"report-{table_name(args)}.md")
    return results


def check_sweep(args: Namespace, runs: list[Namespace]) -> None:
    """SystemExit for whatever would stop a later run: before the first one, not after hours."""
    for run in runs:
        if not (Path(run.out) / "results.json").exists():
            check_run_dir(run)
    if not has_sweep_values(args) and args.fold != "all":
        return
    values = {join_values([run.base_ranks, run.shots, run.shift, run.fold]): run for run in runs}
    for run in values.values():
        num_ranks = load_task(run).num_ranks
        if run.method == "ordinalclip" and run.base_ranks > num_ranks:
            raise SystemExit(
                f"--base-ranks {run.base_ranks}, but {args.data} has {num_ranks} ranks; give fewer"
            )


def cli() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal without ± loses no report
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; --resume RUN goes on after its last whole epoch, and so does the same "
            "command where it was of several runs"
        ) from None


if __name__ == "__main__":
    cli()
