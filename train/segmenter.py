"""Train and apply the judge of composition: a small network that says where the objects of a picture stand.

It is trained on real scenes alone, labelled ones included, and never sees a generated picture. What it is worth on
fresh real scenes, and on the same after a round trip through the embedded model's autoencoder, is printed with

    python -m train.segmenter --config configs/segmenter.yaml --output_dir runs/segmenter
    python -m train.segmenter --evaluate
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
from train.scenes import off_centre
from train.scorer import SIZE, augment, make_scenes

WEIGHTS = Path(__file__).parent / "scenes" / "segmenter.safetensors"
PRESENT = 0.5  # probability from which a row or column counts as one that an object reaches


@dataclasses.dataclass
class Config(FitConfig):
    """The segmenter trainer's keys, after those of every trainer.

    Attributes:
        output_dir: folder for checkpoints and logs.
        weights: the safetensors file to write, or with `evaluate` to read.
        objects: number of objects on the training pictures, counted from the start of the atlas.
        labelled: share of the training pictures with aesthetic labels (blurred, dark, dull, off-centre ...).
        blur: share of the training pictures that are blurred a little, as a decoder blurs.
        noise: largest standard deviation of the noise added to training pictures, in [0, 1].
        profile_weight: weight of the loss of the rows and columns against that of the pixels.
        evaluate: train nothing; print what `weights` are worth on real scenes.
        eval_scenes: fresh scenes of each kind for that.
    """

    output_dir: str = "runs/segmenter"
    weights: str = str(WEIGHTS)
    objects: int = 96
    labelled: float = 0.6
    blur: float = 0.7
    noise: float = 0.03
    profile_weight: float = 1.0
    evaluate: bool = False
    eval_scenes: int = 1000


class SegmentNet(nn.Module):
    """A small U-Net on 2x2 patches: images (b, 64, 64, 3) in [0, 1] to mask logits (b, 64, 64)."""

    channels: tuple[int, ...] = (24, 40, 56)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        def layer(x: jax.Array, width: int, name: str, stride: int = 1) -> jax.Array:
            x = nn.Conv(width, (3, 3), strides=stride, name=f"{name}.conv")(x)
            return nn.relu(nn.GroupNorm(8, name=f"{name}.norm")(x))

        b, h, w, c = images.shape
        x = (images * 2.0 - 1.0).reshape(b, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(b, h // 2, w // 2, 4 * c)
        skips = []
        for i, width in enumerate(self.channels):
            x = layer(x, width, f"down.{i}", stride=1 if i == 0 else 2)
            skips.append(x)
        # An object can be as large as the picture: here each place sees nearly all of it.
        for i in range(2):
            x = x + layer(x, self.channels[-1], f"mid.{i}")
        for i, width in reversed(list(enumerate(self.channels[:-1]))):
            x = x.repeat(2, 1).repeat(2, 2)
            x = layer(jnp.concatenate([x, skips[i]], -1), width, f"up.{i}")
        x = nn.Conv(4, (3, 3), name="out")(x)
        return x.reshape(b, h // 2, w // 2, 2, 2).swapaxes(2, 3).reshape(b, h, w)


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """A trained SegmentNet: probabilities that each pixel belongs to an object."""

    params: Any

    def __call__(self, images: np.ndarray, batch_size: int = 128) -> np.ndarray:
        """Probabilities (b, 64, 64) float32 for images uint8 (b, 64, 64, 3)."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3):
            raise InputError(f"images: found {images.dtype} {images.shape}, expected uint8 (b, {SIZE}, {SIZE}, 3)")
        parts = []
        for start in range(0, len(images), batch_size):
            rows = images[start : start + batch_size]
            padded = np.concatenate([rows, np.zeros((batch_size - len(rows), *rows.shape[1:]), np.uint8)])
            parts.append(np.asarray(_segment(self.params, padded)))
        return np.concatenate(parts)[: len(images)]


@jax.jit
def _segment(params: Any, images: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(SegmentNet().apply({"params": params}, images.astype(jnp.float32) / 255.0))


def load_segmenter(path: str | Path = WEIGHTS) -> Segmenter:
    """Loads a trained segmenter."""
    target = jax.eval_shape(SegmentNet().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    return Segmenter(load_tree(path, target))


def middle(probabilities: np.ndarray) -> np.ndarray:
    """Middles (b, 2) of the bounding boxes, (down, right) in pixels, from probabilities or masks (b, h, w).

    A row belongs to the box as far as its most probable pixel does, and the middle is the mean of the rows so
    weighted: exact for a sharp mask without empty rows, and a soft edge moves it by parts of a pixel. NaN where no
    object is found.
    """
    found = np.empty((len(probabilities), 2))
    for axis in (0, 1):
        profile = np.asarray(probabilities, np.float64).max(2 - axis)
        profile = np.where(profile >= 0.2, profile, 0.0)  # what is almost surely background has no say
        where = np.arange(profile.shape[1]) + 0.5
        with np.errstate(invalid="ignore"):
            found[:, axis] = np.where(profile.max(1) >= PRESENT, profile @ where / profile.sum(1), np.nan)
    return found


def distance_from_middle(probabilities: np.ndarray) -> np.ndarray:
    """How far off centre each picture's objects stand (b,), as a share of the width; see `scenes.off_centre`."""
    h, w = probabilities.shape[1:]
    return np.hypot(*(middle(probabilities) - np.array([h, w]) / 2).T) / w


def make_batches(cfg: Config) -> Callable[[int], Iterator[Any]]:
    """Return step -> iterator over batches of pictures and the masks of their objects, (b, 64, 64) bool."""

    def row(scene: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"image": scene["image"], "mask": scene["masks"].any(0)}

    shares = {"two_objects": 0.25, "three_objects": 0.05, "labelled": cfg.labelled}
    dataset = make_dataset(make_scenes(cfg.objects, cfg.seed + 1, **shares), cfg.train_batch_size, cfg.seed, row)
    return lambda step: iterate(dataset, step, cfg.dataloader_num_workers)


def make_loss(cfg: Config) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return loss_fn(params, frozen, batch, key) for the batches of `make_batches`."""

    def entropy(logits: jax.Array, mask: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(logits, mask.astype(jnp.float32)).mean()

    def loss_fn(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = augment(batch["image"].astype(jnp.float32) / 255.0, key, cfg.blur, cfg.noise)
        logits, mask = SegmentNet().apply({"params": params}, images), batch["mask"]
        # The edges of the bounding box hang on single pixels, which the mean over all pixels hardly sees.
        profiles = jnp.stack([entropy(logits.max(axis), mask.max(axis)) for axis in (1, 2)]).mean()
        losses = {"pixel_loss": entropy(logits, mask), "profile_loss": profiles}
        return losses["pixel_loss"] + cfg.profile_weight * profiles, losses

    return loss_fn


def scores(segmenter: Segmenter, images: np.ndarray, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the masks of pictures of known scenes are worth.

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
    """Print and return the scores on real scenes of the embedded model's objects, as they are and round-tripped."""
    segmenter, pipe = load_segmenter(cfg.weights), jaxmix.load("mini")
    kinds = {
        "one object, neutral": {"two_objects": 0.0, "labelled": 0.0},
        "one object, with aesthetic labels": {"two_objects": 0.0, "labelled": 1.0},
        "two objects, neutral": {"two_objects": 1.0, "labelled": 0.0},
    }
    results = {}
    for kind, shares in kinds.items():
        scenes = make_scenes(24, 990_002 + cfg.seed, three_objects=0.0, **shares)
        rows = [scenes[i] for i in range(cfg.eval_scenes)]
        images = np.stack([row["image"] for row in rows])
        batches = [images[i : i + 50] for i in range(0, len(images), 50)]
        decoded = np.concatenate([pipe.decode(pipe.encode_images(batch)) for batch in batches])
        for name, pictures in ((kind, images), (f"{kind}, after the autoencoder", decoded)):
            results[name] = found = scores(segmenter, pictures, rows)
            print(
                f"{name}, {len(rows)} fresh real scenes: IoU {found['iou']:.3f}, centre of the bounding box off by "
                f"{found['centre_error']:.2f} px, correlation of the distance from the middle "
                f"{found['correlation']:.3f}, nothing found in {100 * found['lost']:.1f} %",
                flush=True,
            )
    return results


def main(cfg: Config) -> int:
    """Train, write the weights in float16, print what they are worth."""
    command.enable_compilation_cache()
    if cfg.evaluate:
        evaluate(cfg)
        return 0
    params = jax.jit(SegmentNet().init)(jax.random.key(cfg.seed), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
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
    save_tree(state.averaged, cfg.weights, jnp.float16)
    print(f"wrote {cfg.weights}, {Path(cfg.weights).stat().st_size / 1e3:.0f} kB")
    evaluate(cfg)
    return 0


if __name__ == "__main__":
    command.run(main)
