"""What users hand to a pipeline, checked: numbers and masks one an image, images cut into batches, bytes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxmix import control as seam
from jaxmix.control import Control
from jaxmix.sharding import DATA
from jaxmix.types import AnyArray, Array, InputError


def per_image(name: str, value: float | Sequence[float], n: int) -> np.ndarray:
    """Return a number, or one an image, as float32 (n,)."""
    numbers = np.asarray(value, np.float32)
    if numbers.shape not in ((), (n,)):
        raise InputError(f"{name}: found {len(numbers)} values, expected 1 or one for each of the {n} prompts")
    return np.broadcast_to(numbers, (n,))


def of_shape(name: str, value: AnyArray, shape: tuple[int, ...]) -> Array:
    """Return an array as float32; raises `InputError` if it has another shape."""
    if np.shape(value) != shape:
        raise InputError(f"{name}: found shape {np.shape(value)}, expected {shape}")
    return jnp.asarray(value, jnp.float32)


def batches(
    n: int, batch_size: int | None, mesh: Mesh | None, controls: Sequence[Control]
) -> Iterator[tuple[Array, int]]:
    """Yield (the rows of a batch, how many of them count); the tail repeats the last image.

    Raises `InputError` before the first if a control's rows look at rows of another batch or device.
    """
    devices = 1 if mesh is None else mesh.shape[DATA]
    together = -(-(batch_size or n) // devices) * devices
    for control in controls:
        seam.check_batches(seam.tile_rows(control, n), n, together // devices)
    for first in range(0, n, together):
        yield jnp.minimum(jnp.arange(first, first + together), n - 1), n - first


def shrink_masks(masks: AnyArray, shape: tuple[int, ...], factor: int) -> Float[Array, "n h w 1"]:
    """Return masks at the latents' size, by nearest neighbour, 0 or 1."""
    masks = np.asarray(masks)
    if masks.shape != shape:
        raise InputError(f"masks: found shape {masks.shape}, expected that of the images, {shape}")
    whole = 255 if masks.dtype == np.uint8 and masks.max(initial=0) > 1 else 1
    return jnp.asarray(masks[:, ::factor, ::factor, None] >= whole / 2, jnp.float32)


def to_uint8(images: Array) -> np.ndarray:
    """Return images in [0, 1] as bytes."""
    return np.asarray(jnp.round(images * 255.0).astype(jnp.uint8))
