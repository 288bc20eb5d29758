"""The runs of one command: a run for each fold, category, seed, and value of SWEEP_FLAGS.

Read expand_runs first. Needs: data, training.run_folder.
"""

import copy
import itertools
from argparse import Namespace
from pathlib import Path

import data
from training.run_folder import as_list, run_name

OWN_DATA_FOLDS = 5  # of --fold all with a folder of own data
SWEEP_FLAGS = ("base_ranks", "shots", "shift")  # flags that accept a list: one run per value


def is_sweep(args: Namespace) -> bool:
    several = args.fold == "all" or args.category == "each" or bool(args.seeds)
    return several or has_sweep_values(args)


def has_sweep_values(args: Namespace) -> bool:
    return any(isinstance(getattr(args, key), list) for key in SWEEP_FLAGS)


def categories(dataset: str) -> list[str | None]:
    """What --category each runs through; [None] where a dataset has none."""
    names = data.DATASETS.get(dataset, {}).get("categories", (None,))
    return [name for name in names if name != "all"]


def expand_runs(args: Namespace, own_folds: int | None = None) -> list[Namespace]:
    """The settings of each run: folds x categories x values of SWEEP_FLAGS x seeds."""
    if not is_sweep(args):
        return [args]
    num_folds = data.DATASETS.get(args.data, {}).get("folds", own_folds or OWN_DATA_FOLDS)
    folds = range(num_folds) if args.fold == "all" else [args.fold]
    names = categories(args.data) if args.category == "each" else [args.category]
    if names == [None] and args.category:
        raise SystemExit(f"--category each: {args.data} has no categories; leave it out")
    values = [as_list(getattr(args, key)) for key in SWEEP_FLAGS]
    runs = []
    for fold, category, *settings, seed in itertools.product(
        folds, names, *values, args.seeds or [args.seed]
    ):
        run = copy.copy(args)
        vars(run).update(zip(SWEEP_FLAGS, settings), fold=fold, category=category, seed=seed)
        run.out = str(Path(args.out or "runs") / run_name(run))
        runs.append(run)
    return runs
