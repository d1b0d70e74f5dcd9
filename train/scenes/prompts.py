"""Prompts with known answers, to score what a model draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .backgrounds import BACKGROUNDS
from .layout import PLACES, told
from .plan import Plan
from .scenes import ARRANGEMENT, Arrangement, Scenes


def eval_prompts(
    split: str,
    n: int,
    seed: int = 0,
    *,
    count: int = 1,
    objects: int = 24,
    styles: tuple[str, ...] | None = None,
    arrangement: Arrangement = ARRANGEMENT,
    place_words: float = 0.0,
) -> list[dict[str, Any]]:
    """Draw n neutral prompts of `count` objects (1 to 3) from a split, each with its answer.

    Styles, objects and backgrounds occur equally often, and so do the places of single objects. A share `place_words`
    names places or relations like the scenes of "anywhere"; under "centred" two objects always have their relation.
    Each row holds `caption`, `objects` (indices into the atlas), `object_names`, `style` (index), `style_name`,
    `background` (index), `background_name`, `relation`, `places`, `count`, and `facts`, what those words say about
    every two objects. Row i does not change when n grows.
    """
    shares: dict[str, Any] = {"two_objects": float(count == 2), "three_objects": float(count == 3), "labelled": 0.0}
    if styles is not None:
        shares["styles"] = styles
    words: dict[str, Any] = {"arrangement": arrangement, "place_words": place_words, "counts": 0.0}
    scenes = Scenes(split=split, objects=objects, seed=seed, **shares, **words)
    order = np.random.Generator(np.random.Philox(key=[seed, 0x9E]))
    pairs, grounds = order.permutation(len(scenes.pairs)), order.permutation(len(BACKGROUNDS))
    rows = []
    for i in range(n):
        # The step grows by one each round, so that every pair eventually meets every background and place.
        turn = i + i // len(pairs)
        background = BACKGROUNDS[grounds[turn % len(BACKGROUNDS)]]
        rng = np.random.Generator(np.random.Philox(key=[seed, i]))
        if count == 1:
            style, obj = scenes.pairs[pairs[i % len(pairs)]]
            said = arrangement == "anywhere" and rng.random() < place_words
            plan = Plan(style, (obj,), background, places=(PLACES[turn % len(PLACES)],) if said else ())
        else:
            plan = replace(scenes.plan(rng), background=background, size_word="")
        rows.append(
            {
                "caption": scenes.caption(plan),
                "objects": tuple(int(o) for o in plan.objects),
                "object_names": tuple(scenes.atlas.objects[o] for o in plan.objects),
                "style": scenes.atlas.styles.index(plan.style),
                "style_name": plan.style,
                "background": BACKGROUNDS.index(background),
                "background_name": background,
                "relation": plan.relation,
                "places": plan.places,
                "count": len(plan.objects),
                "facts": told(plan.relation, plan.places, len(plan.objects)),
            }
        )
    return rows
