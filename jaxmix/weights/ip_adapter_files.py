"""IP-Adapter files: the published ones, training checkpoints, and UNets that diffusers saved with one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.types import InputError
from jaxmix.weights.files import exists
from jaxmix.weights.finite import all_finite
from jaxmix.weights.safetensors import SafetensorsFile
from jaxmix.weights.single_file_kinds import kind_of
from jaxmix.weights.store import save_tree

_PROJECTION = ("image_proj.", "image_proj_model.")
_LAYERS = ("ip_adapter.", "adapter_modules.")
_LAYER = re.compile(r"(\d+)\.to_(k|v)_ip\.weight")
_OF_DIFFUSERS = "encoder_hid_proj.image_projection_layers."
_HALVES = ("down", "up", "mid")
_PROCESSOR = re.compile(r"(.+\.attn2)\.processor\.to_(k|v)_ip\.(\d+)\.weight")
_CONVERT = (
    "convert it: python -c \"import torch, safetensors.torch as s; d = torch.load('{}', weights_only=True); "
    "s.save_file({{f'{{p}}.{{k}}': x.contiguous() for p in d for k, x in d[p].items()}}, 'ip_adapter.safetensors')\""
)
_FACE = (
    "its pictures go through insightface's face recognition, whose models are not openly licensed, and a LoRA of every "
    "attention; expected an adapter that reads CLIP"
)
# The names that diffusers gives to the parts of the projections.
_RENAMES = {
    "base": {"image_embeds.": "proj."},
    "full": {"ff.net.0.proj.": "proj.0.", "ff.net.2.": "proj.2.", "norm.": "proj.3."},
    "plus": {
        r"layers\.(\d+)\.ln0\.": r"layers.\1.0.norm1.",
        r"layers\.(\d+)\.ln1\.": r"layers.\1.0.norm2.",
        r"layers\.(\d+)\.attn\.to_q\.": r"layers.\1.0.to_q.",
        r"layers\.(\d+)\.attn\.to_out\.0\.": r"layers.\1.0.to_out.",
        r"layers\.(\d+)\.ff\.0\.": r"layers.\1.1.0.",
        r"layers\.(\d+)\.ff\.1\.net\.0\.proj\.": r"layers.\1.1.1.",
        r"layers\.(\d+)\.ff\.1\.net\.2\.": r"layers.\1.1.3.",
    },
}


def read_ip_adapter(path: Path, attn2: Sequence[str]) -> tuple[str, dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Return an adapter's kind ("base", "plus" or "full"), its projection and its layers, float32.

    The projection is under the names of the published files, in torch's layout; the layers map each of ``attn2``, the
    names of a UNet's cross-attentions in the order of diffusers' processors (the middle block last), to {"to_k",
    "to_v": {"kernel"}}. Raises InputError for a pickle, with the command that converts it, for FaceID, for any other
    file, and for an adapter with another number of layers.
    """
    if not exists(path) or path.is_dir():
        what = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: found {what}, expected an IP-Adapter as .safetensors")
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt"):
        raise InputError(
            f"{path}: found a Python pickle, which can run code when it is opened, expected .safetensors; "
            + _CONVERT.format(path)
        )
    file = SafetensorsFile(path)
    projection, layers = _split(file, attn2)
    if not projection or not layers:
        shapes = {key: entry.shape for key, entry in file.entries.items()}
        raise InputError(f"{path}: this is {kind_of(shapes)}, expected an IP-Adapter (image_proj.* and ip_adapter.*)")
    kind = _kind(str(path), projection)

    def read(key: str) -> np.ndarray:
        array = file.read(key).astype(np.float32)
        if not all_finite(array):
            raise InputError(f"{path}: tensor {key!r} has NaN or infinite values, expected finite numbers")
        return array

    held = {name: read(key) for name, key in projection.items()}
    for name in [name for name in held if name.endswith(".attn.to_k.weight")]:  # diffusers keeps them apart
        stem, values = name.removesuffix("attn.to_k.weight"), name.replace("to_k", "to_v")
        if values in held:
            held[f"{stem}0.to_kv.weight"] = np.concatenate([held.pop(name), held.pop(values)])
    found: dict[str, dict[str, Any]] = {}
    for (site, which), key in layers.items():
        array = read(key)
        if array.ndim != 2:
            raise InputError(f"{path}: {key} has the shape {list(array.shape)}, expected a matrix")
        found.setdefault(site, {})[f"to_{which}"] = {"kernel": np.ascontiguousarray(array.T)}
    halves = [site for site, layer in found.items() if len(layer) != 2]
    if halves or set(found) != set(attn2):
        raise InputError(
            f"{path}: an IP-Adapter of {len(found) - len(halves)} cross-attentions, expected the {len(attn2)} of this "
            "model; an adapter for another base?"
        )
    return kind, held, found


def write_ip_adapter(
    path: str | Path, projection: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], dtype: Any = None
) -> None:
    """Write the published layout: image_proj.*, and ip_adapter.N.* with the odd numbers of diffusers' processors.

    ``layers`` maps the names of all attn2 of a UNet to {"to_k", "to_v": {"kernel"}}.
    """
    numbers = {name: 2 * i + 1 for i, name in enumerate(sorted(layers, key=_place))}
    tree = {
        f"{numbers[name]}.to_{which}_ip": layer[f"to_{which}"] for name, layer in layers.items() for which in ("k", "v")
    }
    save_tree({"image_proj": projection, "ip_adapter": tree}, path, dtype)


def _place(name: str) -> tuple[int, list[int]]:
    """Return what sorts the names of cross-attentions as diffusers does, the middle block last."""
    return _HALVES.index(name.split("_")[0]), [int(x) for x in re.findall(r"\d+", name.removesuffix("attn2"))]


def _split(file: SafetensorsFile, attn2: Sequence[str]) -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """Return the file's keys by the projection's names, and by site and "k" or "v"."""
    projection: dict[str, str] = {}
    layers: dict[tuple[str, str], str] = {}
    places: dict[int, str] = {2 * i + 1: name for i, name in enumerate(attn2)}
    for key in file.entries:
        if prefix := next((prefix for prefix in _PROJECTION if key.startswith(prefix)), None):
            projection[key.removeprefix(prefix)] = key
        elif prefix := next((prefix for prefix in _LAYERS if key.startswith(prefix)), None):
            if found := _LAYER.fullmatch(key.removeprefix(prefix)):
                index = int(found[1])
                layers[places.get(index, f"number {index}"), found[2]] = key
        elif key.startswith(_OF_DIFFUSERS):
            number, _, rest = key.removeprefix(_OF_DIFFUSERS).partition(".")
            _one_adapter(file.where, number)
            projection[rest] = key
        elif found := _PROCESSOR.fullmatch(key):
            _one_adapter(file.where, found[3])
            layers[found[1].removeprefix("unet."), found[2]] = key
    renames: Mapping[str, str] = {}
    if "image_embeds.weight" in projection:
        renames = _RENAMES["base"]
    elif "ff.net.0.proj.weight" in projection:
        renames = _RENAMES["full"]
    elif any(".ln0." in name for name in projection):
        renames = _RENAMES["plus"]
    for old, new in renames.items():
        projection = {re.sub(f"^{old}", new, name): key for name, key in projection.items()}
    return projection, layers


def _one_adapter(where: str, number: str) -> None:
    if number != "0":
        raise InputError(f"{where}: a UNet with several IP-Adapters, expected one; load each from its own file")


def _kind(where: str, names: Mapping[str, Any]) -> str:
    if "proj.weight" in names:
        return "base"
    if "proj.3.weight" in names:
        return "full"
    if "latents" in names and "proj_in.weight" in names:
        return "plus"
    if any(name.startswith("perceiver_resampler.") for name in names):
        raise InputError(f"{where}: an IP-Adapter FaceID Plus, whose shortcut no key records; {_FACE}")
    if "norm.weight" in names:
        raise InputError(f"{where}: an IP-Adapter FaceID; {_FACE}")
    raise InputError(f"{where}: an IP-Adapter of an unknown kind (its projection has {sorted(names)[0]})")
