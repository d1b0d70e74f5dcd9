"""Train and apply the judge of composition: a small network that says where the objects of a picture are.

With `by_name` it also says on a coarse grid which object is where, so that the places and relations in a caption can be
checked on a picture.

It is trained on real scenes alone, labelled ones included, and never sees a generated picture. Its scores on fresh real
scenes, and on the same after a round trip through the embedded model's autoencoder, are printed with

    python -m train.segmenter --config configs/segmenter.yaml --output_dir runs/segmenter
    python -m train.segmenter --evaluate
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from jaxmix.weights.load import load_tree
from jaxmix.weights.store import save_tree
from train.scenes import ARRANGEMENT, SIZE, off_centre, place_of, relation_of, told
from train.scorer import augment, check_images, make_scenes, read_facts

WEIGHTS = Path(__file__).parent / "scenes" / "segmenter.safetensors"
CHANNELS = (24, 40, 56)
PATCHES = 32  # patches per side; the pixels of a patch are read and written together
CELLS = PATCHES // 2  # cells per side in which objects are named
PRESENT = 0.5  # probability from which an object counts as reaching a row or column


@dataclasses.dataclass
class Config(FitConfig):
    """The segmenter trainer's keys, after those of every trainer.

    Attributes:
        output_dir: folder for checkpoints and logs.
        weights: the safetensors file to write, or with `evaluate` to read.
        objects: number of objects on the training pictures, counted from the start of the atlas.
        by_name: also tell them apart.
        size: width and height of the pictures, pixels; trained weights know their own.
        channels: width of the network at a whole, a half and a quarter of its grid of patches.
        scenes: further arguments of train.scenes.Scenes, such as the arrangement, for training and accuracy.
        labelled: share of the training pictures with aesthetic labels (blurred, dark, dull, off-centre ...).
        blur: share of the training pictures that are blurred a little, as a decoder blurs.
        noise: largest standard deviation of the noise added to training pictures, in [0, 1].
        profile_weight: weight of the loss of rows and columns relative to that of pixels.
        name_weight: weight of the loss of names relative to that of pixels.
        evaluate: do not train; print the scores of `weights` on real scenes.
        eval_scenes: fresh scenes of each kind for them.
    """

    output_dir: str = "runs/segmenter"
    weights: str = str(WEIGHTS)
    objects: int = 96
    by_name: bool = False
    size: int = SIZE
    channels: list[int] = dataclasses.field(default_factory=lambda: list(CHANNELS))
    scenes: dict[str, Any] = dataclasses.field(default_factory=dict)
    labelled: float = 0.6
    blur: float = 0.7
    noise: float = 0.03
    profile_weight: float = 1.0
    name_weight: float = 1.0
    evaluate: bool = False
    eval_scenes: int = 1000


class SegmentNet(nn.Module):
    """A small U-Net on 32x32 patches: images (b, n, n, 3) in [0, 1] to mask logits (b, n, n).

    With `names` also to logits (b, 16, 16, names + 1) of the object that each cell of the picture shows, none first.
    """

    names: int = 0
    channels: tuple[int, ...] = CHANNELS

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        def layer(x: jax.Array, width: int, name: str, stride: int = 1) -> jax.Array:
            x = nn.Conv(width, (3, 3), strides=stride, name=f"{name}.conv")(x)
            return nn.relu(nn.GroupNorm(8, name=f"{name}.norm")(x))

        b, h, w, c = images.shape
        p = h // PATCHES
        x = (
            (images * 2.0 - 1.0)
            .reshape(b, h // p, p, w // p, p, c)
            .swapaxes(2, 3)
            .reshape(b, h // p, w // p, p * p * c)
        )
        skips = []
        for i, width in enumerate(self.channels):
            x = layer(x, width, f"down.{i}", stride=1 if i == 0 else 2)
            skips.append(x)
        # An object can be as large as the picture, nearly all of which is visible from each place here.
        for i in range(2):
            x = x + layer(x, self.channels[-1], f"mid.{i}")
        cells = None
        for i, width in reversed(list(enumerate(self.channels[:-1]))):
            x = x.repeat(2, 1).repeat(2, 2)
            x = layer(jnp.concatenate([x, skips[i]], -1), width, f"up.{i}")
            if i == 1 and self.names:
                cells = nn.Conv(self.names + 1, (3, 3), name="names")(layer(x, 2 * width, "cells"))
        x = nn.Conv(p * p, (3, 3), name="out")(x)
        return x.reshape(b, h // p, w // p, p, p).swapaxes(2, 3).reshape(b, h, w), cells


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """A trained SegmentNet: probabilities that each pixel belongs to an object, and each cell to one by name."""

    params: Any
    size: int = 64  # of the first files, which do not say it
    channels: tuple[int, ...] = CHANNELS
    names: tuple[str, ...] = ()

    @property
    def net(self) -> SegmentNet:
        return SegmentNet(len(self.names), self.channels)

    def __call__(self, images: np.ndarray, batch_size: int = 128) -> np.ndarray:
        """Return probabilities (b, size, size) float32 for images uint8 (b, size, size, 3)."""
        return self._apply(images, batch_size)[0]

    def by_name(self, images: np.ndarray, batch_size: int = 128) -> np.ndarray:
        """Return probabilities (b, 16, 16, names) float32 that a cell of an image shows each of the `names`."""
        if not self.names:
            raise InputError("by_name: found a segmenter without names, expected one that was trained with by_name")
        return self._apply(images, batch_size)[1][..., 1:]

    def _apply(self, images: np.ndarray, batch_size: int) -> list[Any]:
        images = check_images(images, self.size)
        parts = []
        for start in range(0, len(images), batch_size):
            rows = images[start : start + batch_size]
            padded = np.concatenate([rows, np.zeros((batch_size - len(rows), *rows.shape[1:]), np.uint8)])
            parts.append(jax.device_get(_segment(self.net, self.params, padded)))
        joined = [p if p[0] is None else np.concatenate(p)[: len(images)] for p in zip(*parts, strict=True)]
        return joined


@functools.partial(jax.jit, static_argnums=0)
def _segment(net: SegmentNet, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    pixels, cells = net.apply({"params": params}, images.astype(jnp.float32) / 255.0)
    return jax.nn.sigmoid(pixels), None if cells is None else jax.nn.softmax(cells)


def load_segmenter(path: str | Path = WEIGHTS) -> Segmenter:
    """Load a trained segmenter; its size, channels and names are in the file if they are not the usual."""
    segmenter = Segmenter(None, **read_facts(path))
    images = jnp.zeros((1, segmenter.size, segmenter.size, 3))
    target = jax.eval_shape(segmenter.net.init, jax.random.key(0), images)["params"]
    return dataclasses.replace(segmenter, params=load_tree(path, target))


def middle(probabilities: np.ndarray) -> np.ndarray:
    """Return the centres (b, 2) of bounding boxes, (down, right) in pixels, from probabilities or masks (b, h, w).

    A row belongs to the box to the degree that its most probable pixel does, and the centre is the mean of rows with
    these weights: exact for a sharp mask without empty rows, while a soft edge moves it by parts of a pixel. NaN if no
    object is found.
    """
    found = np.empty((len(probabilities), 2))
    for axis in (0, 1):
        profile = np.asarray(probabilities, np.float64).max(2 - axis)
        profile = np.where(profile >= 0.2, profile, 0.0)  # what is almost certainly background does not count
        where = np.arange(profile.shape[1]) + 0.5
        with np.errstate(invalid="ignore"):
            found[:, axis] = np.where(profile.max(1) >= PRESENT, profile @ where / profile.sum(1), np.nan)
    return found


def distance_from_middle(probabilities: np.ndarray) -> np.ndarray:
    """Return how far off centre each picture's objects are (b,), as a share of the width; see `scenes.off_centre`."""
    h, w = probabilities.shape[1:]
    return np.hypot(*(middle(probabilities) - np.array([h, w]) / 2).T) / w


def stands(segmenter: Segmenter, images: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return whether the objects of pictures are where their captions say, one value per picture.

    Rows are those of `eval_prompts`: `object_names`, `places`, `facts`. place: every object is at its place, 1 or 0,
    NaN if the caption names none; relation: all facts hold, likewise. An object that is not found is nowhere.
    """
    whole, named = middle(segmenter(images)), segmenter.by_name(images)
    found: dict[str, list[float]] = {"place": [], "relation": []}
    for i, row in enumerate(rows):
        maps = [named[i, ..., segmenter.names.index(name)] for name in row["object_names"]]
        where = [whole[i]] if len(maps) == 1 else list(middle(np.stack(maps)) * segmenter.size / named.shape[1])
        where = [w / segmenter.size - 0.5 for w in where]
        places = [place_of(*w) == place for w, place in zip(where, row["places"], strict=False) if np.isfinite(w).all()]
        found["place"].append(float(sum(places) == len(where)) if row["places"] else np.nan)
        said = []
        for a, b, relation in row["facts"]:
            known = np.isfinite(where[a]).all() and np.isfinite(where[b]).all()
            said.append(known and relation_of(*(where[b] - where[a])) == (relation, True))
        found["relation"].append(float(all(said)) if said else np.nan)
    return {name: np.array(values) for name, values in found.items()}


def make_batches(cfg: Config) -> Callable[[int], Iterator[Any]]:
    """Return step -> iterator over batches of pictures and the masks of their objects, (b, n, n) bool.

    With `by_name` also how much of each cell each object covers, (b, 3, 16, 16), and which objects they are, (b, 3).
    """

    def row(scene: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        found = {"image": scene["image"], "mask": scene["masks"].any(0)}
        if cfg.by_name:
            masks, side = scene["masks"], cfg.size // CELLS
            covered = masks.reshape(len(masks), CELLS, side, CELLS, side).mean((2, 4), dtype=np.float32)
            found |= {"covered": covered, "objects": scene["objects"]}
        return found

    shares = {"two_objects": 0.25, "three_objects": 0.05, "labelled": cfg.labelled, **cfg.scenes}
    scenes = make_scenes(cfg.objects, cfg.seed + 1, cfg.size, **shares)
    dataset = make_dataset(scenes, cfg.train_batch_size, cfg.seed, row)
    return lambda step: iterate(dataset, step, cfg.dataloader_num_workers)


def make_net(cfg: Config) -> SegmentNet:
    """Return the network of a config."""
    return SegmentNet(cfg.objects if cfg.by_name else 0, tuple(cfg.channels))


def make_loss(cfg: Config) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return loss_fn(params, frozen, batch, key) for the batches of `make_batches`."""

    def entropy(logits: jax.Array, mask: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(logits, mask.astype(jnp.float32)).mean()

    def loss_fn(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = augment(batch["image"].astype(jnp.float32) / 255.0, key, cfg.blur, cfg.noise)
        (logits, cells), mask = make_net(cfg).apply({"params": params}, images), batch["mask"]
        # The edges of the bounding box depend on single pixels, which hardly affect the mean over all pixels.
        profiles = jnp.stack([entropy(logits.max(axis), mask.max(axis)) for axis in (1, 2)]).mean()
        losses = {"pixel_loss": entropy(logits, mask), "profile_loss": profiles}
        total = losses["pixel_loss"] + cfg.profile_weight * profiles
        if cells is not None:
            names = jax.nn.one_hot(batch["objects"], cfg.objects)  # of no object, -1, all zeros
            shares = jnp.einsum("bkyx,bko->byxo", batch["covered"], names)
            shares = jnp.concatenate([1.0 - shares.sum(-1, keepdims=True), shares], -1)
            losses["name_loss"] = optax.softmax_cross_entropy(cells, shares).mean()
            total += cfg.name_weight * losses["name_loss"]
        return total, losses

    return loss_fn


def scores(segmenter: Segmenter, images: np.ndarray, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return how good the masks of pictures of known scenes are.

    `iou`, the mean over pictures of the IoU of masks (probability 0.5); `centre_error`, the mean distance of the
    middle of the bounding box from the true one, pixels; `correlation` of the distance from the picture's middle with
    the true one; `lost`, the share of pictures on which no object was found.
    """
    said, true = segmenter(images), np.stack([row["masks"].any(0) for row in rows])
    union, common = ((said > 0.5) | true).sum((1, 2)), ((said > 0.5) & true).sum((1, 2))
    boxes = [(np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))) for mask in true]
    middles = np.array([[(line[0] + line[-1] + 1) / 2 for line in box] for box in boxes])
    error, off = np.hypot(*(middle(said) - middles).T), distance_from_middle(said)
    found = np.isfinite(error)
    return {
        "iou": float((common / union).mean()),
        "centre_error": float(error[found].mean()),
        "correlation": float(np.corrcoef(off[found], np.array([off_centre(mask) for mask in true])[found])[0, 1]),
        "lost": float(1 - found.mean()),
    }


def evaluate(cfg: Config) -> dict[str, dict[str, float]]:
    """Print and return the scores on real scenes of the embedded model's objects.

    As they are, and after a round trip through the embedded model's autoencoder if that has the segmenter's size.
    """
    segmenter, pipe = load_segmenter(cfg.weights), jaxmix.load("mini")
    round_trip = pipe.latent_shape[0] * pipe.vae.config.factor == segmenter.size
    kinds: dict[str, dict[str, float]] = {
        "one object, neutral": {"two_objects": 0.0, "labelled": 0.0},
        "one object, with aesthetic labels": {"two_objects": 0.0, "labelled": 1.0},
        "two objects, neutral": {"two_objects": 1.0, "labelled": 0.0},
    }
    if cfg.scenes.get("arrangement", ARRANGEMENT) == "anywhere":
        kinds["three objects, neutral"] = {"two_objects": 0.0, "three_objects": 1.0, "labelled": 0.0}
    results = {}
    for kind, shares in kinds.items():
        settings = {**cfg.scenes, "three_objects": 0.0, **shares}
        scenes = make_scenes(24, 990_002 + cfg.seed, segmenter.size, **settings)
        rows = [scenes[i] for i in range(cfg.eval_scenes)]
        images = np.stack([row["image"] for row in rows])
        shown = {kind: images}
        if round_trip:
            batches = [images[i : i + 50] for i in range(0, len(images), 50)]
            decoded = np.concatenate([pipe.decode(pipe.encode_images(batch)) for batch in batches])
            shown[f"{kind}, after the autoencoder"] = decoded
        for name, pictures in shown.items():
            results[name] = found = scores(segmenter, pictures, rows)
            print(
                f"{name}, {len(rows)} fresh real scenes: IoU {found['iou']:.3f}, centre of the bounding box off by "
                f"{found['centre_error']:.2f} px, correlation of the distance from the middle "
                f"{found['correlation']:.3f}, nothing found in {100 * found['lost']:.1f} %",
                flush=True,
            )
    if segmenter.names:
        for count in (1, 2, 3):
            results[f"places of {count}"] = said = place_accuracy(segmenter, count, cfg.eval_scenes, cfg.seed)
            print(
                f"{count} objects where the caption says: " + ", ".join(f"{k} {100 * v:.2f} %" for k, v in said.items())
            )
    return results


def place_accuracy(segmenter: Segmenter, count: int, n: int, seed: int) -> dict[str, float]:
    """Return the share of n fresh real scenes of `count` objects in which the words for places and relations hold."""
    shares = {"two_objects": float(count == 2), "three_objects": float(count == 3), "labelled": 0.0, "counts": 0.0}
    scenes = make_scenes(
        len(segmenter.names), 990_003 + seed, segmenter.size, arrangement="anywhere", place_words=1.0, **shares
    )
    rows = [scenes[i] for i in range(n)]
    rows = [{**row, "facts": told(row["relation"], row["places"], count)} for row in rows]
    found = stands(segmenter, np.stack([row["image"] for row in rows]), rows)
    return {name: float(np.nanmean(values)) for name, values in found.items() if np.isfinite(values).any()}


def main(cfg: Config) -> int:
    """Train, write the weights in float16, print their scores."""
    command.enable_compilation_cache()
    if cfg.evaluate:
        evaluate(cfg)
        return 0
    if cfg.size % (2 * PATCHES):
        raise InputError(f"size: found {cfg.size}, expected a multiple of {2 * PATCHES}")
    params = jax.jit(make_net(cfg).init)(jax.random.key(cfg.seed), jnp.zeros((1, cfg.size, cfg.size, 3)))["params"]
    optimizer = make_optimizer(cfg)
    state, complete = fit(
        cfg,
        TrainState.create(params, optimizer, ema=cfg.ema_decay > 0),
        make_update(make_loss(cfg), optimizer, cfg.ema_decay, cfg.gradient_accumulation_steps),
        {},
        make_batches(cfg),
        progress=command.progress,
    )
    if not complete:
        return 0
    names = make_scenes(cfg.objects, cfg.seed).object_names if cfg.by_name else ()
    facts = {"size": cfg.size, "channels": cfg.channels, "names": names}
    save_tree(state.averaged, cfg.weights, jnp.float16, {key: json.dumps(value) for key, value in facts.items()})
    print(f"wrote {cfg.weights}, {Path(cfg.weights).stat().st_size / 1e3:.0f} kB")
    evaluate(cfg)
    return 0


if __name__ == "__main__":
    command.run(main)
