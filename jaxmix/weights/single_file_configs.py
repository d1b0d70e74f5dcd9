"""The diffusers and transformers configs of a single-file checkpoint, told from the shapes of its tensors.

What shapes cannot tell follows the family, as in all its published models: Stable Diffusion 1.x has 8 heads in every
block, 2.x and SDXL (and all text encoders) have heads of 64 channels; group norms have 32 groups; the VAE's scale, the
noise schedule and the activation of the text encoder are the family's. Models of other sizes (channels that 8, 64 or 32
do not divide) get 1 head and the most groups that fit, which can be overridden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmix.released import RELEASED
from jaxmix.types import InputError
from jaxmix.weights.single_file_kinds import Shapes
from jaxmix.weights.single_file_names import UNET, VAE, is_open_clip, text_prefixes

_MODELS = {"sd1": "sd15", "sd2": "sd21_base", "sdxl": "sdxl"}  # for the values that shapes do not tell
_PER_BLOCK = ("attention_head_dim", "transformer_layers_per_block")
_DEFAULTS = {
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "use_linear_projection": False,
    "scaling_factor": 0.18215,
    "layer_norm_eps": 1e-5,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "num_train_timesteps": 1000,
}
# The settings that change what is computed and that shapes do not show.
_COMPUTED = {
    "unet": (
        "attention_head_dim",
        "norm_num_groups",
        "norm_eps",
        "flip_sin_to_cos",
        "freq_shift",
        "addition_time_embed_dim",
    ),
    "vae": ("norm_num_groups", "scaling_factor"),
    "text_encoder": ("num_attention_heads", "hidden_act", "layer_norm_eps", "num_hidden_layers"),
    "text_encoder_2": ("num_attention_heads", "hidden_act", "layer_norm_eps", "num_hidden_layers"),
    "scheduler": (
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    ),
}
_FULL_OPEN_CLIP, _USED_OPEN_CLIP = 24, 23  # Stable Diffusion 2 reads the state before the last layer


def read_configs(
    where: str, family: str, shapes: Shapes, prediction_type: str, vae: bool = True
) -> dict[str, dict[str, Any]]:
    """Return the config of every part; raises InputError for shapes that no supported model has.

    Without `vae` that of the autoencoder is the released one of the family.
    """
    # Only Stable Diffusion 2 has two sizes: v prediction was trained at 768 pixels, epsilon at 512.
    model = "sd21" if family == "sd2" and prediction_type == "v_prediction" else _MODELS[family]
    size = RELEASED[model]["unet"]["sample_size"]
    unet = _unet(where, family, shapes, size)
    decoder = _vae(where, family, shapes) if vae else dict(RELEASED[model]["vae"])
    decoder["sample_size"] = size * 2 ** (len(decoder["block_out_channels"]) - 1)
    configs = {"unet": unet, "vae": decoder}
    for part, prefix in text_prefixes(family, shapes).items():
        if prefix is None:
            raise InputError(f"{where}: no {part}")
        read = _open_clip if is_open_clip(family, part) else _clip
        configs[part] = read(where, prefix, shapes, part)
    if family == "sdxl":
        text = configs["text_encoder_2"]
        total = _shape(where, shapes, f"{UNET}label_emb.0.0.weight")[1]
        numbers, rest = divmod(total - text["projection_dim"], 6)
        if rest or numbers <= 0:
            raise InputError(
                f"{where}: {UNET}label_emb.0.0.weight takes {total} values, expected the {text['projection_dim']} of "
                f"the second text encoder and 6 embedded numbers"
            )
        unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": numbers,
            "projection_class_embeddings_input_dim": total,
        }
    return configs


def scheduler_config(family: str, prediction_type: str, zero_terminal_snr: bool) -> dict[str, Any]:
    """Return the `scheduler_config.json` of a family; all share one noise schedule."""
    config = {**RELEASED[_MODELS[family]]["scheduler"], "prediction_type": prediction_type}
    if zero_terminal_snr:
        # The last timestep, where there is no signal, must be visited (arXiv 2305.08891).
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def untold(given: Mapping[str, Mapping[str, Any]], told: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the settings of a model that a single file would not give back, as "part key=value (a file says ...)"."""
    found = []
    for part, config in told.items():
        for key in _COMPUTED.get(part, ()):
            a, b = _plain(given[part], key), _plain(config, key)
            if a != b:
                found.append(f"{part} {key}={a} (a file says {b})")
    return found


def _plain(config: Mapping[str, Any], key: str) -> Any:
    """Return a setting in one form: a list where one number may stand for all blocks."""
    value = config.get(key)
    if key == "attention_head_dim" and config.get("num_attention_heads") is not None:
        value = config["num_attention_heads"]
    if key in _PER_BLOCK and not isinstance(value, (list, tuple)):
        value = [_DEFAULTS.get(key) if value is None else value] * len(config["block_out_channels"])
    if value is None:
        value = _DEFAULTS.get(key)
    return list(value) if isinstance(value, tuple) else value


def _unet(where: str, family: str, shapes: Shapes, size: int) -> dict[str, Any]:
    inputs, outputs = indices(shapes, f"{UNET}input_blocks."), indices(shapes, f"{UNET}output_blocks.")
    downs = [i for i in inputs if f"{UNET}input_blocks.{i}.0.op.weight" in shapes]
    layers = (downs[0] if downs else len(inputs)) - 1
    levels = len(downs) + 1
    if (
        layers < 1
        or inputs != list(range(levels * (layers + 1)))
        or outputs != inputs
        or downs != [(level + 1) * (layers + 1) for level in range(levels - 1)]
    ):
        raise InputError(
            f"{where}: its UNet has {len(inputs)} input and {len(outputs)} output blocks with downsampling at {downs}, "
            f"expected the same number of layers in every block"
        )

    channels = [
        _shape(where, shapes, f"{UNET}input_blocks.{1 + b * (layers + 1)}.0.out_layers.3.weight")[0]
        for b in range(levels)
    ]
    down = [
        [_depth(shapes, f"input_blocks.{1 + b * (layers + 1) + j}.1.") for j in range(layers)] for b in range(levels)
    ]
    up = [
        [_depth(shapes, f"output_blocks.{b * (layers + 1) + j}.1.") for j in range(layers + 1)] for b in range(levels)
    ]
    middle = _depth(shapes, "middle_block.1.")
    depths = []
    for b in range(levels):
        found = {*down[b], *up[-1 - b]}
        if len({*down[b]}) > 1 or len({*up[-1 - b]}) > 1 or len(found - {0}) > 1:
            raise InputError(
                f"{where}: the layers of its UNet's block {b} have {down[b]} transformer blocks going down and "
                f"{up[-1 - b]} going up, expected one number a block: a pruned model is not supported"
            )
        depths.append(max(found))
    # The middle block has the depth of the last one, unless the last has no attention.
    depths[-1] = depths[-1] or middle
    if not middle or depths[-1] != middle:
        raise InputError(
            f"{where}: its UNet has {middle} transformer blocks in the middle, expected {depths[-1] or 'at least 1'}: "
            f"a pruned model is not supported"
        )
    depths = [depth or 1 for depth in depths]

    conv_in = _shape(where, shapes, f"{UNET}input_blocks.0.0.weight")
    middle_block = f"{UNET}middle_block.1."
    heads = heads_of(family, channels)
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": size,
        "in_channels": conv_in[1],
        "out_channels": _shape(where, shapes, f"{UNET}out.2.weight")[0],
        "down_block_types": ["CrossAttnDownBlock2D" if d[0] else "DownBlock2D" for d in down],
        "up_block_types": ["CrossAttnUpBlock2D" if d[0] else "UpBlock2D" for d in up],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "cross_attention_dim": _shape(where, shapes, f"{middle_block}transformer_blocks.0.attn2.to_k.weight")[1],
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "use_linear_projection": len(_shape(where, shapes, f"{middle_block}proj_in.weight")) == 2,
        "norm_num_groups": math.gcd(32, *channels),
    }


def _vae(where: str, family: str, shapes: Shapes) -> dict[str, Any]:
    levels = len(indices(shapes, f"{VAE}encoder.down."))
    channels = [_shape(where, shapes, f"{VAE}encoder.down.{b}.block.0.conv1.weight")[0] for b in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(where, shapes, f"{VAE}encoder.conv_in.weight")[1],
        "out_channels": _shape(where, shapes, f"{VAE}decoder.conv_out.weight")[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": channels,
        "layers_per_block": len(indices(shapes, f"{VAE}encoder.down.0.block.")),
        "latent_channels": _shape(where, shapes, f"{VAE}decoder.conv_in.weight")[1],
        "norm_num_groups": math.gcd(32, *channels),
        "scaling_factor": RELEASED[_MODELS[family]]["vae"]["scaling_factor"],
        "use_quant_conv": f"{VAE}quant_conv.weight" in shapes,
        "use_post_quant_conv": f"{VAE}post_quant_conv.weight" in shapes,
        "mid_block_add_attention": f"{VAE}decoder.mid.attn_1.q.weight" in shapes,
        # Only the SDXL autoencoder overflows in half precision.
        "force_upcast": family == "sdxl",
    }


def _clip(where: str, prefix: str, shapes: Shapes, part: str) -> dict[str, Any]:
    return _text(
        vocab=_shape(where, shapes, f"{prefix}embeddings.token_embedding.weight"),
        positions=_shape(where, shapes, f"{prefix}embeddings.position_embedding.weight"),
        intermediate_size=_shape(where, shapes, f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=len(indices(shapes, f"{prefix}encoder.layers.")),
        hidden_act="quick_gelu",
    )


def _open_clip(where: str, prefix: str, shapes: Shapes, part: str) -> dict[str, Any]:
    layers = len(indices(shapes, f"{prefix}transformer.resblocks."))
    projection = f"{prefix}text_projection"
    config = _text(
        vocab=_shape(where, shapes, f"{prefix}token_embedding.weight"),
        positions=_shape(where, shapes, f"{prefix}positional_embedding"),
        intermediate_size=_shape(where, shapes, f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0],
        num_hidden_layers=layers,
        hidden_act="gelu",
    )
    if part == "text_encoder_2":
        config |= {
            "architectures": ["CLIPTextModelWithProjection"],
            "projection_dim": _shape(where, shapes, projection)[1],
        }
    # The original files hold the whole encoder; files made from a diffusers folder hold only the layers in use.
    elif layers != _USED_OPEN_CLIP and (layers == _FULL_OPEN_CLIP or projection in shapes):
        config["num_hidden_layers"] = layers - 1
    return config


def _text(vocab: tuple[int, ...], positions: tuple[int, ...], **rest: Any) -> dict[str, Any]:
    rows, width = vocab
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": rows,
        "hidden_size": width,
        "num_attention_heads": _heads(width),
        "max_position_embeddings": positions[0],
        "layer_norm_eps": 1e-5,
        # The last two pieces of CLIP's vocabulary, full or cut.
        "bos_token_id": rows - 2,
        "eos_token_id": rows - 1,
        "pad_token_id": 1,
        "projection_dim": width,
        **rest,
    }


def heads_of(family: str, channels: Sequence[int]) -> list[int]:
    """Return the heads in blocks of so many channels, as all published UNets of a family have them."""
    return [8 if c % 8 == 0 else 1 for c in channels] if family == "sd1" else [_heads(c) for c in channels]


def _heads(channels: int) -> int:
    return channels // 64 if channels % 64 == 0 else 1


def _depth(shapes: Shapes, module: str) -> int:
    return len(indices(shapes, f"{UNET}{module}transformer_blocks."))


def indices(shapes: Mapping[str, Any], prefix: str) -> list[int]:
    """Return the numbers that follow `prefix` in the file's keys, sorted."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return sorted({int(hit[1]) for key in shapes if (hit := pattern.match(key))})


def _shape(where: str, shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise InputError(f"{where}: found no tensor {key}, which every model of its family has")
    if len(shapes[key]) not in (2, 4):
        raise InputError(f"{where}: {key} has shape {list(shapes[key])}, expected 2 or 4 axes")
    return shapes[key]
