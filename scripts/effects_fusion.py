"""MagicFusion measured: an expert on a style that the general model lacks, blended into its pictures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jaxmix
from jaxmix.samplers import Phase, classifier_free_guidance, make_solver, sample
from train.scenes import Scenes
from train.scenes.captions import BACKGROUND_WORDS, STYLE_WORDS, with_article
from train.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class Fused:
    """Two prompts for one picture: the general model's object and place, and the expert's object in its own style."""

    general: str
    expert: str
    objects: tuple[int, int]


def fused(n: int, seed: int, style: str = "pixel") -> list[Fused]:
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
        other = with_article(STYLE_WORDS[style])
        found.append(Fused(f"{own} of {names[0]} {where}", f"{other} of {names[1]} {where}", (first, second)))
    return found


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


def measure_fused(images: np.ndarray, some: Sequence[Fused], scorer: Scorer) -> Mapping[str, np.ndarray]:
    """Measure uint8 pictures, one value a picture: whether each object, and both, are the scorer's first two."""
    first_two = np.argsort(-scorer(images)["object"], axis=-1)[:, :2]
    there = np.asarray([[o in row for o in one.objects] for row, one in zip(first_two, some, strict=True)])
    return {
        "general's object": there[:, 0].astype(np.float64),
        "expert's object": there[:, 1].astype(np.float64),
        "both": there.all(1).astype(np.float64),
    }


def average(pipe: jaxmix.Pipeline, expert: jaxmix.Pipeline, some: Sequence[Fused], seeds: Sequence[int]) -> np.ndarray:
    """Draw with the mean of both models' guided predictions, uint8: what blending has to beat."""
    n, h, w = len(some), *pipe.latent_shape[:2]
    sizes = (h * pipe.vae.config.factor, w * pipe.vae.config.factor, 0, 0, 0, 0)
    contexts = [pipe.condition(p, [None] * n, sizes)[0] for p in ([s.general for s in some], [s.expert for s in some])]
    solver = make_solver(pipe.sampler, pipe.schedule, pipe.default_steps)
    models = [p.params["unet"] for p in (pipe, expert)]
    x = _average(pipe.unet, models, contexts, solver, pipe.initial_latents(seeds), pipe.default_guidance_scale)
    return pipe.decode(x)


@functools.partial(jax.jit, static_argnums=0)
def _average(unet: Any, models: Any, contexts: Any, solver: Any, noise: jax.Array, scale: float) -> jax.Array:
    def guided(params: Any, context: jax.Array) -> Any:
        rows = context.reshape(-1, *context.shape[2:])
        return classifier_free_guidance(lambda x, t, step: unet.apply({"params": params}, x, t, rows), scale)

    both = [guided(params, context) for params, context in zip(models, contexts, strict=True)]
    mean = Phase(lambda x, t, step: (both[0](x, t, step) + both[1](x, t, step)) / 2, 0, solver.steps)
    return sample([mean], solver, noise * solver.init_scale)


def arguments(fusion: Mapping[str, Any], some: Sequence[Fused], expert: jaxmix.Pipeline) -> dict[str, Any]:
    """Return what a condition hands to `Pipeline.generate`."""
    return {"fusion": jaxmix.MagicFusion([one.expert for one in some], expert, **fusion)}
