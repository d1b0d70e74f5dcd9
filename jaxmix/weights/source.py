"""Where tensors come from: a table of contents under torch names, and a way to read one tensor at a time."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxmix.types import InputError


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


def stored_dtype(source: Source) -> np.dtype:
    """Return the one precision of a source's floating-point tensors: float32, bfloat16 or float16.

    Raises InputError if there are several ("mixed precisions"), or another one.
    """
    floats = {key: entry.dtype for key, entry in source.entries.items() if jnp.issubdtype(entry.dtype, jnp.floating)}
    counts = Counter(floats.values())
    if len(counts) > 1:
        listed = ", ".join(
            f"{count} {dtype} (such as {next(key for key in floats if floats[key] == dtype)})"
            for dtype, count in counts.most_common()
        )
        raise InputError(f"{source.where}: mixed precisions: found {listed}, expected one; give a dtype to cast to it")
    dtype = next(iter(counts), np.dtype(np.float32))
    if dtype not in (np.float32, np.float16, jnp.bfloat16):
        raise InputError(
            f"{source.where}: found {dtype} weights, expected float32, bfloat16 or float16; give a dtype to cast to it"
        )
    return dtype
