import numpy as np
import pytest

from jaxmix.tuning.data import BatchSource, iterate, make_dataset
from jaxmix.types import InputError
from train.data.order import GroupedOrder, Stream

GROUPS = [np.arange(0, 11), np.arange(11, 13), np.arange(13, 30)]


class Grouped:
    """Rows of three sizes, with a draw that the source makes."""

    def __len__(self):
        return 30

    def in_batches(self, batch_size, seed):
        def make(row, group, rng):
            return {"row": np.int64(row), "group": np.int64(group), "crop": rng.random()}

        return Stream(GROUPS, batch_size, seed, make)


class Plain:
    def __len__(self):
        return 30

    def __getitem__(self, index):
        return {"row": np.int64(index), "group": np.int64(0), "crop": 0.0}


def drawn(row, rng):
    return {**row, "draw": rng.random()}


def together(source, hosts, step, batch_size=4):
    """Return batch `step` as all hosts make it."""
    parts = [make_dataset(source, batch_size, 3, drawn, shard=(i, hosts))[step] for i in range(hosts)]
    assert all(len(part["row"]) == batch_size // hosts for part in parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("source", [Grouped(), Plain()], ids=["grouped", "plain"])
@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_make_the_same_batches(source, hosts):
    for step in (0, 1, 9, 123):
        one, many = together(source, 1, step), together(source, hosts, step)
        for name in one:
            np.testing.assert_array_equal(one[name], many[name])


@pytest.mark.parametrize("source", [Grouped(), Plain()], ids=["grouped", "plain"])
def test_a_share_goes_on_from_a_step_as_an_unbroken_run(source):
    dataset = make_dataset(source, 4, 3, drawn, shard=(1, 2))
    later = iterate(dataset, start_step=5, threads=4, prefetch=3)
    for step in range(5, 15):
        batch = next(later)
        for name in batch:
            np.testing.assert_array_equal(batch[name], dataset[step][name])


def test_what_a_grouped_source_shows_depends_on_the_seed_and_the_step():
    one, other = (make_dataset(Grouped(), 4, 3, drawn) for _ in range(2))
    for step in (7, 0, 7):
        np.testing.assert_array_equal(one[step]["crop"], other[step]["crop"])
    shown = [tuple(make_dataset(Grouped(), 4, seed)[step]["row"]) for seed in (3, 4) for step in range(5)]
    assert len(set(shown)) == 10


def test_every_batch_is_of_one_group():
    dataset = make_dataset(Grouped(), 4, 0)
    for step in range(60):
        batch = dataset[step]
        assert len(set(batch["group"])) == 1
        assert set(batch["row"]) <= set(GROUPS[batch["group"][0]])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16, 64])
def test_every_row_is_shown_once_a_pass_and_groups_as_often_as_they_have_rows(batch_size):
    order = GroupedOrder(GROUPS, batch_size, 0)
    batches = 40 * 30 // batch_size
    shown = {i: [] for i in range(len(GROUPS))}
    for place in range(batches * batch_size):
        group, row = order.row(place)
        shown[group].append(row)
    for i, group in enumerate(GROUPS):
        # What has not been shown yet is at most the batches of an epoch that is not over, and the rest of a pass.
        slack = len(group) + 2 * batch_size
        assert abs(len(shown[i]) - 40 * len(group)) <= slack
        counts = [shown[i].count(row) for row in group]
        assert max(counts) - min(counts) <= -(-slack // len(group))


def test_in_one_group_each_pass_shows_each_row_once_in_another_order():
    order = GroupedOrder([np.arange(12)], 4, 0)
    passes = [[order.row(12 * turn + i)[1] for i in range(12)] for turn in range(3)]
    assert all(sorted(rows) == list(range(12)) for rows in passes)
    assert passes[0] != passes[1] != passes[2]


def test_batches_of_a_group_follow_each_other_without_a_gap():
    order = GroupedOrder(GROUPS, 4, 5)
    turns = {i: [] for i in range(len(GROUPS))}
    for k in range(500):
        group, m = order.batch(k)
        turns[group].append(m)
    for i, found in turns.items():
        late = len(found) - 8  # those of the last epoch may be out of order
        assert sorted(found)[:late] == list(range(late)), i


def test_the_order_of_sizes_differs_between_epochs():
    order = GroupedOrder([np.arange(40), np.arange(40, 80)], 4, 0)
    epochs = [[order.batch(20 * epoch + k)[0] for k in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == [0] * 10 + [1] * 10 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_grouped_source_is_recognised():
    assert isinstance(Grouped(), BatchSource)
    assert not isinstance(Plain(), BatchSource)


@pytest.mark.parametrize(
    ("batch_size", "shard", "words"),
    [
        (6, (0, 4), "train_batch_size: found 6, expected a multiple of the 4 hosts"),
        (4, (2, 2), "shard: found host 2 of 2, expected 0 to 1"),
    ],
)
def test_shares_that_do_not_exist_are_refused(batch_size, shard, words):
    with pytest.raises(InputError, match=words):
        make_dataset(Plain(), batch_size, 0, shard=shard)
