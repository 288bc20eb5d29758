"""pytest tests/test_train.py -- whole runs: what they leave, resume, evaluation, every method."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_MODEL, tiny_run
from PIL import Image

import data
import predict
import train
from ordinalclip import OrdinalCLIP
from training import sweep
from training.methods import LossModule

ROOT = Path(__file__).parents[1]


def test_a_run_leaves_what_it_promises(finished_run, stripes):
    out, results = finished_run
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "splits", "log.csv", "last.pt", "best.pt", "exported.pt",
                     "results.json", "predictions-best.csv", "pictures"}  # fmt: skip
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["lr"] == 0.002 and config["settings"]["interp"] == "linear"
    assert config["torch"] == str(torch.__version__) and "64 train" in config["protocol"]
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert math.isclose(float(row["loss"]), float(row["i2t"]) + float(row["t2i"]), rel_tol=1e-4)
        assert float(row["images_per_s"]) > 0 and float(row["peak_mb"]) > 0
    assert float(rows[0]["lr"]) == 0.002 and float(rows[2]["lr"]) < 0.001


def test_splits_are_disjoint_and_predictions_are_of_the_test_images(finished_run, stripes):
    out, results = finished_run
    parts = [data.read_list(out / "splits" / f"{part}.txt", stripes) for part in data.PARTS]
    assert [len(part) for part in parts] == [64, 8, 8]
    assert len({sample.path for part in parts for sample in part}) == 80
    rows = list(csv.DictReader(open(out / "predictions-best.csv")))
    assert [row["path"] for row in rows] == [sample.path for sample in parts[2]]
    wrong = [abs(int(row["rank"][0]) - int(row["label"][0])) for row in rows]
    assert results["test"]["mae_argmax"] == pytest.approx(sum(wrong) / 8)
    expected = [abs(float(row["expected_rank_index"]) + 1 - int(row["label"][0])) for row in rows]
    assert results["test"]["mae_expected"] == pytest.approx(sum(expected) / 8, abs=1e-3)


def test_the_best_epoch_is_chosen_by_validation(finished_run):
    out, results = finished_run
    rows = list(csv.DictReader(open(out / "log.csv")))
    best = min(rows, key=lambda row: float(row["val_mae_argmax"]))
    saved = torch.load(out / "best.pt", weights_only=True)
    assert saved["epoch"] == int(best["epoch"])
    assert results["val"]["mae_argmax"] == pytest.approx(float(best["val_mae_argmax"]))


def test_the_exported_file_has_no_text_tower_and_is_plain_tensors(finished_run):
    out, results = finished_run
    exported = torch.load(out / "exported.pt", weights_only=True)
    assert exported["rank_names"] == [f"{i} stripes" for i in (1, 2, 3, 4)]
    assert exported["state_dict"]["prototypes.prototypes"].shape == (4, 128)
    assert not any("token_embedding" in k or "context_embeds" in k for k in exported["state_dict"])
    assert exported["preprocess"]["mean"] == data.CLIP_MEAN
    assert (out / "exported.pt").stat().st_size < 7e6  # the vocabulary alone would be 25 MB


def test_eval_repeats_the_result(finished_run, tmp_path):
    out = shutil.copytree(finished_run[0], tmp_path / "run")
    results = finished_run[1]
    again = train.main(["--eval", str(out / "best.pt"), "--workers", "0"])
    assert again["test"] == results["test"] and again["protocol"] == results["protocol"]
    assert json.loads((out / "eval-best.json").read_text())["test"] == results["test"]
    assert (out / "predictions-eval-best.csv").read_bytes() == (
        out / "predictions-best.csv"
    ).read_bytes()


def test_a_resumed_run_ends_like_an_uninterrupted_one(finished_run, stripes, tmp_path, monkeypatch):
    whole, results = finished_run
    epoch = train.train_one_epoch

    def stop_before_the_third(*args):
        if args[-1] == 3:
            raise KeyboardInterrupt
        return epoch(*args)

    monkeypatch.setattr(train, "train_one_epoch", stop_before_the_third)
    with pytest.raises(KeyboardInterrupt):
        train.main(["--data", str(stripes), "--out", str(tmp_path / "b"), *TINY, "--epochs", "3"])
    monkeypatch.setattr(train, "train_one_epoch", epoch)
    resumed = train.main(["--resume", str(tmp_path / "b")])
    assert resumed["test"] == results["test"] and resumed["protocol"] == results["protocol"]
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (whole, tmp_path / "b"))
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert [row["loss"] for row in a["log"]] == [row["loss"] for row in b["log"]]


@pytest.mark.parametrize(
    "options, trained",
    [
        (["--method", "coop"], "prototypes.rank_embeds"),
        (["--method", "linear"], "prototypes.weight"),
        (["--interp", "inverse", "--base-ranks", "2", "--context", "4", "--rank-position", "front",
          "--rank-init", "names"], "prototypes.context_embeds"),
    ],
)  # fmt: skip
def test_every_method_trains(stripes, tmp_path, options, trained):
    out = tmp_path / "run"
    train.main(["--data", str(stripes), "--out", str(out), *TINY, *options])
    state = torch.load(out / "best.pt", weights_only=True)["model"]
    start = tiny_run(stripes, *options).model.state_dict()
    assert not torch.equal(state[trained], start[trained])
    assert not any(key.startswith("prototypes.text") for key in state)


def test_zero_shot_needs_no_training(stripes, tmp_path):
    results = train.main(
        ["--data", str(stripes), "--method", "zeroshot", "--out", str(tmp_path / "z"), *TINY_MODEL]
    )
    assert not (tmp_path / "z" / "log.csv").exists() and 0 <= results["test"]["mae_argmax"] <= 3


def test_zero_shot_says_its_prompt(gray, tmp_path, capsys):
    argv = ["--data", str(gray), *TINY_MODEL, "--method", "zeroshot", "--context", "a shade of"]
    train.main([*argv, "--out", str(tmp_path / "z")])
    out = capsys.readouterr().out
    assert "prompt of the first rank: 'a shade of 0 gray.'" in out and "trains nothing\n" in out
    assert "clip tiny   trains" in out
    assert (
        json.loads((tmp_path / "z" / "results.json").read_text())["prompt"] == "a shade of 0 gray."
    )


def test_zero_shot_with_another_runs_tower_asks_in_words(stripes, finished_run, tmp_path):
    argv = ["--data", str(stripes), *TINY_MODEL, "--method", "zeroshot"]
    results = train.main([*argv, "--init", str(finished_run[0]), "--out", str(tmp_path / "z")])
    assert results["prompt"] == "the rank of the image is 1 stripes."


def test_regression_runs_and_learns(gray, tmp_path):
    out = tmp_path / "regression"
    results = train.main(
        ["--data", str(gray), *TINY, "--method", "regression", "--epochs", "4", "--out", str(out)]
    )
    assert results["ordinality"] is None
    rows = list(csv.DictReader(open(out / "predictions-best.csv")))
    answers = predict.load(out / "exported.pt")([gray / row["path"] for row in rows])
    assert answers["name"] == [row["rank"] for row in rows]
    expected = [float(row["expected_rank_index"]) for row in rows]
    assert answers["expected"].tolist() == pytest.approx(expected, abs=2e-4)
    log = torch.load(out / "last.pt", weights_only=True)["log"]
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize(
    "tune, learnt", [("rank", {"rank_embeds"}), ("context", {"context_embeds"})]
)
def test_prompt_ablations_train_what_they_say(gray, tmp_path, tune, learnt):
    start = tiny_run(gray, "--tune", tune).model.state_dict()
    train.main(["--data", str(gray), *TINY, "--tune", tune, "--out", str(tmp_path / "run")])
    end = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"]
    moved = {
        key.split(".")[1]
        for key in start
        if key.startswith("prototypes.") and not torch.equal(start[key], end[key])
    }
    assert moved == learnt


@pytest.mark.parametrize("num_folds", [2, pytest.param(5, marks=pytest.mark.full)])
def test_seeds_and_folds_are_one_command_and_finished_runs_are_read(
    gray, tmp_path, monkeypatch, capsys, num_folds
):
    monkeypatch.setattr(sweep, "OWN_DATA_FOLDS", num_folds)
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "runs")]
    argv += ["--seeds", "1", "27", "--fold", "all"]
    results = train.main(argv)
    assert [(r["settings"]["fold"], r["settings"]["seed"]) for r in results] == [
        (fold, seed) for fold in range(num_folds) for seed in (1, 27)
    ]
    assert results[0]["protocol"] == results[1]["protocol"]  # seeds share the split, folds do not
    assert results[0]["protocol"] != results[2]["protocol"]
    assert results[0]["test"] != results[1]["test"]
    values = [r["test"]["mae_argmax"] for r in results]
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    assert f"{mean:.3f} ± {deviation:.3f} (n={2 * num_folds})" in capsys.readouterr().out
    (tmp_path / "runs" / "gray-ordinalclip-linear-K3-fold1-seed27" / "results.json").unlink()
    trained, run = [], train.train
    monkeypatch.setattr(
        train, "train", lambda args: trained.append((args.fold, args.seed)) or run(args)
    )
    again = train.main(argv)
    assert trained == [(1, 27)]  # and it goes on from its last.pt, where nothing is left to train
    assert [r["test"] for r in again] == [r["test"] for r in results]
    with pytest.raises(SystemExit, match="is finished with other settings: --lr 0.002, not 0.5"):
        train.main([*argv, "--lr", "0.5"])


def test_the_report_of_a_sweep_has_all_its_seeds(gray, tmp_path, capsys):
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "runs"), "--seeds"]
    train.main([*argv, "1", "2"])
    shutil.copytree(
        tmp_path / "runs" / "gray-ordinalclip-linear-K3-seed1",
        tmp_path / "runs" / "gray-ordinalclip-linear-K3-seed1-try2",
    )
    train.main([*argv, "3"])
    assert "(n=3)" in next((tmp_path / "runs").glob("report-*.md")).read_text()


def test_few_shot_and_shift_reach_the_training(gray, tmp_path):
    few = train.main(["--data", str(gray), *TINY, "--out", str(tmp_path / "few"), "--shots", "2"])
    assert few["images"] == dict(train=8, val=7, test=7)
    assert len((tmp_path / "few" / "splits" / "train.txt").read_text().splitlines()) == 8
    assert (
        train.main(["--eval", str(tmp_path / "few"), "--workers", "0"])["images"] == few["images"]
    )
    thin = train.main(
        ["--data", str(gray), *TINY, "--out", str(tmp_path / "thin"), "--shift", "1,0.2"]
    )
    assert thin["images"]["train"] == 30 and thin["settings"]["shift"] in ((1, 0.2), [1, 0.2])


def test_a_default_written_out_is_the_same_experiment(gray, tmp_path):
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "runs"), "--seeds", "1"]
    assert train.main(argv)[0]["test"] == train.main([*argv, "--split", "random"])[0]["test"]
    args = train.parse_args(["--data", "aesthetics"])
    assert (args.split, args.label_rule, args.category) == ("random", "median", "all")


def test_official_takes_its_column_target(gray, tmp_path, monkeypatch):
    targets, loss = [], OrdinalCLIP.loss

    def spy(self, *args, **options):
        targets.append(options["target"])
        return loss(self, *args, **options)

    monkeypatch.setattr(OrdinalCLIP, "loss", spy)
    train.main(["--data", str(gray), *TINY, "--out", str(tmp_path / "o"), "--official"])
    assert set(targets) == {"softmax10"}
    train.main(["--data", str(gray), *TINY, "--out", str(tmp_path / "p")])
    assert set(targets) == {"softmax10", "normalized"}


def test_an_interrupted_run_says_how_to_go_on(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "main", interrupted)
    with pytest.raises(
        SystemExit,
        match="interrupted; the same command, or --resume RUN, resumes from what was saved",
    ):
        train.cli()


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--data", "morph2", "--data-root", "{tmp}/none"],
            "MORPH(.|\n)*morph_2008_nonCommercial.csv",
        ),
        (["--data", "{stripes}", "--clip", "ViT-Z"], "no weights at 'ViT-Z'; expected one of RN50"),
        (["--eval", "{stripes}/1 stripes/image 0.png"], "cannot be read"),
    ],
)
def test_mistakes_are_told_plainly(stripes, tmp_path, capsys, argv, message):
    argv = [word.format(tmp=tmp_path, stripes=stripes) for word in argv]
    if "--eval" not in argv:
        argv = [*TINY, "--out", str(tmp_path / "out"), *argv]
    with pytest.raises(SystemExit, match=message):
        train.main(argv)
    assert not (tmp_path / "out").exists()  # nothing begun
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match=message):
        train.main([*argv, "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_weights_that_are_not_finite_stop_the_run(stripes, tmp_path):
    message = (
        "the model's predictions are not finite: its weights hold nan or inf; try a lower --lr"
    )
    argv = ["--data", str(stripes), *TINY, "--lr", "1000", "--out", str(tmp_path / "n")]
    with pytest.raises(SystemExit, match="train.py: " + message):
        train.main(argv)
    with pytest.raises(FloatingPointError, match=message):
        train.main([*argv, "--debug"])


def test_a_loss_that_is_not_finite_is_named_and_the_last_checkpoint_stays(
    stripes, tmp_path, monkeypatch
):
    forward, calls = LossModule.forward, []

    def diverge(self, images, labels):
        total, i2t, t2i = forward(self, images, labels)
        calls.append(1)
        return (total, i2t, t2i * math.nan) if len(calls) > 5 else (total, i2t, t2i)

    monkeypatch.setattr(LossModule, "forward", diverge)
    argv = ["--data", str(stripes), *TINY, "--epochs", "2", "--out", str(tmp_path / "n")]
    with pytest.raises(SystemExit, match="t2i is nan in epoch 2, by step 4; try a lower --lr"):
        train.main(argv)
    saved = torch.load(tmp_path / "n" / "last.pt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_the_demo_command_of_the_readme_at_toy_size(tmp_path):
    assert "train.py --data demo\n" in (ROOT / "README.md").read_text()
    data.make_demo(tmp_path / "demo", (60, 30, 30))
    train.main(["--data", "demo", "--data-root", str(tmp_path / "demo"), "--epochs", "1", "--workers", "0",
                "--out", str(tmp_path / "run")])  # fmt: skip
    assert json.loads((tmp_path / "run" / "results.json").read_text())["images"]["train"] == 60


def test_the_morph_command_of_the_readme_at_toy_size(tmp_path):
    assert "train.py --data morph2 --interp linear\n" in (ROOT / "README.md").read_text()
    root, header = (
        tmp_path / "morph",
        "id_num,picture_num,dob,doa,race,gender,facial_hair,age,age_diff,glasses,photo",
    )
    (root / "Album2").mkdir(parents=True)
    rows = [header]
    for i in range(40):
        age, name = 16 + i, f"Album2/{i:06d}_1M{16 + i}.JPG"
        Image.new("RGB", (80, 96), (i, 99, 200)).save(root / name, "JPEG")
        rows.append(f"{i:06d},1,01/01/1950,01/01/2000,W,M,0,{age},0,0,{name}")
    (root / "morph_2008_nonCommercial.csv").write_text("\n".join(rows) + "\n")
    argv = ["--data", "morph2", "--interp", "linear", "--data-root", str(root), "--epochs", "1"]
    results = train.main([*argv, "--out", str(tmp_path / "run"), *TINY])
    assert results["images"]["test"] == 8 and results["settings"]["weight_decay"] == 5e-4
