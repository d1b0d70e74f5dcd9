"""The adapters of a job: which files, merged into the model or bound to its rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from infer.rows import Row
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters that all rows of a job share.

    Attributes:
        vmix: a `jaxmix.VMix`, or None.
        vmix_lora: whether the LoRA that was trained along with it is used too.
        loras: (path, strength) of LoRAs to merge into the model.
    """

    vmix: Any = None
    vmix_lora: bool = True
    loras: tuple[tuple[str, float], ...] = ()

    def apply(self, pipe: Any) -> Any:
        """Return the pipeline with every LoRA merged in; raises InputError where an adapter does not fit it."""
        from jaxmix import LoRA, apply_loras

        if self.loras:
            pipe = apply_loras(pipe, [(LoRA.load(path, pipe), strength) for path, strength in self.loras])
        if self.vmix is not None:
            self.vmix.check(pipe)
            if self.vmix_lora:
                pipe = self.vmix.apply_lora(pipe)
        return pipe

    def complete(self, row: Row) -> Row:
        """Return the row with labels and scale filled in; raises InputError for those that the adapter has not."""
        if self.vmix is None:
            for key in ("labels", "vmix_scale"):
                if getattr(row, key) is not None:
                    raise InputError(f"{key}: found {getattr(row, key)!r} without an adapter, expected --vmix as well")
            return row
        from jaxmix.controls.vmix import parse_labels

        row = row.complete(labels="all", vmix_scale=1.0)
        parse_labels(row.labels or "none", self.vmix.config.dimensions)
        return row

    def bind(self, pipe: Any, rows: Sequence[Row]) -> tuple[Any, ...]:
        """Return the controls for completed rows."""
        if self.vmix is None:
            return ()
        return (self.vmix.bind(pipe, [row.labels for row in rows], [row.vmix_scale for row in rows]),)

    def settings(self, vmix: str | None) -> dict[str, Any]:
        """Return what of the adapters goes into each picture's settings; `vmix` is the adapter's name or path."""
        held: dict[str, Any] = {}
        if vmix is not None:
            held |= {"vmix": vmix, "vmix_lora": "on" if self.vmix_lora else "off"}
        if self.loras:
            held["lora"] = [f"{path}:{strength:g}" for path, strength in self.loras]
        return held


def open_adapters(vmix: str | None, vmix_lora: bool, lora: str | None) -> Adapters:
    """Return the adapters that the flags name; the VMix file is read here, LoRAs once the model is there."""
    from jaxmix import VMix

    return Adapters(None if vmix is None else VMix.load(vmix), vmix_lora, parse_loras(lora))


def parse_loras(text: str | None) -> tuple[tuple[str, float], ...]:
    """Read "PATH[:STRENGTH][,PATH[:STRENGTH]...]"; the strength is 1 where none is given."""
    found = []
    for item in (text or "").split(","):
        if not item.strip():
            continue
        path, colon, strength = item.strip().rpartition(":")
        try:
            value = float(strength) if colon else 1.0
        except ValueError:
            path, value = item.strip(), 1.0  # a colon that belongs to the path
        if not math.isfinite(value):
            raise InputError(f"--lora {item.strip()}: expected a finite strength, found {strength}")
        found.append((path if colon and path else item.strip(), value))
    return tuple(found)
