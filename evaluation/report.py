"""Finished runs as Markdown tables, method x column, beside the paper's figures, and as CSV.

Read write_report first; METRICS says which tables there are, PAPER_MAE, PAPER_ACC the paper's.
Needs: data, training.methods, training.options, training.run_folder, evaluation.metrics.
"""

import hashlib
import json
import os
import re
import statistics
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import data
from evaluation.metrics import METRICS
from training.methods import METHODS
from training.options import PAPER
from training.run_folder import comparable_settings, method_name, save_csv
from training.sweep import categories


def shots_label(shots: int) -> str:
    return f"{shots} shot" + "s" * (shots > 1)


def paper_row(rows: Iterable[str], figures: Iterable, digits: int = 2) -> dict[str, str]:
    """{row: figure as the paper prints it}; of a pair the second is the deviation over folds."""
    pairs = (figure if isinstance(figure, tuple) else (figure,) for figure in figures)
    texts = (" ± ".join(f"{number:.{digits}f}" for number in pair) for pair in pairs)
    return dict(zip(rows, texts))


# The paper's tables, {data: {column: {row: figure}}}; it does not say whether its MAE is that of
# the expected rank or of the argmax. All: xk-huang/OrdinalCLIP, branch gh-pages, images/image*.png.
ORDINALCLIP_ROW = "ordinalclip-linear-K3"
OVERALL = "overall"  # the paper's plain mean over the categories
TUNE_ROWS = (
    "tune-rank-random-context", "tune-context-random-context", "random-context", "tune-rank",
    "tune-context",
)  # fmt: skip
METHOD_ROWS = ("linear", "zeroshot", "coop", ORDINALCLIP_ROW)
FEW_ROWS = ("linear", "coop", ORDINALCLIP_ROW)
PAPER_MAE = {
    "morph2": {
        "all": {
            **paper_row(METHOD_ROWS, (2.63, 14.45, 2.39, 2.32)),
            **paper_row([f"ordinalclip-linear-K{k}" for k in (2, 4, 5, 6, 7, 8, 9)],
                        (2.38, 2.38, 2.36, 2.39, 2.38, 2.40, 2.41)),
            **paper_row([f"ordinalclip-inverse-K{k}" for k in range(2, 10)],
                        (2.39, 2.38, 2.39, 2.40, 2.39, 2.35, 2.38, 2.38)),
            **paper_row([f"coop-{tune}" for tune in TUNE_ROWS], (2.58, 2.44, 2.39, 2.41, 2.39)),
            **paper_row([f"{ORDINALCLIP_ROW}-{tune}" for tune in TUNE_ROWS],
                        (2.38, 2.37, 2.36, 2.34, 2.34)),
        },
        **{shots_label(shots): paper_row(FEW_ROWS, maes) for shots, *maes in (
            (1, 8.04, 5.09, 4.94), (2, 6.00, 4.50, 4.36), (4, 4.66, 3.81, 3.55),
            (8, 3.91, 3.57, 3.31), (16, 3.57, 3.23, 3.07), (32, 3.06, 2.87, 2.76),
            (64, 2.84, 2.61, 2.57))},
        **{f"shift {ranks}-{removed}": paper_row(FEW_ROWS, maes) for ranks, removed, *maes in (
            (10, 80, 2.88, 2.71, 2.61), (10, 90, 2.98, 2.85, 2.67), (20, 80, 3.46, 2.98, 2.77),
            (20, 90, 3.68, 3.51, 3.06), (30, 80, 3.19, 3.06, 2.86), (30, 90, 4.06, 3.36, 3.21),
            (40, 80, 3.28, 2.99, 2.84), (40, 90, 3.65, 3.30, 3.12))},
    },
    "adience": {"all": paper_row(
        METHOD_ROWS, ((0.56, 0.09), (1.50, 0.20), (0.50, 0.08), (0.47, 0.06)))},
    "hci": {"all": paper_row(
        METHOD_ROWS, ((0.80, 0.03), (1.48, 0.03), (0.76, 0.06), (0.67, 0.03)))},
    "aesthetics": {category: paper_row(METHOD_ROWS, maes, 3) for category, *maes in (
        ("nature", .338, .438, .285, .273), ("animal", .381, .737, .298, .279),
        ("urban", .364, .683, .294, .277), ("people", .377, 1.063, .330, .291),
        ("overall", .365, .730, .302, .280))},
}  # fmt: skip
PAPER_ACC = {
    "adience": {"all": paper_row(
        METHOD_ROWS, ((56.0, 5.9), (25.4, 3.5), (60.6, 5.5), (61.2, 4.2)), 1)},
    "hci": {"all": paper_row(
        METHOD_ROWS, ((42.56, 3.04), (26.08, 0.56), (51.90, 2.60), (56.44, 1.66)))},
    "aesthetics": {category: paper_row(METHOD_ROWS, accs) for category, *accs in (
        ("nature", 72.76, 63.33, 72.74, 73.65), ("animal", 70.44, 36.78, 71.46, 72.85),
        ("urban", 70.12, 49.84, 72.14, 73.20), ("people", 70.80, 24.79, 69.34, 72.50),
        ("overall", 71.03, 43.69, 71.42, 73.05))},
}  # fmt: skip
# Fewer test images than these (any fold or category) are not the paper's data.
PAPER_TEST_IMAGES = {"morph2": 1098, "adience": 2000, "aesthetics": 500, "hci": 250}

ANSWERS = {
    "expected": "expected rank",
    "argmax": "most probable rank",
    "probs": "of the whole distribution",
}
PAPER_FIGURES = {"mae": PAPER_MAE, "acc": PAPER_ACC}
TABLES = [  # title, path in results, factor, digits, the paper's figures
    (
        f"{metric.title}, {ANSWERS[answer]}" + ", %" * (metric.factor == 100),
        ("test", f"{name}_{answer}"),
        metric.factor,
        metric.digits,
        PAPER_FIGURES.get(name, {}),
    )
    for name, metric in METRICS.items()
    for answer in metric.answers
]
TABLES.append(("Ordinality of the prototypes, %", ("ordinality",), 100, 1, {}))
IN_UNIT = ("test", "mae_value")  # only of runs whose ranks are not one unit of the labels apart
TABLES.append(("MAE of the expected value, in the unit of the labels", IN_UNIT, 1, 3, {}))


def write_report(paths: list[str | Path], name: str = "report.md") -> str:
    """Tables of the mean +- standard deviation over runs; printed, and written beside the runs.

    Beside NAME.md, NAME.csv has a row per run: its settings and all its figures.
    The paper's figure stands beside runs with the paper's encoder and data, under its protocol
    (split, label rule, prompt). SystemExit where there is no finished run.
    """
    runs, left_out = [], []
    for path in sorted({path.resolve() for path in result_files(paths)}):
        try:
            run = read_run(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            left_out.append(f"- left out {path}: damaged ({type(error).__name__}: {error})")
            continue
        if copies := [other["path"] for other in runs if is_copy(run, other)]:
            same = f"the settings, seed, fold and figures of {copies[0]}, so the same run"
            left_out.append(f"- left out {path}: {same}")
        else:
            runs.append(run)
    for path in map(Path, paths):
        if not [*result_files([path])]:
            left_out.append(f"- left out {path}: {why_empty(path)}")
    if not runs:
        folders = ", ".join(map(str, paths))
        lines = "\n".join([f"no finished run in {folders}; give folders of runs", *left_out])
        raise SystemExit(lines)
    name_rows(runs)
    out_dir = Path(os.path.commonpath([run["path"].parent for run in runs]))
    tables: dict[tuple, list[dict]] = {}
    for run in runs:
        tables.setdefault(table_key(run["settings"]), []).append(run)
    text = "\n".join(format_dataset(key, group, out_dir) for key, group in tables.items())
    text += "\n".join(left_out)
    data.atomic_write(out_dir / name, lambda tmp_path: tmp_path.write_text(text, encoding="utf-8"))
    csv_path = (out_dir / name).with_suffix(".csv")
    save_csv(csv_path, [csv_row(run, os.path.relpath(run["path"], out_dir)) for run in runs])
    print(text + f"\nwritten to {out_dir / name} and {csv_path.name}")
    return text


def result_files(paths: list[str | Path]) -> Iterator[Path]:
    """results.json of each folder, or of the folders in it."""
    for path in map(Path, paths):
        results = path / "results.json"
        yield from [results] if results.exists() else sorted(path.glob("*/results.json"))


def why_empty(path: Path) -> str:
    if path.is_file():
        return f"a file; give its folder, {path.parent}"
    is_run = (path / "config.json").exists()
    return "not finished" if is_run else "no run" if path.exists() else "no such folder"


def is_copy(run: dict, other: dict) -> bool:
    """Figures agree in all digits: copied, or repeated, which is no second seed."""
    settings = [comparable_settings(r["settings"]) for r in (run, other)]
    return settings[0] == settings[1] and run["test"] == other["test"]


def read_run(path: Path) -> dict[str, Any]:
    """results.json with its folder as "path".

    ValueError, KeyError, TypeError or AttributeError: it is damaged, so that it has no tables.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    settings = dict(init=None) | results["settings"]  # what runs of earlier versions do not hold
    settings["split"] = settings["split"] or "random"
    names = [f"{name}_{a}" for name, metric in METRICS.items() for a in metric.computed]
    added = [name for name in names if not name.startswith("mae_")]  # MAE was there from the start
    added.append(IN_UNIT[1])
    test = results["test"] | {name: None for name in added if name not in results["test"]}
    run = results | dict(path=path.parent, settings=settings, test=test)
    name_rows([run])
    format_dataset(table_key(settings), [run], path.parent)
    return run


def csv_row(run: dict, link: str) -> dict[str, Any]:
    """One row of NAME.csv: the cell of the run in NAME.md, its settings, its figures.

    Values of the test images are named test_METRIC, of the validation images val_METRIC.
    """
    row = dict(run=link, table=" ".join(filter(None, table_key(run["settings"]))))
    row |= dict(row=run["row"], column=run["column"]) | run["settings"]
    for part in ("test", "val", "majority", "images"):
        row |= {f"{part}_{name}": value for name, value in (run.get(part) or {}).items()}
    names = ("ordinality", "ordinality_chance", "val_is_test", "seconds", "commit", "torch", "gpu")
    return row | {name: run.get(name) for name in names}


def table_key(settings: dict) -> tuple[str, str | None, str]:
    """Dataset, label rule and split: runs that agree in these share their tables."""
    split = "given lists" if settings.get("train_list") else settings["split"]
    return settings["data"], settings.get("label_rule"), split


def column_name(settings: dict) -> str:
    category = settings.get("category")
    words = [] if category is None else ["all categories" if category == "all" else category]
    if settings.get("shots"):
        words.append(shots_label(settings["shots"]))
    if settings.get("shift"):
        ranks, keep = settings["shift"]
        words.append(f"shift {ranks}-{round(100 * (1 - keep))}")
    return " ".join(words) or "all"


def name_rows(runs: list[dict]) -> None:
    """row = the method, and what else differs between runs that would share a cell: not averaged.

    Within a cell epochs and the like agree; from column to column they may change.
    """
    cells: dict[tuple, list[dict]] = {}
    for run in runs:
        run["row"] = method_name(Namespace(**run["settings"]))
        run["column"] = column_name(run["settings"])
        key = (table_key(run["settings"]), run["row"], run["column"])
        cells.setdefault(key, []).append(run)
    for cell in cells.values():
        first, *others = (comparable_settings(run["settings"]) for run in cell)
        differing = [
            key
            for key in first
            if key not in ("seed", "fold") and any(o.get(key) != first[key] for o in others)
        ]
        for run in cell:
            run["row"] += "".join(f" {key}={run['settings'][key]}" for key in differing)
        images: dict[tuple, set[str]] = {}  # of a fold; seeds draw some of the training images
        for run in filter(images_digest, cell):
            images.setdefault((run["row"], run["settings"]["fold"]), set()).add(images_digest(run))
        if any(len(digests) > 1 for digests in images.values()):
            for run in filter(images_digest, cell):
                run["row"] += f" images={images_digest(run)}"


def images_digest(run: dict) -> str:
    """Of the images and labels that the runs of a fold share; empty for runs of earlier versions.

    Runs with --shots or --shift draw their training images by seed.
    """
    splits, settings = run.get("splits") or {}, run["settings"]
    is_drawn = settings.get("shots") or settings.get("shift")
    digests = "".join(splits.get(part, "") for part in data.PARTS[bool(is_drawn) :])
    return digests and hashlib.sha256(digests.encode()).hexdigest()[:8]


def format_dataset(key: tuple, runs: list[dict], out_dir: Path) -> str:
    """The tables of one dataset under one protocol, what they rest on, and a link to each run."""
    method_order = list(METHODS)
    ordered = sorted(runs, key=lambda run: method_order.index(run["settings"]["method"]))
    rows: dict[str, list[dict]] = {}
    for run in ordered:
        rows.setdefault(run["row"], []).append(run)
    columns = table_columns(key, runs)
    lines = ["## " + " ".join(str(word) for word in key if word), ""]
    for title, metric_path, factor, digits, paper in TABLES:
        if metric_path == IN_UNIT and all(run["test"][IN_UNIT[1]] is None for run in runs):
            continue
        paper = {
            row: {column: figures.get(row) for column, figures in paper.get(key[0], {}).items()}
            for row in rows
            if all(is_paper_setup(run) for run in rows[row])
        }
        in_paper = any(figures.get(column) for figures in paper.values() for column in columns)
        lines += [title + " (the paper's in brackets)" * in_paper, ""]
        lines += ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row, row_runs in rows.items():
            cells = []
            for column in columns:
                values = column_values(key, row_runs, column, metric_path)
                paper_value = paper.get(row, {}).get(column)
                cells.append(format_cell([v * factor for v in values], digits, paper_value))
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [describe_run(run, os.path.relpath(run["path"], out_dir)) for run in runs]
    return "\n".join(lines) + "\n"


def is_paper_setup(run: dict) -> bool:
    """The paper's image encoder, CLIP, split and label rule, and at least as many test images."""
    settings, preset = run["settings"], data.DATASETS.get(run["settings"]["data"], {})
    encoder = "clip" if settings["method"] == "zeroshot" else PAPER["image_encoder"]
    default_split = preset.get("splits", ("random",))[0]
    return (
        settings.get("image_encoder") == encoder
        and settings.get("image_weights") != "none"
        and settings.get("clip") == PAPER["clip"]
        and not settings.get("train_list")
        and settings["split"] == default_split
        and settings.get("label_rule") == preset.get("label_rules", (None,))[0]
        and run["images"]["test"] >= PAPER_TEST_IMAGES.get(settings["data"], float("inf"))
    )


def describe_run(run: dict, link: str) -> str:
    settings = run["settings"]
    keys = ("seed", "fold", "image_encoder", "clip", "epochs")
    details = [f"{key.replace('_', ' ')} {settings[key]}" for key in keys if key in settings]
    details += [f"commit {run['commit']}", f"{run['seconds']} s"]
    if run.get("prompt"):
        details.append(f"prompt {run['prompt']!r}")
    if run.get("ordinality_chance"):
        details.append(f"ordinality by chance {run['ordinality_chance']:.0%}")
    if majority := run.get("majority"):
        rank, mae, acc = majority["rank"], majority["mae"], majority["acc"]
        details.append(f"always {rank!r} MAE {mae:.3f} accuracy {acc:.1%}")
    for name, tail in run.get("long_tail", {}).items():
        mae = tail["mae_argmax"]
        details.append(f"MAE (argmax) of ranks with {name} training images {mae:.3f}")
    return f"- [{link}]({link}/results.json): {', '.join(details)}; {run['protocol']}"


def table_columns(key: tuple, runs: list[dict]) -> list[str]:
    """Columns that runs fill: all images, shots, shifts; per category, then overall."""
    columns, (first, *others) = {run["column"] for run in runs}, categories(key[0])
    order = [first, *others, OVERALL]
    for name in [name for name in columns if others and name.split()[0] == first]:
        if all(name.replace(first, other, 1) in columns for other in others):
            columns.add(name.replace(first, OVERALL, 1))

    def sort_key(name: str) -> tuple:
        category = name.split()[0]
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        return "shift" in name, numbers, order.index(category) if category in order else -1

    return sorted(columns, key=sort_key)


def column_values(key: tuple, runs: list[dict], column: str, metric_path: tuple) -> list[float]:
    """A figure of each run in the column; overall: per seed and fold, the mean over categories."""
    overall = column.split()[0] == OVERALL
    names = [column]
    if overall:
        names = [column.replace(OVERALL, category, 1) for category in categories(key[0])]
    values_by_run: dict[Any, dict[str, float]] = {}
    for run in runs:
        if run["column"] in names:
            settings, value = run["settings"], run
            for step in metric_path:
                value = value[step]
            group = (settings["seed"], settings["fold"]) if overall else run["path"]
            values_by_run.setdefault(group, {})[run["column"]] = value
    return [
        statistics.mean(values.values())
        for values in values_by_run.values()
        if len(values) == len(names) and None not in values.values()
    ]


def format_cell(values: list[float], digits: int, paper_value: str | None) -> str:
    """Mean +- sample standard deviation, number of runs, the paper's figure in brackets."""
    text = "-"
    if values:
        text = f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}"  # + 0.0: no -0.000
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.{digits}f}"
        text += f" (n={len(values)})"
    return text if paper_value is None else f"{text} [{paper_value}]"
