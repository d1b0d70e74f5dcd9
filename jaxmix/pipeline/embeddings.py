"""Learnt embeddings (textual inversion, arXiv 2208.01618) and the words by which prompts name them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.pipeline.blocks import layer_names
from jaxmix.pipeline.parts import Embedding, Parts
from jaxmix.pipeline.tokens import one_line
from jaxmix.types import InputError, shown
from jaxmix.weights.embedding_files import learnt_vectors, read_embedding

_BASES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's second encoder"}
_SYNTAX = '()[]\\:,"|'


def with_learnt(parts: Parts, source: Any, token: str | None = None) -> tuple[Embedding, ...]:
    """Return the embeddings of a pipeline with one more, of a file or of what such a file holds.

    ``token`` is the word that stands for it in prompts, in any case and not inside longer words. Without it, that is
    the key of the vectors in a file of diffusers, and the name of any other file. All vectors stand side by side where
    the word does. One with vectors for each layer (P+) gives `jaxmix.LayerPrompts` each layer's own, and every other
    prompt their mean. Raises `InputError` for vectors of another model, and for a token that prompts hold by chance.
    """
    if isinstance(source, (str, Path)):
        where, found = str(source), read_embedding(source)
    elif isinstance(source, Mapping):
        where, found = "embedding", learnt_vectors(source, "embedding")
    else:
        raise InputError(f"embedding: found {type(source).__name__}, expected a file or a dictionary of vectors")
    token = found.token if token is None else token
    if token is None:
        raise InputError(f"{where}: found no token, expected one: with_embedding(..., token=...)")
    check_token(parts, token, where)
    expected = [encoder.config.hidden_size for _, encoder in parts.encoders]
    widths = [vectors.shape[1] for vectors in found.vectors]
    if widths != expected:
        said = " and ".join(f"{w} ({_BASES[w]})" if w in _BASES else str(w) for w in widths)
        raise InputError(
            f"{where}: found vectors of width {said}, expected {' and '.join(map(str, expected))}, "
            f"{'one for each text encoder' if len(expected) > 1 else 'that of the text encoder'}"
        )
    room = parts.text_length - 2
    if max(map(len, found.vectors)) > room:
        raise InputError(f"{where}: found {max(map(len, found.vectors))} vectors, expected at most {room}, a chunk")
    return (*parts.embeddings, Embedding(token, found.vectors, _in_order(parts, found.layers, where)))


def _in_order(
    parts: Parts, layers: Mapping[str, tuple[np.ndarray, ...]], where: str
) -> tuple[tuple[np.ndarray, ...], ...]:
    """Return the vectors of each layer in the order in which they run, () without any."""
    if not layers:
        return ()
    expected = list(layer_names(parts))
    if set(layers) != set(expected):
        strange = next((name for name in layers if name not in expected), "")
        raise InputError(
            f"{where}: found vectors of {len(layers)} layers{f', such as {strange}' * bool(strange)}, expected the "
            f"{len(expected)} of this model, {expected[0]} to {expected[-1]}"
        )
    return tuple(layers[name] for name in expected)


def check_token(parts: Parts, token: Any, where: str) -> None:
    """Raise `InputError` for a token that is no word, is taken, or is a word that the tokenizer knows."""
    if not isinstance(token, str) or not token or any(c.isspace() or c in _SYNTAX for c in token):
        raise InputError(
            f"{where}: found the token {shown(token)}, expected a word without spaces or any of {_SYNTAX}: name one "
            "that is"
        )
    if any(one.token.lower() == token.lower() for one in parts.embeddings):
        raise InputError(f"{where}: found the token {token!r} twice, expected another one for each embedding")
    for tokenizer in parts.tokenizers[: len(parts.encoders)]:
        with one_line(tokenizer, f"cannot tokenize {shown(token)}"):
            ids = tokenizer(token, verbose=False)["input_ids"][1:-1]
        if len(ids) < 2:
            raise InputError(
                f"{where}: found the token {token!r}, a word of the vocabulary that prompts hold by chance, expected "
                "one that is not: name another"
            )
