"""MagicFusion (arXiv 2303.13126) as a method: which second model or prompt, and how the two are blended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxmix import rows as over
from jaxmix.control import Control
from jaxmix.pipeline.batching import Batch
from jaxmix.pipeline.given import check_prompt
from jaxmix.pipeline.job import Denoiser
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import BLEND, Method, Request
from jaxmix.samplers import SaliencyBlend
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class MagicFusion(Method):
    """Blend the noise of the drawing pipeline (the general model) with that of an expert (arXiv 2303.13126).

    ``prompts`` are the expert's, one per image. ``expert`` is a pipeline with the same latents and schedule, or None
    for the same model; ``controls`` act inside the expert, and ``negative_prompts`` are the expert's: None for those of
    the general model. If all three are None, the two prompts share one unconditional branch, and a step takes three
    rows per image.

    ``mode`` 1 blends once t has come down to ``switch`` (a timestep, 0 to 999) and runs the general model before,
    2 blends while t is above it and runs the general model after. ``k_general`` and ``k_expert`` are inverse
    temperatures: a larger one shrinks its own model's share of the picture. They and ``strength`` (0: the general model
    alone) are one number, or one per image. As in the authors' code, the general model's text encoder reads both
    prompts, and the expert's saliency is taken against the general model's unconditional prediction; ``own_text`` and
    ``own_uncond`` use the expert's own instead. ``underflow`` is the code's float32 softmax.
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

    when: ClassVar[int] = BLEND
    per_image: ClassVar[tuple[str, ...]] = ("prompts", "negative_prompts", "k_general", "k_expert", "strength")

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse lists of a wrong length, numbers out of range, and models that do not fit each other."""
        n = request.n
        if isinstance(self.prompts, str) or len(self.prompts) != n:
            raise InputError(
                f"fusion: found {len(self.prompts)} expert prompts, expected one for each of the {n} images"
            )
        if self.mode not in (1, 2):
            raise InputError(
                f"fusion: mode is {self.mode!r}, expected 1 (blend after the switch) or 2 (blend before it)"
            )
        for i, prompt in enumerate(self.prompts):
            check_prompt(prompt, request.syntax, f"fusion: prompts[{i}]")
        last = pipe.schedule.num_train_timesteps - 1
        if not 0 <= self.switch <= last:
            raise InputError(f"fusion: switch is {self.switch!r}, expected a timestep from 0 to {last}")
        for name in ("k_general", "k_expert", "strength"):
            over.numbers(f"fusion: {name}", getattr(self, name), n, "images", least=0.0)
        own = self.negative_prompts
        if own is not None and (isinstance(own, str) or len(own) != n):
            raise InputError(f"fusion: found {len(own)} negative prompts, expected one for each of the {n} images")
        if np.any(request.guidance_rescale):
            raise InputError("fusion: blends guided predictions, expected no guidance_rescale")
        fits(pipe, self.expert or pipe)
        if self.controls is not None:
            (self.expert or pipe).check_controls(over.tile(tuple(self.controls), n), request.hw(pipe))

    def further_prompts(self, n: int) -> list[list[str]]:
        """Return the expert's prompts of each image."""
        own = self.negative_prompts or [None] * n
        return [[text for text in texts if text is not None] for texts in zip(self.prompts, own, strict=True)]

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the guidance without its text and its numbers."""
        window = self.window(pipe, request)
        if window is None:
            return request
        if self.expert is not None and self.controls is None:
            self.expert.check_controls(request.controls, request.hw(pipe))
        none = jnp.zeros((request.n,))
        return request.add(guidance=(SaliencyBlend(none, none, none, window=window),))

    def take(self, batch: Batch, n: int) -> MagicFusion:
        """Return the method for the images of a batch."""
        made = super().take(batch, n)
        if self.controls is None:
            return made
        return dataclasses.replace(made, controls=over.take(over.tile(tuple(self.controls), n), batch.rows))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the blending guidance, and the expert's prompt as a third branch or as a second denoiser."""
        window, n = self.window(pipe, request), request.n
        if window is None:
            return request
        k_general, k_expert, strength = (
            jnp.asarray(over.numbers(name, getattr(self, name), n)) for name in ("k_general", "k_expert", "strength")
        )
        flags: dict[str, Any] = {"window": window, "own_uncond": self.own_uncond, "underflow": self.underflow}
        blend = SaliencyBlend(k_general, k_expert, strength, **flags)
        if self.expert is None and self.controls is None and self.negative_prompts is None:
            request, branch = request.with_branch(pipe, self.prompts)
            return request.add(guidance=(dataclasses.replace(blend, branch=branch),))
        expert = self.expert or pipe
        negatives = request.negatives if self.negative_prompts is None else self.negative_prompts
        assert negatives is not None and request.sizes is not None
        text = request.encoded(expert if self.own_text else pipe, [negatives, self.prompts])
        told_the_same = [a == b for a, b in zip(self.prompts, request.prompts, strict=True)]
        inside = over.own_words(request.controls, np.asarray(told_the_same, np.float32))
        if self.controls is not None:
            inside = over.tile(tuple(self.controls), n)
        model = Denoiser(expert.unet, expert.params["unet"], text, inside)
        return request.add(guidance=(dataclasses.replace(blend, expert=model),))

    def window(self, pipe: Pipeline, request: Request) -> tuple[float, float] | None:
        """Return the share of the steps that are blended, None if there are none."""
        solver = request.solver(pipe)
        before = int(np.sum(np.asarray(solver.timesteps) > self.switch)) / solver.steps
        window = (0.0, before) if self.mode == 2 else (before, 1.0)
        return None if window[0] == window[1] else window


def fits(general: Pipeline, expert: Pipeline) -> None:
    """Raise `InputError` unless noise of one model is noise of the other: same latents, same schedule, same text."""
    pairs: dict[str, list[Any]] = {
        "vae latent_channels": [p.vae.config.latent_channels for p in (general, expert)],
        "vae scaling_factor": [p.vae.config.scaling_factor for p in (general, expert)],
        "vae factor": [p.vae.config.factor for p in (general, expert)],
        "prediction_type": [p.schedule.prediction_type for p in (general, expert)],
        "num_train_timesteps": [p.schedule.num_train_timesteps for p in (general, expert)],
        "unet cross_attention_dim": [p.unet.config.cross_attention_dim for p in (general, expert)],
        "unet time_cond_proj_dim": [p.unet.config.time_cond_proj_dim for p in (general, expert)],
        "unet addition_embed_type": [p.unet.config.addition_embed_type for p in (general, expert)],
    }
    for name, (a, b) in pairs.items():
        same = math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b
        if not same:
            raise InputError(f"fusion: {name} is {b!r} in the expert and {a!r} in the general model, expected the same")
    if not np.allclose(general.schedule.alphas_cumprod, expert.schedule.alphas_cumprod, atol=1e-5):
        raise InputError("fusion: the two models have different noise schedules, expected the same")
