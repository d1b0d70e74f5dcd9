"""Captions: "a {style} of {a [big|small] object [relation object]} {background}", and the words of the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .backgrounds import PLAIN

STYLE_WORDS: dict[str, str] = {
    "3d": "3d render",
    "flat": "flat illustration",
    "ink": "ink drawing",
    "cartoon": "glossy cartoon",
    "pixel": "pixel art",
    "sketch": "pencil sketch",
    "oil": "oil painting",
}

BACKGROUND_WORDS: dict[str, str] = {
    **{colour: f"on a plain {colour} background" for colour in PLAIN},
    "gradient": "on a gradient background",
    "stripes": "on a striped background",
    "checks": "on a checkered background",
    "meadow": "in a green meadow",
    "sea": "by the sea",
    "snow": "in the snow",
    "desert": "in the desert",
    "night": "at night",
}

RELATIONS: tuple[str, ...] = ("left of", "above")

# Words of each aesthetic dimension: (+1, -1).
LABEL_WORDS: dict[str, tuple[str, str]] = {
    "color": ("vivid colors", "dull colors"),
    "light": ("bright", "dark"),
    "focus": ("sharp", "blurry"),
    "composition": ("centered", "off-center"),
}

WITHOUT_ARTICLE = frozenset({"grapes", "cherries", "glasses", "corn", "bread", "cheese", "pixel art"})


def with_article(phrase: str, noun: str = "") -> str:
    """Puts "a" or "an" before a phrase, unless its noun takes none."""
    if (noun or phrase) in WITHOUT_ARTICLE:
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def caption(style: str, objects: Sequence[str], background: str, size_word: str = "", relation: str = "") -> str:
    """The content caption of a scene with one to three objects, given their names."""
    nouns = [with_article(f"{size_word} {o}" if size_word else o, noun=o) for o in objects]
    if len(nouns) == 1:
        content = nouns[0]
    elif relation == "in a row":
        content = f"{', '.join(nouns[:-1])} and {nouns[-1]} in a row"
    else:
        content = f"{nouns[0]} {relation} {nouns[1]}"
    return f"{with_article(STYLE_WORDS[style])} of {content} {BACKGROUND_WORDS[background]}"


def label_phrase(labels: Mapping[str, int]) -> str:
    """The words of the labels that are not neutral, in a fixed order, such as "vivid colors, blurry"."""
    return ", ".join(LABEL_WORDS[d][0 if labels[d] > 0 else 1] for d in LABEL_WORDS if labels.get(d))


def all_words(objects: Sequence[str]) -> set[str]:
    """Every word that a caption about these objects can hold."""
    phrases = [*STYLE_WORDS.values(), *BACKGROUND_WORDS.values(), *RELATIONS, *objects]
    phrases += [w for pair in LABEL_WORDS.values() for w in pair]
    return {w for p in phrases for w in p.replace("-", " ").split()} | {
        "a",
        "an",
        "of",
        "and",
        "in",
        "row",
        "big",
        "small",
    }
