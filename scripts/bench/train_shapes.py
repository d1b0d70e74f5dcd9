"""The shapes of a training step's arguments, for the real architectures: nothing is computed, no weights exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxmix
from jaxmix.controls.vmix import abstract_params
from jaxmix.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    UNet2DConditionModel,
    UNetConfig,
    VAEConfig,
)
from jaxmix.models.controlnet import ControlNetConfig
from jaxmix.pipeline.blocks import layer_names
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.released import RELEASED
from jaxmix.schedule import NoiseSchedule
from jaxmix.tuning import lora
from jaxmix.types import InputError
from scripts.bench.adapters import vmix_config
from scripts.bench.rows import configs
from train import b_lora, controlnet, dreambooth, ip_adapter, low_rank, style_adapter, textual_inversion, vmix
from train import lora as train_lora
from train.diffusion import make_predict


def abstract_pipeline(model: str, dtype: Any, tiny: bool = False) -> Pipeline:
    """Return a pipeline of shapes in `dtype`, as the trainer loads the base."""
    name = "sd21_base" if model == "sd21" else model
    found = configs(name, tiny)
    unet = found["unet"]
    texts = [config for part, config in RELEASED[name].items() if part.startswith("text_encoder")]
    if tiny:
        width = unet["cross_attention_dim"] // len(texts)
        small = {"vocab_size": 16, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1}
        small |= {"num_attention_heads": 2, "projection_dim": 16, "max_position_embeddings": found["text_length"]}
        texts = [{**text, **small, "eos_token_id": 15} for text in texts]
    encoders = [CLIPTextModel(CLIPTextConfig.from_dict(text), dtype) for text in texts]
    modules = {
        "unet": UNet2DConditionModel(UNetConfig.from_dict(unet), dtype),
        "vae": AutoencoderKL(VAEConfig.from_dict(found["vae"]), dtype),
        **dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False)),
    }
    params = {name: module.abstract_params() for name, module in modules.items()}
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    return Pipeline(**modules, params=params, schedule=NoiseSchedule.from_config(found["scheduler"]), tokenizer=None)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a trainer adds to the base, as shapes, and its prediction.

    `learns` and `frozen` are trees, `batch` further entries of the rows; `parts` names the parts of what learns, and
    `learnt` those parts of the base that are not frozen. What makes them is told the number of rows and the side of
    their square latents.
    """

    learns: Any
    frozen: dict[str, Any]
    batch: dict[str, Any]
    predict: Callable[..., Any]
    parts: dict[str, Any]
    weigh: Any = None
    learnt: tuple[str, ...] = ()


def vmix_pieces(pipe: Pipeline, cfg: vmix.Config, rows: int, side: int, cached: bool, tiny: bool) -> Pieces:
    """Return the pieces of `train.vmix`."""
    unet = pipe.params["unet"]
    made = vmix_config(pipe.unet, unet, pipe.text_length, cfg.labels or None)
    factors = None
    if cfg.rank:
        key = jax.random.key(0)
        shapes = jax.eval_shape(lambda: lora.init(key, unet, cfg.lora_targets, cfg.rank, cfg.lora_alpha))
        factors = jaxmix.LoRA({"unet": shapes})
    adapter = jaxmix.VMix(made, abstract_params(made), factors)
    learns, constants = vmix.split_adapter(adapter, cfg)
    mixing = learns.get("vmix", {})
    parts = {
        "F and its norm": [mixing.get("token_proj"), mixing.get("norm")],
        "Z": mixing.get("zero_proj"),
        "W_V^a": mixing.get("to_v"),
        "LoRA": learns.get("lora", {}),
    }
    present = jax.ShapeDtypeStruct((rows, len(made.dimensions)), jnp.float32)
    return Pieces(learns, constants, {"present": present}, vmix.make_predict(pipe, cfg), parts)


def _image_encoder(name: str, cfg: Any, tiny: bool) -> tuple[jaxmix.ImageEncoder, Any]:
    """Return a released CLIP image encoder of shapes, and these."""
    told = RELEASED[name]["image_encoder"]
    if tiny:
        told = {**told, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        told |= {"image_size": 28, "projection_dim": 8}
    model = CLIPVisionModel(CLIPVisionConfig.from_dict(told), cfg.dtype)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, cfg.dtype), model.abstract_params())
    return jaxmix.ImageEncoder(model, params), params


def ip_adapter_pieces(pipe: Pipeline, cfg: ip_adapter.Config, rows: int, side: int, cached: bool, tiny: bool) -> Pieces:
    """Return the pieces of `train.ip_adapter`, which reads pictures with CLIP ViT-H/14."""
    encoder, params = _image_encoder("clip_vit_h", cfg, tiny)
    model, shape = encoder.model, jax.ShapeDtypeStruct

    def fresh(unet: Any) -> Any:
        base = dataclasses.replace(pipe, params={**pipe.params, "unet": unet})
        made = jaxmix.IPAdapter.init(jax.random.key(0), base, encoder, cfg.kind, cfg.tokens)
        return {"projection": made.projection, "layers": made.layers}

    learns = jax.eval_shape(fresh, pipe.params["unet"])
    side, states = model.config.image_size, (model.config.tokens, model.config.hidden_size)
    seen = (model.config.projection_dim,) if cfg.kind == "base" else states
    batch = {"unseen": shape((rows,), jnp.float32)}
    if cached:
        batch["seen"] = shape((rows, *seen), jnp.float16)
    else:
        batch["pixels"] = shape((rows, side, side, 3), jnp.float32)
    frozen: dict[str, Any] = {} if cached else {"image_encoder": params}
    if cfg.kind != "base":
        frozen["grey"] = shape(states, jnp.float32)
    parts = {"projection": learns["projection"], "keys and values": learns["layers"]}
    return Pieces(learns, frozen, batch, ip_adapter.make_predict(pipe, encoder, cfg), parts)


def style_adapter_pieces(
    pipe: Pipeline, cfg: style_adapter.Config, rows: int, side: int, cached: bool, tiny: bool
) -> Pieces:
    """Return the pieces of `train.style_adapter`, which reads pictures with CLIP ViT-L/14."""
    if cached:
        raise InputError(
            "cached: found true with trainer style_adapter, expected false: a cache has no pictures to read"
        )
    encoder, params = _image_encoder("clip_vit_l", cfg, tiny)

    def fresh(unet: Any) -> Any:
        base = dataclasses.replace(pipe, params={**pipe.params, "unet": unet})
        made = jaxmix.StyleAdapter.init(jax.random.key(0), base, encoder, cfg.tokens, cfg.blocks)
        return {"style_emb": made.style_emb, "layers": dict(made.layers)}

    learns = jax.eval_shape(fresh, pipe.params["unet"])
    pixels = encoder.model.config.image_size
    batch = {"references": jax.ShapeDtypeStruct((rows, cfg.references, pixels, pixels, 3), jnp.float32)}
    batch["unstyled"] = jax.ShapeDtypeStruct((rows,), jnp.float32)
    parts = {"StyEmb": learns["style_emb"], "keys, values and strengths": learns["layers"]}
    return Pieces(learns, {"image_encoder": params}, batch, style_adapter.make_predict(pipe, encoder, cfg), parts)


def controlnet_pieces(pipe: Pipeline, cfg: controlnet.Config, rows: int, side: int, cached: bool, tiny: bool) -> Pieces:
    """Return the pieces of `train.controlnet`."""

    def fresh(unet: Any) -> Any:
        base = dataclasses.replace(pipe, params={**pipe.params, "unet": unet})
        return jaxmix.ControlNet.init(jax.random.key(0), base, cfg.conditioning_embedding_out_channels).params

    learns = jax.eval_shape(fresh, pipe.params["unet"])
    learns = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), learns)
    channels = (16, 32, 96, 256)[: pipe.vae.config.factor.bit_length()]
    channels = tuple(cfg.conditioning_embedding_out_channels or channels)
    net = jaxmix.ControlNet(ControlNetConfig.of_unet(pipe.unet.config, channels), learns)
    pixels = side * pipe.vae.config.factor
    batch = {"hint": jax.ShapeDtypeStruct((rows, pixels, pixels, 3), jnp.uint8)}
    zeros = {name: node for name, node in learns.items() if name.startswith(("controlnet_down", "controlnet_mid"))}
    encoder = learns["controlnet_cond_embedding"]
    rest = {k: v for k, v in learns.items() if k not in zeros and k != "controlnet_cond_embedding"}
    parts = {"copy of the way down": rest, "zero convolutions": zeros, "encoder of hints": encoder}
    return Pieces(learns, {}, batch, controlnet.make_predict(pipe, net, cfg), parts)


def lora_pieces(pipe: Pipeline, cfg: Any, rows: int, side: int, cached: bool, tiny: bool) -> Pieces:
    """Return the pieces of `train.lora`."""
    made = jax.eval_shape(lambda params: _learns(dataclasses.replace(pipe, params=params), cfg), dict(pipe.params))
    alphas = {part: dict.fromkeys(factors, 1.0) for part, factors in made.items()}
    weigh = low_rank.make_weigh(low_rank.Trained(made, alphas), cfg)
    batch = {"loss_weight": jax.ShapeDtypeStruct((rows,), jnp.float32)}
    return Pieces(made, {}, batch, make_predict(pipe, cfg), dict(made), weigh)


def _learns(pipe: Pipeline, cfg: Any) -> Any:
    return low_rank.start_lora(pipe, cfg, 0).learns


def dreambooth_pieces(pipe: Pipeline, cfg: Any, rows: int, side: int, cached: bool, tiny: bool) -> Pieces:
    """Return the pieces of `train.dreambooth`: of a LoRA, or of the base's own weights in float32."""
    if cfg.rank is not None:
        return lora_pieces(pipe, cfg, rows, side, cached, tiny)
    parts = dreambooth.full_parts(pipe, cfg)
    made = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), {name: pipe.params[name] for name in parts}
    )
    batch = {"loss_weight": jax.ShapeDtypeStruct((rows,), jnp.float32)}
    return Pieces(made, {}, batch, make_predict(pipe, cfg), dict(made), None, tuple(parts))


def b_lora_pieces(pipe: Pipeline, cfg: Any, rows: int, side: int, cached: bool, tiny: bool) -> Pieces:
    """Return the pieces of `train.b_lora`."""
    return lora_pieces(pipe, b_lora.within(pipe, cfg, b_lora.find_blocks(pipe, cfg)), rows, side, cached, tiny)


def textual_inversion_pieces(pipe: Pipeline, cfg: Any, rows: int, side: int, cached: bool, tiny: bool) -> Pieces:
    """Return the pieces of `train.textual_inversion`, whose words are read, not cached."""
    if cached:
        raise InputError("cached: found true with trainer textual_inversion, which reads pictures, expected false")
    shape = (len(layer_names(pipe)), cfg.num_vectors) if cfg.per_layer else (cfg.num_vectors,)
    made = {
        part: jax.ShapeDtypeStruct((*shape, encoder.config.hidden_size), jnp.float32) for part, encoder in pipe.encoders
    }
    predict = textual_inversion.make_predict(pipe, cfg)
    return Pieces(made, {}, {}, predict, dict(made), textual_inversion.make_weigh(cfg.per_layer))


TRAINERS: dict[str, tuple[Any, Callable[..., Pieces]]] = {
    "vmix": (vmix.Config, vmix_pieces),
    "ip_adapter": (ip_adapter.Config, ip_adapter_pieces),
    "style_adapter": (style_adapter.Config, style_adapter_pieces),
    "controlnet": (controlnet.Config, controlnet_pieces),
    "lora": (train_lora.Config, lora_pieces),
    "dreambooth": (dreambooth.Config, dreambooth_pieces),
    "b_lora": (b_lora.Config, b_lora_pieces),
    "textual_inversion": (textual_inversion.Config, textual_inversion_pieces),
}
"""The configuration and the pieces of every trainer, by its name."""


def abstract_batch(pipe: Pipeline, rows: int, side: int, cached: bool) -> dict[str, Any]:
    """Return the shapes of a batch of square pictures, from pictures or from a cache of latents and text states."""
    shape = jax.ShapeDtypeStruct
    tokens, width = pipe.text_length, pipe.unet.config.cross_attention_dim
    second = pipe.text_encoder_2
    batch = {"dropped": shape((rows,), jnp.float32)}
    if cached:
        for name in ("latents_mean", "latents_std"):
            batch[name] = shape((rows, side, side, pipe.unet.config.in_channels), jnp.float16)
        batch["context"] = shape((rows, tokens, width), jnp.float16)
        if second is not None:
            batch["pooled"] = shape((rows, second.config.projection_dim), jnp.float16)
    else:
        pixels = side * pipe.vae.config.factor
        batch["image"] = shape((rows, pixels, pixels, 3), jnp.uint8)
        for name in ("input_ids", *(("input_ids_2",) if second is not None else ())):
            batch[name] = shape((rows, tokens), jnp.int32)
    if second is not None:
        batch["time_ids"] = shape((rows, 6), jnp.float32)
    return batch
