"""pytest tests/test_evaluate.py -- the pictures of runs and evaluations."""

import shutil

import numpy as np
import torch
import torch.nn.functional as F
from conftest import TINY, TINY_MODEL
from PIL import Image

import data
import train
from evaluation.evaluate import best_and_worst


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
        assert np.array_equal(drawn, again), (
            name
        )  # the state before training comes back from the seed


def test_a_baseline_without_prototypes_or_training_draws_what_it_has(gray, tmp_path):
    for method, missing in (("regression", "similarity"), ("zeroshot", "curves")):
        out = tmp_path / method
        tiny = TINY if method == "regression" else TINY_MODEL
        train.main(["--data", str(gray), *tiny, "--method", method, "--out", str(out)])
        assert (
            len(list((out / "pictures").iterdir())) == 5
            and not (out / "pictures" / f"{missing}.png").exists()
        )


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
