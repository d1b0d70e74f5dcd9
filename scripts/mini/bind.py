"""Teach a text encoder which object is where, from captions alone, without a picture.

A picture of two objects teaches little about "left of": only where almost all is noise does the caption decide which
object is which, and few samples of a diffusion loss are that noisy (`scripts.mini.swapped` measures whether a denoiser
heeds the words). Captions alone cost a tenth of that, and all of them tell. Here a head of one cross-attention layer,
whose queries are places of an 8x8 grid, names the object at each place of a scene from the states of its caption. What
it learns stays in the text encoder, whose states are held near those that the UNet knows; the head is thrown away.

    python -m scripts.mini.bind --config configs/mini2_bind.yaml --output_dir runs/bind
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmix
from jaxmix import command
from jaxmix.tuning.data import iterate, make_dataset
from jaxmix.tuning.fit import FitConfig, fit
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from jaxmix.types import InputError
from train.diffusion import make_tokenize
from train.scenes import MAX_OBJECTS, Plan, Scenes

CELLS = 8


@dataclasses.dataclass
class Config(FitConfig):
    """The keys, after those of every trainer.

    Attributes:
        pretrained_model_name_or_path: the pipeline whose text encoder learns.
        scenes: arguments of train.scenes.Scenes.
        tokens: captions are cut to so many tokens; those after them only repeat the end.
        anchor_weight: weight of the mean squared distance of the states from those before, relative to that of names.
    """

    pretrained_model_name_or_path: str = "runs/t2i/pipeline"
    scenes: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: int = 32
    anchor_weight: float = 1.0


class Head(nn.Module):
    """Text states (b, s, d) to logits (b, 8, 8, names + 1) of the object at each place, none first."""

    names: int
    heads: int = 4

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        b, _, d = states.shape
        places = self.param("places", nn.initializers.normal(1.0), (CELLS * CELLS, d))
        x = nn.MultiHeadDotProductAttention(self.heads, name="attention")(
            jnp.broadcast_to(places, (b, *places.shape)), states
        )
        x = nn.LayerNorm(name="norm")(x + places)
        x = nn.Dense(self.names + 1, name="out")(nn.gelu(nn.Dense(2 * d, name="inner")(x)))
        return x.reshape(b, CELLS, CELLS, self.names + 1)


class Plans:
    """The captions of scenes, with how much of each place each object's box covers, and no picture."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `text`, `objects` int32 (3,), -1 for none, and `covered` float32 (3, 8, 8), shares of each place."""
        plan = self.scenes.plan(np.random.Generator(np.random.Philox(key=[self.scenes.seed, int(index)])))
        objects = np.full(MAX_OBJECTS, -1, np.int32)
        objects[: len(plan.objects)] = plan.objects
        return {"text": self.scenes.caption(plan), "objects": objects, "covered": covered(plan, self.scenes.size)}


def covered(plan: Plan, size: int) -> np.ndarray:
    """Return the share of each place that the box of each of three objects covers, float32 (3, 8, 8)."""
    edges = np.arange(CELLS + 1) * size / CELLS
    found = np.zeros((MAX_OBJECTS, CELLS, CELLS), np.float32)
    for k, (top, left, bottom, right) in enumerate(plan.boxes):
        spans = [np.diff(np.clip(edges, low, high)) * CELLS / size for low, high in ((top, bottom), (left, right))]
        found[k] = np.outer(*spans)
    return found


def make_batches(cfg: Config, pipe: jaxmix.Pipeline, scenes: Scenes) -> Callable[[int], Iterator[Any]]:
    """Return step -> iterator over {"input_ids" (b, s), "objects" (b, 3), "covered" (b, 3, 8, 8)}."""
    tokenize = make_tokenize(pipe)

    def row(plan: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids = tokenize(plan["text"])["input_ids"]
        return {"input_ids": ids[: cfg.tokens], "objects": plan["objects"], "covered": plan["covered"]}

    dataset = make_dataset(Plans(scenes), cfg.train_batch_size, cfg.seed, row)
    return lambda step: iterate(dataset, step, cfg.dataloader_num_workers)


def rightly_bound(logits: jax.Array, shares: jax.Array) -> jax.Array:
    """Return the share of places whose logits (b, 8, 8, names + 1) choose the right one of the scene's own objects.

    `shares` (b, 8, 8, names + 1) say how much of a place shows what. Places count that one object nearly fills, in
    scenes with objects of several names; none of them gives 0.
    """
    logits, shares = logits[..., 1:], shares[..., 1:]
    shown = shares.max((1, 2), keepdims=True) > 0
    filled = (shares.max(-1) > 0.8) & (shown.sum(-1) > 1)
    right = jnp.where(shown, logits, -jnp.inf).argmax(-1) == shares.argmax(-1)
    return (right & filled).sum() / jnp.maximum(filled.sum(), 1)


def make_loss(cfg: Config, pipe: jaxmix.Pipeline, head: Head) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return loss_fn(params, frozen, batch, key) for the batches of `make_batches`.

    It tells `moved`, the squared distance of the states as a share of their variance, and `bound`, see `rightly_bound`.
    """

    def loss_fn(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        def encode(weights: Any) -> jax.Array:
            return pipe.text_encoder.apply({"params": weights}, batch["input_ids"]).last_hidden_state

        states, before = encode(params["text_encoder"]), encode(frozen["text_encoder"])
        logits = head.apply({"params": params["head"]}, states)
        names = jax.nn.one_hot(batch["objects"], head.names)  # of no object, -1, all zeros
        shares = jnp.einsum("bkyx,bko->byxo", batch["covered"], names)
        shares = jnp.concatenate([jnp.maximum(1.0 - shares.sum(-1, keepdims=True), 0.0), shares], -1)
        name_loss = optax.softmax_cross_entropy(logits, shares).mean()
        anchor = jnp.square(states - before).mean()

        told = {"name_loss": name_loss, "moved": anchor / jnp.var(before), "bound": rightly_bound(logits, shares)}
        return name_loss + cfg.anchor_weight * anchor, told

    return loss_fn


def main(cfg: Config) -> int:
    """Train, then save the pipeline with its new text encoder as OUT/pipeline."""
    command.enable_compilation_cache()
    scenes = Scenes(**cfg.scenes)
    if scenes.arrangement != "anywhere":
        raise InputError(f"scenes.arrangement: found {scenes.arrangement!r}, expected 'anywhere', which has boxes")
    pipe = jaxmix.load(cfg.pretrained_model_name_or_path)
    length = pipe.text_encoder.config.max_position_embeddings
    if not 1 <= cfg.tokens <= length:
        raise InputError(f"tokens: found {cfg.tokens}, expected 1 to {length}, which the text encoder reads")
    head = Head(scenes.objects)
    width = pipe.text_encoder.config.hidden_size
    start = head.init(jax.random.key(cfg.seed), jnp.zeros((1, 1, width)))["params"]
    params = {"text_encoder": jax.tree.map(jnp.array, pipe.params["text_encoder"]), "head": start}
    optimizer = make_optimizer(cfg)
    state, complete = fit(
        cfg,
        TrainState.create(params, optimizer, ema=cfg.ema_decay > 0),
        make_update(make_loss(cfg, pipe, head), optimizer, cfg.ema_decay, cfg.gradient_accumulation_steps),
        {"text_encoder": pipe.params["text_encoder"]},
        make_batches(cfg, pipe, scenes),
        progress=command.progress,
    )
    if complete:
        learnt = {**pipe.params, "text_encoder": state.averaged["text_encoder"]}
        dataclasses.replace(pipe, params=learnt).save(Path(cfg.output_dir) / "pipeline")
    return 0


if __name__ == "__main__":
    command.run(main)
