"""The compiled programs of a pipeline: one each for denoising, decoding, encoding images and encoding text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from jaxmix import control as seam
from jaxmix.control import Controls
from jaxmix.models import AddedCond, AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from jaxmix.models.clip import TextStates
from jaxmix.models.tiling import decode_tiled
from jaxmix.samplers import Phase, Solver, classifier_free_guidance, initial_noise, inpaint, noised, sample, step_noise
from jaxmix.sharding import DATA
from jaxmix.types import Array, ModelFn, Params

_LARGE = 512 * 512  # pixels from which images are decoded one at a time: one fills a device, and memory is one's


@struct.dataclass
class Job:
    """What a batch of n images is drawn from; every leaf has one row an image, so that it shards as it is.

    ``noise`` (n, h, w, c) is standard normal; ``context`` (n, 2, s, d) and ``added`` hold the unconditional and the
    conditional branch. ``guidance_rescale`` None is 0. ``image`` (n, h, w, c) are scaled latents to start from, and
    ``mask`` (n, h, w, 1) is 1 where they are to be repainted. ``seeds`` (n,) uint32 are for stochastic solvers.
    """

    noise: Float[Array, "n h w c"]
    context: Float[Array, "n 2 s d"]
    guidance_scale: Float[Array, " n"]
    seeds: Array | None = None
    guidance_rescale: Float[Array, " n"] | None = None
    added: AddedCond | None = None
    image: Float[Array, "n h w c"] | None = None
    mask: Float[Array, "n h w 1"] | None = None

    def take(self, rows: Array) -> Job:
        """Select images."""
        return jax.tree.map(lambda x: x[rows], self)


def _over_rows(fn: Callable[..., Any], mesh: Mesh | None, in_specs: Any) -> Callable[..., Any]:
    """Run ``fn`` on each device's rows.

    shard_map and not jit with shardings: every device then runs the one-device program on its own rows, so no
    partitioner can put a collective into the loop, and per-device kernels work unchanged.
    """
    if mesh is None:
        return fn
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(DATA))


@functools.partial(jax.jit, static_argnames=("unet", "start", "mesh"))
def denoise(
    unet: UNet2DConditionModel,
    start: int,
    mesh: Mesh | None,
    params: Params,
    solver: Solver,
    job: Job,
    controls: Controls,
) -> Float[Array, "n h w c"]:
    """Run a solver from step ``start`` to the end under classifier-free guidance; the whole loop is one program.

    ``controls`` have one row an image. The numbers of the solver, the job and the controls are traced. The keys and
    values of every attn2 and the embedding of the added conditioning are computed once, before the loop.
    """
    hw = (job.noise.shape[1], job.noise.shape[2])

    def run(params: Params, solver: Solver, job: Job, controls: Controls) -> Array:
        rows = job.context.reshape(-1, *job.context.shape[2:])  # branch minor: u0, c0, u1, c1, ...
        controls = tuple(seam.to_branches(c) for c in controls)
        added = None
        if job.added is not None:
            added = unet.embed_added(params, AddedCond(*(x.reshape(-1, x.shape[-1]) for x in job.added)))

        def model(live: Controls) -> ModelFn:
            kv = unet.precompute(params, rows, hw, live)

            def predict(x: Array, t: Array, step: Array) -> Array:
                return unet.apply({"params": params}, x, t, kv, tuple(c.at(step) for c in live), added)

            return classifier_free_guidance(
                predict, job.guidance_scale, 0.0 if job.guidance_rescale is None else job.guidance_rescale
            )

        latents_fn = None
        x = job.noise * solver.init_scale
        if job.image is not None:
            if job.mask is not None:
                latents_fn = inpaint(solver, job.image, job.noise, job.mask)
            if job.mask is None or start > 0:  # what is to be repainted whole starts from noise alone, as in diffusers
                x = noised(solver, job.image, job.noise, start)
        noise_fn = None
        if solver.stochastic:
            assert job.seeds is not None, "a stochastic solver draws its noise from the seeds"
            noise_fn = functools.partial(step_noise, job.seeds, shape=job.noise.shape[1:])
        spans = [
            Phase(model(live), max(a, start), b) for a, b, live in seam.phases(controls, solver.steps) if b > start
        ]
        return sample(spans, solver, x, noise_fn=noise_fn, latents_fn=latents_fn, start=start)

    row, all_rows = PartitionSpec(DATA), PartitionSpec()
    specs = (
        all_rows,
        jax.tree.map(lambda _: all_rows, solver),
        jax.tree.map(lambda _: row, job),
        tuple(seam.row_specs(c, DATA) for c in controls),
    )
    return _over_rows(run, mesh, specs)(params, solver, job, controls)


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
        return jnp.clip(x / 2 + 0.5, 0.0, 1.0)

    return _over_rows(run, mesh, (PartitionSpec(), PartitionSpec(DATA)))(params, latents)


@functools.partial(jax.jit, static_argnames=("vae",))
def encode_images(vae: AutoencoderKL, params: Params, images: Float[Array, "n H W 3"]) -> Float[Array, "n h w c"]:
    """Encode images in [0, 1] to scaled latents: the mean of the posterior, so that nothing is drawn."""
    mean, _ = vae.apply({"params": params}, images * 2 - 1, method="encode")
    return mean * vae.config.scaling_factor


@functools.partial(jax.jit, static_argnames=("text_encoder",))
def encode_ids(text_encoder: CLIPTextModel, params: Params, ids: Array) -> TextStates:
    """Encode token ids (b, s)."""
    return text_encoder.apply({"params": params}, ids)


draw_noise = jax.jit(initial_noise, static_argnames=("shape",))
