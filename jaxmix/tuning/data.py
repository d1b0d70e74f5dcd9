"""From a random-access source to batches: the batch at step k is a pure function of (seed, k)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxmix.types import InputError


class Source(Protocol):
    """Anything with a length whose items depend on their index alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@runtime_checkable
class BatchSource(Protocol):
    """Rows that cannot share batches freely, such as pictures of several sizes: the source orders them itself."""

    def __len__(self) -> int: ...

    def in_batches(self, batch_size: int, seed: int) -> Source:
        """Return the endless sequence of rows in which batch k is items k * batch_size to (k + 1) * batch_size - 1.

        Item i depends on (batch_size, seed, i) alone, and several threads may ask for items in any order.
        """
        ...


def make_dataset(
    source: Source | BatchSource,
    batch_size: int,
    seed: int,
    transform: Callable[[Any, np.random.Generator], Any] | None = None,
    *,
    shard: tuple[int, int] = (0, 1),
) -> Any:
    """Return an endless grain MapDataset whose item k is batch k, or one host's rows of it.

    Rows are reshuffled in each pass, by grain, or by the source if it is a `BatchSource`. ``transform(row, rng)`` gets
    a generator that depends only on the seed and the row's place, so crops and dropped captions repeat as well. To
    resume, only (seed, k) must be remembered.

    ``shard`` is (index, count): host ``index`` of ``count`` makes rows index * b / count to (index + 1) * b / count of
    every batch of b. Together the hosts make the same batches for any ``count``, so a run may resume with another one.
    Raises InputError for a batch size below 1 or not divisible by ``count``, and for a source without rows.
    """
    import grain

    index, count = shard
    if batch_size < 1:
        raise InputError(f"train_batch_size: found {batch_size}, expected 1 or more")
    if not 0 <= index < count:
        raise InputError(f"shard: found host {index} of {count}, expected 0 to {count - 1}")
    if batch_size % count:
        raise InputError(f"train_batch_size: found {batch_size}, expected a multiple of the {count} hosts")
    if len(source) < 1:
        raise InputError("data source: found no rows, expected 1 or more")
    if isinstance(source, BatchSource):
        rows = grain.MapDataset.source(source.in_batches(batch_size, seed)).seed(seed)
    else:
        rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    if transform is not None:
        rows = rows.random_map(transform)
    # Cut into the hosts' shares, batch k is shares k * count to (k + 1) * count - 1; rows keep their places.
    shares = rows.batch(batch_size // count, drop_remainder=True)
    return shares if count == 1 else shares.slice(slice(index, None, count))


def iterate(dataset: Any, start_step: int = 0, threads: int = 2, prefetch: int = 8) -> Iterator[Any]:
    """Yield the batches of `make_dataset` from `start_step` on, read ahead by `threads` threads."""
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(dataset.slice(slice(start_step, None)).to_iter_dataset(options))
