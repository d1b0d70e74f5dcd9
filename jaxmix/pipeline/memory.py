"""How much memory drawing one image takes at least, before anything is compiled.

The programs are traced, which computes nothing, and their largest matrix product or convolution is looked up: its
operands and its result must be there at the same time, whatever XLA does with the rest. So a size that is refused would
have failed, and one that is not may still fail.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxmix.models.unet import AddedCond
from jaxmix.pipeline.parts import Parts
from jaxmix.sharding import device_bytes
from jaxmix.types import InputError

_SMALL = 512 * 512  # pixels up to which nobody needs to ask
_PRODUCTS = ("dot_general", "conv_general_dilated")


def least_bytes(
    parts: Parts, hw: tuple[int, int], tile: int | None = None, encodes: bool = False, branches: int = 2
) -> int:
    """Return the bytes that drawing an image with latents of size ``hw`` takes at least, the weights included.

    The ``branches`` of guidance run together. ``tile`` (latent cells) is that of the decoder, ``encodes`` whether a
    picture of that size is encoded, too.
    """
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parts.params["unet"]))
    return weights + max(_largest_products(parts, hw, tile, encodes, branches))


def drawing_bytes(
    parts: Parts, hw: tuple[int, int], images: int, branches: int, tile: int | None = None, encodes: bool = False
) -> int:
    """Return the bytes that a device needs at least to draw several images at a time, with all weights of a model."""
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(dict(parts.params)))
    return weights + images * max(_largest_products(parts, hw, tile, encodes, branches))


def _largest_products(parts: Parts, hw: tuple[int, int], tile: int | None, encodes: bool, branches: int) -> list[int]:
    """Return the bytes of the largest product of each network for one image."""
    cfg, (h, w) = parts.unet.config, hw
    added = None
    if cfg.addition_embed_type is not None:
        assert cfg.projection_class_embeddings_input_dim is not None and cfg.addition_time_embed_dim is not None
        pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
        shapes: tuple[Any, Any] = (_shape(branches, pooled), _shape(branches, 6))
        added = AddedCond(*shapes)
    context = _shape(branches, parts.text_length, cfg.cross_attention_dim)
    latents = _shape(branches, h, w, cfg.in_channels)

    def predict(params: Any, x: Any, context: Any, added: Any) -> Any:
        return parts.unet.apply({"params": params}, x, 0, context, (), added)

    found = [_largest(jax.make_jaxpr(predict)(parts.params["unet"], latents, context, added).jaxpr)]
    factor = parts.vae.config.factor
    th, tw = (h, w) if tile is None else (min(h, tile), min(w, tile))
    coded = [("decode", (1, th, tw, parts.vae.config.latent_channels))]
    if encodes:
        coded.append(("encode", (1, h * factor, w * factor, parts.vae.config.in_channels)))
    for method, shape in coded:
        run = functools.partial(parts.vae.apply, method=method)
        traced = jax.make_jaxpr(run)({"params": parts.params["vae"]}, _shape(*shape))
        found.append(_largest(traced.jaxpr))
    return found


def check_size(
    parts: Parts,
    known: dict[Any, int],
    hw: tuple[int, int],
    tile: int | None = None,
    encodes: bool = False,
    branches: int = 2,
) -> None:
    """Raise `InputError` if an image needs more than a device has; ``known`` keeps what was found for each size."""
    if is_small(parts, hw) or (there := device_bytes()) is None:
        return
    asked = hw, tile, encodes, branches
    height, width = (side * parts.vae.config.factor for side in hw)
    needed = height * width * 3 * 4  # the picture alone: no program is traced for a size of which that is too much
    if needed <= there:
        if asked not in known:
            known[asked] = least_bytes(parts, hw, tile, encodes, branches)
        needed = known[asked]
    if needed > there:
        needed = min(needed, 2**80)
        raise InputError(
            f"height and width: found {height} x {width} pixels, which take at least {needed / 2**30:.1f} GiB of "
            f"memory, expected no more than the {there / 2**30:.1f} GiB here ({jax.local_devices()[0].platform})"
        )


def is_small(parts: Parts, hw: tuple[int, int]) -> bool:
    """Return whether images of that size need no second thought: no larger than what the model was made for."""
    own = math.prod(parts.latent_shape[:2])
    return math.prod(hw) <= max(own, _SMALL // parts.vae.config.factor**2)


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _largest(jaxpr: Any) -> int:
    """Return the bytes of the operands and the result of the largest product in a program.

    Of branches, such as the kernels for several platforms, the cheapest is taken: one of them runs.
    """
    found = [0]
    for e in jaxpr.eqns:
        if e.primitive.name in _PRODUCTS:
            found.append(sum(map(_bytes, (*e.invars, *e.outvars))))
        held = jax.tree.leaves(list(e.params.values()), is_leaf=_is_jaxpr)
        inner = [_largest(getattr(x, "jaxpr", x)) for x in held if _is_jaxpr(x)]
        if inner:
            found.append(min(inner) if e.primitive.name == "cond" else max(inner))
    return max(found)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _bytes(var: Any) -> int:
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize
