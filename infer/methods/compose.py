"""Composable Diffusion (arXiv 2206.01714) in a job: prompts joined by AND are drawn at once, each with its weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Literal

from infer.checks import kind_of
from infer.methods.method import BatchRows, Method
from infer.methods.method import Flags as Base
from infer.rows import Field, Row
from jaxmix.methods.composable import AND, Part, split_and
from jaxmix.types import InputError

SHOWN = 8
"""Rows of a bucket whose parts the plan says."""


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """How AND is read.

    Attributes:
        compose: Composable Diffusion: on draws prompts joined by AND (in capitals), such as "a cat :1.1 AND fog :-0.5",
            all at once, each with the weight behind its colon (no unit, 1 without one); off takes AND for a word
    """

    compose: Literal["on", "off"] = "on"

    def method(self) -> Method:
        """Return the method under these flags."""
        return Compose(self)


class Compose(Method):
    """Rows whose prompt has the word AND."""

    name = "compose"
    switches = ("compose",)
    says: ClassVar[str] = "AND in the prompt"

    def __init__(self, flags: Flags) -> None:
        self.fields = {"compose": Field(check_compose, flags.compose)}

    def on(self, row: Row) -> bool:
        """Say whether the prompt has AND, and the row does not make it a word."""
        return row["compose"] == "on" and AND.search(row.prompt) is not None

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse AND with nothing to join, and weights that are not finite; say what the model reads."""
        try:
            parts = split_and(row.prompt)
        except InputError as error:
            raise InputError(f"prompt: {error}; AND is a word where 'compose' is \"off\"") from None
        return dataclasses.replace(row, parts=tuple(part.text for part in parts))

    def program_key(self, rows: Sequence[Row]) -> Hashable:
        """Rows of one batch have as many prompts."""
        return max(len(self._parts(row)) for row in rows)

    def note(self, pipe: Any, rows: Sequence[Row], size: int) -> str:
        """Say the prompts and weights of the first rows."""
        here = [row for row in rows if self.on(row)]
        lines = [f"\n    {row.where}: {self._said(row)}" for row in here[:SHOWN]]
        return "".join(lines) + (f"\n    and {len(here) - SHOWN} more" if len(here) > SHOWN else "")

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the parts of each row."""
        import jaxmix

        parts = [self._parts(row) for row in batch.rows]
        further = [[part.text for part in some[1:]] for some in parts]
        return [jaxmix.ComposableDiffusion(further, [[part.weight for part in some] for some in parts])]

    def shown(self, row: Row) -> dict[str, str]:
        """Say the prompts and weights."""
        return {"composed of": self._said(row)}

    def _parts(self, row: Row) -> list[Part]:
        return split_and(row.prompt) if self.on(row) else [Part(row.prompt)]

    def _said(self, row: Row) -> str:
        return ", ".join(f"{part.weight:g} x '{part.text}'" for part in self._parts(row))


def check_compose(key: str, value: Any) -> str:
    """Return `value` if it is "on" or "off"."""
    if value not in ("on", "off"):
        raise InputError(f"{key}: found {kind_of(value)}, expected on or off")
    return value
