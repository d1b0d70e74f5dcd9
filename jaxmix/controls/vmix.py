"""VMix: Improving Text-to-Image Diffusion Model with Cross-Attention Mixing Control (arXiv 2412.20800).

In every attn2, with the content's one attention map::

    x = softmax(Q K_c' / sqrt(d)) (V_c + scale * V_a),    V_a = W_V^a Z(F(f_t))

f_t holds one embedding per aesthetic dimension: that of its label if the image has it, else that of a rare token. F
mixes along the token axis (N dimensions to C text positions) and normalises; Z is linear with weight and bias starting
at zero, so an untrained adapter changes nothing, bit for bit.

The authors released no code, and the paper leaves three things open. Here W_V^a starts as a copy of W_V^c; the
unconditional row is the base model (its gate is 0); and the values are mixed once per prompt, outside the denoising
loop, since neither V_c nor V_a depends on the timestep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmix.control import KV, Control, Site
from jaxmix.rows import dataclass, gate, like, per_row
from jaxmix.types import Array, InputError, Params

#: Dimension -> (label, rare token that stands for its absence). The dimensions are the paper's; it names two of the
#: rare tokens ("[V]", "[S]"), the others follow their pattern.
PAPER_LABELS: dict[str, tuple[str, str]] = {
    "color": ("vibrant color", "[V]"),
    "lighting": ("natural lighting", "[S]"),
    "composition": ("proportional composition", "[T]"),
    "focus": ("sharp focus", "[U]"),
    "emotion": ("expressive emotion", "[W]"),
    "texture": ("fine texture", "[X]"),
}

ATTN2 = r"\.attn2$"


@dataclasses.dataclass(frozen=True)
class VMixConfig:
    """What an adapter was made for: static, hashable, stored in its file.

    ``labels`` are (dimension, label, rare token); ``tokens`` is the text length C, ``context_dim`` the width d of the
    text states, ``sites`` maps each attn2 to the width of its values.
    """

    labels: tuple[tuple[str, str, str], ...]
    tokens: int
    context_dim: int
    sites: tuple[tuple[str, int], ...]

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The names of the aesthetic dimensions, in order."""
        return tuple(name for name, _, _ in self.labels)


@dataclass
class VMixControl(Control):
    """Add ``scale * V_a`` to the values of every attn2 of the adapter.

    ``values`` maps a site's name to V_a (rows, C, d_inner), with 1 row if all images share one label set; ``scale`` is
    (rows,).
    """

    values: dict[str, Float[Array, "b s c"]] = per_row()
    scale: Float[Array, " b"] = gate()

    def kv(self, site: Site, a: KV) -> KV:
        """Mix the values; the keys, and so the attention map, stay those of the content."""
        if site.name not in self.values:
            return a
        va = self.values[site.name].astype(a.v.dtype)
        if a.v.shape[1] % va.shape[1]:
            raise InputError(f"VMix: found {a.v.shape[1]} text tokens, expected a multiple of {va.shape[1]}")
        va = jnp.tile(va, (1, a.v.shape[1] // va.shape[1], 1))  # for each chunk of a long prompt
        va = va.reshape(*va.shape[:2], *a.v.shape[2:])
        return KV(a.k, a.v + like(self.scale, va) * va)

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse an adapter made for another UNet."""
        missing = sorted(set(self.values) - {s.name for s in sites})
        if missing:
            raise InputError(
                f"VMix: found {len(missing)} of the adapter's {len(self.values)} sites missing in this UNet, such as "
                f"{missing[0]}, expected all of them"
            )


def init(key: Array, config: VMixConfig, aes_emb: Float[Array, "n 2 d"], base_values: Mapping[str, Array]) -> Params:
    """Return a fresh adapter's parameters.

    ``aes_emb`` (N, 2, d) holds the text embeddings, rare token at index 0 and label at 1; it is not trained.
    ``base_values`` gives each site's W_V^c (d, d_inner).
    """
    n, c, d = len(config.labels), config.tokens, config.context_dim
    bound = n**-0.5
    key_w, key_b = jax.random.split(key)
    return {
        "aes_emb": jnp.asarray(aes_emb, jnp.float32),
        "token_proj": {
            "kernel": jax.random.uniform(key_w, (n, c), jnp.float32, -bound, bound),
            "bias": jax.random.uniform(key_b, (c,), jnp.float32, -bound, bound),
        },
        "norm": {"scale": jnp.ones((d,)), "bias": jnp.zeros((d,))},
        "zero_proj": {"kernel": jnp.zeros((d, d)), "bias": jnp.zeros((d,))},
        # Copies: a training step donates the buffers of its state, which must not include those of the base.
        "to_v": {name: {"kernel": jnp.array(base_values[name], jnp.float32)} for name, _ in config.sites},
    }


def abstract_params(config: VMixConfig) -> Params:
    """Return the parameter tree of an adapter as ShapeDtypeStructs."""
    emb = jax.ShapeDtypeStruct((len(config.labels), 2, config.context_dim), jnp.float32)
    base = {name: jax.ShapeDtypeStruct((config.context_dim, inner), jnp.float32) for name, inner in config.sites}
    return jax.eval_shape(lambda k, e, b: init(k, config, e, b), jax.random.key(0), emb, base)


def aesthetic_context(params: Params, present: Float[Array, "b n"]) -> Float[Array, "b s d"]:
    """Return f_a = Z(F(f_t)), see above, for label sets ``present`` (b, N), 1 where the image has the label.

    Depends on the label set alone; no text encoder runs here.
    """
    emb = params["aes_emb"]
    f = jnp.where(present[..., None] > 0, emb[:, 1], emb[:, 0])
    f = jnp.einsum("bnd,nc->bcd", f, params["token_proj"]["kernel"]) + params["token_proj"]["bias"][:, None]
    f = f - f.mean(-1, keepdims=True)
    f = f * jax.lax.rsqrt(jnp.square(f).mean(-1, keepdims=True) + 1e-5)
    f = f * params["norm"]["scale"] + params["norm"]["bias"]
    return f @ params["zero_proj"]["kernel"] + params["zero_proj"]["bias"]


def bind(params: Params, present: Float[Array, "b n"], scale: Float[Array, " b"]) -> VMixControl:
    """Return the control of an adapter for label sets (b, N) and strengths (b,); differentiable in ``params``."""
    f = aesthetic_context(params, present)
    values = {name: f @ p["kernel"] for name, p in params["to_v"].items()}
    return VMixControl(values, jnp.asarray(scale, jnp.float32), sites=ATTN2)


def parse_labels(labels: str | Sequence[str], dimensions: Sequence[str]) -> np.ndarray:
    """Read label sets: "all", "none" or comma-separated dimensions, one string for all images or one per image.

    Returns float32 (1 or b, N). Raises `InputError` for an unknown dimension, listing the known ones.
    """
    rows = []
    for text in [labels] if isinstance(labels, str) else labels:
        if text in ("all", "none"):
            rows.append([float(text == "all")] * len(dimensions))
            continue
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        for name in chosen:
            if name not in dimensions:
                raise InputError(f"labels: found {name!r}, expected all, none or some of {', '.join(dimensions)}")
        rows.append([float(name in chosen) for name in dimensions])
    return np.asarray(rows, np.float32)


def label_pairs(labels: Mapping[str, tuple[str, str]] | None) -> tuple[tuple[str, str, str], ...]:
    """Return (dimension, label, rare token) triples, those of the paper if None is given."""
    chosen: Mapping[str, Any] = PAPER_LABELS if labels is None else labels
    out = []
    for name, pair in chosen.items():
        if isinstance(pair, str) or len(pair) != 2:
            raise InputError(f"labels: found {pair!r} for {name!r}, expected a pair (label, rare token)")
        out.append((name, *pair))
    if not out:
        raise InputError("labels: found none, expected at least one dimension")
    return tuple(out)
