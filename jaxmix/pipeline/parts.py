"""What a pipeline is made of, as one frozen object: modules, weights, schedule, tokenizers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmix.cards import Card, weights
from jaxmix.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from jaxmix.pipeline.chunks import PLAIN, Chunks, Reading, piece_ids, tokenize
from jaxmix.pipeline.tokens import Known, known_pieces, open_tokenizer
from jaxmix.schedule import NoiseSchedule
from jaxmix.types import InputError, Params


class Embedding(NamedTuple):
    """A learnt embedding: the word that stands for it, and its vectors (m, d) for each text encoder.

    One of P+ also has vectors for each layer, the attn2s in the order in which they run.
    """

    token: str
    vectors: tuple[np.ndarray, ...]
    layers: tuple[tuple[np.ndarray, ...], ...] = ()

    def at(self, layer: int) -> Embedding:
        """Return the embedding that a layer has: its own vectors, if there are any."""
        return Embedding(self.token, self.layers[layer]) if self.layers else self


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Parts(Card):
    """Stable Diffusion 1.x, 2.x or XL: modules, their parameters, the noise schedule and the tokenizers.

    ``params`` has the trees "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2". ``tokenizer`` and
    ``tokenizer_2`` are transformers CLIPTokenizers, or their folders, which are opened at the first prompt.
    ``sampler``, ``default_steps`` and ``default_guidance_scale`` are the defaults of a request.
    ``zeros_for_empty_prompt`` (SDXL base) zeroes all text states where there is no negative prompt. ``extras`` are the
    tensors of a single-file checkpoint that belong to no part; saving writes them back. ``embeddings`` are the learnt
    ones (textual inversion) that prompts may name; saving leaves them out.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    params: Params
    schedule: NoiseSchedule
    tokenizer: Any
    text_encoder_2: CLIPTextModel | None = None
    tokenizer_2: Any = None
    default_steps: int = 25
    default_guidance_scale: float = 7.5
    sampler: str = "ddim"
    zeros_for_empty_prompt: bool = False
    extras: Any = None
    embeddings: tuple[Embedding, ...] = ()

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other."""
        unet, vae = self.unet.config, self.vae.config
        width, second = self.text_encoder.config.hidden_size, self.text_encoder_2
        if second is not None:
            width += second.config.hidden_size
        if width != unet.cross_attention_dim:
            names = "text_encoder hidden_size is" if second is None else "the hidden sizes of both text encoders are"
            raise InputError(
                f"pipeline: {names} {width}, unet cross_attention_dim is {unet.cross_attention_dim}: expected the same"
            )
        if (unet.addition_embed_type is None) != (second is None):
            raise InputError(
                f"pipeline: unet addition_embed_type is {unet.addition_embed_type!r} with "
                f"{1 if second is None else 2} text encoder(s), expected 'text_time' and two (SDXL), or none and one"
            )
        if unet.in_channels != vae.latent_channels:
            known = {9: ": this is an inpainting UNet", 8: ": this is an image-editing or upscaling UNet"}
            raise InputError(
                f"pipeline: unet in_channels is {unet.in_channels}, expected the {vae.latent_channels} latent channels "
                f"of the vae (text-to-image){known.get(unet.in_channels, '')}"
            )

    def _facts(self) -> Iterator[tuple[str, str]]:
        for name, tree in self.params.items():
            yield name, weights(tree)
        (h, w, _), factor = self.latent_shape, self.vae.config.factor
        yield "images", f"{w * factor} x {h * factor} pixels"
        yield "text", f"{self.text_length} tokens, {self.unet.config.cross_attention_dim} channels"
        yield "schedule", f"{self.schedule.prediction_type}, {self.schedule.num_train_timesteps} timesteps"
        if self.embeddings:
            yield "embeddings", ", ".join(one.token for one in self.embeddings)
        yield "defaults", f"{self.sampler}, {self.default_steps} steps, guidance {self.default_guidance_scale:g}"

    @property
    def distilled_guidance(self) -> bool:
        """Whether the UNet is told the guidance scale, as latent consistency models are: it has no second branch."""
        return self.unet.config.time_cond_proj_dim is not None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image's latents."""
        size = self.unet.config.sample_size
        h, w = size if isinstance(size, tuple) else (size, size)
        return (h, w, self.unet.config.in_channels)

    @property
    def text_length(self) -> int:
        """Number of tokens of every encoded prompt."""
        return self.text_encoder.config.max_position_embeddings

    @functools.cached_property
    def tokenizers(self) -> tuple[Any, Any]:
        """The tokenizers, opened; the second is None if there is one text encoder."""
        return open_tokenizer(self.tokenizer), open_tokenizer(self.tokenizer_2)

    def latent_hw(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the size in latent cells of images of a size in pixels (None: the model's own).

        Raises `InputError` for sides that are not multiples of the autoencoder's factor.
        """
        factor = self.vae.config.factor
        default = self.latent_shape
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value % factor or value < factor):
                raise InputError(f"{name}: found {value} pixels, expected a multiple of {factor}")
        return (height // factor if height else default[0], width // factor if width else default[1])

    @property
    def encoders(self) -> tuple[tuple[str, CLIPTextModel], ...]:
        """The text encoders, one or two, each with its name in ``params``."""
        both = (("text_encoder", self.text_encoder), ("text_encoder_2", self.text_encoder_2))
        return tuple((name, encoder) for name, encoder in both if encoder is not None)

    def known(self, encoder: int) -> tuple[Known, ...]:
        """Return the words of the learnt embeddings, with their ids in a text encoder."""
        first, found = self.encoders[encoder][1].config.vocab_size, []
        for one in self.embeddings:
            count = len(one.vectors[encoder])
            found.append(Known(one.token, tuple(range(first, first + count))))
            first += count
        return tuple(found)

    def has_layers(self, text: str) -> bool:
        """Return whether a text names a learnt embedding that has vectors of its own for each layer (P+)."""
        words = {one.token for one in self.embeddings if one.layers}
        found = known_pieces(text, self.known(0), "comfy") if words else ()
        return any(isinstance(piece, Known) and piece.token in words for piece in found)

    def learnt(self, encoder: int) -> np.ndarray | None:
        """Return the vectors (m, d) of the learnt embeddings for a text encoder, None without any."""
        if not self.embeddings:
            return None
        return np.concatenate([one.vectors[encoder] for one in self.embeddings])

    def chunks(self, encoder: int, prompts: Sequence[str], reading: Reading = PLAIN) -> list[Chunks]:
        """Return the chunks of tokens that a text encoder reads of each prompt."""
        vocabulary = self.encoders[encoder][1].config.vocab_size
        tokenizer = self.tokenizers[encoder]
        return tokenize(tokenizer, self.text_length, prompts, vocabulary, reading, self.known(encoder))

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Return token ids (b, text_length) int32, and for each prompt the words that did not fit ("" if all did)."""
        found = self.chunks(0, prompts)
        ids = [one.ids[0] for one in found] or np.zeros((0, self.text_length), np.int32)
        return np.asarray(ids), [one.cut for one in found]

    def token_ids(self, phrase: str) -> list[int]:
        """Return the (first) tokenizer's ids of a phrase alone, without start and end."""
        return self.ids_of(phrase)[0]

    def ids_of(self, text: str) -> list[list[int]]:
        """Return the ids of a text for each text encoder, without start and end, however many they are."""
        return [piece_ids(self.tokenizers[i], text, self.known(i)) for i in range(len(self.encoders))]
