"""The runs of one command: a run for each fold, category, seed, and value of SWEEP_FLAGS.

Read expand_runs first. Needs: data, training.distributed, .loaders, .run_folder.
"""

import glob
import itertools
from argparse import Namespace
from pathlib import Path

import data
from training.distributed import is_main
from training.loaders import load_task
from training.run_folder import (
    as_list,
    check_run_dir,
    check_same_images,
    check_same_weights,
    is_digits,
    load_finished_results,
    run_name,
    table_name,
)

OWN_DATA_FOLDS = 5  # of --fold all with a folder of own data
SWEEP_FLAGS = ("base_ranks", "shots", "shift")  # flags that accept a list: one run per value


def is_sweep(args: Namespace) -> bool:
    has_several = any(isinstance(getattr(args, key), list) for key in SWEEP_FLAGS)
    return has_several or args.fold == "all" or args.category == "each" or bool(args.seeds)


def categories(dataset: str) -> list[str | None]:
    """What --category each runs through; [None] where a dataset has none."""
    names = data.DATASETS.get(dataset, {}).get("categories", (None,))
    return [name for name in names if name != "all"]


def expand_runs(args: Namespace) -> list[Namespace]:
    """The settings of each run: folds x categories x values of SWEEP_FLAGS x seeds."""
    if not is_sweep(args):
        return [args]
    folds, names = [args.fold], [args.category]
    if args.fold == "all":
        num_folds = data.DATASETS.get(args.data, {}).get("folds", OWN_DATA_FOLDS)
        if args.split == data.LEAVE_ONE_OUT:
            all_images = dict(fold=0, base_ranks=2, shots=None, shift=None)
            num_folds = load_task(Namespace(**vars(args) | all_images)).num_groups
        folds = range(num_folds)
    if args.category == "each":
        names = categories(args.data)
        if names == [None]:
            raise SystemExit(f"--category each: {args.data} has no categories; leave it out")
    keys = ("fold", "category", *SWEEP_FLAGS, "seed")
    values = [as_list(getattr(args, key)) for key in SWEEP_FLAGS]
    runs = []
    for settings in itertools.product(folds, names, *values, args.seeds or [args.seed]):
        run = Namespace(**vars(args) | dict(zip(keys, settings)))
        run.out = str(Path(args.out or "runs") / run_name(run))
        runs.append(run)
    return runs


def folders_of_all_seeds(runs: list[Namespace]) -> list[Path]:
    """The folders of the runs, and those beside them of other seeds, which another command ran."""
    folders = {Path(run.out) for run in runs}
    for run in runs:
        others = Path(run.out).parent.glob(glob.escape(table_name(run)) + "-seed*")
        folders |= {path for path in others if is_digits(path.name.rpartition("-seed")[2])}
    return sorted(folders)


def check_runs(runs: list[Namespace]) -> None:
    """SystemExit for whatever would stop a later run: before the first one, not after hours."""
    for run in runs:
        if load_finished_results(run) is None:
            check_run_dir(run)
        elif is_main():
            print(f"{run.out}: already finished, reading results.json")
    tasks: dict[tuple, data.Task] = {}
    for run in runs:
        is_started = (Path(run.out) / "config.json").exists()  # then its images are compared
        seed = run.seed if is_started and (run.shots or run.shift) else None
        key = (run.base_ranks, run.shots, run.shift, run.fold, run.category, seed)
        tasks[key] = tasks.get(key) or load_task(run)
        check_same_images(run, tasks[key])
        check_same_weights(run)
