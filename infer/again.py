"""What draws a picture again: its row as a line of JSON, and the command that takes such lines."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from infer.methods.registry import Methods
from infer.rows import FIELDS, Defaults, Row
from jaxmix.command import command_words

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Defaults)}
# Flags that say which rows there are, or what becomes of the folder; a row says the first, and the second is new.
_NOT_AGAIN = ("prompts", "out", "seeds", "num_images", "set", "resume", "overwrite", "strict", "dry_run")
_NOT_AGAIN += ("distributed", "worker", "workers", "engine", "resources")
_OF_GROUPS = ("group_size", "reference_prompt", "content", "style")


def row_lines(rows: Sequence[Row], methods: Methods) -> dict[int, str]:
    """Return for the number of each completed row the lines of a .jsonl file that draw its picture again.

    Those are its own, and where it is drawn in a group those of the rows on which its picture depends, in their order,
    or of another one if it depends on none.
    """
    found = {}
    places = {row.number: place for place, row in enumerate(rows)}
    for row, others in zip(rows, methods.companies(rows), strict=True):
        # The first row of a group that follows a picture is that picture, which the other rows name, too.
        together = [row, *(other for other in others if other.where != "--reference")]
        mates = [mate for mate in methods.members(row) if mate is not row and mate.where != "--reference"]
        together += mates[:1] if len(together) == 1 else []  # a group is two at least
        together.sort(key=lambda one: places[one.number])
        objects = [row_object(one, methods) for one in together]
        if len(objects) > 1:
            objects = [{**held, "group": str(held.get("group", "group"))} for held in objects]
        found[row.number] = "\n".join(json.dumps(held, ensure_ascii=False) for held in objects)
    return found


def row_object(row: Row, methods: Methods) -> dict[str, Any]:
    """Return the fields of a completed row that differ from what they are without any flag, as JSON can hold them."""
    held: dict[str, Any] = {}
    for key in FIELDS:
        value = getattr(row, key)
        if value is not None and (key == "seed" or value != _DEFAULTS.get(key, "")):
            held[key] = value
    if row.image is None:
        held.pop("strength", None)
    for method in methods.of(row):
        held |= {key: field.stored(row[key]) for key, field in method.fields.items() if row[key] is not None}
    return held


def command_of(methods: Methods) -> str:
    """Return the command of a job without its rows: the flags that are no field of a row and not at their default."""
    words = command_words()
    program = " ".join(words[: next((k for k, word in enumerate(words) if word.startswith("--")), len(words))])
    config: Any = methods.flags
    rows = {*FIELDS, *methods.fields, *_NOT_AGAIN, *_OF_GROUPS}
    told = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name not in rows and value != default and value is not None:
            told += _flag(field.name.replace("_", "-"), value)
    return " ".join([program or "python -m infer.generate", *told])


def without_rows(words: Sequence[str], aliases: Mapping[str, str], fields: Iterable[str]) -> str:
    """Return a command's words, quoted for a shell, without the flags that say which rows there are and what is theirs.

    `aliases` are further names of flags, `fields` those of rows that methods added.
    """
    rows = {*FIELDS, *fields, *_NOT_AGAIN, *_OF_GROUPS}
    out: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            dropping = aliases.get(name, name) in rows
        if not dropping:
            out.append(shlex.quote(word))
    return " ".join(out)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}={str(value).lower()}"]
    if isinstance(value, (list, tuple)):
        return [word for one in value for word in _flag(name, one)]
    return [f"--{name}", shlex.quote(json.dumps(value) if isinstance(value, Mapping) else str(value))]
