"""The safetensors container: a JSON header, then raw little-endian tensors.

We read it ourselves because the safetensors package memory-maps the file, which keeps the pages of every tensor read
resident beside the parameters, and because its numpy interface lacks bfloat16.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Collection, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmix.types import InputError
from jaxmix.weights.files import refuse_stand_in
from jaxmix.weights.fp8 import scaled, split_scales
from jaxmix.weights.source import Entry, Source

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LARGEST_HEADER = 100 * 2**20  # the limit of the safetensors package


@dataclasses.dataclass(frozen=True)
class FileEntry(Entry):
    """One tensor of a file: its dtype, shape, and first byte counted from the start of the file."""

    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The table of contents of a safetensors file."""

    entries: dict[str, FileEntry]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file, without reading any tensor.

    Raises InputError naming the file if it is missing, truncated, or not a safetensors file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read_header(path, file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


class SafetensorsFile(Source):
    """The tensors of one safetensors file. `metadata` holds the strings of its header.

    Scaled 8-bit weights are read as float32, times their scales; see `jaxmix.weights.fp8`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read and check the header. Raises InputError as `read_header` does."""
        header = read_header(path)
        self.where = str(path)
        self.metadata = header.metadata
        self.stored, scales = split_scales(self.where, header.entries)  # as the file has them
        self.scales = {key: header.entries[scale] for key, scale in scales.items()}
        self._entries = widened(self.stored, self.scales)

    @property
    def entries(self) -> Mapping[str, FileEntry]:
        return self._entries

    def read(self, key: str) -> np.ndarray:
        with open(self.where, "rb") as file:
            array = read_tensor(file, self.stored[key])
            return array if key not in self.scales else scaled(array, read_tensor(file, self.scales[key]))


def widened(entries: Mapping[str, FileEntry], scales: Collection[str]) -> dict[str, FileEntry]:
    """Return the entries of tensors as they are read: those that are scaled are float32."""
    wide = np.dtype(np.float32)
    return {key: dataclasses.replace(e, dtype=wide) if key in scales else e for key, e in entries.items()}


def read_tensor(file: BufferedReader, entry: FileEntry) -> np.ndarray:
    """Read one tensor into aligned memory of its own."""
    array = aligned_empty(entry.shape, entry.dtype)
    file.seek(entry.offset)
    if file.readinto(array.reshape(-1).view(np.uint8).data) != entry.nbytes:
        raise InputError(f"{file.name}: ends inside a tensor: the file was truncated while it was read")
    return array


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array at a 64-byte boundary, which JAX adopts on the CPU without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def encode_header(entries: dict[str, tuple[np.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Return the header of a file whose tensors follow in the order of `entries`."""
    contents: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, (dtype, shape) in entries.items():
        end = offset + math.prod(shape) * dtype.itemsize
        contents[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(contents, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_header(path: Path, file: BufferedReader) -> Header:
    size = os.fstat(file.fileno()).st_size
    head = file.read(200)
    refuse_stand_in(path, head)
    prefix = head[:8]
    file.seek(8)
    if len(prefix) < 8:
        raise InputError(f"{path}: not a safetensors file: {size} bytes, expected at least 8")
    (length,) = struct.unpack("<Q", prefix)
    if length > _LARGEST_HEADER:
        raise InputError(f"{path}: not a safetensors file: its first 8 bytes announce a header of {length} bytes")
    if 8 + length > size:
        raise InputError(f"{path}: truncated: {size} bytes, expected at least {8 + length} for the header alone")
    try:
        contents = json.loads(file.read(length))
        metadata = dict(contents.pop("__metadata__", None) or {})
        spans = {key: _entry(value, 8 + length) for key, value in contents.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: corrupt: the safetensors header is not valid ({error})") from None

    position = 8 + length
    for key, (entry, end) in sorted(spans.items(), key=lambda item: (item[1][0].offset, item[1][1])):
        if entry.offset != position or end - entry.offset != entry.nbytes:
            raise InputError(
                f"{path}: corrupt: tensor {key!r} {entry.dtype}{list(entry.shape)} is at bytes {entry.offset} to "
                f"{end}, expected {position} to {position + entry.nbytes}"
            )
        position = end
    if size != position:
        what = "truncated" if size < position else "corrupt"
        raise InputError(f"{path}: {what}: {size} bytes, expected {position} by its header")
    return Header({key: entry for key, (entry, _) in spans.items()}, metadata)


def _entry(value: dict[str, Any], base: int) -> tuple[FileEntry, int]:
    """Return a tensor's entry and the offset of its end, both counted from the start of the file."""
    name, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("negative or fractional shapes or offsets")
    return FileEntry(DTYPES[name], tuple(shape), base + begin), base + end
