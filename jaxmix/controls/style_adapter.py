"""StyleAdapter: A Unified Stylized Image Generation Model (arXiv 2309.01770).

In every attn2 the style has a path of its own beside the text's, with the same queries::

    x = softmax(Q K_t' / sqrt(d)) V_t + scale * lambda_l * softmax(Q K_s' / sqrt(d)) V_s

with lambda_l learnt, one for each layer. K_s and V_s are projections of a few style tokens, which StyEmb makes
(`style_tokens`) of what CLIP sees in any number of pictures of one style. So that content does not come along, the
state of the whole picture (CLIP's class token) is dropped, the patches of each picture are shuffled before they get
their positions, and the states of several pictures are joined along the tokens.

There is no public code, and this was written from the abstract and the published reviews. Where they say nothing the
choice is ours: StyEmb has the form of T2I-Adapter's style head (arXiv 2302.08453), learnt tokens after the states, a
norm, blocks of self-attention over all of them, a norm and a projection of the learnt ones; lambda begins at 0;
unconditional rows have style tokens of zeros, which add nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxmix import kernels
from jaxmix.controls.ip_adapter import IPAdapterControl
from jaxmix.controls.ip_adapter import bind as bind_pictures
from jaxmix.controls.networks import dense, norm
from jaxmix.types import AnyArray, Array, InputError, Params

HEADS = 8


def style_tokens(params: Params, states: Float[AnyArray, "b s d"], heads: int = HEADS) -> Float[Array, "b t c"]:
    """Return the style tokens of CLIP's states of patches; the order of the states does not matter."""
    x = jnp.asarray(states)
    learnt = jnp.broadcast_to(params["style_embedding"].astype(x.dtype), (len(x), *params["style_embedding"].shape[1:]))
    x = norm(params["ln_pre"], jnp.concatenate([x, learnt], 1))
    for i in range(depth(params)):
        block = params[f"blocks.{i}"]
        x = x + _attend(block, norm(block["ln_1"], x), heads)
        y = dense(block["c_fc"], norm(block["ln_2"], x))
        x = x + dense(block["c_proj"], y * jax.nn.sigmoid(1.702 * y))
    return dense(params["proj"], norm(params["ln_post"], x[:, -learnt.shape[1] :]))


def depth(params: Params) -> int:
    """Return the number of blocks of a StyEmb."""
    return len([name for name in params if name.startswith("blocks.")])


def widths(params: Params) -> tuple[int, int]:
    """Return the width of the states that a StyEmb reads, and that of the text that the UNet attends to."""
    width, context = params["proj"]["kernel"].shape
    return width, context


def init_style_tokens(key: Array, width: int, context: int, tokens: int = 8, blocks: int = 3) -> dict[str, Any]:
    """Return a fresh StyEmb for states of ``width`` and text of ``context`` channels, float32."""
    if width % HEADS:
        raise InputError(f"StyleAdapter: found an image encoder of {width} channels, expected a multiple of {HEADS}")
    keys = iter(jax.random.split(key, 4 * blocks + 2))

    def linear(i: int, o: int, bias: bool = True) -> dict[str, Any]:
        kernel = {"kernel": jax.random.normal(next(keys), (i, o)) * i**-0.5}
        return {**kernel, "bias": jnp.zeros(o)} if bias else kernel

    def layer_norm() -> dict[str, Any]:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    made = {
        "style_embedding": jax.random.normal(next(keys), (1, tokens, width)) * width**-0.5,
        "ln_pre": layer_norm(),
        "ln_post": layer_norm(),
        "proj": linear(width, context, False),
    }
    for i in range(blocks):
        made[f"blocks.{i}"] = {
            "ln_1": layer_norm(),
            "in_proj": linear(width, 3 * width),
            "out_proj": linear(width, width),
            "ln_2": layer_norm(),
            "c_fc": linear(width, 4 * width),
            "c_proj": linear(4 * width, width),
        }
    return made


def bind(
    layers: Mapping[str, Params],
    tokens: Float[AnyArray, "b t c"],
    *,
    scale: Float[AnyArray, " b"],
    at_site: Mapping[str, Any],
    window: tuple[float, float] = (0.0, 1.0),
) -> IPAdapterControl:
    """Return the control for style tokens; ``at_site`` is lambda of every attn2 that has the style's path."""
    tokens = jnp.asarray(tokens)[:, None]
    scale = jnp.asarray(scale, jnp.float32)[:, None]
    return bind_pictures(layers, tokens, 0 * tokens, scale=scale, at_site=at_site, window=window)


def _attend(block: Params, x: Float[Array, "b s d"], heads: int) -> Float[Array, "b s d"]:
    q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in jnp.split(dense(block["in_proj"], x), 3, -1))
    return dense(block["out_proj"], kernels.plain(q, k, v).reshape(x.shape))
