"""StyleAligned: Style Aligned Image Generation via Shared Attention (arXiv 2312.02133), and its swapped variant.

In every attn1, within one branch of a group of rows whose first is the reference::

    Q' = AdaIN(Q, Q_ref),  K' = AdaIN(K, K_ref)
    x = softmax(Q' [K', scale K_ref]' / sqrt(d) + [0, shift]) [V, V_ref]

Visual Style Prompting (arXiv 2402.12974) is the swap variant: K and V are the reference's, Q is left as it is.

The defaults are those of the authors' code, the source of the score scale and shift, the level and the sharing of
GroupNorm statistics; its LayerNorm sharing is left out, since it changes nothing. The shift is one more channel of
queries and keys rather than a bias, so the fused kernels run. ``strength`` is ours: it weighs the reference's part of
the softmax and the AdaIN; 1 is the paper's and 0 the base model, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxmix.control import QKV, Control, Moments, Site
from jaxmix.rows import dataclass, like, numbers, others, per_row, rows_back, static
from jaxmix.types import Array, InputError

EPS = 1e-5
_CHANNELS = 8  # added for the shift, one of them in use: kernels want heads of multiples of 8
_NEVER = -1000.0  # in the place of log 0: half precision holds it, and its exponential is 0


@dataclass
class StyleAlignedControl(Control):
    """Let rows also attend to the reference of their group.

    ``peers`` (rows, m) says how many samples back of a row its group's members are, the reference first; m is 1, or
    with ``full`` the size of all groups. ``strength`` (rows,) is 0 to 1, ``scale`` (rows,) multiplies the scores of
    the reference's keys and ``bias`` (rows,), None for 0, is added to them; neither touches the reference itself.
    """

    peers: Int[Array, "b m"] = rows_back()
    strength: Float[Array, " b"] = per_row()
    scale: Float[Array, " b"] = per_row()
    bias: Float[Array, " b"] | None = per_row(default=None)
    adain: tuple[str, ...] = static(default=("q", "k"))
    full: bool = static(default=False)
    swap: bool = static(default=False)
    norms: bool = static(default=False)

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        """The keys, and also their places unless a row's own keys still come first."""
        return frozenset({"keys", "places of the keys"} if self.full or self.swap else {"keys"})

    def on(self) -> Array:
        """Return whether anything is shared: doubled keys change the last bits even if they have no weight."""
        return jnp.any(self.strength > 0)

    def qkv(self, site: Site, a: QKV) -> QKV:
        """Align queries and keys with the reference's, and append (or take over) its keys and values."""
        if self.full:
            rows = jnp.arange(a.k.shape[0])[:, None] - self.peers
            k, v = (x[rows].reshape(x.shape[0], -1, *x.shape[2:]) for x in (a.k, a.v))
            return QKV(a.q, k, v)
        back, strength = self.peers[:, 0], like(self.strength, a.q)

        def towards(x: Array, y: Array) -> Array:
            return (1 - strength) * x + strength * y

        q, k, v = (
            towards(x, adain(x, others(back, x))) if name in self.adain else x for name, x in zip("qkv", a, strict=True)
        )
        k_ref, v_ref = others(back, k), others(back, v)
        if self.swap:
            return QKV(q, towards(k, k_ref), towards(v, v_ref))
        scale = like(jnp.where(back == 0, 1.0, self.scale), k)
        if self.bias is None:
            return QKV(q, jnp.concatenate([k, scale * k_ref], 1), jnp.concatenate([v, v_ref], 1))
        d = q.shape[-1]
        bias = jnp.where(back == 0, 0.0, self.bias) * math.sqrt(d + _CHANNELS)
        bias = jnp.broadcast_to(like(bias, k), (*k.shape[:3], 1))
        none = jnp.zeros_like(k[..., :1])
        q = q * jnp.asarray(math.sqrt((d + _CHANNELS) / d), q.dtype)  # scores are divided by the wider root
        return QKV(
            _wider(q, jnp.ones_like(q[..., :1])),
            jnp.concatenate([_wider(k, none), _wider(scale * k_ref, bias)], 1),
            jnp.concatenate([_wider(v, none), _wider(v_ref, none)], 1),
        )

    def out(self, site: Site, a: QKV, o: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
        """Drop the channels that carried the bias."""
        return o if self.bias is None or self.full or self.swap else o[..., :-_CHANNELS]

    def moments(self, site: Site, m: Moments) -> Moments:
        """Take the statistics over the pixels of the row and its reference together."""
        if not self.norms:
            return m
        mean, var = (others(self.peers[:, 0], x) for x in m)
        # The mean of the variances, and the variance of the means.
        together = Moments((m.mean + mean) / 2, (m.var + var) / 2 + jnp.square((m.mean - mean) / 2))
        strength = like(self.strength, m.mean)
        mixed = ((1 - strength) * x + strength * y for x, y in zip(m, together, strict=True))
        return Moments(*(jnp.where(strength > 0, y, x) for x, y in zip(m, mixed, strict=True)))


def adain(x: Float[Array, "b n h d"], ref: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
    """Give the tokens of each row, head and channel the mean and (unbiased) standard deviation of ``ref``."""

    def moments(y: Array) -> tuple[Array, Array]:
        y = y.astype(jnp.float32)
        return y.mean(1, keepdims=True), jnp.sqrt(y.var(1, keepdims=True, ddof=1) + EPS)

    (mean, std), (mean_ref, std_ref) = moments(x), moments(ref)
    return (std_ref * (x.astype(jnp.float32) - mean) / std + mean_ref).astype(x.dtype)


def _wider(x: Array, extra: Array) -> Array:
    return jnp.concatenate([x, extra.astype(x.dtype), jnp.zeros((*x.shape[:-1], _CHANNELS - 1), x.dtype)], -1)


def bind(
    groups: Sequence[int],
    *,
    sites: str = r"\.attn1$",
    strength: float | Sequence[float] = 1.0,
    scale: float | Sequence[float] = 1.0,
    shift: float | Sequence[float] = 0.0,
    adain: Sequence[str] = ("q", "k"),
    full: bool = False,
    swap: bool = False,
    norms: bool = False,
    window: tuple[float, float] = (0.0, 1.0),
) -> StyleAlignedControl:
    """Return the control for rows in ``groups`` of these sizes, the reference first in each.

    ``strength``, ``scale`` and ``shift`` are one number, or one per row. Raises `InputError` for a group of one,
    numbers of a wrong length or out of range, and options that `full` and `swap` do not allow.
    """
    groups = list(groups)
    if not groups or min(groups) < 2:
        raise InputError(f"groups: found sizes {groups}, expected at least two images, the reference and one more")
    if full and swap:
        raise InputError("full and swap: found both, expected the one or the other")
    if full and len(set(groups)) > 1:
        raise InputError(f"full: found groups of {sorted(set(groups))} images, expected groups of one size")
    if bad := [name for name in adain if name not in "qkv"]:
        raise InputError(f"adain: found {bad[0]!r}, expected some of q, k, v")
    n = sum(groups)

    strengths = numbers("strength", strength, n)
    scales, shifts = numbers("score_scale", scale, n), numbers("score_shift", shift, n)
    if strengths.min() < 0 or strengths.max() > 1:
        raise InputError(f"strength: found {strength!r}, expected numbers from 0 to 1")
    partial = len(set(strengths.tolist())) > 1 or strengths[0] not in (0, 1)
    if full and (partial or shifts.any() or (scales != 1).any()):
        raise InputError("full: all keys count alike, expected strength 0 or 1 in all rows, scale 1 and shift 0")
    starts = np.cumsum([0, *groups[:-1]])
    members = max(groups) if full else 1
    peers = [[i - member for member in range(members)] for size in groups for i in range(size)]
    assert len(peers) == n == starts[-1] + groups[-1]
    bias = None
    if partial or shifts.any():
        with np.errstate(divide="ignore"):
            bias = jnp.asarray(np.maximum(np.log(strengths) + shifts, _NEVER), jnp.float32)
    return StyleAlignedControl(
        peers=jnp.asarray(peers, jnp.int32),
        strength=jnp.asarray(strengths),
        scale=jnp.asarray(scales),
        bias=bias,
        adain=() if full else tuple(adain),
        full=full,
        swap=swap,
        norms=norms,
        sites=sites,
        window=window,
    )


def unshared(layers: int, level: float) -> list[bool]:
    """Return which of ``layers`` attn1 layers are not shared at a level from 0 (none of them) to 1 (all).

    The authors' rule, which meets the level only roughly: every (layers // floor(level * layers))-th layer, and for
    levels above one half all but those that 1 - level would pick. Raises `InputError` for a level other than 0 and 1
    that picks no layer, where the authors' code divides by zero.
    """
    if level in (0, 1):
        return [level == 1] * layers
    if not 0 < level < 1:
        raise InputError(f"level: found {level}, expected a number from 0 to 1")
    rest = 1 - level if level > 0.5 else level
    chosen = int(rest * layers)
    if chosen == 0:
        raise InputError(f"level: found {level}, which is less than one of {layers} layers, expected 0 or more")
    return [(i % (layers // chosen) == 0) != (level > 0.5) for i in range(layers)]
