"""Scenes composed of openly licensed sprites, with captions, masks, aesthetic labels and held-out splits."""

from .atlas import Atlas
from .backgrounds import BACKGROUNDS
from .captions import BACKGROUND_WORDS, LABEL_WORDS, RELATIONS, STYLE_WORDS, label_phrase
from .layout import PLACES, place_of, relation_of, told
from .photometric import DIMENSIONS, apply_labels, measure, off_centre
from .plan import Plan
from .prompts import eval_prompts
from .scenes import ARRANGEMENT, MAX_OBJECTS, SIZE, STYLES, Scenes
from .splits import HELD_OUT_STYLE, SPLITS

__all__ = [
    "ARRANGEMENT",
    "BACKGROUNDS",
    "BACKGROUND_WORDS",
    "DIMENSIONS",
    "HELD_OUT_STYLE",
    "LABEL_WORDS",
    "MAX_OBJECTS",
    "PLACES",
    "RELATIONS",
    "SIZE",
    "SPLITS",
    "STYLES",
    "STYLE_WORDS",
    "Atlas",
    "Plan",
    "Scenes",
    "apply_labels",
    "eval_prompts",
    "label_phrase",
    "measure",
    "off_centre",
    "place_of",
    "relation_of",
    "told",
]
