"""Meshes and placements for data-parallel sampling."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh

from jaxmix.types import InputError

DATA = "data"
"""Name of the mesh axis over which rows are split."""


def data_mesh(devices: int | None = None) -> Mesh:
    """Return a mesh of one ``data`` axis over the first ``devices`` devices, all of them if None.

    Raises `InputError` for a count that does not exist.
    """
    found = jax.devices()
    n = len(found) if devices is None else devices
    if not 1 <= n <= len(found):
        raise InputError(f"devices={n}: found {len(found)} {found[0].platform} device(s), expected 1 to {len(found)}")
    # Auto, because jax.make_mesh makes Explicit axes by default and sharding constraints raise under those.
    return jax.make_mesh((n,), (DATA,), axis_types=(AxisType.Auto,), devices=found[:n])
