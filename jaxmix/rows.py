"""Trees with one entry per image: how fields are marked, and what that means for batches, branches and devices.

Controls, guidance, edits of latents and whole jobs are `dataclass`es whose fields are marked: `per_row`, `gate` and
`rows_back` for arrays with a leading axis of images, `static` for what shapes the program, nothing for the rest (such
as weights), which all images share. One walk over the marks, `map_rows`, selects images, repeats them for the branches
of guidance, and tells how arrays are split over devices, for any tree of such dataclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Float, Num

from jaxmix.types import Array, InputError

T = TypeVar("T")


def per_row(**kwargs: Any) -> Any:
    """Declare a field whose leaves have a leading axis of images (of length 1 if it is the same for all)."""
    return struct.field(metadata={"rows": "row"}, **kwargs)


def gate(first: bool = False, **kwargs: Any) -> Any:
    """Declare a per-image strength, shape (b,) or (1,): like `per_row`, but 0 on unconditional rows.

    With ``first`` it is also 0 on further conditional rows, for what depends on the words of an image's own prompt.
    """
    return struct.field(metadata={"rows": "first" if first else "gate"}, **kwargs)


def rows_back(**kwargs: Any) -> Any:
    """Declare how many images back each image looks at another, int32 (b,) or (1,).

    0 is the image itself. Both must be in one batch and on one device, which `check_together` checks.
    """
    return struct.field(metadata={"rows": "back"}, **kwargs)


def static(**kwargs: Any) -> Any:
    """Declare a static field: hashable and part of the trace, so that changing it recompiles."""
    return struct.field(pytree_node=False, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(per_row, gate, rows_back, static, dataclasses.field))
def dataclass(cls: type[T]) -> type[T]:
    """Make a class such a tree: a frozen dataclass that is a pytree, with ``replace``."""
    return struct.dataclass(cls)


@dataclass
class Text:
    """The text conditioning of images, (b, ...), or of their branches, (n, branches, ...).

    ``context`` (..., s, d) are text states. SDXL also takes ``pooled`` (..., p), the projected state of its second
    text encoder, and ``time_ids`` (..., 6), in pixels: the original height and width, the top and left of the crop,
    the target height and width (arXiv 2307.01952, sections 2.2 and 2.3); None for other models.
    """

    context: Float[Array, "*n s d"] = per_row()
    pooled: Float[Array, "*n p"] | None = per_row(default=None)
    time_ids: Num[Array, "*n k"] | None = per_row(default=None)

    def __getitem__(self, branches: Any) -> Text:
        """Select along the second axis, the branches of each image."""
        return jax.tree.map(lambda x: x[:, branches], self)


def map_rows(node: T, fn: Callable[[Any, str, str], Any], rest: Callable[[Any], Any] = lambda x: x) -> T:
    """Return a tree with ``fn(leaf, mark, "Class.field")`` for every leaf that has rows, ``rest(leaf)`` for the others.

    ``mark`` is "row", "gate", "first" or "back". The walk goes through tuples and dataclasses; static fields stay.
    """
    if type(node) is tuple:
        return tuple(map_rows(x, fn, rest) for x in node)  # type: ignore[return-value, attr-defined]
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return jax.tree.map(rest, node)
    changed = {}
    for f in dataclasses.fields(node):
        if f.metadata.get("pytree_node", True):
            value, mark = getattr(node, f.name), f.metadata.get("rows")
            where = f"{type(node).__name__}.{f.name}"
            if mark:
                changed[f.name] = jax.tree.map(lambda x, mark=mark, where=where: fn(x, mark, where), value)
            else:
                changed[f.name] = map_rows(value, fn, rest)
    return dataclasses.replace(node, **changed)  # type: ignore[type-var]


def tile(node: T, n: int) -> T:
    """Give every leaf with rows ``n`` of them, repeating leaves of one row.

    Raises `InputError` for a leaf that has neither one row nor ``n``.
    """

    def one(x: Any, mark: str, where: str) -> Array:
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[0] not in (1, n):
            raise InputError(f"{where}: found {x.shape[0] if x.ndim else 'no'} rows, expected 1 or {n}")
        return jnp.broadcast_to(x, (n, *x.shape[1:]))

    return map_rows(node, one)


def take(node: T, rows: Array | np.ndarray | Sequence[int]) -> T:
    """Select images; every leaf with rows has all of them (`tile`)."""
    rows = jnp.asarray(rows)
    return map_rows(node, lambda x, mark, where: x[rows])


def specs(node: T, axis: str) -> T:
    """Return the tree with each leaf replaced by its PartitionSpec: rows over ``axis``, the rest replicated."""
    return map_rows(node, lambda x, mark, where: PartitionSpec(axis), lambda x: PartitionSpec())


def own_words(node: T, told: np.ndarray) -> T:
    """Return a tree for other prompts: its gates for the words of an image's own are multiplied by ``told`` (n,)."""

    def close(x: Array, mark: str, where: str) -> Array:
        return x * jnp.asarray(told, x.dtype).reshape(-1, *([1] * (x.ndim - 1))) if mark == "first" else x

    return map_rows(node, close)


def to_branches(node: T, live: Sequence[float] = (0.0, 1.0), first: Sequence[float] | None = None) -> T:
    """Repeat each image's row once per branch (branch minor) and multiply the gates by ``live[branch]``.

    ``first`` is that for the gates of an image's own prompt alone, ``live`` if None. Distances between images become
    distances between rows of the same branch.
    """

    def expand(x: Array, mark: str, where: str) -> Array:
        y = jnp.repeat(x, len(live), axis=0)
        if mark in ("gate", "first"):
            factors = live if mark == "gate" or first is None else first
            on = jnp.tile(jnp.asarray(factors, y.dtype), x.shape[0]).reshape(-1, *([1] * (y.ndim - 1)))
            y = y * on
        return y * len(live) if mark == "back" else y

    return map_rows(node, expand)


def check_together(node: Any, n: int, rows: int) -> None:
    """Raise `InputError` if one of ``n`` images looks at another outside its ``rows`` rows (of a batch or a device)."""

    def look(x: Any, mark: str, where: str) -> Any:
        for i, backs in enumerate(np.asarray(x).reshape(n, -1)) if mark == "back" else ():
            first, last = i - i % rows, min(i - i % rows + rows, n) - 1
            for other in i - backs:
                if not first <= other <= last:
                    raise InputError(
                        f"{where.split('.')[0]}: row {i} needs row {other}, and rows {first} to {last} are drawn "
                        "together on one device: expected a batch size, and a share of each device, of whole groups"
                    )
        return x

    map_rows(node, look)


def looks_back(node: Any) -> bool:
    """Return whether any image looks at another."""
    found = []

    def look(x: Any, mark: str, where: str) -> Any:
        found.append(mark == "back" and bool(np.any(np.asarray(x))))
        return x

    map_rows(node, look)
    return any(found)


def others(back: Array, x: Array) -> Array:
    """Return for each row of ``x`` (b, ...) the one ``back`` (b,) rows before it."""
    return x[jnp.arange(x.shape[0]) - back]


def like(value: Float[Array, " b"], x: Array) -> Array:
    """Reshape one number per row to broadcast against ``x`` (b, ...), in the dtype of ``x``."""
    return value.reshape(-1, *([1] * (x.ndim - 1))).astype(x.dtype)


def numbers(name: str, value: Any, n: int, what: str = "rows", least: float | None = None) -> np.ndarray:
    """Return a number, or one per row, as float32 (n,).

    Raises `InputError`, which calls the rows ``what``, for a wrong length and for numbers that float32 cannot hold or
    that are below ``least``.
    """
    if isinstance(value, (str, bytes)):
        raise InputError(f"{name}: found {value!r}, expected a number, or one for each of the {n} {what}")
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is found below
            found = np.asarray(value, np.float32)
    except OverflowError:
        found = np.full((), np.inf)  # a whole number with hundreds of digits
    except (TypeError, ValueError):
        raise InputError(f"{name}: found {value!r}, expected a number, or one for each of the {n} {what}") from None
    if found.shape not in ((), (n,)):
        given = f"{len(found)} values" if found.ndim == 1 else f"shape {found.shape}"
        raise InputError(f"{name}: found {given}, expected 1 or one for each of the {n} {what}")
    if not np.isfinite(found).all() or (least is not None and found.min(initial=least) < least):
        above = "finite numbers" if least is None else f"numbers >= {least:g}"
        raise InputError(f"{name}: found {value!r}, expected {above}")
    return np.broadcast_to(found, (n,))
