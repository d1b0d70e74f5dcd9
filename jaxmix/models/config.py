"""Model configurations: diffusers / transformers ``config.json`` dictionaries as frozen dataclasses.

Keys that change what is computed are fields; keys that this library supports in one form only are checked against it,
so that no checkpoint is ever run as something it is not. A null stands for the default. Keys that nobody here has heard
of, such as comments, are named and ignored.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxmix.types import InputError, note, shown

_LARGEST = 2**31 - 1
_MOST_BLOCKS, _MOST_LAYERS = 32, 256  # far above what any model has; more would only take forever to build

# What trainers leave in the config of an averaged model, and what says how to compute, not what.
_COUNTERS = frozenset(
    {
        "collection_step",
        "comment",
        "decay",
        "description",
        "dtype",
        "ema_decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "torch_dtype",
        "update_after_step",
        "use_ema_warmup",
    }
)


def _tuple(x: Any) -> Any:
    return tuple(_tuple(i) for i in x) if isinstance(x, (list, tuple)) else x


@dataclasses.dataclass(frozen=True)
class Config:
    """What every configuration of a model does: reading, checking and writing a ``config.json``."""

    class_name: ClassVar[str]
    #: Keys supported in one form only, with the accepted values.
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]]
    #: Keys that do not change what is computed at inference.
    ignored: ClassVar[frozenset[str]] = frozenset()
    #: Whole numbers that may be 0.
    from_zero: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], notes: list[str] | None = None) -> Self:
        """Read a ``config.json`` dictionary; an unsupported value raises `InputError` that names the key.

        Keys that are not known are ignored and added to ``notes``, or warned about in one `CheckpointWarning` if it is
        None.
        """
        fields = {f.name for f in dataclasses.fields(cls)}
        unknown = []
        for key, value in config.items():
            if key.startswith("_") or key in fields or key in cls.ignored or key in _COUNTERS:
                continue
            if key not in cls.fixed:
                if value not in (None, False):
                    unknown.append(f"{key}={shown(value)}")
                continue
            if not any(_same(value, accepted) for accepted in (*cls.fixed[key], None)):
                accepted = " or ".join(repr(v) for v in cls.fixed[key])
                raise InputError(f"{cls.class_name} config: {key}={shown(value)} is not supported, expected {accepted}")
        named = config.get("_class_name") or config.get("architectures") or cls.class_name
        if named not in (cls.class_name, "Flax" + cls.class_name):
            raise InputError(f"config: _class_name is {shown(named)}, expected {cls.class_name!r}")
        given = {key: _tuple(value) for key, value in config.items() if key in fields and value is not None}
        hints = typing.get_type_hints(cls)
        for key, value in given.items():
            cls._check_kind(key, value, hints[key])
        out = cls(**given)
        out.check()
        if unknown:
            note(f"unknown keys are ignored: {', '.join(sorted(unknown))}", notes, f"{cls.class_name} config")
        return out

    @classmethod
    def _check_kind(cls, key: str, value: Any, hint: Any) -> None:
        """Raise `InputError` unless a value is of the kind that its field declares, and of a size that makes sense."""
        if not _fits(value, hint, 0 if key in cls.from_zero else 1):
            raise InputError(f"{cls.class_name} config: {key} is {shown(value)}, expected {_kind(hint)}")
        deep = key in ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")
        if isinstance(value, tuple) and len(value) > _MOST_BLOCKS:
            raise InputError(
                f"{cls.class_name} config: {key} has {len(value)} entries, expected at most {_MOST_BLOCKS}"
            )
        if deep and any(n > _MOST_LAYERS for n in (value if isinstance(value, tuple) else (value,))):
            raise InputError(f"{cls.class_name} config: {key} is {shown(value)}, expected at most {_MOST_LAYERS}")

    def check(self) -> None:
        """Raise `InputError` for fields that contradict each other."""

    def to_dict(self) -> dict[str, Any]:
        """Return the ``config.json`` dictionary, which the torch libraries can open."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _same(value: Any, accepted: Any) -> bool:
    """Return whether two values are equal and of one kind: 1 is 1.0, but not True."""
    return _tuple(value) == accepted and isinstance(value, bool) == isinstance(accepted, bool)


def _fits(value: Any, hint: Any, least: int) -> bool:
    """Return whether a value is of an annotated kind; whole numbers are `least` or more."""
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        size = len(value) if isinstance(value, tuple) else -1
        return size >= 1 and (inner[-1] is ... or size == len(inner)) and all(_fits(v, inner[0], least) for v in value)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, inner, least) for inner in typing.get_args(hint))
    return value is None if hint is types.NoneType else isinstance(value, hint)


def _kind(hint: Any) -> str:
    """Say which kind of value is expected."""
    if typing.get_origin(hint) is tuple:
        return f"a list of {_kind(typing.get_args(hint)[0]).removeprefix('a ')}s"
    if isinstance(hint, types.UnionType):
        return " or ".join(_kind(inner) for inner in typing.get_args(hint))
    names = {int: "a whole number", float: "a number above 0", bool: "true or false", str: "a text"}
    return names.get(hint, "null")


@dataclasses.dataclass(frozen=True)
class DownConfig(Config):
    """What a UNet and a network with a copy of its way down both say about that; fields as in diffusers."""

    in_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu", "swish"),
        "only_cross_attention": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "class_embed_type": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
    }
    # The softmax is always float32 here, which is what upcast_attention asks for. The last three tell how the Flax
    # models of diffusers compute, not what.
    from_zero: ClassVar[frozenset[str]] = frozenset({"freq_shift"})
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "upcast_attention",
            "force_upcast",
            "addition_embed_type_num_heads",
            "split_head_dim",
            "use_memory_efficient_attention",
        }
    )
    #: The fields that list the types of blocks, with the types that are supported.
    blocks: ClassVar[Mapping[str, tuple[str, ...]]] = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}

    def check(self) -> None:
        for key, known in self.blocks.items():
            for block in self._per_block(getattr(self, key), key):
                if block not in known:
                    raise InputError(
                        f"{self.class_name} config: {key} has {block!r}, which is not supported, expected "
                        + " or ".join(known)
                    )
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % heads or channels % self.norm_num_groups:
                raise InputError(
                    f"{self.class_name} config: block_out_channels has {channels}, which is not a multiple of "
                    f"{heads} heads and {self.norm_num_groups} norm groups"
                )
        self._per_block(self.transformer_layers_per_block, "transformer_layers_per_block")
        self._check_addition()

    def _per_block(self, value: Any, key: str) -> tuple[Any, ...]:
        n = len(self.block_out_channels)
        values = value if isinstance(value, tuple) else (value,) * n
        if len(values) != n:
            raise InputError(f"{self.class_name} config: {key} has {len(values)} entries, expected {n}")
        return values

    def _check_addition(self) -> None:
        if self.addition_embed_type is None:
            return
        if self.addition_embed_type != "text_time":
            raise InputError(
                f"{self.class_name} config: addition_embed_type={self.addition_embed_type!r} is not supported, "
                "expected None or 'text_time'"
            )
        for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if not isinstance(found := getattr(self, key), int):
                raise InputError(f"{self.class_name} config: {key} is {found!r}, expected an integer with 'text_time'")

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each block, which diffusers usually calls ``attention_head_dim``."""
        value = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        return self._per_block(value, "attention_head_dim")

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of transformer blocks in each attention module of each block."""
        return self._per_block(self.transformer_layers_per_block, "transformer_layers_per_block")

    @property
    def mid_attention(self) -> bool:
        """Whether the middle block has attention."""
        return True

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": self.class_name, **super().to_dict()}


@dataclasses.dataclass(frozen=True)
class UNetConfig(DownConfig):
    """Configuration of `UNet2DConditionModel`; fields as in diffusers.

    ``time_cond_proj_dim`` is the width of the embedded guidance scale that latent consistency models take.
    """

    sample_size: int | tuple[int, int] = 64
    out_channels: int = 4
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    time_cond_proj_dim: int | None = None

    class_name: ClassVar[str] = "UNet2DConditionModel"
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DownConfig.fixed,
        "center_input_sample": (False,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "dropout": (0.0,),
        "dual_cross_attention": (False,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
        "reverse_transformer_layers_per_block": (None,),
    }
    blocks: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **DownConfig.blocks,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }


@dataclasses.dataclass(frozen=True)
class VAEConfig(Config):
    """Configuration of `AutoencoderKL`; fields as in diffusers.

    ``force_upcast`` says that this autoencoder overflows in half precision and must be computed in float32.
    """

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True

    class_name: ClassVar[str] = "AutoencoderKL"
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu", "swish"),
        "shift_factor": (None,),
        "latents_mean": (None,),
        "latents_std": (None,),
    }

    def check(self) -> None:
        n = len(self.block_out_channels)
        for key, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = getattr(self, key)
            if len(types) != n:
                raise InputError(f"{self.class_name} config: {key} has {len(types)} entries, expected {n}")
            for block in types:
                if block != known:
                    raise InputError(f"{self.class_name} config: {key} has {shown(block)}, expected {known!r}")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise InputError(
                    f"{self.class_name} config: block_out_channels has {channels}, which is not a multiple of "
                    f"{self.norm_num_groups} norm groups"
                )

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": self.class_name, **super().to_dict()}
