"""What trainers of denoisers share: their keys, batches of captioned pictures, the loss around a `predict`, the run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix import command
from jaxmix.models import AddedCond
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.tokens import open_tokenizer
from jaxmix.tuning.data import BatchSource, Source, iterate, make_dataset
from jaxmix.tuning.fit import FitConfig, Hook, fit
from jaxmix.tuning.loss import diffusion_loss
from jaxmix.tuning.update import TrainState, make_optimizer, make_update


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
        validation_prompts: drawn at fixed seeds with the averaged weights, one row of pictures each.
        validation_steps: draw them every this many steps; 0: never.
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
    validation_prompts: list[str] = dataclasses.field(default_factory=list)
    validation_steps: int = 0
    gradient_checkpointing: bool = False
    distributed: bool = False

    @property
    def logit_normal(self) -> tuple[float, float] | None:
        """Mean and standard deviation for `draw_timesteps`, or None for uniform ones."""
        return (self.logit_mean, self.logit_std) if self.weighting_scheme == "logit_normal" else None


class Weigh(Protocol):
    """What a trainer of weights adds: (params, frozen, key) -> the weights of every part that a step needs, by name.

    Such as a base with the factors of a LoRA beside its kernels; `key` is for dropout.
    """

    def __call__(self, params: Any, frozen: Any, key: jax.Array) -> dict[str, Any]: ...


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
    pipeline samples with zeros for an empty prompt, these are zeros. ``weights["learnt"]`` may have vectors (m, d) for
    each text encoder: those of the ids beyond its vocabulary.
    """
    pooled, more = None, weights.get("learnt", {})
    if "context" in batch:
        context, dropped = batch["context"], batch["dropped"].astype(bool)
        context = jnp.where(dropped[:, None, None], weights["empty"]["context"], context)
        if pipe.text_encoder_2 is not None:
            pooled = jnp.where(dropped[:, None], weights["empty"]["pooled"], batch["pooled"])
    else:
        first = pipe.text_encoder.apply(
            {"params": weights["text_encoder"]}, batch["input_ids"], None, more.get("text_encoder")
        )
        context = first.last_hidden_state
        if pipe.text_encoder_2 is not None:
            second = pipe.text_encoder_2.apply(
                {"params": weights["text_encoder_2"]}, batch["input_ids_2"], None, more.get("text_encoder_2")
            )
            context = jnp.concatenate([first.penultimate, second.penultimate], -1)
            pooled = second.projected
    if pipe.zeros_for_empty_prompt:  # as when sampling without a negative prompt
        dropped = batch["dropped"].astype(bool)
        context = jnp.where(dropped[:, None, None], 0.0, context)
        pooled = None if pooled is None else jnp.where(dropped[:, None], 0.0, pooled)
    return context, None if pooled is None else AddedCond(pooled, batch["time_ids"])


def make_loss(
    pipe: Pipeline, cfg: DiffusionConfig, predict: Predict, weigh: Weigh | None = None
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return loss_fn(params, frozen, batch, key) for `make_update`; weights come from params, else from frozen.

    `weigh` makes the weights that encode pictures and captions, and that `predict` is given as frozen; see `Weigh`. A
    batch may have "loss_weight" (b,), by which the rows' losses are multiplied.
    """

    def loss_fn(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_posterior, key_noise = jax.random.split(key)
        if weigh is None:
            weights = {**frozen, **params}
        else:
            weights = frozen = weigh(params, frozen, jax.random.fold_in(key, 2))
        latents = encode_pictures(pipe, cfg, weights, batch, key_posterior)
        context, added = encode_captions(pipe, weights, batch)

        def predict_rows(noisy: jax.Array, t: jax.Array) -> jax.Array:
            return predict(params, frozen, batch, noisy.astype(cfg.dtype), t, context.astype(cfg.dtype), added)

        return diffusion_loss(
            predict_rows,
            pipe.schedule,
            latents,
            key_noise,
            cfg.snr_gamma,
            cfg.noise_offset,
            cfg.logit_normal,
            batch.get("loss_weight"),
        )

    return loss_fn


def make_predict(pipe: Pipeline, cfg: DiffusionConfig) -> Predict:
    """Return the prediction of the UNet among the weights that `Weigh` made, or that learn."""
    unet = pipe.unet.clone(dtype=cfg.dtype, remat=cfg.gradient_checkpointing)

    def predict(
        params: Any,
        frozen: Any,
        batch: Mapping[str, jax.Array],
        noisy: jax.Array,
        t: jax.Array,
        context: jax.Array,
        added: AddedCond | None,
    ) -> jax.Array:
        weights = frozen["unet"] if "unet" in frozen else params["unet"]
        return unet.apply({"params": weights}, noisy, t, context, (), added)

    return predict


def train_denoiser(
    cfg: DiffusionConfig,
    pipe: Pipeline,
    learns: Any,
    frozen: Mapping[str, Any],
    source: Source | BatchSource,
    transform: Callable[[Any, np.random.Generator], Any],
    predict: Predict,
    save: Callable[[Any, Path], None],
    draw: Callable[[Any], np.ndarray] | None,
    target: str,
    *,
    save_steps: int | None = None,
    weigh: Weigh | None = None,
    rates: Mapping[str, float] | None = None,
    plan: Mapping[str, Any] | None = None,
    by_layer: Collection[str] = (),
) -> int:
    """Train what `learns`, export on the way (with every checkpoint if `save_steps` is None); return the exit status.

    `save(params, folder)` writes `target`, what is to be used of these weights, `draw(params)` its validation pictures
    as one sheet. `rates` are those of `make_optimizer`, `plan` is that of `fit`, and `by_layer` that of `make_update`,
    whose weights `save` and `draw` then get as NumPy arrays on several devices.
    """
    out = Path(cfg.output_dir)
    count, held = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (learns, pipe.params))
    if jax.process_index() == 0:
        print(f"learns {count:,} parameters; the base holds {held:,}", flush=True)
    optimizer = make_optimizer(cfg, rates)
    with on_host_if_split():
        state = TrainState.create(learns, optimizer, ema=cfg.ema_decay > 0)
    shard = (jax.process_index(), jax.process_count())
    dataset = make_dataset(source, cfg.train_batch_size, cfg.seed, transform, shard=shard)

    def batches(step: int) -> Iterator[Any]:
        return iterate(dataset, step, cfg.dataloader_num_workers)

    written: list[int] = []

    def export(step: int, state: TrainState) -> None:
        save(state.averaged, out)
        written.append(step)

    hooks = [Hook(cfg.checkpointing_steps if save_steps is None else save_steps, export, on_host=bool(by_layer))]
    if draw is not None and cfg.validation_prompts and cfg.validation_steps:

        def picture(step: int, state: TrainState) -> dict[str, np.ndarray]:
            return {"validation": draw(state.averaged)}

        hooks.append(Hook(cfg.validation_steps, picture, on_host=bool(by_layer)))
    loss_fn = make_loss(pipe, cfg, predict, weigh)
    update = make_update(loss_fn, optimizer, cfg.ema_decay, cfg.gradient_accumulation_steps, by_layer)
    state, _ = fit(cfg, state, update, dict(frozen), batches, hooks, command.progress, plan)
    if written and written[-1] == int(state.step):  # not after SIGTERM
        print(f"wrote {out / target}", flush=True)
    return 0


def on_host_if_split() -> AbstractContextManager[Any]:
    """Return a context in which new arrays are made on the host if several devices will share them."""
    if jax.device_count() == 1:
        return contextlib.nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])
