"""DDIM inversion of a batch, its result, and how images are held to it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxmix.cards import Card, some
from jaxmix.control import QKV, Control
from jaxmix.models.unet import sites, subtree
from jaxmix.pipeline.batching import pack
from jaxmix.pipeline.chunks import PLAIN, Reading
from jaxmix.pipeline.given import prompt_list
from jaxmix.pipeline.job import Denoiser, added, flat, over_rows
from jaxmix.pipeline.request import Sizes
from jaxmix.pipeline.text import chunk_counts, encode_branches
from jaxmix.rows import check_together, looks_back, numbers, specs, take, tile, to_branches
from jaxmix.samplers import DDIMInversion, Pin, Refined, ReNoise, invert, renoised
from jaxmix.samplers.guidance import guide
from jaxmix.sharding import DATA
from jaxmix.types import AnyArray, Array, InputError, shown


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Inverted(Card):
    """The DDIM inversion of n images over S steps, as `Pipeline.invert` found it.

    ``states`` (n, S + 1, h, w, c) go from the image to the noise. ``features`` maps each recorded site to its q, k and
    v (n, S, tokens, heads, d), before controls. ``label`` is that of the inversion.
    """

    states: Array
    features: dict[str, QKV]
    label: str

    def _facts(self) -> Iterator[tuple[str, str]]:
        n, states, height, width, channels = self.states.shape
        yield "images", f"{n}, of {height} x {width} x {channels} latents"
        yield "steps", f"{states - 1}, label {self.label}"
        yield "features", some(self.features, 2) or "none"

    @property
    def noise(self) -> Array:
        """The start noise (n, h, w, c) that would draw the images."""
        return self.states[:, -1]

    def course(self, offset: int = 0) -> Array:
        """Return the states (n, S + 1, h, w, c) before each step of a sampling run, and at its end.

        The course starts ``offset`` steps ahead of the run and waits for it there: StyleAligned's references are
        cleaner than their timestep says.
        """
        steps = self.states.shape[1] - 1
        if not 0 <= offset < steps:
            raise InputError(f"offset: found {offset}, expected 0 to {steps - 1}")
        ahead = np.maximum(np.arange(steps + 1), offset + 1)
        ahead[0] = offset
        return self.states[:, ::-1][:, ahead]

    def seen(self) -> Array:
        """Return the states that give each step of a sampling run the features of its timestep; the image is last."""
        return jnp.concatenate([self.states[:, :-1][:, ::-1], self.states[:, :1]], 1)


def hold(courses: Array, rows: Sequence[int], n: int) -> Pin:
    """Hold the images ``rows`` of a batch of ``n`` to their courses (len(rows), S + 1, h, w, c).

    Raises `InputError` for a wrong number of courses, and rows that do not exist.
    """
    if len(courses) != len(rows) or any(not 0 <= row < n for row in rows):
        raise InputError(
            f"hold: found {len(courses)} courses for the rows {list(rows)}, expected one each, of {n} images"
        )
    states = jnp.zeros((n, *courses.shape[1:]), courses.dtype).at[jnp.asarray(rows)].set(courses)
    return Pin(states, jnp.zeros((n,)).at[jnp.asarray(rows)].set(1.0))


def find_noise(
    pipe: Any,
    images: AnyArray | None,
    prompts: Sequence[str] | None,
    steps: int,
    guidance_scale: float | Sequence[float] | None,
    controls: Sequence[Control],
    *,
    label: str,
    record: str | None,
    latents: AnyArray | None,
    renoise: ReNoise | None,
    mesh: Mesh | None,
    batch_size: int | None,
    reading: Reading = PLAIN,
) -> Inverted:
    """Invert images by a pipeline: `Pipeline.invert`, which has the meaning of everything."""
    if (images is None) == (latents is None):
        found = "neither" if images is None else "both"
        raise InputError(f"invert: found {found}, expected either images or latents")
    if pipe.distilled_guidance:
        raise InputError("invert: found a latent consistency model, expected one whose steps can be run backwards")
    refined = _refining(renoise, label, record)
    x0 = pipe.encode_images(images) if images is not None else jnp.asarray(latents, jnp.float32)
    if x0.ndim != 4 or x0.shape[-1] != pipe.latent_shape[-1]:
        raise InputError(f"latents: found shape {x0.shape}, expected (n, h, w, {pipe.latent_shape[-1]})")
    n, hw, factor = x0.shape[0], (x0.shape[1], x0.shape[2]), pipe.vae.config.factor
    prompts = [""] * n if prompts is None else prompt_list(prompts)
    if len(prompts) != n:
        raise InputError(f"prompts: found {len(prompts)}, expected one for each of the {n} images")
    pipe.check_controls(controls, hw)
    there = sites(pipe.unet.config, hw)
    recorded = frozenset(s.name for s in there if record is not None and re.search(record, s.name))
    if record is not None and not recorded:
        raise InputError(f"record: found {record!r}, which matches none of the {len(there)} attention sites")
    size = (hw[0] * factor, hw[1] * factor)
    ids, reading = Sizes(size, (0, 0), size).ids, reading.checked()
    bound = tile(tuple(controls), n)
    counts = chunk_counts(pipe, prompts, None, reading)
    if looks_back(bound) or any(name.endswith(".attn2") for name in recorded):
        counts[:] = counts.max()
    scale = None if guidance_scale is None else numbers("guidance_scale", guidance_scale, n)
    scale = None if scale is None or scale.max() <= 1 else jnp.asarray(scale)
    inversion = DDIMInversion.create(pipe.schedule, steps, label)
    how = None if refined is None else refined.bind(pipe.schedule, steps, n)
    devices = 1 if mesh is None else mesh.shape[DATA]
    parts, order = [], []
    for count in sorted(set(counts.tolist())):
        members = np.flatnonzero(counts == count)
        some = [prompts[i] for i in members]
        text = encode_branches(pipe, [[None] * len(some), some], ids, reading, chunks=count)
        model = Denoiser(pipe.unet, pipe.params["unet"], text, take(bound, members))
        batches = list(pack(len(members), batch_size, devices))
        check_together(model.controls, len(members), len(batches[0].rows) // devices)
        for batch in batches:
            rows = members[batch.rows]
            part, refine = take(model, batch.rows), take(how, rows)
            guided = None if scale is None else scale[rows]
            made = invert_rows(part, x0[rows], guided, inversion, recorded, refine, mesh)
            parts.append(jax.tree.map(lambda y, kept=batch.kept: y[: len(kept)], made))
            order.append(rows[batch.kept])
    back = np.argsort(np.concatenate(order))
    if len(parts) == 1:
        states, features = parts[0]
    else:
        states, features = jax.tree.map(lambda *x: jnp.concatenate(x)[back], *parts)
    return Inverted(states, features, label)


def _refining(renoise: Any, label: str, record: str | None) -> ReNoise | None:
    """Return a refinement that does something, None for none."""
    if renoise is None:
        return None
    if not isinstance(renoise, ReNoise):
        raise InputError(f"renoise: found {shown(renoise)}, expected a ReNoise")
    if renoise.plain:
        return None
    if label != "next":
        raise InputError(f"renoise: found the label {label!r}, expected 'next', whose steps it refines")
    if record is not None:
        raise InputError("renoise: found record with it, expected the one or the other: a step has several predictions")
    return renoise


@functools.partial(jax.jit, static_argnames=("mesh", "record"))
def invert_rows(
    model: Denoiser,
    latents: Array,
    scale: Array | None,
    inversion: DDIMInversion,
    record: frozenset[str] = frozenset(),
    refine: Refined | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, dict[str, QKV]]:
    """Run a DDIM inversion from clean latents (n, h, w, c), refined by ReNoise if ``refine`` says how.

    ``scale`` (n,) is the scale of classifier-free guidance, None for the conditional branch alone. Returns the states
    (n, steps + 1, h, w, c), the image first, and for each recorded site the projections of the conditional branch, (n,
    steps, tokens, heads, d) each: rows first, so that each device returns its own.
    """

    def run(
        model: Denoiser, latents: Array, scale: Array | None, inversion: DDIMInversion, refine: Refined | None
    ) -> Any:
        n, hw = latents.shape[0], (latents.shape[1], latents.shape[2])
        predict = _predictor(model, scale, hw, record)
        if refine is None:
            found = invert(predict, inversion, latents)
            return jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1), found)
        twice = predict
        if refine.compares:
            rows = jnp.tile(jnp.arange(n), 2)
            twice = _predictor(take(model, rows), None if scale is None else scale[rows], hw, record)
        states = renoised(lambda *a: predict(*a)[0], lambda *a: twice(*a)[0], inversion, latents, refine)
        return jnp.swapaxes(states, 0, 1), {}

    row, everywhere = PartitionSpec(DATA), PartitionSpec()
    in_specs = (
        specs(model, DATA),
        row,
        None if scale is None else row,
        jax.tree.map(lambda _: everywhere, inversion),
        specs(refine, DATA),
    )
    return over_rows(run, mesh, in_specs)(model, latents, scale, inversion, refine)


def _predictor(model: Denoiser, scale: Array | None, hw: tuple[int, int], record: frozenset[str]) -> Callable[..., Any]:
    """Return the function (x, t, step) that predicts the rows of a denoiser, and what of them is recorded."""
    branches = (1,) if scale is None else (0, 1)
    count, unet, params = len(branches), model.unet, model.params
    rows = flat(model.text[slice(branches[0], 2)])
    controls = tuple(to_branches(c, tuple(map(float, branches))).prepare(rows, hw) for c in model.controls)
    extra = None if rows.pooled is None else unet.embed_added(params, added(rows))
    kv = unet.precompute(params, rows.context, hw, controls)

    def predict(x: Array, t: Array, step: Array) -> tuple[Array, Any]:
        n = x.shape[0]
        x = jnp.repeat(x, count, axis=0)
        now = tuple(c.at(step, t).see(x, t, rows) for c in controls)
        pred, seen = unet.apply({"params": params}, x, t, kv, now, extra, mutable=["qkv"] if record else [])
        kept = {name: QKV(*(y[count - 1 :: count] for y in subtree(seen["qkv"], name)["qkv"])) for name in record}
        pred = pred.reshape(n, count, *pred.shape[1:])
        if scale is None:
            return pred[:, 0], kept
        return guide(pred[:, 0], pred[:, 1], scale), kept

    return predict
