"""Captioned scenes with masks and aesthetic labels, each a pure function of (seed, index)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from jaxmix.types import InputError

from . import layout
from .atlas import Atlas, Sprite
from .backgrounds import BACKGROUNDS, paint_background
from .captions import RELATIONS, caption, countable, label_phrase
from .photometric import DIMENSIONS, apply_labels
from .plan import Plan, worded
from .splits import HELD_OUT_STYLE, SPLITS, WHOLE_OBJECTS, pair_held_out, relation_held_out

MAX_OBJECTS = 3
STYLES = ("3d", "flat", "ink", "cartoon")
SIZE = 64  # pixels, of the pictures of the embedded model and of its judges
Arrangement = Literal["centred", "anywhere"]
ARRANGEMENT: Arrangement = "centred"  # of the scenes that the embedded model was trained on

# Longer side of a single object, as a share of the width: (from, to) by size word.
SIZES = {"small": (0.43, 0.50), "": (0.54, 0.66), "big": (0.70, 0.78)}
PAIR_SIZE = (0.42, 0.47)
ROW_SIZE = (0.29, 0.32)
OFF_CENTRE_SIZE = (0.43, 0.55)
STEPS = 5  # sizes are drawn from this many steps, so that scaled sprites can be cached


@dataclass
class Scenes:
    """An endless picture book of captioned scenes: `scenes[i]` is a pure function of (seed, i) and the settings.

    Args:
        size: width and height of the pictures, pixels.
        objects: number of objects in use, counted from the start of the atlas; 96 at the most.
        styles: names of the styles in use.
        seed: start of the random numbers; scenes of different seeds are independent.
        split: one of `SPLITS`; "train" leaves out the held-out combinations, the other names show only those.
        two_objects: share of scenes with two objects.
        three_objects: share of scenes with three objects in a row.
        labelled: share of scenes with aesthetic labels; in these each dimension is +1, -1 or neutral.
        positive: chance of +1 in a labelled scene, one for all dimensions or one by name (0 for those not named).
        negative: chance of -1, likewise.
        label_words: share of the labelled scenes whose `text` names the labels.
        arrangement: "centred" has one object near the centre or several in fixed places, which the caption always
            states; "anywhere" has them all over the picture, near and apart, in many sizes, and never overlapping. With
            it a held-out relation is left out of training in any words or none: "B right of A" is "A left of B".
        place_words: under "anywhere", share of the captions that name the places of the objects or their relation.
        counts: under "anywhere", share of the scenes with two or three objects that repeat one, as in "two cats".
        length: number that `len` reports; any index works.
        reserved: with split "all": also show the objects at the end of the atlas that no model is trained on.
    """

    size: int = SIZE
    objects: int = 24
    styles: Sequence[str] = STYLES
    seed: int = 0
    split: str = "train"
    two_objects: float = 0.25
    three_objects: float = 0.05
    labelled: float = 0.4
    positive: float | Mapping[str, float] = 0.35
    negative: float | Mapping[str, float] = 0.35
    label_words: float = 0.2
    arrangement: Arrangement = ARRANGEMENT
    place_words: float = 0.6
    counts: float = 0.15
    length: int = 10_000_000
    reserved: bool = False

    def __post_init__(self):
        self.atlas = Atlas()
        limit = len(self.atlas.objects) - WHOLE_OBJECTS
        if self.split not in SPLITS:
            raise InputError(f"split: found {self.split!r}, expected one of {', '.join(SPLITS)}")
        if not 4 <= self.objects <= limit:
            raise InputError(f"objects: found {self.objects}, expected 4 to {limit}")
        if self.reserved and self.split != "all":
            raise InputError(f"reserved: found it with split {self.split!r}, expected 'all'")
        if self.size < 16:
            raise InputError(f"size: found {self.size}, expected 16 pixels or more")
        if self.arrangement not in ("centred", "anywhere"):
            raise InputError(f"arrangement: found {self.arrangement!r}, expected 'centred' or 'anywhere'")
        for name in ("place_words", "counts"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected a share from 0 to 1")
        for name, share in (("positive", self.positive), ("negative", self.negative)):
            if isinstance(share, Mapping) and not set(share) <= set(DIMENSIONS):
                raise InputError(f"{name}: found {sorted(share)}, expected some of {', '.join(DIMENSIONS)}")
        if any(min(up, down) < 0 or up + down > 1 for up, down in self._shares):
            raise InputError(
                f"positive, negative: found {self.positive} and {self.negative}, expected shares that sum to 1 at most"
            )
        unknown = [style for style in self.styles if style not in self.atlas.styles]
        if unknown or not self.styles:
            raise InputError(f"styles: found {unknown}, expected some of {', '.join(self.atlas.styles)}")
        if self.split == "held_out_style":
            self.styles = (HELD_OUT_STYLE,)
        elif HELD_OUT_STYLE in self.styles and self.split == "train":
            raise InputError(f"styles: found {HELD_OUT_STYLE!r}, which training leaves out, in split 'train'")
        self.styles = tuple(self.styles)
        if not self.pairs:
            raise InputError(f"styles: found {self.styles}, which hold no pair of split {self.split!r}")
        if self.split == "held_out_relations" and not all(self._has_relation(m) for m in self._by_style.values()):
            raise InputError(f"objects: found {self.objects}, too few for split {self.split!r}")

    def __len__(self) -> int:
        return self.length

    @cached_property
    def object_names(self) -> tuple[str, ...]:
        """Names of the objects that this split can show, in the order of the atlas."""
        return tuple(self.atlas.objects[i] for i in self.object_numbers)

    @cached_property
    def object_numbers(self) -> tuple[int, ...]:
        """Their places in the atlas."""
        total = len(self.atlas.objects)
        last = tuple(range(total - WHOLE_OBJECTS, total))
        return last if self.split == "held_out_objects" else (*range(self.objects), *(last if self.reserved else ()))

    @cached_property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        """Every (style, object) that a scene of this split can show."""
        pool = self.object_numbers
        keep = {"train": (False,), "held_out_relations": (False,), "held_out_pairs": (True,)}.get(
            self.split, (False, True)
        )
        return tuple((s, o) for s in self.styles for o in pool if self._held_out(s, o) in keep)

    @cached_property
    def _shares(self) -> tuple[tuple[float, float], ...]:
        """Chances of (+1, -1) of each dimension in a labelled scene."""

        def of(share: float | Mapping[str, float], name: str) -> float:
            return share.get(name, 0.0) if isinstance(share, Mapping) else share

        return tuple((of(self.positive, d), of(self.negative, d)) for d in DIMENSIONS)

    @cached_property
    def _by_style(self) -> dict[str, tuple[int, ...]]:
        return {style: tuple(o for s, o in self.pairs if s == style) for style in self.styles}

    def _held_out(self, style: str, obj: int) -> bool:
        return style in self.atlas.drawn and pair_held_out(obj, self.atlas.drawn.index(style))

    @staticmethod
    def _has_relation(mates: Sequence[int]) -> bool:
        """Return whether any two of these objects have a held-out relation, without which drawing would never end."""
        choices = ((a, b, r) for a in mates for b in mates if a != b for r in range(len(RELATIONS)))
        return any(relation_held_out(*choice) for choice in choices)

    def plan(self, rng: np.random.Generator) -> Plan:
        """Draw what a scene shows."""
        kind = rng.random()
        count = 2 if kind < self.two_objects else 3 if kind < self.two_objects + self.three_objects else 1
        if self.split == "held_out_relations":
            count = 2
        style, obj = self.pairs[rng.integers(len(self.pairs))]
        mates = self._by_style[style]
        count = min(count, len(mates))
        if self.arrangement == "anywhere":
            return self._plan_anywhere(style, obj, count, rng)
        objects, relation, size_word = (obj,), "", ""
        if count == 1:
            size_word = ("", "", "small", "big")[rng.integers(4)]
        if count == 2:
            objects, relation = self._related(style, rng)
        if count == 3:
            objects = tuple(mates[i] for i in rng.choice(len(mates), 3, replace=False))
            relation = "in a row"
        labels = self._labels(count, rng)
        if labels["composition"] < 0:
            size_word = ""
        background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        return Plan(style, objects, background, relation, size_word, labels)

    def _labels(self, count: int, rng: np.random.Generator) -> dict[str, int]:
        labels = dict.fromkeys(DIMENSIONS, 0)
        if rng.random() < self.labelled:
            labels = {
                d: int(np.searchsorted((down, 1 - up), x)) - 1
                for d, x, (up, down) in zip(DIMENSIONS, rng.random(4), self._shares, strict=True)
            }
            if count > 1:
                labels["composition"] = 0
        return labels

    def _plan_anywhere(self, style: str, obj: int, count: int, rng: np.random.Generator) -> Plan:
        """Draw words and places of objects until this split may show their relations."""
        labels, background = self._labels(count, rng), BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        related = self.split == "held_out_relations"
        said, repeated = rng.random() < self.place_words or related, rng.random() < self.counts and not related
        while True:
            plan = Plan(style, self._draw_objects(style, obj, count, repeated, rng), background, labels=labels)
            plan = self._arranged(worded(plan, said, rng, related=related), rng)
            if self._allowed(plan):
                return plan

    def _draw_objects(
        self, style: str, obj: int, count: int, repeated: bool, rng: np.random.Generator
    ) -> tuple[int, ...]:
        mates = self._by_style[style]
        if count == 1 or (repeated and countable(self.atlas.objects[obj])):
            return (obj,) * count
        return tuple(mates[i] for i in rng.choice(len(mates), count, replace=False))

    def _arranged(self, plan: Plan, rng: np.random.Generator) -> Plan:
        """Add sizes and boxes that follow the words of a plan."""
        count, composition = len(plan.objects), plan.labels["composition"]
        bounds = {2: layout.TWO, 3: layout.THREE}.get(count, layout.ONE[plan.size_word])
        if count == 3 and (plan.relation or plan.places):
            bounds = layout.ROW_OF_THREE
        if composition < 0:
            bounds = layout.TOWARD_A_SIDE
        elif count == 1 and plan.places and plan.size_word == "":
            bounds = layout.ASIDE if plan.places[0] != "in the middle" else bounds
        for _ in range(layout.TRIES):
            sizes = tuple(round(self.size * n / layout.UNIT) for n in layout.draw_sizes(count, bounds, rng))
            corners = [self.atlas.sprite(plan.style, o, n).box for o, n in zip(plan.objects, sizes, strict=True)]
            extents = [(bottom - top, right - left) for top, left, bottom, right in corners]
            if count == 1 and composition:
                boxes: list[layout.Box] | None = layout.composed(composition, extents[0], self.size, rng)
            else:
                boxes = layout.arrange(extents, self.size, plan.relation, plan.places, rng)
            if boxes is not None:
                return replace(plan, sizes=sizes, boxes=tuple(boxes))
        raise InputError(f"places: found {plan.places}, where these objects do not fit, expected another order")

    def _allowed(self, plan: Plan) -> bool:
        """Return whether this split may show the relations of a plan's objects."""
        if self.split not in ("train", "held_out_relations"):
            return True
        pairs = [(plan.objects[a], plan.objects[b], RELATIONS.index(r)) for a, b, r in layout.facts(plan.boxes)]
        held_out = any(relation_held_out(*pair) for pair in pairs if pair[0] != pair[1])
        return held_out == (self.split == "held_out_relations")

    def _related(self, style: str, rng: np.random.Generator) -> tuple[tuple[int, int], str]:
        """Draw two different objects and a relation that this split allows."""
        mates = self._by_style[style]
        while True:
            first, second = (mates[i] for i in rng.choice(len(mates), 2, replace=False))
            relation = int(rng.integers(len(RELATIONS)))
            held_out = relation_held_out(first, second, relation)
            if self.split == "all" or held_out == (self.split == "held_out_relations"):
                return (first, second), RELATIONS[relation]

    def caption(self, plan: Plan) -> str:
        """Return the content caption of a plan."""
        names = [self.atlas.objects[o] for o in plan.objects]
        return caption(plan.style, names, plan.background, plan.size_word, plan.relation, plan.places)

    def render(self, plan: Plan, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Paint a plan: uint8 (size, size, 3) and bool masks (3, size, size), empty where there is no object."""
        canvas = paint_background(plan.background, self.size, rng)
        masks = np.zeros((MAX_OBJECTS, self.size, self.size), bool)
        if self.arrangement == "anywhere":
            plan = plan if plan.boxes else self._arranged(plan, rng)
            for k, (obj, n, box) in enumerate(zip(plan.objects, plan.sizes, plan.boxes, strict=True)):
                sprite = self.atlas.sprite(plan.style, obj, n)
                self._paste(canvas, masks[k], sprite, box[0] - sprite.box[0], box[1] - sprite.box[1])
            return apply_labels(canvas, plan.labels), masks
        placed = [
            self.atlas.sprite(plan.style, o, n) for o, n in zip(plan.objects, self._sizes(plan, rng), strict=True)
        ]
        boxes = np.array([s.box for s in placed])
        extent = boxes[:, 2:] - boxes[:, :2]
        for k, (centre, sprite) in enumerate(zip(self._centres(plan, extent, rng), placed, strict=True)):
            corner = np.round(np.asarray(centre) - extent[k] / 2).astype(int)
            corner = np.clip(corner, 0, self.size - extent[k]) - boxes[k, :2]
            self._paste(canvas, masks[k], sprite, int(corner[0]), int(corner[1]))
            # What is in front hides what is behind.
            masks[:k] &= ~masks[k]
        return apply_labels(canvas, plan.labels), masks

    def _sizes(self, plan: Plan, rng: np.random.Generator) -> list[int]:
        bounds = SIZES[plan.size_word]
        if plan.labels["composition"] < 0:
            bounds = OFF_CENTRE_SIZE
        if len(plan.objects) > 1:
            bounds = PAIR_SIZE if len(plan.objects) == 2 else ROW_SIZE
        low, high = bounds
        steps = rng.integers(STEPS, size=len(plan.objects)) / (STEPS - 1)
        return [round(self.size * (low + (high - low) * float(s))) for s in steps]

    def _centres(self, plan: Plan, extent: np.ndarray, rng: np.random.Generator) -> list[tuple[float, float]]:
        """Return the centres (down, right) of the objects, pixels; `extent` (n, 2) holds their heights and widths."""
        size, middle = self.size, self.size / 2
        jitter = (2 * rng.random((MAX_OBJECTS, 2)) - 1) * 0.05 * size
        if len(plan.objects) == 1:
            room = np.maximum((size - extent[0]) / 2 - 1, 0)
            composition = plan.labels["composition"]
            if composition > 0:
                shift = np.zeros(2)
            elif composition < 0:
                # Toward one of the eight sides and corners, nearly all the way; the axis with more room is always used.
                signs = np.array([(-1, 1)[b] for b in rng.integers(2, size=2)]) * room
                signs[int(room[0] > room[1])] *= float(rng.integers(2))
                shift = signs * (0.8 + 0.2 * rng.random())
            else:
                shift = np.clip(jitter[0], -room, room)
            return [(middle + shift[0], middle + shift[1])]
        if plan.relation == "above":
            gap = 0.245 * size
            slots = [(middle - gap, middle), (middle + gap, middle)]
        elif plan.relation == "in a row":
            slots = [(middle, size * (0.5 + 0.32 * k)) for k in (-1, 0, 1)]
        else:
            gap = 0.245 * size
            slots = [(middle, middle - gap), (middle, middle + gap)]
        spread = 0.15 if plan.relation == "in a row" else 0.6
        shared = jitter[-1] if len(slots) == 2 else np.zeros(2)
        return [
            (down + 0.3 * shared[0] + spread * j[0], right + 0.3 * shared[1] + 0.3 * spread * j[1])
            for (down, right), j in zip(slots, jitter, strict=False)
        ]

    def _paste(self, canvas: np.ndarray, mask: np.ndarray, sprite: Sprite, top: int, left: int) -> None:
        side = sprite.mask.shape[0]
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + side, self.size), min(left + side, self.size)
        inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        canvas[y0:y1, x0:x1] *= 1 - sprite.alpha[inside]
        canvas[y0:y1, x0:x1] += sprite.rgb[inside]
        mask[y0:y1, x0:x1] = sprite.mask[inside]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the scene of an index.

        Returns `image` uint8 (size, size, 3); `caption`, its content; `text`, the caption with any label words;
        `labels` {dimension: +1, 0, -1}; `masks` bool (3, size, size); `objects` int32 (3,), indices into the atlas, -1
        for none; `object_names`; `style`, `background`, indices, and their names; `relation` and `size_word`, possibly
        "", and `places`, possibly (), as in the caption; `count`, of objects.
        """
        return self.scene(index)

    def scene(self, index: int, background: str = "") -> dict[str, Any]:
        """Return the scene of an index, before another background if one is named."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, int(index)]))
        plan = self.plan(rng)
        plan = replace(plan, background=background or plan.background)
        said = rng.random() < self.label_words
        image, masks = self.render(plan, rng)
        content = self.caption(plan)
        words = label_phrase(plan.labels) if said else ""
        objects = np.full(MAX_OBJECTS, -1, np.int32)
        objects[: len(plan.objects)] = plan.objects
        return {
            "image": image,
            "caption": content,
            "text": f"{content}, {words}" if words else content,
            "labels": plan.labels,
            "masks": masks,
            "objects": objects,
            "object_names": tuple(self.atlas.objects[o] for o in plan.objects),
            "style": self.atlas.styles.index(plan.style),
            "style_name": plan.style,
            "background": BACKGROUNDS.index(plan.background),
            "background_name": plan.background,
            "relation": plan.relation,
            "size_word": plan.size_word,
            "places": plan.places,
            "count": len(plan.objects),
            "split": self.split,
        }
