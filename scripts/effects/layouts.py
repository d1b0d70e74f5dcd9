"""DenseDiffusion measured: objects drawn to layouts, beside plain prompting and other methods for the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

import jaxmix
from jaxmix import ComposableDiffusion, DenseDiffusion, PaintWithWords, StructuredDiffusion
from jaxmix.control import Site
from jaxmix.controls.dense_diffusion import DenseDiffusionControl
from jaxmix.rows import dataclass
from jaxmix.types import Array
from train.scenes import SIZE, Scenes
from train.scenes.captions import BACKGROUND_WORDS, STYLE_WORDS, with_article
from train.scorer import Scorer
from train.segmenter import Segmenter

MARGIN = 2  # pixels around an object that its place holds


@dataclasses.dataclass(frozen=True)
class Case:
    """A caption, its objects as (phrase, class, box in pixels), and the real scene that the layout is taken from.

    ``alone`` has a caption of each object by itself, in the same style and place.
    """

    caption: str
    objects: tuple[tuple[str, int, tuple[int, int, int, int]], ...]
    scene: np.ndarray
    masks: np.ndarray
    alone: tuple[str, ...]

    @property
    def segments(self) -> list[jaxmix.Segment]:
        """The layout: a box an object."""
        return [jaxmix.Segment(phrase, box_mask(box)) for phrase, _, box in self.objects]


def box_mask(box: tuple[int, int, int, int]) -> np.ndarray:
    """Return the mask (side, side) of a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    mask = np.zeros((SIZE, SIZE), bool)
    mask[top:bottom, left:right] = True
    return mask


def cases(n: int, seed: int, count: int, worded: bool = False) -> list[Case]:
    """Paint n scenes of `count` objects and box them; the captions name the objects and, if ``worded``, their places.

    Worded captions are those of training ("left of", "above", "in a row"), two objects in relations that training
    leaves out. Without them the captions name the objects in any order, every second in the other order than they
    stand: training always says how objects stand, so only the layout knows.
    """
    split = "held_out_relations" if worded and count == 2 else "all"
    scenes = Scenes(
        split=split,
        seed=seed,
        two_objects=float(count == 2),
        three_objects=float(count == 3),
        labelled=0.0,
        place_words=float(worded),
        counts=0.0,
    )
    found = []
    for index in range(n):
        rng = np.random.Generator(np.random.Philox(key=[seed, ((count + 16 * worded) << 32) + index]))
        plan = scenes.plan(rng)
        image, masks = scenes.render(plan, rng)
        names = [scenes.atlas.objects[number] for number in plan.objects]
        objects = []
        for mask, number, name in zip(masks[:count], plan.objects, names, strict=True):
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            box = [columns[0] - MARGIN, rows[0] - MARGIN, columns[-1] + 1 + MARGIN, rows[-1] + 1 + MARGIN]
            left, top, right, bottom = (int(np.clip(x, 0, SIZE)) for x in box)
            objects.append((with_article(name), int(number), (left, top, right, bottom)))
        nouns = [phrase for phrase, _, _ in objects]
        if index % 2:
            nouns = nouns[::-1]
        listed = f"{', '.join(nouns[:-1])} and {nouns[-1]}"
        style, place = with_article(STYLE_WORDS[plan.style]), BACKGROUND_WORDS[plan.background]
        text = scenes.caption(plan) if worded else f"{style} of {listed} {place}"
        alone = tuple(f"{style} of {noun} {place}" for noun in nouns)
        found.append(Case(text, tuple(objects), image.astype(np.uint8), masks[:count], alone))
    return found


@dataclass
class FixedRange(DenseDiffusionControl):
    """Ablation: scores move by a fixed amount and not by a part of the way to their row's extremes."""

    def logits(self, site: Site, x: Array) -> Array:
        """Add or take away the strength itself."""
        grid = "x".join(map(str, site.hw))
        pixels, cross = self.pixels[grid], site.name.endswith(".attn2")
        keys = self.tokens if cross else pixels
        together = (pixels[:, None, :, None] & keys[:, None, None, :]) != 0
        weight = (self.cross if cross else self.self_)[:, None] * self.time
        alpha = weight * (1 - self.kappa[:, None] * self.area[grid])
        return x + alpha[:, None, :, None] * jnp.where(together, 1.0, -1.0)


class FixedRangeLayout(DenseDiffusion):
    """DenseDiffusion with that control."""

    def control(self, pipe: Any, placed: Any) -> FixedRange:
        """Return the control of placed layouts."""
        made = super().control(pipe, placed)
        return FixedRange(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})


Draw = Callable[[Sequence[Case]], dict[str, Any]]


def conditions(pipe: jaxmix.Pipeline) -> dict[str, Draw]:
    """Return what each condition hands to `Pipeline.generate` for cases; "prompts" where they are not the captions."""

    def dense(kind: type[DenseDiffusion] = DenseDiffusion, **options: Any) -> Draw:
        return lambda some: {"methods": (kind([c.segments for c in some], **options),)}

    def painted(some: Sequence[Case]) -> dict[str, Any]:
        return {"methods": (PaintWithWords([c.segments for c in some]),)}

    def structured(some: Sequence[Case]) -> dict[str, Any]:
        phrases = [[phrase for phrase, _, _ in c.objects] for c in some]
        return {"methods": (StructuredDiffusion(phrases),)}

    def composed(some: Sequence[Case]) -> dict[str, Any]:
        firsts, further = [c.alone[0] for c in some], [c.alone[1:] for c in some]
        return {"prompts": firsts, "methods": (ComposableDiffusion(further),)}

    return {
        "plain prompt": lambda some: {},
        "Composable Diffusion": composed,
        "paint-with-words": painted,
        "Structured Diffusion": structured,
        "DenseDiffusion": dense(),
        "without cross-attention": dense(cross=0.0),
        "without self-attention": dense(self_=0.0),
        "without the value range": dense(FixedRangeLayout),
        "without the area": dense(area=0.0),
        "without splicing": dense(splice=False),
        "in all steps": dense(window=(0.0, 1.0)),
        STRONG: dense(cross=4.0, self_=1.0, window=(0.0, 1.0)),
    }


STRONG = "cross 4, self 1, all steps"
# The rest are the paper's ablations.
MAIN = ("plain prompt", "Composable Diffusion", "paint-with-words", "Structured Diffusion", "DenseDiffusion", STRONG)


def measure(images: np.ndarray, some: Sequence[Case], scorer: Scorer, segmenter: Segmenter) -> dict[str, np.ndarray]:
    """Measure uint8 pictures of cases, one value a picture.

    inside: share of its objects that the scorer names first, of all classes, in the crop of the object's own box; iou:
    of what the segmenter takes for objects and what lies in any box of the scene's real objects.
    """
    crops, owners, classes = [], [], []
    for i, (image, case) in enumerate(zip(images, some, strict=True)):
        for _, number, box in case.objects:
            crops.append(np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)))
            owners.append(i)
            classes.append(number)
    said = scorer(np.stack(crops))["object"].argmax(-1) == np.asarray(classes)
    count = np.bincount(owners, minlength=len(some))
    inside = np.bincount(owners, weights=said, minlength=len(some)) / count
    there = segmenter(images) > 0.5
    wanted = np.stack([case.masks.any(0) for case in some])
    union = (there | wanted).sum((1, 2))
    return {"inside": inside, "iou": (there & wanted).sum((1, 2)) / np.maximum(union, 1)}


def real(some: Sequence[Case]) -> np.ndarray:
    """Return the real scenes of cases."""
    return np.stack([case.scene for case in some])


Table = Mapping[str, Mapping[str, np.ndarray]]
