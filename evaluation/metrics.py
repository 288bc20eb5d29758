"""Metrics of ordinal regression from probabilities (M, R) and labels (M,).

METRICS has one row per metric: it is computed, logged for each epoch, printed, saved in
results.json and shown in reports from this table. Each is taken twice: of the expected rank (the
mean rank index under the probabilities, a real number) and of the argmax (the most probable rank).
Those whose row says "probs" are taken once, of the probabilities. docs/metrics.md has the sources.

Copy together with: nothing (torch only).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CS_TOLERANCE = 5  # ranks off that still count in the cumulative score CS(5)
MANY_SHOT, FEW_SHOT = 100, 20  # training images of a rank (Yang et al., ICML 2021, section 4)


class Metric(NamedTuple):
    """compute: predicted ranks (M,), labels (M,), both float64 -> 0-dim tensor; nan: undefined.

    Where `answers` is ("probs",) it gets probabilities (M, R) in the place of predicted ranks.
    """

    label: str  # as printed after a run
    compute: Callable[[Tensor, Tensor], Tensor]
    format: str  # of a printed value
    title: str  # of its table in a report
    factor: float  # table value = factor * value
    digits: int  # of a table value
    answers: tuple[str, ...]  # those that have a table in a report

    @property
    def computed(self) -> tuple[str, ...]:
        """The answers it is taken of: its values are named METRIC_ANSWER."""
        return PROBS if self.answers == PROBS else BOTH


def mean_absolute_error(predicted: Tensor, labels: Tensor) -> Tensor:
    return (predicted - labels).abs().mean()


def accuracy(predicted: Tensor, labels: Tensor) -> Tensor:
    """Share of rounded predictions that equal the label."""
    return (predicted.round() == labels).double().mean()


def off_by_one_accuracy(predicted: Tensor, labels: Tensor) -> Tensor:
    """Share of rounded predictions at most one rank off."""
    return ((predicted.round() - labels).abs() <= 1).double().mean()


def mae_of_each_rank(predicted: Tensor, labels: Tensor) -> Tensor:
    """MAE of the images of each rank that occurs among the labels, (number of those ranks,)."""
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    return torch.bincount(index, (predicted - labels).abs()) / counts


def average_mae(predicted: Tensor, labels: Tensor) -> Tensor:
    """AMAE: the mean over ranks of their MAE, so that rare ranks count as much as frequent ones."""
    return mae_of_each_rank(predicted, labels).mean()


def maximum_mae(predicted: Tensor, labels: Tensor) -> Tensor:
    """MMAE: the MAE of the rank where it is highest."""
    maes = mae_of_each_rank(predicted, labels)
    return maes.max() if len(maes) else maes.new_tensor(math.nan)


def cumulative_score(predicted: Tensor, labels: Tensor) -> Tensor:
    """CS(5): share of errors of at most 5 ranks."""
    return ((predicted - labels).abs() <= CS_TOLERANCE).double().mean()


def weighted_kappa(predicted: Tensor, labels: Tensor) -> Tensor:
    """Quadratic weighted kappa of the rounded predictions (Cohen 1968).

    1 - squared error / squared error of the same predictions dealt out at random. nan where all
    labels are the same rank: there is no agreement beyond chance to measure.
    """
    if (labels == labels[:1]).all():
        return torch.tensor(math.nan)
    predicted = predicted.round()
    variances = predicted.var(correction=0) + labels.var(correction=0)
    expected_error = variances + (predicted.mean() - labels.mean()) ** 2
    return 1 - (predicted - labels).square().mean() / expected_error


def spearman(predicted: Tensor, labels: Tensor) -> Tensor:
    """Spearman's rank correlation, equal values at their mean position; nan: all are equal."""
    positions = torch.stack([mean_positions(predicted), mean_positions(labels)])  # (2, M)
    deviations = positions - positions.mean(1, keepdim=True)
    return deviations.prod(0).sum() / deviations.square().sum(1).prod().sqrt()


def mean_positions(values: Tensor) -> Tensor:
    """Position of each value in ascending order, from 1; equal values share their mean position."""
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[index].double()


def ranked_probability_score(probs: Tensor, labels: Tensor) -> Tensor:
    """RPS: squared differences of the cumulative distributions, summed over ranks; 0 is best.

    In ranks, not divided by R - 1: of an answer that is certain it is the absolute error.
    """
    is_reached = torch.arange(probs.shape[1]) >= labels[:, None]  # (M, R)
    return (probs.double().cumsum(1) - is_reached.double()).square().sum(1).mean()


EXPECTED, ARGMAX, PROBS, BOTH = ("expected",), ("argmax",), ("probs",), ("expected", "argmax")
CS = f"CS({CS_TOLERANCE})"
METRICS = {
    # name: label, function, format | report: title, factor, digits, answers
    "mae": Metric("MAE", mean_absolute_error, ".3f", "MAE", 1, 3, BOTH),
    "acc": Metric("accuracy", accuracy, ".1%", "Accuracy", 100, 2, ARGMAX),
    "off1": Metric("off by one", off_by_one_accuracy, ".1%", "Off-by-one accuracy", 100, 2, ARGMAX),
    "cs": Metric(CS, cumulative_score, ".1%", f"Cumulative score {CS}", 100, 1, EXPECTED),
    "amae": Metric("AMAE", average_mae, ".3f", "Average MAE over ranks", 1, 3, ARGMAX),
    "mmae": Metric("MMAE", maximum_mae, ".3f", "Maximum MAE over ranks", 1, 3, ARGMAX),
    "qwk": Metric("QWK", weighted_kappa, ".3f", "Quadratic weighted kappa", 1, 3, EXPECTED),
    "spearman": Metric("Spearman", spearman, ".3f", "Spearman's rank correlation", 1, 3, EXPECTED),
    "rps": Metric("RPS", ranked_probability_score, ".3f", "Ranked probability score", 1, 3, PROBS),
}


def expected_rank(probs: Tensor) -> Tensor:
    """Probabilities (M, R) -> mean rank index under them (M,), float64 in 0..R-1."""
    return probs.double() @ torch.arange(probs.shape[1], dtype=torch.float64)


def compute_metrics(probs: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Probabilities (M, R), rank indices (M,) -> {"mae_expected": ..., ..., "rps_probs": ...}.

    None for a metric that these labels do not define. Raises ValueError for labels that are no rank
    indices (M,), and for probs that are no probabilities.
    """
    are_integers = not labels.is_floating_point() and labels.shape == probs.shape[:1]
    if not are_integers or not ((labels >= 0) & (labels < probs.shape[1])).all():
        got = f"labels {labels.dtype} {tuple(labels.shape)} of {probs.shape[1]} ranks"
        raise ValueError(f"got {got}; expected {len(probs)} integers, 0 .. R-1: rank indices")
    if not ((probs.sum(1) - 1).abs() <= 0.05).all():  # nan, too
        raise ValueError("probs do not sum to 1; expected probabilities: logits.softmax(1)")
    labels = labels.double()
    answers = dict(expected=expected_rank(probs), argmax=probs.argmax(1).double(), probs=probs)
    values = {
        f"{name}_{answer}": float(metric.compute(answers[answer], labels))
        for name, metric in METRICS.items()
        for answer in metric.computed
    }
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def mae_in_unit(probs: Tensor, rank_values: Tensor, targets: Tensor) -> float:
    """MAE of the mean of rank_values (R,) under probs (M, R) against targets (M,) in their unit."""
    targets = targets.reshape(len(probs))
    return float(mean_absolute_error(probs.double() @ rank_values.double(), targets.double()))


def per_rank_metrics(
    probs: Tensor, labels: Tensor, train_counts: Tensor, rank_names: tuple[str, ...]
) -> list[dict]:
    """One row per rank that occurs among the labels (M,); train_counts (R,): training images."""
    rows = []
    for rank in labels.unique().tolist():
        mask = labels == rank
        metrics = compute_metrics(probs[mask], labels[mask])
        row = dict(rank=rank_names[rank], train_images=int(train_counts[rank]))
        maes = {name: metrics[name] for name in ("mae_expected", "mae_argmax")}
        rows.append(row | dict(test_images=int(mask.sum()), **maes))
    return rows


def long_tail_metrics(probs: Tensor, labels: Tensor, train_counts: Tensor) -> dict[str, dict]:
    """Metrics over ranks with many, few and some training images (Yang et al., ICML 2021)."""
    count = train_counts[labels.long()]  # (M,)
    groups = {f"many (>{MANY_SHOT})": count > MANY_SHOT, f"few (<{FEW_SHOT})": count < FEW_SHOT}
    groups[f"some ({FEW_SHOT}..{MANY_SHOT})"] = (count >= FEW_SHOT) & (count <= MANY_SHOT)
    return {
        name: dict(test_images=int(mask.sum()), **compute_metrics(probs[mask], labels[mask]))
        for name, mask in groups.items()
        if mask.any()
    }


def majority_baseline(labels: Tensor, train_counts: Tensor) -> dict[str, float | int]:
    """What always answering the most frequent training rank gives on labels (M,).

    Of several equally frequent ranks, as in few-shot training, the one in the middle.
    """
    most_frequent = (train_counts == train_counts.max()).nonzero()[:, 0]
    rank = most_frequent[len(most_frequent) // 2]
    probs = torch.nn.functional.one_hot(rank.expand(len(labels)), len(train_counts))
    metrics = compute_metrics(probs, labels)
    return dict(rank=int(rank), mae=metrics["mae_argmax"], acc=metrics["acc_argmax"])


def confusion_matrix(probs: Tensor, labels: Tensor) -> Tensor:
    """Counts (R, R): row the true rank, column the most probable one."""
    size, labels = probs.shape[1], labels.long()
    return torch.bincount(labels * size + probs.argmax(1), minlength=size**2).view(size, size)


def mean_probs_by_rank(probs: Tensor, labels: Tensor) -> Tensor:
    """Mean distribution of the images of each true rank (R, R); zero rows for absent ranks."""
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[1]).to(probs)  # (M, R)
    return one_hot.T @ probs / one_hot.sum(0).clamp_min(1)[:, None]
