"""Where tensors come from: a table of contents under torch names, and a way to read one tensor at a time."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxmix.types import note


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known about a tensor before it is read: its dtype, and its shape in torch's layout."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(abc.ABC):
    """Tensors of one model under torch names, read one by one.

    Opening a source reads tables of contents only. A source holds no open file.
    """

    where: str
    """The file, or the folder of a model in several files, for error messages."""

    @property
    @abc.abstractmethod
    def entries(self) -> Mapping[str, Entry]:
        """The tensors by their torch key."""

    @abc.abstractmethod
    def read(self, key: str) -> np.ndarray:
        """Return one tensor in torch's layout, with the dtype and the shape of its entry, in memory of its own.

        Raises InputError if the file ends before the tensor does; the values are not checked.
        """

    def origin(self, key: str) -> str:
        """Return the file that holds a tensor, for error messages about it."""
        return self.where


def stored_dtype(source: Source, notes: list[str] | None = None) -> np.dtype:
    """Return the precision that holds all of a source's floating-point tensors: float32, bfloat16 or float16.

    8-bit numbers are widened to bfloat16, float64 is cut to float32, and of several precisions the widest is taken; if
    so, a line that says it is added to `notes`, or warned about if that is None.
    """
    floats = {key: entry.dtype for key, entry in source.entries.items() if jnp.issubdtype(entry.dtype, jnp.floating)}
    counts = Counter(floats.values())
    kinds = {np.dtype(jnp.bfloat16) if dtype.itemsize == 1 else dtype for dtype in counts}
    if kinds - {np.dtype(np.float16)} == set():
        widest = np.dtype(np.float16) if kinds else np.dtype(np.float32)
    else:  # neither of the two halves holds the other
        widest = np.dtype(jnp.bfloat16) if kinds == {np.dtype(jnp.bfloat16)} else np.dtype(np.float32)
    if set(counts) - {widest}:
        listed = ", ".join(
            f"{count} {dtype} (such as {next(key for key in floats if floats[key] == dtype)})"
            for dtype, count in counts.most_common()
        )
        mixed = "mixed precisions: " if len(counts) > 1 else ""
        note(f"{mixed}found {listed}, loaded as {widest}", notes, source.where)
    return widest
