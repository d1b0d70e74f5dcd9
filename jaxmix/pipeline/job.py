"""What a batch of images is drawn from, and the program that draws it: one denoiser, guidance, edits of the latents.

`denoise` knows no paper. Whatever a method does arrives as a control inside the denoiser, a guidance over its branches,
or an edit of the latents.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from jaxmix import control as seam
from jaxmix.control import Control, Controls
from jaxmix.models.unet import AddedCond, UNet2DConditionModel, guidance_embedding
from jaxmix.pipeline.showing import Watch, tell
from jaxmix.rows import Text, dataclass, per_row, specs, static, take, to_branches
from jaxmix.samplers import BranchFn, Guidance, LatentEdit, Phase, Solver, by_branch, sample, step_noise
from jaxmix.schedule import prediction_to_x0
from jaxmix.sharding import DATA
from jaxmix.types import Array, Params


@dataclass
class Denoiser:
    """A UNet with its weights, the text of its branches and the controls inside it, one row per image.

    In ``text`` (n, branches, ...) branch 0 is unconditional, 1 conditional, further ones are other conditional prompts.
    ``scale`` (n,) is the guidance scale that a latent consistency model is told, None for other models.
    """

    unet: UNet2DConditionModel = static()
    params: Params
    text: Text
    controls: Controls = ()
    scale: Float[Array, " n"] | None = per_row(default=None)

    def branches(self, which: Sequence[int], hw: tuple[int, int]) -> BranchFn:
        """Return the function that predicts some branches of each image (n, branches, h, w, c).

        Rows are (image, branch), branch minor. The keys and values of every attn2, the embedding of the added
        conditioning and what controls prepare are computed in this call.
        """
        count = len(which)
        run = range(which[0], which[0] + count)
        # A slice where possible: nothing is gathered for plain guidance.
        rows = flat(self.text[slice(run.start, run.stop) if list(which) == list(run) else list(which)])
        live = tuple(float(branch > 0) for branch in which)
        first = tuple(float(branch == 1) for branch in which)
        controls = tuple(to_branches(c, live, first).prepare(rows, hw) for c in self.controls)
        extra = None if rows.pooled is None else self.unet.embed_added(self.params, added(rows))
        told = None
        if self.scale is not None:
            told = jnp.repeat(guidance_embedding(self.unet.config, self.scale), count, axis=0)
        kv = self.unet.precompute(self.params, rows.context, hw, controls)

        def predict(x: Array, t: Array, step: Array) -> Array:
            now = tuple(c.at(step, t).see(x, t, rows) for c in controls)
            return self.unet.apply({"params": self.params}, x, t, kv, now, extra, told)

        return by_branch(predict, count)


def flat(text: Text) -> Text:
    """Flatten the text of images (n, branches, ...) to that of rows (image, branch), branch minor."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), text)


def added(text: Text) -> AddedCond:
    """Return what SDXL's UNet takes beside the text states, for rows."""
    assert text.pooled is not None and text.time_ids is not None, "a model without added conditioning"
    return AddedCond(text.pooled, text.time_ids)


@dataclass
class Job:
    """What a batch of n images is drawn from.

    ``noise`` (n, h, w, c) is standard normal. Each step uses the last ``guidance`` whose window covers it
    (`jaxmix.samplers.stack` builds the tuple). ``seeds`` (n,) uint32 are for stochastic solvers.
    """

    noise: Float[Array, "n h w c"] = per_row()
    model: Denoiser
    guidance: tuple[Guidance, ...]
    edits: tuple[LatentEdit, ...] = ()
    seeds: Array | None = per_row(default=None)

    def take(self, rows: Any) -> Job:
        """Select images."""
        return take(self, rows)


def over_rows(fn: Callable[..., Any], mesh: Mesh | None, in_specs: Any) -> Callable[..., Any]:
    """Run ``fn`` on each device's rows.

    By shard_map, not jit with shardings: every device then runs the one-device program on its own rows, so no
    partitioner can put a collective into the loop, and per-device kernels work unchanged.
    """
    if mesh is None:
        return fn
    # Unchecked: Pallas kernels, such as the attention of TPUs, do not say over which axes their results vary.
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(DATA), check_vma=False)


@functools.partial(jax.jit, static_argnames=("start", "stop", "mesh", "watch"))
def denoise(
    job: Job,
    solver: Solver,
    start: int = 0,
    stop: int | None = None,
    mesh: Mesh | None = None,
    watch: Watch | None = None,
    number: Array | int = 0,
) -> Float[Array, "n h w c"]:
    """Run a solver from step ``start`` to ``stop`` (None: the end); the whole loop is one program.

    The numbers of the solver, the job and everything in it are traced. Each run of steps with the same live controls
    and guidance is a scan of its own. ``watch`` says what is told to the watcher of this ``number`` on the way
    (`jaxmix.pipeline.showing`); without it nothing leaves the device.
    """

    def run(job: Job, solver: Solver, number: Array) -> Array:
        hw = (job.noise.shape[1], job.noise.shape[2])
        x = job.noise * solver.init_scale
        for edit in job.edits:
            x = edit.start(solver, x, job.noise, start)

        device = 0 if mesh is None else jax.lax.axis_index(DATA)
        last = (solver.steps if stop is None else stop) - 1

        def after(x: Array, i: Array) -> Array:
            x = functools.reduce(lambda x, edit: edit.after(solver, x, job.noise, i), job.edits, x)
            if watch is not None and not watch.clean:
                tell(watch, number, device, i, last, x)
            return x

        def shown(phase: Phase) -> Phase:
            def model_fn(x: Array, t: Array, i: Array) -> Array:
                pred = phase.model_fn(x, t, i)
                assert watch is not None
                clean = prediction_to_x0(solver.prediction_type, pred, x, solver.signals[i], solver.sigmas[i])
                tell(watch, number, device, i, last, clean)
                return pred

            return dataclasses.replace(phase, model_fn=model_fn)

        noise_fn = None
        if solver.stochastic:
            assert job.seeds is not None, "a stochastic solver draws its noise from the seeds"
            noise_fn = functools.partial(step_noise, job.seeds, shape=job.noise.shape[1:])
            if hasattr(solver, "noise"):  # what it makes of independent draws
                noise_fn = functools.partial(solver.noise, noise_fn)
        spans = list(phases(job, solver, hw, start, stop))
        if watch is not None and watch.clean:
            spans = [shown(phase) for phase in spans]
        latents_fn = after if job.edits or watch is not None else None
        return sample(spans, solver, x, noise_fn=noise_fn, latents_fn=latents_fn, start=start, stop=stop)

    everywhere = jax.tree.map(lambda _: PartitionSpec(), solver)
    return over_rows(run, mesh, (specs(job, DATA), everywhere, PartitionSpec()))(job, solver, jnp.asarray(number))


def phases(job: Job, solver: Solver, hw: tuple[int, int], start: int, stop: int | None) -> Iterator[Phase]:
    """Yield the runs of steps from ``start`` on that share their live controls and guidance, with model functions."""
    steps = solver.steps
    found = sorted(set(spans(job, steps)))
    end = steps if stop is None else stop
    for a, b, live in seam.cut(found, steps):
        first, last = max(a, start), min(b, end)
        if first < last:
            now = during(job, {found[i] for i in live}, steps)
            yield Phase(now.guidance[-1](now.model, solver, hw), first, last)


def spans(node: Any, steps: int) -> list[tuple[int, int]]:
    """List the spans of the steps of everything in a job that has a window."""
    if type(node) is tuple:
        return [span for x in node for span in spans(x, steps)]
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return []
    own = [node.span(steps)] if hasattr(node, "span") else []
    return own if isinstance(node, Control) else [*own, *(s for _, x in _parts(node) for s in spans(x, steps))]


def during(node: Any, live: set[tuple[int, int]], steps: int) -> Any:
    """Return a job with only those windowed parts whose span of the steps is ``live``."""
    if type(node) is tuple:
        return tuple(during(x, live, steps) for x in node if not hasattr(x, "span") or x.span(steps) in live)
    if not dataclasses.is_dataclass(node) or isinstance(node, (type, Control)):
        return node
    return dataclasses.replace(node, **{name: during(value, live, steps) for name, value in _parts(node)})


def _parts(node: Any) -> list[tuple[str, Any]]:
    """List the fields that may hold further parts of a job: neither static ones nor arrays of rows."""
    held = [f for f in dataclasses.fields(node) if f.metadata.get("pytree_node", True) and not f.metadata.get("rows")]
    return [(f.name, getattr(node, f.name)) for f in held]
