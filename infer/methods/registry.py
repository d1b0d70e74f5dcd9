"""Every method that a job knows. A new one is one more file here and one more base of `Flags`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from infer.checks import kind_of
from infer.methods import (
    compose,
    controlnet,
    dense,
    fuse,
    image_prompt,
    instantstyle_plus,
    layers,
    lora,
    paint,
    structured,
    style_adapter,
    style_aligned,
    style_id,
    vmix,
)
from infer.methods.method import BatchRows, Method
from infer.rows import BadRow, Field, Row
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Flags(
    compose.Flags,
    fuse.Flags,
    instantstyle_plus.Flags,
    style_id.Flags,
    style_aligned.Flags,
    structured.Flags,
    paint.Flags,
    dense.Flags,
    layers.Flags,
    style_adapter.Flags,
    controlnet.Flags,
    image_prompt.Flags,
    lora.Flags,
    vmix.Flags,
):
    """The flags of all methods; `--help` lists them from the last base to the first."""


CHECKED = 64
"""How many rows have their methods built and checked at once."""


class Bucket(NamedTuple):
    """Completed rows that share their program and weights, with their methods and groups."""

    methods: tuple[Method, ...]
    rows: list[Row]
    groups: list[int] | None
    weights: Hashable


class Methods:
    """The methods of a job; `wanted` names the one whose fields each row must have, "" for none."""

    def __init__(self, flags: Flags, wanted: str = "") -> None:
        self.all: list[Method] = [base.method(flags) for base in reversed(Flags.__bases__)]  # type: ignore[attr-defined]
        for method in self.all:
            method.wanted = method.name == wanted
        self.flags = flags
        self.wanted = next((method for method in self.all if method.wanted), None)
        chosen: dict[str, list[str]] = {}
        for method in self.all:
            if method.choice is not None:
                chosen.setdefault(method.choice[0], []).append(method.choice[1])
        self.fields: dict[str, Field] = {}
        for method in self.all:
            self.fields |= method.fields
        for key, names in chosen.items():
            self.fields[key] = dataclasses.replace(self.fields[key], check=_one_of(names))
            if (value := getattr(flags, key)) is not None:
                _one_of(names)(f"--{key}", value)
        self._first = {key: names[0] for key, names in chosen.items()}
        self._grouped: dict[Row, tuple[Row, ...]] = {}

    # Rows ----------------------------------------------------------------------------------------------------------

    def of(self, row: Row) -> tuple[Method, ...]:
        """Return the methods that draw a row by itself: those whose fields it has."""
        return tuple(method for method in self.all if method.on(row) and self._chosen(method, row))

    def _chosen(self, method: Method, row: Row) -> bool:
        if method.choice is None:
            return True
        key, name = method.choice
        return (row[key] or self._first[key]) == name

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with those that the flags add; raises InputError for flags that are no row's."""
        alone = {key: None for method in self.all if not method.part_of_model for key in method.switches}
        for method in self.all:
            rows = method.arrange(rows, {key: None for key in alone if key not in method.switches})
        return list(rows)

    def check_flags(self, rows: Sequence[Row]) -> None:
        """Raise InputError for a flag that is a field of a method that draws none of the rows."""
        at_work = {method for row in rows for method in self.of(row)}
        for field in dataclasses.fields(self.flags):
            owners = [method for method in self.all if field.name in method.fields]
            value = getattr(self.flags, field.name)
            if owners and value != field.default and field.name not in _switches(owners) and not at_work & {*owners}:
                flags = [f"--{key}" for key in sorted(_switches(owners)) if hasattr(self.flags, key)]
                if other := self._other(owners, rows):
                    raise InputError(f"--{field.name.replace('_', '-')}: found {value!r} {other}")
                raise InputError(
                    f"--{field.name.replace('_', '-')}: found {value!r} without {_switch_names(owners)} in any row, "
                    f"expected it there{''.join(f' or {flag}' for flag in flags)}"
                )

    def settle(self, row: Row, own: Mapping[str, Any]) -> Row:
        """Return the row with the steps, sampler and so on that neither it nor a flag says: a method's or the model's.

        Raises InputError for a row that names fields of a method without those that switch it on.
        """
        here = self.of(row)
        for key in (key for key in self.fields if key in row.named):
            owners = [method for method in self.all if key in method.fields]
            if key not in _switches(owners) and not {*owners} & {*here}:
                lacking = f"without {_switch_names(owners)}, expected it in the row, too"
                raise InputError(f"{key}: found {_shown(row[key])} {self._other(owners, [row]) or lacking}")
        if self.wanted is not None and not any(self.wanted.name in (m.name, m.stands_for) for m in here):
            if other := self._other([self.wanted], [row]):
                raise InputError(f"{self.wanted.switches[0]}: found it {other}")
            raise self.wanted.missing()
        for method in here:
            row = row.complete(**{key: value for key, value in method.defaults(row).items() if key in own})
        return row.complete(**own)

    def _other(self, owners: Sequence[Method], rows: Sequence[Row]) -> str:
        """Return which choice of methods keeps any of `owners` from rows that have its switches, "" if none does."""
        for row, method in itertools.product(rows, owners):
            if not self._chosen(method, row) and any(row[key] is not None for key in method.switches):
                assert method.choice is not None
                key, name = method.choice
                return f"with {key} {row[key] or self._first[key]!r}, expected {name!r}"
        return ""

    def adopt(self, row: Row, pipe: Any) -> Row:
        """Return the row with the switches of methods that its prompt needs for this model."""
        for method in self.all:
            row = method.adopt(row, pipe)
        return row

    def complete(self, row: Row, pipe: Any) -> Row:
        """Return the row completed for the model; raises InputError for one that its methods cannot draw."""
        for method in self.of(row):
            row = method.complete(row, pipe)
        return row

    def further_prompts(self, row: Row) -> list[str]:
        """Return the prompts that a row is drawn with beside its own."""
        return [text for method in self.of(row) for text in method.further_prompts(row)]

    def check(self, pipe: Any, rows: Sequence[Row], request: Callable[[Sequence[Row]], Any]) -> list[BadRow]:
        """Return the completed rows that cannot be drawn by their methods, or together with others of their group.

        `request` makes a `jaxmix.Request` of rows. `buckets` can then draw all the other rows.
        """
        self._grouped = {}
        bad: list[BadRow] = []

        def refuse(rows: Sequence[Row], reason: str) -> None:
            bad.extend(BadRow(row.number, row.where, reason) for row in rows)

        alike: dict[tuple[tuple[Method, ...], Hashable], list[Row]] = {}
        for row in rows:
            here = tuple(method for method in self.of(row) if method.group(row) is None)
            key = row.program_key, tuple((method.program_key([row]), method.weights(row)) for method in here)
            alike.setdefault((here, key), []).append(row)
        for (here, _), some in alike.items():
            for row, error in self._unfit(pipe, some, here, request):
                refuse([row], error)
        failed = {row.number for row in bad}
        left = [row for row in rows if row.number not in failed]
        for method in self.all:
            mine = [row for row in left if method in self.of(row)]
            if mine:
                found = method.check_groups(mine)
                for row, reason in found:
                    refuse([row], reason)
                left = [row for row in left if all(row is not other for other, _ in found)]
        groups: dict[tuple[str, Hashable], list[Row]] = {}
        for row in left:
            if (name := self._group(row)) is not None:
                groups.setdefault(name, []).append(row)
        for (_, name), members in groups.items():
            self._grouped |= {row: tuple(members) for row in members}
            try:
                self._key(members)
                self._try(pipe, members, self._together(members), request)
            except InputError as error:
                refuse(members, f"group {name}: {error}")
        return bad

    def companies(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Return for each row the others of its group on which its picture depends, those of all methods' groups."""
        groups: dict[tuple[str, Hashable], list[Row]] = {}
        names = [self._group(row) for row in rows]
        for name, row in zip(names, rows, strict=True):
            if name is not None:
                groups.setdefault(name, []).append(row)
        found: list[list[Row]] = []
        for name, row in zip(names, rows, strict=True):
            members = [] if name is None else groups[name]
            some = {other for method in self.of(row) for other in method.looks_at(row, members)}
            found.append([other for other in members if other in some and other is not row])
        return found

    def _unfit(
        self, pipe: Any, rows: Sequence[Row], methods: Sequence[Method], request: Callable[[Sequence[Row]], Any]
    ) -> Iterator[tuple[Row, str]]:
        """Yield the rows, out of some with the same program, that their methods cannot draw, and why."""
        for start in range(0, len(rows), CHECKED):
            some = rows[start : start + CHECKED]
            try:
                self._try(pipe, some, methods, request)
                continue
            except InputError:
                pass  # of one of them: which?
            for row in some:
                try:
                    self._try(pipe, [row], methods, request)
                except InputError as error:
                    yield row, str(error)

    def _group(self, row: Row) -> tuple[str, Hashable] | None:
        names = [(method.name, method.group(row)) for method in self.of(row) if method.group(row) is not None]
        return names[0] if names else None

    def _together(self, rows: Sequence[Row]) -> tuple[Method, ...]:
        """Return the methods of a group: those of any of its rows."""
        return tuple(method for method in self.all if any(method in self.of(row) for row in rows))

    def _try(
        self, pipe: Any, rows: Sequence[Row], methods: Sequence[Method], request: Callable[[Sequence[Row]], Any]
    ) -> None:
        """Raise InputError for rows that their methods cannot draw, naming the two methods that clash."""
        if not methods:
            return

        def check(some: Sequence[Method]) -> None:
            batch = BatchRows(rows, [len(rows)], frozenset(method.name for method in some), draft=True)
            pipe.check(request(rows), [made for method in some for made in method.build(pipe, batch)])

        try:
            check(methods)
        except InputError:
            for method in methods:
                check([method])
            for a, b in itertools.combinations(methods, 2):
                try:
                    check([a, b])
                except InputError as error:
                    names = " and ".join(f"{self._said(method, rows)} ({method.name})" for method in (a, b))
                    raise InputError(f"found {names} in one row, which exclude each other: {error}") from None
            raise

    def _said(self, method: Method, rows: Sequence[Row]) -> str:
        """Return the fields of rows that switch a method on."""
        keys = [key for key in method.switches if any(row[key] is not None for row in rows)]
        return method.says or ", ".join(keys) or f"what switches {method.name} on"

    # Batches ---------------------------------------------------------------------------------------------------------

    def members(self, row: Row) -> tuple[Row, ...]:
        """Return the rows that are drawn together with a row, itself included."""
        return self._grouped.get(row, (row,))

    def begin(self, pipe: Any, rows: Sequence[Row]) -> None:
        """Let each method prepare for those of the rows, about to be drawn, that are its own."""
        for method in self.all:
            if mine := [row for row in rows if method in self.of(row)]:
                method.begin(pipe, mine)

    def undone(self, rows: Sequence[Row], done: Sequence[bool]) -> list[Row]:
        """Return the rows still to draw, given which are `done`; groups are drawn whole."""
        missing = {other for row, there in zip(rows, done, strict=True) if not there for other in self.members(row)}
        return [row for row in rows if row in missing]

    def buckets(self, rows: Sequence[Row]) -> Iterator[Bucket]:
        """Yield the rows that share program, methods and weights, in order of first appearance.

        Buckets with the same weights come one after another, so that each set is merged into the model once.
        """
        held: dict[Hashable, dict[Hashable, list[tuple[Row, ...]]]] = {}
        for members in dict.fromkeys(self.members(row) for row in rows):
            weights, program = self._key(members)
            held.setdefault(weights, {}).setdefault(program, []).append(members)
        for weights, programs in held.items():
            for units in programs.values():
                grouped = self._group(units[0][0]) is not None
                groups = [len(unit) for unit in units] if grouped else None
                yield Bucket(self._together(units[0]), [row for unit in units for row in unit], groups, weights)

    def program(self, row: Row) -> Hashable:
        """Return what a row's program has in common with others: those with the same are compiled once."""
        return self._key(self.members(row))[1]

    def _key(self, members: Sequence[Row]) -> tuple[Hashable, Hashable]:
        """Return the (weights, program) of a group, or of one row; raises InputError if weights differ in a group."""
        weights = {tuple(w for m in self.of(row) if (w := m.weights(row)) is not None) for row in members}
        if len(weights) > 1:
            raise InputError("found different LoRAs, expected the same weights in a group")
        methods = self._together(members)
        chunks = max(row.chunks for row in members)
        program = (members[0].program_key, chunks, tuple((m.name, m.program_key(members)) for m in methods))
        return weights.pop(), program

    # Pictures --------------------------------------------------------------------------------------------------------

    def settings(self, row: Row) -> dict[str, Any]:
        """Return everything that the row's picture depends on, as written into the PNG and the manifest."""
        held = row.settings()
        here = self.of(row)
        if titles := [method.name for method in here if not method.part_of_model]:
            held["method"] = "+".join(titles)
        for method in here:
            named = {key: field for key, field in method.fields.items() if row[key] is not None}
            held |= {key: field.stored(row[key]) for key, field in named.items()} | method.settings(row)
        return held


def _one_of(names: Sequence[str]) -> Callable[[str, Any], str]:
    def check(key: str, value: Any) -> str:
        if value not in names:
            raise InputError(f"{key}: found {kind_of(value)}, expected one of {', '.join(names)}")
        return value

    return check


def _switches(methods: Sequence[Method]) -> set[str]:
    return {key for method in methods for key in method.switches}


def _switch_names(methods: Sequence[Method]) -> str:
    """Return the fields that switch methods on, as in "'content' and 'style', or 'group'"."""
    return ", or ".join(dict.fromkeys(" and ".join(f"'{key}'" for key in method.switches) for method in methods))


def _shown(value: Any) -> str:
    return kind_of(value) if isinstance(value, (str, bool, int, float)) else "it"
