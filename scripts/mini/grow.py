"""Start a model for another autoencoder from one that is trained: the first model's words and shapes, new latents.

The embedded model's second version has the UNet and text encoder of the first, but latents of pictures twice as large,
with twice the channels, and longer captions. Latents of the two autoencoders lie on the same grid, so a linear map
between them, fitted on scenes, turns the first model's outer convolutions into the new ones; positions that no caption
had are started from the last that one had. Training then goes on with `train.text_to_image`.

    python -m scripts.mini.grow --vae train/mini2_vae --positions 48 --out runs/grown
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import jaxmix
from jaxmix import command
from jaxmix.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel, VAEConfig
from jaxmix.types import InputError
from jaxmix.weights import load_tree, read_config
from train.scenes import Scenes


@dataclasses.dataclass
class Config:
    """What to grow.

    Attributes:
        model: the model to start from.
        vae: folder of the new autoencoder, whose latents for pictures of `size` have the grid of the first one's.
        positions: tokens that the new text encoder reads.
        out: folder for the new pipeline.
        scenes: number of scenes that the map is fitted on; a quarter more is measured on.
        size: side of the new model's pictures, in pixels.
        batch_size: pictures encoded at a time.
    """

    model: str = "mini"
    vae: str = "train/mini2_vae"
    positions: int = 48
    out: str = "runs/grown"
    scenes: int = 320
    size: int = 128
    batch_size: int = 40


def fit(cells: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix and offset that best turn `cells` (n, a) into `wanted` (n, b), by least squares."""
    design = np.concatenate([cells, np.ones((len(cells), 1), cells.dtype)], 1).astype(np.float64)
    rows = np.linalg.lstsq(design, wanted, rcond=None)[0]
    return rows[:-1].astype(np.float32), rows[-1].astype(np.float32)


def explained(cells: np.ndarray, wanted: np.ndarray, rows: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the share of the variance of `wanted` that the map explains."""
    left = np.square(wanted - cells @ rows[0] - rows[1]).sum()
    return float(1 - left / np.square(wanted - wanted.mean(0)).sum())


def main(cfg: Config) -> int:
    """Fit, grow, save."""
    command.enable_compilation_cache()
    pipe = jaxmix.load(cfg.model)
    vae = AutoencoderKL(VAEConfig.from_dict(read_config(Path(cfg.vae))))
    if cfg.positions < (least := pipe.text_encoder.config.max_position_embeddings):
        raise InputError(f"positions: found {cfg.positions}, expected {least} or more, those of {cfg.model}")
    if cfg.size % vae.config.factor:
        raise InputError(f"size: found {cfg.size}, expected a multiple of {vae.config.factor}, as {cfg.vae} has it")
    channels = vae.config.latent_channels
    shape = {"in_channels": channels, "out_channels": channels, "sample_size": cfg.size // vae.config.factor}
    unet = UNet2DConditionModel(dataclasses.replace(pipe.unet.config, **shape))
    text = CLIPTextModel(dataclasses.replace(pipe.text_encoder.config, max_position_embeddings=cfg.positions))
    params = {name: jax.tree.map(np.array, pipe.params[name]) for name in ("unet", "text_encoder")}
    trees = {**params, "vae": load_tree(cfg.vae, vae.abstract_params())}
    new = dataclasses.replace(pipe, unet=unet, text_encoder=text, vae=vae, params=trees)
    scenes = Scenes(size=cfg.size, arrangement="anywhere", two_objects=0.45, three_objects=0.15)
    images = np.stack([scenes[i]["image"] for i in range(cfg.scenes * 5 // 4)])
    small = cfg.size * pipe.vae.config.factor // vae.config.factor
    reduced = np.stack([np.asarray(Image.fromarray(x).resize((small, small), Image.Resampling.BOX)) for x in images])
    starts = range(0, len(images), cfg.batch_size)
    latents = [
        np.concatenate([np.asarray(one.encode_images(x[i : i + cfg.batch_size])) for i in starts])
        for one, x in ((pipe, reduced), (new, images))
    ]
    was, now = (x.reshape(-1, x.shape[-1]) for x in latents)
    learnt = cfg.scenes * latents[0].shape[1] * latents[0].shape[2]
    into, out_of = fit(now[:learnt], was[:learnt]), fit(was[:learnt], now[:learnt])
    for name, cells, wanted, rows in (("new to old", now, was, into), ("old to new", was, now, out_of)):
        print(f"{name}: {100 * explained(cells[learnt:], wanted[learnt:], rows):.1f} % of the variance of latents")

    outer, inner = params["unet"]["conv_out"], params["unet"]["conv_in"]
    inner["bias"] = inner["bias"] + np.einsum("hwio,i->o", inner["kernel"], into[1])
    inner["kernel"] = np.einsum("hwio,ai->hwao", inner["kernel"], into[0])
    outer["kernel"], outer["bias"] = outer["kernel"] @ out_of[0], outer["bias"] @ out_of[0]
    table = params["text_encoder"]["text_model"]["embeddings.position_embedding"]
    name = next(iter(table))
    rows = table[name]
    table[name] = np.concatenate([rows, np.repeat(rows[-1:], cfg.positions - len(rows), 0)])

    trees = {**trees, **{key: jax.tree.map(jnp.asarray, tree) for key, tree in params.items()}}
    dataclasses.replace(new, params=trees).save(cfg.out)
    print(jaxmix.load(cfg.out))
    return 0


if __name__ == "__main__":
    command.run(main)
