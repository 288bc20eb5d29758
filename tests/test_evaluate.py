"""pytest tests/test_evaluate.py -- the pictures of runs and evaluations."""

import json
import math
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from conftest import TINY, TINY_MODEL
from PIL import Image

import data
import train
from evaluation.evaluate import best_and_worst
from evaluation.metrics import METRICS
from training.run_folder import read_log


def test_every_run_and_every_evaluation_draws_its_pictures(finished_run, tmp_path):
    out = shutil.copytree(finished_run[0], tmp_path / "run")
    names = {"similarity", "confusion", "distribution", "error", "sheet", "curves"}
    assert {path.stem for path in (out / "pictures").glob("*.png")} == names
    train.main(["--eval", str(out), "--workers", "0"])
    for name in names:
        drawn, again = (
            Image.open(out / folder / f"{name}.png")
            for folder in ("pictures", "pictures-eval-best")
        )
        assert drawn.width >= 500 and len(drawn.convert("L").getcolors()) > 10, name
        assert np.array_equal(drawn, again), name  # what was before training comes from the seed


def test_a_baseline_without_prototypes_or_training_draws_what_it_has(gray, tmp_path):
    for method, missing in (("regression", "similarity"), ("zeroshot", "curves")):
        out = tmp_path / method
        tiny = TINY if method == "regression" else TINY_MODEL
        train.main(["--data", str(gray), *tiny, "--method", method, "--out", str(out)])
        names = {path.stem for path in (out / "pictures").iterdir()}
        assert len(names) == 5 and missing not in names


def test_the_sheet_shows_the_nearest_and_the_farthest(gray):
    task = data.load(gray)
    labels = torch.tensor([sample.label for sample in task.test])
    probs = F.one_hot(labels, 4).float()
    probs[2] = torch.eye(4)[3 - labels[2]]  # one is wrong by 1 or 3
    best, worst = best_and_worst(task, dict(image_size=96), probs, labels, count=1)
    name = task.rank_names
    assert worst[1][0][1] == f"expected {name[3 - labels[2]]}\ntrue {name[labels[2]]}"
    rank, true = best[1][0][1].split("\n")
    assert rank.removeprefix("expected ") == true.removeprefix("true ")


def test_every_metric_is_printed_logged_and_saved(gray, tmp_path, capsys):
    out = tmp_path / "run"
    test = train.main(["--data", str(gray), *TINY, "--out", str(out)])["test"]
    printed = capsys.readouterr().out.replace("\n", "   ")
    header, row = (out / "log.csv").read_text().splitlines()
    for name, metric in METRICS.items():
        keys = [f"{name}_{answer}" for answer in metric.computed]
        texts = [
            "-" if test[k] is None else format(round(test[k], 4) + 0.0, metric.format) for k in keys
        ]
        if len(keys) > 1:
            texts = [f"{text} {answer}" for text, answer in zip(texts, metric.computed)]
        assert f" {metric.label} {' '.join(texts)}   " in printed
        assert {f"val_{key}" for key in keys} <= set(header.split(","))
    assert set(test) == set(json.loads((out / "results.json").read_text())["test"])
    assert len(row.split(",")) == len(header.split(","))


def test_a_run_of_an_earlier_version_goes_on_with_newer_metrics(gray, tmp_path):
    out = tmp_path / "run"
    argv = ["--data", str(gray), *TINY, "--epochs", "2", "--out", str(out)]
    train.main(argv)
    saved = torch.load(out / "last.pt", weights_only=True)
    whole = (out / "log.csv").read_text().splitlines()
    del saved["log"][0]["val_rps_probs"], saved["log"][1]
    saved["epoch"] = 1
    torch.save(saved, out / "last.pt")
    (out / "results.json").unlink()
    train.main(argv)
    first, second = read_log(out)
    assert math.isnan(first["val_rps_probs"]) and second["val_rps_probs"] > 0
    assert set(first) == set(second) == set(whole[0].split(","))
