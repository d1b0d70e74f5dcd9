"""Measures of pictures with known prompts, and the same of the real labelled scenes of those prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix.control import Control
from jaxmix.rows import tile
from scripts.effects.stats import Matrix, paired, spread
from train.scenes import DIMENSIONS, LABEL_WORDS, Plan, Scenes, eval_prompts, measure
from train.scorer import Scorer
from train.segmenter import Segmenter, distance_from_middle

Measures = dict[str, np.ndarray]
"""One value per picture: the four dimensions, and whether the scorer finds the right `object` and `style` (1 or 0)."""

SIZE_WORDS = ("small", "big")
TIMESTEPS = (900, 700, 500, 300, 100)


def make_prompts(split: str, n: int, seed: int, objects: int = 24) -> list[dict[str, Any]]:
    """Draw n neutral prompts of one object from a split that training never shows, with their answers and `plan`.

    Those of `eval_prompts`; once all their pairs have met all backgrounds, the same with a size word. The number of
    different captions is three times that of pairs x backgrounds.
    """
    scenes = Scenes(split=split, objects=objects, seed=seed, two_objects=0.0, three_objects=0.0)
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for row in eval_prompts(split, n, seed, objects=objects):
        times = seen[row["caption"]] = seen.get(row["caption"], -1) + 1
        word = ("", SIZE_WORDS[len(rows) % 2], SIZE_WORDS[1 - len(rows) % 2])[times % 3]
        plan = Plan(row["style_name"], row["objects"], row["background_name"], size_word=word)
        rows.append({**row, "caption": scenes.caption(plan), "plan": plan, "split": split})
    return rows


def with_words(caption: str, dimensions: Sequence[str]) -> str:
    """Name the labels in the prompt, as training captions do: "..., vivid colors, bright"."""
    return ", ".join([caption, *(LABEL_WORDS[d][0] for d in LABEL_WORDS if d in dimensions)])


def measure_pictures(
    images: np.ndarray, rows: Sequence[Mapping[str, Any]], segmenter: Segmenter, scorer: Scorer
) -> Measures:
    """Measure uint8 pictures (n, side, side, 3) of n prompts.

    color: saturation; light: luminance; focus: mean absolute Laplacian; composition: minus the distance of the
    objects' bounding box from the centre, a share of the width, by the segmenter, NaN if it finds none.
    """
    values, together = [measure(image) for image in images], min(128, len(images))
    said = scorer(images, together)
    return {
        **{name: np.array([value[name] for value in values]) for name in ("color", "light", "focus")},
        "composition": -distance_from_middle(segmenter(images, together)),
        "object": np.array(
            [scorer.objects[k] == r["object_names"][0] for k, r in zip(said["object"].argmax(-1), rows, strict=True)],
            np.float64,
        ),
        "style": np.array(
            [scorer.styles[k] == r["style_name"] for k, r in zip(said["style"].argmax(-1), rows, strict=True)],
            np.float64,
        ),
    }


def real_scenes(
    rows: Sequence[Mapping[str, Any]],
    n: int,
    seed: int,
    labels: Sequence[str],
    negative: Mapping[str, float] | None = None,
) -> dict[str, np.ndarray]:
    """Paint n scenes of the prompts without labels (""), with each label alone, and with all: uint8 (n, side, side, 3).

    Picture i differs between the sets only in its labels. A share `negative` of the pictures has the opposite of a
    label (blurred, off-centre) in the sets without it, as pictures without that label do in training.
    """
    scenes = Scenes(seed=seed, split=rows[0]["split"], two_objects=0.0, three_objects=0.0)
    sets: dict[str, tuple[str, ...]] = {"": (), **{label: (label,) for label in labels}, "all": tuple(labels)}
    draws = np.random.Generator(np.random.Philox(key=[seed, 0xA51DE])).random((n, len(DIMENSIONS)))
    opposite = draws < np.array([(negative or {}).get(d, 0.0) for d in DIMENSIONS])
    found = {}
    for name, present in sets.items():
        images = []
        for i in range(n):
            signs = {d: 1 if d in present else -int(opposite[i, k]) for k, d in enumerate(DIMENSIONS)}
            plan: Plan = rows[i % len(rows)]["plan"]
            labelled = Plan(plan.style, plan.objects, plan.background, plan.relation, plan.size_word, signs)
            images.append(scenes.render(labelled, np.random.Generator(np.random.Philox(key=[seed, i])))[0])
        found[name] = np.stack(images)
    return found


def round_trip(pipe: jaxmix.Pipeline, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Encode and decode uint8 pictures (n, H, W, 3)."""
    parts = []
    for start in range(0, len(images), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(images) - 1)  # one shape, one program
        parts.append(pipe.decode(pipe.encode_images(images[rows]))[: len(images) - start])
    return np.concatenate(parts)


def effects(changed: Mapping[str, Measures], before: Measures, unit: Measures | None = None) -> Matrix:
    """Return the effect of each set of pictures on each dimension, in standard deviations of `unit` (or `before`)."""
    sds = {d: spread((unit or before)[d]) for d in DIMENSIONS}
    return {name: {d: paired(m[d], before[d], sds[d]) for d in DIMENSIONS} for name, m in changed.items()}


def attention_distance(
    base: jaxmix.Pipeline, other: jaxmix.Pipeline, controls: Sequence[Control], captions: Sequence[str], x0: Any
) -> dict[str, float]:
    """Return how far the attn2 maps of `other` under controls are from those of the base, by site.

    The mean total variation distance (0: equal, 1: disjoint) over queries, heads, prompts and `TIMESTEPS`, at the same
    noised latents: those of x0 (n, h, w, c), the base's own. Conditional rows alone.
    """
    n = len(captions)
    context = base.encode_prompt(captions).context
    tiled = tile(tuple(controls), n)

    @jax.jit
    def maps(params: Any, x: jax.Array, t: jax.Array, context: jax.Array, live: tuple[Control, ...]) -> Any:
        _, state = base.unet.apply({"params": params}, x, t, context, controls=live, mutable=["probs"])
        return {
            jax.tree_util.keystr(path[:-1], simple=True, separator="."): probs
            for path, probs in jax.tree_util.tree_leaves_with_path(state["probs"])
            if path[-2].key == "attn2"
        }

    @jax.jit
    def distance(first: Any, second: Any) -> Any:
        return jax.tree.map(lambda p, q: 0.5 * jnp.abs(p - q).sum(-1).mean(), first, second)

    noise = base.initial_latents(range(10_000, 10_000 + n))
    sums: dict[str, float] = {}
    for step in TIMESTEPS:
        alpha = base.schedule.alphas_cumprod[step]
        x = jnp.sqrt(alpha) * jnp.asarray(x0) + jnp.sqrt(1 - alpha) * noise
        t = jnp.full((n,), step)
        found = distance(maps(base.params["unet"], x, t, context, ()), maps(other.params["unet"], x, t, context, tiled))
        for site, value in found.items():
            sums[site] = sums.get(site, 0.0) + float(value) / len(TIMESTEPS)
    return sums
