"""What trainers of LoRAs share: their keys, the factors that learn, and the weights of a step with them beside."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxmix
from jaxmix.methods.lora import PARTS
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.tokens import open_tokenizer
from jaxmix.tuning import lora, lora_plan
from jaxmix.types import InputError
from jaxmix.weights.identity import weights_digest
from train.diffusion import Weigh

FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"
TEXT_PARTS = PARTS[1:]

_RARE = 0.8  # of CLIP's vocabulary, which is in the order of frequency: tokens from here on are hardly words
_FULL = 40_000  # tokens: a smaller vocabulary has been pruned to words that its model knows


@dataclasses.dataclass
class LowRankConfig:
    """The keys of a LoRA, named as in diffusers' and PEFT's, or kohya's for convolutions.

    Attributes:
        rank: rank of the additions.
        lora_alpha: they are scaled by lora_alpha / rank; null for the rank (kohya's scripts take 1).
        lora_targets: regular expression searched for in the names of the UNet's modules.
        text_encoder_targets: the same for the text encoders.
        rank_pattern: ranks of modules by a regular expression that fits their name, or its end behind a dot.
        alpha_pattern: their alphas, likewise.
        conv_rank: rank of the 3x3 convolutions, of which those of resnets and of down- and upsamplers are added to
            lora_targets; 0 for none beside those that lora_targets names.
        conv_alpha: their alpha; null for the rank.
        use_dora: also learn the norm of each output's weights (DoRA, arXiv 2402.09353).
        use_rslora: divide alpha by the root of the rank (arXiv 2312.03732); files hold the same as a plain alpha.
        lora_dropout: chance that an input of an addition is left out of a step.
        train_text_encoder: also train the text encoders, both of SDXL.
        text_encoder_lr: their learning rate; null for learning_rate.
        lora_format: what is written: diffusers (PEFT's names), kohya, or both.
    """

    rank: int | None = 4
    lora_alpha: float | None = None
    lora_targets: str = r"attn[12]\.to_(q|k|v|out\.0)$"
    text_encoder_targets: str = r"self_attn\.(q|k|v|out)_proj$"
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    conv_rank: int = 0
    conv_alpha: float | None = None
    use_dora: bool = False
    use_rslora: bool = False
    lora_dropout: float = 0.0
    train_text_encoder: bool = False
    text_encoder_lr: float | None = None
    lora_format: Literal["diffusers", "kohya", "both"] = "both"

    def check_low_rank(self) -> None:
        """Refuse values that would fail later."""
        if self.rank is not None:
            self.ranks()
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout: found {self.lora_dropout}, expected 0 to less than 1")
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise InputError(
                f"text_encoder_lr: found {self.text_encoder_lr} without train_text_encoder, expected both or neither"
            )

    def ranks(self) -> lora_plan.Ranks:
        """Return the rules by which ranks are chosen."""
        assert self.rank is not None
        return lora_plan.Ranks(
            self.rank,
            self.lora_alpha,
            self.rank_pattern,
            self.alpha_pattern,
            self.conv_rank,
            self.conv_alpha,
            self.use_rslora,
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A LoRA in training: `learns` {part: factors}, and the `alphas` of its modules, which do not.

    `blocks` are the names of some of its modules, see `jaxmix.LoRA`.
    """

    learns: dict[str, Any]
    alphas: dict[str, dict[str, Any]]
    blocks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def lora(self, learns: Mapping[str, Any]) -> jaxmix.LoRA:
        """Return the LoRA of what has been learnt."""
        parts = {part: lora_plan.join(factors, self.alphas[part]) for part, factors in learns.items()}
        return jaxmix.LoRA(parts, blocks=self.blocks)

    def save(self, learns: Mapping[str, Any], folder: Path, pipe: Pipeline, layout: str) -> None:
        """Write the file, or the two, of what has been learnt."""
        made = self.lora(learns)
        if layout != "kohya":
            made.save(folder / FILE, pipe, "diffusers")
        if layout != "diffusers":
            made.save(folder / KOHYA_FILE, pipe, "kohya")


def start_lora(pipe: Pipeline, cfg: LowRankConfig, seed: int, blocks: Mapping[str, str] | None = None) -> Trained:
    """Return the LoRA before training, which changes nothing; ``blocks`` are those of `Trained`.

    Raises `InputError` for targets that find no module, and for ranks above what a module can use.
    """
    ranks = cfg.ranks()
    parts = [part for part in PARTS if part == "unet" or (cfg.train_text_encoder and part in pipe.params)]
    chosen = {
        part: lora_plan.plan(pipe.params[part], cfg.lora_targets, ranks, convolutions=True)
        if part == "unet"
        else lora_plan.plan(pipe.params[part], cfg.text_encoder_targets, ranks, f"text_encoder_targets ({part})")
        for part in parts
    }
    lora_plan.check_patterns(ranks, [module for modules in chosen.values() for module in modules])
    keys = dict(zip(PARTS, jax.random.split(jax.random.key(seed), len(PARTS)), strict=True))
    made = {part: lora_plan.start(keys[part], pipe.params[part], chosen[part], cfg.use_dora) for part in parts}
    pairs = {part: lora_plan.split(factors) for part, factors in made.items()}
    learns, alphas = ({part: pair[i] for part, pair in pairs.items()} for i in range(2))
    return Trained(learns, alphas, blocks or {})


def make_weigh(trained: Trained, cfg: LowRankConfig) -> Weigh:
    """Return (params, frozen, key) -> the base's weights with the factors beside their kernels."""
    # As numbers of the program: on several devices they would be arrays of one of them.
    alphas = {part: {name: float(alpha) for name, alpha in found.items()} for part, found in trained.alphas.items()}

    def weigh(params: Any, frozen: Any, key: jax.Array) -> dict[str, Any]:
        weights = dict(frozen)
        for part, factors in params.items():
            beside = lora_plan.join(factors, {name: jnp.float32(alpha) for name, alpha in alphas[part].items()})
            drawn = jax.random.fold_in(key, PARTS.index(part)) if cfg.lora_dropout else None
            weights[part] = lora.attach(frozen[part], beside, 1.0, cfg.lora_dropout, drawn)
        return weights

    return weigh


def text_rates(cfg: Any) -> dict[str, float]:
    """Return what multiplies the learning rate of the text encoders, see `make_optimizer`; {} for nothing."""
    if cfg.text_encoder_lr is None:
        return {}
    if not cfg.learning_rate:
        raise InputError("text_encoder_lr: found it with learning_rate 0, expected one above 0")
    return dict.fromkeys(TEXT_PARTS, cfg.text_encoder_lr / cfg.learning_rate)


def make_plan(pipe: Pipeline, cfg: LowRankConfig) -> dict[str, Any]:
    """Return what a checkpoint's numbers mean beside their shapes: the keys of the LoRA, and the base's weights."""
    keys = [field.name for field in dataclasses.fields(LowRankConfig) if field.name != "lora_format"]
    unread = ("lora_dropout", "text_encoder_lr")  # may change in the course of a run
    told = {key: getattr(cfg, key) for key in keys if key not in unread}
    return {**told, "base": weights_digest(pipe.params["unet"])}


def note_ordinary(pipe: Pipeline, name: str, words: Iterable[str]) -> None:
    """Say on stderr if words that are to stand for something new are words that the text encoder knows already.

    A word is ordinary if it is one token, not among the rarest of CLIP's vocabulary: what it means would change.
    """
    tokenizer, words = open_tokenizer(pipe.tokenizer), list(words)
    size = len(tokenizer)
    told = []
    for word in words:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or (size > _FULL and ids[0] >= _RARE * size):
            return  # one rare word is enough
        told.append(f"{tokenizer.convert_ids_to_tokens(ids)[0]} {ids[0]}")
    if told and jax.process_index() == 0:
        said = "is an ordinary word" if len(words) == 1 else "are ordinary words"
        print(
            f"note: {name}: {' '.join(words)!r} {said} to this model (tokens: {', '.join(told)}), whose meaning will "
            "change; a rare word such as 'sks' has none to lose",
            file=sys.stderr,
        )


def beside_base(base: np.ndarray, columns: list[np.ndarray]) -> np.ndarray:
    """Return pictures (n, H, W, 3) of the base and of further columns as rows side by side."""
    whole = np.stack([base, *columns], 1)
    return whole.reshape(-1, *whole.shape[2:])
