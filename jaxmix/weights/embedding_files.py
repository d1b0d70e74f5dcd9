"""Files of learnt embeddings (textual inversion, arXiv 2208.01618), as other programs write them.

- A1111: ``{"string_to_param": {"*": (n, d)}, "name": ...}`` in a .pt, or base64 in a PNG's text.
- diffusers: ``{"<token>": (d,) or (n, d)}`` in a .bin or .safetensors.
- sd-scripts: ``{"emb_params": (n, d)}``. SDXL: ``{"clip_l": (n, 768), "clip_g": (n, 1280)}``.
- P+ (arXiv 2303.09522), vectors of each layer: sd-scripts' ``{"IN01": (n, d), ... "MID" ... "OUT11"}``; for models with
  other layers than these 16 the names of the cross-attentions, for SDXL followed by ``.clip_l`` and ``.clip_g``.

Pickles are read without torch, by an unpickler that knows tensors, dictionaries and lists: whatever else a file asks
for is refused, since a pickle may run any program. torch's format of before 1.6, which is no zip archive, is refused.
"""

from __future__ import annotations

import base64
import binascii
import collections
import io
import json
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxmix.types import InputError, shown
from jaxmix.weights.files import refuse_stand_in, user_path
from jaxmix.weights.safetensors import SafetensorsFile

_LARGEST = 64 << 20  # bytes: a hundred vectors take 0.3 MB
_SDXL = ("clip_l", "clip_g")
TOKEN = "placeholder_token"
"""Where our files keep the token in their metadata, if their keys are none."""

PLUS = (*(f"IN{i:02d}" for i in (1, 2, 4, 5, 7, 8)), "MID", *(f"OUT{i:02d}" for i in range(3, 12)))
"""What files of P+ call the 16 layers of Stable Diffusion 1 and 2, in the order in which they run."""

_UNNAMED = ("*", "emb_params", *_SDXL)


class LearntVectors(NamedTuple):
    """What a file holds: the token that it names (None without one), and vectors (n, d), one array a text encoder.

    Of P+ also those of each layer by its name; ``vectors`` are their mean then.
    """

    token: str | None
    vectors: tuple[np.ndarray, ...]
    layers: Mapping[str, tuple[np.ndarray, ...]] = {}


def read_embedding(path: str | Path) -> LearntVectors:
    """Read a file of any of these kinds; a token that stands for any, such as A1111's ``*``, is the file's own name.

    Raises `InputError`, which names the file, for a missing or damaged one and one of another kind.
    """
    path = user_path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(200)
            rest = file.read(_LARGEST) if size <= _LARGEST else b""
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a learnt embedding") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if size > _LARGEST:
        raise InputError(f"{path}: found {size >> 20} MB, expected a learnt embedding, of at most {_LARGEST >> 20} MB")
    refuse_stand_in(path, head)
    data, named = head + rest, None
    if path.suffix.lower() == ".safetensors":
        opened = SafetensorsFile(path)
        named = opened.metadata.get(TOKEN)
        tree: Any = {key: opened.read(key) for key in opened.entries}
    elif data.startswith(b"\x89PNG"):
        tree = _from_png(path, data)
    elif data.startswith(b"PK"):
        tree = _from_archive(path, data)
    elif data.startswith(b"\x80"):
        raise InputError(
            f"{path}: found a pickle that is no zip archive, as torch wrote before 1.6, expected a later one, "
            "or safetensors"
        )
    else:
        raise InputError(f"{path}: found neither safetensors, a torch archive nor a PNG, expected a learnt embedding")
    found = learnt_vectors(tree, str(path))
    return found if found.token is not None else found._replace(token=named or path.stem)


def learnt_vectors(tree: Any, where: str) -> LearntVectors:
    """Return the vectors in what such a file holds.

    Raises `InputError`, which begins with ``where``, for anything else.
    """
    held: Any = tree
    if isinstance(held, Mapping) and "string_to_param" in held:
        held = held["string_to_param"]
        if isinstance(held, Mapping) and isinstance(held.get("_parameters"), Mapping):  # a ParameterDict
            held = held["_parameters"]
    if not isinstance(held, Mapping) or not held:
        raise InputError(f"{where}: found {type(held).__name__}, expected a learnt embedding")
    named = {key: value for key, value in held.items() if isinstance(key, str) and _is_array(value)}
    if len(named) > 1 and all(_layer_of(key) for key in named):
        return _by_layer(named, where)
    keys = [key for key in _SDXL if key in named] if set(_SDXL) & set(named) else list(named)
    if not keys or (len(keys) > 1 and tuple(keys) != _SDXL):
        names = ", ".join(map(shown, list(held)[:3]))
        raise InputError(
            f"{where}: found {len(held)} entries ({names}{', ...' * (len(held) > 3)}), expected the vectors of one "
            "embedding: under its token, emb_params, string_to_param, or clip_l and clip_g"
        )
    vectors = tuple(_checked(named[key], f"{where}: {key}") for key in keys)
    return LearntVectors(None if keys[0] in _UNNAMED else keys[0], vectors)


def _layer_of(key: str) -> str:
    """Return the layer that a key of P+ names, "" if it is none."""
    layer = key.removesuffix(".clip_l").removesuffix(".clip_g")
    return layer if layer in PLUS or layer.endswith(".attn2") else ""


def _by_layer(named: Mapping[str, Any], where: str) -> LearntVectors:
    layers: dict[str, tuple[np.ndarray, ...]] = {}
    for name in dict.fromkeys(map(_layer_of, named)):
        keys = [key for key in (name, *(f"{name}.{encoder}" for encoder in _SDXL)) if key in named]
        if (len(keys) > 1 and name in keys) or keys[0] == f"{name}.{_SDXL[1]}":
            raise InputError(f"{where}: {name}: found {' and '.join(keys)}, expected one for each text encoder")
        layers[name] = tuple(_checked(named[key], f"{where}: {key}") for key in keys)
    shapes = {name: tuple(x.shape for x in vectors) for name, vectors in layers.items()}
    first, *others = shapes
    for name in others:
        if shapes[name] != shapes[first]:
            raise InputError(f"{where}: {name}: found {shapes[name]}, expected {shapes[first]} as in {first}")
    mean = tuple(np.mean(both, 0) for both in zip(*layers.values(), strict=True))
    return LearntVectors(None, mean, layers)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "__len__")


def _checked(value: Any, where: str) -> np.ndarray:
    """Return vectors (n, d) float32."""
    try:
        found = np.asarray(value)
        floats = found.dtype.kind == "f" or found.dtype == ml_dtypes.bfloat16
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{where}: found {type(value).__name__}, expected numbers (n, width)") from None
    if not floats or found.ndim not in (1, 2) or not found.size:
        raise InputError(f"{where}: found {found.dtype} of shape {found.shape}, expected floats (n, width)")
    with np.errstate(over="ignore"):
        made = found.reshape(-1, found.shape[-1]).astype(np.float32)
    if not np.isfinite(made).all():
        raise InputError(f"{where}: found numbers that are not finite, expected an undamaged file")
    return made


# PNG ---------------------------------------------------------------------------------------------------------------


def _from_png(path: Path, data: bytes) -> Any:
    """Return what A1111 hides in the text of a picture."""
    at = 8
    while at + 8 <= len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        if kind == b"tEXt" and body.startswith(b"sd-ti-embedding\0"):
            try:
                return _arrays(json.loads(base64.b64decode(body.partition(b"\0")[2], validate=True)))
            except (binascii.Error, ValueError, RecursionError, TypeError) as error:
                raise InputError(f"{path}: the embedding in its text is damaged ({type(error).__name__})") from None
        at += 12 + size
    raise InputError(f"{path}: found a picture without the text sd-ti-embedding, expected a learnt embedding")


def _arrays(tree: Any) -> Any:
    if isinstance(tree, dict):
        if set(tree) == {"TORCHTENSOR"}:
            return np.asarray(tree["TORCHTENSOR"], np.float32)
        return {key: _arrays(value) for key, value in tree.items()}
    return tree


# Pickles of torch --------------------------------------------------------------------------------------------------

_STORAGES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
}


class _Storage(NamedTuple):
    """A name that stands for the type of a storage."""

    dtype: Any


class _Holder(dict):
    """What stands for a module that holds tensors: its state."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


def _from_archive(path: Path, data: bytes) -> Any:
    """Return what torch saved in a zip archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            main = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(main) != 1:
                raise InputError(f"{path}: found an archive without data.pkl, expected one that torch saved")
            if sum(info.file_size for info in archive.infolist()) > _LARGEST:
                raise InputError(f"{path}: found more than {_LARGEST >> 20} MB, expected a learnt embedding")
            prefix = main[0].removesuffix("data.pkl")
            order = archive.read(f"{prefix}byteorder").strip() if f"{prefix}byteorder" in names else b"little"
            if order != b"little":
                raise InputError(f"{path}: found the byte order {order!r}, expected little")

            def storage(key: str) -> bytes:
                return archive.read(f"{prefix}data/{key}")

            return _Unpickler(io.BytesIO(archive.read(main[0])), storage).load()
    except InputError:
        raise
    except _Refused as error:
        raise InputError(
            f"{path}: found a pickle with {error}, expected tensors and dictionaries alone: it might run any program"
        ) from None
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        KeyError,
        RuntimeError,
        NotImplementedError,
        MemoryError,
    ) as error:
        raise InputError(f"{path}: a damaged archive ({type(error).__name__}), expected a learnt embedding") from None
    except Exception as error:  # pickles raise anything
        raise InputError(f"{path}: a damaged pickle ({type(error).__name__}), expected a learnt embedding") from None


class _Refused(Exception):
    """Something in a pickle that is neither a tensor nor a container."""


class _Unpickler(pickle.Unpickler):
    """Reads tensors, as NumPy arrays, in dictionaries, lists and tuples, and calls nothing that a file names."""

    def __init__(self, file: io.BytesIO, storage: Callable[[str], bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch.nn.modules.container", "ParameterDict"): _Holder,
            ("__builtin__", "set"): set,  # in the state of a ParameterDict
            ("builtins", "set"): set,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _STORAGES:
            return _Storage(np.dtype(_STORAGES[name]))
        raise _Refused(f"{module}.{name}"[:80])

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(key, str):
            raise _Refused(shown(pid))
        data = self._storage(key)
        if len(data) != count * storage.dtype.itemsize:
            raise EOFError
        return np.frombuffer(data, storage.dtype)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """Return a tensor of a storage, as torch's function of that name does."""
    if len(size) != len(stride) or any(n < 0 for n in (offset, *size, *stride)):
        raise ValueError("sizes")
    if not math.prod(size):
        return np.zeros(size, storage.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(storage):
        raise ValueError("sizes beyond the storage")
    if math.prod(size) > len(storage):  # steps of zero, which repeat it
        raise ValueError("sizes")
    steps = [step * storage.dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor
