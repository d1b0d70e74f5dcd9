"""The smaller compiled programs of a pipeline: decoding, encoding images and text, start noise."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from jaxmix.models import AutoencoderKL, CLIPTextModel
from jaxmix.models.clip import TextStates
from jaxmix.models.tiling import decode_tiled
from jaxmix.pipeline.job import over_rows
from jaxmix.samplers import initial_noise
from jaxmix.sharding import DATA
from jaxmix.types import Array, Params

_LARGE = 512 * 512  # pixels from which images are decoded one at a time: one fills a device, in the memory of one


@functools.partial(jax.jit, static_argnames=("vae", "mesh", "tile"))
def decode(
    vae: AutoencoderKL, mesh: Mesh | None, tile: int | None, params: Params, latents: Float[Array, "n h w c"]
) -> Array:
    """Decode scaled latents to images (n, H, W, 3) in [0, 1], float32; ``tile`` as in `decode_tiled`."""

    def images(z: Array) -> Array:
        def whole(z: Array) -> Array:
            return vae.apply({"params": params}, z, method="decode")

        return whole(z) if tile is None else decode_tiled(whole, z, tile, tile // 4)

    def run(params: Params, latents: Array) -> Array:
        n, h, w, _ = latents.shape
        z = latents / vae.config.scaling_factor
        one_by_one = n > 1 and h * w * vae.config.factor**2 >= _LARGE
        x = jax.lax.map(lambda row: images(row[None])[0], z) if one_by_one else images(z)
        x = x / 2 + 0.5
        return jnp.where(jnp.isfinite(x), jnp.clip(x, 0.0, 1.0), jnp.nan)  # an infinity is no black or white

    return over_rows(run, mesh, (PartitionSpec(), PartitionSpec(DATA)))(params, latents)


@functools.partial(jax.jit, static_argnames=("vae",))
def encode_images(vae: AutoencoderKL, params: Params, images: Float[Array, "n H W 3"]) -> Float[Array, "n h w c"]:
    """Encode images in [0, 1] to scaled latents: the mean of the posterior, so that nothing is random."""
    mean, _ = vae.apply({"params": params}, images * 2 - 1, method="encode")
    return mean * vae.config.scaling_factor


@functools.partial(jax.jit, static_argnames=("text_encoder", "clip_skip"))
def encode_ids(
    text_encoder: CLIPTextModel,
    params: Params,
    ids: Array,
    seen: Array | None = None,
    more: Array | None = None,
    clip_skip: int = 0,
) -> TextStates:
    """Encode token ids (b, s); the other arguments are those of `CLIPTextModel`."""
    return text_encoder.apply({"params": params}, ids, seen, more, clip_skip)


draw_noise = jax.jit(initial_noise, static_argnames=("shape",))
