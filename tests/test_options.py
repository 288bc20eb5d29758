"""pytest tests/test_options.py -- flags, defaults, combinations without effect, runs of a sweep."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, TINY_MODEL

import train
from training.options import is_sweep

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("argv, message", [
    (["--lr", "0.1", "--resume", "x"], "--lr: settings come from the checkpoint"),
    (["--methodd", "coop"], "unrecognized arguments: --methodd"),
    (["--interp", "cubic"], "invalid choice: 'cubic'"),
])  # fmt: skip
def test_wrong_flags_are_refused_by_the_parser(capsys, argv, message):
    with pytest.raises(SystemExit):
        train.parse_args(argv)
    assert message in capsys.readouterr().err


def test_help_names_every_flag():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    for flag in ("--data --data-root --method --interp --base-ranks --context --rank-position --clip "
                 "--image-encoder --epochs --batch-size --lr --weight-decay --seed --device --precision "
                 "--out --resume --eval").split():  # fmt: skip
        assert flag in done.stdout, flag
    assert "(default: 100; demo:" in done.stdout


@pytest.mark.parametrize("argv, message", [
    (["--report", "x", "--lr", "1"], "--report takes no other flag"),
    (["--seed", "1", "--seeds", "1", "2"], "--seed and --seeds: give one of them"),
    (["--fold", "some"], "'some': expected a number from 0, or all"),
    (["--fold", "²"], "'²': expected a number from 0, or all"),
    (["--resume", ""], "--resume is empty"),
    (["--shift", "ten"], "'ten': expected K,KEEP such as 10,0.2"),
])  # fmt: skip
def test_wrong_flags_are_refused(capsys, argv, message):
    with pytest.raises(SystemExit):
        train.parse_args(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--freeze-image", "--image-encoder", "vgg16"], "--freeze-image needs --image-encoder clip"),
    (["--shots", "0"], "--shots 0: expected 1 .. "),
    (["--base-ranks", "2", "9"], "--base-ranks 9, but .* has 4 ranks; give fewer"),
    (["--shots", "1", "-1"], "--shots -1: expected 1 .. "),
    (["--method", "coop", "--base-ranks", "2", "4"], "--base-ranks has no effect with --method coop"),
    (["--method", "linear", "--interp", "inverse"], "--interp has no effect with --method linear"),
    (["--method", "regression", "--tune", "rank"], "--tune has no effect with --method regression"),
    (["--train-list", "x.txt", "--fold", "all"], "--fold has no effect with --data .* and its lists; remove it"),
    (["--epochs", "0"], "--epochs 0: expected 1 .. 1000000; --method zeroshot does without"),
    (["--base-ranks", "4", "1"], "with 1 base rank every interpolated rank is the same vector"),
    (["--method", "zeroshot", "--image-encoder", "vgg16"], "--method zeroshot needs --image-encoder clip"),
    (["--method", "coop", "--interp", "inverse"], "--interp inverse has no effect with --method coop"),
    (["--lr", "nan"], "--lr nan: expected 1e-12 .. 1000.0"),
    (["--lr", "inf"], "--lr inf: expected"),
    (["--lr", "-1"], "--lr -1.0: expected"),
    (["--weight-decay", "-5"], "--weight-decay -5.0: expected 0 .. "),
    (["--batch-size", "0"], "--batch-size 0: expected 1 .. "),
    (["--workers", "-1"], "--workers -1: expected 0 .. "),
    (["--workers", "999"], "--workers 999: expected 0 .. "),
    (["--seed", "99999999999999999999"], "--seed 99999999999999999999: expected 0 .. 4294967295"),
    (["--seeds", "1", "1"], "--seeds names a value twice: 1-1; name each once"),
    (["--save-every", "nan"], "--save-every nan: expected 0 .. "),
    (["--device", "cuda:7"], r"--device cuda:7: this machine has \d+ CUDA device"),
    (["--device", "gpu"], "--device 'gpu': expected cpu, cuda or cuda:N"),
    (["--device", "meta"], "--device meta: expected cpu, cuda or cuda:N"),
    (["--init", ""], "--init is empty; give a value, or leave it out"),
    (["--report", "none"], "no results.json in none"),
])  # fmt: skip
def test_mistakes_are_told_plainly(gray, tmp_path, argv, message):
    tiny = TINY_MODEL if "zeroshot" in argv else TINY
    first = [] if "--report" in argv else ["--data", str(gray), *tiny, "--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit, match=message):
        train.main([*first, *argv])


def test_folds_of_a_given_split_are_refused(gray, tmp_path):
    for part in ("train", "val", "test"):
        for rank in range(4):
            folder = tmp_path / "own" / part / f"{rank} gray"
            shutil.copytree(gray / f"{rank} gray", folder)
    argv = ["--data", str(tmp_path / "own"), *TINY, "--out", str(tmp_path / "o")]
    for flags in (["--fold", "1"], ["--split-seed", "2"], ["--fold", "all"]):
        with pytest.raises(
            SystemExit, match="no effect with .*own, which has one split of its own"
        ):
            train.main([*argv, *flags])
    assert not list((tmp_path / "o").rglob("*.pt"))


def test_a_later_run_of_a_sweep_is_checked_before_the_first(gray, tmp_path):
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "runs"), "--seeds"]
    train.main([*argv, "27"])
    next((tmp_path / "runs").glob("*seed27/results.json")).unlink()
    with pytest.raises(SystemExit, match="seed27 was begun with other settings: --lr 0.002, not"):
        train.main([*argv, "1", "27", "--lr", "0.1"])
    assert not list((tmp_path / "runs").glob("*seed1"))


def test_a_row_of_a_table_is_one_command(monkeypatch):
    calls = []
    monkeypatch.setattr(
        train,
        "train",
        lambda args: calls.append((args.shots, args.shift, args.seed, Path(args.out).name)),
    )
    reports = []
    monkeypatch.setattr(train, "load_task", lambda run: SimpleNamespace(num_ranks=101))
    monkeypatch.setattr(train, "write_report", lambda runs, name: reports.append(name))
    train.main(["--data", "morph2", "--base-ranks", "2", "9"])
    assert [run[3] for run in calls] == [f"morph2-ordinalclip-linear-K{k}-seed1" for k in (2, 9)]
    assert reports.pop() == "report-morph2-ordinalclip-linear-K2-9.md"
    calls.clear()
    train.main(["--data", "morph2", "--shots", "1", "4", "--seeds", "1", "27"])
    assert [run[:3] for run in calls] == [(1, None, 1), (1, None, 27), (4, None, 1), (4, None, 27)]
    calls.clear()
    train.main(["--data", "morph2", "--method", "coop", "--shift", "10,0.2", "40,0.1"])
    assert calls == [
        (None, (10, 0.2), 1, "morph2-coop-shift10-0.2-seed1"),
        (None, (40, 0.1), 1, "morph2-coop-shift40-0.1-seed1"),
    ]
    alone = train.parse_args(
        ["--data", "morph2", "--shots", "4", "--shift", "10,0.2", "--base-ranks", "5"]
    )
    assert (alone.shots, alone.shift, alone.base_ranks) == (4, (10, 0.2), 5) and not is_sweep(alone)


def test_category_each_runs_all_four_and_refuses_other_data(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        train, "train", lambda args: calls.append((args.category, args.fold, args.seed, args.out))
    )
    monkeypatch.setattr(train, "write_report", lambda runs, name: calls.append(name))
    monkeypatch.setattr(train, "load_task", lambda run: SimpleNamespace(num_ranks=5))
    train.main(["--data", "aesthetics", "--category", "each", "--fold", "all", "--seed", "3"])
    names = ["nature", "animal", "urban", "people"]
    assert [run[:3] for run in calls[:-1]] == [
        (name, fold, 3) for fold in range(5) for name in names
    ]
    assert calls[1][3] == str(Path("runs/aesthetics-animal-ordinalclip-linear-K3-seed3"))
    assert (
        len({run[3] for run in calls[:-1]}) == 20
        and calls[-1] == "report-aesthetics-each-ordinalclip-linear-K3-foldall.md"
    )
    with pytest.raises(SystemExit, match="--category each: hci has no categories; leave it out"):
        train.main(["--data", "hci", "--category", "each"])
