"""The shapes of a VMix training step's arguments, for the real architectures: nothing is computed, no weights exist."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jaxmix
from jaxmix.controls.vmix import abstract_params
from jaxmix.models import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig, VAEConfig
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.released import RELEASED
from jaxmix.schedule import NoiseSchedule
from jaxmix.tuning import lora
from scripts.bench.ours import vmix_config
from scripts.bench.rows import configs
from train import vmix


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


def abstract_adapter(pipe: Pipeline, cfg: vmix.Config) -> jaxmix.VMix:
    """Return the shapes of the adapter that `train.vmix.make_adapter` makes."""
    unet = pipe.params["unet"]
    made = vmix_config(pipe.unet, unet, pipe.text_length, cfg.labels or None)
    factors = None
    if cfg.rank:
        key = jax.random.key(0)
        shapes = jax.eval_shape(lambda: lora.init(key, unet, cfg.lora_targets, cfg.rank, cfg.lora_alpha))
        factors = jaxmix.LoRA({"unet": shapes})
    return jaxmix.VMix(made, abstract_params(made), factors)


def abstract_batch(pipe: Pipeline, rows: int, side: int, cached: bool, labels: int) -> dict[str, Any]:
    """Return the shapes of a batch of square pictures, from pictures or from a cache of latents and text states."""
    shape = jax.ShapeDtypeStruct
    tokens, width = pipe.text_length, pipe.unet.config.cross_attention_dim
    second = pipe.text_encoder_2
    batch = {"present": shape((rows, labels), jnp.float32), "dropped": shape((rows,), jnp.float32)}
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
