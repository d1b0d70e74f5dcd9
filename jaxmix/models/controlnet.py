"""ControlNetModel: the network beside a UNet that turns a picture into residuals of its skips (arXiv 2302.05543).

It has the UNet's way down, run by the same code, with weights of its own. What a small encoder makes of the picture is
added to the output of its first convolution; every skip and the middle block then go through a 1x1 convolution that
starts at zero. That encoder follows the authors' code (3x3, SiLU), not the paper (4x4, ReLU). Keys are diffusers'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from jaxmix.control import KV
from jaxmix.models.attention import Context
from jaxmix.models.blocks import AddedCond, go_down
from jaxmix.models.config import DownConfig, UNetConfig
from jaxmix.models.layers import Conv, Linear
from jaxmix.models.unet import blank_inputs, down_sites, embed_added, keys_and_values
from jaxmix.rows import Text
from jaxmix.types import AnyArray, Array, InputError, Params, shown

HINT = "controlnet_cond_embedding"
"""The name of the encoder of pictures."""

_CHOICES = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "controlnet_conditioning_channel_order": ("rgb", "bgr"),
}


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(DownConfig):
    """Configuration of `ControlNetModel`; fields as in diffusers."""

    cross_attention_dim: int = 1280
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    class_name: ClassVar[str] = "ControlNetModel"
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {**DownConfig.fixed, "conditioning_channels": (3,)}
    from_zero: ClassVar[frozenset[str]] = DownConfig.from_zero | {"transformer_layers_per_block"}

    @classmethod
    def of_unet(cls, unet: UNetConfig, channels: tuple[int, ...] = (16, 32, 96, 256)) -> ControlNetConfig:
        """Return the config of a net for a UNet; ``channels`` are those of its encoder of pictures, level by level."""
        shared = {f.name: getattr(unet, f.name) for f in dataclasses.fields(DownConfig)}
        return cls(**shared, conditioning_embedding_out_channels=channels)

    def check(self) -> None:
        super().check()
        for key, known in _CHOICES.items():
            if (found := getattr(self, key)) not in known:
                raise InputError(
                    f"{self.class_name} config: {key} is {shown(found)}, expected {' or '.join(map(repr, known))}"
                )

    @property
    def mid_attention(self) -> bool:
        """Whether the middle block has attention."""
        return self.mid_block_type == "UNetMidBlock2DCrossAttn"

    @property
    def factor(self) -> int:
        """Pixels of the picture per latent cell along each side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @property
    def outputs(self) -> int:
        """Number of residuals, the middle block's included."""
        return len(self.down_block_types) * (self.layers_per_block + 1) + 1


class Residuals(NamedTuple):
    """What a net adds to the skips of the UNet, in the order in which it goes down, and to its middle block."""

    skips: tuple[Float[Array, "b h w c"], ...]
    middle: Float[Array, "b h w c"]


# Keeps the size of what SiLU passes on (the mean square of SiLU of a normal number is 0.356). With PyTorch's default,
# as the authors start theirs, edges arrive at the last convolution hundreds of times smaller, and are seen much later.
_KEEPS = nn.initializers.variance_scaling(1 / 0.356, "fan_in", "truncated_normal")


class HintEncoder(nn.Module):
    """The encoder of pictures: a pair of 3x3 convolutions a level, the second halving each side, between two others."""

    config: ControlNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pictures: Float[AnyArray, "b H W c"]) -> Float[Array, "b h w o"]:
        first, *rest = self.config.conditioning_embedding_out_channels
        how: dict[str, Any] = {"dtype": self.dtype, "kernel_init": _KEEPS}
        x = nn.silu(Conv(first, **how, name="conv_in")(pictures))
        for i, channels in enumerate(rest):
            x = nn.silu(Conv(x.shape[-1], **how, name=f"blocks.{2 * i}")(x))
            x = nn.silu(Conv(channels, 2, **how, name=f"blocks.{2 * i + 1}")(x))
        zeros = nn.initializers.zeros
        return Conv(self.config.block_out_channels[0], dtype=self.dtype, kernel_init=zeros, name="conv_out")(x)


class ControlNetModel(nn.Module):
    """A ControlNet (arXiv 2302.05543), NHWC, parameters under diffusers' names.

    ``dtype`` and ``remat`` as for `jaxmix.models.unet.UNet2DConditionModel`. No control reaches inside.
    """

    config: ControlNetConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        latents: Float[AnyArray, "b h w c"],
        t: ArrayLike,
        context: Context,
        hint: Float[AnyArray, "b h w c2"],
        added: AddedCond | Float[AnyArray, "b e"] | None = None,
    ) -> Residuals:
        """Return the residuals for latents (b, h, w, c) at timesteps ``t`` and the result of `embed_hint`.

        ``context`` and ``added`` are those of the UNet, or what `embed_text` makes of them.
        """

        def zero_conv(x: Array, name: str) -> Array:
            zeros = nn.initializers.zeros
            return Linear(x.shape[-1], conv=True, dtype=self.dtype, kernel_init=zeros, name=name)(x)

        how: dict[str, Any] = {"dtype": self.dtype, "remat": self.remat}
        _, middle, skips = go_down(self.config, latents, t, context, (), added, jnp.asarray(hint), **how)
        made = tuple(zero_conv(x, f"controlnet_down_blocks.{i}") for i, x in enumerate(skips))
        return Residuals(made, zero_conv(middle, "controlnet_mid_block"))

    @nn.nowrap
    def embed_hint(self, params: Params, pictures: Float[AnyArray, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Return what the net makes of pictures, RGB in [0, 1]; it depends on neither latents nor step."""
        if self.config.controlnet_conditioning_channel_order == "bgr":
            pictures = pictures[..., ::-1]
        return HintEncoder(self.config, self.dtype, parent=None).apply({"params": params[HINT]}, pictures)

    @nn.nowrap
    def embed_text(
        self, params: Params, text: Text, latent_hw: tuple[int, int]
    ) -> tuple[dict[str, KV], Float[Array, "b e"] | None]:
        """Return the keys and values of every attn2, and the embedding of SDXL's conditioning, for rows of text.

        Neither depends on latents or step: `__call__` takes them in place of the context and of ``added``.
        """
        there = down_sites(self.config, latent_hw)
        kv = keys_and_values(there, params, text.context, self.dtype)
        if text.pooled is None or text.time_ids is None:
            return kv, None
        return kv, embed_added(self.config, params, AddedCond(text.pooled, text.time_ids), self.dtype)

    @nn.nowrap
    def init_params(self, key: Array) -> Params:
        """Return fresh float32 parameters, with which all residuals are zero."""

        def init(key: Array) -> Params:
            cfg, keys = self.config, jax.random.split(key)
            latents, t, context, added = blank_inputs(cfg, (8, 8))
            hint = jnp.zeros((*latents.shape[:-1], cfg.block_out_channels[0]))
            own = HintEncoder(cfg, parent=None).init(keys[0], jnp.zeros((1, cfg.factor, cfg.factor, 3)))["params"]
            rest = self.clone(remat=False, parent=None).init(keys[1], latents, t, context, hint, added)["params"]
            return {**rest, HINT: own}

        return jax.jit(init)(key)

    @nn.nowrap
    def copy_params(self, key: Array, unet: Params) -> Params:
        """Return the parameters of a net at the start of its training, as the authors begin.

        The way down is copied from a UNet's, the encoder of pictures is random but for its last convolution, and all
        residuals are zero.
        """
        shapes = self.abstract_params()
        size = self.config.factor
        hint = jax.jit(HintEncoder(self.config, parent=None).init)(key, jnp.zeros((1, size, size, 3)))["params"]
        copied = {name: unet[name] for name in shapes if name in unet}
        rest = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), copied) | {HINT: hint}
        zeros = {name: shape for name, shape in shapes.items() if name not in rest}
        return rest | jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros)

    @nn.nowrap
    def abstract_params(self) -> Params:
        """Return the parameter tree as ShapeDtypeStructs, without computing anything."""
        return jax.eval_shape(self.init_params, jax.random.key(0))
