"""The compiled programs of a pipeline: one each for denoising, decoding, encoding images and encoding text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from jaxmix import control as seam
from jaxmix.control import QKV, Controls
from jaxmix.models import AddedCond, AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from jaxmix.models.clip import TextStates
from jaxmix.models.tiling import decode_tiled
from jaxmix.models.unet import subtree
from jaxmix.samplers import (
    DDIMInversion,
    Phase,
    Solver,
    blend,
    by_branch,
    classifier_free_guidance,
    initial_noise,
    inpaint,
    invert,
    noised,
    pin,
    sample,
    step_noise,
)
from jaxmix.sharding import DATA
from jaxmix.types import Array, ModelFn, Params

_LARGE = 512 * 512  # pixels from which images are decoded one at a time: one fills a device, and memory is one's


@struct.dataclass
class Pinned:
    """Images that are held to a course: what `Pipeline.invert` found of them, or noised images.

    ``states`` (n, steps + 1, h, w, c) is the state of each image before each step, and at the end; ``gate`` (n,) is 1
    where an image is held, 0 where it is free.
    """

    states: Float[Array, "n s h w c"]
    gate: Float[Array, " n"]


@struct.dataclass
class Blend:
    """What MagicFusion needs of each image, see `jaxmix.samplers.fusion`.

    ``context`` (n, 2, s, d) and ``added`` are the expert's; None where it is the same model, whose conditional branch
    for the expert's prompt then stands third in the job's own.
    """

    k_general: Float[Array, " n"]
    k_expert: Float[Array, " n"]
    strength: Float[Array, " n"]
    context: Float[Array, "n 2 s d"] | None = None
    added: AddedCond | None = None


@struct.dataclass
class Job:
    """What a batch of n images is drawn from; every leaf has one row an image, so that it shards as it is.

    ``noise`` (n, h, w, c) is standard normal; ``context`` (n, 2, s, d) and ``added`` hold the unconditional and the
    conditional branch, or one branch (n, 1, s, d) that runs without guidance. ``guidance_rescale`` None is 0. ``image``
    (n, h, w, c) are scaled latents to start from, and ``mask`` (n, h, w, 1) is 1 where they are to be repainted.
    ``seeds`` (n,) uint32 are for stochastic solvers.
    """

    noise: Float[Array, "n h w c"]
    context: Float[Array, "n b s d"]
    guidance_scale: Float[Array, " n"]
    seeds: Array | None = None
    guidance_rescale: Float[Array, " n"] | None = None
    added: AddedCond | None = None
    image: Float[Array, "n h w c"] | None = None
    mask: Float[Array, "n h w 1"] | None = None
    pinned: Pinned | None = None
    blend: Blend | None = None

    def take(self, rows: Array) -> Job:
        """Select images."""
        return jax.tree.map(lambda x: x[rows], self)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """The part of MagicFusion that shapes the program: static, like the model itself.

    ``unet`` is the expert, None for the same model and controls. Blended are the steps of ``window`` (shares of the
    run, as a control has them), the others are the general model's alone.
    """

    unet: UNet2DConditionModel | None = None
    window: tuple[float, float] = (0.0, 1.0)
    own_uncond: bool = False
    underflow: bool = False


class Expert(NamedTuple):
    """The parameters of MagicFusion's second model, and the controls inside it, with one row an image."""

    params: Params
    controls: Controls


Pair: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Array]]
"""``(x, t, step)`` to the (unconditional, conditional) branches (n, 2, h, w, c) of the general model and the expert."""


def _over_rows(fn: Callable[..., Any], mesh: Mesh | None, in_specs: Any) -> Callable[..., Any]:
    """Run ``fn`` on each device's rows.

    shard_map and not jit with shardings: every device then runs the one-device program on its own rows, so no
    partitioner can put a collective into the loop, and per-device kernels work unchanged.
    """
    if mesh is None:
        return fn
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(DATA))


@functools.partial(jax.jit, static_argnames=("unet", "start", "mesh", "fusion"))
def denoise(
    unet: UNet2DConditionModel,
    start: int,
    mesh: Mesh | None,
    params: Params,
    solver: Solver,
    job: Job,
    controls: Controls,
    fusion: Fusion | None = None,
    expert: Expert | None = None,
) -> Float[Array, "n h w c"]:
    """Run a solver from step ``start`` to the end under classifier-free guidance; the whole loop is one program.

    ``controls`` have one row an image. The numbers of the solver, the job and the controls are traced. The keys and
    values of every attn2 and the embedding of the added conditioning are computed once, before the loop. ``fusion``
    needs the job's ``blend``, and with a model of its own ``expert``.
    """
    hw = (job.noise.shape[1], job.noise.shape[2])

    def run(params: Params, solver: Solver, job: Job, controls: Controls, expert: Expert | None) -> Array:
        def model(live: Controls, others: Controls, blended: bool) -> ModelFn:
            def branches(count: int) -> ModelFn:
                return _branches(unet, params, job.context[:, :count], _take(job.added, count), live, hw)

            if job.context.shape[1] == 1:
                alone = by_branch(branches(1), 1)
                return lambda x, t, step: alone(x, t, step)[:, 0]
            rescale = 0.0 if job.guidance_rescale is None else job.guidance_rescale
            guided = classifier_free_guidance(branches(2), job.guidance_scale, rescale)
            if not blended or fusion is None or job.blend is None:
                return guided
            if expert is None:
                both = _two_prompts(branches(3))
            else:
                both = _two_models(branches(2), fusion, expert.params, job.blend, others, hw)
            return _blended(guided, both, fusion, job.blend, job.guidance_scale, solver)

        latents_fn = None
        x = job.noise * solver.init_scale
        if job.image is not None:
            if job.mask is not None:
                latents_fn = inpaint(solver, job.image, job.noise, job.mask)
            if job.mask is None or start > 0:  # what is to be repainted whole starts from noise alone, as in diffusers
                x = noised(solver, job.image, job.noise, start)
        if job.pinned is not None:
            hold = pin(job.pinned.states, job.pinned.gate)
            x, latents_fn = hold(x, start - 1), _both(latents_fn, hold)
        noise_fn = None
        if solver.stochastic:
            assert job.seeds is not None, "a stochastic solver draws its noise from the seeds"
            noise_fn = functools.partial(step_noise, job.seeds, shape=job.noise.shape[1:])
        spans = [
            Phase(model(live, others, blended), max(a, start), b)
            for a, b, live, others, blended in _spans(controls, expert, fusion, solver.steps)
            if b > start
        ]
        return sample(spans, solver, x, noise_fn=noise_fn, latents_fn=latents_fn, start=start)

    row, all_rows = PartitionSpec(DATA), PartitionSpec()
    second = None
    if expert is not None:
        second = Expert._make((all_rows, tuple(seam.row_specs(c, DATA) for c in expert.controls)))
    specs = (
        all_rows,
        jax.tree.map(lambda _: all_rows, solver),
        jax.tree.map(lambda _: row, job),
        tuple(seam.row_specs(c, DATA) for c in controls),
        second,
    )
    return _over_rows(run, mesh, specs)(params, solver, job, controls, expert)


def _take(added: AddedCond | None, branches: int) -> AddedCond | None:
    return None if added is None else AddedCond(*(x[:, :branches] for x in added))


def _branches(
    unet: UNet2DConditionModel,
    params: Params,
    context: Float[Array, "n b s d"],
    added: AddedCond | None,
    controls: Controls,
    hw: tuple[int, int],
) -> ModelFn:
    """Return the model over rows (image, branch), branch minor, with what does not depend on the timestep computed."""
    rows = context.reshape(-1, *context.shape[2:])
    live = (1.0,) if context.shape[1] == 1 else (0.0, *[1.0] * (context.shape[1] - 1))
    controls = tuple(seam.to_branches(c, live) for c in controls)
    extra = None
    if added is not None:
        extra = unet.embed_added(params, AddedCond(*(x.reshape(-1, x.shape[-1]) for x in added)))
    kv = unet.precompute(params, rows, hw, controls)

    def predict(x: Array, t: Array, step: Array) -> Array:
        return unet.apply({"params": params}, x, t, kv, tuple(c.at(step, t) for c in controls), extra)

    return predict


def _two_prompts(rows_fn: ModelFn) -> Pair:
    """Return the (general, expert) pairs of branches of one model whose rows are (unconditional, general, expert)."""
    three = by_branch(rows_fn, 3)

    def predict(x: Array, t: Array, step: Array) -> tuple[Array, Array]:
        rows = three(x, t, step)
        return rows[:, :2], rows[:, jnp.asarray([0, 2])]

    return predict


def _two_models(
    general: ModelFn, fusion: Fusion, params: Params, work: Blend, controls: Controls, hw: tuple[int, int]
) -> Pair:
    """Return the (general, expert) pairs of branches of two models."""
    assert fusion.unet is not None and work.context is not None, "an expert needs its model and its context"
    first = by_branch(general, 2)
    second = by_branch(_branches(fusion.unet, params, work.context, work.added, controls, hw), 2)
    return lambda x, t, step: (first(x, t, step), second(x, t, step))


def _blended(
    guided: ModelFn, both: Pair, fusion: Fusion, work: Blend, scale: Float[Array, " n"], solver: Solver
) -> ModelFn:
    """Return MagicFusion's model function; with no image to blend it is the general model, to the last bit."""

    def predict(x: Array, t: Array, step: Array) -> Array:
        signal, sigma = solver.signals[step], solver.sigmas[step]
        per_eps = {"epsilon": jnp.ones(()), "v_prediction": signal, "sample": signal / sigma}[solver.prediction_type]
        numbers = (scale, work.k_general, work.k_expert, work.strength)
        general, expert = both(x, t, step)
        return blend(
            general, expert, *numbers, per_eps=per_eps, own_uncond=fusion.own_uncond, underflow=fusion.underflow
        )

    return lambda x, t, step: jax.lax.cond(jnp.any(work.strength > 0), predict, guided, x, t, step)


def _spans(
    controls: Controls, expert: Expert | None, fusion: Fusion | None, steps: int
) -> list[tuple[int, int, Controls, Controls, bool]]:
    """Cut the steps where the live controls of either model, or the blending, change."""
    others = () if expert is None else expert.controls
    windows = [c.window for c in (*controls, *others)] + ([] if fusion is None else [fusion.window])
    mine, all_ = len(controls), len(controls) + len(others)
    return [
        (
            a,
            b,
            tuple(controls[i] for i in sorted(live) if i < mine),
            tuple(others[i - mine] for i in sorted(live) if mine <= i < all_),
            all_ in live,
        )
        for a, b, live in seam.cut(windows, steps)
    ]


def _both(first: Any, second: Any) -> Any:
    return second if first is None else lambda x, i: second(first(x, i), i)


@functools.partial(jax.jit, static_argnames=("unet", "mesh", "record"))
def invert_rows(
    unet: UNet2DConditionModel,
    mesh: Mesh | None,
    record: frozenset[str],
    params: Params,
    inversion: DDIMInversion,
    job: Job,
    controls: Controls,
) -> tuple[Array, dict[str, QKV]]:
    """Run a DDIM inversion from ``job.noise``, which here holds clean latents.

    Returns the states (n, steps + 1, h, w, c), the image first, and for each recorded site the projections of the last
    branch, (n, steps, tokens, heads, d) each: rows first, so that they come from their devices as they are.
    """
    hw = (job.noise.shape[1], job.noise.shape[2])

    def run(params: Params, inversion: DDIMInversion, job: Job, controls: Controls) -> Any:
        n, count = job.context.shape[:2]
        rows = job.context.reshape(-1, *job.context.shape[2:])
        live = tuple(seam.to_branches(c, (1.0,) if count == 1 else (0.0, 1.0)) for c in controls)
        extra = None
        if job.added is not None:
            extra = unet.embed_added(params, AddedCond(*(x.reshape(-1, x.shape[-1]) for x in job.added)))
        kv = unet.precompute(params, rows, hw, live)

        def model(x: Array, t: Array, step: Array) -> tuple[Array, Any]:
            x = jnp.repeat(x, count, axis=0)
            now = tuple(c.at(step, t) for c in live)
            pred, seen = unet.apply({"params": params}, x, t, kv, now, extra, mutable=["qkv"] if record else [])
            kept = {name: QKV(*(y[count - 1 :: count] for y in subtree(seen["qkv"], name)["qkv"])) for name in record}
            pred = pred.reshape(n, count, *pred.shape[1:])
            if count == 1:
                return pred[:, 0], kept
            return pred[:, 0] + job.guidance_scale[:, None, None, None] * (pred[:, 1] - pred[:, 0]), kept

        states, kept = invert(model, inversion, job.noise)
        return jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1), (states, kept))

    row, all_rows = PartitionSpec(DATA), PartitionSpec()
    specs = (
        all_rows,
        jax.tree.map(lambda _: all_rows, inversion),
        jax.tree.map(lambda _: row, job),
        tuple(seam.row_specs(c, DATA) for c in controls),
    )
    return _over_rows(run, mesh, specs)(params, inversion, job, controls)


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
