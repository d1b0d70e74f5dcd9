"""The checkpoint of DEADiff, one file in the original latent diffusion layout with all that its authors trained.

Read are the keys and values of tokens (``attn2.i_to_k``, ``i_to_v``), and for style and content a CLIP image encoder in
open_clip's layout without its last layers, the norm after it, a Q-Former under LAVIS's names, and a projection. Its
UNet, autoencoder and text encoder are those of Stable Diffusion 1.5, which the authors left as they were: any base of
that family takes their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.types import InputError
from jaxmix.weights.files import exists
from jaxmix.weights.finite import all_finite
from jaxmix.weights.load import flat_pickle_error
from jaxmix.weights.safetensors import SafetensorsFile
from jaxmix.weights.single_file_kinds import kind_of
from jaxmix.weights.single_file_names import UNET, unet_table
from jaxmix.weights.source import Source
from jaxmix.weights.vision_files import open_inner_encoder

_BERT = "Qformer.bert."
_WORDS, _PLACES = (f"{_BERT}embeddings.{name}_embeddings.weight" for name in ("word", "position"))
_EYE = ".visual_encoder."  # whose attentions have one bias by another name
_KINDS = {"i_to_k": "to_k", "i_to_v": "to_v"}
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")


def open_deadiff(path: Path) -> SafetensorsFile:
    """Open a checkpoint; raises InputError for a pickle, with the command that converts it, and for any other file."""
    if not exists(path) or path.is_dir():
        what = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: found {what}, expected a checkpoint of DEADiff as .safetensors")
    if path.suffix.lower() in _PICKLES:
        raise flat_pickle_error(path, "deadiff.safetensors")
    file = SafetensorsFile(path)
    shapes = {key: entry.shape for key, entry in file.entries.items()}
    if not any(".attn2.i_to_k." in key for key in shapes) or not any("_blip." in key for key in shapes):
        raise InputError(
            f"{path}: this is {kind_of(shapes)}, expected a checkpoint of DEADiff (attn2.i_to_k, style_blip.* and "
            "content_blip.*)"
        )
    return file


def read_layers(file: SafetensorsFile, unet: Mapping[str, Any], attn2: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the keys and values of tokens of each of ``attn2``, {"to_k", "to_v": {"kernel"}} float32.

    ``unet`` is the config of the UNet whose cross-attentions these are. Raises InputError if they are not the file's.
    """
    table = unet_table(unet)
    found: dict[str, dict[str, Any]] = {}
    for key in file.entries:
        module, _, leaf = key.removesuffix(".weight").rpartition(".")
        if leaf in _KINDS and key.startswith(UNET):
            link = table.of_file(key)
            site = module if link is None else link.ours[0].rpartition(f".{leaf}.")[0]
            array = _read(file, key, 2)
            found.setdefault(site, {})[_KINDS[leaf]] = {"kernel": np.ascontiguousarray(array.T)}
    whole = {site for site, layer in found.items() if len(layer) == 2}
    if set(found) != set(attn2) or whole != set(found):
        raise InputError(
            f"{file.where}: keys and values of {len(whole & set(attn2))} cross-attentions of this model, expected the "
            f"{len(attn2)} that it has; DEADiff is for Stable Diffusion 1.x"
        )
    return {name: found[name] for name in attn2}


def read_slot(file: SafetensorsFile, slot: str, word: Sequence[int]) -> dict[str, dict[str, np.ndarray]]:
    """Return a slot's tensors under the names of the file, float32: its norm, its Q-Former and its projection.

    {"ln_vision", "qformer", "proj"}: {name: array}. Of the Q-Former's vocabulary only the rows of ``word`` are read,
    and kept with their places as "words".
    """
    blip, proj = f"{slot}_blip.", f"{slot}_proj_layer."
    keys = [key for key in file.entries if key.startswith((blip, proj))]
    wanted = [f"{blip}{name}" for name in ("query_tokens", _WORDS, _PLACES)]
    wanted += [f"{key.removesuffix('.bias')}.weight" for key in keys if key.endswith(".bias") and _EYE not in key]
    if missing := [key for key in wanted if key not in file.entries]:
        raise InputError(f"{file.where}: found no {missing[0]}, expected all tensors of a checkpoint of DEADiff")
    tables = [_read(file, f"{blip}{name}", 2) for name in (_WORDS, _PLACES)]
    if len(tables[0]) <= max(word) or len(tables[1]) < len(word):
        raise InputError(
            f"{file.where}: {blip}{_WORDS} has {len(tables[0])} words, expected more than {max(word)}: those of "
            "bert-base-uncased"
        )
    qformer = {
        "query_tokens": _read(file, f"{blip}query_tokens", 3),
        "words": tables[0][list(word)] + tables[1][: len(word)],
    }
    inner = f"{blip}{_BERT}"
    for key in keys:
        if key.startswith((f"{inner}encoder.", f"{inner}embeddings.LayerNorm.")):
            qformer[key.removeprefix(inner)] = _read(file, key)
    norm = {key.removeprefix(blip): _read(file, key) for key in keys if key.startswith(f"{blip}ln_vision.")}
    made = {key.removeprefix(proj): _read(file, key) for key in keys if key.startswith(proj)}
    return {"ln_vision": norm, "qformer": qformer, "proj": made}


def open_slot_encoder(file: SafetensorsFile, slot: str) -> tuple[dict[str, Any], Source]:
    """Return the config and the tensors of a slot's image encoder, whose states go without a norm after its layers."""
    return open_inner_encoder(file, f"{slot}_blip.visual_encoder.")


def _read(file: SafetensorsFile, key: str, rank: int | None = None) -> np.ndarray:
    array = file.read(key).astype(np.float32)
    if rank is not None and array.ndim != rank:
        raise InputError(f"{file.where}: {key} has the shape {list(array.shape)}, expected {rank} dimensions")
    if not all_finite(array):
        raise InputError(f"{file.where}: tensor {key!r} has NaN or infinite values, expected finite numbers")
    return array
