"""StyleAligned and StyleID measured: sets in one style, and pictures in the style of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import jaxmix
from jaxmix.methods.style_aligned import style_aligned
from jaxmix.methods.style_id import style_id_sites
from train.scenes import Plan, Scenes
from train.scenes.captions import BACKGROUND_WORDS, STYLE_WORDS, with_article
from train.scorer import Scorer
from train.segmenter import Segmenter

SET = 4  # images of a set, the reference first


def gram(images: np.ndarray) -> np.ndarray:
    """Return the covariance of 3 x 3 patches (b, 27, 27): colours and textures without their places."""
    x = images.astype(np.float32) / 255.0
    h, w = x.shape[1] - 2, x.shape[2] - 2
    patches = np.concatenate([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], -1)
    flat = patches.reshape(len(x), h * w, -1)
    flat = flat - flat.mean(1, keepdims=True)
    return np.einsum("bni,bnj->bij", flat, flat) / (h * w)


def gram_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the Frobenius distance of the covariances of paired pictures, (b,)."""
    return np.sqrt(np.square(gram(first) - gram(second)).sum((1, 2)))


# StyleAligned ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StyledSet:
    """Prompts of a set: the reference's says its style, the others' only what they show."""

    prompts: tuple[str, ...]
    objects: tuple[int, ...]
    style: str


def sets(n: int, seed: int) -> list[StyledSet]:
    """Return n sets of four objects on one background, each with its style named in the first prompt only."""
    scenes = Scenes(split="all", seed=seed, two_objects=0.0, three_objects=0.0)
    backgrounds, styles = sorted(BACKGROUND_WORDS), list(scenes.styles)
    found = []
    for i in range(n):
        rng = np.random.Generator(np.random.Philox(key=[seed, (0x5E7 << 32) + i]))
        objects = tuple(int(x) for x in rng.choice(scenes.objects, SET, replace=False))
        where, style = BACKGROUND_WORDS[backgrounds[rng.integers(len(backgrounds))]], styles[i % len(styles)]
        names = [with_article(scenes.atlas.objects[o]) for o in objects]
        prompts = [f"{with_article(STYLE_WORDS[style])} of {names[0]} {where}", *(f"{n} {where}" for n in names[1:])]
        found.append(StyledSet(tuple(prompts), objects, style))
    return found


def set_controls(pipe: jaxmix.Pipeline) -> dict[str, Callable[[int], tuple[Any, ...]]]:
    """Return the controls of each condition for a number of sets; "named" says the style in every prompt instead."""

    def aligned(**options: Any) -> Callable[[int], tuple[Any, ...]]:
        return lambda count: (style_aligned(pipe, [SET] * count, **options),)

    return {
        "plain prompts": lambda count: (),
        "style named in all prompts": lambda count: (),
        "StyleAligned": aligned(),
        "without AdaIN": aligned(adain=()),
        "full sharing": aligned(full=True),
        "without sharing group norms": aligned(share_group_norm=False),
        "swapped (visual style prompting)": aligned(swap=True, sites=r"up_blocks.*attn1$", share_group_norm=False),
        "shift log 2": aligned(shift=float(np.log(2))),
    }


def prompts_of(name: str, some: Sequence[StyledSet]) -> list[str]:
    """Return the prompts of sets under a condition."""
    out = []
    for one in some:
        head = one.prompts[0].split(" of ")[0]
        rest = [f"{head} of {p}" if name.startswith("style named") else p for p in one.prompts[1:]]
        out += [one.prompts[0], *rest]
    return out


def strips(images: np.ndarray) -> np.ndarray:
    """Return the four images of each set side by side: (4 n, h, w, 3) to (n, h, 4 w, 3)."""
    sets = images.reshape(-1, SET, *images.shape[1:])
    return np.concatenate([sets[:, i] for i in range(SET)], 2)


def measure_sets(images: np.ndarray, some: Sequence[StyledSet], scorer: Scorer) -> dict[str, np.ndarray]:
    """Measure uint8 pictures (4 n, side, side, 3), one value per set, of the other three against the reference.

    agree: the dot product of the scorer's style probabilities; gram: distance of patch covariances; object: share drawn
    right.
    """
    said = scorer(images)
    style = said["style"].reshape(len(some), SET, -1)
    right = said["object"].argmax(-1).reshape(len(some), SET) == np.asarray([one.objects for one in some])
    grouped = images.reshape(len(some), SET, *images.shape[1:])
    distances = [gram_distance(grouped[:, 0], grouped[:, i]) for i in range(1, SET)]
    return {
        "agree": (style[:, :1] * style[:, 1:]).sum(-1).mean(-1),
        "gram": np.mean(distances, 0),
        "object": right[:, 1:].mean(-1),
    }


# StyleID --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Real scenes of one object: contents, and as many styles of other objects in another style."""

    content: np.ndarray
    style: np.ndarray
    objects: np.ndarray
    styles: tuple[str, ...]
    masks: np.ndarray


def pairs(n: int, seed: int) -> Pairs:
    """Paint n contents and n styles; the two of a pair differ in object and style, and agree only by chance."""
    scenes = Scenes(split="all", seed=seed, two_objects=0.0, three_objects=0.0)
    kinds, backgrounds = list(scenes.styles), sorted(BACKGROUND_WORDS)
    contents, styles, objects, named, masks = [], [], [], [], []
    for i in range(n):
        rng = np.random.Generator(np.random.Philox(key=[seed, (0x1D << 32) + i]))
        first, second = (int(x) for x in rng.choice(scenes.objects, 2, replace=False))
        own, other = (kinds[k] for k in rng.choice(len(kinds), 2, replace=False))
        here, there = (backgrounds[k] for k in rng.integers(len(backgrounds), size=2))
        image, mask = scenes.render(Plan(own, (first,), here), rng)
        contents.append(image)
        masks.append(mask.any(0))
        styles.append(scenes.render(Plan(other, (second,), there), rng)[0])
        objects.append(first)
        named.append(other)
    as_bytes = (np.stack(x).astype(np.uint8) for x in (contents, styles))
    return Pairs(*as_bytes, np.asarray(objects), tuple(named), np.stack(masks))


TRANSFERS: dict[str, dict[str, Any]] = {
    "content, inverted and drawn again": {"strength": 0.0, "adain": False},
    "StyleID": {},
    "without injection": {"strength": 0.0},
    "without AdaIN": {"adain": False},
    "gamma 0.3": {"gamma": 0.3},
    "gamma 0.5": {"gamma": 0.5},
    "gamma 1": {"gamma": 1.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 2": {"temperature": 2.0},
    "pairing of the port": {"pairing": "diffusers"},
}


def by_pairing() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the transfers that share an inversion, by the pairing that decides it."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, options in TRANSFERS.items():
        found.setdefault(options.get("pairing", "reference"), {})[name] = options
    return found


def transfer(
    pipe: jaxmix.Pipeline, some: Pairs, rows: slice, pairing: str, transfers: Iterable[Mapping[str, Any]], steps: int
) -> np.ndarray:
    """Invert pairs of a slice once and draw them by each of the transfers, uint8 (pairs, transfers, side, side, 3)."""
    label = "own" if pairing == "reference" else "next"
    both = np.concatenate([some.content[rows], some.style[rows]])
    found = pipe.invert(both, steps=steps, label=label, record=style_id_sites(pipe, pairing))
    count = len(some.content[rows])
    numbers = [(i, count + i) for i in range(count)]
    request = jaxmix.Request(prompts=[""] * count, seeds=[0] * count, steps=steps, sampler="ddim")
    methods = [jaxmix.StyleID(found=found, pairs=numbers, **options) for options in transfers]
    return np.stack([pipe.draw(request, (method,)) for method in methods], 1)


def edges(images: np.ndarray) -> np.ndarray:
    """Return the magnitude of the gradient of luminance, (b, h - 2, w - 2)."""
    y = images.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32)
    dy, dx = y[:, 2:, 1:-1] - y[:, :-2, 1:-1], y[:, 1:-1, 2:] - y[:, 1:-1, :-2]
    return np.hypot(dy, dx)


def correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the correlation of paired maps, (b,)."""
    a, b = (x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(1, keepdims=True) for x in (first, second))
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-6)


def psnr(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio of paired uint8 pictures in dB, (b,)."""
    error = np.square(first.astype(np.float64) - second).reshape(len(first), -1).mean(1)
    return 10 * np.log10(255.0**2 / np.maximum(error, 1e-6))


def measure_transfer(images: np.ndarray, some: Pairs, scorer: Scorer, segmenter: Segmenter) -> dict[str, np.ndarray]:
    """Measure uint8 pictures of pairs, one value per picture.

    style: the scorer's probability of the style picture's style; gram: distance of patch covariances from it; edges:
    correlation of edges with the content; iou: of the segmenter's objects with the content's; object: drawn right.
    """
    said = scorer(images)
    wanted = [scorer.styles.index(name) if name in scorer.styles else -1 for name in some.styles]
    there = segmenter(images) > 0.5
    union = (there | some.masks).sum((1, 2))
    return {
        "style": np.asarray([p[k] if k >= 0 else np.nan for p, k in zip(said["style"], wanted, strict=True)]),
        "gram": gram_distance(images, some.style),
        "edges": correlation(edges(images), edges(some.content)),
        "iou": (there & some.masks).sum((1, 2)) / np.maximum(union, 1),
        "object": (said["object"].argmax(-1) == some.objects).astype(np.float64),
    }
