"""pytest tests/test_options.py -- flags, defaults, combinations without effect, runs of a sweep."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY
from processes import run_script

import train
from training import sweep

ROOT = Path(__file__).parents[1]


def test_help_names_every_flag():
    process = run_script(["train.py", "--help"], ROOT)
    for flag in ("--data --data-root --method --interp --base-ranks --context --rank-position --clip "
                 "--image-encoder --epochs --batch-size --lr --weight-decay --seed --device --precision "
                 "--out --resume --eval").split():  # fmt: skip
        assert flag in process.stdout, flag
    assert "(default: 100; demo:" in process.stdout


def test_own_images_with_a_clip_get_its_image_tower(gray):
    for data_set, flags, encoder in (
        (str(gray), ["--clip", "tiny"], "clip"),
        (str(gray), [], "vgg16"),
        (str(gray), ["--clip", "RN50", "--image-encoder", "vgg16"], "vgg16"),
        ("morph2", ["--clip", "RN50"], "vgg16"),
    ):
        assert train.parse_args(["--data", data_set, *flags]).image_encoder == encoder


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
    with pytest.raises(SystemExit, match="seed27 was started with other settings: --lr 0.002, not"):
        train.main([*argv, "1", "27", "--lr", "0.1"])
    assert not list((tmp_path / "runs").glob("*seed1"))


def test_one_run_of_several_is_resumed_alone(gray, tmp_path):
    argv = ["--data", str(gray), *TINY, "--seeds", "1", "27", "--shift", "1,0.5"]
    results = train.main([*argv, "--out", str(tmp_path / "runs")])[1]
    run_dir = next((tmp_path / "runs").glob("*seed27"))
    for names in (["results.json"], ["results.json", "log.csv", "last.pt", "best.pt"]):
        for name in names:  # the second time config.json alone has its settings
            (run_dir / name).unlink()
        assert train.main(["--resume", str(run_dir)])["test"] == results["test"]
    assert len([*tmp_path.rglob("config.json")]) == 2


def test_each_group_is_left_out_with_each_number_of_shots(gray):
    argv = ["--data", str(gray), *TINY, "--label-pattern", r"(?P<group>\d)(?P<label>\d)"]
    argv += ["--split", "leave-one-group-out", "--fold", "all", "--shots", "1", "2"]
    runs = sweep.expand_runs(train.parse_args(argv))
    assert [(run.fold, run.shots) for run in runs] == [
        (fold, shots) for fold in range(3) for shots in (1, 2)
    ]


def test_a_row_of_a_table_is_one_command(monkeypatch):
    calls = []
    monkeypatch.setattr(
        train,
        "train",
        lambda args: calls.append((args.shots, args.shift, args.seed, Path(args.out).name)),
    )
    reports, loaded = [], []
    monkeypatch.setattr(
        sweep, "load_task", lambda run: loaded.append(run.shots) or SimpleNamespace(num_ranks=101)
    )
    monkeypatch.setattr(train, "write_report", lambda runs, name: reports.append(name))
    train.main(["--data", "morph2", "--base-ranks", "2", "9"])
    assert [run[3] for run in calls] == [f"morph2-ordinalclip-linear-K{k}-seed1" for k in (2, 9)]
    assert reports.pop() == "report-morph2-ordinalclip-linear-K2-9.md"
    calls.clear()
    train.main(["--data", "morph2", "--shots", "1", "4", "--seeds", "1", "27"])
    assert [run[:3] for run in calls] == [(1, None, 1), (1, None, 27), (4, None, 1), (4, None, 27)]
    assert loaded[2:] == [1, 4]  # once for all seeds, of which none has started
    calls.clear()
    train.main(["--data", "morph2", "--method", "coop", "--shift", "10,0.2", "40,0.1"])
    assert calls == [
        (None, (10, 0.2), 1, "morph2-coop-shift10-0.2-seed1"),
        (None, (40, 0.1), 1, "morph2-coop-shift40-0.1-seed1"),
    ]
    alone = train.parse_args(
        ["--data", "morph2", "--shots", "4", "--shift", "10,0.2", "--base-ranks", "5"]
    )
    assert (alone.shots, alone.shift, alone.base_ranks) == (4, (10, 0.2), 5) and not sweep.is_sweep(
        alone
    )


def test_category_each_runs_all_four_and_refuses_other_data(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        train, "train", lambda args: calls.append((args.category, args.fold, args.seed, args.out))
    )
    monkeypatch.setattr(train, "write_report", lambda runs, name: calls.append(name))
    monkeypatch.setattr(sweep, "load_task", lambda run: SimpleNamespace(num_ranks=5))
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
