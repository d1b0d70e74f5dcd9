"""Noise that depends on each image's seed alone, not on the batch, the row or the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.types import whole

MAX_SEED = 2**64 - 1


def seed_array(seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return seeds as uint32 (n, 2), the upper and lower halves of 64 bits.

    Raises `InputError` for one that is not a whole number from 0 to 2**64 - 1.
    """
    found = [whole(f"seed of row {row}", seed, 0, MAX_SEED) for row, seed in enumerate(seeds)]
    return np.asarray([(seed >> 32, seed & 0xFFFFFFFF) for seed in found], np.uint32).reshape(-1, 2)


def initial_noise(seeds: jax.Array | Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """Return standard normal noise, float32 (n, *shape), whose row i is a function of seeds[i] alone.

    Python integers are checked as by `seed_array`. Arrays may be traced: (n,) uint32, or (n, 2) as `seed_array` returns
    them.
    """
    return _normal(seeds, 0, shape)


def step_noise(seeds: jax.Array | Sequence[int], step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Return the noise (n, *shape) that a stochastic solver adds at `step`, independent of the initial noise."""
    return _normal(seeds, step + 1, shape)


def _normal(seeds: jax.Array | Sequence[int], stream: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    halves = jnp.asarray(seeds if isinstance(seeds, jax.Array) else seed_array(seeds), jnp.uint32)
    if halves.ndim == 1:
        halves = jnp.stack([jnp.zeros_like(halves), halves], 1)

    def row(half: jax.Array) -> jax.Array:
        # Of both halves of a seed, as jax.random.key(seed) makes it where there are 64-bit integers. The kind is named,
        # so that images do not depend on the process's default generator.
        key = jax.random.fold_in(jax.random.wrap_key_data(half, impl="threefry2x32"), stream)
        return jax.random.normal(key, shape, jnp.float32)

    return jax.vmap(row)(halves)
