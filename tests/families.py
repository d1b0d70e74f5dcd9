"""Tiny random pipelines of the other families, made from the one of `tests.conftest`."""

import dataclasses

import jax
import numpy as np

from jaxmix import Pipeline
from jaxmix.models import CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig

SDXL_UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 16 + 24,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
"""Text of 16 + 24 channels, 20 pooled ones."""


def random_like(tree):
    """Return random arrays for a tree of shapes: kernels keep the scale of what they are given, the rest is small."""
    rng = np.random.default_rng(5)

    def leaf(path, x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return jax.numpy.asarray(noise / np.sqrt(np.prod(x.shape[:-1])))
        return jax.numpy.asarray(noise * (0.5 if name == "embedding" else 0.05) + float(name == "scale"))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def moved(tree, key, by):
    """Return the tree with normal noise of deviation ``by`` added, as if it had been trained."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [x + by * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def sdxl(pipe: Pipeline) -> Pipeline:
    """Return a pipeline like SDXL with the first text encoder and the autoencoder of ``pipe``."""
    text = pipe.text_encoder.config.to_dict() | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "hidden_act": "gelu",
        "projection_dim": 20,
    }
    made = {
        "unet": UNet2DConditionModel(UNetConfig.from_dict(SDXL_UNET)),
        "text_encoder_2": CLIPTextModel(CLIPTextConfig.from_dict(text)),
    }
    params = {name: random_like(module.abstract_params()) for name, module in made.items()}
    return dataclasses.replace(pipe, **made, params={**pipe.params, **params}, tokenizer_2=pipe.tokenizer)
