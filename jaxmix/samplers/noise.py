"""Noise that depends on each image's seed alone, not on the batch, the row or the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.types import InputError


def seed_array(seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return seeds as uint32 (n,); raises InputError for one that is not an integer from 0 to 2**32 - 1."""
    for row, seed in enumerate(seeds):
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
            raise InputError(f"seed of row {row} is {seed!r}, expected an integer from 0 to {2**32 - 1}")
    return np.asarray(seeds, np.uint32)


def initial_noise(seeds: jax.Array | Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """Return standard normal noise, float32 (n, *shape), whose row i is a function of seeds[i] alone.

    Python integers are checked as by `seed_array`; arrays may be traced.
    """
    return _normal(seeds, 0, shape)


def step_noise(seeds: jax.Array | Sequence[int], step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Return the noise (n, *shape) that a stochastic solver adds at `step`, independent of the initial noise."""
    return _normal(seeds, step + 1, shape)


def _normal(seeds: jax.Array | Sequence[int], stream: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    if not isinstance(seeds, jax.Array):
        seeds = seed_array(seeds)

    def row(seed: jax.Array) -> jax.Array:
        # Named, so that images do not depend on the process's default generator.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)
        return jax.random.normal(key, shape, jnp.float32)

    return jax.vmap(row)(jnp.asarray(seeds, jnp.uint32))
