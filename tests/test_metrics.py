"""pytest tests/test_metrics.py -- each metric against an independent formula."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from evaluation.metrics import (
    METRICS,
    compute_metrics,
    confusion_matrix,
    long_tail_metrics,
    mae_in_unit,
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
    assert metrics["cs_argmax"] == pytest.approx((abs(answers - labels) <= 5).mean())
    assert metrics["cs_argmax"] < 1
    for labels in ([0], [2], [1, 1]):  # one rank alone: no agreement beyond chance
        metrics = compute_metrics(torch.eye(3)[: len(labels)], torch.tensor(labels))
        assert metrics["qwk_argmax"] is None and metrics["mae_argmax"] is not None
    two = compute_metrics(torch.eye(3)[[1, 1]], torch.tensor([0, 2]))
    assert two["qwk_argmax"] == 0


# Ten images of ranks 0, 1, 2, 4: rank 3 is not among the labels. The figures below: scipy 1.17.1
# (spearmanr), scikit-learn 1.9.1 (cohen_kappa_score with quadratic weights, accuracy_score,
# mean_absolute_error), dlordinal 2.7.0 (amae, mmae, accuracy_off1, ranked_probability_score).
TENTHS = [
    [8, 1, 1, 0, 0], [2, 7, 1, 0, 0], [0, 3, 5, 2, 0], [0, 1, 2, 6, 1], [1, 0, 0, 3, 6],
    [0, 0, 4, 1, 5], [6, 3, 0, 1, 0], [1, 2, 4, 2, 1], [0, 0, 1, 2, 7], [3, 4, 2, 1, 0],
]  # fmt: skip
LABELS = [0, 0, 1, 4, 4, 2, 1, 2, 4, 0]
PUBLISHED = dict(
    mae_expected=0.71, mae_argmax=0.7, acc_argmax=0.4, off1_argmax=0.9, amae_argmax=0.75,
    mmae_argmax=1.0, qwk_argmax=0.8178137651821862, spearman_argmax=0.8339041192083575,
    spearman_expected=0.8754275592730113, rps_probs=0.421,
)  # fmt: skip


def test_metrics_are_those_of_published_packages():
    metrics = compute_metrics(torch.tensor(TENTHS) / 10.0, torch.tensor(LABELS))
    assert {name: metrics[name] for name in PUBLISHED} == pytest.approx(PUBLISHED, abs=1e-6)


def test_every_metric_has_its_answers():
    metrics = compute_metrics(torch.tensor(TENTHS) / 10.0, torch.tensor(LABELS))
    names = {f"{name}_{answer}" for name in METRICS for answer in ("expected", "argmax")}
    assert set(metrics) == names - {"rps_expected", "rps_argmax"} | {"rps_probs"}
    for metric in METRICS.values():
        assert set(metric.answers) <= set(metric.computed)


@pytest.mark.parametrize("seed, num_ranks, num_images", [(0, 12, 300), (1, 30, 7), (2, 2, 40)])
def test_metrics_by_other_formulas(seed, num_ranks, num_images):
    """Loops over ranks and images, and other forms of the same quantities."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, num_ranks, num_images)
    probs = rng.dirichlet(np.full(num_ranks, 0.3), num_images)
    metrics = compute_metrics(torch.tensor(probs), torch.tensor(labels))
    for answer, predicted in (
        ("expected", probs @ np.arange(num_ranks)),
        ("argmax", probs.argmax(1)),
    ):
        maes = [abs(predicted[labels == rank] - rank).mean() for rank in set(labels)]
        assert metrics[f"amae_{answer}"] == pytest.approx(sum(maes) / len(maes))
        assert metrics[f"mmae_{answer}"] == pytest.approx(max(maes))
        near = [abs(round(float(p)) - y) < 1.5 for p, y in zip(predicted, labels)]
        assert metrics[f"off1_{answer}"] == pytest.approx(sum(near) / num_images)
        positions = [
            [sum(other < value for other in values) + sum(other == value for other in values) / 2
             for value in values] for values in (predicted, labels)
        ]  # fmt: skip
        assert metrics[f"spearman_{answer}"] == pytest.approx(np.corrcoef(*positions)[0, 1])
    # E|X - y| - E|X - X'| / 2 of independent X, X' (Gneiting, Raftery, JASA 2007, section 4.2)
    distance = abs(np.subtract.outer(np.arange(num_ranks), np.arange(num_ranks)))
    to_label = (probs * distance[labels]).sum(1)
    spread = np.einsum("mi,ij,mj->m", probs, distance, probs)
    assert metrics["rps_probs"] == pytest.approx((to_label - spread / 2).mean())


def test_rps_of_an_answer_that_is_certain_is_its_error():
    answers, labels = torch.tensor([0, 2, 2, 3]), torch.tensor([3, 2, 1, 0])
    metrics = compute_metrics(F.one_hot(answers, 4), labels)
    assert metrics["rps_probs"] == metrics["mae_argmax"] == 1.75


@pytest.mark.parametrize("labels", [[1], [2, 2, 2]])
def test_metrics_of_one_image_and_of_one_rank(labels):
    probs = torch.tensor([[0.1, 0.3, 0.6], [0.7, 0.1, 0.2], [0.2, 0.2, 0.6]])[: len(labels)]
    metrics = compute_metrics(probs, torch.tensor(labels))
    undefined = {name for name, value in metrics.items() if value is None}
    assert undefined == {f"{n}_{a}" for n in ("qwk", "spearman") for a in ("expected", "argmax")}
    for answer in ("expected", "argmax"):
        mae, *others = (metrics[f"{name}_{answer}"] for name in ("mae", "amae", "mmae"))
        assert mae > 0 and others == pytest.approx([mae, mae], rel=1e-12)


def test_metrics_of_no_images_and_of_a_constant_answer_are_undefined():
    metrics = compute_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert set(metrics.values()) == {None}
    metrics = compute_metrics(torch.eye(3)[[1, 1]], torch.tensor([0, 2]))
    assert metrics["spearman_argmax"] is None and metrics["mmae_argmax"] == 1


PROBS = torch.eye(5)[[0, 1, 4]]


@pytest.mark.parametrize(
    "probs, labels, message",
    [
        (PROBS, [1, 2, 5], "got labels torch.int64 (3,) of 5 ranks; expected 3 integers, 0 .. R-1"),
        (PROBS, [-1, 2, 3], "got labels torch.int64 (3,) of 5 ranks; expected 3 integers"),
        (PROBS, [0.0, 1, 4], "got labels torch.float32 (3,) of 5 ranks; expected 3 integers"),
        (PROBS, [[0], [1], [4]], "got labels torch.int64 (3, 1) of 5 ranks; expected 3 integers"),
        (PROBS / 0, [0, 1, 4], "probs do not sum to 1; expected probabilities: logits.softmax(1)"),
        (9 * PROBS, [0, 1, 4], "probs do not sum to 1; expected probabilities: logits.softmax(1)"),
    ],
)
def test_metrics_refuse_what_are_no_ranks_and_no_probabilities(probs, labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compute_metrics(probs, torch.tensor(labels))


def test_labels_of_eight_bits():
    labels = torch.arange(61).repeat(5)
    narrow, probs = labels.to(torch.uint8), F.one_hot(labels, 61).float()
    assert torch.equal(confusion_matrix(probs, narrow), 5 * torch.eye(61, dtype=torch.long))
    counts = torch.arange(61)
    expected = long_tail_metrics(probs, labels, counts)
    assert expected == long_tail_metrics(probs, narrow, counts) and len(expected) == 2
    assert mae_in_unit(probs, counts, labels[:, None]) == 0  # not (M, M) errors


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


def test_every_metric_is_defined_in_the_docs():
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == list(METRICS)
