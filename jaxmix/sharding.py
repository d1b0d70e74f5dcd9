"""Meshes and placements: rows over devices for sampling, rows and weights over devices for training."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmix.types import InputError

DATA = "data"
"""Name of the mesh axis over which rows are split."""
FSDP = "fsdp"
"""Name of the mesh axis over which weights are split; rows are split over it as well."""


def data_mesh(devices: int | None = None) -> Mesh:
    """Return a mesh of one ``data`` axis over the first ``devices`` devices of this process, all of them if None.

    Of several processes each draws on its own. Raises `InputError` if there are not as many devices.
    """
    found = jax.local_devices()
    n = len(found) if devices is None else devices
    if not 1 <= n <= len(found):
        raise InputError(f"devices={n}: found {len(found)} {found[0].platform} device(s), expected 1 to {len(found)}")
    # Auto, because jax.make_mesh makes Explicit axes by default and sharding constraints raise under those.
    return jax.make_mesh((n,), (DATA,), axis_types=(AxisType.Auto,), devices=found[:n])


def train_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh (data, fsdp) over `devices`, all devices of all processes if None; `fsdp` must divide their number.

    Devices are ordered by (process, id) and fsdp is the minor axis. So each process holds consecutive rows of a batch,
    whatever the mesh, and weights are gathered between neighbours, within one host if fsdp divides its devices.
    """
    ordered = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    if fsdp < 1 or len(ordered) % fsdp:
        raise InputError(f"fsdp: found {fsdp}, expected a divisor of the {len(ordered)} devices")
    grid = np.array(ordered).reshape(-1, fsdp)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def device_bytes() -> int | None:
    """Return the memory of a device, on a CPU that of the machine (or of the container); None if nobody says."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = []
    if hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
            found.append(int(Path(limit).read_text()))
    return min(found, default=None)


def rows_over(mesh: Mesh) -> NamedSharding:
    """Return the placement of arrays whose first axis is rows: split over every axis of the mesh, data major."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the placement of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def fsdp_specs(tree: Any, mesh: Mesh, min_size: int = 4096) -> Any:
    """Return the tree of `PartitionSpec`s that splits the weights of `tree` over the mesh's fsdp axis.

    An array of two or more axes and at least `min_size` values is split along its last axis (output features: kernels
    are (..., in, out)), or the last but one if fsdp does not divide the last. Everything else (biases, norms, small
    kernels, and what fsdp divides in neither) stays whole on every device: gathering it would cost more than storing
    it. The rule depends on shapes alone, so an optimiser's moments are split exactly like their weights.
    """
    return jax.tree.map(lambda leaf: _fsdp_spec(np.shape(leaf), mesh.shape[FSDP], min_size), tree)


def _fsdp_spec(shape: tuple[int, ...], fsdp: int, min_size: int = 4096) -> PartitionSpec:
    if fsdp > 1 and len(shape) >= 2 and np.prod(shape) >= min_size:
        for axis in (len(shape) - 1, len(shape) - 2):
            if shape[axis] % fsdp == 0:
                return PartitionSpec(*([None] * axis), FSDP)
    return PartitionSpec()


def gathered(weight: Any) -> Any:
    """Return a weight whole on every device where the mesh in scope splits it, its gradient split again.

    For layers: a weight is whole while its layer works, forwards and (recomputed) backwards, and never all at once.
    """
    fsdp = jax.sharding.get_abstract_mesh().shape.get(FSDP, 1)
    spec = _fsdp_spec(np.shape(weight), fsdp)
    return _gather(weight, spec) if spec != PartitionSpec() else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: Any, spec: PartitionSpec) -> Any:
    return jax.lax.with_sharding_constraint(weight, PartitionSpec())


def _gather_forward(weight: Any, spec: PartitionSpec) -> tuple[Any, None]:
    return _gather(weight, spec), None


def _gather_backward(spec: PartitionSpec, nothing: None, cotangent: Any) -> tuple[Any]:
    return (jax.lax.with_sharding_constraint(cotangent, spec),)


_gather.defvjp(_gather_forward, _gather_backward)


def place(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Return `tree` on the mesh, placed by `specs`: a tree, or one spec for all leaves.

    Every process must have the whole tree with the same values; each reads from it the parts of its own devices.
    """
    one = isinstance(specs, PartitionSpec)
    several = jax.process_count() > 1

    def put(leaf: Any, spec: PartitionSpec) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        if not several or getattr(leaf, "sharding", None) == sharding:
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map((lambda leaf: put(leaf, specs)) if one else put, tree, *(() if one else (specs,)))


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Return the batch with its rows split over the mesh, from the rows of this process.

    Every leaf has rows first. A single process gives the whole batch; one of several gives its share, and the batch is
    the shares of the processes in order.
    """
    sharding = rows_over(mesh)
    if jax.process_count() == 1:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), tree)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)
