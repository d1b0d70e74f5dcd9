"""LoRAs (arXiv 2106.09685) in a job: files merged into the model's weights, each with its strength."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from infer.checks import LARGEST, check_text, kind_of
from infer.methods.method import BatchRows, Method
from infer.methods.method import Flags as Base
from infer.rows import Field, Row
from jaxmix.types import InputError
from jaxmix.weights.files import exists

Strength = float | tuple[tuple[str, float], ...]
"""One strength, or those of some modules by their name or pattern."""

Merges = tuple[tuple[str, Strength], ...]


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """LoRAs for rows that name none.

    Attributes:
        lora: LoRA: a file (diffusers, PEFT, kohya or LyCORIS) to merge into the model, PATH[:STRENGTH], where the
            strength (no unit) is 1, as trained, by default; a B-LoRA's halves apart, PATH:style=1,content=0, or any
            modules by a pattern of their names, of which those not named get 0; may be repeated, or given a JSON list
    """

    lora: list[str] | str | None = None

    def __post_init__(self) -> None:
        """Refuse strengths that are not numbers."""
        super().__post_init__()
        check_loras("--lora", self.lora or [])

    def method(self) -> Method:
        """Return the method under these flags."""
        return LoRA(self)


class LoRA(Method):
    """Rows with LoRAs."""

    name = "lora"
    switches = ("lora",)
    part_of_model = True

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.fields = {"lora": Field(check_loras, flags.lora, _texts)}
        self._opened: dict[str, Any] = {}

    def prepare(self) -> None:
        """Look for the flag's files: a mistake there is one of the whole job."""
        for path, _ in check_loras("--lora", self.flags.lora or []):
            self.lora(path)

    def lora(self, path: str) -> Any:
        """Return a LoRA, opened only once, so that weights merged from it compare equal."""
        import jaxmix

        if path not in self._opened:
            try:
                self._opened[path] = jaxmix.LoRA.load(path)
            except InputError as error:
                several = "," in path and not exists(Path(path))
                hint = "; commas do not separate files: give --lora for each, or a JSON list" if several else ""
                raise InputError(f"lora: {error}{hint}") from None
        return self._opened[path]

    def open(self, pipe: Any) -> None:
        """Refuse the flag's files if they do not fit the model."""
        for path, strength in check_loras("--lora", self.flags.lora or []):
            self.lora(path).on(_told(strength)).check(pipe, None)

    def on(self, row: Row) -> bool:
        """Return whether any LoRA of the row has a strength other than 0."""
        return bool(_live(row["lora"]))

    def weights(self, row: Row) -> Hashable:
        """Say what is merged."""
        return _live(row["lora"])

    def plan(self, row: Row) -> str:
        """Name the files."""
        return "lora " + " + ".join(f"{Path(path).name}:{_said(strength)}" for path, strength in _live(row["lora"]))

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return each LoRA at its strength; all rows of a batch have the same."""
        return [self.lora(path).on(_told(strength)) for path, strength in _live(batch.rows[0]["lora"])]

    def shown(self, row: Row) -> dict[str, str]:
        """Show the files and their strengths."""
        return {"LoRA": ", ".join(f"{Path(path).stem} x {_said(strength)}" for path, strength in row["lora"])}


def _live(loras: Merges | None) -> Merges:
    return tuple((path, strength) for path, strength in loras or () if _any(strength))


def _any(strength: Strength) -> bool:
    return any(number for _, number in strength) if isinstance(strength, tuple) else strength != 0


def _told(strength: Strength) -> Any:
    return dict(strength) if isinstance(strength, tuple) else strength


def _said(strength: Strength) -> str:
    if isinstance(strength, tuple):
        return ",".join(f"{name}={number:g}" for name, number in strength)
    return f"{strength:g}"


def _texts(loras: Merges) -> list[str]:
    return [f"{path}:{_said(strength)}" for path, strength in loras]


def check_loras(key: str, value: Any) -> Merges:
    """Read "PATH[:STRENGTH]", or a list of such texts, which may be JSON; the default strength is 1.

    A strength is a number, or "NAME=NUMBER,NAME=NUMBER" for some modules.
    """
    if isinstance(value, (list, tuple)):
        return tuple(one for item in value for one in check_loras(key, item))
    if not isinstance(value, str):
        raise InputError(f'{key}: found {kind_of(value)}, expected text such as "style.safetensors:0.8", or a list')
    text = check_text(key, value).strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError):
            pass  # a file with such a name
        else:
            return check_loras(key, listed)
    if not text:
        return ()
    path, colon, told = text.rpartition(":")
    if told.startswith("//"):  # of an address
        path, colon = text, ""
    strength: Strength = 1.0
    if colon and path and "=" in told and not told.lower().endswith(".safetensors"):
        strength = _by_name(key, text, told)
    elif colon:
        try:
            strength = float(told)
        except ValueError:
            path = text  # a colon that belongs to the path
    numbers = [number for _, number in strength] if isinstance(strength, tuple) else [strength]
    if not all(abs(number) <= LARGEST for number in numbers):
        raise InputError(f"{key}: found {text!r}, expected a finite strength after the colon")
    return ((path if colon and path else text, strength),)


def _by_name(key: str, text: str, told: str) -> tuple[tuple[str, float], ...]:
    found: dict[str, float] = {}
    for piece in told.split(","):
        name, equals, number = (part.strip() for part in piece.rpartition("="))
        try:
            value = float(number)
        except ValueError:
            name = ""
        if not (equals and name):
            raise InputError(f"{key}: found {piece.strip()!r} in {text!r}, expected NAME=NUMBER, such as style=1.0")
        if name in found:
            raise InputError(f"{key}: found {name!r} twice in {text!r}, expected one strength for each name")
        found[name] = value
    return tuple(found.items())
