"""Train an AutoencoderKL on crops of generated scenes, and export it as a diffusers `vae` folder.

Reconstruction (absolute, squared, of the differences of neighbouring pixels, of colours seen from afar and, optionally,
of the features of a scene network) plus a small KL term; no adversary (arXiv 2112.10752, section 3.1, without the
discriminator). At the end the latents' standard deviation over whole scenes is measured, and its inverse written as
`scaling_factor`.

    python -m train.autoencoder --config configs/mini_autoencoder.yaml --output_dir runs/vae
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix import command
from jaxmix.models import AutoencoderKL, VAEConfig
from jaxmix.tuning.data import iterate, make_dataset
from jaxmix.tuning.fit import FitConfig, Hook, ScalarLog, fit
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from jaxmix.types import InputError
from jaxmix.weights.load import load_tree, read_config
from jaxmix.weights.store import save_tree, write_config
from train.grid import save_grid
from train.reconstruction import color_loss, difference_loss, make_feature_loss
from train.scenes import Scenes

ENCODER = ("encoder", "quant_conv")
FEATURES = Path(__file__).parent / "scenes" / "features.safetensors"


@dataclasses.dataclass
class Config(FitConfig):
    """The autoencoder trainer's keys, after those of every trainer.

    Attributes:
        vae: the model, as in a diffusers vae/config.json.
        pretrained_vae_model_name_or_path: start from the weights in this folder; from scratch if empty.
        train_encoder: false trains the decoder alone and keeps scaling_factor, so that a diffusion model trained on
            the latents stays valid.
        latent_noise: standard deviation of noise added to the latents, as a share of their own, for a decoder that
            tolerates small errors of a diffusion model.
        scenes: arguments of train.scenes.Scenes.
        crop_size: side of the random crops trained on, in pixels.
        mse_weight: weight of the squared error relative to the absolute one.
        gradient_weight: weight of the absolute error of neighbouring pixels' differences, at full and half size.
        color_weight: weight of the error of chroma and of colours at a quarter and an eighth of the size.
        feature_weight: weight of the error in the features of `feature_network`.
        feature_network: the safetensors file of a scene network, as written by train.scorer; not the judge's.
        kl_weight: weight of the KL divergence summed over an image and divided by its number of values.
        picture_steps: write reconstructions of held-back scenes every this many steps; 0: only at the end.
        eval_scenes: held-back scenes for the PSNR.
        std_scenes: scenes over which scaling_factor is measured.
    """

    vae: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained_vae_model_name_or_path: str = ""
    train_encoder: bool = True
    latent_noise: float = 0.0
    scenes: dict[str, Any] = dataclasses.field(default_factory=dict)
    crop_size: int = 32
    mse_weight: float = 1.0
    gradient_weight: float = 0.5
    color_weight: float = 0.0
    feature_weight: float = 0.0
    feature_network: str = str(FEATURES)
    kl_weight: float = 5e-3
    picture_steps: int = 200
    eval_scenes: int = 256
    std_scenes: int = 2000


def make_crop(size: int) -> Callable[[dict[str, Any], np.random.Generator], dict[str, np.ndarray]]:
    """Return the transform that cuts a random square of `size` pixels out of a scene."""

    def crop(row: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = np.asarray(row["image"])
        top, left = (int(rng.integers(0, extent - size + 1)) for extent in image.shape[:2])
        return {"image": image[top : top + size, left : left + size]}

    return crop


def to_float(images: jax.Array) -> jax.Array:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def psnr(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB for a mean squared error of images in [-1, 1]."""
    return float(10.0 * np.log10(4.0 / max(float(mse), 1e-12)))


def make_loss(vae: AutoencoderKL, cfg: Config) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return loss_fn(params, frozen, batch, key) for batches {"image": (b, H, W, 3) uint8}."""
    features = make_feature_loss(cfg.feature_network) if cfg.feature_weight else None

    def loss_fn(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = to_float(batch["image"])
        weights = {**frozen, **params}
        mean, logvar = vae.apply({"params": weights}, images, method="encode")
        spread = jnp.exp(0.5 * logvar) + cfg.latent_noise / vae.config.scaling_factor
        z = mean + spread * jax.random.normal(key, mean.shape)
        restored = vae.apply({"params": weights}, z, method="decode")
        error = restored - images
        absolute, squared = jnp.abs(error).mean(), (error**2).mean()
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar).sum() / images.size
        loss = absolute + cfg.mse_weight * squared + cfg.gradient_weight * difference_loss(error) + cfg.kl_weight * kl
        metrics = {"absolute": absolute, "mse": squared, "kl": kl, "latent_std": mean.std()}
        if cfg.color_weight:
            metrics["color"] = color_loss(error)
            loss += cfg.color_weight * metrics["color"]
        if features is not None:
            metrics["features"] = features(restored, images)
            loss += cfg.feature_weight * metrics["features"]
        return loss, metrics

    return loss_fn


def make_batches(cfg: Config) -> Callable[[int], Iterator[Any]]:
    """Return step -> iterator over batches of crops."""
    scenes = Scenes(**cfg.scenes)
    size = np.asarray(scenes[0]["image"]).shape[0]
    if not 0 < cfg.crop_size <= size:
        raise InputError(f"crop_size: found {cfg.crop_size}, expected 1 to the scenes' {size} pixels")
    dataset = make_dataset(scenes, cfg.train_batch_size, cfg.seed, make_crop(cfg.crop_size))
    return lambda step: iterate(dataset, step, cfg.dataloader_num_workers)


def held_back(cfg: Config, count: int) -> np.ndarray:
    """Return `count` whole scenes (n, H, W, 3) uint8 of another seed than the training scenes."""
    scenes = Scenes(**{**cfg.scenes, "seed": cfg.scenes.get("seed", 0) + 1_000_003})
    return np.stack([np.asarray(scenes[index]["image"]) for index in range(count)])


def reconstruct(vae: AutoencoderKL, params: Any, images: np.ndarray, rows: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Return (reconstructions of the posterior means, in [-1, 1], and those means) of uint8 images."""

    @jax.jit
    def both(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, _ = vae.apply({"params": params}, to_float(images), method="encode")
        return vae.apply({"params": params}, mean, method="decode"), mean

    outputs = [jax.device_get(both(params, images[start : start + rows])) for start in range(0, len(images), rows)]
    return np.concatenate([o[0] for o in outputs]), np.concatenate([o[1] for o in outputs])


def measure_std(vae: AutoencoderKL, params: Any, images: np.ndarray, rows: int = 16) -> float:
    """Return the standard deviation of the posterior means over all of `images` (n, H, W, 3) uint8."""
    encode = jax.jit(lambda p, x: vae.apply({"params": p}, to_float(x), method="encode")[0])
    parts = [np.asarray(encode(params, images[i : i + rows]), np.float64) for i in range(0, len(images), rows)]
    return float(np.concatenate(parts).std())


def export(folder: Path, config: VAEConfig, params: Any, scaling_factor: float) -> None:
    """Write a diffusers `vae` folder: config.json with `scaling_factor`, and safetensors."""
    save_tree(params, folder / "diffusion_pytorch_model.safetensors")
    write_config(dataclasses.replace(config, scaling_factor=scaling_factor).to_dict(), folder / "config.json")


def make_model(cfg: Config) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Return the autoencoder and the weights to start from."""
    folder = cfg.pretrained_vae_model_name_or_path
    if not folder:
        if not cfg.train_encoder:
            raise InputError("train_encoder: found false, expected also pretrained_vae_model_name_or_path")
        vae = AutoencoderKL(VAEConfig.from_dict(cfg.vae), dtype=cfg.dtype)
        return vae, dict(vae.init_params(jax.random.key(cfg.seed)))
    if cfg.vae:
        raise InputError("vae: found it with pretrained_vae_model_name_or_path, expected one of the two")
    vae = AutoencoderKL(VAEConfig.from_dict(read_config(Path(folder))), dtype=cfg.dtype)
    return vae, load_tree(folder, vae.abstract_params())


def main(cfg: Config) -> int:
    """Train, measure, export."""
    command.enable_compilation_cache()
    out = Path(cfg.output_dir)
    vae, params = make_model(cfg)
    frozen = {} if cfg.train_encoder else {name: params.pop(name) for name in ENCODER if name in params}
    optimizer = make_optimizer(cfg)
    state = TrainState.create(params, optimizer, ema=cfg.ema_decay > 0)
    scenes = held_back(cfg, cfg.eval_scenes)

    def picture(step: int, state: TrainState) -> None:
        restored, _ = reconstruct(vae, {**frozen, **state.averaged}, scenes)
        error = restored - (scenes / 127.5 - 1.0)
        print(f"step {step}: PSNR {psnr((error**2).mean()):.2f} dB on {len(scenes)} held-back scenes", flush=True)
        shown = np.rint((restored[:16].clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        pairs = np.stack([scenes[:16].reshape(-1, 8, *scenes.shape[1:]), shown.reshape(-1, 8, *scenes.shape[1:])], 1)
        save_grid(out / "pictures" / f"{step:07d}.png", pairs.reshape(-1, *scenes.shape[1:]), 8, 3)

    state, complete = fit(
        cfg,
        state,
        make_update(make_loss(vae, cfg), optimizer, cfg.ema_decay, cfg.gradient_accumulation_steps),
        frozen,
        make_batches(cfg),
        [Hook(cfg.picture_steps, picture)],
        command.progress,
    )
    if not complete:
        return 0
    params = {**frozen, **state.averaged}
    factor = vae.config.scaling_factor
    if cfg.train_encoder:
        factor = 1.0 / measure_std(vae, params, held_back(cfg, cfg.std_scenes))
    export(out / "vae", vae.config, params, factor)
    restored, _ = reconstruct(vae, params, scenes)
    final = psnr(((restored - (scenes / 127.5 - 1.0)) ** 2).mean())
    log = ScalarLog(out / "logs")
    log.write(cfg.max_train_steps, {"psnr": final, "scaling_factor": factor})
    log.close()
    print(f"wrote {out / 'vae'}: scaling_factor {factor:.4f}, PSNR {final:.2f} dB on whole held-back scenes")
    return 0


if __name__ == "__main__":
    command.run(main)
