"""pytest tests/test_report.py -- tables of finished runs beside the paper's figures."""

import csv
import json
import shutil

import pytest
from conftest import TINY

import train
from evaluation import report
from evaluation.report import write_report


def write_run(run_dir, mae, num_test=1098, test=(), **settings):
    """A run of an earlier version: without the metrics that were added later, but those in test."""
    base = dict(data="morph2", category=None, label_rule=None, split="random", method="ordinalclip", interp="linear",
                base_ranks=3, rank_position="tail", tune="both", freeze_image=False, official=False, context=None, shots=None, shift=None,
                seed=1, fold=0, lr=1e-4, regression_loss="l1",
                clip="RN50", image_encoder="vgg16", image_weights="imagenet")  # fmt: skip
    figures = dict(mae_expected=mae, mae_argmax=mae + 0.1, acc_argmax=0.5, cs_expected=0.9, qwk_expected=0.8)  # fmt: skip
    results = dict(images=dict(train=3955, val=439, test=num_test), test=figures | dict(test), ordinality=0.9, commit="abc",
                   seconds=3, protocol="a protocol", majority=dict(rank="31", mae=7.0, acc=0.25), settings=base | settings)  # fmt: skip
    run_dir.mkdir(parents=True)
    (run_dir / "results.json").write_text(json.dumps(results))


def test_the_report_has_the_papers_layout(tmp_path, capsys):
    for seed, mae in ((1, 2.0), (27, 2.5), (42, 3.0)):
        write_run(tmp_path / f"a{seed}", mae, seed=seed)
    write_run(tmp_path / "b", 4.0, shots=4)
    write_run(tmp_path / "c", 5.0, method="coop", interp="none")
    write_run(tmp_path / "d", 6.0, shift=[10, 0.2])
    text = train.main(["--report", str(tmp_path)])
    assert text in capsys.readouterr().out and (tmp_path / "report.md").read_text() == text
    lines = text.splitlines()
    assert lines[4] == "| method | all | 4 shots | shift 10-80 |"
    cells = "2.500 ± 0.500 (n=3) [2.32] | 4.000 (n=1) [3.55] | 6.000 (n=1) [2.61]"
    assert lines[7] == f"| ordinalclip-linear-K3 | {cells} |"
    assert lines[6] == "| coop | 5.000 (n=1) [2.39] | - [3.81] | - [2.71] |"
    details = (
        "seed 27, fold 0, image encoder vgg16, clip RN50, commit abc, 3 s, always '31' MAE 7.000"
    )
    assert f"- [a27](a27/results.json): {details} accuracy 25.0%; a protocol" in lines
    titles = "Cumulative score CS(5), expected rank, %", "Quadratic weighted kappa, expected rank"
    assert {*titles} <= {*lines}


@pytest.mark.parametrize("seeds", [(1, 2), (2, 1)])
def test_flags_newer_than_a_run_are_unset_in_it(tmp_path, seeds):
    """They neither end the report nor join runs that differ in them, whichever is read first."""
    newer = dict(ema=None, no_draft=True, patience=None)
    write_run(tmp_path / "a", 2.0, seed=seeds[0])
    write_run(tmp_path / "b", 3.0, seed=seeds[1], **newer)
    assert "| 2.500 ± 0.707 (n=2) [2.32] |" in write_report([tmp_path])
    write_run(tmp_path / "0", 4.0, seed=3, **newer | dict(ema=0.9))
    text = write_report([tmp_path])
    assert "| ordinalclip-linear-K3 ema=0.9 | 4.000 (n=1)" in text
    assert "| ordinalclip-linear-K3 ema=None | 2.500 ± 0.707 (n=2)" in text


def test_a_run_repeated_with_newer_metrics_is_the_same_run(tmp_path):
    write_run(tmp_path / "a", 2.0)
    write_run(tmp_path / "b", 2.0, test=dict(mae_value=20.0))
    text = write_report([tmp_path])
    assert "2.000 (n=1)" in text and "so the same run" in text


def test_a_seed_that_counts_twice_and_other_code_are_named(tmp_path):
    for i, (seed, commit) in enumerate([(1, "abc"), (1, "abc"), (2, "abc-dirty")]):
        write_run(tmp_path / str(i), 2.0 + i, seed=seed)
        path = tmp_path / str(i) / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(commit=commit)))
    lines = write_report([tmp_path]).splitlines()
    cell = "- ordinalclip-linear-K3, all"
    assert f"{cell}: 2 runs of seed 1, fold 0, all counted" in lines
    assert f"{cell}: runs of different commit: abc, abc-dirty" in lines
    assert not any("processes" in line for line in lines)


def test_folds_of_other_images_are_not_averaged(tmp_path):
    for fold, digest in enumerate(("a", "a", "b")):
        write_run(tmp_path / str(fold), 2.0 + fold, fold=fold)
        path = tmp_path / str(fold) / "results.json"
        digests = dict(images=digest, train=f"of fold {fold}")
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(digests=digests)))
    text = write_report([tmp_path])
    assert "2.500 ± 0.707 (n=2)" in text and "4.000 (n=1)" in text
    for fold in range(2):  # of the newer images, too: two rows, not one for each fold
        write_run(tmp_path / f"new {fold}", 5.0 + fold, fold=fold)
        path = tmp_path / f"new {fold}" / "results.json"
        digests = dict(images="b", train=f"newer, of fold {fold}")
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(digests=digests)))
    text = write_report([tmp_path])
    assert "2.500 ± 0.707 (n=2)" in text and "5.000 ± 1.000 (n=3)" in text
    write_run(tmp_path / "moved", 9.0, fold=0)  # the same images, in other parts
    path = tmp_path / "moved" / "results.json"
    digests = dict(images="a", train="others of fold 0")
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(digests=digests)))
    assert "9.000 (n=1)" in write_report([tmp_path])


def test_a_folder_of_runs_is_as_its_runs(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", 2.0)
    write_run(tmp_path / "runs" / "several" / "b", 3.0, seed=2)
    for folder in ("unfinished", "several/unfinished"):
        (tmp_path / "runs" / folder).mkdir()
        (tmp_path / "runs" / folder / "config.json").write_text("{}")
    (tmp_path / "runs" / "notes").mkdir()
    text = write_report([tmp_path / "runs"])
    assert "2.500 ± 0.707 (n=2)" in text and "notes" not in text
    for folder in ("unfinished", "several/unfinished"):
        assert f"- left out {tmp_path / 'runs' / folder}: not finished" in text.splitlines()


def test_a_run_within_a_finished_run_is_not_another_one(tmp_path):
    """Such as a copy of an earlier state, kept in the folder of the run."""
    write_run(tmp_path / "a", 2.0)
    write_run(tmp_path / "a/before", 4.0)
    for path in (tmp_path, tmp_path / "a"):
        assert "| ordinalclip-linear-K3 | 2.000 (n=1) [2.32] |" in write_report([path])
    assert "4.000 (n=1)" in write_report([tmp_path / "a/before"])


def test_a_report_that_cannot_be_written_is_printed(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "a", 2.0)

    def refuse(path, save):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(report.data, "atomic_write", refuse)
    with pytest.raises(SystemExit, match="the report is not written: .*Permission denied: '.*/re"):
        write_report([tmp_path / "a"])
    out = capsys.readouterr().out
    assert "2.000 (n=1)" in out and "written to" not in out


def test_few_shot_runs_of_folds_of_other_images_are_not_averaged(gray, tmp_path):
    folder = shutil.copytree(gray, tmp_path / "gray")
    argv = ["--data", str(folder), *TINY, "--shots", "2", "--out"]
    for fold in ("0", "1"):
        train.main([*argv, str(tmp_path / "runs" / fold), "--fold", fold])
    (tmp_path / "runs" / "1" / "results.json").unlink()
    train.main(["--resume", str(tmp_path / "runs" / "1")])  # reads only the drawn images
    assert "(n=2)" in write_report([tmp_path / "runs"])
    for path in sorted((folder / "1 gray").iterdir())[:3]:
        path.unlink()
    train.main([*argv, str(tmp_path / "runs" / "2"), "--fold", "2"])
    text = write_report([tmp_path / "runs"])
    assert "(n=2)" in text and "(n=1)" in text and "(n=3)" not in text


def test_a_run_that_may_not_be_read_is_left_out(tmp_path, monkeypatch):
    write_run(tmp_path / "a", 2.0)
    write_run(tmp_path / "b", 3.0, seed=2)
    read_text = report.Path.read_text

    def refuse(path, *args, **options):
        if path.parent.name == "b" and path.name == "results.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **options)

    monkeypatch.setattr(report.Path, "read_text", refuse)
    text = write_report([tmp_path])
    assert "2.000 (n=1)" in text and "b/results.json: damaged (PermissionError: " in text


def test_runs_on_other_pixels_are_not_averaged(tmp_path):
    for seed, digest in ((1, "a"), (2, "a"), (3, "b")):
        write_run(tmp_path / str(seed), 2.0 + seed, seed=seed)
        path = tmp_path / str(seed) / "results.json"
        splits = {part: "lists" for part in ("train", "val", "test")}
        splits |= {f"{part} files": digest for part in ("train", "val", "test")}
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(digests=splits)))
    text = write_report([tmp_path])
    assert " inputs=" in text and "3.500 ± 0.707 (n=2)" in text and "5.000 (n=1)" in text


@pytest.mark.parametrize(
    "settings",
    [
        dict(split="subject-exclusive"), dict(rank_position="front"), dict(context="years:"),
        dict(train_list="train.txt"), dict(image_encoder="clip"), dict(image_weights="none"),
        dict(clip="ViT-B/32"), dict(num_test=100),
    ],
)  # fmt: skip
def test_the_papers_figure_needs_the_papers_protocol_encoder_and_data(tmp_path, settings):
    write_run(tmp_path / "a", 2.0, **settings)
    text = write_report([tmp_path])
    assert "| 2.000 (n=1) |" in text and "[2.32]" not in text


@pytest.mark.parametrize("name, one, other", [("lr", 1e-4, 1e-3), ("precision", "fp32", "bf16")])
def test_runs_that_differ_are_not_averaged(tmp_path, name, one, other):
    write_run(tmp_path / "a", 2.0, **{name: one})
    write_run(tmp_path / "b", 4.0, seed=2, **{name: other})
    text = write_report([tmp_path])
    assert f"| ordinalclip-linear-K3 {name}={one} | 2.000 (n=1) |" in text
    assert f"| ordinalclip-linear-K3 {name}={other} | 4.000 (n=1) |" in text


def test_a_clip_is_named_only_where_one_is_loaded(tmp_path):
    write_run(tmp_path / "a", 2.0, method="linear")
    text = write_report([tmp_path])
    assert "image encoder vgg16, " in text and "clip RN50" not in text
    write_run(tmp_path / "b", 2.0, method="linear", image_encoder="clip")
    assert "image encoder clip, clip RN50, " in write_report([tmp_path / "b"])


def test_runs_on_other_images_are_not_averaged(gray, tmp_path):
    folder, out = shutil.copytree(gray, tmp_path / "gray"), tmp_path / "runs"
    argv = ["--data", str(folder), *TINY, "--method", "linear", "--seeds"]
    train.main([*argv, "1", "--out", str(out)])
    shutil.copytree(folder / "0 gray", folder / "4 gray")
    with pytest.raises(SystemExit, match="seed1: .*train and val and test images changed since"):
        train.main([*argv, "1", "2", "--out", str(out)])
    assert len([*out.glob("*/results.json")]) == 1  # before any other run
    train.main([*argv, "2", "3", "--out", str(tmp_path / "others")])
    lines = write_report([out, tmp_path / "others"]).splitlines()
    table = lines[lines.index("MAE, most probable rank") + 4 :][:2]
    assert [line.count("(n=1)") for line in table] == [0, 1]
    assert [line.count("(n=2)") for line in table] == [1, 0]
    assert all(line.startswith("| linear inputs=") for line in table)


def test_a_copy_of_a_run_is_not_a_second_run(finished_run, tmp_path):
    for name in ("a", "copy"):
        shutil.copytree(finished_run[0], tmp_path / name)
    text = write_report([tmp_path / "a", tmp_path / "copy"])
    assert "(n=1)" in text and "(n=2)" not in text
    path = tmp_path / "copy" / "results.json"
    same = f"the settings, seed, fold and figures of {tmp_path / 'a'}"
    assert text.endswith(f"- left out {path}: {same}, so the same run")


def test_folders_without_a_finished_run_are_named(tmp_path):
    write_run(tmp_path / "a", 2.0)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    results = tmp_path / "a" / "results.json"
    paths = {tmp_path / "none": "no such folder", tmp_path / "unfinished": "not finished"}
    paths |= {
        tmp_path / "empty": "no finished run",
        results: f"a file; give its folder, {tmp_path / 'a'}",
    }
    text = write_report([tmp_path / "a", *paths])
    for path, why in paths.items():
        assert f"- left out {path}: {why}" in text.splitlines()
        with pytest.raises(SystemExit, match=f"no finished run in .*\n- left out {path}: {why}$"):
            write_report([path])


@pytest.mark.parametrize(
    "table, data, column, row, figure",
    [
        (report.PAPER_MAE, "morph2", "all", "ordinalclip-inverse-K7", "2.35"),
        (report.PAPER_MAE, "morph2", "all", "ordinalclip-linear-K9", "2.41"),
        (report.PAPER_MAE, "morph2", "all", "coop-tune-rank-random-context", "2.58"),
        (report.PAPER_MAE, "morph2", "all", "ordinalclip-linear-K3-tune-context", "2.34"),
        (report.PAPER_MAE, "morph2", "64 shots", "ordinalclip-linear-K3", "2.57"),
        (report.PAPER_MAE, "morph2", "shift 40-90", "linear", "3.65"),
        (report.PAPER_ACC, "adience", "all", "zeroshot", "25.4 ± 3.5"),
        (report.PAPER_MAE, "hci", "all", "coop", "0.76 ± 0.06"),
        (report.PAPER_ACC, "aesthetics", "people", "zeroshot", "24.79"),
        (report.PAPER_MAE, "aesthetics", "animal", "linear", "0.381"),
    ],
)
def test_the_papers_figures_are_where_they_belong(table, data, column, row, figure):
    """A few read off the tables again."""
    assert table[data][column][row] == figure


@pytest.mark.parametrize(
    "figures", [report.PAPER_MAE["aesthetics"], report.PAPER_ACC["aesthetics"]]
)
def test_the_papers_overall_is_the_mean_of_its_categories(figures):
    categories = ("nature", "animal", "urban", "people")
    assert list(figures) == [*categories, "overall"]
    for row, overall in figures["overall"].items():
        mean = sum(float(figures[category][row]) for category in categories) / 4
        assert abs(mean - float(overall)) < (0.011 if float(overall) > 1 else 0.0011), (
            row
        )  # as rounded in print


def test_aesthetics_is_one_table_with_the_categories_and_their_mean(tmp_path):
    maes = dict(nature=(0.1, 0.3), animal=(0.2, 0.4), urban=(0.3, 0.3), people=(0.6, 0.8))
    for category, (first, second) in maes.items():
        for fold, mae in enumerate((first, second)):
            shared = dict(data="aesthetics", label_rule="median", category=category)
            write_run(tmp_path / f"{category}{fold}", mae, fold=fold, **shared)
            if (category, fold) != ("people", 1):
                write_run(
                    tmp_path / f"coop-{category}{fold}",
                    mae + 1,
                    fold=fold,
                    method="coop",
                    interp="none",
                    **shared,
                )
    write_run(tmp_path / "few", 3.0, shots=4, **shared)
    write_run(tmp_path / "whole", 4.0, data="aesthetics", label_rule="median", category="all")
    lines = write_report([tmp_path]).splitlines()
    assert [line for line in lines if line.startswith("## ")] == ["## aesthetics median random"]
    assert (
        lines[4]
        == "| method | all categories | nature | animal | urban | people | overall | people 4 shots |"
    )
    rows = {
        cells[1]: cells[2:-1]
        for cells in ([word.strip() for word in line.split("|")] for line in lines[6:8])
    }
    assert rows["ordinalclip-linear-K3"] == [
        "4.000 (n=1)", "0.200 ± 0.141 (n=2) [0.273]", "0.300 ± 0.141 (n=2) [0.279]", "0.300 ± 0.000 (n=2) [0.277]",
        "0.700 ± 0.141 (n=2) [0.291]", "0.375 ± 0.106 (n=2) [0.280]", "3.000 (n=1)"]  # fmt: skip
    assert rows["coop"][4:6] == [
        "1.600 (n=1) [0.330]",
        "1.300 (n=1) [0.302]",
    ]  # fold 1 lacks people


def test_a_run_named_twice_counts_once(tmp_path):
    write_run(tmp_path / "a", 2.0)
    assert "(n=1)" in write_report([tmp_path, tmp_path / "a"])


def test_a_damaged_run_is_named_and_the_others_are_reported(tmp_path):
    write_run(tmp_path / "a", 2.0)
    for name, text in (("b", "{"), ("c", "{}"), ("d", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    text = write_report([tmp_path])
    assert "| ordinalclip-linear-K3 | 2.000 (n=1)" in text
    for name in "bcd":
        assert f"- left out {tmp_path / name / 'results.json'}: damaged (" in text
    with pytest.raises(SystemExit, match="no finished run in .*\n- left out .*damaged"):
        write_report([tmp_path / "b"])


def test_an_undefined_metric_is_left_open(tmp_path):
    write_run(tmp_path / "a", 2.0, test=dict(qwk_expected=None))
    table = write_report([tmp_path]).split("Quadratic weighted kappa")[1].split("\n\n")[1]
    assert table.endswith("| - |")


def test_runs_of_earlier_versions_lack_newer_metrics(tmp_path):
    newer = dict(rps_probs=1.25, amae_argmax=None)
    write_run(tmp_path / "a", 2.0)
    write_run(tmp_path / "b", 3.0, method="coop", interp="none", test=newer)
    tables = write_report([tmp_path]).split("\n\n")
    by_title = dict(zip(tables[1::2], tables[2::2]))
    rows = by_title["Ranked probability score, of the whole distribution"].splitlines()[2:]
    assert rows == ["| coop | 1.250 (n=1) |", "| ordinalclip-linear-K3 | - |"]
    rows = by_title["Average MAE over ranks, most probable rank"].splitlines()[2:]
    assert rows == ["| coop | - |", "| ordinalclip-linear-K3 | - |"]


def test_a_run_without_mae_is_damaged(tmp_path):
    write_run(tmp_path / "a", 2.0)
    path = tmp_path / "a" / "results.json"
    results = json.loads(path.read_text())
    del results["test"]["mae_argmax"]
    path.write_text(json.dumps(results))
    with pytest.raises(SystemExit, match=r"damaged \(KeyError: 'mae_argmax'\)"):
        write_report([tmp_path])


def test_the_csv_has_a_row_per_run(tmp_path, finished_run, capsys):
    write_run(tmp_path / "runs" / "a", 2.0)
    write_run(tmp_path / "runs" / "b", 3.0, seed=2, shift=[10, 0.2])
    shutil.copytree(finished_run[0], tmp_path / "runs" / "c, d")
    write_report([tmp_path / "runs"])
    assert "runs/report.md and report.csv" in capsys.readouterr().out
    with open(tmp_path / "runs" / "report.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert len(set(header)) == len(header) and [len(row) for row in rows] == [len(header)] * 3
    first, second, third = (dict(zip(header, row)) for row in rows)
    assert [first["run"], second["run"], third["run"]] == ["a", "b", "c, d"]
    assert first["table"] == "morph2 random" and first["row"] == "ordinalclip-linear-K3"
    assert second["column"] == "shift 10-80" and second["seed"] == "2"
    assert float(second["test_mae_argmax"]) == 3.1 and second["val_mae_argmax"] == ""
    assert second["test_rps_probs"] == "" and second["majority_mae"] == "7.0"
    test, val = finished_run[1]["test"], finished_run[1]["val"]
    assert {f"test_{name}" for name in test} | {f"val_{name}" for name in val} <= set(header)
    for name, value in test.items():
        assert third[f"test_{name}"] == ("" if value is None else str(value)), name
    assert float(third["val_rps_probs"]) == val["rps_probs"] and third["images_test"] == "8"
