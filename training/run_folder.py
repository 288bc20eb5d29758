"""The folder of a run: its name, json and csv files, and whether it may be written.

runs/NAME/ holds config.json, splits/*.txt, log.csv, last.pt, best.pt, exported.pt, results.json,
predictions-best.csv and pictures/*.png. Every file is written under a temporary name and moved.

Needs: data, training.distributed.
"""

import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import data
from training.distributed import is_main, world_size

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

RUN_FILES = (
    "config.json", "splits", "log.csv", "best.pt", "last.pt", "predictions-best.csv", "pictures",
    "exported.pt", "tensorboard",
)  # fmt: skip
# Settings of the machine: a run may be resumed with others. They change figures in the last
# digits, precision also before, so a report keeps runs of two precisions apart.
NOT_COMPARED = (
    "device", "precision", "compile", "workers", "data_root", "out", "seeds", "save_every", "debug",
    "tensorboard", "skip_bad",  # but its images are compared: check_same_images
)  # fmt: skip
WEIGHTS = ("--clip", "--init", "--image-weights")  # which may be files
NOT_SETTINGS = ("resume", "eval", "report", "profile", "debug")  # what to do, not what the run is


@dataclass(frozen=True)
class Run:
    """One run: its settings, images and ranks, model, and how images are prepared."""

    args: Namespace
    task: data.Task
    model: nn.Module
    preprocess: dict[str, Any]  # image_size, mean, std, draft, perhaps squash and resample

    @property
    def dir(self) -> Path:
        return Path(self.args.out)

    @functools.cached_property  # of a million images it takes seconds
    def digests(self) -> dict[str, str]:
        return split_digests(self.task) | weights_digests(self.args)


# --- names ---


def is_digits(text: str) -> bool:
    """Plain decimal digits: int() takes them, as it does not take every digit of Unicode."""
    return text.isascii() and text.isdigit()


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def dataset_defaults(name: str) -> dict[str, str | None]:
    preset = data.DATASETS.get(name, {})
    return dict(
        split=preset.get("splits", ("random",))[0],
        label_rule=preset.get("label_rules", (None,))[0],
        category=preset.get("categories", (None,))[0],
    )


def data_name(name: str) -> str:
    """--data as it is stored and compared: `photos/` is `photos`."""
    path = name.strip() and os.path.normpath(name)
    return name if path in data.DATASETS else path  # ./hci is a folder


def flag_of(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def run_name(args: Namespace) -> str:
    return f"{table_name(args)}-seed{args.seed}"


def table_name(args: Namespace) -> str:
    """Run name without the seed."""
    default = dataset_defaults(args.data)
    shifts = ["{}-{:g}".format(*shift) for shift in as_list(args.shift)] if args.shift else []
    parts = [
        Path(os.path.abspath(args.data)).name,  # of ., too
        args.category,
        method_name(args),
        args.split if args.split != default["split"] else None,
        args.label_rule if args.label_rule != default["label_rule"] else None,
        f"split{args.split_seed}" if args.split_seed != 1 else None,
        "shots" + join_values(args.shots) if args.shots else None,
        "shift" + "+".join(shifts) if args.shift else None,
        f"fold{args.fold}" if args.fold else None,
    ]
    return "-".join(part for part in parts if part)


def method_name(args: Namespace) -> str:
    """Method part of the run name: the row of the run in a report."""
    is_ordinalclip = args.method == "ordinalclip"
    words = args.context and not is_digits(args.context)
    parts = [
        args.method,
        args.interp if is_ordinalclip else None,
        f"K{join_values(args.base_ranks)}" if is_ordinalclip and args.interp != "none" else None,
        args.regression_loss if args.method == "regression" else None,
        f"tune-{args.tune}" if args.tune != "both" else None,
        "warm" if args.init else "random-context" if args.context and not words else None,
        "frozen" if args.freeze_image else None,
        args.rank_position if args.rank_position != "tail" else None,
        "own-words" if words else None,
        "official" if args.official else None,
    ]
    return "-".join(part for part in parts if part)


def join_values(values: Any) -> str:
    return "-".join(map(str, as_list(values)))


# --- may this folder be written, is the run in it finished? ---


def settings_dict(args: Namespace) -> dict[str, Any]:
    return {key: v for key, v in vars(args).items() if key not in NOT_SETTINGS}


def comparable_settings(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key not in NOT_COMPARED}


def check_same_settings(args: Namespace, saved: dict, state: str) -> None:
    """SystemExit naming each setting of args that differs from the saved ones."""
    if differing := differing_settings(settings_dict(args), saved):
        raise SystemExit(
            f"{args.out} {state} with other settings: {differing}. "
            "Choose another --out, or repeat its settings"
        )


def differing_settings(requested: dict, saved: dict) -> str:
    """`--lr 0.1, not 0.2; ...`: each requested setting that differs from the saved one."""
    saved = dict(no_draft=True) | saved  # as runs were before there was the flag
    requested, saved = (
        json.loads(json.dumps(d | dict(data=data_name(str(d.get("data"))))))  # tuples as lists
        for d in (requested, saved)
    )
    return "; ".join(
        f"{flag_of(key)} {saved.get(key)!r}, not {value!r}"
        for key, value in comparable_settings(requested).items()
        if value != saved.get(key) and (key in saved or value)  # a flag newer than the run
    )


def load_finished_results(args: Namespace) -> dict | None:
    """results.json of args.out, or None; SystemExit if it was made with other settings.

    Unlike an unfinished run, a finished one is not taken for one of another precision.
    """
    path = Path(args.out) / "results.json"
    if not path.exists():
        return None
    results = load_json(path)
    check_same_settings(args, results["settings"], "is finished")
    if (precision := results["settings"].get("precision", args.precision)) != args.precision:
        raise SystemExit(
            f"{args.out} is finished with --precision {precision}, not {args.precision}. "
            f"Choose another --out, or give --precision {precision}"
        )
    return results


def check_run_dir(args: Namespace) -> None:
    """SystemExit unless args.out is free, or holds this very run, unfinished, to be resumed."""
    run_dir = Path(args.out)
    if load_finished_results(args) is not None:
        raise SystemExit(
            f"{run_dir} is finished, see {run_dir / 'results.json'}; --eval {run_dir} tests it "
            "again, another --out starts anew"
        )
    if (run_dir / "config.json").exists():
        check_same_settings(args, load_json(run_dir / "config.json")["settings"], "was started")
    elif run_dir.exists():
        names = {p.name for p in run_dir.iterdir() if p.suffix != ".part"}
        if unknown := sorted(names - {*RUN_FILES}):
            raise SystemExit(
                f"{run_dir} is not empty and is not a run folder (it holds {unknown[0]}); "
                "choose another --out"
            )


@contextlib.contextmanager
def lock_run_dir(args: Namespace) -> Iterator[None]:
    """Make the folder, check that it may be written, and refuse a second process that writes it.

    The lock is the system's, on the folder itself: a killed run leaves none behind. Windows has no
    such lock. A folder in which nothing was written is removed again.
    """
    if not is_main():
        check_run_dir(args)
        yield
        return
    run_dir = Path(args.out)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        folder = os.open(run_dir, os.O_RDONLY) if fcntl else None
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(13, "no permission to write", str(run_dir))
    except OSError as error:
        raise SystemExit(f"--out {run_dir}: {error}; choose another --out") from error
    try:
        if fcntl:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise SystemExit(
            f"{run_dir}: another process is writing this run; wait for it, or choose another --out"
        ) from None
    try:
        check_run_dir(args)
        for path in run_dir.rglob("*.part"):  # of a killed process
            path.unlink()
        yield
    finally:
        if fcntl:
            os.close(folder)
        with contextlib.suppress(OSError):  # it holds files, as it should
            run_dir.rmdir()


def split_digests(task: data.Task) -> dict[str, str]:
    """sha256 of the paths and labels of each part, of its images' bytes ("train files"), of all
    images ("images", see digest_images), of the ranks, of labels in bins."""
    real, samples = task.real_labels, {part: getattr(task, part) for part in data.PARTS}
    lines = {part: (f"{path} {label}" for path, label in samples[part]) for part in data.PARTS}
    lines["names"] = task.rank_names  # of which the values follow
    lines["labels"] = (repr(real[path]) for part in data.PARTS if real for path, _ in samples[part])
    digests = {name: hashlib.sha256() for name in lines}
    for name, digest in digests.items():
        for i, line in enumerate(lines[name]):
            digest.update((f"\n{line}" if i else line).encode())
    more = {f"{part} files": digest for part, digest in task.file_digests.items()}
    more["images"] = task.images_digest
    return {name: digest.hexdigest() for name, digest in digests.items()} | more


def digest_images(task: data.Task) -> str:
    """128 bits, in hex, of the paths and labels of all parts together, which folds share."""
    total = 0
    for part in data.PARTS:
        for path, label in getattr(task, part):
            line = f"{path} {label}".encode("utf-8", "surrogatepass")
            total += int.from_bytes(hashlib.blake2b(line, digest_size=16).digest(), "big")
    return f"{total % 2**128:032x}"


def weights_digests(args: Namespace) -> dict[str, str]:
    """{flag: sha256 of its files}, of the flags that name a file or folder."""
    digests = {}
    for flag in WEIGHTS:
        if value := getattr(args, flag[2:].replace("-", "_")):
            path = Path(value).expanduser()
            files = [path, path / "best.pt"]  # --init RUN
            if flag == "--clip":
                files += sorted(path.glob("*.bin")) + sorted(path.glob("*.safetensors"))
            parts = [file_digest(f, f.stat().st_mtime_ns) for f in files if f.is_file()]
            if parts:
                digests[flag] = hashlib.sha256("".join(parts).encode()).hexdigest()
    return digests


def saved_digests(content: dict) -> dict[str, str]:
    """Of config.json, results.json or a checkpoint; earlier versions called them splits."""
    return content.get("digests") or content.get("splits") or {}


def check_same_weights(args: Namespace) -> None:
    """SystemExit if weights files that a run of a sweep started from have changed since."""
    path = Path(args.out) / "config.json"
    saved = saved_digests(load_json(path)) if path.exists() else {}
    for flag, digest in weights_digests(args).items():
        if saved.get(flag, digest) != digest:
            raise SystemExit(
                f"{args.out}: the file of {flag} changed since the run started; restore it, or "
                "start new runs with another --out"
            )


@functools.lru_cache
def file_digest(path: Path, mtime_ns: int) -> str:
    """sha256; mtime_ns: so that a file that was replaced is read again."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_same_images(args: Namespace, task: data.Task, saved: dict | None = None) -> None:
    """SystemExit if images or ranks are not those of config.json, or of `saved`, a checkpoint.

    Runs of earlier versions lack some digests.
    """
    path = Path(args.out) / "config.json"
    if saved is None:
        saved = load_json(path) if path.exists() else {}
    saved = saved_digests(saved)
    digests = split_digests(task) if saved else {}
    changed = [name for name, digest in digests.items() if saved.get(name, digest) != digest]
    if changed:
        words = dict(names="the ranks, their names or order,", labels="the labels in the bins")
        words["images"] = "the list of all images"
        parts = [part for part in changed if part in data.PARTS]
        files = f"pixels of {' and '.join(changed).replace(' files', '')} images"
        what = (
            f"the list of {' and '.join(parts)} images" if parts else words.get(changed[0], files)
        )
        raise SystemExit(
            f"{args.out}: {what} changed since the run started; "
            "restore what it was, or start a new run with another --out"
        )


def write_config(run: Run) -> None:
    """config.json and splits/: what the run is, before it starts."""
    if is_main() and not (run.dir / "config.json").exists():
        run.task.write_lists(run.dir / "splits")
        config = dict(settings=settings_dict(run.args), protocol=run.task.protocol)
        config |= dict(digests=run.digests, **provenance())
        save_json(run.dir / "config.json", config)


# --- files ---


def save_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1) + "\n"
    data.atomic_write(path, lambda tmp_path: tmp_path.write_text(text, encoding="utf-8"))


def load_json(path: Path) -> dict:
    """config.json or results.json; SystemExit if it is damaged: both hold an object "settings"."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
            raise ValueError("it holds no 'settings'")
    except ValueError as error:
        raise SystemExit(
            f"{path} is damaged ({error}); restore it, or move it away and repeat the command of "
            "the run"
        ) from error
    return content


def save_csv(path: Path, rows: list[dict]) -> None:
    """Rows with all their keys as columns; what a row lacks, or None, is an empty cell."""

    def save(tmp_path: Path) -> None:
        with open(tmp_path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, {key: None for row in rows for key in row})
            table.writeheader()
            table.writerows(rows)

    data.atomic_write(path, save)


def read_log(run_dir: Path) -> list[dict[str, float]]:
    """Rows of log.csv as numbers; [] where nothing was trained. SystemExit: it is damaged."""
    if not (run_dir / "log.csv").exists():
        return []
    with open(run_dir / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return [{k: float(v or math.nan) for k, v in row.items()} for row in rows]
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{run_dir / 'log.csv'} is damaged ({error}); restore it") from error


# --- what a figure depends on beside the settings ---


def provenance() -> dict[str, Any]:
    """commit (None without git), versions, GPU and number of processes."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # git is not installed
        commit = None
    return dict(
        commit=commit,
        torch=str(torch.__version__),
        python=platform.python_version(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        processes=world_size(),
    )


def peak_memory(device: str) -> float:
    """MB: of the GPU's allocator, or of this process (nan where the system does not say)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
