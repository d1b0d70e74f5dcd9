"""MagicFusion measured: an expert on a style that the general model lacks, blended into its pictures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix.pipeline.text import encode_branches
from jaxmix.samplers import Phase, make_solver, sample
from jaxmix.samplers.fusion import blend, expert_mask, saliency
from train.scenes import Scenes
from train.scenes.captions import BACKGROUND_WORDS, STYLE_WORDS, with_article
from train.scenes.splits import HELD_OUT_STYLE
from train.scorer import Scorer

STYLE = HELD_OUT_STYLE  # what the expert draws and the general model has never seen
SWITCH = 600  # MagicFusion's default: blended above this timestep


@dataclasses.dataclass(frozen=True)
class Fused:
    """Two prompts for one picture: the general model's object and place, and the expert's object in its own style."""

    general: str
    expert: str
    objects: tuple[int, int]


def fused(n: int, seed: int) -> list[Fused]:
    """Return n pairs of prompts with two different objects and one background."""
    scenes = Scenes(split="all", seed=seed)
    backgrounds, styles = sorted(BACKGROUND_WORDS), list(scenes.styles)
    found = []
    for i in range(n):
        rng = np.random.Generator(np.random.Philox(key=[seed, (0xF5 << 32) + i]))
        first, second = (int(x) for x in rng.choice(scenes.objects, 2, replace=False))
        where = BACKGROUND_WORDS[backgrounds[rng.integers(len(backgrounds))]]
        names = [with_article(scenes.atlas.objects[o]) for o in (first, second)]
        own = with_article(STYLE_WORDS[styles[i % len(styles)]])
        other = with_article(STYLE_WORDS[STYLE])
        found.append(Fused(f"{own} of {names[0]} {where}", f"{other} of {names[1]} {where}", (first, second)))
    return found


AREAS = {
    "MagicFusion, mode 2, switch 600": 1.0,
    "k_expert 0.3": 0.3,
    "k_expert 3": 3.0,
    "k_expert 10": 10.0,
}  # k_expert of the conditions whose share of the expert is measured

SWITCHES: dict[str, dict[str, Any] | None] = {
    "general model alone": None,
    "MagicFusion, mode 2, switch 600": {},
    "mode 2, switch 0": {"switch": 0},
    "mode 1, switch 850": {"mode": 1, "switch": 850},
    "own unconditional": {"own_uncond": True},
    "k_expert 0.3": {"k_expert": 0.3},
    "k_expert 3": {"k_expert": 3.0},
    "k_expert 10": {"k_expert": 10.0},
}


def measure_fused(images: np.ndarray, some: Sequence[Fused], scorer: Scorer) -> dict[str, np.ndarray]:
    """Measure uint8 pictures, one value per picture.

    Whether each object, and both, are the scorer's first two; the scorer's probability of the expert's style.
    """
    said = scorer(images)
    first_two = np.argsort(-said["object"], axis=-1)[:, :2]
    there = np.asarray([[o in row for o in one.objects] for row, one in zip(first_two, some, strict=True)])
    return {
        "general's object": there[:, 0].astype(np.float64),
        "expert's object": there[:, 1].astype(np.float64),
        "both": there.all(1).astype(np.float64),
        "expert's style": said["style"][:, scorer.styles.index(STYLE)].astype(np.float64),
    }


def average(pipe: jaxmix.Pipeline, expert: jaxmix.Pipeline, some: Sequence[Fused], seeds: Sequence[int]) -> np.ndarray:
    """Draw with the mean of both models' guided predictions, uint8, which blending has to beat."""
    models, contexts, solver = _both(pipe, expert, some)
    x = _average(pipe.unet, models, contexts, solver, pipe.initial_latents(seeds), pipe.default_guidance_scale)
    return pipe.decode(x)


def areas(
    pipe: jaxmix.Pipeline, expert: jaxmix.Pipeline, some: Sequence[Fused], seeds: Sequence[int], k_expert: float
) -> np.ndarray:
    """Return the expert's share of the pixels, the mean over the blended steps of mode 2, (n,)."""
    models, contexts, solver = _both(pipe, expert, some)
    x, shares = pipe.initial_latents(seeds) * solver.init_scale, []
    memory = solver.memory(x)
    for i in range(int((np.asarray(solver.timesteps) > SWITCH).sum())):
        x, memory, share = _blended(
            pipe.unet, models, contexts, solver, i, x, memory, k_expert, pipe.default_guidance_scale
        )
        shares.append(np.asarray(share))
    return np.mean(shares, 0)


def _both(pipe: jaxmix.Pipeline, expert: jaxmix.Pipeline, some: Sequence[Fused]) -> tuple[Any, Any, Any]:
    """Return the parameters of both models, their contexts by the general model's text encoder, and the solver."""
    n, h, w = len(some), *pipe.latent_shape[:2]
    sizes = (h * pipe.vae.config.factor, w * pipe.vae.config.factor, 0, 0, 0, 0)
    prompts = [s.general for s in some], [s.expert for s in some]
    contexts = [encode_branches(pipe, [[None] * n, p], sizes).context for p in prompts]
    solver = make_solver(pipe.sampler, pipe.schedule, pipe.default_steps)
    return [p.params["unet"] for p in (pipe, expert)], contexts, solver


def _branches(unet: Any, models: Any, contexts: Any, x: jax.Array, t: jax.Array) -> list[jax.Array]:
    """Return each model's (unconditional, conditional) predictions (n, 2, h, w, c)."""
    found = []
    for params, context in zip(models, contexts, strict=True):
        rows = context.reshape(-1, *context.shape[2:])
        pred = unet.apply({"params": params}, jnp.repeat(x, 2, 0), t, rows)
        found.append(pred.reshape(len(x), 2, *x.shape[1:]))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _average(unet: Any, models: Any, contexts: Any, solver: Any, noise: jax.Array, scale: float) -> jax.Array:
    def mean(x: jax.Array, t: jax.Array, step: jax.Array) -> jax.Array:
        both = _branches(unet, models, contexts, x, t)
        return sum(u + scale * (c - u) for u, c in ((b[:, 0], b[:, 1]) for b in both)) / 2

    return sample([Phase(mean, 0, solver.steps)], solver, noise * solver.init_scale)


@functools.partial(jax.jit, static_argnums=0)
def _blended(
    unet: Any, models: Any, contexts: Any, solver: Any, i: Any, x: jax.Array, memory: Any, k: Any, scale: Any
) -> tuple[jax.Array, Any, jax.Array]:
    t, ones = solver.timesteps[i], jnp.ones((len(x),))
    general, expert = _branches(unet, models, contexts, x, t)
    abar = jnp.square(solver.signals[i])
    per_eps = jnp.sqrt(abar) if solver.prediction_type == "v_prediction" else 1.0
    saliencies = [saliency(scale * per_eps * (b[:, 1] - general[:, 0])) for b in (general, expert)]
    share = expert_mask(*saliencies, ones, k * ones).mean((1, 2))
    pred = blend(general, expert, scale * ones, ones, k * ones, ones, per_eps=per_eps)
    return *solver.step(i, x, memory, pred), share


def arguments(fusion: Mapping[str, Any], some: Sequence[Fused], expert: jaxmix.Pipeline) -> dict[str, Any]:
    """Return the arguments of a condition for `Pipeline.generate`."""
    return {"methods": (jaxmix.MagicFusion([one.expert for one in some], expert, **fusion),)}
