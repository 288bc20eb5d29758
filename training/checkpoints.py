"""Checkpoints: last.pt, from which a run is resumed, and best.pt, the best epoch by validation MAE.

Needs: data, clip_weights, training.distributed, .optim, .run_folder.
"""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
from clip_weights import check_finite, load_file
from training.distributed import is_main
from training.optim import build_average, build_optimizer, build_schedule, epochs_without_progress
from training.run_folder import Run, check_same_images, check_same_settings, save_csv, settings_dict


def save_checkpoint(path: Path, model: nn.Module, args: Namespace, **more: Any) -> None:
    """Model, settings and `more`; written by the main process only."""
    if is_main():
        content = dict(model=model.state_dict(), settings=settings_dict(args), **more)
        data.atomic_write(path, lambda tmp_path: torch.save(content, tmp_path))


ENTRIES = dict(  # of last.pt; best.pt holds the first three
    model=dict, settings=dict, epoch=int, log=list, seconds=(int, float), optimizer=dict,
    schedule=dict, scaler=dict, progress=(dict, type(None)), average=(dict, type(None)),
    initial_similarity=(Tensor, type(None)), digests=dict,
)  # fmt: skip
PROGRESS = {"steps", "loss_sums", "rng"}  # within an epoch
NEEDED_TO_RESUME = tuple(k for k in ENTRIES if k not in ("progress", "average", "digests"))


def load_checkpoint(path: str | Path, *needed: str) -> dict[str, Any]:
    """The checkpoint at path, on the CPU.

    SystemExit if it is none or another's, lacks a key of `needed`, or holds nan or inf.
    """
    if not Path(path).is_file():
        raise SystemExit(f"no checkpoint at {path}; give a run's folder, or a best.pt or last.pt")
    try:
        saved = load_file(path, "last.pt or best.pt of a run")
        saved = saved if isinstance(saved, dict) else {}
        for key in needed:
            if key not in saved:
                raise ValueError(
                    f"{path} is no checkpoint of this script for that use: it holds no {key!r}"
                )
        for key, types in ENTRIES.items():
            if key in saved and not isinstance(saved[key], types):
                got = type(saved[key]).__name__
                raise ValueError(f"{path} is no checkpoint of this script: {key} of type {got}")
        for key, value in saved.get("model", {}).items():
            if not torch.is_tensor(value):
                got = type(value).__name__
                raise ValueError(f"{path}: {key} of the model is of type {got}; expected a tensor")
        if "log" in needed:
            rows = sum(isinstance(row, dict) for row in saved["log"])
            if rows != saved["epoch"] or not set(saved.get("progress") or PROGRESS) == PROGRESS:
                raise ValueError(
                    f"{path} is damaged: {rows} rows of its log, epoch {saved['epoch']}, progress "
                    f"with {', '.join(map(str, saved.get('progress') or {})) or 'nothing'}"
                )
        check_finite(saved.get("model", {}), str(path))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    return saved


def load_last(run: Run) -> dict[str, Any] | None:
    """last.pt, its weights loaded into the model; None where there is none.

    SystemExit if it is of another run: config.json, which was compared before, may be deleted.
    """
    path = run.dir / "last.pt"
    if not path.exists():
        return None
    saved = load_checkpoint(path, *NEEDED_TO_RESUME)
    check_same_settings(run.args, saved["settings"], "was started")
    check_same_images(run.args, run.task, saved)
    load_state(run.model, saved["model"], path)
    check_best(run.dir / "best.pt", saved["log"])
    return saved


def check_best(path: Path, log: list[dict[str, float]]) -> None:
    """SystemExit if best.pt is not of the best epoch of the log of last.pt, as in a copy of a run.

    It may be of the epoch after them: interrupted between the two, that epoch is repeated.
    """
    best = len(log) - epochs_without_progress(log)
    epoch = load_checkpoint(path).get("epoch") if log and path.exists() else None
    if log and epoch not in (best, len(log) + 1):
        got = "is missing" if epoch is None else f"is of epoch {epoch}"
        raise SystemExit(
            f"{path} {got}, but the best epoch of last.pt is {best}; restore it, or remove last.pt "
            "to train again"
        )


def load_checkpoint_weights(model: nn.Module, path: str | Path) -> None:
    """The weights of the checkpoint at path into the model; SystemExit if it is of another one."""
    load_state(model, load_checkpoint(path, "model")["model"], path)


def load_state(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """model.load_state_dict(state); SystemExit if the checkpoint at path is of another model."""
    try:
        model.load_state_dict(state)
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"{path} is of another model: {reason:.300}") from error


class TrainingState:
    """Optimizer, schedule, scaler, average, log, where in the epoch: last.pt beside the model."""

    def __init__(self, run: Run, start_time: float, initial_similarity: Tensor | None) -> None:
        """initial_similarity (R, R): of the prototypes before training, for a picture."""
        args = run.args
        self.run, self.start_time = run, start_time
        self.initial_similarity = initial_similarity
        self.optimizer = build_optimizer(args, run.model)
        self.schedule = build_schedule(args, self.optimizer)
        device, use_scaler = args.device.split(":")[0], args.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device, enabled=use_scaler)
        self.average = build_average(args, run.model)
        self.log: list[dict[str, float]] = []  # one row per complete epoch
        self.progress: dict[str, Any] | None = None  # steps, loss sums, RNG of an interrupted epoch
        self.last_save = time.time()

    def load(self, saved: dict[str, Any]) -> None:
        for name in ("optimizer", "schedule", "scaler", "average"):
            part, state = getattr(self, name), saved.get(name) or {}
            source = f"{self.run.dir / 'last.pt'}: its {name}"
            if name == "schedule" and state.keys() != part.state_dict().keys():
                raise SystemExit(f"{source} holds {', '.join(map(str, state)) or 'nothing'}")
            if part and (state or name != "scaler"):  # which is empty without --precision fp16
                load_state(part, state, source)
        self.log, self.progress = saved["log"], saved.get("progress")
        self.save_log()  # it is written after last.pt

    def save_log(self) -> None:
        if self.log and is_main():
            save_csv(self.run.dir / "log.csv", self.log)

    def step(self) -> None:
        """One step of the optimizer with the gradients of the last batches; clears them."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update_parameters(self.run.model)

    def save(self, progress: dict[str, Any] | None = None) -> None:
        """Write last.pt after a complete epoch, or within one after progress["steps"] steps."""
        save_checkpoint(
            self.run.dir / "last.pt",
            self.run.model,
            self.run.args,
            epoch=len(self.log),
            log=self.log,
            progress=progress,
            initial_similarity=self.initial_similarity,
            digests=self.run.digests,
            seconds=time.time() - self.start_time,
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            scaler=self.scaler.state_dict(),
            average=self.average and self.average.state_dict(),
        )
        self.last_save = time.time()

    def is_save_due(self) -> bool:
        """--save-every minutes have passed since the last one; only on the main process."""
        return is_main() and time.time() - self.last_save >= 60 * self.run.args.save_every

    def save_within_epoch(self, steps: int, loss_sums: Tensor) -> None:
        rng = [torch.get_rng_state()]
        if self.run.args.device.startswith("cuda"):
            rng.append(torch.cuda.get_rng_state(self.run.args.device))
        self.save(dict(steps=steps, loss_sums=loss_sums.cpu(), rng=rng))

    def restore_progress(self, loss_sums: Tensor) -> int:
        """Steps of this epoch that were done before an interruption, restored with their losses."""
        if not self.progress:
            return 0
        steps, rng = self.progress["steps"], self.progress["rng"]
        loss_sums += self.progress["loss_sums"].to(loss_sums.device)
        torch.set_rng_state(rng[0])
        if self.run.args.device.startswith("cuda") and len(rng) > 1:
            torch.cuda.set_rng_state(rng[1], self.run.args.device)
        self.progress = None
        return steps
