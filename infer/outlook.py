"""What a job will take, as far as it can be known before anything is compiled: programs, padding, memory, time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from infer.batches import FilledBatch
from infer.manifest import Manifest
from infer.methods.method import size_of
from infer.methods.registry import Methods
from jaxmix.command import format_seconds
from jaxmix.pipeline.memory import drawing_bytes
from jaxmix.pipeline.parts import Parts
from jaxmix.sharding import device_bytes

_KEYS = ("steps", "sampler", "spacing", "width", "height", "method")
"""What of a picture's line says how long it took to draw, beside the devices."""


def outlook(
    batches: Sequence[FilledBatch], manifest: Manifest, methods: Methods, pipe: Any, devices: int, cells: int | None
) -> list[str]:
    """Return lines about batches that are to be drawn; `cells` is the side of the decoder's tiles."""
    if not batches:
        return []
    return [
        _programs(batches, methods),
        *_memory(batches, pipe, devices, cells),
        _time(batches, manifest, methods, devices),
    ]


def devices_of(count: int) -> str:
    """Return how devices are named in a line of a manifest: "8 cpu", "1 TPU v5 lite"."""
    return f"{count} {jax.local_devices()[0].device_kind}"


def _programs(batches: Sequence[FilledBatch], methods: Methods) -> str:
    drawn = {(methods.program(batch.rows[0]), len(batch.filled), batch.groups) for batch in batches}
    decoded = {(size_of(batch.rows[0]), len(batch.filled)) for batch in batches}
    places = sum(len(batch.filled) for batch in batches)
    empty = places - sum(len(batch.rows) for batch in batches)
    buckets = len({id(batch.bucket) for batch in batches})
    padding = f"{empty} of {places} places ({empty / places:.0%})" if empty else "none"
    return (
        f"{_count(buckets, 'bucket')}: {_count(len(drawn), 'program')} to draw with and {len(decoded)} to decode with, "
        f"compiled unless the cache has them; padding: {padding}"
    )


def _memory(batches: Sequence[FilledBatch], pipe: Any, devices: int, cells: int | None) -> list[str]:
    """Return the memory that the largest batch takes on a device, which it surely needs, beside what there is."""
    if not isinstance(pipe, Parts):  # a stand-in has no weights
        return []
    most = max(batches, key=lambda batch: len(batch.filled) * size_of(batch.rows[0])[0] * size_of(batch.rows[0])[1])
    row, factor = most.rows[0], pipe.vae.config.factor
    high, wide = (side // factor for side in size_of(row))
    guided = any(one.guidance_scale is not None and one.guidance_scale > 1 for one in most.rows)
    needed = drawing_bytes(
        pipe, (high, wide), -(-len(most.filled) // devices), 1 + guided, cells, row.image is not None
    )
    there = device_bytes()
    if there is not None and jax.local_devices()[0].platform == "cpu":
        there //= devices  # which share the machine's
    told = "there is no saying how much is there" if there is None else f"of {there / 2**30:.1f} GiB"
    told += "; more than there is, expect halved batches" if there is not None and needed > there else ""
    return [f"memory per device: at least {needed / 2**30:.2g} GiB for the largest batch, weights included, {told}"]


def _time(batches: Sequence[FilledBatch], manifest: Manifest, methods: Methods, devices: int) -> str:
    """Return how long drawing will take by what earlier pictures of the folder took on as many devices."""
    took: dict[tuple[Any, ...], list[float]] = {}
    for record in manifest.images():
        if record.get("devices") == devices_of(devices) and isinstance(record.get("seconds"), (int, float)):
            took.setdefault(_key(record), []).append(float(record["seconds"]))
    known = [
        (len(batch.rows), statistics.median(took[key]))
        for batch in batches
        if (key := _key(methods.settings(batch.rows[0]))) in took
    ]
    images, here = sum(len(batch.rows) for batch in batches), sum(count for count, _ in known)
    if not here:
        return "expected time: unknown until the first batch is drawn"
    seconds = format_seconds(sum(count * each for count, each in known))
    rest = f" for {here} images, unknown for the other {images - here}" if here < images else ""
    return f"expected time: {seconds}{rest}, as pictures here took before, without compiling"


def _key(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(_hashable(settings.get(key)) for key in _KEYS)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
