"""DDIM inversion of a batch, its result, and how images are held to it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxmix.cards import Card, some
from jaxmix.control import QKV
from jaxmix.models.unet import subtree
from jaxmix.pipeline.job import Denoiser, added, flat, over_rows
from jaxmix.rows import specs, to_branches
from jaxmix.samplers import DDIMInversion, Pin, invert
from jaxmix.samplers.guidance import guide
from jaxmix.sharding import DATA
from jaxmix.types import Array, InputError


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


@functools.partial(jax.jit, static_argnames=("mesh", "record"))
def invert_rows(
    model: Denoiser,
    latents: Array,
    scale: Array | None,
    inversion: DDIMInversion,
    record: frozenset[str] = frozenset(),
    mesh: Mesh | None = None,
) -> tuple[Array, dict[str, QKV]]:
    """Run a DDIM inversion from clean latents (n, h, w, c).

    ``scale`` (n,) is the scale of classifier-free guidance, None for the conditional branch alone. Returns the states
    (n, steps + 1, h, w, c), the image first, and for each recorded site the projections of the conditional branch, (n,
    steps, tokens, heads, d) each: rows first, so that each device returns its own.
    """

    def run(model: Denoiser, latents: Array, scale: Array | None, inversion: DDIMInversion) -> Any:
        n, hw = latents.shape[0], (latents.shape[1], latents.shape[2])
        branches = (1,) if scale is None else (0, 1)
        count, unet, params = len(branches), model.unet, model.params
        rows = flat(model.text[slice(branches[0], 2)])
        controls = tuple(to_branches(c, tuple(map(float, branches))).prepare(rows, hw) for c in model.controls)
        extra = None if rows.pooled is None else unet.embed_added(params, added(rows))
        kv = unet.precompute(params, rows.context, hw, controls)

        def predict(x: Array, t: Array, step: Array) -> tuple[Array, Any]:
            x = jnp.repeat(x, count, axis=0)
            now = tuple(c.at(step, t).see(x, t, rows) for c in controls)
            pred, seen = unet.apply({"params": params}, x, t, kv, now, extra, mutable=["qkv"] if record else [])
            kept = {name: QKV(*(y[count - 1 :: count] for y in subtree(seen["qkv"], name)["qkv"])) for name in record}
            pred = pred.reshape(n, count, *pred.shape[1:])
            if scale is None:
                return pred[:, 0], kept
            return guide(pred[:, 0], pred[:, 1], scale), kept

        states, kept = invert(predict, inversion, latents)
        return jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1), (states, kept))

    row, everywhere = PartitionSpec(DATA), PartitionSpec()
    in_specs = (
        specs(model, DATA),
        row,
        None if scale is None else row,
        jax.tree.map(lambda _: everywhere, inversion),
    )
    return over_rows(run, mesh, in_specs)(model, latents, scale, inversion)
