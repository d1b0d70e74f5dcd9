"""Training state on disk: orbax checkpoints, how to find the one to resume from, and stopping on a signal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from jaxmix.types import InputError


class Checkpoints:
    """The numbered checkpoints in one folder; saving happens in the background, the newest `keep` stay."""

    def __init__(self, folder: Any, keep: int | None = 2):
        """Open or make `folder` (local or gs://)."""
        import orbax.checkpoint as ocp
        from etils import epath

        self.folder = epath.Path(folder).absolute() if "://" not in str(folder) else epath.Path(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any) -> None:
        """Begin to save `state` as number `step`; one that is there already is left."""
        import orbax.checkpoint as ocp

        if self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(state))

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
            raise InputError(f"resume_from_checkpoint: found no step {wanted} in {self.folder} (there: {there})")
        return int(wanted)

    def restore(self, step: int, like: Any) -> Any:
        """Return the state saved at `step`, in the structure, shapes and places of `like`."""
        import orbax.checkpoint as ocp

        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except (ValueError, KeyError, TypeError) as error:
            first = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self.folder}/{step}: found a checkpoint of another model or optimizer, expected this config's "
                f"({first})"
            ) from error

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


@contextmanager
def stop_on_signals() -> Iterator[list[str]]:
    """Collect SIGTERM and Ctrl-C in the list that is yielded, for the loop to look at between two steps.

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
            signal.signal(number, handler)
