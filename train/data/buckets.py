"""Aspect-ratio buckets and the resize and crop into one (arXiv 2307.01952, sections 2.2 and 2.3)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxmix.types import InputError

Size = tuple[int, int]
"""Height and width, pixels."""


@dataclasses.dataclass
class PictureConfig:
    """How pictures become rows with one size per batch; the names are those of diffusers' and kohya's trainers.

    Attributes:
        resolution: side of the training squares, in pixels; with buckets the square root of their largest area.
        center_crop: crop from the centre; false crops at random.
        random_flip: mirror half of the pictures horizontally.
        enable_bucket: keep each picture's aspect ratio: batches of several sizes, each compiled once.
        min_bucket_reso: shortest side of a bucket, in pixels.
        max_bucket_reso: longest side of a bucket, in pixels.
        bucket_reso_steps: sides of buckets are multiples of this.
        bucket_no_upscale: a picture smaller than its bucket is cropped to its own size instead of being enlarged.
        max_bad_rows: rows that may prove unusable before the run stops; null for 1 % of the rows, but at least 10.
    """

    resolution: int = 512
    center_crop: bool = False
    random_flip: bool = False
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 2048
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    max_bad_rows: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no bucket can have."""
        for name in ("resolution", "min_bucket_reso", "bucket_reso_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected 1 or more")
        if self.max_bad_rows is not None and self.max_bad_rows < 0:
            raise InputError(f"max_bad_rows: found {self.max_bad_rows}, expected 0 or more")
        if not self.enable_bucket:
            return
        for name in ("min_bucket_reso", "max_bucket_reso"):
            if getattr(self, name) % self.bucket_reso_steps:
                raise InputError(
                    f"{name}: found {getattr(self, name)}, expected a multiple of bucket_reso_steps, "
                    f"{self.bucket_reso_steps}"
                )
        if not self.min_bucket_reso <= self.resolution <= self.max_bucket_reso:
            raise InputError(
                f"resolution: found {self.resolution}, expected min_bucket_reso to max_bucket_reso, "
                f"{self.min_bucket_reso} to {self.max_bucket_reso}"
            )


def bucket_sizes(cfg: PictureConfig) -> list[Size]:
    """Return the sizes of all buckets: for each short side the longest other side within resolution^2 pixels."""
    if not cfg.enable_bucket:
        return [(cfg.resolution, cfg.resolution)]
    step, area = cfg.bucket_reso_steps, cfg.resolution**2
    square = cfg.resolution // step * step
    sizes = {(square, square)} if square >= cfg.min_bucket_reso else set()
    for short in range(cfg.min_bucket_reso, square + 1, step):
        long = min(cfg.max_bucket_reso, area // short // step * step)
        sizes |= {(short, long), (long, short)}
    if not sizes:
        raise InputError(
            f"resolution: found {cfg.resolution}, expected at least min_bucket_reso when rounded down to a multiple of "
            f"bucket_reso_steps, {cfg.min_bucket_reso}"
        )
    return sorted(sizes)


def choose_bucket(size: Size, sizes: list[Size], cfg: PictureConfig) -> Size:
    """Return the bucket for a picture of `size`: the nearest aspect ratio, on a logarithmic scale.

    With bucket_no_upscale a picture that does not fill it gets its own size instead, scaled down to the largest area
    and rounded down to whole steps; one that is smaller than a step is still enlarged to it.
    """
    height, width = size
    aspect = math.log(height / width)
    chosen = min(sizes, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - aspect), -bucket[0] * bucket[1]))
    if not (cfg.enable_bucket and cfg.bucket_no_upscale) or (height >= chosen[0] and width >= chosen[1]):
        return chosen
    step = cfg.bucket_reso_steps
    scale = min(1.0, cfg.resolution / math.sqrt(height * width), cfg.max_bucket_reso / max(size))
    rounded = [max(step, int(side * scale + 1e-6) // step * step) for side in size]
    return rounded[0], rounded[1]


def crop_to_bucket(
    image: np.ndarray, bucket: Size, at: tuple[float, float], flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scale a picture to cover the bucket, mirror it if asked, and crop it to the bucket.

    `at` says where, down and right, from 0 (top and left) through 0.5 (the centre) to 1. Returns the picture uint8
    (H, W, 3) and SDXL's time_ids float32 (6,): original height and width, top and left of the crop in the scaled (and
    mirrored) picture, target height and width.
    """
    from PIL import Image, ImageOps

    height, width = image.shape[:2]
    scale = max(bucket[0] / height, bucket[1] / width)
    scaled = [max(target, round(side * scale)) for side, target in zip((height, width), bucket, strict=True)]
    picture = Image.fromarray(image)
    if scaled != [height, width]:
        picture = picture.resize((scaled[1], scaled[0]), Image.Resampling.LANCZOS)
    if flip:
        picture = ImageOps.mirror(picture)
    room = [side - target for side, target in zip(scaled, bucket, strict=True)]
    top, left = (min(int(share * (extent + 1)), extent) for share, extent in zip(at, room, strict=True))
    cut = np.asarray(picture)[top : top + bucket[0], left : left + bucket[1]]
    return np.ascontiguousarray(cut), np.asarray([height, width, top, left, *bucket], np.float32)
