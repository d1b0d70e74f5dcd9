"""Single-file checkpoints of Stable Diffusion 1.x, 2.x and SDXL, as the community ships them: opened and written.

The file's name and metadata are ignored. Tensors are read one at a time from their places in the file.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.types import InputError, Params, shown
from jaxmix.weights import names
from jaxmix.weights.fp8 import scaled
from jaxmix.weights.safetensors import FileEntry, SafetensorsFile, encode_header, widened
from jaxmix.weights.single_file_configs import read_configs, scheduler_config, untold
from jaxmix.weights.single_file_extras import EXTRAS_FILE, Extras, read_entry, save_extras
from jaxmix.weights.single_file_kinds import Shapes, family_of
from jaxmix.weights.single_file_names import TEXTS, TITLES, UNET, VAE, Link, Table, canonical, tables, text_prefixes
from jaxmix.weights.source import Source
from jaxmix.weights.store import _replacing as replacing

__all__ = [
    "CLIP_TOKENIZER",
    "EXTRAS_FILE",
    "Extras",
    "SingleFile",
    "family_of_configs",
    "open_single_file",
    "save_extras",
    "save_single_file",
]

CLIP_TOKENIZER = Path(__file__).parents[1] / "assets" / "clip_tokenizer"
"""The folder of CLIP's tokenizer, which single files lack."""

PAD_TOKENS = {
    "sd1": {"tokenizer": "<|endoftext|>"},
    "sd2": {"tokenizer": "!"},
    "sdxl": {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
}
"""What each tokenizer of a family pads prompts with: the `pad_token` for `CLIP_TOKENIZER`."""

V_PREDICTION_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"  # empty tensors that serve as flags in community files

MODELSPEC = "modelspec.prediction_type"

# Stable Diffusion 2 is one architecture with two prediction types. The published v-prediction weights and their
# fine-tunes spread more in this tensor than the epsilon weights do; ComfyUI tells them apart in the same way.
_V_SPREAD = 0.09
_OUTPUTS = UNET + "output_blocks."
_BUFFERS = (".position_ids",)
_VAE_PARTS = tuple(VAE + name for name in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))


class PartSource(Source):
    """One part of a single file under the names of diffusers and transformers."""

    def __init__(
        self,
        where: str,
        part: str,
        entries: Mapping[str, FileEntry],
        transposed: Collection[str] = (),
        scales: Mapping[str, FileEntry] | None = None,
    ):
        self.where = where
        self.part = part
        self._stored = entries
        self._transposed = transposed
        self._scales = scales or {}
        self._entries = widened(entries, self._scales)

    @property
    def entries(self) -> Mapping[str, FileEntry]:
        return self._entries

    def read(self, key: str) -> np.ndarray:
        entry = self._stored[key]
        turned = key in self._transposed
        array = read_entry(self.where, dataclasses.replace(entry, shape=entry.shape[::-1]) if turned else entry)
        if key in self._scales:
            array = scaled(array, read_entry(self.where, self._scales[key]))
        return np.ascontiguousarray(array.T) if turned else array

    def origin(self, key: str) -> str:
        return f"{self.where} ({self.part})"  # the key is not one of the file's


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """An open single-file checkpoint: what it is, and where its tensors are.

    `configs` and `sources` are by part ("unet", "vae", "text_encoder", and "text_encoder_2" for SDXL), `pad_tokens` by
    tokenizer. `scheduler` is a `scheduler_config.json`.
    """

    path: Path
    family: str
    configs: dict[str, dict[str, Any]]
    sources: dict[str, Source]
    scheduler: dict[str, Any]
    extras: Extras
    pad_tokens: dict[str, str]


def open_single_file(
    path: str | os.PathLike[str],
    config: Mapping[str, Mapping[str, Any]] | None = None,
    prediction_type: str | None = None,
    vae: bool = True,
    notes: list[str] | None = None,
) -> SingleFile:
    """Open a checkpoint in the original layout; no tensor is read except, for 2.x, one that tells its prediction type.

    `config` overrides settings by part ("unet", ..., "scheduler"), for what shapes cannot tell: numbers of heads and of
    norm groups. `prediction_type` ("epsilon" or "v_prediction") overrides what the keys `v_pred` and `ztsnr` say (the
    latter also rescales the schedule to zero terminal signal), then what the metadata's `modelspec.prediction_type`
    says, which is added to `notes`, and otherwise the family's: epsilon for 1.x and SDXL, and for 2.x what a tensor of
    its UNet suggests. Without `vae` the file's autoencoder is left alone, and may be missing.
    Raises InputError with one line that says what the file is if it is anything else or incomplete.
    """
    path = Path(path)
    where, overrides = str(path), config or {}
    file = SafetensorsFile(path)
    shapes = {key: entry.shape for key, entry in file.stored.items()}
    family = family_of(where, shapes, vae)
    parts = ("unet", "vae", *TEXTS[family], "scheduler")
    if unknown := set(overrides) - set(parts):
        raise InputError(f"{where}: config has {', '.join(sorted(unknown))}, expected {', '.join(parts)}")

    told = told_by_metadata(file.metadata, shapes, [] if notes is None or prediction_type else notes)
    prediction = prediction_type or told or _prediction_type(family, shapes, file.read)
    configs = read_configs(where, family, shapes, prediction, vae)
    configs = {part: told | dict(overrides.get(part, {})) for part, told in configs.items()}
    scheduler = scheduler_config(family, prediction, ZERO_SNR_KEY in shapes) | dict(overrides.get("scheduler", {}))

    prefixes = {part: prefix for part, prefix in text_prefixes(family, shapes).items() if prefix}
    by_part = tables(family, configs, prefixes)
    entries: dict[str, dict[str, FileEntry]] = {part: {} for part in by_part}
    scales: dict[str, dict[str, FileEntry]] = {part: {} for part in by_part}
    transposed: dict[str, set[str]] = {part: set() for part in by_part}
    rest, unusual = {}, {}
    for key, entry in file.stored.items():
        part, link = _find(by_part, key)
        if part is None or link is None:
            rest[key] = entry
            continue
        entries[part] |= linked(link, entry)
        scales[part] |= linked_scale(link, file.scales.get(key))
        if link.how == "transposed":
            transposed[part] |= set(link.ours)
        if link.how == "pointwise" and len(entry.shape) != 4:
            unusual[key] = list(entry.shape)
    strange = [key for key in rest if key.startswith((UNET, *(_VAE_PARTS if vae else ())))]
    if strange:
        raise InputError(
            f"{where}: {len(strange)} tensors of its UNet or VAE are in no {TITLES[family]} model, such as {strange[0]}"
        )

    layout: dict[str, Any] = {}
    if unusual_prefixes := {p: prefix for p, prefix in prefixes.items() if prefix != TEXTS[family][p][0]}:
        layout["prefixes"] = unusual_prefixes
    if unusual:
        layout["shapes"] = unusual
    return SingleFile(
        path=path,
        family=family,
        configs=configs,
        sources={part: PartSource(where, part, entries[part], transposed[part], scales[part]) for part in by_part},
        scheduler=scheduler,
        extras=Extras(path, family, rest, layout),
        pad_tokens=dict(PAD_TOKENS[family]),
    )


def told_by_metadata(metadata: Mapping[str, str], shapes: Shapes, notes: list[str]) -> str | None:
    """Return the prediction type of the Stability AI Model Metadata Standard, unless the tensors say one."""
    found = str(metadata.get(MODELSPEC, "")).strip().lower()
    known = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    if not found or V_PREDICTION_KEY in shapes:
        return None
    if found not in known:
        notes.append(f"{MODELSPEC} is {shown(found)} in its metadata, expected epsilon or v: ignored")
        return None
    notes.append(f"prediction_type {known[found]}, as its metadata says ({MODELSPEC})")
    return known[found]


def _find(by_part: Mapping[str, Table], key: str) -> tuple[str | None, Link | None]:
    """Return the part that a file's tensor belongs to, and its names."""
    if not key.endswith(_BUFFERS):
        for part, table in by_part.items():
            if (link := table.of_file(key)) is not None:
                return part, link
    return None, None


def linked(link: Link, entry: FileEntry) -> dict[str, FileEntry]:
    """Return those of our tensors that one tensor of the file holds, with their places in the file."""
    shape = entry.shape
    if link.how == "transposed":
        shape = shape[::-1]
    elif link.how == "pointwise" and all(n == 1 for n in shape[2:]):
        shape = shape[:2]
    elif link.how == "thirds" and shape and shape[0] % 3 == 0:
        shape = (shape[0] // 3, *shape[1:])
        step = FileEntry(entry.dtype, shape, 0).nbytes
        return {key: FileEntry(entry.dtype, shape, entry.offset + i * step) for i, key in enumerate(link.ours)}
    return {key: FileEntry(entry.dtype, shape, entry.offset) for key in link.ours}


def linked_scale(link: Link, scale: FileEntry | None) -> dict[str, FileEntry]:
    """Return the scales of those of our tensors that one scaled tensor of the file holds."""
    if scale is None:
        return {}
    # One number goes with all of them, one per row with its rows.
    return linked(link, scale) if math.prod(scale.shape) > 1 else dict.fromkeys(link.ours, scale)


def save_single_file(
    path: str | os.PathLike[str],
    family: str,
    configs: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Params],
    extras: Extras | None = None,
    dtype: Any = None,
) -> None:
    """Write the parts of a pipeline as one file in the original layout of its family ("sd1", "sd2" or "sdxl").

    `configs` and `params` are by part; `configs["scheduler"]`, if given, decides whether `v_pred` and `ztsnr` are
    written. `extras` are copied as they are; with those of the pipeline's own file, every tensor of that file is
    written again. `dtype` casts the floating-point parameters. Host memory holds one tensor at a time, and the file
    appears whole or not at all.
    Raises InputError if the file could not be read back as this model (because of settings that no tensor shows and no
    published model of the family has).
    """
    if family not in TEXTS:
        raise InputError(f"{path}: family {family!r} has no single-file layout, expected {', '.join(TEXTS)}")
    if extras is not None and extras.family != family:
        raise InputError(f"{extras.path}: its tensors are of a {TITLES[extras.family]} file, expected {TITLES[family]}")
    layout = extras.layout if extras else {}
    by_part = tables(family, configs, layout.get("prefixes"))
    held: dict[str, _Held] = {}
    for part, table in by_part.items():
        for leaf_path, leaf in names.flatten(params[part]):
            ours = canonical(part, names.to_torch_key(leaf_path))
            link = table.of_ours(ours)
            if link is None:
                raise ValueError(f"{part}: {ours} has no name in the single-file layout of {TITLES[family]}")
            held.setdefault(link.key, _Held(link, {})).leaves[ours] = leaf_path, leaf

    entries: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for key, tensor in held.items():
        if missing := set(tensor.link.ours) - set(tensor.leaves):
            raise ValueError(f"{key}: the parameters have no {', '.join(sorted(missing))}")
        shape = tuple(layout.get("shapes", {}).get(key, tensor.shape))
        entries[key] = tensor.dtype(dtype), shape if math.prod(shape) == math.prod(tensor.shape) else tensor.shape
    copied = extras.reopen() if extras else {}
    for key, entry in copied.items():
        entries.setdefault(key, (entry.dtype, entry.shape))

    shapes = {key: shape for key, (_, shape) in entries.items()}
    if "scheduler" in configs:
        for key in _marks(configs["scheduler"], _prediction_type(family, shapes, lambda key: held[key].array())):
            shapes[key] = (0,)
            entries.setdefault(key, (np.dtype(np.float32), (0,)))
    if extras is None:  # a file opened with its user's overrides can be written back as it was
        told = _prediction_type(family, shapes, lambda key: held[key].array())
        _check_told(str(path), family, configs, shapes, told)

    # Wider dtypes first keeps every tensor aligned to its own item size.
    order = sorted(entries, key=lambda key: (-entries[key][0].itemsize, key))
    with replacing(Path(path)) as file:
        file.write(encode_header({key: entries[key] for key in order}, {"format": "pt"}))
        for key in order:
            kind, shape = entries[key]
            if key in held:
                array = np.ascontiguousarray(held[key].array().astype(kind, copy=False))
            else:
                array = read_entry(str(extras.path), copied[key]) if extras and key in copied else np.empty(shape, kind)
            file.write(array.reshape(-1).view(np.uint8).data)


def family_of_configs(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the family in whose layout a pipeline with these configs is written, decided by its text encoders."""
    if "text_encoder_2" in configs:
        return "sdxl"
    return "sd2" if configs["text_encoder"].get("hidden_act") == "gelu" else "sd1"


class _Held(NamedTuple):
    """A tensor of the file to be written, and the leaves that it is made of, by our names."""

    link: Link
    leaves: dict[str, tuple[names.Path, Any]]

    def dtype(self, wanted: Any) -> np.dtype:
        stored = np.dtype(self.leaves[self.link.ours[0]][1].dtype)
        return np.dtype(wanted) if wanted is not None and jnp.issubdtype(stored, jnp.floating) else stored

    @property
    def shape(self) -> tuple[int, ...]:
        leaf_path, leaf = self.leaves[self.link.ours[0]]
        shape = names.to_torch_shape(leaf_path, tuple(leaf.shape))
        match self.link.how:
            case "pointwise":
                return (*shape, 1, 1)
            case "thirds":
                return (3 * shape[0], *shape[1:])
            case "transposed":
                return shape[::-1]
        return shape

    def array(self) -> np.ndarray:
        """Return the values in the file's order; a pointwise tensor still lacks its axes of length one."""
        leaves = (self.leaves[ours] for ours in self.link.ours)
        arrays = [names.to_torch_layout(leaf_path, np.asarray(jax.device_get(leaf))) for leaf_path, leaf in leaves]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return array.T if self.link.how == "transposed" else array


def _marks(scheduler: Mapping[str, Any], told: str) -> list[str]:
    """Return the empty tensors that say about a noise schedule what the others, which tell `told`, do not."""
    marks = [ZERO_SNR_KEY] if scheduler.get("rescale_betas_zero_snr") else []
    if scheduler.get("prediction_type") == "v_prediction" != told:
        marks.append(V_PREDICTION_KEY)
    return marks


def _check_told(
    where: str, family: str, configs: Mapping[str, Mapping[str, Any]], shapes: Shapes, prediction: str
) -> None:
    """Raise InputError if a file of these shapes and this prediction type would be opened as another model."""
    family_of(where, shapes)
    told = read_configs(where, family, shapes, prediction)
    if "scheduler" in configs:
        told["scheduler"] = scheduler_config(family, prediction, ZERO_SNR_KEY in shapes)
    if found := untold(configs, told):
        raise InputError(f"{where}: a single file cannot say {', '.join(found)}; save a folder instead")


def _prediction_type(family: str, shapes: Shapes, read: Callable[[str], np.ndarray]) -> str:
    """Return the prediction type that the tensors tell; `read` gives one of them."""
    if V_PREDICTION_KEY in shapes:
        return "v_prediction"
    key = _spread_key(shapes)
    # The inpainting models of the family predict epsilon.
    if family != "sd2" or key not in shapes or shapes[f"{UNET}input_blocks.0.0.weight"][1:2] != (4,):
        return "epsilon"
    return "v_prediction" if np.std(read(key).astype(np.float64)) > _V_SPREAD else "epsilon"


def _spread_key(shapes: Shapes) -> str:
    last = max((int(key[len(_OUTPUTS) :].split(".")[0]) for key in shapes if key.startswith(_OUTPUTS)), default=0)
    return f"{_OUTPUTS}{last}.1.transformer_blocks.0.norm1.bias"
