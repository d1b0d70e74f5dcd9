"""Decode large latents tile by tile, in the memory of one tile."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmix.types import Array, InputError


def decode_tiled(
    decode: Callable[[Float[Array, "b h w c"]], Float[Array, "b H W k"]],
    z: Float[Array, "b h w c"],
    tile: int,
    overlap: int,
) -> Float[Array, "b H2 W2 k"]:
    """Decode latents in overlapping tiles that fade into each other, float32.

    ``tile`` is the side of a square tile and ``overlap`` the minimum that neighbours share, both in latent cells; a
    tile is cut to the image if that is smaller. All tiles have the same size and run one after another through one
    compiled decoder. Latents that fit one tile are decoded directly, bit for bit.

    The GroupNorms and the attention of the decoder see a tile, not the image, so colours may differ slightly from tile
    to tile; across an overlap the weights of two tiles are linear and sum to one, which hides that, the better the
    larger the overlap. Raises `InputError` unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise InputError(f"tile: found {tile} with overlap {overlap}, expected 0 <= overlap < tile (latent cells)")
    b, h, w, c = z.shape
    th, tw = min(tile, h), min(tile, w)
    if (th, tw) == (h, w):
        return decode(z).astype(jnp.float32)
    rows, cols = _starts(h, th, overlap), _starts(w, tw, overlap)
    corners = jnp.asarray([(y, x) for y in rows for x in cols], jnp.int32)

    def one(corner: Array) -> Array:
        zero = jnp.zeros((), jnp.int32)
        return decode(jax.lax.dynamic_slice(z, (zero, *corner, zero), (b, th, tw, c))).astype(jnp.float32)

    # A list of tiles, not a canvas carried by the loop: the tiles are small compared with the decoder's activations,
    # and a carry would have to be marked as varying under shard_map.
    tiles = jax.lax.map(one, corners)
    factor = tiles.shape[2] // th
    tiles = tiles.reshape(len(rows), len(cols), *tiles.shape[1:])
    bands = _join(tiles, cols, w, factor, position=1, axis=3)
    return _join(bands, rows, h, factor, position=0, axis=1)


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return the starts of the fewest tiles that cover ``size`` cells with at least ``overlap`` cells shared."""
    if tile >= size:
        return [0]
    n = -(-(size - overlap) // (tile - overlap))
    return [i * (size - tile) // (n - 1) for i in range(n)]


def _weights(starts: list[int], tile: int, size: int) -> np.ndarray:
    """Return the weights of each tile's pixels along one axis, (tiles, tile), which sum to one at each pixel.

    They are linear where two neighbours overlap, and flat elsewhere.
    """
    at = np.arange(tile) + 0.5
    weights = np.ones((len(starts), tile))
    for i, start in enumerate(starts):
        if i > 0 and (shared := starts[i - 1] + tile - start):
            weights[i] = np.minimum(weights[i], at / shared)
        if i + 1 < len(starts) and (shared := start + tile - starts[i + 1]):
            weights[i] = np.minimum(weights[i], (tile - at) / shared)
    total = np.zeros(size)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    return np.stack([weight / total[start : start + tile] for start, weight in zip(starts, weights, strict=True)])


def _join(tiles: Array, starts: list[int], size: int, factor: int, *, position: int, axis: int) -> Array:
    """Blend tiles along one image axis.

    ``position`` is the axis of the tiles, which is removed; ``axis`` is the image axis in the result.
    """
    side = tiles.shape[axis + 1]
    pixels = [start * factor for start in starts]
    weights = _weights(pixels, side, size * factor)
    edges = sorted({edge for start in pixels for edge in (start, start + side)})
    # Stretch by stretch between the edges of tiles, rather than as a sum of padded tiles, each as large as the image.
    stretches = []
    for low, high in itertools.pairwise(edges):
        parts = []
        for i, start in enumerate(pixels):
            if start <= low and high <= start + side:
                part = jax.lax.index_in_dim(tiles, i, position, keepdims=False)
                part = jax.lax.slice_in_dim(part, low - start, high - start, axis=axis)
                weight = jnp.asarray(weights[i, low - start : high - start], jnp.float32)
                parts.append(part * weight.reshape(-1, *(1,) * (part.ndim - axis - 1)))
        stretches.append(functools.reduce(jnp.add, parts))
    return jnp.concatenate(stretches, axis)
