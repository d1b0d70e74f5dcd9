"""ControlNets on disk: diffusers' folders and files, and the authors' layout, alone or inside a whole checkpoint.

A file holds no config. It is told from the shapes; what they do not show is that of the base if there is one (a net is
a copy of it), and else that of the released models of its family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmix.released import RELEASED
from jaxmix.types import InputError, Params, shown
from jaxmix.weights.files import exists, preferred
from jaxmix.weights.load import flat_pickle_error, open_source, read_config
from jaxmix.weights.safetensors import FileEntry, SafetensorsFile
from jaxmix.weights.single_file import PartSource, linked, linked_scale
from jaxmix.weights.single_file_configs import heads_of, indices
from jaxmix.weights.single_file_kinds import CONTROLNET, Shapes, kind_of
from jaxmix.weights.single_file_names import UNET, VAE, controlnet_table
from jaxmix.weights.source import Source
from jaxmix.weights.store import save_tree, write_config

_INNER = "control_model."  # where the authors' files have the net, beside the model that it was trained with
_BESIDE = (UNET, VAE, "cond_stage_model.", "conditioner.", "model_ema.")
_ENCODER = "controlnet_cond_embedding"
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_EXPECTED = f"expected {CONTROLNET} of Stable Diffusion 1.x, 2.x or SDXL"
# What the config.json of a folder calls networks that are no ControlNet in this sense.
_CLASSES = {
    "ControlNetUnionModel": "a ControlNet-Union",
    "ControlNetXSAdapter": "a ControlNet-XS",
    "ControlNetXSModel": "a ControlNet-XS",
    "UNetControlNetXSModel": "a ControlNet-XS",
    "T2IAdapter": "a T2I-Adapter",
    "MultiAdapter": "several T2I-Adapters",
    "SparseControlNetModel": "a SparseCtrl of AnimateDiff",
}
_OF_BASE = (
    "attention_head_dim",
    "num_attention_heads",
    "norm_num_groups",
    "norm_eps",
    "flip_sin_to_cos",
    "freq_shift",
    "addition_time_embed_dim",
)


def open_controlnet(path: Path, base: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Source]:
    """Return the config and the tensors of a ControlNet, under diffusers' names.

    ``path`` is diffusers' folder (or one that has it as ``controlnet``), or a safetensors file in its layout or in the
    authors'. ``base`` is the config of the UNet that the net is for. Raises InputError for a pickle, with the command
    that converts it, for a network of another kind, by its keys and by its name, and for a damaged file.
    """
    if not exists(path):
        raise InputError(f"{path}: found no such file or folder, {_EXPECTED}")
    if path.is_dir():
        return _open_folder(path / "controlnet" if (path / "controlnet").is_dir() else path)
    if path.suffix.lower() in _PICKLES:
        raise flat_pickle_error(path, "controlnet.safetensors")
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path}: found {path.suffix or 'no ending'!r}, {_EXPECTED} as .safetensors")
    file = SafetensorsFile(path)
    _check_kind(file, {key: entry.shape for key, entry in file.stored.items()})
    found = file if "controlnet_mid_block.weight" in file.stored else _of_authors(file)
    return told_config(str(path), {key: entry.shape for key, entry in found.entries.items()}, base), found


def write_controlnet(folder: Path, config: Mapping[str, Any], params: Params, dtype: Any = None) -> None:
    """Write diffusers' folder, config.json and diffusion_pytorch_model.safetensors; ``dtype`` casts the weights.

    Raises InputError for the name of a file.
    """
    if folder.is_file() or folder.suffix.lower() == ".safetensors":
        raise InputError(f"{folder}: found the name of a file, expected that of a folder for {CONTROLNET}")
    save_tree(params, folder / "diffusion_pytorch_model.safetensors", dtype)
    write_config(config, folder / "config.json")


def _open_folder(folder: Path) -> tuple[dict[str, Any], Source]:
    config = read_config(folder / "config.json")
    named = config.get("_class_name")
    if named not in (None, "ControlNetModel", "FlaxControlNetModel"):
        kind = _CLASSES.get(named) if isinstance(named, str) else None
        what = f"{kind} ({named})" if kind else f"a {shown(named).strip(chr(39))}"
        raise InputError(f"{folder}: this is {what} by its config.json, {_EXPECTED} (ControlNetModel)")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    pickles = [path for path in files if path.suffix.lower() in _PICKLES]
    if preferred(path.name for path in files) is None and pickles:
        raise flat_pickle_error(pickles[0], "controlnet.safetensors")
    source = open_source(folder)
    _check_kind(source, {key: entry.shape for key, entry in source.entries.items()})
    return config, source


def _check_kind(source: Source, shapes: Shapes) -> None:
    kind = kind_of(shapes)
    if not kind.startswith(f"{CONTROLNET} ("):
        raise InputError(f"{source.where}: this is {kind}, {_EXPECTED}")


def _of_authors(file: SafetensorsFile) -> Source:
    """Return a net in the authors' layout under diffusers' names; the model that it was trained with is left out."""
    prefix = _INNER if any(key.startswith(_INNER) for key in file.stored) else ""
    inputs = indices(file.stored, f"{prefix}input_blocks.")
    downs = [i for i in inputs if f"{prefix}input_blocks.{i}.0.op.weight" in file.stored]
    layers, blocks = (downs[0] if downs else len(inputs)) - 1, len(downs) + 1
    hints = len(indices(file.stored, f"{prefix}input_hint_block."))
    if layers < 1 or inputs != list(range(blocks * (layers + 1))) or hints < 2:
        raise InputError(
            f"{file.where}: {CONTROLNET} with {len(inputs)} input blocks, downsampling at {downs}, and {hints} "
            "convolutions of its picture, expected as many layers in every block and all of its tensors"
        )
    table = controlnet_table(prefix, blocks, layers, hints)
    entries: dict[str, FileEntry] = {}
    scales: dict[str, FileEntry] = {}
    for key, entry in file.stored.items():
        if not key.startswith(prefix) or (not prefix and key.startswith(_BESIDE)):
            continue
        if (link := table.of_file(key)) is not None:
            entries |= linked(link, entry)
            scales |= linked_scale(link, file.scales.get(key))
        else:
            entries[key] = entry  # named by whoever compares the tensors with those of the model
    return PartSource(file.where, "ControlNet", entries, (), scales)


def told_config(where: str, shapes: Shapes, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the config that the shapes of a net's tensors tell, under diffusers' names; see `open_controlnet`."""

    def shape(key: str, *axes: int) -> tuple[int, ...]:
        if len(found := shapes.get(key, ())) not in axes:
            what = f"shape {list(found)} for" if key in shapes else "no tensor"
            raise InputError(f"{where}: found {what} {key}, expected all tensors of {CONTROLNET}")
        return found

    blocks, layers = len(indices(shapes, "down_blocks.")), len(indices(shapes, "down_blocks.0.resnets."))
    channels = [shape(f"down_blocks.{b}.resnets.0.conv1.weight", 4)[0] for b in range(blocks)]
    crossed, depths = [], []
    for b in range(blocks):
        place = f"down_blocks.{b}.attentions."
        crossed.append(any(key.startswith(place) for key in shapes))
        depths.append(len(indices(shapes, f"{place}0.transformer_blocks.")) if crossed[-1] else 1)
    middle = "mid_block.attentions.0."
    in_middle = any(key.startswith(middle) for key in shapes)
    if in_middle and blocks:
        depth = len(indices(shapes, f"{middle}transformer_blocks."))
        if crossed[-1] and depths[-1] != depth:
            raise InputError(
                f"{where}: found {depth} transformer blocks in its middle, expected the {depths[-1]} of its last block"
            )
        depths[-1] = depth
    added = "add_embedding.linear_1.weight" in shapes
    linear = [len(s) == 2 for key, s in shapes.items() if key.endswith(".proj_in.weight")]
    family = "sdxl" if added else "sd2" if any(linear) else "sd1"
    widths = [s[1] for key, s in shapes.items() if key.endswith(".attn2.to_k.weight") and len(s) == 2]
    first = shape(f"{_ENCODER}.conv_in.weight", 4)[0]
    levels = len(indices(shapes, f"{_ENCODER}.blocks.")) // 2
    known = {} if base is None else {key: base[key] for key in _OF_BASE if base.get(key) is not None}
    same = base is not None and list(base["block_out_channels"]) == channels
    released = RELEASED["sdxl"]["unet"]
    config = {
        "_class_name": "ControlNetModel",
        "in_channels": shape("conv_in.weight", 4)[1],
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in crossed],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if in_middle else "UNetMidBlock2D",
        "block_out_channels": channels,
        "layers_per_block": layers,
        "cross_attention_dim": widths[0] if widths else (base or released)["cross_attention_dim"],
        "attention_head_dim": _one(heads_of(family, channels)),
        "transformer_layers_per_block": _one(depths),
        "use_linear_projection": any(linear) if linear else added,
        "norm_num_groups": math.gcd(32, *channels),
        "conditioning_embedding_out_channels": [
            first,
            *(shape(f"{_ENCODER}.blocks.{2 * i + 1}.weight", 4)[0] for i in range(levels)),
        ],
    }
    if added:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": released["addition_time_embed_dim"],
            "projection_class_embeddings_input_dim": shape("add_embedding.linear_1.weight", 2)[1],
        }
    return config | (known if same else {})


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
