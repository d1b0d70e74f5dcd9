"""The blocks of Stable Diffusion's UNet, and its way down, which ControlNets have a copy of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Num

from jaxmix.control import Control, Site, apply_join
from jaxmix.models.attention import Context, Transformer2DModel
from jaxmix.models.config import DownConfig
from jaxmix.models.layers import Conv, GroupNorm, Linear, timestep_embedding, upsample_nearest
from jaxmix.types import AnyArray, Array, InputError


class AddedCond(NamedTuple):
    """SDXL's conditioning besides the prompt's tokens (arXiv 2307.01952, sections 2.2 and 2.3).

    ``text_embeds`` (b, p) is the projected state of the second text encoder. ``time_ids`` (b, 6) are in pixels: the
    original height and width, the top and left of the crop, the target height and width.
    """

    text_embeds: Float[AnyArray, "b p"]
    time_ids: Num[AnyArray, "b n"]


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions around a projected timestep embedding, with a (projected) residual."""

    features: int
    groups: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], emb: Float[Array, "b e"] | None = None, controls: Sequence[Control] = ()
    ) -> Float[Array, "b h w o"]:
        y = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(x, controls))
        y = Conv(self.features, dtype=self.dtype, name="conv1")(y)
        if emb is not None:
            y = y + Linear(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(emb))[:, None, None, :]
        y = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm2")(y, controls))
        y = Conv(self.features, dtype=self.dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Linear(self.features, conv=True, dtype=self.dtype, name="conv_shortcut")(x)
        return x + y


class Downsample2D(nn.Module):
    """Halve each side by a strided convolution."""

    padding: Sequence[tuple[int, int]] = ((1, 1), (1, 1))
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return Conv(x.shape[-1], 2, self.padding, self.dtype, name="conv")(x)


class Upsample2D(nn.Module):
    """Enlarge by nearest neighbour to a given size, then convolve."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], hw: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(upsample_nearest(x, hw))


class Block(nn.Module):
    """What the three kinds of block share: ``features``, attention of ``depth`` (None: no attention), norm settings."""

    features: int
    layers: int
    heads: int
    depth: int | None
    groups: int
    eps: float
    linear: bool
    last: bool = False
    dtype: Any = jnp.float32

    def resnet(self, i: int) -> ResnetBlock2D:
        return ResnetBlock2D(self.features, self.groups, self.eps, self.dtype, name=f"resnets.{i}")

    def attention(self, i: int) -> Transformer2DModel:
        assert self.depth is not None
        return Transformer2DModel(self.heads, self.depth, self.groups, self.linear, self.dtype, name=f"attentions.{i}")


class DownBlock(Block):
    """Resnets, each followed by attention if there is any, then a downsampling unless it is the last block."""

    @nn.compact
    def __call__(
        self, x: Array, emb: Array, context: Context, controls: Sequence[Control]
    ) -> tuple[Array, tuple[Array, ...]]:
        skips = []
        for i in range(self.layers):
            x = self.resnet(i)(x, emb, controls)
            if self.depth is not None:
                x = self.attention(i)(x, context, controls)
            skips.append(x)
        if not self.last:
            x = Downsample2D(dtype=self.dtype, name="downsamplers.0")(x)
            skips.append(x)
        return x, tuple(skips)


class MidBlock(Block):
    """Resnet, attention, resnet at the smallest resolution; without attention the first resnet alone."""

    @nn.compact
    def __call__(self, x: Array, emb: Array, context: Context, controls: Sequence[Control]) -> Array:
        x = self.resnet(0)(x, emb, controls)
        if self.depth is None:
            return x
        x = self.attention(0)(x, context, controls)
        return self.resnet(1)(x, emb, controls)


class UpBlock(Block):
    """Resnets on the features joined with the skips, then an upsampling to the next skip's size."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        skips: tuple[Array, ...],
        emb: Array,
        context: Context,
        controls: Sequence[Control],
        next_hw: Any,
    ) -> Array:
        for i in range(self.layers):
            site = Site(".".join((*self.path, f"resnets.{i}")), 0, (x.shape[1], x.shape[2]))
            x, skip = apply_join(site, x, skips[-1 - i], controls)
            x = self.resnet(i)(jnp.concatenate([x, skip], -1), emb, controls)
            if self.depth is not None:
                x = self.attention(i)(x, context, controls)
        if not self.last:
            x = Upsample2D(self.dtype, name="upsamplers.0")(x, next_hw)
        return x


class TimestepEmbedding(nn.Module):
    """Two dense layers with SiLU between, on the sinusoidal embedding, to which a projected condition may be added."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b e"], cond: Float[Array, "b g"] | None = None) -> Float[Array, "b f"]:
        if cond is not None:
            x = x + Linear(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")(cond)
        x = Linear(self.features, dtype=self.dtype, name="linear_1")(x)
        return Linear(self.features, dtype=self.dtype, name="linear_2")(nn.silu(x))


class WentDown(NamedTuple):
    """What the way down gives: the embedding of time, the middle block's output, and the skips, the last one last."""

    emb: Float[Array, "b e"]
    x: Float[Array, "b h w c"]
    skips: tuple[Array, ...]


def go_down(
    cfg: DownConfig,
    latents: Float[AnyArray, "b h w c"],
    t: ArrayLike,
    context: Context,
    controls: Sequence[Control] = (),
    added: AddedCond | Float[AnyArray, "b e"] | None = None,
    hint: Float[Array, "b h w c2"] | None = None,
    timestep_cond: Float[Array, "b g"] | None = None,
    *,
    dtype: Any,
    remat: bool,
) -> WentDown:
    """Run the first half of a UNet, to the middle block inclusive, as part of a module that is compact.

    The blocks become submodules of that module. ``hint`` is added to the output of its first convolution; the other
    arguments are those of `jaxmix.models.unet.UNet2DConditionModel`.
    """
    channels, n = cfg.block_out_channels, len(cfg.block_out_channels)
    t = jnp.broadcast_to(jnp.asarray(t), (latents.shape[0],))
    emb = timestep_embedding(t, channels[0], flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift)
    cond = None if timestep_cond is None else timestep_cond.astype(dtype)
    emb = TimestepEmbedding(4 * channels[0], dtype, name="time_embedding")(emb.astype(dtype), cond)
    if (added is None) != (cfg.addition_embed_type is None):
        found, expected = ("none", "AddedCond") if added is None else (type(added).__name__, "none")
        raise InputError(
            f"unet: added conditioning: found {found}, expected {expected} with "
            f"addition_embed_type={cfg.addition_embed_type!r}"
        )
    if isinstance(added, AddedCond):
        features = added_features(cfg, added).astype(dtype)
        added = TimestepEmbedding(4 * channels[0], dtype, name="add_embedding")(features)
    if added is not None:
        emb = emb + added.astype(dtype)
    x = Conv(channels[0], dtype=dtype, name="conv_in")(latents)
    if hint is not None:
        x = x + hint.astype(dtype)
    skips: list[Array] = [x]
    for i, kind in enumerate(cfg.down_block_types):
        attention, last = kind.startswith("Cross"), i == n - 1
        down = block(cfg, DownBlock, i, f"down_blocks.{i}", cfg.layers_per_block, attention, last, dtype, remat)
        x, new = down(x, emb, context, controls)
        skips += new
    mid = block(cfg, MidBlock, n - 1, "mid_block", 1, cfg.mid_attention, False, dtype, remat)
    return WentDown(emb, mid(x, emb, context, controls), tuple(skips))


def block(
    cfg: DownConfig,
    kind: type[Block],
    i: int,
    name: str,
    layers: int,
    attention: bool,
    last: bool,
    dtype: Any,
    remat: bool,
) -> Any:
    """Return a block with the settings of number ``i`` of a config; `remat` recomputes it in the backward pass."""
    # hw of an UpBlock is a Python value that shapes the program: static under remat.
    static_argnums = (6,) if kind is UpBlock else ()
    made = nn.remat(kind, static_argnums=static_argnums) if remat else kind
    return made(
        cfg.block_out_channels[i],
        layers,
        cfg.heads[i],
        cfg.depths[i] if attention else None,
        cfg.norm_num_groups,
        cfg.norm_eps,
        cfg.use_linear_projection,
        last,
        dtype,
        name=name,
    )


def added_features(cfg: DownConfig, added: AddedCond) -> Float[Array, "b f"]:
    """Join the text embedding with the sinusoids of the numbers, float32."""
    if cfg.addition_embed_type is None or cfg.addition_time_embed_dim is None:
        raise InputError(f"unet: added conditioning: found {type(added).__name__}, expected none for this model")
    b, n = added.time_ids.shape
    sinusoids = timestep_embedding(
        jnp.ravel(added.time_ids),
        cfg.addition_time_embed_dim,
        flip_sin_to_cos=cfg.flip_sin_to_cos,
        freq_shift=cfg.freq_shift,
    )
    out = jnp.concatenate([added.text_embeds, sinusoids.reshape(b, n * cfg.addition_time_embed_dim)], -1)
    if out.shape[-1] != cfg.projection_class_embeddings_input_dim:
        raise InputError(
            f"unet: added conditioning: found {added.text_embeds.shape[-1]} text features and {n} numbers of "
            f"{cfg.addition_time_embed_dim}, expected {cfg.projection_class_embeddings_input_dim} in total"
        )
    return out
