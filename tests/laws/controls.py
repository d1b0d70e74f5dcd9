"""One small control a stage, as a method would write it."""

import jax.numpy as jnp
from flax import struct

from jaxmix import KV, QKV, Control, Moments, gate
from jaxmix.control import Told
from jaxmix.rows import like as rows_like


@struct.dataclass
class TellTwice(Control):
    """told: makes the values of states of another size."""

    scale: jnp.ndarray = gate()

    def told(self, site, c):
        return Told(c.k, c.v + rows_like(self.scale, c.v) * c.v)


@struct.dataclass
class ShiftValues(Control):
    """kv: adds a constant to the values of an attn2."""

    scale: jnp.ndarray = gate()

    def kv(self, site, a):
        return KV(a.k, a.v + rows_like(self.scale, a.v) * 0.5)


@struct.dataclass
class FlipKeys(Control):
    """qkv: mixes each key with that of the opposite token."""

    scale: jnp.ndarray = gate()

    def qkv(self, site, a):
        s = rows_like(self.scale, a.k)
        return QKV(a.q, a.k + s * (a.k[:, ::-1] - a.k), a.v)


@struct.dataclass
class FavourFirst(Control):
    """logits: raises the score of the first key."""

    scale: jnp.ndarray = gate()

    def logits(self, site, x):
        return x.at[..., 0].add(rows_like(self.scale, x)[..., 0] * 2.0)


@struct.dataclass
class FadeOut(Control):
    """out: weakens the layer's output, more so at later steps."""

    scale: jnp.ndarray = gate()
    strength: jnp.ndarray = struct.field(default_factory=lambda: jnp.ones((), jnp.float32))

    def at(self, step, t):
        return self.replace(strength=self.strength * (1.0 + step))

    def out(self, site, a, o):
        return o - rows_like(self.scale * self.strength, o) * 0.1 * o


@struct.dataclass
class WidenNorm(Control):
    """moments: shifts the mean and widens the variance."""

    scale: jnp.ndarray = gate()

    def moments(self, site, m):
        s = rows_like(self.scale, m.mean)
        return Moments(m.mean + s * 0.1, m.var * (1.0 + s))


@struct.dataclass
class Claiming(FlipKeys):
    """A control that wants the keys of its sites for itself."""

    claims = frozenset({"keys"})


# (class, sites) of one control a stage, on attn1, attn2 and norms.
CASES = {
    "told on attn2": (TellTwice, r"\.attn2$"),
    "kv on attn2": (ShiftValues, r"\.attn2$"),
    "qkv on attn1": (FlipKeys, r"\.attn1$"),
    "qkv on attn2": (FlipKeys, r"\.attn2$"),
    "logits on attn1": (FavourFirst, r"\.attn1$"),
    "logits on attn2": (FavourFirst, r"\.attn2$"),
    "out on attn1": (FadeOut, r"\.attn1$"),
    "out on attn2": (FadeOut, r"\.attn2$"),
    "moments on norms": (WidenNorm, r"norm"),
}


def make(case: str, scale, sites: str | None = None, **kwargs) -> Control:
    """Return the control of a case at a strength (number or (b,))."""
    kind, where = CASES[case]
    return kind(scale=jnp.atleast_1d(jnp.asarray(scale, jnp.float32)), sites=sites or where, **kwargs)
