"""Captions in any script: every letter is drawn, and no two alike."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from infer.captions import font, wrapped

SCRIPTS = {
    "Latin": "ąéñøß",
    "Greek": "αβδω",
    "Cyrillic": "жщюя",
    "Chinese": "猫在海边",
    "Japanese": "ねこネコ",
    "Korean": "고양이",
    "Arabic": "قطة",
    "Hebrew": "חתול",
    "Devanagari": "बिल्ली",
    "Thai": "แมว",
    "emoji": "🐱🌊🎨",
}


def drawn(text):
    image = Image.new("L", (400, 40))
    font(13).draw(ImageDraw.Draw(image), (4, 4), text, 255)
    return np.asarray(image)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_letters_of_a_script_are_drawn_and_differ(script):
    letters = [letter for letter in SCRIPTS[script] if letter.isprintable() and font(13).getlength(letter) > 2]
    looks = {drawn(letter).tobytes() for letter in letters}
    missing = drawn("\U0010fffe")
    assert len(looks) == len(set(letters)) and missing.tobytes() not in looks
    assert drawn(SCRIPTS[script])[:, 390:].max() == 0 < drawn(SCRIPTS[script]).max()


def test_signs_to_the_renderer_take_no_place():
    assert font(13).getlength("a\u200d\ufe0f\u202eb\x07") == font(13).getlength("ab")


def test_lines_are_broken_within_their_width_in_any_script():
    for text in ("a cat by the sea " * 9, "猫在海边" * 40, "🐱" * 50, "x" * 300):
        lines = wrapped(text, font(13), 200, 3)
        assert len(lines) == 3 and lines[-1].endswith("...") and all(font(13).getlength(line) <= 200 for line in lines)
    assert wrapped("a cat", font(13), 200, 3) == ["a cat"]
