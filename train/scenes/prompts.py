"""Prompts with known answers, to score what a model draws."""

from __future__ import annotations

from typing import Any

import numpy as np

from .backgrounds import BACKGROUNDS
from .scenes import Plan, Scenes


def eval_prompts(
    split: str, n: int, seed: int = 0, *, count: int = 1, objects: int = 24, styles: tuple[str, ...] | None = None
) -> list[dict[str, Any]]:
    """Draws n neutral prompts of `count` objects (1 or 2) from a split, each with its answer.

    Styles, objects and backgrounds come round evenly. Each row holds `caption`, `objects` (indices into the atlas),
    `object_names`, `style` (index), `style_name`, `background` (index), `background_name`, `relation`. The rows of
    prompt i do not change when n grows.
    """
    shares: dict[str, Any] = {"two_objects": float(count == 2), "three_objects": 0.0, "labelled": 0.0}
    if styles is not None:
        shares["styles"] = styles
    scenes = Scenes(split=split, objects=objects, seed=seed, **shares)
    order = np.random.Generator(np.random.Philox(key=[seed, 0x9E]))
    pairs, places = order.permutation(len(scenes.pairs)), order.permutation(len(BACKGROUNDS))
    rows = []
    for i in range(n):
        if count == 1:
            style, obj = scenes.pairs[pairs[i % len(pairs)]]
            names, relation = (obj,), ""
        else:
            plan = scenes.plan(np.random.Generator(np.random.Philox(key=[seed, i])))
            style, names, relation = plan.style, plan.objects, plan.relation
        # The step grows by one each round, so that a pair meets every background in the end.
        background = BACKGROUNDS[places[(i + i // len(pairs)) % len(BACKGROUNDS)]]
        rows.append(
            {
                "caption": scenes.caption(Plan(style, tuple(names), background, relation)),
                "objects": tuple(int(o) for o in names),
                "object_names": tuple(scenes.atlas.objects[o] for o in names),
                "style": scenes.atlas.styles.index(style),
                "style_name": style,
                "background": BACKGROUNDS.index(background),
                "background_name": background,
                "relation": relation,
            }
        )
    return rows
