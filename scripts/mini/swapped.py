"""Does a denoiser heed where a caption says that things are? Its loss under a caption and under the same one swapped.

The idea is that of Diffusion Classifier (arXiv 2303.16203): of two captions the model holds the one under which it
denoises a picture better. Pictures are fresh real scenes; the other caption has the opposite place, or the two objects
the other way round; noise is the same under both. Where a model does not heed the words, the losses differ by chance.

    python -m scripts.mini.swapped --model mini --scenes 192
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.types import InputError
from train.scenes import PLACES, Plan, Scenes

OPPOSITE = dict(zip(PLACES[:4], (PLACES[1], PLACES[0], PLACES[3], PLACES[2]), strict=True))


@dataclasses.dataclass
class Config:
    """What to measure.

    Attributes:
        model: "mini" or a diffusers folder, trained on scenes whose captions say places (arrangement anywhere).
        scenes: of each kind.
        timesteps: at which noise is added.
        objects: number of objects that the model was trained on.
        batch_size: pictures denoised at a time.
        seed: of the scenes and of the noise.
    """

    model: str = "mini"
    scenes: int = 192
    timesteps: list[int] = dataclasses.field(default_factory=lambda: [500, 700, 850, 930, 970, 990])
    objects: int = 24
    batch_size: int = 32
    seed: int = 991

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        for name, least in (("scenes", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: found {getattr(self, name)}, expected {least} or more")
        if not self.timesteps:
            raise InputError("timesteps: found none, expected one or more")


def swapped(plan: Plan) -> tuple[str, Plan] | None:
    """Return the kind of a plan and the plan that says the opposite; None if it has no opposite."""
    if len(plan.objects) == 2:
        kind = "two objects, a place each" if plan.places else "two objects, their relation"
        return kind, dataclasses.replace(plan, objects=plan.objects[::-1])
    if plan.places and plan.places[0] in OPPOSITE:
        return "one object, its place", dataclasses.replace(plan, places=(OPPOSITE[plan.places[0]],))
    return None


def pairs(scenes: Scenes) -> Iterator[tuple[str, np.ndarray, str, str]]:
    """Yield scenes: their kind, picture, caption, and swapped caption."""
    for i in range(len(scenes)):
        rng = np.random.Generator(np.random.Philox(key=[scenes.seed, i]))
        plan = scenes.plan(rng)
        if found := swapped(plan):
            yield found[0], scenes.render(plan, rng)[0], scenes.caption(plan), scenes.caption(found[1])


def in_batches(function: Callable[[Any], Any], rows: Any, size: int) -> np.ndarray:
    """Apply a function to so many rows at a time."""
    return np.concatenate([np.asarray(function(rows[i : i + size])) for i in range(0, len(rows), size)])


@functools.partial(jax.jit, static_argnums=0)
def _predict(unet: Any, params: Any, x: jax.Array, t: jax.Array, states: jax.Array) -> jax.Array:
    return unet.apply({"params": params}, x, t, states)


def losses(pipe: jaxmix.Pipeline, latents: np.ndarray, states: np.ndarray, t: int, cfg: Config) -> np.ndarray:
    """Return the denoising loss (n,) of latents (n, h, w, c) under text states (n, s, d) at a timestep.

    The noise depends on the seed, t and the row alone.
    """
    noise = jax.random.normal(jax.random.key(cfg.seed + t), latents.shape)
    steps = jnp.full(len(latents), t)
    target, noisy = (f(latents, noise, steps) for f in (pipe.schedule.target, pipe.schedule.add_noise))

    def run(rows: np.ndarray) -> jax.Array:
        said = _predict(pipe.unet, pipe.params["unet"], noisy[rows], steps[rows], states[rows])
        return jnp.mean(jnp.square(said - target[rows]), (1, 2, 3))

    return in_batches(run, np.arange(len(latents)), cfg.batch_size)


def main(cfg: Config) -> int:
    """Draw scenes of each kind and print a row for every kind and timestep."""
    command.enable_compilation_cache()
    pipe = jaxmix.load(cfg.model)
    last = len(pipe.schedule.alphas_cumprod) - 1
    if unknown := [t for t in cfg.timesteps if not 0 <= t <= last]:
        raise InputError(f"timesteps: found {unknown}, expected 0 to {last}")
    if pipe.text_encoder_2 is not None:
        raise InputError(f"{cfg.model}: found an SDXL model, expected one that was trained on scenes")
    side = pipe.latent_shape[0] * pipe.vae.config.factor
    told = {"labelled": 0.0, "counts": 0.0, "place_words": 1.0, "two_objects": 0.7, "three_objects": 0.0}
    kinds: dict[str, list[tuple[np.ndarray, str, str]]] = {}
    for kind, image, caption, other in pairs(Scenes(side, cfg.objects, seed=cfg.seed, arrangement="anywhere", **told)):
        if len(rows := kinds.setdefault(kind, [])) < cfg.scenes:
            rows.append((image, caption, other))
        if len(kinds) == 3 and all(len(rows) == cfg.scenes for rows in kinds.values()):
            break
    for kind, rows in sorted(kinds.items()):
        images, captions, others = zip(*rows, strict=True)
        latents = in_batches(pipe.encode_images, np.stack(images), cfg.batch_size)
        states = [
            in_batches(lambda texts: pipe.encode_text(texts).last_hidden_state, list(texts), cfg.batch_size)
            for texts in (captions, others)
        ]
        for t in cfg.timesteps:
            true, wrong = (losses(pipe, latents, s, t, cfg) for s in states)
            gain = wrong - true
            print(
                f"{kind}, t {t}: loss {true.mean():.4f}, swapped {wrong.mean():.4f}, difference {gain.mean():+.4f} "
                f"±{1.96 * gain.std(ddof=1) / len(gain) ** 0.5:.4f}, the true caption better in "
                f"{100 * np.mean(gain > 0):.0f} % of {len(gain)}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    command.run(main)
