"""Composable Diffusion: Compositional Visual Generation with Composable Diffusion Models (arXiv 2206.01714).

The conjunction of prompts c_i, each with its own weight, and their negation where w_i < 0 (eq. 11 and 12)::

    eps = u + sum_i s w_i (c_i - u)

with the guidance scale s, as prompts joined by AND are commonly drawn. This is classifier-free guidance towards the
conditional prediction c = (1 - sum_i w_i) u + sum_i w_i c_i, and so it is computed here: one prompt of weight 1 is
that prompt to the last bit, whatever stands beside it at weight 0, and what is built on guidance (its rescaling,
MagicFusion) is built on the conjunction without knowing of it. In the authors' script every weight is a guidance scale
of its own: that is s = 1 with those scales as weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
from jaxtyping import Float

from jaxmix.rows import dataclass, per_row, static
from jaxmix.samplers.guidance import Branches, BranchFn, ClassifierFree, Guidance
from jaxmix.samplers.loop import Solver
from jaxmix.types import Array, ModelFn


def conjunction(
    uncond: Float[Array, "n h w c"], conds: Float[Array, "n k h w c"], weights: Float[Array, "n k"]
) -> Float[Array, "n h w c"]:
    """Return the conditional prediction that stands for several weighted ones, float32."""
    # Products and a sum, and no dot, which some devices would make of rounded factors.
    each = weights[:, :, None, None, None] * conds
    return (1 - weights.sum(1))[:, None, None, None] * uncond + each.sum(1)


@dataclasses.dataclass(frozen=True)
class Conjunction:
    """A denoiser whose branch 1 is the conjunction of several branches of another, with ``weights`` (n, k)."""

    model: Branches
    weights: Array
    parts: Sequence[int]

    def branches(self, which: Sequence[int], hw: tuple[int, int]) -> BranchFn:
        """Return the function that predicts some branches of each image; branch 1 is there beside branch 0 alone."""
        places: list[slice] = []
        asked: list[int] = []
        for branch in which:
            more = list(self.parts) if branch == 1 else [branch]
            places.append(slice(len(asked), len(asked) + len(more)))
            asked += more
        predict = self.model.branches(asked, hw)

        def composed(x: Array, t: Array, step: Array) -> Array:
            rows = predict(x, t, step)
            found = [
                conjunction(rows[:, places[which.index(0)].start], rows[:, place], self.weights)
                if branch == 1
                else rows[:, place.start]
                for branch, place in zip(which, places, strict=True)
            ]
            return jax.numpy.stack(found, 1)

        return composed


@dataclass
class Composed(Guidance):
    """Guide a batch towards conjunctions: the prompt of branch ``branches[i]`` has the weights ``weights[:, i]``.

    A row with fewer prompts than others has weight 0 at those that it lacks, which changes no bit of what is left.
    """

    weights: Float[Array, "n k"] = per_row()
    base: ClassifierFree | None = None
    branches: tuple[int, ...] = static(default=(1,))

    over: ClassVar[frozenset[str]] = frozenset({"ClassifierFree"})

    @property
    def scale(self) -> Float[Array, " n"]:
        """The scale of the guidance underneath."""
        assert self.base is not None, "stack() the guidances first"
        return self.base.scale

    def see(self, model: Branches) -> Branches:
        """Return the denoiser of the conjunctions."""
        return Conjunction(model, self.weights, self.branches)

    def __call__(self, model: Branches, solver: Solver, hw: tuple[int, int]) -> ModelFn:
        """Return the prediction that is guided towards the conjunctions."""
        assert self.base is not None, "stack() the guidances first"
        return self.base(self.see(model), solver, hw)
