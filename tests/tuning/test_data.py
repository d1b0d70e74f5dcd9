import numpy as np
import pytest

from jaxmix.tuning.data import iterate, make_dataset
from jaxmix.types import InputError


class Numbers:
    def __len__(self):
        return 11

    def __getitem__(self, index):
        return np.int64(index)


def jitter(row, rng):
    return {"index": row, "draw": rng.random()}


def test_a_batch_is_a_function_of_seed_and_step():
    one, other = (make_dataset(Numbers(), 4, 3, jitter) for _ in range(2))
    for step in (7, 0, 7):
        for name in ("index", "draw"):
            np.testing.assert_array_equal(one[step][name], other[step][name])
    assert not np.array_equal(one[0]["draw"], one[1]["draw"])
    assert not np.array_equal(one[0]["draw"], make_dataset(Numbers(), 4, 4, jitter)[0]["draw"])


@pytest.mark.parametrize("threads", [1, 4])
def test_going_on_from_a_step_gives_the_batches_of_an_unbroken_run(threads):
    dataset = make_dataset(Numbers(), 4, 3, jitter)
    later = iterate(dataset, start_step=5, threads=threads, prefetch=3)
    for step in range(5, 12):
        batch = next(later)
        np.testing.assert_array_equal(batch["index"], dataset[step]["index"])
        np.testing.assert_array_equal(batch["draw"], dataset[step]["draw"])


def test_every_pass_shows_each_row_once_in_another_order():
    dataset = make_dataset(Numbers(), 11, 0)
    passes = [dataset[step] for step in range(3)]
    for rows in passes:
        assert sorted(rows) == list(range(11))
    assert not np.array_equal(passes[0], passes[1])


def test_empty_batches_are_refused():
    with pytest.raises(InputError, match="train_batch_size"):
        make_dataset(Numbers(), 0, 0)
