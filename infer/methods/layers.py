"""A prompt per layer (P+, arXiv 2303.09522) in a job: some cross-attentions of a row are told something else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from infer.checks import check_text, kind_of
from infer.methods.method import BatchRows, Method
from infer.methods.method import Flags as Base
from infer.rows import Field, Row
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """Prompts of layers for rows without their own.

    Attributes:
        layers: P+: prompts of some layers, "up_blocks.1: an ink drawing; mid_block: a cat", or a JSON object; layers
            are named by a regular expression over the names of cross-attentions, style, layout, or IN01 ... OUT11
    """

    layers: str | None = None

    def __post_init__(self) -> None:
        """Refuse layers that cannot be read."""
        super().__post_init__()
        if self.layers is not None:
            check_layers("--layers", self.layers)

    def method(self) -> Method:
        """Return the method under these flags."""
        return Layers(self)


class Layers(Method):
    """Rows with prompts of layers."""

    name = "layers"
    switches = ("layers",)

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        default = None if flags.layers is None else check_layers("--layers", flags.layers)
        self.fields = {"layers": Field(check_layers, default, dict)}

    def adopt(self, row: Row, pipe: Any) -> Row:
        """Give each layer its own vectors of a word that was learnt so (P+) where a row's prompt names it.

        A prompt of several branches (AND) has the mean of the layers' vectors instead.
        """
        if row["layers"] is None and " AND " not in row.prompt and pipe.has_layers(row.prompt):
            return row.change(layers=((".", row.prompt),))
        return row

    def program_key(self, rows: Sequence[Row]) -> Hashable:
        """Return the layers, which rows of a batch share, and the number of their prompts."""
        keys = {
            (tuple(k for k, _ in row["layers"]), len({p for _, p in row["layers"]})) for row in rows if self.on(row)
        }
        return tuple(sorted(keys))

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse patterns that name no layer of the model."""
        import jaxmix

        method = jaxmix.LayerPrompts([dict(row["layers"])])
        method.check(pipe, jaxmix.Request(prompts=[row.texts[0]], syntax=row.prompt_syntax))
        return row

    def further_prompts(self, row: Row) -> Sequence[str]:
        """Return the prompts of the layers."""
        return [prompt for _, prompt in row["layers"]]

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the prompts of each row's layers."""
        import jaxmix

        return [jaxmix.LayerPrompts([dict(row["layers"] or ()) for row in batch.rows])]

    def shown(self, row: Row) -> dict[str, str]:
        """Show the prompts of the layers."""
        return {"layers": "; ".join(f"{name}: {prompt}" for name, prompt in row["layers"])}


def check_layers(key: str, value: Any) -> tuple[tuple[str, str], ...]:
    """Read prompts of layers: an object, or text "LAYERS: PROMPT; LAYERS: PROMPT"."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):  # a JSON object in a cell or a flag
            value = json.loads(value)
    if isinstance(value, str):
        parts = [part.partition(":") for part in value.split(";") if part.strip()]
        if not all(colon and name.strip() for name, colon, _ in parts):
            raise InputError(
                f'{key}: found {value!r}, expected layers and prompts such as "up_blocks.1: an ink drawing"'
            )
        value = {name.strip(): prompt.strip() for name, _, prompt in parts}
    if isinstance(value, (list, tuple)) and all(isinstance(x, (list, tuple)) and len(x) == 2 for x in value):
        value = dict(value)  # as it is kept
    if not isinstance(value, Mapping) or not value:
        found = "none" if isinstance(value, Mapping) else kind_of(value)
        raise InputError(f'{key}: found {found}, expected prompts by layer such as {{"up_blocks.1": "an ink drawing"}}')
    return tuple((check_text(key, name), check_text(f"{key}.{name}", prompt)) for name, prompt in value.items())
