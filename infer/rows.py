"""Prompt files to rows: everything in a row is checked here, before anything is compiled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from infer import wording
from infer.checks import (
    FRESH,
    Times,
    check_file,
    check_id,
    check_number,
    check_pixels,
    check_sampler,
    check_seed,
    check_share,
    check_spacing,
    check_steps,
    check_text,
)
from infer.grid import Axes, cells, settled, told
from infer.tables import Cell, from_text, read_contents
from jaxmix.command import near_misses
from jaxmix.copies import named
from jaxmix.paths import fetch_all
from jaxmix.pipeline.chunks import Reading
from jaxmix.types import InputError, shown


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The defaults of rows, from the command line; row k draws with `seed` + k.

    None is the model's own. `image` and `mask` are paths of pictures.
    """

    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    spacing: str | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    guidance_rescale: float = 0.0
    image: str | None = None
    mask: str | None = None
    strength: float = 0.8
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    prompt_syntax: str = "a1111"
    clip_skip: int = 0


@dataclass(frozen=True)
class Field:
    """A field that a method adds to rows: its check, and the default of rows that do not name it.

    Values are hashable; `stored` converts one for JSON. A row with a field that is `enough` needs no prompt.
    """

    check: Callable[[str, Any], Any]
    default: Any = None
    stored: Callable[[Any], Any] = lambda value: value
    enough: bool = False


Fields = Mapping[str, Field]


@dataclass(frozen=True, kw_only=True)
class Row(Defaults):
    """One image to draw.

    `number` is the row's place in its file, from 0; `where` names it in messages. `complete` fills in what is None.
    `extra` holds the fields that methods added, and `named` says which fields the row itself sets. `parts` are the
    prompts that a completed row's `prompt` is composed of, and `chunks` counts those of its longest text. In a grid,
    `cell` says which of its cells the row is, and `base` is the number that it would have without the grid.
    `group_mark` stands for the rows of its group on which its picture depends, `mark` for everything on which it does.
    """

    number: int
    where: str
    prompt: str
    id: str | None = None
    extra: tuple[tuple[str, Any], ...] = ()
    named: frozenset[str] = field(default=frozenset(), compare=False)
    parts: tuple[str, ...] = ()
    chunks: int = 1
    cell: tuple[tuple[str, str], ...] = ()
    base: int | None = field(default=None, compare=False)
    mark: str = field(default="", compare=False)
    group_mark: str = field(default="", compare=False)

    def __getitem__(self, key: str) -> Any:
        """Return a field that a method added."""
        return dict(self.extra)[key]

    def change(self, **extra: Any) -> Row:
        """Return the row with other values of fields that methods added."""
        return replace(self, extra=tuple((dict(self.extra) | extra).items()))

    def complete(self, **defaults: Any) -> Row:
        """Return the row with the model's defaults for what neither the row nor the command line sets."""
        return replace(self, **{key: value for key, value in defaults.items() if getattr(self, key) is None})

    @property
    def origin(self) -> int:
        """The number of the row without the grid: rows with the same differ in nothing but their cell."""
        return self.number if self.base is None else self.base

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts that the model reads: the row's own, and further ones where it is composed."""
        return self.parts or (self.prompt,)

    @property
    def solver(self) -> str:
        """The sampler with its settings, as it is shown."""
        eta = None if self.eta is None else f"eta {self.eta:g}"
        return ", ".join(filter(None, (self.sampler, self.spacing, eta)))

    @property
    def reading(self) -> Reading:
        """How the prompts are read."""
        return Reading(self.prompt_syntax, None, self.clip_skip)

    @property
    def program_key(self) -> tuple[Any, ...]:
        """What rows must share to be drawn by one compiled program, and so in one batch."""
        start = None if self.image is None else (self.strength, self.mask is not None)
        return (
            self.steps,
            self.sampler,
            self.spacing,
            self.eta,
            self.height,
            self.width,
            bool(self.guidance_rescale),
            start,
            self.reading,
        )

    @property
    def file_name(self) -> str:
        """The name of the row's PNG: row number, seed and `mark`, so that no two different pictures share one."""
        return f"{self.number:04d}_seed{self.seed}_{self.mark}.png"

    def settings(self) -> dict[str, Any]:
        """Return the plain fields on which the image depends, as written into the PNG and the manifest."""
        held = asdict(self)
        for key in ("where", "extra", "named", "parts", "cell", "base", "mark", "group_mark", *wording.unused(self)):
            del held[key]
        if self.image is None:
            del held["strength"]
        if not held["guidance_rescale"]:
            del held["guidance_rescale"]
        if self.group_mark:
            held["group_mark"] = self.group_mark
        for key in ("image", "mask", "spacing", "eta"):  # only if they are used
            if held[key] is None:
                del held[key]
        return {"row": held.pop("number"), "prompt": held.pop("prompt"), **held}


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be drawn, and why, in one line."""

    number: int
    where: str
    reason: str

    def __post_init__(self) -> None:
        """Call what was fetched from a bucket what the row calls it."""
        object.__setattr__(self, "reason", named(self.reason))

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


FIELDS = ("prompt", "id", *(field.name for field in fields(Defaults)))


def read_rows(
    path: str | Path, defaults: Defaults, added: Fields | None = None, times: Times = 1, axes: Axes = ()
) -> tuple[list[Row], list[BadRow]]:
    """Read a .txt (one prompt per line), .jsonl (one object per line), .csv or .parquet file into good and bad rows.

    "-" is standard input. Each row is drawn so many `times`, or at each of the seeds that `times` lists, in every cell
    of the grid of `axes`. An object's keys, or the names of columns, are FIELDS and those that methods `added`.

    Raises InputError if the file as a whole is of no use: missing, empty, not text, of another kind, a table without
    prompts.
    """
    found, added = read_contents(path), added or {}
    enough = {"prompt"} | {key for key, one in added.items() if one.enough}
    given = any(one.enough and one.default is not None for one in added.values())
    if given or enough & {axis.key for axis in axes}:
        enough |= {*(found.columns or ())}
    found.check_columns((*FIELDS, *added), enough)
    return _collect(found.rows, found.parse, defaults, added, times, axes)


def rows_of_prompts(
    prompts: Iterable[str], defaults: Defaults, added: Fields | None = None, times: Times = 1, axes: Axes = ()
) -> tuple[list[Row], list[BadRow]]:
    """Return rows for prompts given on the command line, under the same rules as the lines of a .txt file."""
    return _collect((("--prompt", prompt) for prompt in prompts), from_text, defaults, added or {}, times, axes)


def rows_of_objects(
    objects: Iterable[tuple[str, Mapping[str, Any]]],
    defaults: Defaults,
    added: Fields | None = None,
    times: Times = 1,
    axes: Axes = (),
) -> tuple[list[Row], list[BadRow]]:
    """Return rows for (where, fields), under the same rules as the lines of a .jsonl file."""
    return _collect(objects, dict, defaults, added or {}, times, axes)


def _collect(
    contents: Iterable[tuple[str, Any]], parse: Any, defaults: Defaults, added: Fields, times: Times, axes: Axes
) -> tuple[list[Row], list[BadRow]]:
    good: list[Row] = []
    bad: list[BadRow] = []
    owners: dict[str, str] = {}
    read = [(where, _parsed(parse, line)) for where, line in contents]
    flags = {**vars(defaults), **{key: one.default for key, one in added.items()}}
    rows = [content for _, content in read if not isinstance(content, InputError)]
    axes = settled(axes, (*FIELDS, *added), [*rows, flags])
    checks = {**_CHECKS, **{key: one.check for key, one in added.items()}}
    for axis in axes:
        for value in axis.values if not axis.word else ():
            if value is not None:
                _checked(checks[axis.key], f"--set {axis.key}", value)
    fetch_all(_texts([*rows, *(axis.values for axis in axes)]))
    count = len(times) if isinstance(times, tuple) else times
    every = count * math.prod(len(axis.values) for axis in axes)
    for place, (where, content) in enumerate(read):
        number = place * every
        failed: dict[str, list[tuple[int, str]]] = {}  # for each reason the cells that have it
        try:
            if isinstance(content, InputError):
                raise content
            if isinstance(name := content.get("id"), (str, int)) and str(name) in owners:
                raise InputError(f"id: found '{name}', which is already the id of {owners[str(name)]}")
            made: list[Row] = []
            for c, (held, cell) in enumerate(cells(axes, content, flags)):
                told_where = f"{where} ({told(cell)})" if cell else where
                try:
                    first = _row(place * count, told_where, held, defaults, added)
                    for k, row in enumerate(_repeated(first, times)):
                        base = row.number if cell else None
                        made.append(replace(row, number=number + k * (every // count) + c, cell=cell, base=base))
                except InputError as error:
                    failed.setdefault(str(error), []).append((number + c, told_where))
            made.sort(key=lambda row: row.number)
        except InputError as error:
            bad.append(BadRow(number, where, str(error)))
            continue
        for reason, some in failed.items():  # what is wrong in every cell is wrong with the row
            whole = len(some) == every // count
            bad += [BadRow(number, where, reason)] if whole else [BadRow(*one, reason) for one in some]
        if made and made[0].id is not None:
            owners[made[0].id] = where
            made = [replace(row, id=f"{row.id}-{k + 1}") if (k := row.number - number) else row for row in made]
        good += made
    return good, bad


def _parsed(parse: Callable[[Any], dict[str, Any]], line: Any) -> dict[str, Any] | InputError:
    try:
        return parse(line)
    except InputError as error:
        return error


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in rows: those that are addresses in buckets are fetched together."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _repeated(row: Row, times: Times) -> list[Row]:
    """Return a row as often as it is drawn, each time with another seed."""
    if isinstance(times, tuple):
        if "seed" in row.named:
            raise InputError(f"seed: found {row.seed} in a row with --seeds, expected one of them")
        row = replace(row, seed=times[0])
    seeds = times if isinstance(times, tuple) else tuple(row.seed + k for k in range(times))
    return [row, *(_again(row, k, seeds[k]) for k in range(1, len(seeds)))]


def _again(row: Row, k: int, seed: int) -> Row:
    """Return the k-th repetition of a row, with another seed unless it asked for a fresh one."""
    seed = row.seed if row.seed == FRESH else check_seed("seed", seed)
    return replace(row, number=row.number + k, seed=seed)


def _row(number: int, where: str, content: dict[str, Any], defaults: Defaults, added: Fields) -> Row:
    for key in content:
        if key not in FIELDS and key not in added:
            raise InputError(f"unknown field {shown(key)}{near_misses(key, (*FIELDS, *added))}")
    given = {key: value for key, value in content.items() if value is not None}
    extra = {}
    for key, one in added.items():
        value = given.get(key, one.default)
        extra[key] = None if value is None else _checked(one.check, key, value)
    if not any(one.enough and extra[key] is not None for key, one in added.items()):
        if "prompt" not in content:
            raise InputError("no field 'prompt'")
        given["prompt"] = content["prompt"]  # null is not a prompt; elsewhere it means that nothing is set
    seed = FRESH if defaults.seed == FRESH else defaults.seed + number
    flags = {"prompt": "", **vars(defaults), "seed": seed}
    values = {key: given[key] if key in given else flags.get(key) for key in FIELDS}
    checked: dict[str, Any] = {
        key: _checked(_CHECKS[key], key, value) for key, value in values.items() if value is not None or key == "prompt"
    }
    row = Row(number=number, where=where, **checked, extra=tuple(extra.items()), named=frozenset(given))
    if row.mask is not None and row.image is None:
        raise InputError("mask: found a mask alone, expected also the image to repaint")
    return row


def _checked(check: Callable[[str, Any], Any], key: str, value: Any) -> Any:
    if not isinstance(value, Cell):
        return check(key, value)
    try:
        return check(key, str(value))
    except InputError as error:
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            raise error from None
        return check(key, read)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": check_text,
    "id": check_id,
    "negative_prompt": check_text,
    "seed": check_seed,
    "steps": check_steps,
    "guidance_scale": check_number,
    "sampler": check_sampler,
    "spacing": check_spacing,
    "eta": check_share,
    "height": check_pixels,
    "width": check_pixels,
    "guidance_rescale": check_share,
    "image": check_file,
    "mask": check_file,
    "strength": check_share,
    "prompt_2": check_text,
    "negative_prompt_2": check_text,
    "prompt_syntax": wording.check_syntax,
    "clip_skip": wording.check_layers_skipped,
}
