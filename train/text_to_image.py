"""Train a latent diffusion model, UNet and CLIP text encoder, from nothing on captioned scenes.

Latent diffusion (arXiv 2112.10752) with classifier-free guidance by dropped captions (arXiv 2207.12598), v or epsilon
targets (arXiv 2202.00512) and min-SNR weights on request (arXiv 2303.09556). The autoencoder is read from a folder
and stays as it is; images are encoded inside the step.

    python -m train.text_to_image --config configs/mini_text_to_image.yaml --output_dir runs/t2i
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix import command
from jaxmix.models import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig, VAEConfig
from jaxmix.pipeline import Pipeline
from jaxmix.schedule import NoiseSchedule
from jaxmix.tuning.data import iterate, make_dataset
from jaxmix.tuning.fit import FitConfig, Hook, fit
from jaxmix.tuning.loss import diffusion_loss
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from jaxmix.types import InputError
from jaxmix.weights.load import find_weights, load_tree, read_config
from train.grid import save_grid
from train.scenes import Scenes


@dataclasses.dataclass
class Config(FitConfig):
    """The text-to-image trainer's keys, after those of every trainer.

    Attributes:
        pretrained_vae_model_name_or_path: folder of the autoencoder (config.json and safetensors).
        tokenizer: folder of the CLIP tokenizer.
        unet: the model, as in a diffusers unet/config.json.
        text_encoder: the model, as in a transformers config.json; the vocabulary's size comes from the tokenizer.
        scheduler: the noise schedule, as in a diffusers scheduler_config.json.
        scenes: arguments of train.scenes.Scenes.
        train_text_encoder: false leaves the text encoder as it was made.
        caption_dropout_rate: share of the rows that get the empty caption.
        sample_posterior: encode to a draw from the posterior (true) or to its mean.
        snr_gamma: min-SNR weights with this gamma; null for none.
        weighting_scheme: how timesteps are drawn: none (uniform) or logit_normal.
        logit_mean: of the normal under weighting_scheme logit_normal; above 0 favours noisy timesteps.
        logit_std: its standard deviation.
        noise_offset: noise per row and channel that is added to the noise.
        gradient_checkpointing: recompute the UNet's activations in the backward pass.
        validation_prompts: drawn at fixed seeds from the averaged weights.
        validation_steps: draw them every so many steps; 0: never.
        validation_guidance_scale: guidance of those pictures.
        export_steps: write the diffusers folder OUT/pipeline every so many steps; 0: only at the end.
    """

    pretrained_vae_model_name_or_path: str = ""
    tokenizer: str = ""
    unet: dict[str, Any] = dataclasses.field(default_factory=dict)
    text_encoder: dict[str, Any] = dataclasses.field(default_factory=dict)
    scheduler: dict[str, Any] = dataclasses.field(default_factory=dict)
    scenes: dict[str, Any] = dataclasses.field(default_factory=dict)
    train_text_encoder: bool = True
    caption_dropout_rate: float = 0.1
    sample_posterior: bool = True
    snr_gamma: float | None = None
    weighting_scheme: Literal["none", "logit_normal"] = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    noise_offset: float = 0.0
    gradient_checkpointing: bool = False
    validation_prompts: list[str] = dataclasses.field(default_factory=list)
    validation_steps: int = 0
    validation_guidance_scale: float = 3.0
    export_steps: int = 0


def make_rows(tokenize: Callable[[str], np.ndarray], dropout: float) -> Callable[..., dict[str, np.ndarray]]:
    """Return the transform from a scene to {"image" (H, W, 3) uint8, "input_ids" (s,) int32}."""
    empty = tokenize("")

    def row(scene: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        dropped = rng.random() < dropout
        return {"image": np.asarray(scene["image"]), "input_ids": empty if dropped else tokenize(scene["text"])}

    return row


def make_tokenize(tokenizer: Any, length: int) -> Callable[[str], np.ndarray]:
    """Return text -> (length,) int32 ids, padded and cut as Stable Diffusion pads and cuts."""

    def tokenize(text: str) -> np.ndarray:
        ids = tokenizer(text, padding="max_length", max_length=length, truncation=True)["input_ids"]
        return np.asarray(ids, np.int32)

    return tokenize


def make_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    schedule: NoiseSchedule,
    cfg: Config,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return loss_fn(params, frozen, batch, key) for batches {"image" uint8 (b, H, W, 3), "input_ids" (b, s)}."""
    logit_normal = (cfg.logit_mean, cfg.logit_std) if cfg.weighting_scheme == "logit_normal" else None

    def loss_fn(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_posterior, key_noise = jax.random.split(key)
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        z, logvar = vae.apply({"params": frozen["vae"]}, images, method="encode")
        if cfg.sample_posterior:
            z += jnp.exp(0.5 * logvar) * jax.random.normal(key_posterior, z.shape)
        weights = {**frozen, **params}
        context = text_encoder.apply({"params": weights["text_encoder"]}, batch["input_ids"]).last_hidden_state

        def predict(noisy: jax.Array, t: jax.Array) -> jax.Array:
            return unet.apply({"params": weights["unet"]}, noisy.astype(cfg.dtype), t, context.astype(cfg.dtype))

        latents = z * vae.config.scaling_factor
        return diffusion_loss(predict, schedule, latents, key_noise, cfg.snr_gamma, cfg.noise_offset, logit_normal)

    return loss_fn


def load_autoencoder(folder: str, dtype: Any) -> tuple[AutoencoderKL, Any]:
    """Return the autoencoder in a diffusers `vae` folder and its float32 parameters."""
    if not folder:
        raise InputError("pretrained_vae_model_name_or_path: not given, expected a folder that train.autoencoder wrote")
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"pretrained_vae_model_name_or_path: found no config.json in {folder}")
    vae = AutoencoderKL(VAEConfig.from_dict(read_config(Path(folder) / "config.json")), dtype=dtype)
    return vae, load_tree(find_weights(Path(folder)), vae.abstract_params())


def load_tokenizer(folder: str) -> Any:
    """Return the CLIP tokenizer in `folder`."""
    from transformers import CLIPTokenizer

    if not Path(folder).is_dir():
        raise InputError(f"tokenizer: found no folder {folder!r}")
    return CLIPTokenizer.from_pretrained(folder)


def make_models(cfg: Config) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Return the UNet and the text encoder; the tokenizer decides the vocabulary's size and the special tokens."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    specials = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text_config = {**cfg.text_encoder, **specials, "vocab_size": len(tokenizer)}
    unet = UNet2DConditionModel(UNetConfig.from_dict(cfg.unet), cfg.dtype, cfg.gradient_checkpointing)
    return unet, CLIPTextModel(CLIPTextConfig.from_dict(text_config), cfg.dtype)


def split_params(models: tuple[Any, Any], cfg: Config, key: jax.Array, vae_params: Any) -> tuple[Any, Any]:
    """Return fresh (params that learn, params that do not)."""
    key_unet, key_text = jax.random.split(key)
    params = {"unet": models[0].init_params(key_unet), "text_encoder": models[1].init_params(key_text)}
    frozen = {"vae": vae_params}
    if not cfg.train_text_encoder:
        frozen["text_encoder"] = params.pop("text_encoder")
    return params, frozen


def main(cfg: Config) -> int:
    """Train, draw on the way, export."""
    command.enable_compilation_cache()
    out = Path(cfg.output_dir)
    vae, vae_params = load_autoencoder(cfg.pretrained_vae_model_name_or_path, cfg.dtype)
    tokenizer = load_tokenizer(cfg.tokenizer)
    schedule = NoiseSchedule.from_config(cfg.scheduler)
    unet, text_encoder = make_models(cfg)
    params, frozen = split_params((unet, text_encoder), cfg, jax.random.key(cfg.seed), vae_params)
    optimizer = make_optimizer(cfg)
    state = TrainState.create(params, optimizer, ema=cfg.ema_decay > 0)

    tokenize = make_tokenize(tokenizer, text_encoder.config.max_position_embeddings)
    rows = make_rows(tokenize, cfg.caption_dropout_rate)
    dataset = make_dataset(Scenes(**cfg.scenes), cfg.train_batch_size, cfg.seed, rows)

    def batches(step: int) -> Iterator[Any]:
        return iterate(dataset, step, cfg.dataloader_num_workers)

    def pipeline(state: TrainState) -> Pipeline:
        return Pipeline(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            params={**frozen, **state.averaged},
            schedule=schedule,
            tokenizer=Path(cfg.tokenizer),
            default_guidance_scale=cfg.validation_guidance_scale,
        )

    def picture(step: int, state: TrainState) -> None:
        prompts = cfg.validation_prompts
        images = pipeline(state).generate(
            prompts, list(range(len(prompts))), steps=25, guidance_scale=cfg.validation_guidance_scale
        )
        save_grid(out / "pictures" / f"{step:07d}.png", images, 4, 2)

    def export(step: int, state: TrainState) -> None:
        pipeline(state).save(out / "pipeline")

    hooks = [Hook(cfg.export_steps, export)]
    if cfg.validation_prompts and cfg.validation_steps:
        hooks.append(Hook(cfg.validation_steps, picture))
    update = make_update(
        make_loss(unet, text_encoder, vae, schedule, cfg), optimizer, cfg.ema_decay, cfg.gradient_accumulation_steps
    )
    fit(cfg, state, update, frozen, batches, hooks, command.progress)
    print(f"wrote {out / 'pipeline'}")
    return 0


if __name__ == "__main__":
    command.run(main)
