"""CLIP image encoders on disk: folders and files of transformers, and the layout of OpenAI and open_clip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmix.types import InputError
from jaxmix.weights.files import exists
from jaxmix.weights.load import open_source, read_config
from jaxmix.weights.safetensors import FileEntry, SafetensorsFile
from jaxmix.weights.single_file import PartSource, linked, linked_scale
from jaxmix.weights.single_file_kinds import Shapes, kind_of
from jaxmix.weights.single_file_names import OPEN_CLIP_LAYER, Link, Table
from jaxmix.weights.source import Source

_MODEL, _PROJECTION = "vision_model.", "visual_projection."
_TEXT = ("text_model.", "text_projection.")
_MARK = "embeddings.class_embedding"
_OPEN_CLIP = ("visual.", "model.visual.", "clip.visual.", "")  # where its tensors may begin
_IGNORED = (".position_ids",)
_HEADS = {1280: 16, 1664: 16}  # of 80 and 104 channels; all others have heads of 64
_QUICK = (768, 1024)  # the widths of OpenAI's encoders, which have the quick GELU


class VisionTable(Table):
    """OpenCLIP's image transformer under its names, and ours."""

    def __init__(self, prefix: str, layers: int):
        """Make the table of an encoder with so many layers."""
        modules = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "conv1": "embeddings.patch_embedding"}
        links = [
            Link(f"{prefix}class_embedding", (f"{_MODEL}{_MARK}",)),
            Link(f"{prefix}positional_embedding", (f"{_MODEL}embeddings.position_embedding.weight",)),
            Link(f"{prefix}proj", (f"{_PROJECTION}weight",), "transposed"),
        ]
        for i in range(layers):
            theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            modules |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in OPEN_CLIP_LAYER.items()}
            for leaf in ("weight", "bias"):
                fused = tuple(f"{_MODEL}{ours}.self_attn.{x}_proj.{leaf}" for x in "qkv")
                links.append(Link(f"{prefix}{theirs}.attn.in_proj_{leaf}", fused, "thirds"))
        super().__init__(prefix, {theirs: _MODEL + ours for theirs, ours in modules.items()})
        self.by_key = {link.key: link for link in links}

    def of_file(self, key: str) -> Link | None:
        return self.by_key.get(key) or super().of_file(key)


def open_image_encoder(path: Path) -> tuple[dict[str, Any], Source]:
    """Return the config and the tensors of a CLIP image encoder, under transformers' names.

    `path` is transformers' folder (or one that has it as `image_encoder`), or a safetensors file in transformers' or
    open_clip's layout, which may be that of a whole CLIP. A file has no config: it is told from the shapes, with heads
    of 64 channels (80 and 104 in ViT-H and bigG) and the quick GELU at the widths of OpenAI's encoders. Raises
    InputError for anything else.
    """
    if not exists(path):
        raise InputError(f"{path}: found no such file or folder, expected a CLIP image encoder")
    if path.is_dir():
        folder = path / "image_encoder" if (path / "image_encoder").is_dir() else path
        config = read_config(folder / "config.json")
        source = open_source(folder)
        return config, _of_transformers(source, {k: e.shape for k, e in source.entries.items()}) or source
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path}: found {path.suffix or 'no ending'!r}, expected a CLIP image encoder as .safetensors")
    file = SafetensorsFile(path)
    shapes = {key: entry.shape for key, entry in file.stored.items()}
    found = _of_transformers(file, shapes) or _of_open_clip(file, shapes)
    if found is None:
        raise InputError(f"{path}: this is {kind_of(shapes)}, expected a CLIP image encoder")
    return _config(str(path), {key: entry.shape for key, entry in found.entries.items()}), found


def open_text_tower(folder: Path) -> tuple[dict[str, Any], Source] | None:
    """Return the config and the tensors of the text encoder in a folder of a whole CLIP; None if there is none."""
    config = read_config(folder / "config.json")
    inner = config.get("text_config")
    source = open_source(folder)
    names = {key: key for key in source.entries if key.startswith(_TEXT) and not key.endswith(_IGNORED)}
    if not isinstance(inner, Mapping) or not names:
        return None
    width = config.get("projection_dim", inner.get("projection_dim"))
    return {**inner, "projection_dim": width, "architectures": ["CLIPTextModelWithProjection"]}, _Renamed(source, names)


def open_inner_encoder(file: SafetensorsFile, prefix: str) -> tuple[dict[str, Any], Source]:
    """Return the config and the tensors of an image encoder in open_clip's layout inside another file.

    Raises InputError if there is none whose keys begin with ``prefix``.
    """
    found = _of_open_clip(file, {key: entry.shape for key, entry in file.stored.items()}, (prefix,))
    if found is None:
        raise InputError(f"{file.where}: found no {prefix}*, expected a CLIP image encoder in open_clip's layout there")
    return _config(file.where, {key: entry.shape for key, entry in found.entries.items()}), found


class _Renamed(Source):
    """Some tensors of a source under other names."""

    def __init__(self, source: Source, names: Mapping[str, str]):
        self.where, self._source, self._names = source.where, source, names
        held = source.entries
        self._entries = {ours: held[theirs] for ours, theirs in names.items()}

    @property
    def entries(self) -> Mapping[str, Any]:
        return self._entries

    def read(self, key: str) -> Any:
        return self._source.read(self._names[key])

    def origin(self, key: str) -> str:
        return self._source.origin(self._names[key])


def _of_transformers(source: Source, shapes: Shapes) -> Source | None:
    """Return the vision tower alone; without its prefix, as transformers 5 writes the model without projection."""
    prefix = next((prefix for prefix in (_MODEL, "") if prefix + _MARK in shapes), None)
    if prefix is None:
        return None
    kept = [key for key in shapes if not key.endswith(_IGNORED)]
    inside = {_MODEL + key.removeprefix(_MODEL): key for key in kept if key.startswith(prefix or ("embed", "enc", "p"))}
    return _Renamed(source, inside | {key: key for key in kept if key.startswith(_PROJECTION)})


def _of_open_clip(file: SafetensorsFile, shapes: Shapes, prefixes: Sequence[str] = _OPEN_CLIP) -> Source | None:
    prefix = next((prefix for prefix in prefixes if f"{prefix}conv1.weight" in shapes), None)
    if prefix is None or f"{prefix}ln_pre.weight" not in shapes:
        return None
    table = VisionTable(prefix, _layers(shapes, f"{prefix}transformer.resblocks."))
    entries: dict[str, FileEntry] = {}
    scales: dict[str, FileEntry] = {}
    transposed = set()
    for key, entry in file.stored.items():
        if (link := table.of_file(key)) is not None:
            entries |= linked(link, entry)
            scales |= linked_scale(link, file.scales.get(key))
            transposed |= set(link.ours) if link.how == "transposed" else set()
    return PartSource(file.where, "image encoder", entries, transposed, scales)


def _layers(shapes: Shapes, prefix: str) -> int:
    found = {key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)}
    return len([name for name in found if name.isdecimal()])


def _config(where: str, shapes: Shapes) -> dict[str, Any]:
    try:
        patch, size = shapes[f"{_MODEL}embeddings.patch_embedding.weight"][-1], shapes[f"{_MODEL}{_MARK}"][0]
        places = shapes[f"{_MODEL}embeddings.position_embedding.weight"][0]
        hidden = shapes[f"{_MODEL}encoder.layers.0.mlp.fc1.weight"][0]
        projection = shapes.get(f"{_PROJECTION}weight", (512,))[0]
    except (KeyError, IndexError) as error:
        raise InputError(f"{where}: a CLIP image encoder without {error}, expected all of its tensors") from None
    return {
        "architectures": ["CLIPVisionModel" + ("WithProjection" if f"{_PROJECTION}weight" in shapes else "")],
        "model_type": "clip_vision_model",
        "hidden_size": size,
        "intermediate_size": hidden,
        "num_hidden_layers": _layers(shapes, f"{_MODEL}encoder.layers."),
        "num_attention_heads": _HEADS.get(size, max(1, size // 64)),
        "image_size": math.isqrt(max(places - 1, 0)) * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu" if size in _QUICK else "gelu",
        "projection_dim": projection,
    }
