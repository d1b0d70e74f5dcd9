"""Text in pictures, in any script: Pillow's own font, and GNU Unifont for the letters that it lacks."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont

FONTS = Path(__file__).with_name("fonts")
_UNIFONT = 16  # pixels: a bitmap, sharp at this size alone


class Font:
    """A font of some size in pixels that has every letter."""

    def __init__(self, size: int) -> None:
        self.own = ImageFont.load_default(size)
        self._missing = self._look("\U0010ffff")

    def getlength(self, text: str) -> float:
        """Return the width of a line in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, fill: Any) -> None:
        """Draw a line of text with its upper left corner at ``at``."""
        left, top = at
        for font, run in self._runs(text):
            down = 0 if font is self.own else (self.own.size - _UNIFONT) / 2 + 1  # type: ignore[union-attr]
            draw.text((left, top + down), run, fill=fill, font=font)
            left += font.getlength(run)

    def _runs(self, text: str) -> Iterator[tuple[Any, str]]:
        found: list[tuple[Any, str]] = []
        for letter in text:
            if _is_hidden(letter):
                continue
            font = found[-1][0] if letter == " " and found else self._font_of(letter)  # words keep their direction
            if found and font is found[-1][0]:
                found[-1] = font, found[-1][1] + letter
            else:
                found.append((font, letter))
        yield from found

    @functools.cache  # noqa: B019 (a font lives as long as the process)
    def _font_of(self, letter: str) -> Any:
        if letter.isascii() or self._look(letter) != self._missing:
            return self.own
        return _unifont("unifont.otf" if ord(letter) < 0x10000 else "unifont_upper.otf")

    def _look(self, letter: str) -> bytes:
        """Return how a letter looks; those that the font lacks look alike."""
        return bytes(self.own.getmask(letter))


@functools.cache
def font(size: int) -> Font:
    """Return the font of a size in pixels."""
    return Font(size)


def wrapped(text: str, font: Font, width: int, lines: int) -> list[str]:
    """Break `text` at spaces (and within words too long for a line) into at most `lines` lines of `width` pixels."""
    result = [""]
    for word in text.split():
        if font.getlength(f"{result[-1]} {word}".strip()) <= width:
            result[-1] = f"{result[-1]} {word}".strip()
            continue
        if result[-1]:
            result.append("")
        for letter in word:
            if font.getlength(result[-1] + letter) > width:
                result.append("")
            result[-1] += letter
    if len(result) > lines:
        result = result[:lines]
        while result[-1] and font.getlength(result[-1] + "...") > width:
            result[-1] = result[-1][:-1]
        result[-1] += "..."
    return result


@functools.cache
def _unifont(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / name), _UNIFONT)


def _is_hidden(letter: str) -> bool:
    """Return whether a letter is only a sign to the renderer: controls, joiners, selectors of emoji's looks."""
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs") or 0xFE00 <= ord(letter) <= 0xFE0F
