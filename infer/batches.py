"""The batches of a job: which rows one program draws together, and how many of them at a time."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infer.flags import Config
from infer.hosts import ALONE, Hosts
from infer.methods.registry import Bucket, Methods
from infer.rows import Row
from jaxmix.pipeline.batching import pack
from jaxmix.types import InputError


class FilledBatch(NamedTuple):
    """Rows of a bucket to draw together, with repetitions to fill up the batch, and the places of those that count.

    `halved` says that a larger batch did not fit into memory.
    """

    bucket: Bucket
    filled: list[Row]
    kept: np.ndarray
    groups: tuple[int, ...]
    halved: bool = False

    @property
    def rows(self) -> list[Row]:
        """The rows, each once."""
        return [self.filled[i] for i in self.kept]


def share(config: Config, buckets: Sequence[Bucket], todo: Sequence[Row], devices: int, hosts: Hosts) -> Sequence[Row]:
    """Return those of the rows to draw that are this process's, given the buckets of the whole job.

    Batches with something left go to the processes in turn. Workers that know nothing of each other cannot know what
    is left, nor how many devices the others have: for them all batches count, as one device would draw them.
    """
    if hosts.count == 1:
        return todo
    left = {row.number for row in todo}
    turns = itertools.cycle(range(hosts.count))
    mine: set[int] = set()
    for bucket in buckets:
        for batch in batches_of(bucket, config.batch_size, devices if hosts.together else 1):
            numbers = {row.number for row in batch.rows}
            if (not hosts.together or numbers & left) and next(turns) == hosts.index:
                mine |= numbers
    return [row for row in todo if row.number in mine]


def plan(
    config: Config,
    out: Path,
    rows: Sequence[Row],
    todo: Sequence[Row],
    devices: int,
    methods: Methods,
    pipe: Any,
    hosts: Hosts = ALONE,
) -> list[FilledBatch]:
    """Return the batches of this process, after printing what each program will draw, before anything is compiled.

    Their sizes are those of the whole job, whatever is left of it: the programs for them are compiled already.
    """
    held = []
    kept = len(rows) - len(todo)
    buckets = list(methods.buckets(rows))
    mine = share(config, buckets, todo, devices, hosts)
    print(
        f"plan: {len(todo)} images with {config.model} into {out}/"
        + (f", {kept} kept from before" if kept else "")
        + (f", {len(mine)} by this process, {hosts.index} of {hosts.count}" if hosts.count > 1 else "")
        + f", {devices} device{'s' * (devices > 1)}"
    )
    left = set(mine)
    for whole in buckets:
        bucket = remainder(whole, left)
        if not bucket.rows:
            continue
        first = bucket.rows[0]
        size = len(next(batches_of(whole, config.batch_size, devices)).filled)
        parts = list(batches_of(bucket, config.batch_size, devices, size // devices))
        held += parts
        batches = len(parts)
        start = "" if first.image is None else f", strength {first.strength:g}" + ", masked" * (first.mask is not None)
        row_of = {m: next(row for row in bucket.rows if m in methods.of(row)) for m in bucket.methods}
        start += "".join(f", {method.plan(row)}" for method, row in row_of.items())
        note = "".join(method.note(pipe, bucket.rows, size) for method in bucket.methods)
        print(
            f"  {first.steps} steps of {first.solver}, {first.width}x{first.height}{start}: {len(bucket.rows)} images "
            f"in {batches} batch{'es' * (batches > 1)} of {size}{note}",
            flush=True,
        )
    return held


def remainder(bucket: Bucket, left: Container[Row]) -> Bucket:
    """Return a bucket with only those rows that are left; groups are left whole, or not at all."""
    if bucket.groups is None:
        return bucket._replace(rows=[row for row in bucket.rows if row in left])
    starts = itertools.accumulate(bucket.groups, initial=0)
    groups = [bucket.rows[start : start + size] for start, size in zip(starts, bucket.groups, strict=False)]
    groups = [group for group in groups if group[0] in left]
    return bucket._replace(rows=[row for group in groups for row in group], groups=[len(group) for group in groups])


def batches_of(bucket: Bucket, size: int, devices: int, fixed: int | None = None) -> Iterator[FilledBatch]:
    """Cut a bucket into batches of one size: a multiple of the devices, no more than needed, and whole groups.

    `fixed` is the number of rows of each device, if a program has settled it already.
    """
    n = len(bucket.rows)
    size = -(-min(size, n) // devices) * devices
    size = -(-n // -(-n // size) // devices) * devices  # as many batches, with less to fill up
    if bucket.groups is not None:  # a group is drawn on one device, whatever the size
        size = max(size, devices * max(bucket.groups))
    for batch in pack(n, size, devices, bucket.groups, fixed):
        yield FilledBatch(bucket, [bucket.rows[i] for i in batch.rows], batch.kept, batch.groups)


def halves(batch: FilledBatch, devices: int, methods: Methods) -> list[FilledBatch]:
    """Return the rows of a batch in batches of half its size, whole groups; none if it cannot be halved."""
    half = -(-len(batch.filled) // 2 // devices) * devices
    if batch.halved or not 0 < half < len(batch.filled):
        return []
    groups = None
    if batch.bucket.groups is not None:
        groups = [len(members) for members in dict.fromkeys(methods.members(row) for row in batch.rows)]
    smaller = batch.bucket._replace(rows=batch.rows, groups=groups)
    try:
        parts = list(pack(len(smaller.rows), half, devices, groups, half // devices))
    except InputError:  # one group is all of it
        return []
    return [
        FilledBatch(smaller, [smaller.rows[i] for i in part.rows], part.kept, part.groups, halved=True)
        for part in parts
    ]
