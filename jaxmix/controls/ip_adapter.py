"""IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models (arXiv 2308.06721).

In every attn2 the image has a softmax of its own beside the text's, with the same queries::

    x = softmax(Q K_t' / sqrt(d)) V_t + scale * softmax(Q K_i' / sqrt(d)) V_i

K_i and V_i are projections, without a bias, of a few tokens that a small network makes of what CLIP sees. The published
adapters have three such networks (`project`): "base" makes 4 tokens of the projected embedding, "plus" 16 of the states
before the last layer by a Perceiver resampler, "full" one of each of those states. The unconditional rows attend to the
tokens of no picture: of an embedding of zeros for "base", of a grey picture for the others.

Keys and values do not depend on the timestep, so they are made once, outside the denoising loop.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmix import kernels
from jaxmix.control import KV, QKV, Control, Site
from jaxmix.controls.networks import dense, norm
from jaxmix.rows import dataclass, gate, like, per_row
from jaxmix.types import AnyArray, Array, InputError, Params

ATTN2 = r"\.attn2$"
KINDS = ("base", "plus", "full")
_HEAD = 64  # channels of each head of the resampler


@dataclass
class IPAdapterControl(Control):
    """Add the attention to pictures at every attn2 that has keys and values for them.

    ``shown`` and ``none`` map a site's name to the keys and values of an image's pictures, and of no picture, (rows, m,
    T, d_inner) each: m pictures that share one softmax if there are no masks, and have one each if there are.
    ``scale`` is (rows, m), and ``at_site`` multiplies it at each site. ``masks`` maps each grid to (rows, m, cells).
    ``live`` says which rows see their pictures: all but the unconditional ones.
    """

    shown: dict[str, KV] = per_row()
    none: dict[str, KV] = per_row()
    scale: Float[Array, "b m"] = per_row()
    at_site: dict[str, Float[Array, ""]]
    live: Float[Array, " b"] = gate()
    masks: dict[str, Float[Array, "b m n"]] | None = per_row(default=None)

    def out(self, site: Site, a: QKV, o: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
        """Add what the pictures say."""
        if site.name not in self.shown:
            return o
        b, n, h, d = a.q.shape

        def seen(x: Array, y: Array) -> Array:  # (b, m, T, h d) to (b, m, T, h, d)
            x = jnp.where(like(self.live, x) > 0.5, x, y).astype(a.v.dtype)
            return x.reshape(*x.shape[:3], h, d)

        k, v = (seen(x, y) for x, y in zip(self.shown[site.name], self.none[site.name], strict=True))
        m, t = k.shape[1:3]
        scale = (self.scale * self.at_site[site.name]).astype(o.dtype)
        if self.masks is None:
            k, v = (x.reshape(b, m * t, h, d) for x in (k, v))
            seen_all = kernels.choose(n, m * t, d, a.v.dtype, b * h)(a.q, k, v)
            return o + scale[:, 0, None, None, None] * seen_all
        mask = self.masks[grid_name(site.hw)].astype(o.dtype)
        attend = kernels.choose(n, t, d, a.v.dtype, b * h)
        for i in range(m):
            o = o + (scale[:, i, None] * mask[:, i])[..., None, None] * attend(a.q, k[:, i], v[:, i])
        return o

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse keys and values for sites that this UNet lacks."""
        if missing := sorted(set(self.shown) - {s.name for s in sites}):
            raise InputError(f"IP-Adapter: found no {missing[0]} in this UNet, expected the adapter's layers")


def grid_name(hw: tuple[int, int]) -> str:
    """Return the key of a grid in a dictionary of masks."""
    return f"{hw[0]}x{hw[1]}"


def bind(
    layers: Mapping[str, Params],
    tokens: Float[Array, "b m t c"],
    none: Float[Array, "b m t c"],
    *,
    scale: Float[AnyArray, "b m"],
    at_site: Mapping[str, float],
    masks: Mapping[str, AnyArray] | None = None,
    window: tuple[float, float] = (0.0, 1.0),
) -> IPAdapterControl:
    """Return the control for tokens of pictures, and of no picture.

    ``layers`` maps each attn2 to {"to_k", "to_v": {"kernel" (c, d_inner)}}; sites that are not in ``at_site``, which
    multiplies the scale, do without pictures.
    """
    shown, empty = (project_kv({name: layers[name] for name in at_site}, x) for x in (tokens, none))
    rows = max(tokens.shape[0], np.shape(scale)[0])
    return IPAdapterControl(
        shown=shown,
        none=empty,
        scale=jnp.asarray(scale, jnp.float32),
        at_site={name: jnp.asarray(value, jnp.float32) for name, value in at_site.items()},
        live=jnp.ones((rows,), jnp.float32),
        masks=None if masks is None else {grid: jnp.asarray(x, jnp.float32) for grid, x in masks.items()},
        sites=ATTN2,
        window=window,
    )


@jax.jit
def project_kv(layers: Mapping[str, Params], tokens: Float[Array, "b m t c"]) -> dict[str, KV]:
    """Return the keys and values (b, m, t, d_inner) of tokens at every layer."""

    def one(layer: Params) -> KV:
        return KV(*(tokens @ layer[name]["kernel"].astype(tokens.dtype) for name in ("to_k", "to_v")))

    return {name: one(layer) for name, layer in layers.items()}


# Networks that make tokens ------------------------------------------------------------------------------------------


def project(kind: str, params: Params, seen: Array) -> Float[Array, "b t c"]:
    """Return the tokens of pictures from what CLIP sees in them: its projection (b, p) for "base", else states."""
    return {"base": _base, "plus": _plus, "full": _full}[kind](params, seen)


def init_projection(key: Array, kind: str, width: int, context: int, tokens: int | None = None) -> dict[str, Any]:
    """Return a fresh network for CLIP's outputs of a ``width`` and text of ``context`` channels, float32.

    ``tokens`` is 4 for "base" and 16 for "plus" if None. Dense layers begin like torch's, which the authors train.
    """
    keys = iter(jax.random.split(key, 64))

    def linear(i: int, o: int, bias: bool = True) -> dict[str, Any]:
        bound = i**-0.5
        made = {"kernel": jax.random.uniform(next(keys), (i, o), jnp.float32, -bound, bound)}
        return {**made, "bias": jax.random.uniform(next(keys), (o,), jnp.float32, -bound, bound)} if bias else made

    def layer_norm(n: int) -> dict[str, Any]:
        return {"scale": jnp.ones(n), "bias": jnp.zeros(n)}

    if kind == "base":
        return {"proj": linear(width, (tokens or 4) * context), "norm": layer_norm(context)}
    if kind == "full":
        return {"proj.0": linear(width, width), "proj.2": linear(width, context), "proj.3": layer_norm(context)}
    inner = context if context < 1280 else 1280  # as in the published ones
    inner = -(-inner // _HEAD) * _HEAD
    made = {
        "latents": jax.random.normal(next(keys), (1, tokens or 16, inner)) * inner**-0.5,
        "proj_in": linear(width, inner),
        "proj_out": linear(inner, context),
        "norm_out": layer_norm(context),
    }
    for i in range(4):
        made[f"layers.{i}.0"] = {
            "norm1": layer_norm(inner),
            "norm2": layer_norm(inner),
            "to_q": linear(inner, inner, False),
            "to_kv": linear(inner, 2 * inner, False),
            "to_out": linear(inner, inner, False),
        }
        made[f"layers.{i}.1"] = {
            "0": layer_norm(inner),
            "1": linear(inner, 4 * inner, False),
            "3": linear(4 * inner, inner, False),
        }
    return made


def tokens_of(kind: str, params: Params) -> int:
    """Return how many tokens a picture becomes; 257 states of CLIP are assumed for "full"."""
    if kind == "base":
        return params["proj"]["kernel"].shape[1] // params["norm"]["scale"].shape[0]
    return params["latents"].shape[1] if kind == "plus" else 257


def widths(kind: str, params: Params) -> tuple[int, int]:
    """Return the width of what CLIP must give, and that of the text that the UNet attends to."""
    if kind == "base":
        return params["proj"]["kernel"].shape[0], params["norm"]["scale"].shape[0]
    if kind == "plus":
        return params["proj_in"]["kernel"].shape[0], params["proj_out"]["kernel"].shape[1]
    return params["proj.0"]["kernel"].shape[0], params["proj.2"]["kernel"].shape[1]


def _base(params: Params, embedding: Float[Array, "b p"]) -> Float[Array, "b t c"]:
    width = params["norm"]["scale"].shape[0]
    return norm(params["norm"], dense(params["proj"], embedding).reshape(embedding.shape[0], -1, width))


def _full(params: Params, states: Float[Array, "b s d"]) -> Float[Array, "b s c"]:
    x = jax.nn.gelu(dense(params["proj.0"], states), approximate=False)
    return norm(params["proj.3"], dense(params["proj.2"], x))


def _plus(params: Params, states: Float[Array, "b s d"]) -> Float[Array, "b t c"]:
    x = dense(params["proj_in"], states)
    latents = jnp.broadcast_to(params["latents"].astype(x.dtype), (x.shape[0], *params["latents"].shape[1:]))
    for i in range(depth(params)):
        latents = latents + _perceive(params[f"layers.{i}.0"], x, latents)
        y = norm(params[f"layers.{i}.1"]["0"], latents)
        y = jax.nn.gelu(dense(params[f"layers.{i}.1"]["1"], y), approximate=False)
        latents = latents + dense(params[f"layers.{i}.1"]["3"], y)
    return norm(params["norm_out"], dense(params["proj_out"], latents))


def depth(params: Params) -> int:
    """Return the number of layers of a resampler."""
    return len([name for name in params if name.startswith("layers.") and name.endswith(".0")])


def _perceive(params: Params, x: Array, latents: Array) -> Array:
    """Let the latents attend to the states and to themselves."""
    x, q = norm(params["norm1"], x), norm(params["norm2"], latents)
    k, v = jnp.split(dense(params["to_kv"], jnp.concatenate([x, q], 1)), 2, axis=-1)
    q, k, v = (y.reshape(*y.shape[:2], -1, _HEAD) for y in (dense(params["to_q"], q), k, v))
    o = kernels.plain(q, k, v)
    return dense(params["to_out"], o.reshape(*o.shape[:2], -1))


# Masks --------------------------------------------------------------------------------------------------------------


def mask_grids(masks: Float[np.ndarray, "b m H W"], grids: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Return masks of 0 and 1 at every grid, (b, m, cells), resized as in diffusers: bicubic, without antialiasing."""
    made = {}
    for hw in grids:
        down, right = (_bicubic(size, to) for size, to in zip(masks.shape[2:], hw, strict=True))
        made[grid_name(hw)] = np.einsum("hy,bmyx,wx->bmhw", down, masks, right).reshape(*masks.shape[:2], -1)
    return made


@functools.cache
def _bicubic(size: int, to: int) -> np.ndarray:
    """Return the matrix (to, size) of torch's bicubic interpolation (a = -0.75), which repeats the border."""
    weights = np.zeros((to, size))
    for i in range(to):
        centre = (i + 0.5) * size / to - 0.5
        low = int(np.floor(centre))
        for tap in range(low - 1, low + 3):
            x = abs(centre - tap)
            inner = (1.25 * x - 2.25) * x * x + 1
            outer = ((-0.75 * x + 3.75) * x - 6) * x + 3
            weights[i, min(max(tap, 0), size - 1)] += inner if x <= 1 else outer if x < 2 else 0.0
    return weights


def as_parameters(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a file's tensors, by their last name, in our layout: kernels (in, out), scales of norms."""
    made: dict[str, Any] = {}
    for key, array in held.items():
        *modules, leaf = key.split(".")
        if leaf == "weight":
            leaf, array = ("kernel", np.ascontiguousarray(array.T)) if array.ndim == 2 else ("scale", array)
        module = ".".join(modules)
        if module.startswith("layers.") and len(modules) > 3:  # layers.0.1.3 is entry "3" of "layers.0.1"
            node = made.setdefault(".".join(modules[:3]), {}).setdefault(".".join(modules[3:]), {})
        else:
            node = made.setdefault(module, {}) if module else made
        node[leaf] = array
    return made
