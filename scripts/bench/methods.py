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

from jaxmix.control import Control
from jaxmix.controls import dense_diffusion, style_aligned
from jaxmix.controls.style_id import StyleIDControl
from jaxmix.models.unet import sites, subtree
from jaxmix.pipeline.job import denoise
from jaxmix.samplers import SaliencyBlend, make_solver
from jaxmix.schedule import NoiseSchedule
from jaxmix.types import InputError
from scripts.bench.ours import Program, sampling_job
from scripts.bench.rows import Row, configs


def method_program(engine: str, row: Row, plain: Program, unet: Any) -> Program:
    """Return our sampler with the method of an engine's name, from the plain sampler of the row and its UNet."""
    if row.task != "sample":
        raise InputError(f"{row.name}: {engine} has a part in the sampler alone, expected --tasks sample")
    return {"ours-dense": _dense, "ours-aligned": _aligned, "ours-styleid": _style_id, "ours-fusion": _fusion}[engine](
        row, plain, unet
    )


def _with(plain: Program, control: Control) -> Program:
    def sample(params: Any, x: dict[str, Any]) -> jax.Array:
        return plain.fn(params, x, (control,))

    return dataclasses.replace(plain, fn=sample)


def _dense(row: Row, plain: Program, unet: Any) -> Program:
    """Place two segments, left and right, in all steps: outside its window the method is the plain program."""
    tokens, side = configs(row.model, row.tiny)["text_length"], row.latents
    masks = np.zeros((row.batch, 2, side, side), bool)
    masks[:, 0, :, : side // 2], masks[:, 1, :, side // 2 :] = True, True
    owners = np.full((row.batch, tokens), -1)
    owners[:, 2:4], owners[:, 5:7] = 0, 1
    grids = sorted({site.hw for site in sites(unet.config, (side, side))})
    return _with(plain, dense_diffusion.bind(masks, owners, grids, window=(0.0, 1.0)))


def _aligned(row: Row, plain: Program, unet: Any) -> Program:
    """Draw all images of the batch in the style of the first."""
    if row.batch < 2:
        raise InputError(f"{row.name}: a group has two images at least, expected --batch 2 or more")
    return _with(plain, style_aligned.bind([row.batch]))


def _style_id(row: Row, plain: Program, unet: Any) -> Program:
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

    return dataclasses.replace(plain, fn=sample, inputs={**plain.inputs, **features})


def _fusion(row: Row, plain: Program, unet: Any) -> Program:
    """Blend one model's two prompts in all steps: three branches, where the plain sampler has two."""
    schedule = NoiseSchedule.from_config(configs(row.model, row.tiny)["scheduler"])
    third = jax.ShapeDtypeStruct((row.batch, *plain.inputs["context"].shape[1:]), plain.inputs["context"].dtype)

    def sample(params: Any, x: dict[str, Any]) -> jax.Array:
        ones = jnp.ones((row.batch,))
        job = sampling_job(unet, params, x, row.batch, guidance=(SaliencyBlend(ones, ones, ones),))
        return denoise(job, make_solver("ddim", schedule, row.steps))

    return dataclasses.replace(plain, fn=sample, inputs={**plain.inputs, "other": third})
