"""Train and apply the judge of generated scenes: a small CNN that names the objects, style and background of a picture.

It is trained on real scenes alone, held-out combinations included, and never sees a generated picture, so that its
judgement of a generator is independent of it. Its accuracy on fresh real scenes is printed with `--evaluate`.

    python -m train.scorer --config configs/scorer.yaml --output_dir runs/scorer
    python -m train.scorer --evaluate
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

from jaxmix import command
from jaxmix.tuning.data import iterate, make_dataset
from jaxmix.tuning.fit import FitConfig, fit
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from jaxmix.types import InputError
from jaxmix.weights.load import load_tree
from jaxmix.weights.safetensors import read_header
from jaxmix.weights.store import save_tree
from train.scenes import ARRANGEMENT, BACKGROUNDS, HELD_OUT_STYLE, SIZE, STYLES, Scenes

CHANNELS = (32, 64, 128, 128)
WEIGHTS = Path(__file__).parent / "scenes" / "scorer.safetensors"
HEADS = ("object", "style", "background")


@dataclasses.dataclass
class Config(FitConfig):
    """The scorer trainer's keys, after those of every trainer.

    Attributes:
        output_dir: folder for checkpoints and logs.
        weights: the safetensors file to write, or with `evaluate` to read.
        objects: number of objects to tell apart, counted from the start of the atlas; with reserved in scenes also the
            last ones, which models are not trained on.
        size: width and height of the pictures, pixels; trained weights know their own.
        channels: width of each convolution; all but the last halve the picture.
        scenes: further arguments of train.scenes.Scenes, such as the arrangement, for training and accuracy.
        blur: share of the training pictures that are blurred a little, as a decoder blurs.
        noise: largest standard deviation of the noise added to training pictures, in [0, 1].
        evaluate: do not train; print the accuracy of `weights` on real scenes.
        eval_scenes: fresh scenes of one object for that accuracy.
    """

    output_dir: str = "runs/scorer"
    weights: str = str(WEIGHTS)
    objects: int = 24
    size: int = SIZE
    channels: list[int] = dataclasses.field(default_factory=lambda: list(CHANNELS))
    scenes: dict[str, Any] = dataclasses.field(default_factory=dict)
    blur: float = 0.5
    noise: float = 0.03
    evaluate: bool = False
    eval_scenes: int = 4000


class SceneNet(nn.Module):
    """A strided CNN with three heads.

    Takes images (b, n, n, 3) in [0, 1]; gives logits {"object": (b, o), "style": (b, s), "background": (b, k)}.
    Style also shows in fine texture, so its head also sees the means of the early layers.
    """

    objects: int
    styles: int
    backgrounds: int
    channels: tuple[int, ...] = CHANNELS

    def setup(self) -> None:
        last = len(self.channels) - 1
        self.convs = [
            nn.Conv(width, (3, 3), strides=2 if i < last else 1, name=f"convs.{i}")
            for i, width in enumerate(self.channels)
        ]
        self.norms = [nn.GroupNorm(8, name=f"norms.{i}") for i in range(len(self.channels))]
        sizes = dict(zip(HEADS, (self.objects, self.styles, self.backgrounds), strict=True))
        self.heads = {head: nn.Dense(size, name=f"heads.{head}") for head, size in sizes.items()}

    def activations(self, images: jax.Array) -> list[jax.Array]:
        """Return the output of each convolution, after norm and ReLU, (b, h, w, c) each."""
        x, found = images * 2.0 - 1.0, []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.relu(norm(conv(x)))
            found.append(x)
        return found

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        found = self.activations(images)
        x = found[-1]
        # Not x.max(): its gradient divides by the number of places where x is largest, which is zero if the compiler
        # recomputes x with another rounding.
        largest = nn.max_pool(x, x.shape[1:3])[:, 0, 0]
        features = jnp.concatenate([*(y.mean((1, 2)) for y in found), largest], -1)
        return {head: layer(features) for head, layer in self.heads.items()}


def check_images(images: np.ndarray, size: int) -> np.ndarray:
    """Return pictures as an array; raises InputError if they are not uint8 (b, size, size, 3)."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise InputError(f"images: found {images.dtype} {images.shape}, expected uint8 (b, {size}, {size}, 3)")
    return images


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A trained SceneNet with the names of its classes, in the order of its probabilities."""

    params: Any
    objects: tuple[str, ...]
    styles: tuple[str, ...]
    backgrounds: tuple[str, ...]
    size: int = 64  # of the first files, which do not say it
    channels: tuple[int, ...] = CHANNELS

    @property
    def net(self) -> SceneNet:
        return SceneNet(len(self.objects), len(self.styles), len(self.backgrounds), self.channels)

    def __call__(self, images: np.ndarray, batch_size: int = 128) -> dict[str, np.ndarray]:
        """Return probabilities {"object": (b, o) each by itself, "style": (b, s), "background": (b, k) summing to one}.

        `images` is uint8 (b, size, size, 3).
        """
        images = check_images(images, self.size)
        parts = []
        for start in range(0, len(images), batch_size):
            rows = images[start : start + batch_size]
            padded = np.concatenate([rows, np.zeros((batch_size - len(rows), *rows.shape[1:]), np.uint8)])
            parts.append(jax.device_get(_judge(self.net, self.params, padded)))
        return {head: np.concatenate([part[head] for part in parts])[: len(images)] for head in HEADS}


@functools.partial(jax.jit, static_argnums=0)
def _judge(net: SceneNet, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    logits = net.apply({"params": params}, images.astype(jnp.float32) / 255.0)
    return {head: jax.nn.sigmoid(x) if head == "object" else jax.nn.softmax(x) for head, x in logits.items()}


def read_facts(path: str | Path) -> dict[str, Any]:
    """Return what a file of weights says about its network: names and numbers, with lists as tuples."""
    found = {k: json.loads(v) for k, v in read_header(path).metadata.items() if k != "format"}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def load_scorer(path: str | Path = WEIGHTS) -> Scorer:
    """Load a trained scorer; the file holds its class names, and its size and channels if they are unusual."""
    scorer = Scorer(None, **read_facts(path))
    target = jax.eval_shape(scorer.net.init, jax.random.key(0), jnp.zeros((1, scorer.size, scorer.size, 3)))["params"]
    return dataclasses.replace(scorer, params=load_tree(path, target))


def judge(scorer: Scorer, images: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, np.ndarray], Any]:
    """Judge pictures against rows of `eval_prompts` (or scenes); return what is right in each, (n,) bool.

    For `object` the most probable objects (as many as the row has different ones) must be the row's, for `any_object`
    at least one of them, for `style` and `background` the most probable one must be right, for `all` everything. Then
    the same by class, {head: {name: [bool, ...]}}.
    """
    said = scorer(images)
    styles = [scorer.styles[i] for i in said["style"].argmax(-1)]
    backgrounds = [scorer.backgrounds[i] for i in said["background"].argmax(-1)]
    right: dict[str, list[bool]] = {"object": [], "any_object": [], "style": [], "background": []}
    by_name: dict[str, dict[str, list[bool]]] = {head: {} for head in HEADS}
    for i, row in enumerate(rows):
        wanted = set(row["object_names"])
        found = {scorer.objects[k] for k in np.argsort(-said["object"][i])[: len(wanted)]}
        right["object"].append(found == wanted)
        right["any_object"].append(bool(found & wanted))
        right["style"].append(styles[i] == row["style_name"])
        right["background"].append(backgrounds[i] == row["background_name"])
        for name in wanted:
            by_name["object"].setdefault(name, []).append(name in found)
        for head in ("style", "background"):
            by_name[head].setdefault(row[f"{head}_name"], []).append(right[head][-1])
    arrays = {head: np.array(values, bool) for head, values in right.items()}
    arrays["all"] = np.logical_and.reduce([arrays[head] for head in HEADS])
    return arrays, by_name


def accuracy(scorer: Scorer, images: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the shares of pictures judged right, see `judge`, and by class under object_by_name and the like."""
    right, by_name = judge(scorer, images, rows)
    result: dict[str, Any] = {head: float(np.mean(values)) for head, values in right.items()}
    for head, classes in by_name.items():
        result[f"{head}_by_name"] = {name: float(np.mean(values)) for name, values in sorted(classes.items())}
    return result


def make_scenes(objects: int, seed: int, size: int = SIZE, **settings: Any) -> Scenes:
    """Return scenes of everything the scorer must know: all combinations, and the style that generators never see."""
    return Scenes(size=size, objects=objects, styles=(*STYLES, HELD_OUT_STYLE), seed=seed, split="all", **settings)


def make_batches(cfg: Config) -> Callable[[int], Iterator[Any]]:
    """Return step -> iterator over batches of pictures and their classes."""
    scenes = make_scenes(cfg.objects, cfg.seed + 1, cfg.size, **cfg.scenes)
    place = {number: i for i, number in enumerate(scenes.object_numbers)}

    def row(scene: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        present = np.zeros(len(place), np.float32)
        present[[place[int(number)] for number in scene["objects"] if number >= 0]] = 1
        return {
            "image": scene["image"],
            "object": present,
            "style": np.int32(scene["style"]),
            "background": np.int32(scene["background"]),
        }

    dataset = make_dataset(scenes, cfg.train_batch_size, cfg.seed, row)
    return lambda step: iterate(dataset, step, cfg.dataloader_num_workers)


def augment(images: jax.Array, key: jax.Array, blur: float, noise: float) -> jax.Array:
    """Blur a share of the images (b, h, w, 3) by up to about a 64th of the width and adds noise."""
    which, how_much, how_noisy, grain = jax.random.split(key, 4)
    rows = (images.shape[0], 1, 1, 1)
    soft = images
    step = max(images.shape[1] // 64, 1)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (step, step)
        wide = jnp.pad(soft, pad, mode="edge")
        n = images.shape[axis]
        parts = [jax.lax.slice_in_dim(wide, k * step, k * step + n, axis=axis) for k in range(3)]
        soft = 0.25 * parts[0] + 0.5 * parts[1] + 0.25 * parts[2]
    share = jax.random.uniform(how_much, rows) * (jax.random.uniform(which, rows) < blur)
    strength = noise * jax.random.uniform(how_noisy, rows)
    mixed = images + share * (soft - images) + strength * jax.random.normal(grain, images.shape)
    return jnp.clip(mixed, 0.0, 1.0)


def make_loss(net: SceneNet, cfg: Config) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Return loss_fn(params, frozen, batch, key) for the batches of `make_batches`."""

    def loss_fn(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = augment(batch["image"].astype(jnp.float32) / 255.0, key, cfg.blur, cfg.noise)
        logits = net.apply({"params": params}, images)
        presence = optax.sigmoid_binary_cross_entropy(logits["object"], batch["object"]).sum(-1).mean()
        losses = {"object_loss": presence}
        for head in ("style", "background"):
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits[head], batch[head])
            losses[f"{head}_loss"] = entropy.mean()
        return sum(losses.values()), losses

    return loss_fn


def evaluate(cfg: Config) -> dict[str, Any]:
    """Print the accuracy of a scorer on real scenes that it was not trained on; return that of neutral ones."""
    scorer = load_scorer(cfg.weights)
    kinds: dict[str, dict[str, float]] = {
        "one object, neutral": {"two_objects": 0.0, "three_objects": 0.0, "labelled": 0.0},
        "one object, with aesthetic labels": {"two_objects": 0.0, "three_objects": 0.0, "labelled": 1.0},
        "two objects, neutral": {"two_objects": 1.0, "three_objects": 0.0, "labelled": 0.0},
    }
    if cfg.scenes.get("arrangement", ARRANGEMENT) == "anywhere":
        kinds["three objects, neutral"] = {"two_objects": 0.0, "three_objects": 1.0, "labelled": 0.0}
    results = []
    for kind, shares in kinds.items():
        scenes = make_scenes(cfg.objects, 990_001 + cfg.seed, scorer.size, **{**cfg.scenes, **shares})
        if scenes.object_names != scorer.objects:
            raise InputError(
                f"objects: found scenes of {len(scenes.object_names)}, expected those that {cfg.weights} tells apart, "
                f"{len(scorer.objects)} (objects, and reserved in scenes)"
            )
        rows = [scenes[i] for i in range(cfg.eval_scenes)]
        result = accuracy(scorer, np.stack([row["image"] for row in rows]), rows)
        shown = ", ".join(f"{head} {100 * result[head]:.2f} %" for head in (*HEADS, "all"))
        print(f"{kind}, {len(rows)} fresh real scenes: {shown}", flush=True)
        results.append(result)
    for head in HEADS:
        classes = results[0][f"{head}_by_name"]
        print(f"{head}: " + ", ".join(f"{name} {100 * share:.1f}" for name, share in classes.items()))
    return results[0]


def main(cfg: Config) -> int:
    """Train, write the weights in float16, print their accuracy."""
    command.enable_compilation_cache()
    if cfg.evaluate:
        evaluate(cfg)
        return 0
    scenes = make_scenes(cfg.objects, cfg.seed, cfg.size, **cfg.scenes)
    net = SceneNet(len(scenes.object_names), len(scenes.styles), len(BACKGROUNDS), tuple(cfg.channels))
    params = jax.jit(net.init)(jax.random.key(cfg.seed), jnp.zeros((1, cfg.size, cfg.size, 3)))["params"]
    optimizer = make_optimizer(cfg)
    state, complete = fit(
        cfg,
        TrainState.create(params, optimizer, ema=cfg.ema_decay > 0),
        make_update(make_loss(net, cfg), optimizer, cfg.ema_decay, cfg.gradient_accumulation_steps),
        {},
        make_batches(cfg),
        progress=command.progress,
    )
    if not complete:
        return 0
    facts: dict[str, Any] = {"objects": scenes.object_names, "styles": scenes.styles, "backgrounds": BACKGROUNDS}
    facts.update(size=cfg.size, channels=cfg.channels)
    save_tree(state.averaged, cfg.weights, jnp.float16, {key: json.dumps(value) for key, value in facts.items()})
    print(f"wrote {cfg.weights}, {Path(cfg.weights).stat().st_size / 1e6:.2f} MB")
    evaluate(cfg)
    return 0


if __name__ == "__main__":
    command.run(main)
