"""CLIPVisionModel: the image encoders that read image prompts (arXiv 2103.00020), under transformers' names."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float

from jaxmix.models.clip import Embed, EncoderLayer
from jaxmix.models.clip_config import CLIPVisionConfig
from jaxmix.models.layers import LayerNorm, Linear, product
from jaxmix.pictures import CLIP_MEAN, CLIP_STD
from jaxmix.types import AnyArray, Array, Params


@struct.dataclass
class VisionStates:
    """The outputs of an image encoder for s = 1 + patches states, the first one that of the whole picture.

    ``last_hidden_state`` and ``penultimate``, the input of the last layer (``hidden_states[-2]`` in transformers), are
    without a final norm; ``pooled`` is the first state after it, and ``projected`` its projection, not normalised, None
    for a model without one.
    """

    last_hidden_state: Float[Array, "b s d"]
    penultimate: Float[Array, "b s d"]
    pooled: Float[Array, "b d"]
    projected: Float[Array, "b p"] | None = None


class Embeddings(nn.Module):
    """Patches, row by row, after a learnt state for the whole picture."""

    config: CLIPVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: Float[AnyArray, "b h w 3"]) -> Float[Array, "b s d"]:
        cfg, (b, h, w, c) = self.config, pixels.shape
        p, d = cfg.patch_size, cfg.hidden_size
        whole = self.param("class_embedding", nn.initializers.normal(0.02), (d,))
        # A convolution whose stride is its size is a product of flattened patches.
        kernel = PatchKernel(p, d, name="patch_embedding")().reshape(p * p * c, d).astype(self.dtype)
        patches = jnp.asarray(pixels, self.dtype).reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
        x = product(patches.reshape(b, -1, p * p * c), kernel)
        return jnp.concatenate([jnp.broadcast_to(whole.astype(self.dtype), (b, 1, d)), x], 1)


class PatchKernel(nn.Module):
    """The kernel of the patches' convolution, (p, p, 3, d), which has no bias."""

    size: int
    features: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", nn.initializers.normal(0.02), (self.size, self.size, 3, self.features))


class VisionTransformer(nn.Module):
    """Embeddings, a norm, the layers (each sees all patches), and a norm over the first state alone."""

    config: CLIPVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: Float[AnyArray, "b h w 3"]) -> tuple[Array, Array, Array]:
        """Return the states after the last layer, those before it, and the pooled one."""
        cfg = self.config
        x = Embeddings(cfg, self.dtype, name="embeddings")(pixels)
        places = Embed(cfg.tokens, cfg.hidden_size, name="embeddings.position_embedding")(jnp.arange(cfg.tokens))
        x = x + places.astype(self.dtype)
        x = penultimate = LayerNorm(cfg.layer_norm_eps, self.dtype, name="pre_layrnorm")(x)  # so spelt in every file
        for i in range(cfg.num_hidden_layers):
            penultimate = x
            x = EncoderLayer(cfg, self.dtype, causal=False, name=f"encoder.layers.{i}")(x)
        return x, penultimate, LayerNorm(cfg.layer_norm_eps, self.dtype, name="post_layernorm")(x[:, 0])


def resized_pixels(images: Float[AnyArray, "b h w 3"], size: int = 224) -> Float[Array, "b s s 3"]:
    """Return images in [0, 1] as CLIP reads them, differentiable: for guidance, where PIL cannot go.

    The same resize and cut as `jaxmix.pictures.clip_pixels`, without its rounding to 8 bits between the two passes.
    """
    b, h, w, c = images.shape
    hw = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    x = jax.image.resize(images, (b, *hw, c), "cubic", antialias=True)
    top, left = (hw[0] - size) // 2, (hw[1] - size) // 2
    x = x[:, top : top + size, left : left + size]
    return (x - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)


class CLIPVisionModel(nn.Module):
    """CLIP's image encoder; with ``config.projection`` transformers' CLIPVisionModelWithProjection."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[AnyArray, "b h w 3"]) -> VisionStates:
        """Encode pixels as `jaxmix.pictures.clip_pixels` makes them, (b, image_size, image_size, 3)."""
        cfg = self.config
        if pixels.shape[1:] != (cfg.image_size, cfg.image_size, 3):
            raise ValueError(f"pixels: found {pixels.shape}, expected (b, {cfg.image_size}, {cfg.image_size}, 3)")
        x, penultimate, pooled = VisionTransformer(cfg, self.dtype, name="vision_model")(pixels)
        projected = None
        if cfg.projection:
            projected = Linear(cfg.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")(pooled)
        return VisionStates(x, penultimate, pooled, projected)

    @nn.nowrap
    def init_params(self, key: Array) -> Params:
        """Return fresh float32 parameters."""
        size = self.config.image_size
        return jax.jit(lambda key: self.init(key, jnp.zeros((1, size, size, 3)))["params"])(key)

    @nn.nowrap
    def abstract_params(self) -> Params:
        """Return the parameter tree as ShapeDtypeStructs, without computing anything."""
        return jax.eval_shape(self.init_params, jax.random.key(0))
