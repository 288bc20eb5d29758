"""pytest tests/test_protocols.py -- few-shot training and distribution shift."""

import numpy as np
import pytest

import data


def counts(task):
    return np.bincount([sample.label for sample in task.train], minlength=task.num_ranks).tolist()


def test_few_shot_draws_by_seed_and_leaves_the_rest(gray):
    task = data.load(gray)
    four, other = data.few_shot(task, 4, seed=1), data.few_shot(task, 4, seed=2)
    assert counts(four) == [4] * 4 and four.val == task.val and four.test == task.test
    assert set(four.train) < set(task.train) and set(four.train) != set(other.train)
    assert four.train == data.few_shot(task, 4, seed=1).train
    twenty = data.few_shot(task, 20)
    assert counts(twenty) == [8, 20, 8, 8]  # where there are fewer, all, and it says so
    assert (
        "few-shot: 20 of each rank (all of the 3 that have fewer), drawn by seed 0: 44 train"
        in twenty.protocol
    )
    assert "few-shot: 4 of each rank, drawn by seed 1: 16 train images" in four.protocol
    with pytest.raises(ValueError, match="shots=0: expected at least 1"):
        data.few_shot(task, 0)


def test_shift_thins_out_the_most_frequent_ranks(gray):
    task = data.load(gray)
    assert counts(task) == [8, 32, 8, 8]
    assert counts(data.distribution_shift(task, 1, 0.2)) == [8, 6, 8, 8]  # int(32 * 0.2)
    assert counts(data.distribution_shift(task, 2, 0.1)) == [
        1,
        3,
        8,
        8,
    ]  # at least one; ties by rank
    assert (
        "shift: 0.2 of the 1 most frequent ranks kept"
        in data.distribution_shift(task, 1, 0.2).protocol
    )
    for ranks, keep in ((0, 0.5), (5, 0.5), (1, 0), (1, 1.5)):
        with pytest.raises(ValueError, match="expected 1 .. 4 ranks and a share above 0"):
            data.distribution_shift(task, ranks, keep)
