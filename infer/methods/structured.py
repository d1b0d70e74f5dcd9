"""Structured Diffusion (arXiv 2212.05032) in a job: phrases of a prompt keep their attributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from infer.checks import check_text, kind_of
from infer.methods.method import BatchRows, Method
from infer.methods.method import Flags as Base
from infer.rows import Field, Row
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """Phrases for rows without their own.

    Attributes:
        phrases: Structured Diffusion: phrases of the prompt, word for word, which are also encoded alone: "a red
            car; a white dog"
    """

    phrases: str | None = None

    def __post_init__(self) -> None:
        """Refuse phrases that cannot be read."""
        super().__post_init__()
        if self.phrases is not None:
            check_phrases("--phrases", self.phrases)

    def method(self) -> Method:
        """Return the method under these flags."""
        return Structured(self)


class Structured(Method):
    """Rows with phrases."""

    name = "structured"
    switches = ("phrases",)

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.fields = {"phrases": Field(check_phrases, flags.phrases, list)}

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the phrases of each row."""
        import jaxmix

        return [jaxmix.StructuredDiffusion([row["phrases"] or () for row in batch.rows])]

    def shown(self, row: Row) -> dict[str, str]:
        """Show the phrases."""
        return {"phrases": "; ".join(row["phrases"])}


def check_phrases(key: str, value: Any) -> tuple[str, ...]:
    """Read phrases: a list of them, or text "PHRASE; PHRASE"."""
    if isinstance(value, str) and not value.lstrip().startswith("["):  # a list in a cell of a table
        value = [part.strip() for part in value.split(";") if part.strip()]
    if not isinstance(value, (list, tuple)) or not value:
        found = "none" if isinstance(value, (list, tuple)) else kind_of(value)
        raise InputError(f'{key}: found {found}, expected phrases of the prompt such as ["a red car", "a white dog"]')
    for i, phrase in enumerate(value):
        if not check_text(f"{key}[{i}]", phrase).strip():
            raise InputError(f"{key}[{i}]: found no words, expected a phrase of the prompt")
    return tuple(value)
