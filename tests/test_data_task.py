"""pytest tests/test_data_task.py -- held-out parts, few-shot training, distribution shift."""

from collections import Counter

import pytest
from data_makers import make_folders

import data
from data.lists import Sample
from data.task import Options, hold_out, make_task, shuffled


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """4 ranks with 8, 32, 8, 8 training images."""
    root = tmp_path_factory.mktemp("own") / "own"
    make_folders(root, ["0", "2", "3"], 10)
    return data.load(make_folders(root, ["1"], 40))


def counts(task):
    by_rank = Counter(sample.label for sample in task.train)
    return [by_rank[rank] for rank in range(task.num_ranks)]


def test_few_shot_draws_by_seed_and_leaves_the_rest(task):
    four, other = data.few_shot(task, 4, seed=1), data.few_shot(task, 4, seed=2)
    assert counts(four) == [4] * 4 and four.val == task.val and four.test == task.test
    assert set(four.train) < set(task.train) and set(four.train) != set(other.train)
    assert four.train == data.few_shot(task, 4, seed=1).train
    twenty = data.few_shot(task, 20)
    assert counts(twenty) == [8, 20, 8, 8]  # all where there are fewer
    assert (
        "few-shot: 20 of each rank (all of the 3 that have fewer), drawn by seed 1: 44 train"
        in twenty.protocol
    )
    assert "few-shot: 4 of each rank, drawn by seed 1: 16 train images" in four.protocol
    with pytest.raises(ValueError, match="shots=0: expected at least 1"):
        data.few_shot(task, 0)


def test_distribution_shift_thins_out_the_most_frequent_ranks(task):
    assert counts(task) == [8, 32, 8, 8]
    assert counts(data.distribution_shift(task, 1, 0.2)) == [8, 6, 8, 8]  # int(32 * 0.2)
    assert counts(data.distribution_shift(task, 2, 0.1)) == [
        1,
        3,
        8,
        8,
    ]  # at least one; ties by rank
    protocol = data.distribution_shift(task, 1, 0.2).protocol
    assert "shift: 0.2 of the 1 most frequent ranks kept" in protocol
    for ranks, keep in ((0, 0.5), (5, 0.5), (1, 0), (1, 1.5)):
        with pytest.raises(ValueError, match="expected 1 .. 4 ranks and a share above 0"):
            data.distribution_shift(task, ranks, keep)


def test_hold_out_takes_a_share_of_each_rank_and_whole_groups():
    samples = [Sample(f"{i % 10}_{i}.jpg", i % 2) for i in range(100)]
    rest, held_out = hold_out(samples, 0.1, "test/0/0")
    assert sorted(rest + held_out) == sorted(samples)
    assert Counter(sample.label for sample in held_out) == {0: 5, 1: 5}
    assert rest == [sample for sample in samples if sample in set(rest)]  # in their old order
    rest, held_out = hold_out(samples, 0.2, "test/0/0", lambda path: path[0], stratify=False)
    people = [{sample.path[0] for sample in part} for part in (rest, held_out)]
    assert len(people[0]) == 8 and len(people[1]) == 2 and not people[0] & people[1]
    assert shuffled("abc", "x") != shuffled("abc", "y")


def test_make_task_without_val_and_test():
    samples = [Sample(f"{i}.jpg", i % 3) for i in range(300)]
    preset = dict(context="x", rank_names=["1", "2", "3"])
    task = make_task("some", preset, None, [samples, None, None], Options(seed=2), notes=["odd"])
    assert [len(part) for part in (task.train, task.val, task.test)] == [240, 30, 30]
    assert task.protocol.startswith("some: random split, seed 2, fold 0: 240 train / 30 val / 30")
    assert task.rank_values == (1, 2, 3) and task.notes == ("odd",)
    task = make_task("some", preset | dict(rank_values=(7, 8, 9)), None, [samples] * 3, Options())
    assert task.val_is_test and task.rank_values == (7, 8, 9)
