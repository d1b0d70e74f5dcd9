"""Training state on disk: orbax checkpoints that are verified when read, and stopping on a signal."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from jaxmix.types import InputError, shown


class DamagedError(InputError):
    """A checkpoint cannot be read, or its numbers are not those that were saved."""


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    """Return () uint32: the sum over all values of a hash of their bits and places, modulo 2**32.

    The sum of integers is the same in any order, so the digest does not depend on how the array is split over devices,
    and no value has to leave its device.
    """
    if jnp.issubdtype(leaf.dtype, jnp.bool_):
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    hashed = _scramble(bits ^ _scramble(place + jnp.uint32(1)))
    return jnp.sum(hashed, dtype=jnp.uint32)


def _scramble(x: jax.Array) -> jax.Array:
    """Return a bijection of uint32 in which every bit of `x` touches every bit (the finaliser of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def digests(tree: Any) -> dict[str, list[Any]]:
    """Return {path: [shape, dtype, digest]} of the arrays in `tree`; equal for equal bits on any devices."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_digest(leaf) for _, leaf in leaves])
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype), int(total)]
        for (path, leaf), total in zip(leaves, sums, strict=True)
    }


class Checkpoints:
    """The numbered checkpoints in one folder, saved in the background; the newest `keep` are kept.

    Each holds digests of its arrays, which are checked when it is read. Checkpoints that must not be read again
    (damaged ones, and later ones when a run goes back to an earlier step) are moved to FOLDER-aside, never deleted.
    """

    def __init__(self, folder: Any, keep: int | None = 2, plan: Mapping[str, Any] | None = None):
        """Open or make `folder` (local or gs://).

        `plan` (plain JSON) is what the numbers in a state mean beside their shapes: it is saved with each, and a
        checkpoint with another one is refused.
        """
        import orbax.checkpoint as ocp
        from etils import epath

        self.folder = epath.Path(folder).absolute() if "://" not in str(folder) else epath.Path(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._plan = None if plan is None else json.loads(json.dumps(plan))

    def save(self, step: int, state: Any, extra: Any = None) -> None:
        """Begin to save `state` as number `step`, unless it is there, with `extra` (plain JSON) beside it."""
        import orbax.checkpoint as ocp

        if self._manager.latest_step() != step:
            beside = {"digests": digests(state), "extra": extra, "plan": self._plan}
            self._manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=beside)

    def newest(self) -> Any:
        """Wait until all checkpoints are on disk; return the path of the newest, None if there is none."""
        self._manager.wait_until_finished()
        steps = self._manager.all_steps()
        return self.folder / str(max(steps)) if steps else None

    def find(self, wanted: str | int) -> int | None:
        """Return the step to resume from: `latest` (None if there is none), `none`, or a number that must exist."""
        steps = sorted(self._manager.all_steps())
        if str(wanted) == "none":
            return None
        if str(wanted) == "latest":
            return steps[-1] if steps else None
        if not str(wanted).isdigit():
            raise InputError(f"resume_from_checkpoint: found {wanted!r}, expected latest, none or a step")
        if int(wanted) not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise InputError(f"resume_from_checkpoint: found no step {wanted} in {self.folder}, only {there}")
        return int(wanted)

    def resume(self, wanted: str | int, like: Any) -> tuple[int, Any, Any, list[str]]:
        """Return (step, state, extra, remarks) of the checkpoint to resume from; (0, like, None, remarks) for none.

        With `latest` a damaged checkpoint is skipped for the one before, and a remark says so. It is an InputError if
        none is intact, or the requested step is damaged. Checkpoints after the one returned are moved aside.
        """
        found, remarks, damaged = self.find(wanted), [], []
        while found is not None:
            try:
                state, extra = self._read(found, like)
            except DamagedError as error:
                if str(wanted) != "latest":
                    raise
                remarks.append(f"{error}; skipped")
                damaged.append(found)
                found = max((s for s in self._manager.all_steps() if s < found), default=None)
                continue
            break
        if found is None and damaged:
            raise InputError(f"{'; '.join(remarks)}; none is intact: resume_from_checkpoint none starts afresh")
        later = sorted(s for s in self._manager.all_steps() if s > (found if found is not None else -1))
        if later:
            aside = self._set_aside(later)
            remarks.append(f"checkpoints after step {found or 0} ({', '.join(map(str, later))}) moved to {aside}")
        return (0, like, None, remarks) if found is None else (found, state, extra, remarks)

    def restore(self, step: int, like: Any) -> Any:
        """Return the state saved at `step`, verified, in the structure, shapes and placement of `like`."""
        return self._read(step, like)[0]

    def _read(self, step: int, like: Any) -> tuple[Any, Any]:
        import orbax.checkpoint as ocp

        where = self.folder / str(step)
        try:
            beside = dict(self._manager.metadata(step).custom_metadata or {})
        except Exception as error:
            raise DamagedError(f"{where}: damaged, its metadata cannot be read ({_first(error)})") from error
        saved = beside.get("digests")  # checkpoints of earlier versions have none and cannot be verified
        if beside.get("plan") and self._plan is not None:
            _compare_plans(where, beside["plan"], self._plan)
        if saved is not None:
            self._compare_layout(where, saved, like)
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:
            if saved is None and isinstance(error, ValueError | KeyError | TypeError):
                raise InputError(
                    f"{where}: found a checkpoint of another model or optimizer, expected this config's "
                    f"({_first(error)})"
                ) from error
            raise DamagedError(f"{where}: damaged, it cannot be read ({_first(error)})") from error
        if saved is not None:
            other = [path for path, row in digests(state).items() if row[2] != saved[path][2]]
            if other:
                raise DamagedError(f"{where}: damaged, {len(other)} array(s) not as saved, such as {other[0]}")
        return state, beside.get("extra")

    def _compare_layout(self, where: Any, saved: dict[str, Any], like: Any) -> None:
        expected = {
            jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(like)
        }
        found = {path: list(row[:2]) for path, row in saved.items()}
        for path in sorted(expected.keys() | found.keys()):
            if expected.get(path) != found.get(path):
                raise InputError(
                    f"{where}: found a checkpoint of another model or optimizer, expected this config's "
                    f"({path}: found {found.get(path, 'nothing')}, expected {expected.get(path, 'nothing')})"
                )

    def _set_aside(self, steps: list[int]) -> Any:
        aside = self.folder.parent / f"{self.folder.name}-aside"
        if jax.process_index() == 0:
            aside.mkdir(parents=True, exist_ok=True)
            for step in steps:
                if (aside / str(step)).exists():
                    (aside / str(step)).rmtree()
                (self.folder / str(step)).rename(aside / str(step))
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("checkpoints aside")
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _compare_plans(where: Any, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            raise InputError(
                f"{where}: trained with another {key}: found {shown(found.get(key))}, expected "
                f"{shown(expected.get(key))}; go on with the first, or give another output_dir"
            )


def _first(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def stop_on_signals() -> Iterator[list[str]]:
    """Collect SIGTERM and Ctrl-C in the yielded list, for the loop to check between steps.

    A second Ctrl-C interrupts at once. Outside the main thread signals cannot be caught and the list stays empty.
    """
    caught: list[str] = []

    def note(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            # None: a handler that is not Python's, such as that of jax.distributed; it cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
