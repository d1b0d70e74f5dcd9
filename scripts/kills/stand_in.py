"""A stand-in for a pipeline: noise that depends on the seed, and nothing to compile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxmix.schedule import NoiseSchedule


class StandIn:
    """What a job asks of a pipeline; its pictures of 32 pixels take no time."""

    default_steps, default_guidance_scale, sampler = 2, 3.0, "ddim"
    latent_shape = (8, 8, 4)
    schedule = NoiseSchedule()
    vae = SimpleNamespace(config=SimpleNamespace(factor=4))
    encoders: tuple[Any, ...] = ()
    text_encoder_2 = None

    def chunks(self, encoder: Any, prompts: Any, reading: Any) -> list[Any]:
        """Return one chunk a prompt."""
        return [SimpleNamespace(ids=[0]) for _ in prompts]

    def check_size(self, *arguments: Any) -> None:
        """Find room for any size."""

    def has_layers(self, text: str) -> bool:
        """Know no learnt word."""
        return False

    def draw(self, request: Any, methods: Any, mesh: Any, tile: Any, output: str) -> np.ndarray:
        """Return pictures in [0, 1]."""
        noise = [np.random.default_rng(seed).random((8, 8, 3), np.float32) for seed in request.seeds]
        return np.stack(noise).repeat(4, 1).repeat(4, 2)
