"""CLIPTextModel: the text encoders of Stable Diffusion (arXiv 2103.00020), under transformers' names.

The tree is rooted at ``text_model``, as in every checkpoint in circulation; transformers 5 drops that prefix when it
writes, and the weights room reads both.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from jaxmix.models.clip_config import CLIPConfig, CLIPTextConfig
from jaxmix.models.layers import LayerNorm, Linear
from jaxmix.sharding import gathered
from jaxmix.types import AnyArray, Array, Params

_init = nn.initializers.normal(0.02)


@struct.dataclass
class TextStates:
    """The outputs of a text encoder.

    ``last_hidden_state`` is after the final norm; ``penultimate`` is the input of the last layer, without a norm
    (``hidden_states[-2]`` in transformers). Where layers are skipped both are those of the layers before. ``pooled`` is
    the last hidden state of all layers at the end-of-text token, and ``projected`` its projection, None for a model
    without one.
    """

    last_hidden_state: Float[Array, "b s d"]
    penultimate: Float[Array, "b s d"]
    pooled: Float[Array, "b d"]
    projected: Float[Array, "b p"] | None = None


class Embed(nn.Module):
    """A table of vectors."""

    rows: int
    features: int

    @nn.compact
    def __call__(self, ids: Int[AnyArray, "*b"], more: Float[Array, "m d"] | None = None) -> Float[Array, "*b d"]:
        """Return the vectors of ids; those from ``rows`` on are in ``more``."""
        table = gathered(self.param("embedding", _init, (self.rows, self.features)))
        if more is not None:
            table = jnp.concatenate([table, more.astype(table.dtype)])
        return table[ids]


class SelfAttention(nn.Module):
    """Multi-head self-attention, scores and softmax in float32; causal: no state sees those after it."""

    heads: int
    dtype: Any
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], seen: Bool[Array, "b s"] | None = None) -> Float[Array, "b s d"]:
        """Attend to the states that are ``seen``, all if None."""
        b, s, d = x.shape

        def project(name: str) -> Array:
            return Linear(d, dtype=self.dtype, name=name)(x).reshape(b, s, self.heads, d // self.heads)

        q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * (d // self.heads) ** -0.5, k, preferred_element_type=jnp.float32)
        if self.causal:
            scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, jnp.finfo(jnp.float32).min)
        if seen is not None:
            scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
        probs = jax.nn.softmax(scores, axis=-1)
        o = jnp.einsum("bhqk,bkhd->bqhd", probs.astype(self.dtype), v).reshape(b, s, d)
        return Linear(d, dtype=self.dtype, name="out_proj")(o)


class MLP(nn.Module):
    """Two dense layers with CLIP's activation between."""

    hidden: int
    act: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        y = Linear(self.hidden, dtype=self.dtype, name="fc1")(x)
        y = y * jax.nn.sigmoid(1.702 * y) if self.act == "quick_gelu" else jax.nn.gelu(y, approximate=False)
        return Linear(x.shape[-1], dtype=self.dtype, name="fc2")(y)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    config: CLIPConfig
    dtype: Any
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], seen: Bool[Array, "b s"] | None = None) -> Float[Array, "b s d"]:
        cfg = self.config
        y = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layer_norm1")(x)
        x = x + SelfAttention(cfg.num_attention_heads, self.dtype, self.causal, name="self_attn")(y, seen)
        y = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layer_norm2")(x)
        return x + MLP(cfg.intermediate_size, cfg.hidden_act, self.dtype, name="mlp")(y)


class TextTransformer(nn.Module):
    """Token and position embeddings, the layers, the final norm."""

    config: CLIPTextConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        ids: Int[AnyArray, "b s"],
        seen: Bool[Array, "b s"] | None = None,
        more: Float[Array, "m d"] | None = None,
        clip_skip: int = 0,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s d"], Float[Array, "b s d"]]:
        """Return the states after the final norm, of all layers and without the skipped ones, and penultimate ones."""
        cfg = self.config
        d, s = cfg.hidden_size, ids.shape[1]
        x = Embed(cfg.vocab_size, d, name="embeddings.token_embedding")(ids, more)
        x = x + Embed(cfg.max_position_embeddings, d, name="embeddings.position_embedding")(jnp.arange(s))
        x = x.astype(self.dtype)
        before = [x]  # the input of each layer, and the last one's output
        for i in range(cfg.num_hidden_layers):
            x = EncoderLayer(cfg, self.dtype, name=f"encoder.layers.{i}")(x, seen)
            before.append(x)
        norm = LayerNorm(cfg.layer_norm_eps, self.dtype, name="final_layer_norm")
        last = norm(x)
        skipped = last if not clip_skip else norm(before[-1 - clip_skip])
        return last, skipped, before[max(len(before) - 2 - clip_skip, 0)]


def at_end_of_text(cfg: CLIPTextConfig, ids: Int[AnyArray, "b s"], x: Float[Array, "b s d"]) -> Float[Array, "b d"]:
    """Return the state at each row's end-of-text token, the first one that has the configured id.

    Old configs say ``eos_token_id: 2``, which no prompt contains; then the first token with the largest id is taken, as
    in transformers, though none of a learnt embedding, whose ids are beyond the vocabulary.
    """
    ids = jnp.asarray(ids)
    if cfg.eos_token_id == 2:
        end = jnp.where(ids < cfg.vocab_size, ids, 0).argmax(-1)
    else:
        end = (ids == cfg.eos_token_id).argmax(-1)
    return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]


class CLIPTextModel(nn.Module):
    """CLIP's text encoder: a causal transformer over token ids, at most ``max_position_embeddings`` of them.

    With ``config.projection`` it is transformers' CLIPTextModelWithProjection, the second encoder of SDXL.
    """

    config: CLIPTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids: Int[AnyArray, "b s"],
        seen: Bool[Array, "b s"] | None = None,
        more: Float[Array, "m d"] | None = None,
        clip_skip: int = 0,
    ) -> TextStates:
        """Encode token ids (b, s).

        Tokens that are not ``seen`` are no keys. Ids beyond the vocabulary are those of the vectors in ``more``. The
        last ``clip_skip`` layers are left out of all states but the pooled one.
        """
        cfg = self.config
        last, skipped, penultimate = TextTransformer(cfg, self.dtype, name="text_model")(ids, seen, more, clip_skip)
        pooled = at_end_of_text(cfg, ids, last)
        projected = None
        if cfg.projection:
            projected = Linear(cfg.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")(pooled)
        return TextStates(skipped, penultimate, pooled, projected)

    @nn.nowrap
    def init_params(self, key: Array) -> Params:
        """Return fresh float32 parameters."""
        return jax.jit(lambda key: self.init(key, jnp.zeros((1, self.config.max_position_embeddings), int))["params"])(
            key
        )

    @nn.nowrap
    def abstract_params(self) -> Params:
        """Return the parameter tree as ShapeDtypeStructs, without computing anything."""
        return jax.eval_shape(self.init_params, jax.random.key(0))
