"""What trainers of denoisers share: their keys, batches of captioned pictures, and the loss around a `predict`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.models import AddedCond
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.tokens import open_tokenizer
from jaxmix.tuning.fit import FitConfig
from jaxmix.tuning.loss import diffusion_loss


@dataclasses.dataclass
class DiffusionConfig(FitConfig):
    """The keys of every trainer of a denoiser, after those of every trainer.

    Attributes:
        caption_dropout_rate: share of rows that get the empty caption, for classifier-free guidance.
        sample_posterior: encode to a draw from the autoencoder's posterior (true) or to its mean.
        snr_gamma: min-SNR weights with this gamma; null for none.
        weighting_scheme: how timesteps are drawn: none (uniform) or logit_normal.
        logit_mean: mean of the normal of weighting_scheme logit_normal; above 0 favours noisy timesteps.
        logit_std: its standard deviation.
        noise_offset: standard deviation of an offset per row and channel that is added to the noise.
        gradient_checkpointing: recompute the UNet's activations in the backward pass.
        distributed: whether this is one of several processes, as on a TPU pod, and must find the others first.
    """

    caption_dropout_rate: float = 0.1
    sample_posterior: bool = True
    snr_gamma: float | None = None
    weighting_scheme: Literal["none", "logit_normal"] = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    noise_offset: float = 0.0
    gradient_checkpointing: bool = False
    distributed: bool = False

    @property
    def logit_normal(self) -> tuple[float, float] | None:
        """Mean and standard deviation for `draw_timesteps`, or None for uniform ones."""
        return (self.logit_mean, self.logit_std) if self.weighting_scheme == "logit_normal" else None


class Predict(Protocol):
    """What a trainer adds: the model's prediction for noisy latents under the weights that are being trained."""

    def __call__(
        self,
        params: Any,
        frozen: Any,
        batch: Mapping[str, jax.Array],
        noisy: jax.Array,
        t: jax.Array,
        context: jax.Array,
        added: AddedCond | None,
    ) -> jax.Array: ...


def make_tokenize(pipe: Pipeline) -> Callable[[str], dict[str, np.ndarray]]:
    """Return text -> {"input_ids" (s,)[, "input_ids_2" (s,)]} int32, padded and cut as Stable Diffusion does."""
    first = ("input_ids", pipe.tokenizer, pipe.text_encoder)
    second = ("input_ids_2", pipe.tokenizer_2, pipe.text_encoder_2)
    made = [
        (key, open_tokenizer(tokenizer), encoder.config.max_position_embeddings)
        for key, tokenizer, encoder in (first, second)
        if encoder is not None
    ]

    def tokenize(text: str) -> dict[str, np.ndarray]:
        return {
            key: np.asarray(tokenizer(text, padding="max_length", max_length=n, truncation=True)["input_ids"], np.int32)
            for key, tokenizer, n in made
        }

    return tokenize


def encode_pictures(pipe: Pipeline, cfg: DiffusionConfig, weights: Any, batch: Any, key: jax.Array) -> jax.Array:
    """Return scaled latents (b, h, w, c) of a batch with "image" uint8, or "latents_mean" and "latents_std"."""
    if "latents_mean" in batch:
        z, std = (batch[name].astype(jnp.float32) for name in ("latents_mean", "latents_std"))
    else:
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        z, logvar = pipe.vae.apply({"params": weights["vae"]}, images, method="encode")
        std = jnp.exp(0.5 * logvar)
    if cfg.sample_posterior:
        z = z + std * jax.random.normal(key, z.shape)
    return z * pipe.vae.config.scaling_factor


def encode_captions(pipe: Pipeline, weights: Any, batch: Any) -> tuple[jax.Array, AddedCond | None]:
    """Return the text states (b, s, d) of a batch and, for SDXL, its added conditioning.

    The batch has token ids ("input_ids", for SDXL also "input_ids_2"), or precomputed states ("context", "pooled").
    Rows that are "dropped" (b,) take the states of the empty caption, whose token ids they already have. If the
    pipeline samples with zeros for an empty prompt, these are zeros.
    """
    pooled = None
    if "context" in batch:
        context, dropped = batch["context"], batch["dropped"].astype(bool)
        context = jnp.where(dropped[:, None, None], weights["empty"]["context"], context)
        if pipe.text_encoder_2 is not None:
            pooled = jnp.where(dropped[:, None], weights["empty"]["pooled"], batch["pooled"])
    else:
        first = pipe.text_encoder.apply({"params": weights["text_encoder"]}, batch["input_ids"])
        context = first.last_hidden_state
        if pipe.text_encoder_2 is not None:
            second = pipe.text_encoder_2.apply({"params": weights["text_encoder_2"]}, batch["input_ids_2"])
            context = jnp.concatenate([first.penultimate, second.penultimate], -1)
            pooled = second.projected
    if pipe.zeros_for_empty_prompt:  # as when sampling without a negative prompt
        dropped = batch["dropped"].astype(bool)
        context = jnp.where(dropped[:, None, None], 0.0, context)
        pooled = None if pooled is None else jnp.where(dropped[:, None], 0.0, pooled)
    return context, None if pooled is None else AddedCond(pooled, batch["time_ids"])


def make_loss(
    pipe: Pipeline, cfg: DiffusionConfig, predict: Predict
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return loss_fn(params, frozen, batch, key) for `make_update`; weights come from params, else from frozen."""

    def loss_fn(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_posterior, key_noise = jax.random.split(key)
        weights = {**frozen, **params}
        latents = encode_pictures(pipe, cfg, weights, batch, key_posterior)
        context, added = encode_captions(pipe, weights, batch)

        def predict_rows(noisy: jax.Array, t: jax.Array) -> jax.Array:
            return predict(params, frozen, batch, noisy.astype(cfg.dtype), t, context.astype(cfg.dtype), added)

        return diffusion_loss(
            predict_rows, pipe.schedule, latents, key_noise, cfg.snr_gamma, cfg.noise_offset, cfg.logit_normal
        )

    return loss_fn
