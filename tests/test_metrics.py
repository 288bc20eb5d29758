"""pytest tests/test_metrics.py -- each metric against an independent formula."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from evaluation.metrics import (
    compute_metrics,
    confusion_matrix,
    long_tail_metrics,
    mean_probs_by_rank,
    per_rank_metrics,
)


def test_metrics():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.4, 0.6], [0.5, 0.0, 0.5]])
    metrics = compute_metrics(probs, torch.tensor([0, 2, 1]))
    assert metrics["mae_expected"] == pytest.approx((0.4 + 0.4 + 0) / 3)
    assert metrics["mae_argmax"] == pytest.approx(1 / 3)
    assert metrics["acc_argmax"] == pytest.approx(2 / 3) and metrics["acc_expected"] == 1


def kappa(answers, labels, num_ranks):
    """Quadratic weighted kappa from the confusion matrix, as in Cohen's definition."""
    counts = np.zeros((num_ranks, num_ranks))
    np.add.at(counts, (labels, answers), 1)
    by_chance = np.outer(counts.sum(1), counts.sum(0)) / len(labels)
    weight = np.subtract.outer(np.arange(num_ranks), np.arange(num_ranks)) ** 2
    return 1 - (weight * counts).sum() / (weight * by_chance).sum()


def test_cumulative_score_and_kappa():
    rng = np.random.RandomState(3)
    labels = rng.randint(0, 20, 200)
    answers = (labels + rng.randint(-8, 9, 200)).clip(0, 19)
    metrics = compute_metrics(F.one_hot(torch.tensor(answers), 20).float(), torch.tensor(labels))
    assert metrics["qwk_argmax"] == pytest.approx(kappa(answers, labels, 20), abs=1e-9)
    assert metrics["qwk_expected"] == pytest.approx(metrics["qwk_argmax"])
    assert (
        metrics["cs_argmax"] == pytest.approx((abs(answers - labels) <= 5).mean())
        and metrics["cs_argmax"] < 1
    )
    for labels in ([0], [2], [1, 1]):  # one rank alone: no agreement beyond chance
        metrics = compute_metrics(torch.eye(3)[: len(labels)], torch.tensor(labels))
        assert metrics["qwk_argmax"] is None and metrics["mae_argmax"] is not None
    two = compute_metrics(torch.eye(3)[[1, 1]], torch.tensor([0, 2]))
    assert two["qwk_argmax"] == 0


def test_per_rank_and_long_tail(gray):
    task = data.load(gray)
    counts = torch.tensor([sample.label for sample in task.train]).bincount()
    labels = torch.tensor([0, 1, 1, 3])
    probs = F.one_hot(torch.tensor([1, 1, 3, 3]), 4).float()
    rows = per_rank_metrics(probs, labels, counts, task.rank_names)
    assert [(row["rank"], row["train_images"], row["test_images"], row["mae_argmax"]) for row in rows] == [
        ("0 gray", 8, 1, 1.0), ("1 gray", 32, 2, 1.0), ("3 gray", 8, 1, 0.0),
    ]  # fmt: skip
    tail = long_tail_metrics(probs, labels, counts)
    assert tail["few (<20)"]["test_images"] == 2 and tail["few (<20)"]["mae_argmax"] == 0.5
    assert tail["some (20..100)"]["test_images"] == 2 and tail["some (20..100)"]["mae_argmax"] == 1


def test_confusion_and_distribution():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.1, 0.4]])
    labels = torch.tensor([0, 2, 2])
    assert confusion_matrix(probs, labels).tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]
    expected = torch.tensor([[0.7, 0.2, 0.1], [0, 0, 0], [0.3, 0.2, 0.5]])
    assert torch.allclose(mean_probs_by_rank(probs, labels), expected)
