"""Train and compare OrdinalCLIP, CoOp, linear, regression and zero-shot under one protocol.

    python train.py --data demo                              # generated images, minutes on a CPU
    python train.py --data morph2 --interp linear            # the paper's main run
    python train.py --data my/folder --clip RN50             # own data: docs/datasets.md
    python train.py --resume runs/NAME                       # resume from last.pt
    python train.py --eval runs/NAME/best.pt                 # test a checkpoint again
    python train.py --data adience --fold all                # five runs, their mean at the end
    python train.py --report runs/*                          # finished runs beside the paper's
    torchrun --nproc-per-node 4 train.py --data morph2       # the same batches, over four GPUs

Read top to bottom: main, train (one run, in the order of the paper), fit, train_one_epoch.
Settings are in training/options.py, methods in training/methods.py. A run writes runs/NAME/:
config.json, splits/*.txt, log.csv, last.pt, best.pt, exported.pt, results.json,
predictions-best.csv, pictures/*.png. Needs: evaluation, training.
"""

import os
import signal
import sys
import time
import traceback
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while importing ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from evaluation.evaluate import evaluate_test_set, part_metrics, predict_loader, similarity_matrix
from evaluation.report import write_report
from exported import save_model
from training.checkpoints import (
    TrainingState,
    check_best,
    load_checkpoint_weights,
    load_last,
    save_checkpoint,
)
from training.distributed import barrier, data_parallel, init_distributed, is_main, world_size
from training.loaders import autocast, make_loaders, prepare_batch
from training.methods import build_loss, build_run, needs_clip, warm_start
from training.optim import check_losses, epochs_without_progress
from training.options import parse_args
from training.profile import profile_run
from training.progress import (
    ProgressLine,
    TensorBoard,
    clear_line,
    print_epoch,
    print_resumed,
    print_run_header,
)
from training.run_folder import (
    Run,
    load_finished_results,
    lock_run_dir,
    peak_memory,
    save_json,
    table_name,
    write_config,
)
from training.sweep import check_runs, expand_runs, folders_of_all_seeds, is_sweep


def main(argv: list[str] | None = None) -> dict | list[dict] | str:
    """-> results of the run, or a list of those of several; tables with --report, --profile.

    SystemExit for user errors: bad flags or files, a full disk, a loss that is not finite.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        args = parse_args(argv)
        if args.report:
            return write_report(args.report)
        init_distributed(args)
        if args.eval:
            return evaluate_checkpoint(args)
        if args.profile:
            return profile_run(expand_runs(args)[0])
        return train_sweep(args) if is_sweep(args) else train(args)
    except (OSError, FloatingPointError) as error:
        if debug:
            raise
        last_line = str(error).splitlines()[-1]  # before it, the traceback of a worker process
        raise SystemExit(f"train.py: {last_line}") from error
    except SystemExit:
        if debug:
            traceback.print_exc()
        raise
    finally:
        clear_line()
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args: Namespace) -> dict[str, Any]:
    """One run in the order of the paper: ranks, model, matching loss, best epoch, test.

    An interrupted run is resumed from its last.pt.
    """
    start_time = time.time()
    with lock_run_dir(args):
        # 1. Images and their ranks, under a named protocol (paper, section 4.1); 2. image encoder,
        # rank prototypes, temperature (sections 3.1 to 3.3)
        run = build_run(args)
        if saved := load_last(run):
            start_time -= saved["seconds"]
            initial_similarity = saved["initial_similarity"]
        else:
            if args.init:
                warm_start(args, run.model)
            initial_similarity = similarity_matrix(run.model) if args.epochs else None
        train_loader, val_loader, test_loader = make_loaders(run)
        print_run_header(run, args.clip if needs_clip(args) else "none")
        write_config(run)
        # 3. RAdam and a cosine over all epochs; 4. match images to ranks and ranks to images
        # (Eq. 4), keep the epoch with the lowest validation MAE
        if args.epochs == 0:
            save_checkpoint(run.dir / "best.pt", run.model, args, epoch=0)
        else:
            state = TrainingState(run, start_time, initial_similarity)
            if saved:
                state.load(saved)
                print_resumed(run, saved)
            fit(run, state, train_loader, val_loader)
            if saved and is_main():  # an epoch that was repeated may have come out otherwise
                check_best(run.dir / "best.pt", state.log)
        # 5. The test images are looked at once, with the best epoch
        barrier()  # the main process writes best.pt
        load_checkpoint_weights(run.model, run.dir / "best.pt")
        results = evaluate_test_set(run, val_loader, test_loader, start_time, initial_similarity)
        if is_main():
            path, ranks = run.dir / "exported.pt", (run.task.rank_names, run.task.rank_values)
            save_model(path, run.model, args.image_encoder, *ranks, run.preprocess, results)
            save_json(run.dir / "results.json", results)
            print(f"written to {run.dir}; next: python predict.py {run.dir}/exported.pt IMAGE ...")
        return results


def fit(run: Run, state: TrainingState, train_loader: DataLoader, val_loader: DataLoader) -> None:
    """All epochs; leaves last.pt, and best.pt: the lowest validation MAE (argmax)."""
    args, log = run.args, state.log
    loss_module = data_parallel(build_loss(run))
    eval_run = replace(run, model=state.average.module) if state.average else run
    start_epoch, fit_start = len(log) + 1, time.time()
    board = TensorBoard(run, start_epoch)
    for epoch in range(start_epoch, args.epochs + 1):
        if args.patience and epochs_without_progress(log) >= args.patience:
            break
        torch.manual_seed(args.seed * 1_000_003 + epoch)  # of dropout; images have seeds of theirs
        row = dict(epoch=epoch, lr=state.schedule.get_last_lr()[0])
        row |= train_one_epoch(run, loss_module, state, train_loader, epoch)
        state.schedule.step()
        val = part_metrics(run.task, "val", *predict_loader(eval_run, val_loader))
        row |= {f"val_{name}": value for name, value in val.items()}
        row["peak_mb"] = peak_memory(args.device)
        log.append(row)
        is_best = epochs_without_progress(log) == 0
        if is_main():
            seconds = (time.time() - fit_start) / (epoch - start_epoch + 1)
            print_epoch(row, args.epochs, seconds * (args.epochs - epoch), is_best)
            if is_best:  # before last.pt: a run interrupted between the two repeats the epoch
                save_checkpoint(run.dir / "best.pt", eval_run.model, args, epoch=epoch)
            board.write(epoch, row)  # before last.pt, too
            state.save()
            state.save_log()
    board.close()


def train_one_epoch(
    run: Run, loss_module: nn.Module, state: TrainingState, loader: DataLoader, epoch: int
) -> dict[str, float]:
    """-> mean losses and images per second. FloatingPointError: a loss is not finite.

    Resumes where `state` says that the epoch was interrupted.
    """
    args, accumulate = run.args, run.args.accumulate
    run.model.train()
    loss_sums = torch.zeros(4, device=args.device)
    steps = state.restore_progress(loss_sums)
    loader.sampler.set_epoch(epoch, start=steps * loader.batch_size)
    num_steps = steps + len(loader)
    start = loader.sampler.start * world_size()
    progress = ProgressLine(f"epoch {epoch}/{args.epochs}", start)
    num_images, start_time = 0, time.time()
    for step, (images, labels) in enumerate(loader, steps + 1):
        images = prepare_batch(images, args, run.preprocess)
        labels = labels.to(args.device, non_blocking=True)
        with autocast(args):
            total, i2t, t2i = loss_module(images, labels)
        group_start = (step - 1) // accumulate * accumulate
        group_size = min(accumulate, num_steps - group_start)
        scale = world_size() / group_size  # DistributedDataParallel takes the mean of gradients
        state.scaler.scale(total * scale).backward()
        is_group_end = step == group_start + group_size
        if is_group_end:
            state.step()
        losses = torch.stack([total, i2t, t2i, total.new_ones(())])
        loss_sums += losses.detach() * len(labels)
        num_images += len(labels) * world_size()
        progress(start + num_images, start + len(loader.sampler) * world_size())
        if is_group_end and state.is_save_due():
            check_losses(loss_sums, epoch, step)
            state.save_within_epoch(step, loss_sums)
    check_losses(loss_sums, epoch, num_steps)
    loss, i2t, t2i = (loss_sums[:3] / loss_sums[3]).tolist()
    images_per_s = num_images / (time.time() - start_time)
    return dict(loss=loss, i2t=i2t, t2i=t2i, images_per_s=images_per_s)


def evaluate_checkpoint(args: Namespace) -> dict[str, Any]:
    """--eval: a checkpoint on the test images of its run; writes eval-NAME.json beside it."""
    if not os.access(args.out, os.W_OK):
        raise SystemExit(f"{args.out} may not be written; --eval writes there: copy the run")
    start_time, run = time.time(), build_run(args)
    same_initialisation = args.epochs and not args.init
    initial_similarity = similarity_matrix(run.model) if same_initialisation else None
    load_checkpoint_weights(run.model, args.eval)
    _, val_loader, test_loader = make_loaders(run)
    name = f"eval-{Path(args.eval).stem}"
    results = evaluate_test_set(run, val_loader, test_loader, start_time, initial_similarity, name)
    if is_main():
        save_json(run.dir / f"{name}.json", results)
        print(f"written to {run.dir}: {name}.json, predictions-{name}.csv, pictures-{name}/")
    return results


def train_sweep(args: Namespace) -> list[dict[str, Any]]:
    """A run for each combination of values. Finished runs are read, interrupted ones resumed."""
    runs = expand_runs(args)
    check_runs(runs)
    results = [load_finished_results(run) or train(run) for run in runs]
    if is_main():
        write_report(folders_of_all_seeds(runs), f"report-{table_name(args)}.md")
    return results


def cli() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal without ± loses no report
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; the same command, or --resume RUN, resumes from what was saved"
        ) from None


if __name__ == "__main__":
    cli()
