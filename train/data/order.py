"""The order of rows if every batch must come from one group: a pure function of (seed, place)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_BATCHES, _ROWS, _DRAWS = range(3)  # what a seed is used for, so that no two uses draw the same numbers


class GroupedOrder:
    """Endless batches, each from one group of rows, with groups as frequent as they have rows.

    A group's rows are shuffled in each pass over it, and its passes follow each other without a gap: what is left over
    at the end of one pass fills the next batch together with the start of the next. So every row is shown once per
    pass, and a group with fewer rows than a batch comes up after more than one epoch, with some rows twice. By the end
    of epoch e a group of n rows has given floor(e n / batch_size) batches; those of one epoch come in random order.
    """

    def __init__(self, groups: Sequence[np.ndarray], batch_size: int, seed: int) -> None:
        self._groups = [np.asarray(group) for group in groups]
        self._counts = np.asarray([len(group) for group in groups], np.int64)
        self._batch_size, self._seed = batch_size, seed
        # Caches of pure functions, for threads that work near the same step.
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)
        self._pass = functools.lru_cache(maxsize=2 * len(self._groups) + 2)(self._make_pass)

    def batch(self, k: int) -> tuple[int, int]:
        """Return (group, m): batch k is the group's m-th."""
        epoch = k * self._batch_size // int(self._counts.sum())  # no epoch is longer, so it is this one or a later one
        while int(self._done(epoch + 1).sum()) <= k:
            epoch += 1
        groups, turns = self._epoch(epoch)
        at = k - int(self._done(epoch).sum())
        return int(groups[at]), int(turns[at])

    def row(self, place: int) -> tuple[int, int]:
        """Return (group, row) of the row at `place` of all batches laid end to end."""
        k, within = divmod(place, self._batch_size)
        group, m = self.batch(k)
        turn, at = divmod(m * self._batch_size + within, int(self._counts[group]))
        return group, int(self._pass(group, turn)[at])

    def _done(self, epochs: int) -> np.ndarray:
        """Return how many batches each group has given after this many epochs."""
        return epochs * self._counts // self._batch_size

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        done = self._done(epoch)
        groups = np.repeat(np.arange(len(done)), self._done(epoch + 1) - done)
        turns = done[groups] + np.arange(len(groups)) - np.searchsorted(groups, groups)
        order = np.random.default_rng((self._seed, _BATCHES, epoch)).permutation(len(groups))
        return groups[order], turns[order]

    def _make_pass(self, group: int, turn: int) -> np.ndarray:
        rng = np.random.default_rng((self._seed, _ROWS, group, turn))
        return rng.permutation(self._groups[group])


class Stream:
    """The endless source of a grouped order: item i is `make(row, group, rng)` for the row at place i.

    `rng` depends on (seed, i) alone.
    """

    def __init__(
        self,
        groups: Sequence[np.ndarray],
        batch_size: int,
        seed: int,
        make: Callable[[int, int, np.random.Generator], Any],
    ) -> None:
        self._order = GroupedOrder(groups, batch_size, seed)
        self._seed, self._make = seed, make

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, place: int) -> Any:
        group, row = self._order.row(place)
        return self._make(row, group, np.random.default_rng((self._seed, _DRAWS, place)))
