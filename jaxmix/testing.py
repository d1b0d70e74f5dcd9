"""Random models for tests, of this library and of code built on it: weights by shape, and whole tiny pipelines.

Nothing is compiled or downloaded: weights are drawn from shapes that a module gives without being run, and only the
embedded model's tokenizer is read. Not imported by `jaxmix` itself::

    from jaxmix.testing import random_params, tiny_pipeline

    pipe = tiny_pipeline()                    # 16 px images, a few thousand parameters
    pipe = tiny_pipeline("sdxl")              # two text encoders, pooled text, size and crop
    params = random_params(pipe.unet, seed=5) # other weights for its UNet

The numbers of `random_params`, `moved` and `tiny_pipeline` must not change: tests have recorded results made from them.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    UNet2DConditionModel,
    UNetConfig,
    VAEConfig,
)
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.schedule import NoiseSchedule

TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
TINY_SDXL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 16 + 24,  # of both text encoders
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,  # the pooled text, and six numbers
}
TINY_VAE: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
TINY_SCHEDULE: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TINY_TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
"""Without the vocabulary, which is taken from the embedded model."""
TINY_TEXT_2: dict[str, Any] = {
    **TINY_TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "hidden_act": "gelu",
    "projection_dim": 20,
}
_TOKENIZER = Path(__file__).parent / "assets" / "mini" / "tokenizer"
_PERIOD = 1_000_003  # a prime, so that repeated normals do not line up with the axes


def random_params(of: Any, seed: int | np.random.Generator = 0, dtype: Any = None, *, single: bool = False) -> Any:
    """Return random weights in which nothing is at its default and everything keeps its scale.

    Kernels (and whatever else has two axes or more) are normals of variance 1 / fan-in, so that a product neither grows
    nor shrinks; embeddings are normals of deviation 0.5; norms' scales are near one and biases near zero, by a
    deviation of 0.05, so that one that is swapped or forgotten shows.

    Args:
        of: a module with `abstract_params`, or any tree of arrays or shapes whose leaves are named as Flax names them.
        seed: a number, or a generator that is drawn from in the order of the tree's leaves.
        dtype: of the weights; that of each leaf if None.
        single: round the normals to float32 before they are scaled, not after. The second models of the tests are made
            this way (`tiny_pipeline("sdxl")`, the expert of MagicFusion); only the last bit differs.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        noise = rng.standard_normal(leaf.shape)
        if single:
            noise = noise.astype(np.float32)
        name = _name(path)
        if name == "embedding":
            noise = 0.5 * noise
        elif len(leaf.shape) > 1:
            noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            noise = float(name == "scale") + 0.05 * noise
        return jnp.asarray(noise, leaf.dtype if dtype is None else dtype)

    return jax.tree_util.tree_map_with_path(draw, _shapes(of))


def quick_params(of: Any, seed: int | np.random.Generator = 0, dtype: Any = None) -> Any:
    """Return random weights for a model of any size in seconds, for timing and for finite outputs.

    Kernels and embeddings are normals of variance 1 / fan-in, norms are the identity. Leaves are not drawn separately:
    a million normals are drawn once and repeated, since billions of fresh ones take longer than what they are for.

    Args:
        of: a module with `abstract_params`, or any tree of arrays or shapes whose leaves are named as Flax names them.
        seed: a number, or a generator.
        dtype: of the weights; that of each leaf if None.
    """
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(_PERIOD, np.float32)

    def fill(path: Any, leaf: Any) -> jax.Array:
        kind = leaf.dtype if dtype is None else dtype
        if len(leaf.shape) < 2:
            return jnp.full(leaf.shape, float(_name(path) == "scale"), kind)
        scaled = (base * math.prod(leaf.shape[:-1]) ** -0.5).astype(kind)
        return jax.device_put(np.resize(np.roll(scaled, int(rng.integers(base.size))), leaf.shape))

    return jax.tree_util.tree_map_with_path(fill, _shapes(of))


def moved(tree: Any, key: jax.Array, by: float) -> Any:
    """Return a tree with normal noise of standard deviation ``by`` added to every leaf, as if it had been trained.

    For what starts at zero or at the identity, such as an adapter, which would otherwise change nothing.
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            jnp.asarray(np.asarray(x) + np.float32(by) * np.asarray(normal(k, x.shape)))
            for x, k in zip(leaves, keys, strict=True)
        ],
    )


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return what `jax.random.normal` returns, float32, from a program that serves every shape of about that size.

    Compiling one for each shape is slow. JAX draws each number from its index alone, so those of a longer array begin
    with those of a shorter one.
    """
    size = math.prod(shape)
    longer = max(1024, 1 << (size - 1).bit_length())
    return jnp.asarray(np.asarray(jax.random.normal(key, (longer,)))[:size].reshape(shape))


def tiny_pipeline(family: Literal["sd1", "sdxl"] = "sd1") -> Pipeline:
    """Return a complete pipeline of random weights: images of 16 px, latents of 8 x 8 x 4, mini's tokenizer.

    "sdxl" shares the text encoder and the autoencoder of "sd1", weights included, and has its own UNet and second text
    encoder: text of 16 + 24 channels, and 20 pooled ones.
    """
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(_TOKENIZER))
    vocabulary = {
        "vocab_size": len(tokenizer),
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    unet = UNet2DConditionModel(UNetConfig.from_dict(TINY_UNET))
    vae = AutoencoderKL(VAEConfig.from_dict(TINY_VAE))
    text = CLIPTextModel(CLIPTextConfig.from_dict(TINY_TEXT | vocabulary))
    # One generator draws all parts, in the order of their names.
    shapes = {"unet": unet.abstract_params(), "vae": vae.abstract_params(), "text_encoder": text.abstract_params()}
    params = random_params(shapes)
    schedule = NoiseSchedule.from_config(TINY_SCHEDULE)
    pipe = Pipeline(unet=unet, vae=vae, text_encoder=text, params=params, schedule=schedule, tokenizer=tokenizer)
    if family == "sd1":
        return pipe
    unet = UNet2DConditionModel(UNetConfig.from_dict(TINY_SDXL_UNET))
    text_2 = CLIPTextModel(CLIPTextConfig.from_dict(TINY_TEXT_2 | vocabulary))
    own = {name: random_params(m, 5, single=True) for name, m in (("unet", unet), ("text_encoder_2", text_2))}
    return dataclasses.replace(pipe, unet=unet, text_encoder_2=text_2, params={**params, **own}, tokenizer_2=tokenizer)


def _shapes(of: Any) -> Any:
    return of.abstract_params() if hasattr(of, "abstract_params") else of


def _name(path: Any) -> str:
    """Return the last key of a leaf's path, "" for a tree that is one leaf."""
    return str(getattr(path[-1], "key", path[-1])) if path else ""
