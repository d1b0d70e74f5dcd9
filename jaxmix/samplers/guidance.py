"""Guidance: how the branches of a denoiser become one prediction, above all classifier-free (arXiv 2207.12598).

A guidance is a tree (`jaxmix.rows`) of per-image numbers with a static window of steps. Called with the denoiser it
returns the model function of a phase. Exactly one acts in every step: the last whose window covers it. So two whose
windows overlap exclude each other, unless the later is built on the earlier, its ``base``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxmix.control import rounded
from jaxmix.rows import dataclass, per_row, static
from jaxmix.samplers.loop import Solver
from jaxmix.types import Array, InputError, ModelFn

BranchFn = Callable[[Array, Array, Array], Array]
"""``(x, t, step) -> predictions``: latents (n, h, w, c) to (n, branches, h, w, c), float32."""


class Branches(Protocol):
    """What a guidance needs of a denoiser."""

    def branches(self, which: Sequence[int], hw: tuple[int, int]) -> BranchFn:
        """Return the function that predicts some branches of each image: 0 unconditional, 1 conditional, 2 ... more.

        Everything that does not depend on the step is computed in this call, so call it outside the loop.
        """
        ...


@dataclass
class Guidance:
    """A rule from the branches of a denoiser to one prediction an image. Subclasses are `jaxmix.rows.dataclass`es.

    ``window`` is the share of the sampling steps, from start (0) to end (1), in which it acts.
    """

    window: tuple[float, float] = static(default=(0.0, 1.0), kw_only=True)

    #: Names of the guidances that this one can take as its ``base``.
    over: ClassVar[frozenset[str]] = frozenset()

    def span(self, steps: int) -> tuple[int, int]:
        """Return the (start, stop) of the window among so many sampling steps."""
        return rounded(self.window, steps)

    def __call__(self, model: Branches, solver: Solver, hw: tuple[int, int]) -> ModelFn:
        """Return the model function, in the schedule's own prediction type, for latents of size ``hw``."""
        raise NotImplementedError

    def see(self, model: Branches) -> Branches:
        """Return a denoiser as this guidance has it, for one that is built on it."""
        return model


@dataclass
class Unguided(Guidance):
    """The conditional branch alone, at half the cost."""

    def __call__(self, model: Branches, solver: Solver, hw: tuple[int, int]) -> ModelFn:
        """Return the prediction of branch 1."""
        alone = model.branches((1,), hw)
        return lambda x, t, step: alone(x, t, step)[:, 0]


@dataclass
class ClassifierFree(Guidance):
    """`guide`, and the rescaling of `classifier_free_guidance`; ``rescale`` None is 0 and costs nothing."""

    scale: Float[Array, " n"] = per_row()
    rescale: Float[Array, " n"] | None = per_row(default=None)

    def __call__(self, model: Branches, solver: Solver, hw: tuple[int, int]) -> ModelFn:
        """Return the guided prediction of branches 0 and 1."""
        rescale = 0.0 if self.rescale is None else self.rescale
        return classifier_free_guidance(model.branches((0, 1), hw), self.scale, rescale)


def stack(guidance: Sequence[Any]) -> tuple[Any, ...]:
    """Return guidances as a job holds them: each that needs a ``base`` is given the one it is built on.

    The first acts wherever no other does. Raises `InputError` for two that act in the same steps without being built on
    each other.
    """
    first, *rest = guidance
    out = [first]
    for g in rest:
        under = first
        for before in out[1:]:
            if max(before.window[0], g.window[0]) < min(before.window[1], g.window[1]):
                names = type(before).__name__, type(g).__name__
                if names[0] not in g.over or before.window[0] > g.window[0] or before.window[1] < g.window[1]:
                    raise InputError(f"{names[0]} and {names[1]} exclude each other: both predict noise in some steps")
                under = before
        if g.over:
            if type(under).__name__ not in g.over:
                raise InputError(
                    f"{type(under).__name__} and {type(g).__name__} exclude each other: the latter is built on "
                    f"{', '.join(sorted(g.over))}"
                )
            g = g if g.base is not None else dataclasses.replace(g, base=under)
        out.append(g)
    return tuple(out)


def by_branch(rows_fn: ModelFn, branches: int) -> BranchFn:
    """Return the function that predicts every branch of each image, float32 (n, branches, h, w, c).

    `rows_fn` is called with that many rows per image, branch minor: u0, c0, u1, c1, ... (so that sharding the rows
    never separates the branches of an image), and must hold the contexts of the branches in that order.
    """

    def predict(x: jax.Array, t: jax.Array, step: jax.Array) -> jax.Array:
        rows_t = jnp.repeat(t, branches, axis=0) if jnp.ndim(t) else t
        rows = rows_fn(jnp.repeat(x, branches, axis=0), rows_t, step)
        return rows.astype(jnp.float32).reshape(x.shape[0], branches, *rows.shape[1:])

    return predict


def classifier_free_guidance(predict: BranchFn, scale: jax.Array | float, rescale: jax.Array | float = 0.0) -> ModelFn:
    """Return the guided model function, `guide` of both branches, one row per image.

    `predict` returns the unconditional and the conditional branch, as `by_branch` does. `scale` is a scalar or (n,),
    traced. Guidance is computed in float32, whatever dtype the model runs in.

    `rescale`, a scalar or (n,) from 0 to 1, brings the standard deviation of each guided row back towards that of its
    conditional one (arXiv 2305.08891, eq. 14-16). It is traced; 0 changes no bit, and as a Python number costs nothing.
    """
    scale = jnp.asarray(scale, jnp.float32)
    rescaling = isinstance(rescale, jax.Array) or bool(rescale != 0)
    rescale = jnp.asarray(rescale, jnp.float32)

    def guided(x: jax.Array, t: jax.Array, step: jax.Array) -> jax.Array:
        for name, value in (("scale", scale), ("rescale", rescale)):
            if value.ndim and value.shape != x.shape[:1]:
                raise ValueError(f"guidance {name} has shape {value.shape}, expected () or {x.shape[:1]}")
        rows = predict(x, t, step)
        uncond, cond = rows[:, 0], rows[:, 1]
        mixed = guide(uncond, cond, scale)
        return _rescaled(mixed, cond, _per_row(rescale, uncond)) if rescaling else mixed

    return guided


def guide(uncond: jax.Array, cond: jax.Array, scale: jax.Array) -> jax.Array:
    """Return u + scale (c - u) where ``scale``, () or (n,), is above 1, and elsewhere the conditional prediction alone.

    So a scale of at most 1 is no guidance, as in diffusers: 0 is the documented setting of SDXL Turbo and of other
    models whose guidance is distilled into them.
    """
    scale = _per_row(scale, uncond)
    return jnp.where(scale > 1, uncond + scale * (cond - uncond), cond)


def _rescaled(mixed: jax.Array, cond: jax.Array, rescale: jax.Array) -> jax.Array:
    axes = tuple(range(1, cond.ndim))
    spread = jnp.std(mixed, axes, keepdims=True)
    # A constant row has nothing to rescale.
    ratio = jnp.where(spread > 0, jnp.std(cond, axes, keepdims=True) / jnp.where(spread > 0, spread, 1), 1)
    return jnp.where(rescale == 0, mixed, rescale * (mixed * ratio) + (1 - rescale) * mixed)


def _per_row(value: jax.Array, rows: jax.Array) -> jax.Array:
    return value.reshape(value.shape + (1,) * (rows.ndim - value.ndim))
