"""Prompts to the text conditioning of the UNet, for one text encoder or two.

A prompt is read in chunks (`jaxmix.pipeline.chunks`), which are encoded one by one and joined along the tokens. What
weights do to the states z of a prompt, w being a token's:

- "a1111": z w, times the mean of z over that of z w, of all tokens and channels of the prompt's chunks;
- "compel", "comfy": e + w (z - e), where e are the states of an empty prompt at the same place. For compel each piece
  with w < 1 is also blended out: E = (E_0 + sum t_f E_f) / (1 + sum t_f), t_f = tan((1 - w) pi / 2), where E_f is
  encoded with the piece hidden from attention; and the state of the first chunk's end stands at every chunk's end.

A prompt of one chunk without weights has the encoder's states bit for bit. The pooled state is that of the first
chunk, and is never weighted.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.models.clip import CLIPTextModel, TextStates
from jaxmix.pipeline.chunks import PLAIN, Chunks, Reading, empty_chunk, tokenize
from jaxmix.pipeline.parts import Parts
from jaxmix.pipeline.programs import encode_ids
from jaxmix.rows import Text
from jaxmix.types import Array, InputError, Params, TruncatedPromptWarning, shown

_SMALLEST = 1e-6
"""Of a mean, as a share of the mean size: below it there is nothing to scale by."""

Prompts = Sequence[str | None]


def encode(tokenizer: Any, encoder: CLIPTextModel, params: Params, prompts: Sequence[str]) -> TextStates:
    """Return a text encoder's states of each prompt, cut to one chunk."""
    found = tokenize(tokenizer, encoder.config.max_position_embeddings, prompts, encoder.config.vocab_size)
    return encode_ids(encoder, params, jnp.asarray([one.ids[0] for one in found]))


def encode_prompts(
    parts: Parts,
    prompts: Sequence[str],
    prompts_2: Prompts | None = None,
    reading: Reading = PLAIN,
    chunks: int | None = None,
) -> Text:
    """Return what the UNet attends to for each prompt: ``context`` (b, s, d) and, for SDXL, ``pooled`` (b, p).

    SDXL attends to the penultimate layers of both encoders, joined; the second one reads ``prompts_2`` where they are
    given. ``chunks`` is the number of chunks to which every prompt is filled up (with those of an empty prompt) before
    it is weighted; if None each is weighted for itself, and filled up to the longest. ``time_ids`` do not come from the
    prompt: None. Raises `InputError` for prompts that are longer than ``chunks``.
    """
    check_skip(parts, reading.clip_skip)
    read = [parts.chunks(i, texts, reading) for i, texts in enumerate(of_encoders(parts, prompts, prompts_2))]
    own = np.max([[len(one.ids) for one in found] for found in read], 0, initial=1)
    if chunks is not None and own.max(initial=0) > chunks:
        longest = int(own.argmax())
        raise InputError(
            f"prompt {shown(prompts[longest])}: found {own[longest]} chunks of tokens, expected at most {chunks}"
        )
    return encode_chunks(parts, read, reading, own if chunks is None else np.full(len(prompts), chunks))


def encode_chunks(parts: Parts, read: Sequence[Sequence[Chunks]], reading: Reading, counted: np.ndarray) -> Text:
    """Return the text of prompts that each text encoder's tokenizer has ``read``, filled up to the longest.

    ``counted`` (b,) is how many chunks of each prompt count in its mean, those that fill it up included.
    """
    held = [
        _states(parts, i, found, int(counted.max(initial=1)), counted, reading, penultimate=len(read) > 1)
        for i, found in enumerate(read)
    ]
    if len(held) == 1:
        return Text(held[0][0])
    return Text(jnp.concatenate([context for context, _ in held], -1), held[1][1])


def of_encoders(parts: Parts, prompts: Sequence[str], prompts_2: Prompts | None) -> list[list[str]]:
    """Return the prompts of each text encoder."""
    texts = [list(prompts)]
    if parts.text_encoder_2 is not None:
        second = [None] * len(prompts) if prompts_2 is None else prompts_2
        texts.append([one if two is None else two for one, two in zip(prompts, second, strict=True)])
    elif prompts_2 is not None and any(two is not None for two in prompts_2):
        raise InputError("prompts_2: found some, but the model has one text encoder, expected None")
    return texts


def check_skip(parts: Parts, clip_skip: int) -> None:
    """Raise `InputError` if more layers are to be skipped than a text encoder has."""
    for name, encoder in parts.encoders:
        most = encoder.config.num_hidden_layers - (len(parts.encoders) > 1)
        if clip_skip > most:
            raise InputError(
                f"clip_skip: found {clip_skip}, expected 0 to {most}: {name} has {encoder.config.num_hidden_layers} "
                f"layers{' and its penultimate one is read' * (len(parts.encoders) > 1)}"
            )


def chunk_counts(
    parts: Parts, prompts: Sequence[str], prompts_2: Prompts | None = None, reading: Reading = PLAIN
) -> np.ndarray:
    """Return how many chunks each prompt takes, in the encoder that needs more."""
    if reading.max_chunks == 1:
        return np.ones(len(prompts), int)
    texts = of_encoders(parts, prompts, prompts_2)
    return np.max([[len(one.ids) for one in parts.chunks(i, t, reading)] for i, t in enumerate(texts)], 0, initial=1)


def _states(
    parts: Parts,
    number: int,
    found: Sequence[Chunks],
    chunks: int,
    counted: np.ndarray,
    reading: Reading,
    penultimate: bool,
) -> tuple[Array, Array | None]:
    """Return one encoder's context (b, chunks * length, d) of prompts, and the projection of their first chunks.

    ``counted`` (b,) is how many chunks of each prompt count in its mean.
    """
    name, encoder = parts.encoders[number]
    length = encoder.config.max_position_embeddings
    empty = empty_chunk(parts.tokenizers[number], length)
    own = np.asarray([len(one.ids) for one in found])
    found = [one.filled(chunks, empty) for one in found]
    ids = np.asarray([one.ids for one in found], np.int32).reshape(-1, chunks, length)
    learnt = parts.learnt(number)
    more = None if learnt is None else jnp.asarray(learnt)

    def run(ids: np.ndarray, seen: np.ndarray | None = None) -> TextStates:
        mask = None if seen is None else jnp.asarray(seen)
        return encode_ids(encoder, parts.params[name], jnp.asarray(ids), mask, more, reading.clip_skip)

    def context_of(states: Sequence[TextStates]) -> Array:
        all_states = [one.penultimate if penultimate else one.last_hidden_state for one in states]
        return all_states[0] if len(all_states) == 1 else jnp.concatenate(all_states, 1)

    states = [run(ids[:, i]) for i in range(chunks)]
    plain = context_of(states)
    weights = np.asarray([one.weights for one in found], np.float32).reshape(-1, chunks * length)
    context = plain
    if bool(np.any(weights != 1)):
        if reading.syntax == "a1111":
            counts = np.arange(chunks * length) < counted[:, None] * length
            context = _rescaled(plain, jnp.asarray(weights), jnp.asarray(counts))
        else:
            nothing = context_of([run(np.repeat(empty[None], len(ids), 0))])
            context = _from_empty(plain, jnp.asarray(weights), nothing)
            most = max(len(one.lowered) for one in found)
            share, hidden = np.zeros((most, len(ids)), np.float32), np.zeros((most, len(ids), chunks, length), bool)
            for row, one in enumerate(found):
                for k, (weight, place) in enumerate(one.lowered):
                    share[k, row] = math.tan((1 - max(weight, 1e-5)) * math.pi / 2)
                    hidden[k, row] = place
            total = context.astype(jnp.float32)
            for k in range(most):
                without = context_of([run(ids[:, i], ~hidden[k, :, i]) for i in range(chunks)])
                weighted = _from_empty(without, jnp.asarray(weights), nothing)
                total = total + jnp.asarray(share[k])[:, None, None] * weighted.astype(jnp.float32)
            if most:
                blended = total / (1 + jnp.asarray(share.sum(0)))[:, None, None]
                context = jnp.where(jnp.asarray(share.any(0))[:, None, None], blended.astype(plain.dtype), context)
    if reading.syntax == "compel" and own.max(initial=1) > 1:
        context = _same_ends(context, ids, own, int(empty[1]))
    return context, states[0].projected


@jax.jit
def _rescaled(z: Array, w: Array, counted: Array) -> Array:
    """Weight states (b, s, d), and give each row the mean that it had over the tokens that are ``counted`` (b, s)."""
    before = z.astype(jnp.float32)
    after = before * w[..., None]
    counts = counted[..., None]

    def mean(x: Array) -> Array:
        return jnp.where(counts, x, 0).sum((1, 2), keepdims=True) / (counts.sum((1, 2), keepdims=True) * x.shape[-1])

    new = mean(after)
    scalable = jnp.abs(new) > _SMALLEST * mean(jnp.abs(after))
    made = after * jnp.where(scalable, mean(before) / jnp.where(scalable, new, 1), 1)
    return jnp.where((w != 1).any(1)[:, None, None], made.astype(z.dtype), z)


@jax.jit
def _from_empty(z: Array, w: Array, empty: Array) -> Array:
    """Move states (b, s, d) away from those of an empty prompt (b, length, d), or towards them."""
    nothing = jnp.tile(empty.astype(jnp.float32), (1, z.shape[1] // empty.shape[1], 1))
    made = nothing + w[..., None] * (z.astype(jnp.float32) - nothing)
    return jnp.where(w[..., None] != 1, made.astype(z.dtype), z)


def _same_ends(context: Array, ids: np.ndarray, own: np.ndarray, end: int) -> Array:
    """Put the state of the end of each prompt's first chunk at the ends of its other chunks."""
    length = ids.shape[-1]
    first = (ids == end).argmax(-1)  # (b, chunks)
    source = np.broadcast_to(np.arange(context.shape[1]), context.shape[:2]).copy()
    for row, count in enumerate(own):
        for i in range(1, count):
            source[row, i * length + first[row, i]] = first[row, 0]
    return jnp.take_along_axis(context, jnp.asarray(source)[..., None], 1)


def encode_branches(
    parts: Parts,
    branches: Sequence[Prompts],
    sizes: Sequence[int],
    reading: Reading = PLAIN,
    *,
    seconds: Sequence[Prompts | None] | None = None,
    chunks: int | None = None,
    first: int = 0,
) -> Text:
    """Return the text of all branches, (n, branches, ...), given for each branch a list of one prompt per image.

    None is no prompt at all: states of zeros for SDXL base, those of "" elsewhere. ``sizes`` are the six numbers that
    SDXL takes; ``seconds`` are the prompts of its second encoder, None for the same ones. All are filled up to
    ``chunks`` chunks, as many as the longest prompt has if None. As in diffusers, no layer is skipped in branch 0, that
    of the negative prompts; ``first`` is the number of the first of these branches.

    Each branch is encoded in a call of its own: rounding depends on the number of rows, so further branches would
    otherwise change the states of the first two.
    """
    seconds = [None] * len(branches) if seconds is None else seconds
    filled = [[prompt or "" for prompt in branch] for branch in branches]
    if chunks is None:
        chunks = max(
            int(chunk_counts(parts, texts, two, reading).max(initial=1))
            for texts, two in zip(filled, seconds, strict=True)
        )
    made = []
    for number, (branch, two) in enumerate(zip(branches, seconds, strict=True), first):
        how = reading if number else Reading(reading.syntax, reading.max_chunks)
        made.append(_encode_branch(parts, branch, two, sizes, how, chunks))
    return functools.reduce(join, made)


def _encode_branch(
    parts: Parts, prompts: Prompts, prompts_2: Prompts | None, sizes: Sequence[int], reading: Reading, chunks: int
) -> Text:
    texts = [prompt or "" for prompt in prompts]
    warn_of_cuts(parts, texts, prompts_2, reading)
    text = encode_prompts(parts, texts, prompts_2, reading, chunks)
    context, pooled = text.context, text.pooled
    if parts.zeros_for_empty_prompt:
        keep = np.asarray([prompt is not None for prompt in prompts])
        if prompts_2 is not None:
            keep |= np.asarray([prompt is not None for prompt in prompts_2])
        context = jnp.where(keep[:, None, None], context, 0)
        pooled = None if pooled is None else jnp.where(keep[:, None], pooled, 0)
    if pooled is None:
        return Text(context[:, None])
    time_ids = jnp.broadcast_to(jnp.asarray(sizes, jnp.float32), (len(prompts), 1, 6))
    return Text(context[:, None], pooled[:, None], time_ids)


def warn_of_cuts(parts: Parts, prompts: Sequence[str], prompts_2: Prompts | None, reading: Reading) -> None:
    """Warn of each prompt of which words are cut off, as the first text encoder reads it."""
    if reading.max_chunks is None:
        return
    for texts, number in zip(of_encoders(parts, prompts, prompts_2), (0, 1), strict=False):
        if number and texts == list(prompts):
            return  # said already
        for prompt, one in zip(texts, parts.chunks(number, texts, reading), strict=True):
            if one.cut:
                warnings.warn(
                    f"prompt {shown(prompt)} is too long for the model; cut off: {one.cut!r}",
                    TruncatedPromptWarning,
                    stacklevel=2,
                )


def join(text: Text, more: Text) -> Text:
    """Return the branches (n, a, ...) of the one followed by (n, b, ...) of the other, (n, a + b, ...)."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), text, more)
