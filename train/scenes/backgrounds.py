"""Backgrounds of the scenes: each has a name for captions and a look that a scorer can recognise."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

# Plain colours, sRGB 0-255. Darker or paler than the sprites, so that a red apple shows on red.
PLAIN: dict[str, tuple[int, int, int]] = {
    "red": (172, 36, 44),
    "yellow": (250, 224, 110),
    "green": (44, 124, 66),
    "blue": (52, 96, 190),
    "purple": (112, 62, 150),
    "white": (246, 246, 246),
}

# Colours of patterns: pairs that differ in lightness.
PAIRS = np.array(
    [
        [(236, 112, 99), (253, 237, 236)],
        [(84, 153, 199), (234, 242, 248)],
        [(82, 190, 128), (233, 247, 239)],
        [(244, 208, 63), (254, 249, 231)],
        [(165, 105, 189), (245, 238, 248)],
        [(93, 109, 126), (234, 236, 238)],
    ],
    np.float32,
) / np.float32(255)

Paint = Callable[[int, np.random.Generator], np.ndarray]


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixel centres (size, 1) downwards and (1, size) to the right, in [0, 1]."""
    line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    return line[:, None], line[None, :]


def _mix(share: np.ndarray, first, second) -> np.ndarray:
    """Mix two colours by a share (h, w) in [0, 1]: 0 gives the first."""
    first, second = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return first + np.clip(share, 0, 1)[..., None] * (second - first)


def _rgb(*colour: int) -> np.ndarray:
    return np.array(colour, np.float32) / np.float32(255)


def _fill(size: int, column: np.ndarray) -> np.ndarray:
    """Repeat a column (size, 1, 3) of colours over the width."""
    return np.repeat(column, size, axis=1)


def plain(colour: str) -> Paint:
    """Return a painter of one colour with a slight change of lightness from scene to scene."""
    base = _rgb(*PLAIN[colour])

    def paint(size: int, rng: np.random.Generator) -> np.ndarray:
        shade = np.float32(1 + 0.05 * (2 * rng.random() - 1))
        return np.broadcast_to(np.minimum(base * shade, 1), (size, size, 3)).copy()

    return paint


def gradient(size: int, rng: np.random.Generator) -> np.ndarray:
    pair = PAIRS[rng.integers(len(PAIRS))]
    y, _ = _grid(size)
    return _fill(size, _mix(y * np.float32(1.2) - np.float32(0.1), pair[1], pair[0]))


def stripes(size: int, rng: np.random.Generator) -> np.ndarray:
    pair = PAIRS[rng.integers(len(PAIRS))]
    y, x = _grid(size)
    wave = np.sin(np.float32(2 * np.pi * 4) * (x + y) + np.float32(2 * np.pi * rng.random()))
    # The soft edge is about one pixel wide, whatever the size.
    return _mix(wave * np.float32(size / 50) + np.float32(0.5), pair[0], pair[1])


def checks(size: int, rng: np.random.Generator) -> np.ndarray:
    pair = PAIRS[rng.integers(len(PAIRS))]
    y, x = _grid(size)
    shift = 2 * np.pi * rng.random(2)
    wave = np.sin(np.float32(2 * np.pi * 3) * x + np.float32(shift[0])) * np.sin(
        np.float32(2 * np.pi * 3) * y + np.float32(shift[1])
    )
    return _mix(wave * np.float32(size / 14) + np.float32(0.5), pair[0], pair[1])


def _ground(size: int, edge: np.ndarray | np.floating, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Put `below` under a skyline `edge` (1, size) in [0, 1]; both are columns or pictures of colours."""
    y, _ = _grid(size)
    share = np.clip((y - edge) * np.float32(size) + np.float32(0.5), 0, 1)[..., None]
    return above + share * (below - above)


def meadow(size: int, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(size)
    edge = np.float32(0.58 + 0.04 * rng.random()) + np.float32(0.05) * np.sin(
        np.float32(5) * x + np.float32(6.3 * rng.random())
    )
    sky = _mix(y * np.float32(1.6), _rgb(110, 190, 250), _rgb(215, 240, 255))
    grass = _mix((y - np.float32(0.55)) * np.float32(2.2), _rgb(150, 210, 90), _rgb(70, 150, 50))
    return _ground(size, edge, sky, grass)


def sea(size: int, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(size)
    sky = _mix(y * np.float32(2.2), _rgb(190, 225, 245), _rgb(240, 248, 250))
    waves = np.sin(
        np.float32(2 * np.pi * 10) * y
        + np.float32(0.9) * np.sin(np.float32(2 * np.pi * 2) * x + np.float32(6.3 * rng.random()))
    )
    water = _mix(np.float32(0.28) + np.float32(0.28) * waves, _rgb(16, 92, 150), _rgb(70, 190, 215))
    return _ground(size, np.float32(0.36 + 0.04 * rng.random()), sky, water)  # fmt: skip


def snow(size: int, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(size)
    edge = np.float32(0.62) + np.float32(0.05) * np.sin(np.float32(4) * x + np.float32(6.3 * rng.random()))
    sky = _mix(y * np.float32(1.5), _rgb(128, 148, 176), _rgb(178, 192, 212))
    picture = _ground(size, edge, sky, _mix(y, _rgb(250, 252, 255), _rgb(232, 240, 250)))
    return _dots(picture, rng, count=26, radius=0.016, colour=_rgb(255, 255, 255))


def desert(size: int, rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(size)
    phase = np.float32(6.3 * rng.random())
    edge = np.float32(0.56) + np.float32(0.07) * np.sin(np.float32(6) * x + phase)
    near = np.float32(0.78) + np.float32(0.07) * np.sin(np.float32(5) * x + phase + np.float32(2))
    sky = _mix(y * np.float32(1.7), _rgb(250, 170, 100), _rgb(255, 226, 170))
    far = _ground(size, edge, sky, _mix(y, _rgb(236, 190, 120), _rgb(214, 158, 88)))
    return _ground(size, near, far, _mix(y, _rgb(214, 150, 80), _rgb(188, 122, 60)))


def night(size: int, rng: np.random.Generator) -> np.ndarray:
    y, _ = _grid(size)
    sky = _fill(size, _mix(y, _rgb(10, 12, 40), _rgb(40, 42, 96)))
    return _dots(sky, rng, count=22, radius=0.011, colour=_rgb(255, 250, 215))


def _dots(picture: np.ndarray, rng: np.random.Generator, count: int, radius: float, colour: np.ndarray) -> np.ndarray:
    """Paint round dots at random places: snow flakes and stars; the radius is a share of the width."""
    size = picture.shape[0]
    places = (rng.random((count, 2)) * size).astype(np.float32)
    reach = radius * size
    half = int(np.ceil(reach)) + 1
    offsets = np.arange(-half, half + 1)
    rows = np.floor(places[:, 0]).astype(int)[:, None] + offsets
    columns = np.floor(places[:, 1]).astype(int)[:, None] + offsets
    away = np.hypot(
        (rows + np.float32(0.5) - places[:, :1])[:, :, None], (columns + np.float32(0.5) - places[:, 1:])[:, None, :]
    )
    cover = np.clip(reach + 0.5 - away, 0, 1).astype(np.float32)[..., None]
    at = (np.clip(rows, 0, size - 1)[:, :, None], np.clip(columns, 0, size - 1)[:, None, :])
    old = picture[at]
    # Where dots overlap the last one painted wins; the difference is invisible.
    picture[at] = old + cover * (colour - old)
    return picture


PAINTERS: dict[str, Paint] = {
    **{colour: plain(colour) for colour in PLAIN},
    "gradient": gradient,
    "stripes": stripes,
    "checks": checks,
    "meadow": meadow,
    "sea": sea,
    "snow": snow,
    "desert": desert,
    "night": night,
}

BACKGROUNDS: tuple[str, ...] = tuple(PAINTERS)


def paint_background(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Paint a background (size, size, 3), float32 in [0, 1]."""
    return PAINTERS[name](size, rng)
