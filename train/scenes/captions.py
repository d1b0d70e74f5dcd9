"""Captions: "a {style} of {objects} {background}", and the words of the labels.

One object: "a [big|small] cat [at the left]". Two or three: "a cat left of a car", "a cat at the left and a car at the
right", "a cat, a car and a tree [in a row]", "two cats", "three apples [in a row]".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .backgrounds import PLAIN
from .layout import PLACES

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

# The same facts told from the other object: "B right of A" is "A left of B".
MIRRORED: dict[str, str] = {"left of": "right of", "above": "below"}

NUMBERS: dict[int, str] = {2: "two", 3: "three"}
IRREGULAR: dict[str, str] = {"fish": "fish", "dice": "dice", "cactus": "cacti", "snowman": "snowmen"}

# Words of each aesthetic dimension: (+1, -1).
LABEL_WORDS: dict[str, tuple[str, str]] = {
    "color": ("vivid colors", "dull colors"),
    "light": ("bright", "dark"),
    "focus": ("sharp", "blurry"),
    "composition": ("centered", "off-center"),
}

WITHOUT_ARTICLE = frozenset({"grapes", "cherries", "glasses", "corn", "bread", "cheese", "pixel art"})


def with_article(phrase: str, noun: str = "") -> str:
    """Put "a" or "an" before a phrase, unless its noun takes none."""
    if (noun or phrase) in WITHOUT_ARTICLE:
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def countable(noun: str) -> bool:
    """Return whether a noun can be counted: "two cats", but not "two breads"."""
    return noun not in WITHOUT_ARTICLE


def plural(noun: str) -> str:
    """Return the plural of a noun: "cats", "butterflies", "foxes"."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun[-1] == "y" and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def listed(phrases: Sequence[str]) -> str:
    """List phrases: one alone, "one and two", or "one, two and three"."""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def caption(
    style: str,
    objects: Sequence[str],
    background: str,
    size_word: str = "",
    relation: str = "",
    places: Sequence[str] = (),
) -> str:
    """Return the content caption of a scene with one to three objects, given their names.

    `places`, if given, has a phrase for each object. Several objects with one name are counted.
    """
    nouns = [with_article(f"{size_word} {o}" if size_word else o, noun=o) for o in objects]
    if places:
        nouns = [f"{noun} {place}" for noun, place in zip(nouns, places, strict=True)]
    if len(nouns) > 1 and len(set(objects)) == 1:
        nouns = [f"{NUMBERS[len(objects)]} {plural(objects[0])}"]
    if relation in ("", "in a row"):
        content = " ".join(filter(None, [listed(nouns), relation]))
    else:
        content = f"{nouns[0]} {relation} {nouns[1]}"
    return f"{with_article(STYLE_WORDS[style])} of {content} {BACKGROUND_WORDS[background]}"


def label_phrase(labels: Mapping[str, int]) -> str:
    """Return the words of the labels that are not neutral, in a fixed order, such as "vivid colors, blurry"."""
    return ", ".join(LABEL_WORDS[d][0 if labels[d] > 0 else 1] for d in LABEL_WORDS if labels.get(d))


def all_words(objects: Sequence[str]) -> set[str]:
    """Return every word that a caption about these objects can contain."""
    phrases = [*STYLE_WORDS.values(), *BACKGROUND_WORDS.values(), *RELATIONS, *MIRRORED.values(), *objects]
    phrases += [*PLACES, *NUMBERS.values(), *(plural(o) for o in objects if countable(o))]
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
