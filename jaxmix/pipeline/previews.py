"""Cheap pictures of latents: a linear map from a cell's channels to the colour of its pixels, without the decoder.

A map has one row per channel of the scaled latents and one for 1, and gives red, green and blue from -1 to 1.
"""

from __future__ import annotations

import numpy as np

from jaxmix.models import VAEConfig
from jaxmix.pipeline import programs
from jaxmix.pipeline.parts import Parts
from jaxmix.types import AnyArray, Array, InputError

_SD = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
    (0.0, 0.0, 0.0),
)
"""Published widely for the autoencoder of Stable Diffusion 1 and 2."""

_SDXL = (
    (0.3920, 0.4054, 0.4549),
    (-0.2634, -0.0196, 0.0653),
    (0.0568, 0.1687, -0.0755),
    (-0.3112, -0.2359, -0.2076),
    (0.0, 0.0, 0.0),
)

_MINI = (
    (0.190, 0.144, 0.276),
    (-0.189, -0.180, -0.256),
    (-0.240, 0.088, 0.357),
    (0.184, 0.289, 0.113),
    (0.121, 0.019, 0.063),
)
"""Fitted on scenes: `python -m scripts.mini.preview`."""

MAPS = {(4, 8, 0.18215): _SD, (4, 8, 0.13025): _SDXL, (4, 4, 0.5156408): _MINI}
"""By what tells an autoencoder: its latent channels, its factor, and its scaling factor."""

_SAMPLES, _CELLS, _SIDE = 32, 4, 4


def known_map(config: VAEConfig) -> np.ndarray | None:
    """Return the map of an autoencoder that is known, float32 (c + 1, 3)."""
    for (channels, factor, scale), rows in MAPS.items():
        if (config.latent_channels, config.factor) == (channels, factor) and abs(config.scaling_factor - scale) < 1e-6:
            return np.asarray(rows, np.float32)
    return None


def fit_map(pipe: Parts) -> np.ndarray:
    """Return a map for any autoencoder, float32 (c + 1, 3), from what it decodes squares of random latents to."""
    channels = pipe.latent_shape[-1]
    drawn = np.random.default_rng(0).standard_normal((_SAMPLES, _CELLS, _CELLS, channels)).astype(np.float32)
    latents = drawn.repeat(_SIDE, 1).repeat(_SIDE, 2)
    made = np.asarray(programs.decode(pipe.vae, None, None, pipe.params["vae"], latents))
    side = made.shape[1] // _CELLS
    colours = made.reshape(_SAMPLES, _CELLS, side, _CELLS, side, 3).mean((2, 4)) * 2 - 1
    cells = np.concatenate([drawn.reshape(-1, channels), np.ones((drawn[..., 0].size, 1), np.float32)], 1)
    return np.linalg.lstsq(cells, colours.reshape(-1, 3), rcond=None)[0].astype(np.float32)


def preview(rows: np.ndarray, latents: AnyArray | Array) -> np.ndarray:
    """Return pictures uint8 (n, h, w, 3), one pixel a cell, of latents (n, h, w, c) under a map.

    Numbers that are not finite are black. Raises `InputError` for another shape.
    """
    x = np.asarray(latents, np.float32)
    if x.ndim != 4 or x.shape[-1] != len(rows) - 1:
        raise InputError(f"latents: found shape {x.shape}, expected (n, h, w, {len(rows) - 1})")
    made = x @ rows[:-1] + rows[-1]
    return np.round(np.clip(np.nan_to_num(made, nan=-1, posinf=-1, neginf=-1), -1, 1) * 127.5 + 127.5).astype(np.uint8)
