"""VMix (arXiv 2412.20800) in a job: an adapter, the aesthetic labels of each picture, and how strongly they act."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

from infer.checks import check_number, check_text
from infer.methods.method import BatchRows, Method
from infer.methods.method import Flags as Base
from infer.rows import Field, Row
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """A VMix adapter for rows that name none.

    Attributes:
        vmix: VMix: an adapter, "mini-vmix" (embedded) or an adapter.safetensors written by train.vmix
        vmix_scale: VMix: how strongly to apply it, 0 for not at all (no unit; the paper shows 0 to 2); default: 1
        labels: VMix: which of its labels the images get: all, none, or some, such as color,light; default: all
        vmix_lora: VMix: whether to also use the LoRA that was trained along with the adapter
    """

    vmix: str | None = None
    vmix_scale: float | None = None
    labels: str | None = None
    vmix_lora: Literal["on", "off"] = "on"

    def __post_init__(self) -> None:
        """Refuse a scale that is not a number."""
        super().__post_init__()
        if self.vmix_scale is not None:
            check_number("--vmix-scale", self.vmix_scale)

    def method(self) -> Method:
        """Return the method under these flags."""
        return VMix(self)


class VMix(Method):
    """Rows with an adapter."""

    name = "vmix"
    switches = ("vmix",)
    part_of_model = True

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.fields = {
            "vmix": Field(check_text, flags.vmix),
            "labels": Field(check_labels, "all" if flags.labels is None else flags.labels),
            "vmix_scale": Field(check_number, 1.0 if flags.vmix_scale is None else flags.vmix_scale),
        }
        self._adapters: dict[str, Any] = {}

    def prepare(self) -> None:
        """Open the flag's adapter: a mistake there is one of the whole job."""
        if self.flags.vmix is not None:
            self.opened(self.flags.vmix)

    def opened(self, name: str) -> Any:
        """Return an adapter, opened only once."""
        import jaxmix

        if name not in self._adapters:
            try:
                self._adapters[name] = jaxmix.VMix.load(name)
            except InputError as error:
                raise InputError(f"vmix: {error}") from None
        return self._adapters[name]

    def open(self, pipe: Any) -> None:
        """Refuse the flag's adapter if it does not fit the model."""
        if self.flags.vmix is not None:
            self.opened(self.flags.vmix).check(pipe)

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse labels that the adapter does not have."""
        from jaxmix.controls.vmix import parse_labels

        parse_labels(row["labels"] or "none", self.opened(row["vmix"]).config.dimensions)
        return row

    def settings(self, row: Row) -> dict[str, Any]:
        """Return whether the adapter's LoRA is used."""
        return {"vmix_lora": self.flags.vmix_lora}

    def program_key(self, rows: Sequence[Row]) -> Hashable:
        """Return the adapter, which rows of a batch share."""
        found = list(dict.fromkeys(row["vmix"] for row in rows if row["vmix"] is not None))
        if len(found) > 1:
            raise InputError(f"vmix: found {' and '.join(found)}, expected one adapter in a group")
        return tuple(found)

    def weights(self, row: Row) -> Hashable:
        """Name the adapter, if its LoRA is merged into the weights."""
        used = self.flags.vmix_lora == "on" and self.opened(row["vmix"]).lora is not None
        return ("vmix", row["vmix"]) if used else None

    def plan(self, row: Row) -> str:
        """Name the adapter."""
        return f"vmix {Path(row['vmix']).name}"

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the adapter with the labels and the scale of each row."""
        on = [self.on(row) for row in batch.rows]
        (name,) = {row["vmix"] for row, here in zip(batch.rows, on, strict=True) if here}
        labels = [row["labels"] if here else "none" for row, here in zip(batch.rows, on, strict=True)]
        scales = [row["vmix_scale"] if here else 0.0 for row, here in zip(batch.rows, on, strict=True)]
        return [self.opened(name).on(labels, scales, lora=1.0 if self.flags.vmix_lora == "on" else 0.0)]

    def shown(self, row: Row) -> dict[str, str]:
        """Show the labels and the scale."""
        return {"VMix": f"{row['labels']} x {row['vmix_scale']:g}"}


def check_labels(key: str, value: Any) -> str:
    """Return labels as "all", "none" or comma-separated names, from such text or a list of names."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = ",".join(value) or "none"
    return check_text(key, value)
