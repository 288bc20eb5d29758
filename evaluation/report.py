"""Finished runs as Markdown tables, method x column, beside the paper's figures, and as CSV.

Read write_report first; METRICS says which tables there are, PAPER_MAE, PAPER_ACC the paper's.
Needs: data, training.methods, .options, .run_folder, .sweep, evaluation.metrics.
"""

import hashlib
import itertools
import json
import os
import re
import statistics
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import data
from evaluation.metrics import BOTH, METRICS
from training.methods import METHODS, needs_clip
from training.options import PAPER, build_parser
from training.run_folder import (
    WEIGHTS,
    comparable_settings,
    data_name,
    dataset_defaults,
    method_name,
    save_csv,
    saved_digests,
)
from training.sweep import categories

# What flags are in runs older than they; images were decoded in full before --no-draft was there.
UNSET_FLAGS = vars(build_parser().parse_args([])) | dict(no_draft=True)


def paper_table(rows: Iterable[str], columns: dict[str, str]) -> dict[str, dict[str, str]]:
    """{column: {row: figure}} from {column: "figure of each row"}, as printed in the paper."""
    return {
        column: dict(zip(rows, [f.replace("±", " ± ") for f in figures.split()], strict=True))
        for column, figures in columns.items()
    }


# The paper's tables, {data: {column: {row: figure}}}; it does not say whether its MAE is that of
# the expected rank or of the argmax. All: xk-huang/OrdinalCLIP, branch gh-pages, images/image*.png.
# ±: the deviation over folds.
ORDINALCLIP_ROW = "ordinalclip-linear-K3"
OVERALL = "overall"  # the paper's plain mean over the categories
TUNE_ROWS = (
    "tune-rank-random-context", "tune-context-random-context", "random-context", "tune-rank",
    "tune-context",
)  # fmt: skip
METHOD_ROWS = ("linear", "zeroshot", "coop", ORDINALCLIP_ROW)
FEW_ROWS = ("linear", "coop", ORDINALCLIP_ROW)
MORPH2_ROWS = (
    *METHOD_ROWS,
    *(f"ordinalclip-linear-K{k}" for k in (2, 4, 5, 6, 7, 8, 9)),
    *(f"ordinalclip-inverse-K{k}" for k in range(2, 10)),
    *(f"coop-{tune}" for tune in TUNE_ROWS),
    *(f"{ORDINALCLIP_ROW}-{tune}" for tune in TUNE_ROWS),
)
PAPER_MAE = {
    "morph2": {
        **paper_table(MORPH2_ROWS, {
            "all": "2.63 14.45 2.39 2.32 "
                   "2.38 2.38 2.36 2.39 2.38 2.40 2.41 "
                   "2.39 2.38 2.39 2.40 2.39 2.35 2.38 2.38 "
                   "2.58 2.44 2.39 2.41 2.39 "
                   "2.38 2.37 2.36 2.34 2.34"}),
        **paper_table(FEW_ROWS, {
            "1 shot": "8.04 5.09 4.94", "2 shots": "6.00 4.50 4.36", "4 shots": "4.66 3.81 3.55",
            "8 shots": "3.91 3.57 3.31", "16 shots": "3.57 3.23 3.07", "32 shots": "3.06 2.87 2.76",
            "64 shots": "2.84 2.61 2.57",
            "shift 10-80": "2.88 2.71 2.61", "shift 10-90": "2.98 2.85 2.67",
            "shift 20-80": "3.46 2.98 2.77", "shift 20-90": "3.68 3.51 3.06",
            "shift 30-80": "3.19 3.06 2.86", "shift 30-90": "4.06 3.36 3.21",
            "shift 40-80": "3.28 2.99 2.84", "shift 40-90": "3.65 3.30 3.12"}),
    },
    "adience": paper_table(METHOD_ROWS, {"all": "0.56±0.09 1.50±0.20 0.50±0.08 0.47±0.06"}),
    "hci": paper_table(METHOD_ROWS, {"all": "0.80±0.03 1.48±0.03 0.76±0.06 0.67±0.03"}),
    "aesthetics": paper_table(METHOD_ROWS, {
        "nature": "0.338 0.438 0.285 0.273", "animal": "0.381 0.737 0.298 0.279",
        "urban": "0.364 0.683 0.294 0.277", "people": "0.377 1.063 0.330 0.291",
        OVERALL: "0.365 0.730 0.302 0.280"}),
}  # fmt: skip
PAPER_ACC = {
    "adience": paper_table(METHOD_ROWS, {"all": "56.0±5.9 25.4±3.5 60.6±5.5 61.2±4.2"}),
    "hci": paper_table(METHOD_ROWS, {"all": "42.56±3.04 26.08±0.56 51.90±2.60 56.44±1.66"}),
    "aesthetics": paper_table(METHOD_ROWS, {
        "nature": "72.76 63.33 72.74 73.65", "animal": "70.44 36.78 71.46 72.85",
        "urban": "70.12 49.84 72.14 73.20", "people": "70.80 24.79 69.34 72.50",
        OVERALL: "71.03 43.69 71.42 73.05"}),
}  # fmt: skip
# Fewer test images than these (any fold or category) are not the paper's data.
PAPER_TEST_IMAGES = {"morph2": 1098, "adience": 2000, "aesthetics": 500, "hci": 250}

ANSWERS = {
    "expected": "expected rank",
    "argmax": "most probable rank",
    "probs": "of the whole distribution",
}
PAPER_FIGURES = {"mae": PAPER_MAE, "acc": PAPER_ACC}
IN_UNIT = "test_mae_value"  # only of runs whose ranks are not one unit of the labels apart
TABLES = [  # title, name of the figure, factor, digits, the paper's figures
    (
        f"{metric.title}, {ANSWERS[answer]}" + ", %" * (metric.factor == 100),
        f"test_{name}_{answer}",
        metric.factor,
        metric.digits,
        PAPER_FIGURES.get(name, {}),
    )
    for name, metric in METRICS.items()
    for answer in metric.answers
]
TABLES.append(("Ordinality of the prototypes, %", "ordinality", 100, 1, {}))
TABLES.append(("MAE of the expected value, in the unit of the labels", IN_UNIT, 1, 3, {}))


@dataclass
class FinishedRun:
    """A run and its place in the report."""

    path: Path  # its folder
    results: dict[str, Any]  # results.json
    settings: dict[str, Any]
    figures: dict[str, Any]  # test_METRIC, val_METRIC, ..., ordinality: of the tables and the CSV
    table: str  # dataset, label rule and split: runs that agree in these share tables
    row: str  # the method, and what else differs between runs that would share a cell
    column: str


def write_report(paths: list[str | Path], name: str = "report.md") -> str:
    """Tables of the mean +- standard deviation over runs; printed, and written beside the runs.

    Beside NAME.md, NAME.csv has a row per run: its settings and all its figures.
    The paper's figure stands beside runs with the paper's encoder and data, under its protocol
    (split, label rule, prompt). SystemExit where there is no finished run.
    """
    files, left_out = set(), []
    for path in itertools.chain.from_iterable(map(find_runs, paths)):
        if path.is_file() and path.name.startswith("report") and path.suffix in (".md", ".csv"):
            continue  # of runs/*, written by an earlier report
        if os.path.exists(path / "results.json"):
            files.add((path / "results.json").resolve())
        else:
            left_out.append(f"- left out {path}: {why_empty(path)}")
    runs: dict[str, FinishedRun] = {}
    for file in sorted(files):
        try:
            run = read_run(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            left_out.append(f"- left out {file}: damaged ({type(error).__name__}: {error})")
            continue
        # Figures that agree in all digits are copied, or repeated, which is no second seed.
        figures = [run.figures[f"test_mae_{answer}"] for answer in BOTH]  # which all versions have
        identity = json.dumps([table_settings(run), figures], sort_keys=True)
        if (first := runs.setdefault(identity, run)) is not run:
            same = f"the settings, seed, fold and figures of {first.path}, so the same run"
            left_out.append(f"- left out {file}: {same}")
    if not runs:
        folders = ", ".join(map(str, paths))
        lines = "\n".join([f"no finished run in {folders}; give folders of runs", *left_out])
        raise SystemExit(lines)
    name_rows(runs.values())
    out_dir = Path(os.path.commonpath([run.path.parent for run in runs.values()]))
    tables = group_by(runs.values(), "table")
    text = "\n".join(format_tables(group, out_dir) for group in tables.values())
    text += "\n".join(left_out)
    rows = []
    for run in runs.values():
        row = dict(run=os.path.relpath(run.path, out_dir), table=run.table)
        row |= dict(row=run.row, column=run.column)
        rows.append(row | run.settings | run.figures)
    path = out_dir / name
    try:
        data.atomic_write(path, lambda tmp_path: tmp_path.write_text(text, encoding="utf-8"))
        save_csv(path.with_suffix(".csv"), rows)
    except OSError as error:  # others' runs, runs in two trees
        print(text)
        raise SystemExit(f"the report is not written: {error}") from error
    print(text + f"\nwritten to {path} and {path.with_suffix('.csv').name}")
    return text


def find_runs(path: str | Path) -> list[Path]:
    """Runs at path or up to two levels below, none within a finished run; else the path itself."""
    path, files = Path(path), ("config.json", "results.json")
    folders = (path, *path.glob("*"), *path.glob("*/*"))
    # os.path, as Path.exists raises where a folder may not be read
    runs = [f for f in folders if any(os.path.exists(f / name) for name in files)]
    return sorted(f for f in runs if not os.path.exists(f.parent / "results.json")) or [path]


def why_empty(path: Path) -> str:
    if path.is_file():
        return f"a file; give its folder, {path.parent}"
    is_run = os.path.exists(path / "config.json")
    return "not finished" if is_run else "no finished run" if path.exists() else "no such folder"


def read_run(file: Path) -> FinishedRun:
    """ValueError, KeyError, TypeError or AttributeError: it is damaged, it cannot have tables."""
    results = json.loads(file.read_text(encoding="utf-8"))
    settings = dict(init=None) | results["settings"]  # what runs of earlier versions do not hold
    settings |= dict(split=settings["split"] or "random", data=data_name(settings["data"]))
    mae = {f"test_mae_{answer}": results["test"][f"mae_{answer}"] for answer in BOTH}
    figures = mae | {  # which all runs have; other metrics were added later
        f"{part}_{name}": value
        for part in ("test", "val", "majority", "images")
        for name, value in (results.get(part) or {}).items()
    }
    figures["ordinality"] = results["ordinality"]
    names = ("ordinality_chance", "val_is_test", "seconds", "commit", "torch", "gpu")
    figures |= {name: results.get(name) for name in names}
    split = "given lists" if settings.get("train_list") else settings["split"]
    table = " ".join(filter(None, (settings["data"], settings.get("label_rule"), split)))
    row, column = method_name(Namespace(**settings)), column_name(settings)
    run = FinishedRun(file.parent, results, settings, figures, table, row, column)
    name_rows([run])  # what is damaged fails already here, not in the report of all
    format_tables([run], run.path)
    return run


def group_by(runs: Iterable[FinishedRun], *names: str) -> dict[tuple, list[FinishedRun]]:
    """{values of these attributes: the runs that have them}, in the order of the runs."""
    groups: dict[tuple, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run, name) for name in names), []).append(run)
    return groups


def column_name(settings: dict) -> str:
    category, shots = settings.get("category"), settings.get("shots")
    words = [] if category is None else ["all categories" if category == "all" else category]
    if shots:
        words.append(f"{shots} shot" + "s" * (shots > 1))
    if settings.get("shift"):
        ranks, keep = settings["shift"]
        words.append(f"shift {ranks}-{round(100 * (1 - keep))}")
    return " ".join(words) or "all"


def name_rows(runs: Iterable[FinishedRun]) -> None:
    """Add to the row what differs between runs that would share a cell: they are not averaged.

    Within a cell epochs and the like agree; from column to column they may change.
    """
    for cell in group_by(runs, "table", "row", "column").values():
        settings = [*map(table_settings, cell)]
        differing = [
            key
            for key in dict.fromkeys(itertools.chain(*settings))
            if key not in ("seed", "fold")
            and any(s.get(key) != settings[0].get(key) for s in settings)
        ]
        for run, values in zip(cell, settings):
            run.row += "".join(f" {key}={values.get(key)}" for key in differing)
        kinds = differing_inputs(cell)
        for run in cell:
            if digests := "".join(d for kind, d in input_digests(run).items() if kind in kinds):
                run.row += f" inputs={hashlib.sha256(digests.encode()).hexdigest()[:8]}"


def differing_inputs(cell: list[FinishedRun]) -> set[str]:
    """Names of input_digests in which runs of a row differ that should share them.

    Runs of any fold share "images"; runs of one fold and of the same images share the others. Runs
    of earlier versions, without "images", are compared with all.
    """
    all_images = {input_digests(run).get("images", "") for run in cell}
    digests: dict[tuple, set[str]] = {}
    for run in cell:
        others = input_digests(run)
        images = others.pop("images", "")
        digests.setdefault((run.row, "images"), set()).add(images)
        for same in [images] if images else all_images:
            for name, digest in others.items():
                key = run.row, same, run.settings["fold"], name
                digests.setdefault(key, set()).add(digest)
    return {key[-1] for key, values in digests.items() if len(values - {""}) > 1}


def table_settings(run: FinishedRun) -> dict:
    """The settings that tell the rows of a table apart; flags newer than the run: as if unset."""
    settings = comparable_settings(UNSET_FLAGS | run.settings)
    return settings | dict(precision=run.settings.get("precision"))


def input_digests(run: FinishedRun) -> dict[str, str]:
    """sha256 of what runs of a fold share: {"": paths and labels, " files": bytes of the images,
    "--clip": its weights file, ...}; and of all folds, "images": paths and labels of all parts.

    Runs of earlier versions lack some; --shots and --shift draw training images by seed.
    """
    saved, settings = saved_digests(run.results), run.settings
    parts = data.PARTS[bool(settings.get("shots") or settings.get("shift")) :]
    digests = {kind: "".join(saved.get(p + kind, "") for p in parts) for kind in ("", " files")}
    digests |= {key: saved.get(key, "") for key in ("images", *WEIGHTS)}
    return {kind: digest for kind, digest in digests.items() if digest}


def format_tables(runs: list[FinishedRun], out_dir: Path) -> str:
    """The tables of one dataset under one protocol, what they rest on, and a link to each run."""
    dataset, method_order = runs[0].settings["data"], list(METHODS)
    shown = [*runs, *overall_runs(runs)]
    shown.sort(key=lambda run: method_order.index(run.settings["method"]))
    cells = group_by(shown, "row", "column")
    rows = dict.fromkeys(run.row for run in shown)
    columns = sorted({run.column for run in shown}, key=lambda name: column_order(dataset, name))
    paper_rows = rows.keys() - {run.row for run in runs if not is_paper_setup(run)}
    lines = ["## " + runs[0].table, ""]
    for title, figure, factor, digits, paper in TABLES:
        if figure == IN_UNIT and all(run.figures.get(figure) is None for run in runs):
            continue
        paper = {column: paper.get(dataset, {}).get(column, {}) for column in columns}
        in_paper = any(row in paper[column] for row in paper_rows for column in columns)
        lines += [title + " (the paper's in brackets)" * in_paper, ""]
        lines += ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            texts = [row]
            for column in columns:
                values = [run.figures.get(figure) for run in cells.get((row, column), ())]
                values = [value * factor for value in values if value is not None]
                paper_value = paper[column].get(row) if row in paper_rows else None
                texts.append(format_cell(values, digits, paper_value))
            lines.append("| " + " | ".join(texts) + " |")
        lines.append("")
    lines += remarks(runs)
    lines += [describe_run(run, os.path.relpath(run.path, out_dir)) for run in runs]
    return "\n".join(lines) + "\n"


def remarks(runs: list[FinishedRun]) -> Iterator[str]:
    """What the means of a table hide: a seed twice, runs of different code."""
    for cell, group in group_by(runs, "row", "column").items():
        counts = Counter((run.settings["seed"], run.settings["fold"]) for run in group)
        for (seed, fold), count in counts.items():
            if count > 1:
                yield f"- {', '.join(cell)}: {count} runs of seed {seed}, fold {fold}, all counted"
        for key in ("commit", "processes"):
            values = sorted({str(run.results.get(key)) for run in group})
            if len(values) > 1:
                yield f"- {', '.join(cell)}: runs of different {key}: {', '.join(values)}"


def overall_runs(runs: list[FinishedRun]) -> list[FinishedRun]:
    """The mean over the categories of each row, seed and fold that has them all, as runs."""
    groups: dict[tuple, dict[str, FinishedRun]] = {}
    for run in runs:
        category, seed, fold = (run.settings.get(key) for key in ("category", "seed", "fold"))
        if category and category != "all":
            column = column_name(run.settings | dict(category=OVERALL))
            groups.setdefault((run.row, column, seed, fold), {})[category] = run
    means = []
    for (_, column, *_), by_category in groups.items():
        first = next(iter(by_category.values()))
        if len(by_category) == len(categories(first.settings["data"])):
            figures = {}
            for _, name, *_ in TABLES:
                values = [run.figures.get(name) for run in by_category.values()]
                figures[name] = None if None in values else statistics.mean(values)
            means.append(replace(first, figures=figures, column=column))
    return means


def column_order(dataset: str, column: str) -> tuple:
    """All images, shots, shifts; per category, then overall."""
    order, category = [*categories(dataset), OVERALL], column.split()[0]
    numbers = [int(number) for number in re.findall(r"\d+", column)]
    return "shift" in column, numbers, order.index(category) if category in order else -1


def is_paper_setup(run: FinishedRun) -> bool:
    """The paper's image encoder, CLIP, split and label rule, and at least as many test images."""
    settings = run.settings
    encoder = "clip" if settings["method"] == "zeroshot" else PAPER["image_encoder"]
    default = dataset_defaults(settings["data"])
    return (
        settings.get("image_encoder") == encoder
        and settings.get("image_weights") != "none"
        and settings.get("clip") == PAPER["clip"]
        and not settings.get("train_list")
        and settings["split"] == default["split"]
        and settings.get("label_rule") == default["label_rule"]
        and run.figures["images_test"] >= PAPER_TEST_IMAGES.get(settings["data"], float("inf"))
    )


def describe_run(run: FinishedRun, link: str) -> str:
    results, settings = run.results, run.settings
    keys = ("seed", "fold", "image_encoder", "clip", "epochs")
    if not needs_clip(Namespace(**settings)):
        keys = ("seed", "fold", "image_encoder", "epochs")
    details = [f"{key.replace('_', ' ')} {settings[key]}" for key in keys if key in settings]
    details += [f"commit {results['commit']}", f"{results['seconds']} s"]
    if results.get("prompt"):
        details.append(f"prompt {results['prompt']!r}")
    if results.get("ordinality_chance"):
        details.append(f"ordinality by chance {results['ordinality_chance']:.0%}")
    if majority := results.get("majority"):
        rank, mae, acc = majority["rank"], majority["mae"], majority["acc"]
        details.append(f"always {rank!r} MAE {mae:.3f} accuracy {acc:.1%}")
    for name, tail in results.get("long_tail", {}).items():
        mae = tail["mae_argmax"]
        details.append(f"MAE (argmax) of ranks with {name} training images {mae:.3f}")
    return f"- [{link}]({link}/results.json): {', '.join(details)}; {results['protocol']}"


def format_cell(values: list[float], digits: int, paper_value: str | None) -> str:
    """Mean +- sample standard deviation, number of runs, the paper's figure in brackets."""
    text = "-"
    if values:
        text = f"{round(statistics.mean(values), digits) + 0.0:.{digits}f}"  # + 0.0: no -0.000
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.{digits}f}"
        text += f" (n={len(values)})"
    return text if paper_value is None else f"{text} [{paper_value}]"
