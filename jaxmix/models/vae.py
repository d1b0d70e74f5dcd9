"""AutoencoderKL: pixels to latents and back (arXiv 2112.10752, section 3.1), NHWC, under diffusers' names."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxmix.control import QKV, Site, attend
from jaxmix.models.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from jaxmix.models.config import VAEConfig
from jaxmix.models.layers import Conv, GroupNorm, Linear
from jaxmix.types import AnyArray, Array, Params

_EPS = 1e-6  # of every norm in the autoencoder


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of the smallest feature map."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, _EPS, self.dtype, name="group_norm")(x).reshape(b, h * w, c)
        q, k, v = (Linear(c, dtype=self.dtype, name=f"to_{i}")(y).reshape(b, h * w, 1, c) for i in "qkv")
        o, _ = attend(Site(".".join(self.path), 1, (h, w)), QKV(q, k, v))
        return x + Linear(c, dtype=self.dtype, name="to_out.0")(o.reshape(b, h * w, c)).reshape(b, h, w, c)


class _Resnets(nn.Module):
    """Resnets of one resolution, then optionally a change of resolution."""

    features: int
    layers: int
    groups: int
    change: str | None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.layers):
            x = ResnetBlock2D(self.features, self.groups, _EPS, self.dtype, name=f"resnets.{i}")(x)
        if self.change == "down":
            # The encoder pads on the right and bottom only, unlike the UNet.
            return Downsample2D(((0, 1), (0, 1)), self.dtype, name="downsamplers.0")(x)
        if self.change == "up":
            h, w = x.shape[1:3]
            return Upsample2D(self.dtype, name="upsamplers.0")(x, (2 * h, 2 * w))
        return x


class _Mid(nn.Module):
    groups: int
    attention: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        x = ResnetBlock2D(c, self.groups, _EPS, self.dtype, name="resnets.0")(x)
        if self.attention:
            x = AttentionBlock(self.groups, self.dtype, name="attentions.0")(x)
        return ResnetBlock2D(c, self.groups, _EPS, self.dtype, name="resnets.1")(x)


class Encoder(nn.Module):
    """Pixels to the moments of the latents."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b H W 3"]) -> Float[Array, "b h w c2"]:
        cfg = self.config
        x = Conv(cfg.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, c in enumerate(cfg.block_out_channels):
            change = "down" if i < len(cfg.block_out_channels) - 1 else None
            x = _Resnets(c, cfg.layers_per_block, cfg.norm_num_groups, change, self.dtype, name=f"down_blocks.{i}")(x)
        x = _Mid(cfg.norm_num_groups, cfg.mid_block_add_attention, self.dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, _EPS, self.dtype, name="conv_norm_out")(x))
        return Conv(2 * cfg.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to pixels."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        cfg = self.config
        x = Conv(cfg.block_out_channels[-1], dtype=self.dtype, name="conv_in")(z)
        x = _Mid(cfg.norm_num_groups, cfg.mid_block_add_attention, self.dtype, name="mid_block")(x)
        for i, c in enumerate(reversed(cfg.block_out_channels)):
            change = "up" if i < len(cfg.block_out_channels) - 1 else None
            layers = cfg.layers_per_block + 1
            x = _Resnets(c, layers, cfg.norm_num_groups, change, self.dtype, name=f"up_blocks.{i}")(x)
        x = nn.silu(GroupNorm(cfg.norm_num_groups, _EPS, self.dtype, name="conv_norm_out")(x))
        return Conv(cfg.out_channels, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The variational autoencoder of Stable Diffusion. Latents here are unscaled: multiply by ``scaling_factor``."""

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        cfg = self.config
        self.encoder = Encoder(cfg, self.dtype)
        self.decoder = Decoder(cfg, self.dtype)
        if cfg.use_quant_conv:
            self.quant_conv = Linear(2 * cfg.latent_channels, conv=True, dtype=self.dtype)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = Linear(cfg.latent_channels, conv=True, dtype=self.dtype)

    def encode(self, images: Float[AnyArray, "b H W 3"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Encode images in [-1, 1] to the mean and log-variance (clipped to [-30, 20]) of their latents, float32."""
        x = self.encoder(images)
        if self.config.use_quant_conv:
            x = self.quant_conv(x)
        mean, logvar = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[AnyArray, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Decode unscaled latents to images, about [-1, 1] and not clipped, float32."""
        z = z.astype(self.dtype)
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        """Encode and decode without noise."""
        return self.decode(self.encode(images)[0])

    @nn.nowrap
    def init_params(self, key: Array) -> Params:
        """Return fresh float32 parameters."""
        size = 2 * self.config.factor

        def init(key: Array) -> Params:
            return self.init(key, jnp.zeros((1, size, size, self.config.in_channels)))["params"]

        return jax.jit(init)(key)

    @nn.nowrap
    def abstract_params(self) -> Params:
        """Return the parameter tree as ShapeDtypeStructs, without computing anything."""
        return jax.eval_shape(self.init_params, jax.random.key(0))
