"""Images cut into batches of equal size, so that each program compiles once; groups are kept whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmix.pipeline.given import mask_values
from jaxmix.types import NOT_FINITE, AnyArray, Array, InputError, NotFiniteWarning


class Batch(NamedTuple):
    """Images to draw together: their indices, with repetitions to fill up the batch.

    ``kept`` are the positions in ``rows`` of those that count, each image once. ``groups`` are the sizes of the groups
    of the rows, repetitions included.
    """

    rows: np.ndarray
    kept: np.ndarray
    groups: tuple[int, ...]


def pack(
    n: int, batch_size: int | None, devices: int, groups: Sequence[int] | None = None, fixed: int | None = None
) -> Iterator[Batch]:
    """Cut ``n`` images into batches of ``batch_size`` (None: all), rounded up to a multiple of the devices.

    ``groups`` are the sizes of consecutive groups of images that stay together, in one batch and on one device. A
    device's share is filled up by repeating its last group as often as it fits, and then the last image. ``fixed`` is
    the number of rows of a device, whatever the images need: that of a program that is compiled already. Raises
    `InputError` for groups that do not add up to the ``n`` images, or are too large for a share.
    """
    if groups is None:
        together = -(-min(batch_size or n, n) // devices) * devices if fixed is None else fixed * devices
        for first in range(0, n, together):
            some = np.minimum(np.arange(first, first + together), n - 1)
            yield Batch(some, np.arange(min(together, n - first)), (1,) * together)
        return
    if sum(groups) != n or min(groups) < 1:
        raise InputError(f"groups: found sizes {list(groups)}, expected sizes that add up to the {n} images")
    share = -(-(batch_size or n) // devices) if fixed is None else fixed
    if max(groups) > share:
        if batch_size is not None or fixed is not None:
            raise InputError(
                f"batch_size: found {batch_size or share} images on {devices} device(s), expected room for a group of "
                f"{max(groups)} on each"
            )
        share = max(groups)
    if len(set(groups)) == 1 and fixed is None:
        share -= share % groups[0]  # whole groups only
    starts = np.cumsum([0, *groups[:-1]])
    shares: list[list[int]] = [[]]  # of groups
    for g in range(len(groups)):
        if shares[-1] and sum(groups[k] for k in shares[-1]) + groups[g] > share:
            shares.append([])
        shares[-1].append(g)
    if fixed is None:
        share = max(sum(groups[k] for k in held) for held in shares)  # no larger than needed
    counted = len(shares)
    shares += [shares[-1]] * (-len(shares) % devices)
    for first in range(0, len(shares), devices):
        rows: list[int] = []
        sizes: list[int] = []
        kept: list[int] = []
        for number in range(first, first + devices):
            held, room = list(shares[number]), share - sum(groups[k] for k in shares[number])
            here = len(rows)
            for k in held:
                rows += range(starts[k], starts[k] + groups[k])
                sizes.append(groups[k])
            if number < counted:
                kept += range(here, len(rows))
            last = held[-1]
            while room >= groups[last]:
                rows += range(starts[last], starts[last] + groups[last])
                sizes.append(groups[last])
                room -= groups[last]
            rows += [rows[-1]] * room
            sizes[-1] += room
        yield Batch(np.asarray(rows), np.asarray(kept), tuple(sizes))


def pack_alike(
    counts: np.ndarray, batch_size: int | None, devices: int, groups: Sequence[int] | None = None
) -> Iterator[tuple[int, Batch]]:
    """Yield the batches of images of each count (n,) and the count, as `pack` cuts them; a group has its largest."""
    sizes = [1] * len(counts) if groups is None else groups
    if sum(sizes) != len(counts) or min(sizes) < 1:
        yield from ((0, batch) for batch in pack(len(counts), batch_size, devices, groups))  # which says what is wrong
        return
    members = np.split(np.arange(len(counts)), np.cumsum(sizes)[:-1])
    held: dict[int, list[np.ndarray]] = {}
    for some in members:
        held.setdefault(int(counts[some].max()), []).append(some)
    for count, units in sorted(held.items()):
        rows = np.concatenate(units)
        some_groups = None if groups is None else [len(unit) for unit in units]
        for batch in pack(len(rows), batch_size, devices, some_groups):
            yield count, batch._replace(rows=rows[batch.rows])


def of_shape(name: str, value: AnyArray, shape: tuple[int, ...]) -> Array:
    """Return an array as float32; raises `InputError` if it has another shape."""
    if np.shape(value) != shape:
        raise InputError(f"{name}: found shape {np.shape(value)}, expected {shape}")
    return jnp.asarray(value, jnp.float32)


def shrink_masks(masks: AnyArray, shape: tuple[int, ...], factor: int) -> Float[Array, "n h w 1"]:
    """Return masks shrunk to the latents' size by nearest neighbour, 0 or 1."""
    if np.shape(masks) != shape:
        raise InputError(f"masks: found shape {np.shape(masks)}, expected that of the images, {shape}")
    return jnp.asarray(inside(masks)[:, ::factor, ::factor, None], jnp.float32)


def inside(mask: AnyArray) -> np.ndarray:
    """Return where a mask is set (bool): at half its full value or more, which is 255 for bytes above 1, else 1."""
    mask = mask_values("masks", mask)
    return mask >= (255 if mask.dtype == np.uint8 else 1) / 2


def to_bytes(images: Float[Array, "n H W 3"]) -> tuple[np.ndarray, np.ndarray]:
    """Return images in [0, 1] as uint8, and which of them (n,) hold finite numbers only: the others are black there."""
    made, finite = start_bytes(images)
    return np.asarray(made), np.asarray(finite)


@jax.jit
def start_bytes(images: Float[Array, "n H W 3"]) -> tuple[Array, Array]:
    """Return what `to_bytes` does, still on the device, and perhaps unfinished."""
    return jnp.round(jnp.nan_to_num(images) * 255.0).astype(jnp.uint8), jnp.isfinite(images).all((1, 2, 3))


def on_host(x: Array, kept: np.ndarray, output: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images to keep, as `Pipeline.draw` outputs them, and which of them (n,) are finite."""
    if output in ("uint8", "pil"):
        images, finite = to_bytes(x)
    else:
        images = np.asarray(x)
        finite = np.isfinite(images).all((1, 2, 3))
    return images[kept], finite[kept]


def warn_of_broken(finite: np.ndarray) -> None:
    """Warn of images with numbers that are not finite, given which (n,) have none."""
    if not finite.all():
        rows = ", ".join(map(str, np.flatnonzero(~finite)))
        warnings.warn(f"images {rows}: each {NOT_FINITE}", NotFiniteWarning, stacklevel=4)
