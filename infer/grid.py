"""Grids: each row drawn with every combination of some values, `--set steps=10,20 --set guidance_scale=2,5`.

A key is a field of rows, or a word that stands as ``__word__`` in their texts. A cell of the grid changes nothing but
its keys: all cells of a row share its seed, and are in no group with those of others.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer.tables import Cell
from jaxmix.command import near_misses
from jaxmix.types import InputError, shown
from jaxmix.weights.files import user_path

MOST = 100_000
"""Cells of a grid."""
NOTHING = "none"
_LABEL = 40  # letters of a label


@dataclass(frozen=True)
class Axis:
    """The values of one key, as rows name them (None: not at all), and what they are called."""

    key: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]
    word: bool = False


Axes = tuple[Axis, ...]


def read_axes(given: Sequence[str] | str | None) -> Axes:
    """Read KEY=VALUES, or several; values are separated by commas, a JSON list, or the lines of a file, ``@FILE``.

    A value with a comma stands in quotes. Raises InputError for anything else, and for a key or value given twice.
    """
    if given is None:
        return ()
    axes = [_axis(text) for text in ([given] if isinstance(given, str) else given)]
    keys = [axis.key for axis in axes]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise InputError(f"--set {twice}: found it twice, expected all its values in one")
    if (count := math.prod(len(axis.values) for axis in axes)) > MOST:
        raise InputError(f"--set: found {count:,} combinations, expected at most {MOST:,}")
    return tuple(axes)


def _axis(text: str) -> Axis:
    key, equals, rest = (part.strip() for part in text.partition("="))
    key = key.replace("-", "_") if not key.startswith("_") else key
    if not equals or not re.fullmatch(r"\w+", key):
        raise InputError(f"--set: found {shown(text)}, expected KEY=VALUE,VALUE,...")
    values = _values(key, rest)
    if not values or values == [None]:
        raise InputError(f"--set {key}: found no values, expected them after the =, with commas between them")
    labels = [_label(value) for value in values]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise InputError(f"--set {key}: found {shown(twice)} twice, expected each value once")
    return Axis(key, tuple(values), tuple(labels))


def _values(key: str, text: str) -> list[Any]:
    if text.startswith("["):
        try:
            return list(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            pass  # text that begins with a bracket
    if text.startswith("@"):
        try:
            lines = user_path(text[1:]).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError):
            raise InputError(f"--set {key}: no such text file: {text[1:]}") from None
        return [Cell(line.strip()) for line in lines if line.strip()]
    try:
        (cells,) = csv.reader([text], skipinitialspace=True, strict=True) if text else [[]]
    except (csv.Error, ValueError) as error:
        raise InputError(f"--set {key}: found {shown(text)}, not values with commas between them: {error}") from None
    return [Cell(cell.strip()) if cell.strip() else None for cell in cells]


def _label(value: Any) -> str:
    if value is None:
        return NOTHING
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 13]}...{text[-10:]}"


def settled(axes: Axes, known: Iterable[str], texts: Iterable[Any]) -> Axes:
    """Return the axes with those that are words marked, whether or not a field is called so, too.

    Raises InputError for a key that is neither word nor field.
    `texts` are the fields of all rows, and the flags that are their defaults.
    """
    known = [*known]
    held = json.dumps([*texts], ensure_ascii=False, default=str) if axes else ""
    made = []
    for axis in axes:
        word = _sign(axis.key) in held
        if not word and axis.key not in known:
            near = near_misses(axis.key, known)
            raise InputError(f"--set {axis.key}: found no such field of rows, and no {_sign(axis.key)} in a text{near}")
        if word and not all(isinstance(value, str) for value in axis.values):
            raise InputError(f"--set {axis.key}: found a value that is no text, expected what {_sign(axis.key)} is")
        made.append(Axis(axis.key, axis.values, axis.labels, word))
    return tuple(made)


def cells(
    axes: Axes, content: Mapping[str, Any], flags: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], tuple[tuple[str, str], ...]]]:
    """Yield a row's fields for each cell of a grid, with the (key, label)s of the cell.

    Raises InputError for a row that names a key itself. `flags` are the defaults of fields that a row does not name.
    """
    for axis in axes:
        if not axis.word and content.get(axis.key) is not None:
            found = shown(content[axis.key])
            raise InputError(f"{axis.key}: found {found} in a row with --set {axis.key}, expected one of them")
    words = [_sign(axis.key) for axis in axes if axis.word]
    told = {key: value for key, value in flags.items() if isinstance(value, str) and any(w in value for w in words)}
    content = {**told, **content}
    for chosen in itertools.product(*(range(len(axis.values)) for axis in axes)):
        made: dict[str, Any] = dict(content)
        for axis, i in zip(axes, chosen, strict=True):
            if axis.word:
                made = {key: _replaced(value, _sign(axis.key), str(axis.values[i])) for key, value in made.items()}
            elif axis.values[i] is not None:
                made[axis.key] = axis.values[i]
        yield made, tuple((axis.key, axis.labels[i]) for axis, i in zip(axes, chosen, strict=True))


def told(cell: Iterable[tuple[str, str]]) -> str:
    """Return a cell as it is told: "steps 10, guidance_scale 5"."""
    return ", ".join(f"{key} {label}" for key, label in cell)


def _sign(word: str) -> str:
    return word if word.startswith("__") and word.endswith("__") else f"__{word}__"


def _replaced(value: Any, sign: str, text: str) -> Any:
    if isinstance(value, str):
        return type(value)(value.replace(sign, text))
    if isinstance(value, list):
        return [_replaced(one, sign, text) for one in value]
    if isinstance(value, dict):
        return {key: _replaced(one, sign, text) for key, one in value.items()}
    return value
