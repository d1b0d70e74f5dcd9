"""Our sampler under each of the training-free methods, for its ratio to the one without.

Every program is a function of the plain one's inputs and of what the method needs besides; layouts, groups and pairs
are fixed, since no number of theirs changes the work.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmix.control import Control
from jaxmix.controls import dense_diffusion, paint_with_words, structured_diffusion, style_aligned
from jaxmix.controls.structured_diffusion import StructuredControl
from jaxmix.controls.style_id import StyleIDControl
from jaxmix.models.unet import sites, subtree
from jaxmix.pipeline.job import denoise
from jaxmix.samplers import Composed, Guidance, SaliencyBlend, make_solver
from jaxmix.samplers.sigmas import training_sigmas
from jaxmix.schedule import NoiseSchedule
from jaxmix.types import InputError
from scripts.bench.ours import Program, sampling_job
from scripts.bench.rows import BenchRow, configs


def method_program(engine: str, row: BenchRow, plain: Program, unet: Any, mesh: Mesh | None = None) -> Program:
    """Return our sampler with the method of an engine's name, from the plain sampler of the row and its UNet.

    Under a mesh, which is that of `plain`, each device has rows of its own.
    """
    if row.task != "sample":
        raise InputError(f"{row.name}: {engine} has a part in the sampler alone, expected --tasks sample")
    made = {
        "ours-dense": _dense,
        "ours-paint": _paint,
        "ours-structured": _structured,
        "ours-aligned": _aligned,
        "ours-styleid": _style_id,
        "ours-fusion": _fusion,
        "ours-composable": _composable,
    }
    return made[engine](row, plain, unet, mesh)


def _with(plain: Program, control: Control) -> Program:
    def sample(params: Any, x: dict[str, Any]) -> jax.Array:
        return plain.fn(params, x, (control,))

    return dataclasses.replace(plain, fn=sample)


WORDS = (np.arange(2, 4), np.arange(5, 7))
"""The tokens of two phrases."""


def _halves(row: BenchRow, unet: Any) -> tuple[int, np.ndarray, list[tuple[int, int]]]:
    """Return the number of tokens, the masks (2, h, w) of two segments, left and right, and the sizes of the grids."""
    side = row.latents
    masks = np.zeros((2, side, side), bool)
    masks[0, :, : side // 2], masks[1, :, side // 2 :] = True, True
    grids = sorted({site.hw for site in sites(unet.config, (side, side))})
    return configs(row.model, row.tiny)["text_length"], masks, grids


def _dense(row: BenchRow, plain: Program, unet: Any, mesh: Mesh | None) -> Program:
    """Place two segments, left and right, in all steps: outside its window the method is the plain program."""
    tokens, masks, grids = _halves(row, unet)
    owners = np.full((row.batch, tokens), -1)
    for segment, words in enumerate(WORDS):
        owners[:, words] = segment
    masks = np.broadcast_to(masks, (row.batch, *masks.shape))
    return _with(plain, dense_diffusion.bind(masks, owners, grids, window=(0.0, 1.0)))


def _paint(row: BenchRow, plain: Program, unet: Any, mesh: Mesh | None) -> Program:
    """Paint the same segments."""
    tokens, masks, grids = _halves(row, unet)
    drawn = paint_with_words.paint(list(masks), [1.0, 1.0], WORDS, tokens, grids)
    painted = {grid: np.repeat(x[None], row.batch, axis=0) for grid, x in drawn.items()}
    schedule = NoiseSchedule.from_config(configs(row.model, row.tiny)["scheduler"])
    return _with(plain, paint_with_words.bind(painted, training_sigmas(schedule)))


def _structured(row: BenchRow, plain: Program, unet: Any, mesh: Mesh | None) -> Program:
    """Values of other states than the keys': what the phrases' own states change of them is an input."""
    context = plain.inputs["context"]
    change = jax.ShapeDtypeStruct((row.batch, *context.shape[1:]), context.dtype)

    def sample(params: Any, x: dict[str, Any]) -> jax.Array:
        control = StructuredControl(x["change"], jnp.ones((row.batch,)), sites=structured_diffusion.ATTN2)
        return plain.fn(params, x, (control,))

    return dataclasses.replace(plain, fn=sample, inputs={**plain.inputs, "change": change})


def _aligned(row: BenchRow, plain: Program, unet: Any, mesh: Mesh | None) -> Program:
    """Draw all images of the batch in the style of the first, or those of a device in that of its first."""
    devices = 1 if mesh is None else mesh.size
    if row.batch < 2 * devices:
        raise InputError(f"{row.name}: a group has two images at least, expected --batch 2 or more")
    return _with(plain, style_aligned.bind([row.batch // devices] * devices))


def _style_id(row: BenchRow, plain: Program, unet: Any, mesh: Mesh | None) -> Program:
    """Store features of one content and one style for all images, at the attn1 of the last two up blocks.

    Under guidance like the plain sampler it is compared with, though the method itself needs no second branch.
    """
    names = [s for s in sites(unet.config, (row.latents, row.latents)) if s.name.endswith(".attn1")]
    blocks = sorted({s.name.split(".attentions")[0] for s in names if s.name.startswith("up_blocks.")})[-2:]
    edited = [s for s in names if s.name.split(".attentions")[0] in blocks]
    dtype = jnp.dtype(row.dtype)

    def feature(site: Any) -> jax.ShapeDtypeStruct:
        width = subtree(plain.params, site.name)["to_q"]["kernel"].shape[-1]
        shape = (row.steps, 1, site.hw[0] * site.hw[1], site.heads, width // site.heads)
        return jax.ShapeDtypeStruct(shape, dtype)

    features = {f"{kind} {site.name}": feature(site) for kind in "qkv" for site in edited}
    zeros, ones = jnp.zeros((row.batch,), jnp.int32), jnp.ones((row.batch,))
    pattern = "|".join(f"^{re.escape(site.name)}$" for site in edited)

    def sample(params: Any, x: dict[str, Any]) -> jax.Array:
        held = [{site.name: x[f"{kind} {site.name}"] for site in edited} for kind in "qkv"]
        control = StyleIDControl(*held, zeros, zeros, 0.75 * ones, 1.5 * ones, ones, sites=pattern)
        return plain.fn(params, x, (control,))

    shared = plain.shared | set(features)
    return dataclasses.replace(plain, fn=sample, inputs={**plain.inputs, **features}, shared=shared)


def _fusion(row: BenchRow, plain: Program, unet: Any, mesh: Mesh | None) -> Program:
    """Blend one model's two prompts in all steps: three branches, where the plain sampler has two."""
    ones = jnp.ones((row.batch,))
    return _with_other(row, plain, unet, mesh, SaliencyBlend(ones, ones, ones))


def _composable(row: BenchRow, plain: Program, unet: Any, mesh: Mesh | None) -> Program:
    """Compose two prompts per image, of unequal weights: three branches, too."""
    weights = jnp.tile(jnp.asarray([1.0, 0.5]), (row.batch, 1))
    return _with_other(row, plain, unet, mesh, Composed(weights, branches=(1, 2)))


def _with_other(row: BenchRow, plain: Program, unet: Any, mesh: Mesh | None, guidance: Guidance) -> Program:
    """Return our sampler with one more prompt per image and a guidance that uses it."""
    schedule = NoiseSchedule.from_config(configs(row.model, row.tiny)["scheduler"])
    third = jax.ShapeDtypeStruct((row.batch, *plain.inputs["context"].shape[1:]), plain.inputs["context"].dtype)

    def sample(params: Any, x: dict[str, Any]) -> jax.Array:
        job = sampling_job(unet, params, x, row.batch, guidance=(guidance,))
        return denoise(job, make_solver("ddim", schedule, row.steps), mesh=mesh)

    return dataclasses.replace(plain, fn=sample, inputs={**plain.inputs, "other": third})
