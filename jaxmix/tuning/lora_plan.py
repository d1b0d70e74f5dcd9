"""What a LoRA changes before it is trained: modules by pattern, each with its rank and alpha, and the first factors.

Names and rules are those of PEFT's `LoraConfig` (`r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`, `use_rslora`,
`use_dora`), and of kohya's scripts for 3x3 convolutions (`conv_dim`, `conv_alpha`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax

from jaxmix.tuning import lora
from jaxmix.types import Array, InputError, Params

CONVOLUTIONS = r"(resnets|downsamplers|upsamplers)\.\d+\.conv"
"""The modules that `conv_rank` adds: the 3x3 convolutions of kohya's ResnetBlock2D, Downsample2D and Upsample2D."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """How ranks and alphas are chosen.

    `alpha` None is each module's rank. A key of `rank_pattern` and `alpha_pattern` is a regular expression that fits a
    module's name, or the end of it behind a dot; the first that fits counts. `conv_rank` is the rank of 3x3
    convolutions, 0 to treat them like others, and `conv_alpha` their alpha. `use_rslora` divides alpha by the root of
    the rank (arXiv 2312.03732).
    """

    rank: int
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    conv_rank: int = 0
    conv_alpha: float | None = None
    use_rslora: bool = False

    def __post_init__(self) -> None:
        """Refuse ranks below 1 and alphas that are no finite numbers."""
        for name, value in [("rank", self.rank), *_named("rank_pattern", self.rank_pattern)]:
            if value < 1:
                raise InputError(f"{name}: found {value}, expected 1 or more")
        if self.conv_rank < 0:
            raise InputError(f"conv_rank: found {self.conv_rank}, expected 0 or more")
        alphas = [("lora_alpha", self.alpha), ("conv_alpha", self.conv_alpha)]
        for name, alpha in [*alphas, *_named("alpha_pattern", self.alpha_pattern)]:
            if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
                raise InputError(f"{name}: found {alpha}, expected a number above 0, or null for the rank")
        if self.conv_alpha is not None and not self.conv_rank:
            raise InputError(f"conv_alpha: found {self.conv_alpha} without a conv_rank, expected both or neither")


def plan(
    params: Params, pattern: str, ranks: Ranks, where: str = "lora_targets", convolutions: bool = False
) -> dict[str, tuple[int, float]]:
    """Return {module: (rank, alpha)} for the modules that a pattern chooses, alpha being divided by the rank.

    With ``convolutions`` those that `Ranks.conv_rank` adds belong to them. Raises `InputError` starting with ``where``
    for a pattern that finds nothing, and naming the module for a rank above what its kernel can use.
    """
    known = lora.targets(params)
    chosen = lora.choose(known, pattern, where)
    if convolutions and ranks.conv_rank:
        more = {name for name in known if re.search(CONVOLUTIONS, name) and _is_3x3(known[name][1].shape)}
        chosen = sorted({*chosen, *more})
    return {name: _rank_of(name, tuple(known[name][1].shape), ranks) for name in chosen}


def check_patterns(ranks: Ranks, modules: Collection[str]) -> None:
    """Raise `InputError` for a key of a pattern that fits none of the modules that learn, with near misses."""
    for name, table in (("rank_pattern", ranks.rank_pattern), ("alpha_pattern", ranks.alpha_pattern)):
        for key in table:
            try:
                found = any(_fits(key, module) for module in modules)
            except re.error as error:
                raise InputError(f"{name}: {key!r} is not a regular expression: {error}") from None
            if not found:
                near = difflib.get_close_matches(key.replace("\\", ""), list(modules), n=3, cutoff=0.0)
                raise InputError(
                    f"{name}: {key!r} fits none of the {len(modules)} modules that learn, from the end of their names; "
                    f"near misses: {', '.join(near)}"
                )


def start(
    key: Array, params: Params, chosen: Mapping[str, tuple[int, float]], use_dora: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the LoRA before training, which changes nothing: `lora.fresh` factors, with DoRA the norms of W."""
    known = lora.targets(params)
    made = {}
    for i, (name, (rank, alpha)) in enumerate(sorted(chosen.items())):
        kernel = known[name][1]
        made[name] = lora.fresh(jax.random.fold_in(key, i), kernel.shape, rank, alpha)
        if use_dora:
            shape = (*[1] * (len(kernel.shape) - 1), kernel.shape[-1])
            made[name]["magnitude"] = _norms(kernel).reshape(shape)
    return made


def split(factors: lora.Factors) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return (what trains of a LoRA, {module: alpha}).

    Magnitudes are (o,) there, like the norms that they are: weight decay is for arrays of more axes.
    """
    lora.check_trainable(factors)
    trains = {
        name: {role: x.reshape(-1) if role == "magnitude" else x for role, x in f.items() if role != "alpha"}
        for name, f in factors.items()
    }
    return trains, {name: f["alpha"] for name, f in factors.items()}


def join(trains: Mapping[str, Mapping[str, Array]], alphas: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the LoRA of factors and alphas: the inverse of `split`."""
    made: dict[str, dict[str, Any]] = {}
    for name, f in trains.items():
        made[name] = {**f, "alpha": alphas[name]}
        if "magnitude" in f:
            made[name]["magnitude"] = f["magnitude"].reshape(*[1] * (f["up"].ndim - 1), -1)
    return made


_norms = jax.jit(lora.norms)


def _rank_of(name: str, shape: tuple[int, ...], ranks: Ranks) -> tuple[int, float]:
    conv = bool(ranks.conv_rank) and _is_3x3(shape)
    rank = _first(ranks.rank_pattern, name, ranks.conv_rank if conv else ranks.rank)
    alpha = _first(ranks.alpha_pattern, name, ranks.conv_alpha if conv else ranks.alpha)
    most = min(math.prod(shape[:-1]), shape[-1])
    if rank > most:
        raise InputError(
            f"{'conv_rank' if conv else 'rank'}: found {rank} for {name}, a kernel of {math.prod(shape[:-1])} x "
            f"{shape[-1]}, expected at most {most}: lower it there with rank_pattern, or leave the module out"
        )
    alpha = float(rank if alpha is None else alpha)
    return rank, alpha * rank**0.5 if ranks.use_rslora else alpha


def _is_3x3(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and tuple(shape[:2]) == (3, 3)


def _fits(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _first(table: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for key, value in table.items() if _fits(key, name)), otherwise)


def _named(table: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield f"{table} {key}", value
