"""Fit the map from latents to colours that previews of the embedded model use, on scenes, and say how good it is.

python -m scripts.mini.preview
"""

from __future__ import annotations

import dataclasses

import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.pipeline.previews import fit_map, known_map
from train.scenes import Scenes


@dataclasses.dataclass
class Config:
    """What to fit.

    Attributes:
        model: "mini", or a diffusers folder for pictures of the scenes' size.
        scenes: number of scenes; the last quarter is measured on.
        ridge: keeps channels that move together from getting large factors of both signs, which would show noise.
        batch_size: pictures encoded at a time.
        seed: of the scenes.
    """

    model: str = "mini"
    scenes: int = 400
    ridge: float = 0.03
    batch_size: int = 100
    seed: int = 5


def explained(cells: np.ndarray, colours: np.ndarray, rows: np.ndarray) -> float:
    """Return the share of the colours' variance that a map explains."""
    left = np.square(colours - np.clip(cells @ rows, -1, 1)).sum()
    return float(1 - left / np.square(colours - colours.mean(0)).sum())


def main(cfg: Config) -> int:
    """Fit and print."""
    command.enable_compilation_cache()
    pipe, scenes = jaxmix.load(cfg.model), Scenes(split="all", seed=cfg.seed)
    images = np.stack([scenes[i]["image"] for i in range(cfg.scenes)])
    starts = range(0, cfg.scenes, cfg.batch_size)
    latents = np.concatenate([np.asarray(pipe.encode_images(images[i : i + cfg.batch_size])) for i in starts])
    n, h, w, channels = latents.shape
    factor = pipe.vae.config.factor
    colours = images.reshape(n, h, factor, w, factor, 3).mean((2, 4)).reshape(-1, 3) / 127.5 - 1
    cells = np.concatenate([latents.reshape(-1, channels), np.ones((n * h * w, 1), np.float32)], 1)
    learnt = n * 3 // 4 * h * w
    some = cells[:learnt].astype(np.float64)
    held = np.diag([cfg.ridge] * channels + [0.0])
    fitted = np.linalg.solve(some.T @ some / learnt + held, some.T @ colours[:learnt] / learnt)
    print("fitted on scenes:")
    for row in fitted:
        print("    (" + ", ".join(f"{x:.3f}" for x in row) + "),")
    known = known_map(pipe.vae.config)
    rows = {"fitted": fitted, "in the package": known, "from decoded squares alone": fit_map(pipe)}
    for name, made in rows.items():
        if made is not None:
            print(f"{name}: {100 * explained(cells[learnt:], colours[learnt:], made):.1f} % of the variance of colours")
    return 0


if __name__ == "__main__":
    command.run(main)
