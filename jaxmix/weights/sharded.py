"""Models in several safetensors files, tied together by an index as written by diffusers and transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from jaxmix.types import InputError
from jaxmix.weights.files import read_json
from jaxmix.weights.safetensors import FileEntry, read_header, read_tensor
from jaxmix.weights.source import Source

_LISTED = 4


class ShardedFiles(Source):
    """The tensors of a `*.safetensors.index.json`, whose `weight_map` names the file of every tensor."""

    def __init__(self, index: str | os.PathLike[str]) -> None:
        """Read the index and the headers of all shards.

        Raises InputError for an invalid index, a shard that is missing or damaged, and a key that is not in its shard,
        in two shards, or in a shard but not in the index.
        """
        index = Path(index)
        self.where = str(index)
        shard_of = _read_weight_map(index)
        self._shards: dict[str, Path] = {}
        self._entries: dict[str, FileEntry] = {}
        for name in sorted(set(shard_of.values())):
            path = index.parent / name
            if not path.is_file():
                count = sum(shard == name for shard in shard_of.values())
                raise InputError(
                    f"{index}: the shard {name} with {count} tensors is missing, expected it beside the index"
                )
            for key, entry in read_header(path).entries.items():
                if key in self._entries:
                    raise InputError(f"{index}: tensor {key!r} is in two shards, {self._shards[key].name} and {name}")
                self._entries[key], self._shards[key] = entry, path
        for key, name in shard_of.items():
            if key not in self._entries:
                raise InputError(f"{index}: tensor {key!r} is in no shard, expected it in {name}")
            if self._shards[key] != index.parent / name:
                raise InputError(f"{index}: tensor {key!r} is in {self._shards[key].name}, expected it in {name}")
        if extra := sorted(self._entries.keys() - shard_of.keys()):
            listed = ", ".join(extra[:_LISTED]) + (", ..." if len(extra) > _LISTED else "")
            raise InputError(f"{index}: {len(extra)} tensors in the shards are not in the index: {listed}")

    @property
    def entries(self) -> Mapping[str, FileEntry]:
        return self._entries

    def read(self, key: str) -> np.ndarray:
        with self._shards[key].open("rb") as file:
            return read_tensor(file, self._entries[key])

    def origin(self, key: str) -> str:
        return str(self._shards[key])


def _read_weight_map(index: Path) -> dict[str, str]:
    found = read_json(index)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map in this index, expected the shard of every tensor")
    for key, name in weight_map.items():
        # A bare file name: a foreign index must not reach outside its own folder.
        if not isinstance(name, str) or PurePosixPath(name).name != name or not name.lower().endswith(".safetensors"):
            raise InputError(f"{index}: weight_map has {name!r} for {key!r}, expected the name of a safetensors file")
    return weight_map
