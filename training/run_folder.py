"""The folder of a run: its name, checkpoints, json and csv files, and whether it may be written.

runs/NAME/ holds config.json, splits/*.txt, log.csv, last.pt, best.pt, exported.pt, results.json,
predictions-best.csv and pictures/*.png. Every file is written under a temporary name and moved.

Needs: data (for atomic_write), training.distributed.
"""

import csv
import json
import math
import platform
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import data
from ordinalclip import OrdinalCLIP
from training.distributed import is_main, world_size

RUN_FILES = (
    "config.json", "splits", "log.csv", "best.pt", "best.pt.part", "predictions-best.csv",
    "pictures", "exported.pt",
)  # fmt: skip
# Settings that do not change the result: ignored when two runs are compared.
NOT_COMPARED = ("device", "precision", "workers", "data_root", "out", "seeds")


class Run(NamedTuple):
    """One run: its settings, images and ranks, model, and how images are prepared."""

    args: Namespace
    task: data.Task
    model: nn.Module
    preprocess: dict[str, Any]  # image_size, mean, std, perhaps squash and resample

    @property
    def dir(self) -> Path:
        return Path(self.args.out)


# --- names ---


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def run_name(args: Namespace) -> str:
    return f"{table_name(args)}-seed{args.seed}"


def table_name(args: Namespace) -> str:
    """Run name without the seed."""
    preset = data.DATASETS.get(args.data, {})
    default_split = preset.get("splits", ("random",))[0]
    default_rule = preset.get("label_rules", (None,))[0]
    shifts = ["{}-{:g}".format(*shift) for shift in as_list(args.shift)] if args.shift else []
    parts = [
        Path(args.data).name,
        args.category,
        method_name(args),
        args.split if args.split != default_split else None,
        args.label_rule if args.label_rule != default_rule else None,
        f"split{args.split_seed}" if args.split_seed != 1 else None,
        "shots" + join_values(args.shots) if args.shots else None,
        "shift" + "+".join(shifts) if args.shift else None,
        f"fold{args.fold}" if args.fold else None,
    ]
    return "-".join(part for part in parts if part)


def method_name(args: Namespace) -> str:
    """Method part of the run name: the row of the run in a report."""
    is_ordinalclip = args.method == "ordinalclip"
    words = args.context and not args.context.isdigit()
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
    return {key: v for key, v in vars(args).items() if key not in ("resume", "eval", "report")}


def comparable_settings(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key not in NOT_COMPARED}


def load_finished_results(args: Namespace) -> dict | None:
    """results.json of args.out, or None; SystemExit if it was made with other settings."""
    path = Path(args.out) / "results.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    check_same_settings(args, results)
    if is_main():
        print(f"{args.out}: already finished, reading results.json")
    return results


def check_same_settings(args: Namespace, results: dict) -> None:
    requested = comparable_settings(json.loads(json.dumps(settings_dict(args))))
    saved = comparable_settings(results["settings"])
    if differing := [key for key in requested if requested[key] != saved.get(key)]:
        raise SystemExit(
            f"{args.out} is finished, but with another --{differing[0].replace('_', '-')}: "
            f"{saved.get(differing[0])!r}, not {requested[differing[0]]!r}; give another --out"
        )


def check_run_dir_is_free(args: Namespace) -> None:
    run_dir = Path(args.out)
    finished = (run_dir / "results.json").exists()
    if finished and args.resume:
        raise SystemExit(
            f"{run_dir} is finished, see {run_dir}/results.json; --eval tests it again"
        )
    if args.resume:
        return
    if finished:
        check_same_settings(args, json.loads((run_dir / "results.json").read_text()))
        raise SystemExit(
            f"{run_dir} holds a finished run; --eval {run_dir} tests it again, "
            "--out starts anew elsewhere"
        )
    if (run_dir / "last.pt").exists():
        raise SystemExit(
            f"{run_dir} holds a run; --resume {run_dir} goes on with it, "
            "--out elsewhere starts anew"
        )
    if run_dir.exists():
        unknown = sorted({path.name for path in run_dir.iterdir()} - set(RUN_FILES))
        if unknown:
            raise SystemExit(
                f"{run_dir} is not empty and is not a run folder (it holds {unknown[0]}); "
                "choose another --out"
            )


# --- files ---


def save_checkpoint(path: Path, model: nn.Module, args: Namespace, **more: Any) -> None:
    """Model, settings and `more`; written by the main process only."""
    if is_main():
        content = dict(model=model.state_dict(), settings=settings_dict(args), **more)
        data.atomic_write(path, lambda tmp_path: torch.save(content, tmp_path))


def load_checkpoint(path: str | Path, needed: str) -> dict[str, Any]:
    """The checkpoint at path, on the CPU. SystemExit if it is none or lacks the key `needed`."""
    if not Path(path).is_file():
        raise SystemExit(f"no checkpoint at {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own
        raise SystemExit(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(saved, dict) or needed not in saved:
        raise SystemExit(
            f"{path} is no checkpoint of this script for that use: it holds no {needed!r}"
        )
    return saved


def export_model(path: Path, run: Run, results: dict) -> None:
    """Image encoder, prototypes and what is needed to use them: no text tower, no vocabulary."""
    exported: OrdinalCLIP = run.model.export()
    content = dict(
        format="ordinalclip-1",
        image_encoder=run.args.image_encoder,
        quick_gelu=any(type(m).__name__ == "QuickGELU" for m in exported.image_encoder.modules()),
        state_dict=exported.state_dict(),
        rank_names=list(run.task.rank_names),
        rank_values=list(run.task.rank_values),
        preprocess=run.preprocess,
        results=results,
    )
    data.atomic_write(path, lambda tmp_path: torch.save(content, tmp_path))


def save_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1) + "\n"
    data.atomic_write(path, lambda tmp_path: tmp_path.write_text(text))


def save_csv(path: Path, rows: list[dict]) -> None:
    def save(tmp_path: Path) -> None:
        with open(tmp_path, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)

    data.atomic_write(path, save)


def read_log(run_dir: Path) -> list[dict[str, float]]:
    """Rows of log.csv as numbers; [] where nothing was trained."""
    if not (run_dir / "log.csv").exists():
        return []
    with open(run_dir / "log.csv", newline="") as file:
        return [{key: float(v) for key, v in row.items()} for row in csv.DictReader(file)]


# --- what a figure depends on beside the settings ---


def provenance() -> dict[str, Any]:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return dict(
        commit=git.stdout.strip() or None,
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
