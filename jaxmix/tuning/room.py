"""Whether a training step fits its devices, said before it runs, with what would make it smaller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxmix.sharding import FSDP, device_bytes, fsdp_specs
from jaxmix.types import InputError

_FULL = ("RESOURCE_EXHAUSTED", "Ran out of memory", "out of memory")


def held_bytes(trees: Any, mesh: Any) -> int:
    """Return the bytes that one device holds of trees that are split over a mesh's fsdp axis, or whole without one."""
    leaves = [leaf for leaf in jax.tree.leaves(trees) if hasattr(leaf, "dtype")]
    if mesh is None:
        return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in leaves)
    total = 0
    for leaf, spec in zip(leaves, jax.tree.leaves(fsdp_specs(leaves, mesh)), strict=True):
        total += int(np.prod(leaf.shape)) * leaf.dtype.itemsize // (mesh.shape[FSDP] if FSDP in spec else 1)
    return total


def check_fits(needed: int, devices: Sequence[Any], cfg: Any, what: str) -> None:
    """Raise `InputError` if one device needs more bytes than it has: the numbers, and the keys that would help.

    The virtual devices of a CPU share the machine's memory. Nothing is said where a device does not tell its memory.
    """
    there = device_bytes()
    if there is None:
        return
    mine = [device for device in devices if device.process_index == jax.process_index()]
    if mine and mine[0].platform == "cpu":
        there //= len(mine)
    if needed > there:
        raise InputError(
            f"memory: {what} need {needed / 2**30:.1f} GiB per device, expected no more than the {there / 2**30:.1f} "
            f"GiB of each of the {len(devices)} ({devices[0].device_kind}); {helps(cfg, len(devices))}"
        )


@contextlib.contextmanager
def told_if_full(devices: Sequence[Any], cfg: Any, what: str) -> Iterator[None]:
    """Turn what XLA raises when a device is full into an `InputError` that says what would help."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        if not any(word in said for word in _FULL):
            raise
        raise InputError(
            f"memory: {what} do not fit the {len(devices)} devices ({devices[0].device_kind}): {said[:200]}; "
            f"{helps(cfg, len(devices))}"
        ) from None


def helps(cfg: Any, devices: int) -> str:
    """Return which keys of a trainer's config would make its step smaller, the cheapest first."""
    said = []
    if getattr(cfg, "gradient_checkpointing", True) is False:
        said.append("--gradient_checkpointing true")
    if cfg.mixed_precision == "no":
        said.append("--mixed_precision bf16")
    rows = cfg.train_batch_size // cfg.gradient_accumulation_steps // devices
    if rows > 1:
        said.append(f"--gradient_accumulation_steps {cfg.gradient_accumulation_steps * rows}")
    if cfg.fsdp < devices:
        said.append(f"--fsdp {devices}")
    if cfg.ema_decay:
        said.append("--ema_decay 0")
    if getattr(cfg, "rank", None):
        said.append(f"--rank {max(1, cfg.rank // 2)}")
    elif hasattr(cfg, "rank"):
        said.append("--rank 16")
    if not said:
        return "smaller pictures (--resolution) or more devices (--fsdp) would help"
    return f"what would help: {', '.join(said)}"
