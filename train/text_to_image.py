"""Train a latent diffusion model on captioned scenes: UNet and CLIP text encoder from scratch, or from a pipeline.

Latent diffusion (arXiv 2112.10752) with classifier-free guidance by dropped captions (arXiv 2207.12598), v or epsilon
targets (arXiv 2202.00512) and optional min-SNR weights (arXiv 2303.09556). The autoencoder is read from a folder and
frozen; images are encoded inside the step, or once before training (`encoded_scenes`).

    python -m train.text_to_image --config configs/mini_text_to_image.yaml --output_dir runs/t2i
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    UNet2DConditionModel,
    UNetConfig,
    VAEConfig,
)
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.schedule import NoiseSchedule
from jaxmix.tuning.data import Source
from jaxmix.types import InputError
from jaxmix.weights.load import find_weights, load_tree, read_config
from train.cache_latents import make_moments
from train.data.cache import identify
from train.data.encoded import encode_once
from train.diffusion import DiffusionConfig, make_predict, make_tokenize, train_denoiser
from train.grid import make_grid
from train.scenes import Scenes


@dataclasses.dataclass
class Config(DiffusionConfig):
    """The text-to-image trainer's keys, after those of every trainer of a denoiser.

    Attributes:
        pretrained_model_name_or_path: the pipeline to start from ("mini", a folder, a file, a hub id); empty: the
            models below start from scratch.
        pretrained_vae_model_name_or_path: folder of the autoencoder (config.json and safetensors).
        tokenizer: folder of the CLIP tokenizer.
        unet: the model, as in a diffusers unet/config.json.
        text_encoder: the model, as in a transformers config.json; the vocabulary's size comes from the tokenizer.
        scheduler: the noise schedule, as in a diffusers scheduler_config.json.
        scenes: arguments of train.scenes.Scenes.
        encoded_scenes: encode this many scenes once, into OUT/latents, and repeat them; 0: every scene is a new one,
            encoded inside its step.
        train_text_encoder: false freezes the text encoder.
        validation_guidance_scale: guidance of those pictures.
        export_steps: write the diffusers folder OUT/pipeline every this many steps; 0: only at the end.
    """

    pretrained_model_name_or_path: str = ""
    pretrained_vae_model_name_or_path: str = ""
    tokenizer: str = ""
    unet: dict[str, Any] = dataclasses.field(default_factory=dict)
    text_encoder: dict[str, Any] = dataclasses.field(default_factory=dict)
    scheduler: dict[str, Any] = dataclasses.field(default_factory=dict)
    scenes: dict[str, Any] = dataclasses.field(default_factory=dict)
    encoded_scenes: int = 0
    train_text_encoder: bool = True
    validation_guidance_scale: float = 3.0
    export_steps: int = 0


def make_rows(
    tokenize: Callable[[str], Mapping[str, np.ndarray]], dropout: float
) -> Callable[..., dict[str, np.ndarray]]:
    """Return the transform from a scene to {"image" (H, W, 3) uint8, or its latents, and "input_ids" (s,) int32}."""
    empty = tokenize("")

    def row(scene: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        dropped = rng.random() < dropout
        shown = {k: np.asarray(x) for k, x in scene.items() if k in ("image", "latents_mean", "latents_std")}
        return {**shown, **(empty if dropped else tokenize(scene["text"]))}

    return row


def make_source(cfg: Config, pipe: Pipeline) -> Source:
    """Return the scenes, or the first `encoded_scenes` of them with their latents instead of their images."""
    scenes = Scenes(**cfg.scenes)
    if cfg.encoded_scenes < 0:
        raise InputError(f"encoded_scenes: found {cfg.encoded_scenes}, expected 0 or more")
    if cfg.encoded_scenes == 0:
        return scenes
    if jax.process_count() > 1:
        raise InputError(f"encoded_scenes: found {cfg.encoded_scenes} with several processes, expected 0 there")
    plan = {"scenes": cfg.scenes, **{key: value for key, value in identify(pipe).items() if key.startswith("vae")}}
    size = 32  # enough to keep the devices busy, whatever the batches of the training
    return encode_once(scenes, cfg.encoded_scenes, Path(cfg.output_dir) / "latents", plan, make_moments(pipe, 1), size)


def load_autoencoder(folder: str, dtype: Any) -> tuple[AutoencoderKL, Any]:
    """Return the autoencoder in a diffusers `vae` folder and its float32 parameters."""
    if not folder:
        raise InputError("pretrained_vae_model_name_or_path: not given, expected a folder by train.autoencoder")
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
    """Return the UNet and the text encoder; the tokenizer determines the vocabulary size and the special tokens."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    specials = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text_config = {**cfg.text_encoder, **specials, "vocab_size": len(tokenizer)}
    notes: list[str] = []
    unet = UNet2DConditionModel(UNetConfig.from_dict(cfg.unet, notes), cfg.dtype, cfg.gradient_checkpointing)
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(text_config, notes), cfg.dtype)
    if notes:  # a misspelt key of one's own
        raise InputError(f"unet: {notes[0]}")
    return unet, text_encoder


def make_pipeline(cfg: Config) -> Pipeline:
    """Return the pipeline before training: an existing one, or fresh models around an existing autoencoder.

    Trained weights are float32 whatever the model computes in.
    """
    guidance: dict[str, Any] = {"default_guidance_scale": cfg.validation_guidance_scale}
    if cfg.pretrained_model_name_or_path:
        pipe = jaxmix.load(cfg.pretrained_model_name_or_path)
        if pipe.text_encoder_2 is not None:
            raise InputError("pretrained_model_name_or_path: found SDXL, expected a model with one text encoder")
        unet = pipe.unet.clone(dtype=cfg.dtype, remat=cfg.gradient_checkpointing)
        models: dict[str, Any] = {name: getattr(pipe, name).clone(dtype=cfg.dtype) for name in ("vae", "text_encoder")}
        return dataclasses.replace(pipe, unet=unet, **models, **guidance)
    vae, vae_params = load_autoencoder(cfg.pretrained_vae_model_name_or_path, cfg.dtype)
    unet, text_encoder = make_models(cfg)
    key_unet, key_text = jax.random.split(jax.random.key(cfg.seed))
    return Pipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        params={
            "unet": unet.init_params(key_unet),
            "text_encoder": text_encoder.init_params(key_text),
            "vae": vae_params,
        },
        schedule=NoiseSchedule.from_config(cfg.scheduler),
        tokenizer=Path(cfg.tokenizer),
        **guidance,
    )


def split_params(params: Any, train_text_encoder: bool) -> tuple[Any, Any]:
    """Return (params that learn, params that do not)."""
    learns = ("unet", "text_encoder") if train_text_encoder else ("unet",)
    # Copies of what learns: the step gives its state's buffers away, and the pipeline must not go with them.
    return (
        {name: jax.tree.map(jnp.array, params[name]) for name in learns},
        {name: tree for name, tree in params.items() if name not in learns},
    )


def main(cfg: Config) -> int:
    """Train, draw on the way, export."""
    command.start(cfg.distributed)
    pipe = make_pipeline(cfg)
    source = make_source(cfg, pipe)
    params, frozen = split_params(pipe.params, cfg.train_text_encoder)
    pipe = dataclasses.replace(pipe, params=frozen)  # what learns is in the state alone
    rows = make_rows(make_tokenize(pipe), cfg.caption_dropout_rate)

    def trained(params: Any) -> Pipeline:
        return dataclasses.replace(pipe, params={**frozen, **params})

    def draw(params: Any) -> np.ndarray:
        prompts, scale = cfg.validation_prompts, cfg.validation_guidance_scale
        return make_grid(trained(params).generate(prompts, range(len(prompts)), steps=25, guidance_scale=scale), 4, 2)

    return train_denoiser(
        cfg,
        pipe,
        params,
        frozen,
        source,
        rows,
        make_predict(pipe, cfg),
        lambda params, folder: trained(params).save(folder / "pipeline"),
        draw,
        "pipeline",
        save_steps=cfg.export_steps,
    )


if __name__ == "__main__":
    command.run(main)
