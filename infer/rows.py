"""Prompt files to rows: everything in a row is checked here, before anything is compiled."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Iterable, Mapping
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
    kind_of,
)
from jaxmix.command import near_misses
from jaxmix.copies import named
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
    prompts that a completed row's `prompt` is composed of, and `chunks` counts those of its longest text. `group_mark`
    stands for the rows of its group on which its picture depends, `mark` for everything on which it does.
    """

    number: int
    where: str
    prompt: str
    id: str | None = None
    extra: tuple[tuple[str, Any], ...] = ()
    named: frozenset[str] = field(default=frozenset(), compare=False)
    parts: tuple[str, ...] = ()
    chunks: int = 1
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
        for key in ("where", "extra", "named", "parts", "mark", "group_mark", *wording.unused(self)):
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
    path: str | Path, defaults: Defaults, added: Fields | None = None, times: Times = 1
) -> tuple[list[Row], list[BadRow]]:
    """Read a .txt (one prompt per line), .jsonl (one object per line) or .csv file into good and bad rows.

    Each is drawn so many `times`, or at each of the seeds that `times` lists. An object's keys, or the names in the
    first line of a .csv file, are FIELDS and those that methods `added`.

    Raises InputError if the file as a whole is of no use: missing, empty, not text, or of another kind.
    """
    path = Path(path)
    kinds = {".txt": _from_text, ".jsonl": _from_json}
    if path.suffix.lower() not in (*kinds, ".csv"):
        raise InputError(
            f"{path}: found '{path.suffix or 'no suffix'}', expected a .txt, .jsonl or .csv file of prompts"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such prompt file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from None
    if path.suffix.lower() == ".csv":
        table = csv.reader(io.StringIO(text, newline=""))
        names = [name.strip() for name in next(table, [])]
        if not any(names) or len(set(names)) < len(names):
            raise InputError(f"{path}: found the first line {','.join(names)!r}, expected one field name per column")
        cells = ((f"{path.name}:{table.line_num}", line) for line in table)
        try:
            return _collect(cells, functools.partial(_from_cells, names), defaults, added or {}, times)
        except csv.Error as error:
            raise InputError(f"{path}: line {table.line_num}: not a table: {error}") from None
    lines = text.split("\n")  # splitlines() would also split at U+2028, which JSON strings may hold
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise InputError(f"{path}: the prompt file is empty")
    contents = ((f"{path.name}:{number + 1}", line.removesuffix("\r")) for number, line in enumerate(lines))
    return _collect(contents, kinds[path.suffix.lower()], defaults, added or {}, times)


class Cell(str):
    """A value in a .csv file: text, or a number or list written as JSON."""


def rows_of_prompts(
    prompts: Iterable[str], defaults: Defaults, added: Fields | None = None, times: Times = 1
) -> tuple[list[Row], list[BadRow]]:
    """Return rows for prompts given on the command line, under the same rules as the lines of a .txt file."""
    return _collect((("--prompt", prompt) for prompt in prompts), _from_text, defaults, added or {}, times)


def rows_of_objects(
    objects: Iterable[tuple[str, Mapping[str, Any]]], defaults: Defaults, added: Fields | None = None, times: Times = 1
) -> tuple[list[Row], list[BadRow]]:
    """Return rows for (where, fields), under the same rules as the lines of a .jsonl file."""
    return _collect(objects, dict, defaults, added or {}, times)


def _collect(
    contents: Iterable[tuple[str, Any]], parse: Any, defaults: Defaults, added: Fields, times: Times
) -> tuple[list[Row], list[BadRow]]:
    good: list[Row] = []
    bad: list[BadRow] = []
    owners: dict[str, str] = {}
    seeds = times if isinstance(times, tuple) else ()
    count = len(seeds) if isinstance(times, tuple) else times
    for place, (where, line) in enumerate(contents):
        number = place * count
        try:
            row = _row(number, where, parse(line), defaults, added)
            if seeds and "seed" in row.named:
                raise InputError(f"seed: found {row.seed} in a row with --seeds, expected one of them")
            row = replace(row, seed=seeds[0]) if seeds else row
            again = [_again(row, k, seeds[k] if seeds else row.seed + k) for k in range(1, count)]
            if row.id is not None and row.id in owners:
                raise InputError(f"id: found '{row.id}', which is already the id of {owners[row.id]}")
        except InputError as error:
            bad.append(BadRow(number, where, str(error)))
            continue
        if row.id is not None:
            owners[row.id] = where
        good += [row, *again]
    return good, bad


def _again(row: Row, k: int, seed: int) -> Row:
    """Return the k-th repetition of a row, with another seed unless it asked for a fresh one."""
    seed = row.seed if row.seed == FRESH else check_seed("seed", seed)
    return replace(row, number=row.number + k, seed=seed, id=None if row.id is None else f"{row.id}-{k + 1}")


def _from_text(line: str) -> dict[str, Any]:
    if not line.strip():
        raise InputError("empty line, expected a prompt")
    return {"prompt": line.strip()}


def _from_json(line: str) -> dict[str, Any]:
    if not line.strip():
        raise InputError("empty line, expected a JSON object")
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise InputError("not a row: nested too deeply") from None
    except ValueError:  # what Python says of a number with more than 4300 digits
        raise InputError("not a row: holds a number with thousands of digits") from None
    if not isinstance(content, dict):
        raise InputError(f'expected an object like {{"prompt": "..."}}, found {kind_of(content)}')
    return content


def _from_cells(names: list[str], cells: list[str]) -> dict[str, Any]:
    if not cells or len(cells) > len(names):
        raise InputError(f"found {len(cells)} cells, expected one for each of the {len(names)} columns")
    return {name: Cell(cell) for name, cell in zip(names, cells, strict=False) if cell.strip()}


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
