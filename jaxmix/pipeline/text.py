"""Prompts to the text conditioning of the UNet, for one text encoder or two."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.models.clip import CLIPTextModel, TextStates
from jaxmix.pipeline.parts import Parts
from jaxmix.pipeline.programs import encode_ids
from jaxmix.pipeline.tokens import tokenize
from jaxmix.rows import Text
from jaxmix.types import Params, TruncatedPromptWarning, shown


def encode(tokenizer: Any, encoder: CLIPTextModel, params: Params, prompts: Sequence[str]) -> TextStates:
    """Return a text encoder's states of each prompt."""
    ids, _ = tokenize(tokenizer, encoder.config.max_position_embeddings, prompts, encoder.config.vocab_size)
    return encode_ids(encoder, params, jnp.asarray(ids))


def encode_prompts(parts: Parts, prompts: Sequence[str]) -> Text:
    """Return what the UNet attends to for each prompt: ``context`` (b, s, d) and, for SDXL, ``pooled`` (b, p).

    SDXL attends to the penultimate layers of both encoders, joined. ``time_ids`` do not come from the prompt: None.
    """
    first = encode(parts.tokenizers[0], parts.text_encoder, parts.params["text_encoder"], prompts)
    if parts.text_encoder_2 is None:
        return Text(first.last_hidden_state)
    second = encode(parts.tokenizers[1], parts.text_encoder_2, parts.params["text_encoder_2"], prompts)
    return Text(jnp.concatenate([first.penultimate, second.penultimate], -1), second.projected)


def encode_branches(parts: Parts, branches: Sequence[Sequence[str | None]], sizes: Sequence[int]) -> Text:
    """Return the text of all branches, (n, branches, ...), given for each branch a list of one prompt per image.

    None is no prompt at all: states of zeros for SDXL base, those of "" elsewhere. ``sizes`` are the six numbers that
    SDXL takes. Each branch is encoded in a call of its own: rounding depends on the number of rows, so further branches
    would otherwise change the states of the first two.
    """
    return functools.reduce(join, (_encode_branch(parts, branch, sizes) for branch in branches))


def _encode_branch(parts: Parts, prompts: Sequence[str | None], sizes: Sequence[int]) -> Text:
    texts = [prompt or "" for prompt in prompts]
    for prompt, cut in zip(texts, parts.tokenize(texts)[1], strict=True):
        if cut:
            warnings.warn(
                f"prompt {shown(prompt)} is too long for the model; cut off: {cut!r}",
                TruncatedPromptWarning,
                stacklevel=2,
            )
    text = encode_prompts(parts, texts)
    context, pooled = text.context, text.pooled
    if parts.zeros_for_empty_prompt:
        keep = np.asarray([prompt is not None for prompt in prompts])
        context = jnp.where(keep[:, None, None], context, 0)
        pooled = None if pooled is None else jnp.where(keep[:, None], pooled, 0)
    if pooled is None:
        return Text(context[:, None])
    time_ids = jnp.broadcast_to(jnp.asarray(sizes, jnp.float32), (len(prompts), 1, 6))
    return Text(context[:, None], pooled[:, None], time_ids)


def join(text: Text, more: Text) -> Text:
    """Return the branches (n, a, ...) of the one followed by (n, b, ...) of the other, (n, a + b, ...)."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), text, more)
