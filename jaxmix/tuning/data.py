"""From a random-access source to batches: the batch at step k is a pure function of (seed, k)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from jaxmix.types import InputError


class Source(Protocol):
    """Anything with a length whose items depend on their index alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def make_dataset(
    source: Source,
    batch_size: int,
    seed: int,
    transform: Callable[[Any, np.random.Generator], Any] | None = None,
) -> Any:
    """Return an endless grain MapDataset whose item k is batch k.

    Rows are shuffled anew in each pass; `transform(row, rng)` gets a generator that depends on the seed and the row's
    place alone, so crops and dropped captions repeat as well. Nothing but (seed, k) has to be remembered to resume.
    """
    import grain

    if batch_size < 1:
        raise InputError(f"train_batch_size: found {batch_size}, expected 1 or more")
    if len(source) < 1:
        raise InputError("data source: found no rows, expected 1 or more")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    if transform is not None:
        dataset = dataset.random_map(transform)
    return dataset.batch(batch_size, drop_remainder=True)


def iterate(dataset: Any, start_step: int = 0, threads: int = 2, prefetch: int = 8) -> Iterator[Any]:
    """Yield the batches of `make_dataset` from `start_step` on, read ahead by `threads` threads."""
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(dataset.slice(slice(start_step, None)).to_iter_dataset(options))
