"""A model on a loader: predictions, then metrics, predictions.csv and pictures of the test set.

Read evaluate_test_set first. Needs: data, kernels, ordinalclip, training, .metrics, .plots.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import data
from evaluation.metrics import (
    METRICS,
    compute_metrics,
    confusion_matrix,
    expected_rank,
    long_tail_metrics,
    mae_in_unit,
    majority_baseline,
    mean_probs_by_rank,
    per_rank_metrics,
)
from evaluation.plots import draw_curves, draw_error_by_rank, draw_matrices, draw_sheet
from kernels import unit
from ordinalclip import Regression, ordinality, ordinality_chance
from training.distributed import all_gather_rows, average_buffers, is_main, world_size
from training.loaders import autocast, make_images, prepare_batch, without_image_encoder
from training.methods import zeroshot_prompt
from training.progress import ProgressLine, TensorBoard
from training.run_folder import Run, provenance, read_log, run_name, save_csv, settings_dict

ORDINALITY_SPANS = (2, 4, 8, 16, 32)  # of the ordinality scores beside the whole one


@torch.no_grad()
def predict_loader(run: Run, loader: DataLoader) -> tuple[Tensor, Tensor]:
    """-> probs (M, R) and labels (M,) of all the loader's images, on the CPU, in order.

    FloatingPointError where probabilities are not finite.
    """
    average_buffers(run.model)
    eval_model = run.model.export(copy=False).eval()  # the text tower runs once
    if run.args.freeze_image:
        eval_model = without_image_encoder(eval_model)
    progress = ProgressLine("predicting")
    # of none: a process has no images where they are fewer than the processes
    probs, labels = [torch.zeros(0, run.task.num_ranks)], [torch.zeros(0, dtype=torch.long)]
    num_images = len(loader.dataset) * world_size()
    for i, (images, batch_labels) in enumerate(loader, 1):
        with autocast(run.args):
            outputs = eval_model.predict(prepare_batch(images, run.args, run.preprocess))
        probs.append(outputs["probs"].cpu())
        labels.append(batch_labels)
        progress(min(i * run.args.batch_size, num_images), num_images)
    probs = all_gather_rows(torch.cat(probs))  # (M, R)
    if not probs.isfinite().all():
        raise FloatingPointError(
            "the model's predictions are not finite: its weights hold nan or inf; try a lower --lr "
            "or --precision fp32. --resume continues from the last checkpoint"
        )
    return probs, all_gather_rows(torch.cat(labels))  # (M, R), (M,)


def part_metrics(task: data.Task, part: str, probs: Tensor, labels: Tensor) -> dict[str, Any]:
    """compute_metrics of a part, and mae_value where a rank is not one unit of the labels."""
    metrics, targets = compute_metrics(probs, labels), task.targets(part)
    if targets is not None:
        values = torch.tensor(task.rank_values, dtype=torch.float64)
        metrics["mae_value"] = mae_in_unit(probs, values, values.new_tensor(targets))
    return metrics


def evaluate_test_set(
    run: Run,
    val_loader: DataLoader,
    test_loader: DataLoader,
    start_time: float,
    initial_similarity: Tensor | None = None,
    name: str = "best",
) -> dict[str, Any]:
    """Metrics of the test images (and of the validation images once more), printed and returned.

    Writes predictions-NAME.csv and pictures/ (pictures-NAME/ for another name than best).
    """
    args, task = run.args, run.task
    probs, labels = predict_loader(run, test_loader)
    val = part_metrics(task, "val", *predict_loader(run, val_loader)) if task.val else None
    train_counts = torch.tensor(task.train.labels).bincount(minlength=task.num_ranks)
    majority = majority_baseline(labels, train_counts)
    if targets := task.targets("test"):
        value = task.rank_values[majority["rank"]]
        majority["mae_value"] = sum(abs(value - target) for target in targets) / len(targets)
    has_prompt = args.method == "zeroshot"
    results = dict(
        data=task.name,
        protocol=task.protocol,
        method=run_name(args),
        images=dict(train=len(task.train), val=len(task.val), test=len(task.test)),
        digests=run.digests,
        val_is_test=task.val_is_test,
        prompt=zeroshot_prompt(args, task, task.rank_names[0]) if has_prompt else None,
        test=part_metrics(task, "test", probs, labels),
        val=val,
        majority=majority | dict(rank=task.rank_names[majority["rank"]]),
        per_rank=per_rank_metrics(probs, labels, train_counts, task.rank_names),
        long_tail=long_tail_metrics(probs, labels, train_counts),
        **ordinality_scores(run),
        seconds=round(time.time() - start_time, 1),
        settings=settings_dict(args),
        **provenance(),
    )
    if is_main():
        save_predictions(run.dir / f"predictions-{name}.csv", task, probs)
        pictures = draw_pictures(run, initial_similarity, probs, labels, results["per_rank"])
        pictures_dir = run.dir / ("pictures" if name == "best" else f"pictures-{name}")
        pictures_dir.mkdir(exist_ok=True)
        for title, picture in pictures.items():
            data.atomic_write(pictures_dir / f"{title}.png", partial(picture.save, format="PNG"))
        if name == "best":
            board = TensorBoard(run)
            board.write(args.epochs, {f"test_{k}": v for k, v in results["test"].items()}, pictures)
            board.close()
        print_results(results)
    return results


@torch.no_grad()
def ordinality_scores(run: Run) -> dict[str, Any]:
    """Over all ranks, and within a few spans, each beside the score of unordered prototypes."""
    if run.args.method == "regression" or run.task.num_ranks < 3:
        return dict(ordinality=None, ordinality_chance=None, ordinality_spans={})
    prototypes, official = run.model.prototypes().float(), run.args.official
    if official and run.task.name == "morph2":
        prototypes = prototypes[15:76]  # scripts/vis_ordinality.py: ages 15 to 75

    def score(span: int | None) -> dict[str, float]:
        return dict(
            score=ordinality(prototypes, span, official),
            chance=ordinality_chance(len(prototypes), span, official),
        )

    spans = {str(span): score(span) for span in ORDINALITY_SPANS if span < len(prototypes) - 1}
    overall = score(None)
    return dict(
        ordinality=overall["score"], ordinality_chance=overall["chance"], ordinality_spans=spans
    )


def print_results(results: dict[str, Any]) -> None:
    test, majority = results["test"], results["majority"]
    print(f"\n{results['protocol']}")
    if results["prompt"]:
        print(f"prompt of the first rank: {results['prompt']!r}")
    if results["val_is_test"]:
        print("NOTE: the epoch was chosen on the test images themselves, as this protocol has it")
    figures = []
    for name, metric in METRICS.items():
        values = {answer: test[f"{name}_{answer}"] for answer in metric.computed}
        texts = {
            a: "-" if v is None else format(round(v, 4) + 0.0, metric.format)
            for a, v in values.items()
        }
        words = [f"{text} {a}" if len(texts) > 1 else text for a, text in texts.items()]
        figures.append(" ".join([metric.label, *words]))
    for i in range(0, len(figures), 2):
        print(("test   " if i == 0 else "") + "   ".join(figures[i : i + 2]))
    print(
        f"always {majority['rank']!r}, the most frequent rank in training: "
        f"MAE {majority['mae']:.3f}   accuracy {majority['acc']:.1%}"
    )
    if "mae_value" in test:
        mae, always = test["mae_value"], majority["mae_value"]
        print(
            f"MAE in the unit of the labels {mae:.4g} (always {majority['rank']!r}: {always:.4g})"
        )
    if len(results["long_tail"]) > 1:
        groups = (f"{name} {row['mae_argmax']:.3f}" for name, row in results["long_tail"].items())
        print(f"MAE (argmax) by training images of the rank: {', '.join(groups)}")
    if results["ordinality"] is not None:
        line = f"ordinality {results['ordinality']:.1%} (chance {results['ordinality_chance']:.0%})"
        spans = [f"{span}: {row['score']:.1%}" for span, row in results["ordinality_spans"].items()]
        print(line + (f"; within spans of {', '.join(spans)}" if spans else ""))


def save_predictions(path: Path, task: data.Task, probs: Tensor) -> None:
    """predictions-NAME.csv: path, true and predicted rank, expected rank as an index and as a
    value, probability; label_value: the label itself, where ranks are not one unit apart."""
    ranks, targets = torch.arange(task.num_ranks, dtype=probs.dtype), task.targets("test")
    values = probs.double() @ torch.tensor(task.rank_values, dtype=torch.float64)  # (M,)
    rows = []
    for i, (sample, p) in enumerate(zip(task.test, probs)):
        row = dict(
            path=sample.path,
            label=task.rank_names[sample.label],
            rank=task.rank_names[int(p.argmax())],
            expected_rank_index=f"{float(p @ ranks):.4f}",
            expected_value=f"{float(values[i]):.6g}",
            prob=f"{float(p.max()):.4f}",
        )
        rows.append(row | dict(label_value=targets[i]) if targets else row)
    save_csv(path, rows)


@torch.no_grad()
def similarity_matrix(model: nn.Module) -> Tensor | None:
    """Cosines between the prototypes (R, R), or None where there are none."""
    if isinstance(model, Regression):
        return None
    rows = unit(model.prototypes()).cpu()
    return rows @ rows.T


def draw_pictures(
    run: Run, initial_similarity: Tensor | None, probs: Tensor, labels: Tensor, rows: list[dict]
) -> dict[str, Any]:
    """similarity, confusion, distribution, error, sheet and curves; rows: of each rank."""
    names, axes = run.task.rank_names, ("predicted rank", "true rank")
    counts = {"test images, counted": confusion_matrix(probs, labels)}
    means = mean_probs_by_rank(probs, labels)
    titled = {"mean probability of each rank": means}
    pictures = dict(
        confusion=draw_matrices(counts, names, axes),
        distribution=draw_matrices(titled, names, axes, span=(0, float(means.max()))),
        error=draw_error_by_rank(rows),
        sheet=draw_sheet(best_and_worst(run.task, run.preprocess, probs, labels)),
    )
    similarity = similarity_matrix(run.model)
    if similarity is not None:
        matrices = {"similarity of the prototypes": similarity}
        if initial_similarity is not None:
            matrices = {"before training": initial_similarity, "after training": similarity}
        pictures["similarity"] = draw_matrices(matrices, names, ("rank", "rank"))
    if log := read_log(run.dir):
        pictures["curves"] = draw_curves(log)
    return pictures


def best_and_worst(
    task: data.Task, preprocess: dict[str, Any], probs: Tensor, labels: Tensor, count: int = 6
) -> list[tuple[str, list]]:
    """The test images whose expected rank is nearest to and farthest from the label, captioned."""
    images, expected = make_images(task, "test", preprocess), expected_rank(probs)
    order = (expected - labels).abs().argsort(stable=True).tolist()

    def image_with_caption(i: int) -> tuple[Tensor, str]:
        rank, label = task.rank_names[int(expected[i].round())], task.rank_names[labels[i]]
        return images[i][0], f"expected {rank}\ntrue {label}"

    return [
        ("best predictions", [image_with_caption(i) for i in order[:count]]),
        ("worst predictions", [image_with_caption(i) for i in order[::-1][:count]]),
    ]
