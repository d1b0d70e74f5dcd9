"""What trainers of adapters share: a frozen base, and rows of pictures or scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jaxmix
from jaxmix import command
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.vision import as_picture
from jaxmix.types import InputError
from train.data import LatentCache, PictureConfig, Pictures, open_batches
from train.diffusion import DiffusionConfig

CACHED = ("latents_mean", "latents_std", "context", "pooled")
"""What a cached row has instead of a picture and a caption."""


@dataclasses.dataclass
class AdapterConfig(PictureConfig, DiffusionConfig):
    """The keys of every trainer of an adapter, after those of every trainer of a denoiser and those of pictures.

    Attributes:
        pretrained_model_name_or_path: the base: "mini", a diffusers folder, a single .safetensors file, or a hub id.
        train_data_dir: pictures with a metadata.jsonl, WebDataset tars, or a cache by train.cache_latents.
        text_column: the metadata's column with the caption.
        image_column: the metadata's column with the picture's file.
        scenes: arguments of train.scenes.Scenes, instead of train_data_dir.
        validation_guidance_scale: guidance of those pictures; null for the base's own.
        validation_batch_size: pictures drawn together.
    """

    pretrained_model_name_or_path: str = ""
    train_data_dir: str = ""
    text_column: str = "text"
    image_column: str = "file_name"
    scenes: dict[str, Any] = dataclasses.field(default_factory=dict)
    validation_guidance_scale: float | None = None
    validation_batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse values that would fail later."""
        PictureConfig.__post_init__(self)
        DiffusionConfig.__post_init__(self)
        if not self.pretrained_model_name_or_path:
            raise InputError("pretrained_model_name_or_path: not given, expected the base model")
        if bool(self.train_data_dir) == bool(self.scenes):
            found = "both" if self.scenes else "neither"
            raise InputError(f"train_data_dir, scenes: found {found}, expected one of them")
        for field in dataclasses.fields(self):
            if field.name.endswith("dropout_rate") and not 0 <= getattr(self, field.name) <= 1:
                raise InputError(f"{field.name}: found {getattr(self, field.name)}, expected 0 to 1")


def make_captioned(
    tokenize: Callable[[str], dict[str, np.ndarray]],
) -> Callable[[Mapping[str, Any], bool], dict[str, Any]]:
    """Return (source's row, whether its caption is left out) -> the arrays that every loss needs, and "id".

    The row is one of pictures, or of cached latents and text states. "dropped" () float32 is 1 without a caption, which
    makes the row one of the unconditional branch.
    """
    empty = tokenize("")

    def captioned(source: Mapping[str, Any], dropped: bool) -> dict[str, Any]:
        if "context" in source:
            made = {name: source[name] for name in CACHED if name in source}
        else:
            made = {"image": source["image"], **(empty if dropped else tokenize(source["text"]))}
        if "time_ids" in source:
            made["time_ids"] = source["time_ids"]
        return {**made, "dropped": np.float32(dropped), "id": source["id"]}

    return captioned


def check_validation_images(cfg: Any) -> None:
    """Refuse validation pictures that cannot be read, or of another number than the prompts that they go with."""
    wanted = len(cfg.validation_prompts) if cfg.validation_steps and not cfg.scenes else 0
    if len(cfg.validation_images) != wanted and (cfg.validation_images or wanted):
        raise InputError(
            f"validation_images: found {len(cfg.validation_images)}, expected one for each of {wanted} "
            "validation_prompts, and none with scenes or without validation_steps"
        )
    for i, path in enumerate(cfg.validation_images):
        as_picture(path, f"validation_images[{i}]")


def left_out(drawn: float, first: float, caption: float, both: float) -> tuple[bool, bool]:
    """Return whether a row does without what an adapter sees, and without its caption, from one number in [0, 1).

    The shares are those of rows without the first, without the caption, and without either.
    """
    neither = first + caption <= drawn < first + caption + both
    return drawn < first or neither, first <= drawn < first + caption or neither


def check_scenes(pipe: Pipeline) -> None:
    """Refuse a base whose rows need more than scenes have."""
    if pipe.text_encoder_2 is not None:
        raise InputError("scenes: found an SDXL base, which needs sizes that scenes lack, expected train_data_dir")


def open_pictures(
    cfg: AdapterConfig,
    pipe: Pipeline,
    labels: Sequence[str] | None = None,
    whole: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None,
) -> Pictures | LatentCache:
    """Return the rows of train_data_dir, and say what there is; see `train.data.open_batches`."""
    rows = open_batches(cfg.train_data_dir, cfg, pipe, labels, cfg.text_column, cfg.image_column, whole)
    print(rows.describe(), flush=True)
    return rows


def freeze(pipe: Pipeline, rows: Any) -> dict[str, Any]:
    """Return the parts of the base that a step needs; a cache replaces the autoencoder and the text encoders."""
    if isinstance(rows, LatentCache):
        return {"unet": pipe.params["unet"], "empty": dict(rows.empty)}
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {name: pipe.params[name] for name in parts if name in pipe.params}


def open_base(cfg: AdapterConfig) -> Pipeline:
    """Return the base that the config names, in the dtype that the models compute in."""
    command.start(cfg.distributed)
    return jaxmix.load(cfg.pretrained_model_name_or_path, dtype=cfg.dtype)


def on_host(pipe: Pipeline) -> Pipeline:
    """Return the base with its weights on the host if there are several devices.

    They hold it placed on the mesh; a second copy on the first device might not fit.
    """
    if jax.device_count() == 1:
        return pipe
    return dataclasses.replace(pipe, params=jax.device_get(pipe.params))
