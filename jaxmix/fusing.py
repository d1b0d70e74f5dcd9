"""MagicFusion as users hold it: which second model or prompt, and how the two are blended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmix import control as seam
from jaxmix.control import Control
from jaxmix.models.unet import AddedCond, norm_sites, sites
from jaxmix.programs import Blend, Expert, Fusion
from jaxmix.samplers import Solver
from jaxmix.types import Array, InputError

if TYPE_CHECKING:
    from jaxmix.pipeline import Pipeline


class Bound(NamedTuple):
    """What `Pipeline.generate` hands to the program; ``third`` is the third branch of one model with two prompts."""

    fusion: Fusion
    blend: Blend
    expert: Expert | None
    third: tuple[Array, AddedCond | None] | None


@dataclasses.dataclass(frozen=True)
class MagicFusion:
    """Blends the noise of the pipeline that draws (the general model) with that of an expert (arXiv 2303.13126).

    ``prompts`` are the expert's, one an image. ``expert`` is a pipeline with the same latents and schedule, or None for
    the same model; ``controls`` act inside the expert, None for the same as in the general model, and
    ``negative_prompts`` are its own, None for the same. With none of the three the two prompts share one unconditional
    branch, and a step takes three rows an image.

    ``mode`` 1 blends once t has come down to ``switch`` (a timestep, 0 to 999) and runs the general model before,
    2 blends while t is above it and runs the general model after. ``k_general`` and ``k_expert`` are inverse
    temperatures: a larger one shrinks its own model's share of the picture. They and ``strength`` (0: the general model
    alone) are numbers or one an image. As in the authors' code the general model's text encoder reads both prompts,
    and the expert's saliency is taken against the general model's unconditional prediction; ``own_text`` and
    ``own_uncond`` make both the expert's own. ``underflow`` is the code's float32 softmax.
    """

    prompts: Sequence[str]
    expert: Pipeline | None = None
    controls: Sequence[Control] | None = None
    negative_prompts: Sequence[str | None] | None = None
    mode: int = 2
    switch: float = 600
    k_general: float | Sequence[float] = 1.0
    k_expert: float | Sequence[float] = 1.0
    strength: float | Sequence[float] = 1.0
    own_text: bool = False
    own_uncond: bool = False
    underflow: bool = False

    def bind(
        self,
        pipe: Pipeline,
        controls: Sequence[Control],
        negatives: Sequence[str | None],
        sizes: Sequence[int],
        solver: Solver,
        hw: tuple[int, int],
    ) -> Bound | None:
        """Return what the program needs for a run of ``pipe``, None if no step is blended.

        Raises `InputError` for lists of another length, numbers out of range, and models that do not fit each other.
        """
        n = len(negatives)
        if isinstance(self.prompts, str) or len(self.prompts) != n:
            raise InputError(
                f"fusion: found {len(self.prompts)} expert prompts, expected one for each of the {n} images"
            )
        if self.mode not in (1, 2):
            raise InputError(
                f"fusion: mode is {self.mode!r}, expected 1 (blend after the switch) or 2 (blend before it)"
            )
        last = pipe.schedule.num_train_timesteps - 1
        if not 0 <= self.switch <= last:
            raise InputError(f"fusion: switch is {self.switch!r}, expected a timestep from 0 to {last}")
        for name in ("k_general", "k_expert", "strength"):
            found = np.asarray(getattr(self, name), np.float32)
            if found.shape not in ((), (n,)) or not np.isfinite(found).all() or found.min() < 0:
                raise InputError(f"fusion: {name} is {getattr(self, name)!r}, expected a number >= 0, or one an image")
        before = int(np.sum(np.asarray(solver.timesteps) > self.switch)) / solver.steps
        window = (0.0, before) if self.mode == 2 else (before, 1.0)
        if window[0] == window[1]:
            return None
        expert = self.expert or pipe
        fits(pipe, expert)
        k_general, k_expert, strength = (
            jnp.broadcast_to(jnp.asarray(x, jnp.float32), (n,)) for x in (self.k_general, self.k_expert, self.strength)
        )
        text = expert if self.own_text else pipe
        own_negatives = negatives if self.negative_prompts is None else self.negative_prompts
        if isinstance(own_negatives, str) or len(own_negatives) != n:
            raise InputError(
                f"fusion: found {len(own_negatives)} negative prompts, expected one for each of {n} images"
            )
        context, added = text.condition(self.prompts, own_negatives, sizes)
        flags: dict[str, Any] = {"window": window, "own_uncond": self.own_uncond, "underflow": self.underflow}
        if self.expert is None and self.controls is None and self.negative_prompts is None:
            third = context[:, 1:], None if added is None else AddedCond(*(x[:, 1:] for x in added))
            return Bound(Fusion(**flags), Blend(k_general, k_expert, strength), None, third)
        inside = tuple(controls if self.controls is None else self.controls)
        cfg = expert.unet.config
        seam.validate(inside, sites(cfg, hw), norm_sites(cfg, hw))
        tiled = tuple(seam.tile_rows(c, n) for c in inside)
        work = Blend(k_general, k_expert, strength, context, added)
        return Bound(Fusion(expert.unet, **flags), work, Expert(expert.params["unet"], tiled), None)


def fits(general: Pipeline, expert: Pipeline) -> None:
    """Raise `InputError` unless noise of one model is noise of the other: same latents, same schedule, same text."""
    pairs: dict[str, list[Any]] = {
        "vae latent_channels": [p.vae.config.latent_channels for p in (general, expert)],
        "vae scaling_factor": [p.vae.config.scaling_factor for p in (general, expert)],
        "vae factor": [p.vae.config.factor for p in (general, expert)],
        "prediction_type": [p.schedule.prediction_type for p in (general, expert)],
        "num_train_timesteps": [p.schedule.num_train_timesteps for p in (general, expert)],
        "unet cross_attention_dim": [p.unet.config.cross_attention_dim for p in (general, expert)],
        "unet addition_embed_type": [p.unet.config.addition_embed_type for p in (general, expert)],
    }
    for name, (a, b) in pairs.items():
        same = math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b
        if not same:
            raise InputError(f"fusion: {name} is {b!r} in the expert and {a!r} in the general model, expected the same")
    if not np.allclose(general.schedule.alphas_cumprod, expert.schedule.alphas_cumprod, atol=1e-5):
        raise InputError("fusion: the two models have different noise schedules, expected the same")
