"""Flax msgpack files (`flax.serialization.to_bytes`) as sources: the structure is read, the arrays are skipped.

Read here rather than with flax because that holds the whole file in memory beside all of its arrays. Of the format
(msgpack, with arrays as extension type 1 holding [shape, dtype name, bytes]) only what a tree of arrays needs is known.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxmix.types import InputError
from jaxmix.weights import names
from jaxmix.weights.flax_tree import torch_entry, unwrapped
from jaxmix.weights.safetensors import aligned_empty
from jaxmix.weights.source import Entry, Source

_CHUNKED = "__msgpack_chunked_array__"  # how flax marks an array of more than 2**30 bytes, kept in pieces
_LONGEST_NAME = 1000
_ARRAY, _SCALAR = 1, 3  # flax's extension types


class _Array(NamedTuple):
    """An array of the file: spans are (first byte, bytes) of its pieces."""

    dtype: np.dtype
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class MsgpackFile(Source):
    """The tensors of a `diffusion_flax_model.msgpack` or `flax_model.msgpack` under torch names."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the structure of the file. Raises InputError for one that is truncated or holds no tree of arrays."""
        path = Path(path)
        self.where = str(path)
        try:
            with path.open("rb") as file:
                tree = _Reader(file).tree()
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except EOFError:
            raise InputError(f"{path}: truncated: {path.stat().st_size} bytes, expected more by its contents") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not a Flax msgpack file of weights: {error}") from None
        self._arrays: dict[str, tuple[names.Path, _Array]] = {}
        self._entries: dict[str, Entry] = {}
        for leaf_path, array in names.flatten(unwrapped(tree)):
            key, entry = torch_entry(leaf_path, array.dtype, array.shape)
            self._arrays[key], self._entries[key] = (leaf_path, array), entry

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, key: str) -> np.ndarray:
        path, found = self._arrays[key]
        array = aligned_empty(found.shape, found.dtype)
        memory = array.reshape(-1).view(np.uint8).data
        done = 0
        with open(self.where, "rb") as file:
            for start, nbytes in found.spans:
                file.seek(start)
                if file.readinto(memory[done : done + nbytes]) != nbytes:
                    raise InputError(f"{self.where}: ends inside a tensor: the file was cut off while it was read")
                done += nbytes
        return names.to_torch_layout(path, array)


class _Reader:
    """Walks through a msgpack file once, remembering where arrays lie instead of reading them."""

    def __init__(self, file: BufferedReader) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def tree(self) -> dict[str, Any]:
        found = self.value()
        if not isinstance(found, dict):
            raise ValueError(f"found a {type(found).__name__}, expected a tree of arrays")
        if self.file.tell() != self.size:
            raise ValueError(f"{self.size} bytes, expected {self.file.tell()} by its contents")
        return _checked(found, ())

    def value(self) -> Any:
        """Read the next value: a map, a text, a number, a list, or the place of an array."""
        code = self._bytes(1)[0]
        if code <= 0x7F:
            return code
        if code <= 0x8F:
            return self._map(code & 0x0F)
        if code <= 0x9F:
            return [self.value() for _ in range(code & 0x0F)]
        if code <= 0xBF:
            return self._text(code & 0x1F)
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if 0xC4 <= code <= 0xC6:  # bytes: their place
            return self._skip(self._number(1 << (code - 0xC4)))
        if 0xC7 <= code <= 0xC9:
            return self._extension(self._number(1 << (code - 0xC7)))
        if 0xCC <= code <= 0xCF:
            return self._number(1 << (code - 0xCC))
        if 0xD4 <= code <= 0xD8:
            return self._extension(1 << (code - 0xD4))
        if 0xD9 <= code <= 0xDB:
            return self._text(self._number(1 << (code - 0xD9)))
        if code in (0xDC, 0xDD):
            return [self.value() for _ in range(self._number(2 if code == 0xDC else 4))]
        if code in (0xDE, 0xDF):
            return self._map(self._number(2 if code == 0xDE else 4))
        raise ValueError(f"byte {code:#x} at {self.file.tell() - 1} starts nothing that a tree of arrays has")

    def _map(self, length: int) -> Any:
        found: dict[str, Any] = {}
        for _ in range(length):
            key = self.value()
            if not isinstance(key, (str, int)):
                raise ValueError(f"found a {type(key).__name__} as a name, expected text")
            found[str(key)] = self.value()
        if not found.get(_CHUNKED):
            return found
        pieces = [found["chunks"][str(i)] for i in range(len(found["chunks"]))]
        shape = tuple(found["shape"][str(i)] for i in range(len(found["shape"])))
        return _array(pieces[0].dtype, shape, tuple(span for piece in pieces for span in piece.spans))

    def _extension(self, length: int) -> _Array:
        kind = self._bytes(1)[0]
        end = self.file.tell() + length
        if end > self.size:
            raise EOFError
        if kind not in (_ARRAY, _SCALAR):
            raise ValueError(f"found an extension of type {kind}, expected an array")
        shape, dtype, span = self.value()
        if self.file.tell() != end:
            raise ValueError(f"an array ends at byte {self.file.tell()}, expected {end}")
        return _array(np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), tuple(shape), (span,))

    def _text(self, length: int) -> str:
        if length > _LONGEST_NAME:
            raise ValueError(f"a name of {length} bytes")
        return self._bytes(length).decode()

    def _number(self, length: int) -> int:
        return int.from_bytes(self._bytes(length), "big")

    def _skip(self, length: int) -> tuple[int, int]:
        start = self.file.tell()
        if start + length > self.size:
            raise EOFError
        self.file.seek(length, os.SEEK_CUR)
        return start, length

    def _bytes(self, length: int) -> bytes:
        data = self.file.read(length)
        if len(data) < length:
            raise EOFError
        return data


def _array(dtype: np.dtype, shape: tuple[int, ...], spans: tuple[tuple[int, int], ...]) -> _Array:
    found = sum(nbytes for _, nbytes in spans)
    if found != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array {dtype}{list(shape)} has {found} bytes")
    return _Array(dtype, shape, spans)


def _checked(tree: dict[str, Any], path: names.Path) -> dict[str, Any]:
    for name, value in tree.items():
        if isinstance(value, dict):
            _checked(value, (*path, name))
        elif not isinstance(value, _Array):
            raise ValueError(f"{'.'.join((*path, name))} is a {type(value).__name__}, expected an array")
    return tree
