"""Files of rows, and standard input, to the fields that each row names; what they may be is checked in `infer.rows`."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.checks import kind_of
from jaxmix.command import near_misses
from jaxmix.types import InputError, shown
from jaxmix.weights.files import user_path

STDIN = "-"
KINDS = {".txt": ".txt", ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".csv": ".csv", ".parquet": ".parquet"}
_EXPECTED = "a .txt, .jsonl, .csv or .parquet file of prompts"


class Cell(str):
    """A value in a table: text, or a number or list written as JSON."""


@dataclass(frozen=True)
class Contents:
    """Rows as (where, what stands there), what makes a row's fields of that, and the columns of a table."""

    name: str
    rows: list[tuple[str, Any]]
    parse: Callable[[Any], dict[str, Any]]
    columns: tuple[str, ...] | None = None

    def check_columns(self, known: Iterable[str], enough: Iterable[str]) -> None:
        """Raise InputError for a table with a column that is no field, or without any that is `enough` for a row."""
        known = [*known]
        for column in self.columns or ():
            if column not in known:
                raise InputError(f"{self.name}: found the column {shown(column)}{near_misses(column, known)}")
        if self.columns is not None and not {*enough} & {*self.columns}:
            raise InputError(f"{self.name}: found the columns {', '.join(self.columns)}, expected one called prompt")


def read_contents(path: str | Path) -> Contents:
    """Read a file of rows by its kind, or standard input (``-``), whose first line says which kind it is.

    Raises InputError if the file as a whole is of no use: missing, empty, not text, or of another kind.
    """
    if str(path) == STDIN:
        content = stdin()
        return _KINDS[_kind_of(content)](content, "stdin", "stdin")
    name = Path(path).name
    kind = KINDS.get(Path(path).suffix.lower())
    if kind is None:
        raise InputError(f"{path}: found '{Path(path).suffix or 'no suffix'}', expected {_EXPECTED}")
    try:
        content = user_path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such prompt file") from None
    return _KINDS[kind](content, str(path), name)


def stdin() -> bytes:
    """Return all of standard input, which is read once."""
    return _read_once(sys.stdin)


@functools.lru_cache(1)
def _read_once(stream: Any) -> bytes:
    if stream is None or stream.isatty():
        raise InputError("--prompts -: found a terminal, expected rows from a pipe or a file")
    return bytes(stream.buffer.read())


def _kind_of(content: bytes) -> str:
    """Return the kind of rows in standard input: a table's first line names columns, and one of them is a prompt."""
    if content.startswith(b"PAR1"):
        return ".parquet"
    first = content.decode("utf-8-sig", "replace").lstrip().split("\n")[0]
    if first.startswith("{"):
        return ".jsonl"
    return ".csv" if "prompt" in [name.strip().strip('"') for name in first.split(",")] else ".txt"


def _text(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from None


def _lines(parse: Callable[[str], dict[str, Any]], content: bytes, path: str, name: str) -> Contents:
    lines = _text(content, path).split("\n")  # splitlines() would also split at U+2028, which JSON strings may hold
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise InputError(f"{path}: the prompt file is empty")
    return Contents(path, [(f"{name}:{i + 1}", line.removesuffix("\r")) for i, line in enumerate(lines)], parse)


def _table(content: bytes, path: str, name: str) -> Contents:
    table = csv.reader(io.StringIO(_text(content, path), newline=""))
    try:
        names = [column.strip() for column in next(table, [])]
        if not any(names) or len({*names}) < len(names):
            raise InputError(f"{path}: found the first line {','.join(names)!r}, expected one field name per column")
        rows = [(f"{name}:{table.line_num}", line) for line in table]
    except csv.Error as error:
        raise InputError(f"{path}: line {table.line_num}: not a table: {error}") from None
    return Contents(path, rows, functools.partial(_from_cells, names), tuple(names))


def _parquet(content: bytes, path: str, name: str) -> Contents:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: found .parquet, expected also: pip install 'jaxmix-diffusion[parquet]'") from None
    try:
        file = ParquetFile(io.BytesIO(content))
        columns = tuple(file.schema_arrow.names)
        found = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not a readable .parquet file: {str(error)[:200]}") from None
    if not found:
        raise InputError(f"{path}: the prompt file is empty")
    if len({*columns}) < len(columns):
        raise InputError(f"{path}: found the columns {', '.join(columns)}, expected one of each name")
    columns = tuple(column for column in columns if not column.startswith("__index_level_"))  # of pandas
    return Contents(path, [(f"{name}:{i + 1}", row) for i, row in enumerate(found)], _from_record, columns)


def from_text(line: str) -> dict[str, Any]:
    """Return the field of a line of text: its prompt."""
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


def _from_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row of Parquet, where a number that is missing may be NaN, and text may hold JSON."""
    held = {key: _without_nothing(value) for key, value in record.items()}
    return {
        key: Cell(value) if isinstance(value, str) else value
        for key, value in held.items()
        if value is not None and not key.startswith("__index_level_") and not (isinstance(value, str) and not value)
    }


def _without_nothing(value: Any) -> Any:
    """Return a value without the nulls of its structures, in which every row has every field."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {key: held for key, one in value.items() if (held := _without_nothing(one)) is not None}
    if isinstance(value, list):
        return [_without_nothing(one) for one in value]
    return value


_KINDS: dict[str, Callable[[bytes, str, str], Contents]] = {
    ".txt": functools.partial(_lines, from_text),
    ".jsonl": functools.partial(_lines, _from_json),
    ".csv": _table,
    ".parquet": _parquet,
}
