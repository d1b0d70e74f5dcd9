"""Cards: what a large object is, in at most ten lines, where its fields would print millions of numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax


class Card:
    """An object that shows itself as a heading and a few facts; in a notebook, too.

    Two of them are equal if they are the same object: comparing weights takes as long as loading them.
    """

    def _facts(self) -> Iterator[tuple[str, str]]:
        """Yield at most nine pairs (name, fact)."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return the card as text."""
        return "\n".join([type(self).__name__, *(f"  {name}: {fact}" for name, fact in self._facts())])

    def _repr_html_(self) -> str:
        """Return the card as a table, for notebooks."""
        rows = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(fact)}</td></tr>" for n, fact in self._facts())
        return f"<table><caption>{html.escape(type(self).__name__)}</caption>{rows}</table>"


def weights(tree: Any) -> str:
    """Say how many parameters a tree of arrays (or shapes) has, and in which dtypes."""
    leaves = jax.tree.leaves(tree)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    return f"{count:,} parameters, {some(sorted({str(leaf.dtype) for leaf in leaves})) or 'none'}"


def some(names: Iterable[str], most: int = 6) -> str:
    """Join names, of many the first few."""
    listed: Sequence[str] = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
