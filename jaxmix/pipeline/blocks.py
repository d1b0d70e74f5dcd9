"""Which cross-attentions listen to an image prompt: presets, patterns, and diffusers' dictionaries of scales."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmix.models.unet import sites
from jaxmix.pipeline.parts import Parts
from jaxmix.types import InputError, shown
from jaxmix.weights.embedding_files import PLUS

Blocks = str | Mapping[str, Any] | None
"""Which cross-attentions listen: None for all, a preset, a pattern of names, or diffusers' dictionary of scales."""

PRESETS = {
    "style": (r"^up_blocks\.0\.attentions\.1\.", r"^up_blocks\.1\.", r"^up_blocks\.2\.attentions\.0\."),
    "layout": (
        r"^down_blocks\.2\.attentions\.1\.",
        r"^(down_blocks\.2\.|mid_block\.)",
        r"^up_blocks\.1\.attentions\.1\.",
    ),
}
"""InstantStyle's blocks (arXiv 2404.02733) for SDXL, for Stable Diffusion 1.5 and 2, and, measured here (see
scripts/README.md), for the three levels of the embedded model."""

HALVES = {
    "style": (
        r"^up_blocks\.0\.attentions\.1\.",
        r"^up_blocks\.1\.attentions\.1\.",
        r"^up_blocks\.2\.attentions\.0\.",
    ),
    "content": (
        r"^up_blocks\.0\.attentions\.0\.",
        r"^up_blocks\.1\.attentions\.0\.",
        r"^up_blocks\.1\.attentions\.1\.",
    ),
}
"""B-LoRA's two blocks (arXiv 2403.14572) for SDXL; for Stable Diffusion 1.5 and 2 those in the same place, which nobody
has measured; for the three levels of the embedded model those that the paper's way to look for them finds (see
scripts/README.md)."""


def _family(pipe: Parts) -> int:
    """Return the place of a pipeline's patterns: SDXL, Stable Diffusion 1.5 and 2, or three levels."""
    return 0 if pipe.text_encoder_2 is not None else 2 if len(pipe.unet.config.block_out_channels) == 3 else 1


def halves(pipe: Parts) -> dict[str, str]:
    """Return the patterns of the modules that hold style and content in a B-LoRA that does not say so itself."""
    return {name: patterns[_family(pipe)] for name, patterns in HALVES.items()}


def attn2_names(pipe: Parts) -> list[str]:
    """Return the names of a UNet's cross-attentions in the order of diffusers' processors, the middle block last."""
    found = [s.name for s in sites(pipe.unet.config, pipe.latent_shape[:2]) if s.name.endswith(".attn2")]
    return sorted(found, key=lambda name: name.startswith("mid_block."))  # a stable sort


def layer_names(pipe: Parts) -> dict[str, str]:
    """Return {what P+ calls a layer: name of its attn2} in the order in which they run (arXiv 2303.09522).

    Models without the 16 layers of Stable Diffusion 1 and 2 have the names of attn2 on both sides.
    """
    order = ("down_blocks", "mid_block", "up_blocks")
    names = sorted(attn2_names(pipe), key=lambda name: order.index(name.split(".")[0]))  # a stable sort
    return dict(zip(PLUS if len(names) == len(PLUS) else names, names, strict=True))


def at_sites(pipe: Parts, blocks: Blocks) -> dict[str, float]:
    """Return the share of the scale at every cross-attention that listens.

    Raises `InputError` for a pattern or dictionary that names nothing, with what there is.
    """
    names = attn2_names(pipe)
    if blocks is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(blocks, Mapping):
        return {name: scale for name, scale in _scale_dictionary(blocks, names).items() if scale}
    if not isinstance(blocks, str):
        raise InputError(f"blocks: found {shown(blocks)}, expected a preset, a pattern or a dictionary")
    asked = [part.strip() for part in blocks.split("+")]
    if all(part in PRESETS for part in asked):
        patterns = [PRESETS[part][_family(pipe)] for part in asked]
    else:
        patterns = [blocks]
    try:
        found = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
    except re.error as error:
        raise InputError(f"blocks: {blocks!r} is not a regular expression: {error}") from None
    if not found:
        there = sorted({name.split(".transformer_blocks.")[0] for name in names})
        raise InputError(f"blocks: {blocks!r} names none of {', '.join(there)}, nor {', '.join(PRESETS)}")
    return dict.fromkeys(found, 1.0)


def _scale_dictionary(blocks: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Return the scale of every cross-attention under diffusers' dictionary; what is not named gets 0."""
    made = dict.fromkeys(names, 0.0)

    def put(prefix: str, scale: Any, where: str) -> None:
        mine = [name for name in names if name.startswith(prefix)]
        if not mine:
            raise InputError(f"blocks: {where} has no cross-attention in this model")
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not np.isfinite(scale):
            raise InputError(f"blocks: {where}: found {shown(scale)}, expected a number")
        made.update(dict.fromkeys(mine, float(scale)))

    for half, value in blocks.items():
        if half == "mid":
            put("mid_block.", value, "mid")
        elif half not in ("down", "up"):
            raise InputError(f"blocks: found {shown(half)}, expected down, mid or up")
        elif not isinstance(value, Mapping):
            put(f"{half}_blocks.", value, half)
        else:
            for block, scales in value.items():
                found = re.fullmatch(r"block_(\d+)", str(block))
                if found is None:
                    raise InputError(f"blocks: {half}: found {shown(block)}, expected such as block_1")
                where, prefix = f"{half}.{block}", f"{half}_blocks.{found[1]}."
                if not isinstance(scales, (list, tuple)):
                    put(prefix, scales, where)
                    continue
                there = {name.split(".attentions.")[1].split(".")[0] for name in names if name.startswith(prefix)}
                if len(scales) not in (1, len(there)) or not there:
                    raise InputError(f"blocks: {where}: found {len(scales)} scales, expected {len(there)}")
                for j, scale in enumerate(scales if len(scales) > 1 else list(scales) * len(there)):
                    put(f"{prefix}attentions.{j}.", scale, f"{where}[{j}]")
    return made
