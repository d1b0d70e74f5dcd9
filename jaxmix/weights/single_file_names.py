"""The names of single-file checkpoints (the original latent diffusion layout) and those of diffusers, both ways.

Names of modules depend on how many blocks and layers a model has, so the table of a UNet or VAE is built from its
config; one table serves reading and writing. Every tensor of a file is one of ours, except the fused q, k and v of
OpenCLIP, which are three.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT_MODEL = "text_model."

TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL"}
TEXTS: dict[str, dict[str, tuple[str, ...]]] = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")},
    "sd2": {"text_encoder": ("cond_stage_model.model.", "conditioner.embedders.0.model.")},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer."),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    },
}
"""The prefixes that the text encoders of each family may have, the usual one first."""

How = Literal["same", "pointwise", "thirds", "transposed"]


class Link(NamedTuple):
    """One tensor of a file and those of ours that it holds.

    "pointwise": (c, c, 1, 1) there, (c, c) here. "thirds": three of ours, one after the other along the first axis.
    "transposed": (b, a) there, (a, b) here.
    """

    key: str
    ours: tuple[str, ...]
    how: How = "same"


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_EMBEDDING = {False: "embeddings.token_embedding.weight", True: "token_embedding.weight"}
_VAE_POINTWISE = re.compile(r"mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")


class Table:
    """The modules of one part under both names; names inside a listed module are the same."""

    def __init__(self, prefix: str, modules: Mapping[str, str]):
        self.prefix = prefix
        self.modules = dict(modules)
        self.inverse = {ours: theirs for theirs, ours in self.modules.items()}

    def of_file(self, key: str) -> Link | None:
        """Return the link of a file's key, or None if the part has no such module."""
        ours = _replace(key.removeprefix(self.prefix), self.modules) if key.startswith(self.prefix) else None
        return None if ours is None else self._link(key, ours)

    def of_ours(self, key: str) -> Link | None:
        """Return the link that holds our key, or None if the file has no such module."""
        theirs = _replace(key, self.inverse)
        return None if theirs is None else self._link(self.prefix + theirs, key)

    def _link(self, key: str, ours: str) -> Link:
        return Link(key, (ours,), "pointwise" if _VAE_POINTWISE.search(ours) else "same")


class ClipTable(Table):
    """transformers' own names. The prefix includes `text_model.` if the file has it; our names always do."""

    def __init__(self, prefix: str):
        super().__init__(
            prefix, {name: TEXT_MODEL + name for name in ("embeddings", "encoder.layers", "final_layer_norm")}
        )


class OpenClipTable(Table):
    """OpenCLIP's text transformer. `layers` is how many of them are used: a file may hold one that is not."""

    def __init__(self, prefix: str, layers: int, projection: bool):
        modules = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
        for i in range(layers):
            for theirs, ours in OPEN_CLIP_LAYER.items():
                modules[f"transformer.resblocks.{i}.{theirs}"] = f"encoder.layers.{i}.{ours}"
        super().__init__(prefix, {theirs: TEXT_MODEL + ours for theirs, ours in modules.items()})
        links = [Link(prefix + "positional_embedding", (TEXT_MODEL + "embeddings.position_embedding.weight",))]
        if projection:
            links.append(Link(prefix + "text_projection", ("text_projection.weight",), "transposed"))
        for i in range(layers):
            for leaf in ("weight", "bias"):
                ours = tuple(f"{TEXT_MODEL}encoder.layers.{i}.self_attn.{x}_proj.{leaf}" for x in "qkv")
                links.append(Link(f"{prefix}transformer.resblocks.{i}.attn.in_proj_{leaf}", ours, "thirds"))
        # These are not modules: each has a name, a layout or a number of tensors of its own.
        self.by_key = {link.key: link for link in links}
        self.by_ours = {key: link for link in links for key in link.ours}

    def of_file(self, key: str) -> Link | None:
        return self.by_key.get(key) or super().of_file(key)

    def of_ours(self, key: str) -> Link | None:
        return self.by_ours.get(key) or super().of_ours(key)


def unet_table(config: Mapping[str, Any]) -> Table:
    """Return the table of a UNet with this diffusers config (only block types and layers matter)."""
    blocks, layers = len(config["block_out_channels"]), int(config["layers_per_block"])
    modules = _down_modules(blocks, layers, config["down_block_types"])
    modules |= {"out.0": "conv_norm_out", "out.2": "conv_out"}
    for b in range(blocks):
        attention = config["up_block_types"][b].startswith("CrossAttn")
        for j in range(layers + 1):
            theirs, ours = f"output_blocks.{b * (layers + 1) + j}", f"up_blocks.{b}"
            modules |= _inside(f"{theirs}.0", f"{ours}.resnets.{j}", _RESNET)
            if attention:
                modules[f"{theirs}.1"] = f"{ours}.attentions.{j}"
        if b < blocks - 1:
            # Inside the block's last entry, after the attention if there is one.
            last = f"output_blocks.{b * (layers + 1) + layers}.{2 if attention else 1}"
            modules[f"{last}.conv"] = f"up_blocks.{b}.upsamplers.0.conv"
    return Table(UNET, modules)


def controlnet_table(prefix: str, blocks: int, layers: int, hints: int) -> Table:
    """Return the table of a ControlNet with so many blocks, layers in each, and convolutions of its picture.

    Which of the blocks have attention need not be known: a file has no tensors where they have none.
    """
    modules = _down_modules(blocks, layers, ["CrossAttnDownBlock2D"] * blocks)
    modules |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(blocks * (layers + 1))}
    modules["middle_block_out.0"] = "controlnet_mid_block"
    names = ["conv_in", *(f"blocks.{i}" for i in range(hints - 2)), "conv_out"]
    modules |= {f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{name}" for i, name in enumerate(names)}
    return Table(prefix, modules)


def vae_table(config: Mapping[str, Any]) -> Table:
    """Return the table of an autoencoder with this diffusers config. The file counts `up` from the finest level."""
    blocks, layers = len(config["block_out_channels"]), int(config["layers_per_block"])
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for i in (0, 1):
            modules |= _inside(f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}", _VAE_RESNET)
        modules |= _inside(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION)
    for b in range(blocks):
        down, up = f"encoder.down_blocks.{b}", f"decoder.up_blocks.{b}"
        their_down, their_up = f"encoder.down.{b}", f"decoder.up.{blocks - 1 - b}"
        for j in range(layers):
            modules |= _inside(f"{their_down}.block.{j}", f"{down}.resnets.{j}", _VAE_RESNET)
        for j in range(layers + 1):
            modules |= _inside(f"{their_up}.block.{j}", f"{up}.resnets.{j}", _VAE_RESNET)
        if b < blocks - 1:
            modules[f"{their_down}.downsample.conv"] = f"{down}.downsamplers.0.conv"
            modules[f"{their_up}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return Table(VAE, modules)


def tables(
    family: str, configs: Mapping[str, Mapping[str, Any]], prefixes: Mapping[str, str] | None = None
) -> dict[str, Table]:
    """Return the table of every part of a family. `prefixes` are those of the text encoders, if not the usual ones."""
    found = {"unet": unet_table(configs["unet"]), "vae": vae_table(configs["vae"])}
    for part, usual in TEXTS[family].items():
        prefix = (prefixes or {}).get(part, usual[0])
        if is_open_clip(family, part):
            layers = int(configs[part]["num_hidden_layers"])
            found[part] = OpenClipTable(prefix, layers, projection=part == "text_encoder_2")
        else:
            found[part] = ClipTable(prefix)
    return found


def is_open_clip(family: str, part: str) -> bool:
    """Return whether a text encoder is OpenCLIP's: that of Stable Diffusion 2 and the second of SDXL."""
    return family == "sd2" or part == "text_encoder_2"


def text_prefixes(family: str, keys: Collection[str]) -> dict[str, str | None]:
    """Return the prefix of each text encoder of a family in a file, None for one that is missing."""
    return {
        part: next((prefix for prefix in prefixes if prefix + _EMBEDDING[is_open_clip(family, part)] in keys), None)
        for part, prefixes in TEXTS[family].items()
    }


def canonical(part: str, key: str) -> str:
    """Return our name of a text encoder's tensor, with the `text_model.` that transformers 5 leaves out."""
    if part.startswith("text_encoder") and not key.startswith((TEXT_MODEL, "text_projection.")):
        return TEXT_MODEL + key
    return key


def _down_modules(blocks: int, layers: int, types: Sequence[str]) -> dict[str, str]:
    """Return the modules of a UNet's way down, with its embeddings of time and of added conditioning."""
    modules = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        **_inside("middle_block.0", "mid_block.resnets.0", _RESNET),
        **_inside("middle_block.2", "mid_block.resnets.1", _RESNET),
    }
    # The file counts what is between two skip connections: a layer, or the change of size after a block's layers.
    for b in range(blocks):
        attention = types[b].startswith("CrossAttn")
        for j in range(layers):
            theirs, ours = f"input_blocks.{1 + b * (layers + 1) + j}", f"down_blocks.{b}"
            modules |= _inside(f"{theirs}.0", f"{ours}.resnets.{j}", _RESNET)
            if attention:
                modules[f"{theirs}.1"] = f"{ours}.attentions.{j}"
        if b < blocks - 1:
            modules[f"input_blocks.{(b + 1) * (layers + 1)}.0.op"] = f"down_blocks.{b}.downsamplers.0.conv"
    return modules


def _inside(theirs: str, ours: str, modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{a}": f"{ours}.{b}" for a, b in modules.items()}


def _replace(key: str, modules: Mapping[str, str]) -> str | None:
    """Return `key` with its module (the longest one listed) under the other name."""
    end = key.rfind(".")
    while end > 0:
        if (other := modules.get(key[:end])) is not None:
            return other + key[end:]
        end = key.rfind(".", 0, end)
    return None
