"""One part of a model on its own: a VAE to put in place of another, a UNet that needs the rest from a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmix.types import InputError
from jaxmix.weights.files import exists
from jaxmix.weights.load import open_source, read_config
from jaxmix.weights.safetensors import FileEntry, SafetensorsFile
from jaxmix.weights.single_file import (
    V_PREDICTION_KEY,
    ZERO_SNR_KEY,
    PartSource,
    linked,
    linked_scale,
    told_by_metadata,
)
from jaxmix.weights.single_file_kinds import kind_of
from jaxmix.weights.single_file_names import UNET, VAE, Table, unet_table, vae_table
from jaxmix.weights.source import Source

_TITLES = {"unet": "a UNet", "vae": "a VAE"}
# Where a part begins in a file of its own or in a whole checkpoint, and a tensor that tells the layout of its names.
_DIFFUSERS = {"unet": (("", "unet."), "down_blocks.0."), "vae": (("", "vae."), "encoder.down_blocks.0.")}
_ORIGINAL = {
    "unet": ((UNET, "diffusion_model.", "model.", ""), "input_blocks.0.0.weight"),
    "vae": ((VAE, "vae.", ""), "encoder.down.0.block.0.conv1.weight"),
}
_OF_TRAINING = ("loss.", "model_ema.", V_PREDICTION_KEY, ZERO_SNR_KEY)


@dataclasses.dataclass(frozen=True)
class OpenPart:
    """A part's tensors under our names, and what its file says about it.

    `config` is its config.json, None for a file without one; `scheduler` holds keys of a scheduler config.
    """

    source: Source
    config: dict[str, Any] | None = None
    scheduler: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_part(path: Path, part: str, config: Mapping[str, Any], notes: list[str]) -> OpenPart:
    """Open the "unet" or the "vae" at a path: its folder, the pipeline's folder that has it, or a safetensors file.

    A file may have the names of diffusers or of the original layout, and may be a whole checkpoint, from which only
    this part is taken. `config`, of the model that it goes into, says which layers the original names mean. Raises
    InputError for anything else.
    """
    if not exists(path):
        raise InputError(f"{path}: found no such file or folder, expected {_TITLES[part]}")
    if path.is_dir():
        folder = path / part if (path / part).is_dir() else path
        return OpenPart(open_source(folder), read_config(folder / "config.json"))
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path}: found {path.suffix or 'no ending'!r}, expected {_TITLES[part]} as .safetensors")
    file = SafetensorsFile(path)
    found = _diffusers(file, part) or _original(file, part, config)
    if found is None:
        shapes = {key: entry.shape for key, entry in file.stored.items()}
        raise InputError(f"{path}: this is {kind_of(shapes)}, expected {_TITLES[part]}")
    scheduler: dict[str, Any] = {}
    if part == "unet":
        if V_PREDICTION_KEY in file.stored:
            scheduler["prediction_type"] = "v_prediction"
        elif told := told_by_metadata(file.metadata, file.stored, notes):
            scheduler["prediction_type"] = told
        if ZERO_SNR_KEY in file.stored:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return OpenPart(found, None, scheduler)


def _diffusers(file: SafetensorsFile, part: str) -> Source | None:
    prefixes, mark = _DIFFUSERS[part]
    for prefix in prefixes:
        if any(key.startswith(prefix + mark) for key in file.stored):
            names = {
                key.removeprefix(prefix): key
                for key in file.stored
                if key.startswith(prefix) and not key.startswith(_OF_TRAINING)
            }
            entries = {ours: file.stored[key] for ours, key in names.items()}
            scales = {ours: file.scales[key] for ours, key in names.items() if key in file.scales}
            return PartSource(file.where, part, entries, (), scales)
    return None


def _original(file: SafetensorsFile, part: str, config: Mapping[str, Any]) -> Source | None:
    prefixes, mark = _ORIGINAL[part]
    prefix = next((prefix for prefix in prefixes if prefix + mark in file.stored), None)
    if prefix is None:
        return None
    table = Table(prefix, (unet_table if part == "unet" else vae_table)(config).modules)
    entries: dict[str, FileEntry] = {}
    scales: dict[str, FileEntry] = {}
    strange = []
    for key, entry in file.stored.items():
        link = table.of_file(key) if key.startswith(prefix) else None
        if link is not None:
            entries |= linked(link, entry)
            scales |= linked_scale(link, file.scales.get(key))
        elif key.startswith(prefix) and not key.startswith(_OF_TRAINING):
            strange.append(key)
    if strange:
        raise InputError(
            f"{file.where}: {len(strange)} of its tensors are in no {part} like the model's, such as {strange[0]}, "
            "expected one of the same family"
        )
    return PartSource(file.where, part, entries, (), scales)
