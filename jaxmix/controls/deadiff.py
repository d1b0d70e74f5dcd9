"""DEADiff: An Efficient Stylization Diffusion Model with Disentangled Representations (arXiv 2403.06951).

Two Q-Formers read CLIP's states of a picture, each beside a word: "style" or "content". Their 16 queries become tokens
of the style and of the content. In every attn2 text and tokens share one softmax, with keys and values of their own::

    x = softmax(Q [K_t ; w K_i]' / sqrt(d)) [V_t ; w V_i],   K_i, V_i: projections of the layer's tokens

Of the 16 layers of Stable Diffusion 1, in the order in which they run, the five coarsest in the middle (`CONTENT`) see
the tokens of the content and all others those of the style. A slot without a picture has tokens of zeros, as have both
in unconditional rows; their keys are zeros, which still take their share of the softmax. All this is the rule of the
authors' code.

``w`` scales keys and values alike. At w = 0 the authors' attention is that over the text and 16 zeros, which is not the
base; here a strength of 0 is the base, bit for bit. The joint softmax is put together from the text's attention and the
tokens' own, so that what other controls do to the text's part stays done; scores that such a control edits weigh as
they were before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxmix import kernels
from jaxmix.control import KV, QKV, Control, Site
from jaxmix.controls.ip_adapter import ATTN2, project_kv
from jaxmix.controls.networks import dense, norm
from jaxmix.rows import dataclass, gate, like, per_row
from jaxmix.types import AnyArray, Array, InputError, Params

SLOTS = ("style", "content")
CONTENT = r"^(down_blocks\.2\.|mid_block\.|up_blocks\.1\.attentions\.[01]\.)"
"""The attn2 that see the content: numbers 4 to 8 of the 16 in the order in which they run."""

WORD_IDS = {"style": (101, 2806, 102), "content": (101, 4180, 102)}
"""The words that the Q-Formers are told, between [CLS] and [SEP], as bert-base-uncased numbers them."""

_BERT_EPS = 1e-12
_HEAD = 64  # channels of each head of a Q-Former


@dataclass
class DEADiffControl(Control):
    """Let every attn2 that has keys and values of tokens attend to them, in one softmax with the text.

    ``shown`` maps a site's name to the keys and values (rows, T, d_inner) of the tokens of its slot, ``scale`` (rows,)
    is w, and ``live`` says which rows see their picture: all but the unconditional ones, whose tokens are zeros.
    """

    shown: dict[str, KV] = per_row()
    scale: Float[Array, " b"] = per_row()
    live: Float[Array, " b"] = gate()

    def out(self, site: Site, a: QKV, o: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
        """Give the tokens their share of the softmax."""
        if site.name not in self.shown:
            return o
        b, n, h, d = a.q.shape
        w = self.scale * self.live

        def seen(x: Array) -> Array:  # (b, T, h d) to (b, T, h, d)
            return (like(w, x) * x).astype(a.v.dtype).reshape(b, -1, h, d)

        k, v = map(seen, self.shown[site.name])
        # Its own copies: shared with the text's attention, they would change how that is fused, and so its last bits.
        q, text_k = jax.lax.optimization_barrier((a.q, a.k))
        scores = kernels.scores(q, k)
        mine = kernels.mix(jax.nn.softmax(scores, axis=-1), v)
        text, tokens = (jax.nn.logsumexp(x, axis=-1) for x in (kernels.scores(q, text_k), scores))
        share = jax.nn.sigmoid(tokens - text).reshape(b, h, n).swapaxes(1, 2)[..., None]
        share = jnp.where(like(self.scale, share) > 0, share, 0.0).astype(o.dtype)
        return o + share * (mine - o)

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse keys and values for sites that this UNet lacks."""
        if missing := sorted(set(self.shown) - {s.name for s in sites}):
            raise InputError(f"DEADiff: found no {missing[0]} in this UNet, expected the layers of its checkpoint")


def bind(
    layers: Mapping[str, Params],
    tokens: Mapping[str, Float[AnyArray, "b t c"]],
    slots: Mapping[str, str],
    *,
    scale: Float[AnyArray, " b"],
    window: tuple[float, float] = (0.0, 1.0),
) -> DEADiffControl:
    """Return the control for the tokens of both slots; ``slots`` says for every attn2 which of them it sees.

    ``layers`` maps each attn2 to {"to_k", "to_v": {"kernel" (c, d_inner)}}.
    """
    shown: dict[str, KV] = {}
    for slot in SLOTS:
        mine = {name: layers[name] for name in layers if slots[name] == slot}
        made = project_kv(mine, jnp.asarray(tokens[slot])[:, None])
        shown |= {name: KV(*(x[:, 0] for x in kv)) for name, kv in made.items()}
    scale = jnp.asarray(scale, jnp.float32)
    return DEADiffControl(shown=shown, scale=scale, live=jnp.ones_like(scale), sites=ATTN2, window=window)


def tokens_of(params: Params, states: Float[AnyArray, "b s d"]) -> Float[Array, "b t c"]:
    """Return the tokens of CLIP's last states of pictures, by a slot's norm, Q-Former and projection."""
    seen = norm(params["ln_vision"], jnp.asarray(states))
    x = qformer(params["qformer"], seen)
    y = dense(params["proj"]["dense1"], norm(params["proj"]["LayerNorm"], x, _BERT_EPS))
    return x + dense(params["proj"]["dense2"], y * jax.nn.sigmoid(1.702 * y))


def qformer(params: Params, seen: Float[Array, "b s d"]) -> Float[Array, "b t c"]:
    """Return the queries of BLIP-2's Q-Former (arXiv 2301.12597) that looked at ``seen`` beside some words.

    ``params`` has "query_tokens" (1, t, c), "words" (w, c), the embeddings of the words with their places, and
    modules under BERT's names, of layers whose queries also attend to what is seen.
    """
    queries = params["query_tokens"].astype(seen.dtype)
    count = queries.shape[1]
    x = jnp.concatenate([queries, params["words"].astype(seen.dtype)[None]], 1)
    x = _norm(params["embeddings.LayerNorm"], jnp.broadcast_to(x, (len(seen), *x.shape[1:])))
    for i in range(depth(params)):
        layer = f"encoder.layer.{i}"
        x = _attend(params, f"{layer}.attention", x, x)
        queries = _attend(params, f"{layer}.crossattention", x[:, :count], seen)
        parts = [_feed(params, layer, "_query", queries), _feed(params, layer, "", x[:, count:])]
        x = jnp.concatenate(parts, 1)
    return x[:, :count]


def depth(params: Params) -> int:
    """Return the number of layers of a Q-Former."""
    return len([name for name in params if name.endswith(".attention.self.query")])


def widths(params: Params) -> tuple[int, int]:
    """Return the width of the states that a slot reads, and that of its tokens."""
    return params["ln_vision"]["scale"].shape[0], params["qformer"]["query_tokens"].shape[-1]


def _attend(params: Params, name: str, x: Array, seen: Array) -> Array:
    q, k, v = (
        dense(params[f"{name}.self.{which}"], y).reshape(*y.shape[:2], max(1, x.shape[-1] // _HEAD), -1)
        for which, y in (("query", x), ("key", seen), ("value", seen))
    )
    o = dense(params[f"{name}.output.dense"], kernels.plain(q, k, v).reshape(x.shape))
    return _norm(params[f"{name}.output.LayerNorm"], o + x)


def _feed(params: Params, layer: str, which: str, x: Array) -> Array:
    y = jax.nn.gelu(dense(params[f"{layer}.intermediate{which}.dense"], x), approximate=False)
    y = dense(params[f"{layer}.output{which}.dense"], y)
    return _norm(params[f"{layer}.output{which}.LayerNorm"], y + x)


def _norm(params: Params, x: Array) -> Array:
    return norm(params, x, _BERT_EPS)


def as_parameters(held: Mapping[str, AnyArray]) -> dict[str, Any]:
    """Return a file's tensors by module and leaf, in our layout: kernels (in, out), scales of norms."""
    made: dict[str, Any] = {}
    for key, array in held.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight":
            leaf = "kernel" if array.ndim == 2 else "scale"
        made.setdefault(module, {})[leaf] = jnp.asarray(array.T if leaf == "kernel" else array)
    return made
