"""Where training runs: the mesh for a config, the update compiled for it, and agreement between processes."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmix.sharding import fsdp_specs, place, place_rows, replicated, train_mesh
from jaxmix.tuning.flops import memory_of, model_flops
from jaxmix.tuning.update import TrainState
from jaxmix.types import InputError


def training_devices(rows: int, fsdp: int = 1, devices: int = 0) -> list[Any]:
    """Return the devices to train on: `devices` of them, or as many as possible for 0.

    The number of devices must divide `rows`, those of one micro-batch over all devices. For 0, one process takes the
    largest multiple of `fsdp` that does; with several processes every device must take part, and anything else is an
    InputError.
    """
    found = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    several = jax.process_count() > 1
    if not 0 <= devices <= len(found):
        raise InputError(f"devices: found {devices}, expected 0 (all) to {len(found)}")
    if several and devices not in (0, len(found)):
        raise InputError(f"devices: found {devices}, expected 0: {jax.process_count()} processes use all {len(found)}")
    if fsdp < 1 or fsdp > len(found):
        raise InputError(f"fsdp: found {fsdp}, expected 1 to {len(found)}, the number of devices")
    if devices or several:
        count = devices or len(found)
        if count % fsdp:
            raise InputError(f"fsdp: found {fsdp}, expected a divisor of the {count} devices")
        if rows % count:
            raise InputError(
                f"train_batch_size: found {rows} rows per micro-batch (train_batch_size / "
                f"gradient_accumulation_steps), expected a multiple of the {count} devices"
            )
        return found[:count]
    fitting = [n for n in range(fsdp, len(found) + 1, fsdp) if rows % n == 0]
    if not fitting:
        raise InputError(f"train_batch_size: found {rows} rows per micro-batch, expected a multiple of fsdp = {fsdp}")
    return found[: fitting[-1]]


def agree(*numbers: float) -> tuple[float, ...]:
    """Return the largest of all processes for each number; every process must call this at the same step."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.asarray(numbers, np.float32))
    return tuple(np.max(np.reshape(gathered, (-1, len(numbers))), 0).tolist())


@dataclasses.dataclass(frozen=True)
class CompiledUpdate:
    """An update for one shape of batch: seconds to compile, model FLOPs of a step on all devices, a device's memory."""

    run: Callable[..., Any]
    seconds: float = 0.0
    flops: float = 0.0
    memory: str = ""
    bytes: int = 0


class Stepper:
    """An update for certain devices, which places its inputs and compiles once per shape of batch.

    On one device everything is put there. On several, rows are split over all of them; the trained weights, their
    average and optimiser state, and `frozen` are split over fsdp by `jaxmix.sharding.fsdp_specs`, or whole on each if
    fsdp is 1.
    """

    def __init__(self, update: Callable[..., Any], devices: Sequence[Any], fsdp: int = 1):
        """Make the mesh if there is more than one device; `update` is what `make_update` returned."""
        self.devices = list(devices)
        self.mesh: Mesh | None = train_mesh(fsdp, devices) if len(devices) > 1 else None
        self._update = update
        self._compiled: dict[Any, CompiledUpdate] = {}

    def place(self, tree: Any) -> Any:
        """Return weights or a training state placed as this stepper needs them."""
        if self.mesh is None:
            # Host arrays would be copied in every step. Bound to the device, as a checkpoint's are: the program of a
            # resumed run is then the one that the compile cache holds of the first.
            return jax.device_put(tree, self.devices[0])
        return place(tree, self.mesh, fsdp_specs(tree, self.mesh))

    def key(self, seed: int) -> jax.Array:
        """Return the run's random key, on every device."""
        if self.mesh is None:
            return jax.random.key(seed)
        return jax.jit(lambda: jax.random.key(seed), out_shardings=replicated(self.mesh))()

    def rows(self, batch: Any) -> Any:
        """Return the batch on the devices, given this process's rows of it."""
        return batch if self.mesh is None else place_rows(batch, self.mesh)

    def compiled(self, state: TrainState, frozen: Any, batch: Any, key: jax.Array) -> CompiledUpdate:
        """Return the update for this shape of batch, compiling it if it is new."""
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch)), jax.tree.structure(batch)
        if shapes not in self._compiled:
            self._compiled[shapes] = self._compile(state, frozen, batch, key)
        return self._compiled[shapes]

    def _compile(self, state: TrainState, frozen: Any, batch: Any, key: jax.Array) -> CompiledUpdate:
        if not hasattr(self._update, "trace"):
            return CompiledUpdate(self._update)  # not jitted: run as it is
        began = time.monotonic()
        if self.mesh is None:
            traced = self._update.trace(state, frozen, batch, key)
            compiled = traced.lower().compile()
        else:
            # Outputs placed like the inputs, so that the next step takes them as they are.
            out = (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(self.mesh))
            with jax.set_mesh(self.mesh):
                traced = jax.jit(self._update, donate_argnums=0, out_shardings=out).trace(state, frozen, batch, key)
                compiled = traced.lower().compile()
        needed, said = memory_of(compiled)
        return CompiledUpdate(compiled, time.monotonic() - began, model_flops(traced.jaxpr), said, needed)

    def whole(self, state: TrainState, on_host: bool = False) -> TrainState:
        """Return `state` with params and ema whole on the first device of this process, as if it were the only one.

        With `on_host` they are NumPy arrays if there is a mesh; a device then holds one of them whole at a time.
        opt_state and step stay where they are. With several processes, every process must call this.
        """
        if self.mesh is None:
            return state
        mesh = self.mesh

        def first(leaf: jax.Array) -> Any:
            if not leaf.is_fully_replicated:
                leaf = _gather_on(NamedSharding(mesh, PartitionSpec()))(leaf)
            return np.asarray(leaf.addressable_data(0)) if on_host else leaf.addressable_data(0)

        return dataclasses.replace(state, params=jax.tree.map(first, state.params), ema=jax.tree.map(first, state.ema))


@functools.cache
def _gather_on(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)
