"""Configurations of CLIP's text and vision towers, as transformers writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxmix.models.config import Config
from jaxmix.types import InputError, shown


@dataclasses.dataclass(frozen=True)
class CLIPConfig(Config):
    """The keys of both towers.

    ``projection`` follows from ``architectures``: a model WithProjection maps the pooled state to ``projection_dim``
    numbers.
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    projection: bool = False

    projection_class_name: ClassVar[str]
    model_type: ClassVar[str]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], notes: list[str] | None = None) -> Self:
        names = {f.name for f in dataclasses.fields(cls)} | set(cls.fixed) | {"_class_name"}
        found = config.get("architectures") or [cls.class_name]
        if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
            raise InputError(f"config: architectures is {shown(found)}, expected a list such as [{cls.class_name!r}]")
        if not {cls.class_name, cls.projection_class_name} & set(found):
            raise InputError(
                f"config: architectures is {found}, expected [{cls.class_name!r}] or [{cls.projection_class_name!r}]"
            )
        # transformers writes dozens of generation and training settings into each config.json; none of them affects an
        # encoder, so only the keys that do are read.
        read = {k: v for k, v in config.items() if k in names}
        return super().from_dict(read | {"projection": cls.projection_class_name in found}, notes)

    def check(self) -> None:
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise InputError(
                f"{self.class_name} config: hidden_act={self.hidden_act!r} is not supported, expected 'quick_gelu' or "
                "'gelu'"
            )
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"{self.class_name} config: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        architecture = self.projection_class_name if fields.pop("projection") else self.class_name
        return {"architectures": [architecture], "model_type": self.model_type, **fields}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(CLIPConfig):
    """Configuration of `CLIPTextModel`; fields as in transformers."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    bos_token_id: int = 49406
    pad_token_id: int | None = 1

    class_name: ClassVar[str] = "CLIPTextModel"
    projection_class_name: ClassVar[str] = "CLIPTextModelWithProjection"
    model_type: ClassVar[str] = "clip_text_model"
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {"model_type": ("clip_text_model", "clip")}
    from_zero: ClassVar[frozenset[str]] = frozenset({"eos_token_id", "bos_token_id", "pad_token_id"})


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(CLIPConfig):
    """Configuration of `CLIPVisionModel`; fields as in transformers.

    The config of a whole CLIP, with its vision tower under "vision_config", is read as one with projection.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32

    class_name: ClassVar[str] = "CLIPVisionModel"
    projection_class_name: ClassVar[str] = "CLIPVisionModelWithProjection"
    model_type: ClassVar[str] = "clip_vision_model"
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("clip_vision_model", "clip"),
        "num_channels": (3,),
    }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], notes: list[str] | None = None) -> Self:
        inner = config.get("vision_config")
        if isinstance(inner, Mapping):
            width = config.get("projection_dim", inner.get("projection_dim"))
            config = {**inner, "projection_dim": width, "architectures": [cls.projection_class_name]}
        return super().from_dict(config, notes)

    def check(self) -> None:
        super().check()
        if self.image_size % self.patch_size:
            raise InputError(
                f"{self.class_name} config: image_size={self.image_size} is not a multiple of "
                f"patch_size={self.patch_size}"
            )

    @property
    def tokens(self) -> int:
        """Number of states of a picture: one for each patch, after one for the whole."""
        return (self.image_size // self.patch_size) ** 2 + 1
