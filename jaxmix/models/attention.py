"""The transformer inside a UNet: self- and cross-attention through `jaxmix.control.attend`, and the feed-forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxmix.control import KV, QKV, Control, Site, Told, apply_kv, apply_told, attend
from jaxmix.models.layers import GroupNorm, LayerNorm, Linear
from jaxmix.types import AnyArray, Array

Context: TypeAlias = AnyArray | Mapping[str, KV]
"""Text states (b, s, d), or the keys and values that `UNet2DConditionModel.precompute` made from them."""


class Attention(nn.Module):
    """Multi-head attention under controls, named and laid out as in diffusers (``to_q``, ``to_k``, ``to_v``, ...).

    The collections ``qkv`` (a `QKV` as projected, before controls) and ``probs`` (b, heads, n, s) are recorded if they
    are mutable, each under the site's name.
    """

    heads: int
    features: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        def linear(name: str, use_bias: bool) -> Linear:
            return Linear(self.features, use_bias, dtype=self.dtype, name=name)

        self.to_q = linear("to_q", False)
        self.to_k = linear("to_k", False)
        self.to_v = linear("to_v", False)
        self.to_out = linear("to_out.0", True)

    def split(self, x: Array) -> Float[Array, "b n h d"]:
        return x.reshape(*x.shape[:2], self.heads, self.features // self.heads)

    def kv(self, context: Float[AnyArray, "b s c"] | Told) -> KV:
        """Project a context to keys and values; needs no queries, so it can run outside the denoising loop."""
        c = context if isinstance(context, Told) else Told(context, context)
        return KV(self.split(self.to_k(c.k)), self.split(self.to_v(c.v)))

    def __call__(
        self,
        x: Float[Array, "b n c"],
        hw: tuple[int, int],
        context: Float[AnyArray, "b s c2"] | KV | None,
        controls: Sequence[Control],
    ) -> Float[Array, "b n c"]:
        site = Site(".".join(self.path), self.heads, hw)
        if isinstance(context, KV):  # precomputed: the kv stage of the controls is already in it
            kv = context
        elif context is not None:
            kv = apply_kv(site, self.kv(apply_told(site, context, controls)), controls)
        else:
            kv = self.kv(x)
        a = QKV(self.split(self.to_q(x)), *kv)
        if self.is_mutable_collection("qkv"):
            self.sow("qkv", "qkv", a, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        record = self.is_mutable_collection("probs")
        o, probs = attend(site, a, controls, return_probs=record)
        if record:
            self.sow("probs", "probs", probs, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return self.to_out(o.reshape(*x.shape[:2], self.features))


class GEGLU(nn.Module):
    """Gated linear unit with the exact GELU (arXiv 2002.05202)."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b f"]:
        y, g = jnp.split(Linear(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return y * jax.nn.gelu(g, approximate=False)


class FeedForward(nn.Module):
    """GEGLU of four times the width, then back."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        y = GEGLU(4 * x.shape[-1], dtype=self.dtype, name="net.0")(x)
        return Linear(x.shape[-1], dtype=self.dtype, name="net.2")(y)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each with its LayerNorm before and a residual around."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], hw: tuple[int, int], context: Context, controls: Sequence[Control]
    ) -> Float[Array, "b n c"]:
        c = x.shape[-1]
        if isinstance(context, Mapping):
            context = context[".".join((*self.path, "attn2"))]

        def norm(name: str) -> LayerNorm:
            return LayerNorm(dtype=self.dtype, name=name)

        attn1 = Attention(self.heads, c, self.dtype, name="attn1")
        attn2 = Attention(self.heads, c, self.dtype, name="attn2")
        x = x + attn1(norm("norm1")(x), hw, None, controls)
        x = x + attn2(norm("norm2")(x), hw, context, controls)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class Transformer2DModel(nn.Module):
    """``depth`` transformer blocks over the pixels of a feature map, with a residual around all of them."""

    heads: int
    depth: int
    groups: int
    linear: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Context, controls: Sequence[Control]
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape

        def project(name: str, y: Array) -> Array:
            return Linear(c, conv=not self.linear, dtype=self.dtype, name=name)(y)

        y = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x, controls).reshape(b, h * w, c)
        y = project("proj_in", y)
        for i in range(self.depth):
            y = BasicTransformerBlock(self.heads, self.dtype, name=f"transformer_blocks.{i}")(
                y, (h, w), context, controls
            )
        return x + project("proj_out", y).reshape(b, h, w, c)
