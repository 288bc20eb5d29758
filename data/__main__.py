"""`python -m data NAME`: count a release, say where it differs, and open every image.

    python -m data morph2 --data-root /data/morph --out lists    # lists/fold_K/train.txt ...
    python -m data hci --download       # fetch it: hci, and the ratings of aesthetics

Read last. Copy together with: the whole folder.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import DATASETS, LABEL_OPTIONS, LEAVE_ONE_OUT, PARTS, Task, _modules, check_images, load
from .download import download


def check(task: Task) -> int:
    """Print counts and notes, open all images; the number of those missing or unreadable."""
    counts = [Counter(sample.label for sample in getattr(task, part)) for part in PARTS]
    paths = {sample.path for part in PARTS for sample in getattr(task, part)}
    checked, errors = check_images(task, os.cpu_count() or 1, print_progress)
    print(checked.protocol, *(f"note: {note}" for note in task.notes), sep="\n")
    print(f"{'rank':>12} {'train':>7} {'val':>7} {'test':>7} {'all':>7}")
    for rank, name in enumerate(task.rank_names):
        if any(row := [count[rank] for count in counts]):
            print(f"{name:>12} {row[0]:7} {row[1]:7} {row[2]:7} {sum(row):7}")
    num_read = len(paths) - len(errors)
    print(*errors.values(), f"{num_read:,} of {len(paths):,} images can be read", sep="\n")
    return len(errors)


def print_progress(num_images: int, total: int) -> None:
    """A line on stderr, where that is a terminal."""
    if sys.stderr.isatty() and (num_images % 50 == 0 or num_images == total):
        end = "\n" if num_images == total else ""
        print(f"\r{num_images:,} of {total:,} images opened", end=end, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if every image can be read, or the download is complete."""
    parser = argparse.ArgumentParser(
        prog="python -m data", description="Read a dataset, count it and open every image."
    )
    add = parser.add_argument
    add("name", help=f"{', '.join(DATASETS)}, or a folder of your own images")
    add("--data-root", help="where the release lies, default data/NAME")
    add("--split", help="default the dataset's first: see its file in data/")
    add(
        "--seed",
        type=int,
        default=1,
        help="of splits made here, as --split-seed of train.py; default 1",
    )
    add("--category", help="aesthetics: all, nature, animal, urban or people")
    add("--label-rule", help="adience: exact, merged or inside; aesthetics: median or mean")
    for flag, help in LABEL_OPTIONS.items():
        add(flag, help=f"own images: {help}")
    add("--out", help="folder for the lists of all folds: fold_K/train.txt ...")
    add("--download", action="store_true", help="fetch it: hci, and the ratings of aesthetics")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever the locale can print
    options = {
        k: v for k, v in vars(args).items() if k not in ("name", "data_root", "out", "download")
    }
    try:
        if empty := [name for name, value in vars(args).items() if value == ""]:
            raise ValueError(f"{empty[0].replace('_', '-')} is empty; give a value")
        if args.download:
            for flag in (*options, "out"):
                if getattr(args, flag) != parser.get_default(flag):
                    flag = flag.replace("_", "-")
                    raise ValueError(f"--{flag} has no effect on --download; leave it out")
            root = Path(args.data_root or f"data/{args.name}")
            download(args.name, _modules.get(args.name), root)
            return 0
        task = load(args.name, args.data_root, **options, allow_missing=True)
        is_own = args.name not in DATASETS
        if args.out and is_own and Path(args.out).resolve().is_relative_to(task.root.resolve()):
            raise ValueError(
                f"--out {args.out} lies in {task.root}, where folders are data; give another"
            )
        num_errors = check(task)
        own_folds = task.num_groups if args.split == LEAVE_ONE_OUT else 1
        for fold in range(DATASETS.get(args.name, {}).get("folds", own_folds)) if args.out else ():
            folder = Path(args.out, f"fold_{fold}")
            load(args.name, args.data_root, fold=fold, **options).write_lists(folder)
            print(f"lists: {folder}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes where it was", file=sys.stderr)
        return 130
    return 1 if num_errors else 0


if __name__ == "__main__":
    sys.exit(main())
