"""The attention seam: sites, controls, and the one function through which all attention goes.

A method that edits attention is a `Control`: a pytree of arrays with a static pattern over site names. The UNet takes
a tuple of them as an explicit argument and applies the live ones left to right, so one trace serves any strengths, and
grad, vmap, remat and sharding of an adapter are plain JAX.

The stages, in the order in which an attention layer meets them::

    kv       keys and values of attn2, before the denoising loop (they do not depend on the timestep)
    qkv      queries, keys and values
    logits   scaled scores before the softmax, float32; the only stage that forces the unfused path
    out      the mixed values before ``to_out``
    moments  mean and variance of a GroupNorm

Rows are (sample, branch) with the branch minor: u0, c0, u1, c1, ... Which row gets how much is data (`gate`), never a
``chunk(2)``, so sharded rows stay on their device. A control whose rows look at other rows says how far before them
those stand (`rows_back`): a distance is the same on every device, an index is not.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from jaxmix import kernels
from jaxmix.types import Array, InputError


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in a UNet that controls can reach; static and hashable.

    ``name`` is the diffusers name of the attention or norm module, ``heads`` its number of heads (0 for a norm) and
    ``hw`` the height and width of its query grid (of its input, for a norm).
    """

    name: str
    heads: int
    hw: tuple[int, int]


class QKV(NamedTuple):
    """Queries, keys and values after projection and head split, unscaled."""

    q: Float[Array, "b n h d"]
    k: Float[Array, "b s h d"]
    v: Float[Array, "b s h d"]


class KV(NamedTuple):
    """Keys and values of one attn2 after projection and head split."""

    k: Float[Array, "b s h d"]
    v: Float[Array, "b s h d"]


class Moments(NamedTuple):
    """Mean and (biased) variance of a GroupNorm, float32, one of each per row and group."""

    mean: Float[Array, "b g"]
    var: Float[Array, "b g"]


def per_row(**kwargs: Any) -> Any:
    """Declare a control's field whose leaves have a leading row axis (1 means: the same for all rows)."""
    return struct.field(metadata={"rows": "row"}, **kwargs)


def gate(**kwargs: Any) -> Any:
    """Declare a control's per-row strength, shape (b,) or (1,): like `per_row`, and 0 on unconditional rows."""
    return struct.field(metadata={"rows": "gate"}, **kwargs)


def rows_back(**kwargs: Any) -> Any:
    """Declare how many samples before its own each row finds another one that it looks at, int32 (b,) or (1,).

    0 is the row itself. Both rows must be in one batch and on one device, which `check_batches` holds.
    """
    return struct.field(metadata={"rows": "back"}, **kwargs)


def static(**kwargs: Any) -> Any:
    """Declare a static field of a control: hashable, part of the trace, changing it recompiles."""
    return struct.field(pytree_node=False, **kwargs)


@struct.dataclass
class Control:
    """An edit of attention. Subclasses are final ``flax.struct`` dataclasses that override the stages they need.

    ``sites`` is a regular expression searched in `Site.name`. ``window`` is the share of the sampling steps, from
    start (0) to end (1), in which the control is live; outside of it the sampler runs a separate scan without it.
    Numbers that may change without recompiling are arrays: convert with ``jnp.asarray(x, jnp.float32)``, since a
    Python float is weakly typed and costs one more trace.
    """

    sites: str = struct.field(pytree_node=False, default=r"\.attn[12]$", kw_only=True)
    window: tuple[float, float] = struct.field(pytree_node=False, default=(0.0, 1.0), kw_only=True)

    #: What this control takes for itself at each of its sites; two controls with a common claim exclude each other.
    claims: ClassVar[frozenset[str]] = frozenset()

    def at(self, step: Array, t: Array) -> Control:
        """Return the control as it is at one sampling step and its timestep; time enters a control only here."""
        return self

    def on(self) -> Array | None:
        """Say (traced, ()) whether the control does anything at all; None: its stages do nothing by themselves then.

        For controls that give attention another shape, whose result at strength 0 is the same only up to rounding:
        where this is false, `attend` runs as if the control were not there.
        """
        return None

    def kv(self, site: Site, a: KV) -> KV:
        """Edit the keys and values of an attn2. Runs before the loop, so it must not depend on the step."""
        return a

    def qkv(self, site: Site, a: QKV) -> QKV:
        """Edit queries, keys and values."""
        return a

    def logits(self, site: Site, x: Float[Array, "b h n s"]) -> Float[Array, "b h n s"]:
        """Edit the scaled scores, float32. Overriding this stage forces the unfused path at the control's sites."""
        return x

    def block(self, queries: Int[Array, " m"]) -> Control:
        """Return the control for the scores (1, 1, m, s) of some queries of one row and head.

        Overriding it says that ``logits`` edits each query by itself and all heads alike: where scores are many,
        `attend` then never holds all of them.
        """
        return self

    def out(self, site: Site, a: QKV, o: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
        """Edit the attention output before ``to_out``; ``a`` is what the attention saw."""
        return o

    def moments(self, site: Site, m: Moments) -> Moments:
        """Edit the statistics of a GroupNorm."""
        return m

    def check(self, sites: Sequence[Site]) -> None:
        """Raise `InputError` if this control cannot work at the given sites; runs before anything is compiled."""


Controls = tuple[Control, ...]
_STAGES = ("kv", "qkv", "logits", "out", "moments")
C = TypeVar("C", bound=Control)


@functools.cache
def _pattern(sites: str) -> re.Pattern[str]:
    try:
        return re.compile(sites)
    except re.error as e:
        raise InputError(f"sites={sites!r} is not a regular expression: {e}") from None


def matches(control: Control, name: str) -> bool:
    """Say whether the control's pattern finds the site name."""
    return _pattern(control.sites).search(name) is not None


def overrides(control: Control, stage: str) -> bool:
    """Say whether the control does anything at a stage."""
    return getattr(type(control), stage) is not getattr(Control, stage)


def _live(controls: Iterable[Control], site: Site, stage: str) -> list[Control]:
    return [c for c in controls if overrides(c, stage) and matches(c, site.name)]


def validate(controls: Sequence[Control], attention: Sequence[Site], norms: Sequence[Site] = ()) -> None:
    """Check a tuple of controls against the sites of a UNet, before anything is compiled.

    Raises `InputError` for something that is not a control, a pattern that matches no site (with near misses), two
    controls that claim the same thing at one site, an impossible window, and whatever a control's own `check` finds.
    """
    claimed: dict[tuple[str, str], str] = {}
    for control in controls:
        kind = type(control).__name__
        if not isinstance(control, Control):
            raise InputError(f"controls: expected Control objects, found {kind}")
        start, stop = control.window
        if not 0.0 <= start < stop <= 1.0:
            raise InputError(f"{kind}: window={control.window} is not 0 <= start < stop <= 1")
        on_norms = overrides(control, "moments")
        on_attention = any(overrides(control, s) for s in _STAGES[:-1]) or not on_norms
        candidates = [*(attention if on_attention else ()), *(norms if on_norms else ())]
        if overrides(control, "kv") and not any(overrides(control, s) for s in ("qkv", "logits", "out", "moments")):
            candidates = [s for s in candidates if s.name.endswith("attn2")]
        found = [s for s in candidates if matches(control, s.name)]
        if not found:
            names = [s.name for s in candidates]
            near = difflib.get_close_matches(control.sites.replace("\\", ""), names, n=3, cutoff=0.0)
            raise InputError(
                f"{kind}: sites={control.sites!r} matches none of the {len(names)} sites; near misses: "
                + (", ".join(near) or "none")
            )
        for site in found:
            for claim in control.claims:
                other = claimed.setdefault((site.name, claim), kind)
                if other != kind or sum(type(c) is type(control) and matches(c, site.name) for c in controls) > 1:
                    raise InputError(f"{kind} and {other} exclude each other at {site.name}: both set its {claim}")
        control.check(found)


def apply_kv(site: Site, a: KV, controls: Sequence[Control]) -> KV:
    """Apply the kv stage of the controls that are live at an attn2 site."""
    for c in _live(controls, site, "kv"):
        a = c.kv(site, a)
    return a


def apply_moments(site: Site, m: Moments, controls: Sequence[Control]) -> Moments:
    """Apply the moments stage of the controls that are live at a norm site."""
    for c in _live(controls, site, "moments"):
        m = c.moments(site, m)
    return m


def attend(
    site: Site, a: QKV, controls: Sequence[Control] = (), *, return_probs: bool = False
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n s"] | None]:
    """Run one attention layer under the live controls; the one place where a kernel is chosen.

    Softmax is float32 over keys, scale 1/sqrt(d). `jaxmix.kernels.choose` names the kernel, unless scores are edited or
    asked for: those take XLA. Returns the output before ``to_out`` and, if asked, the attention probabilities, for
    which every control counts as on.
    """
    live = [c for c in controls if matches(c, site.name)]
    if return_probs:
        return _attend(site, a, live, return_probs=True)
    return _switched(site, a, live, 0), None


def _switched(site: Site, a: QKV, controls: list[Control], first: int) -> Float[Array, "b n h d"]:
    """Attend without those of the controls, from number ``first`` on, that are not on."""
    i = next((i for i in range(first, len(controls)) if controls[i].on() is not None), None)
    if i is None:
        return _attend(site, a, controls)[0]
    without = [*controls[:i], *controls[i + 1 :]]
    return jax.lax.cond(
        controls[i].on(), lambda a: _switched(site, a, controls, i + 1), lambda a: _switched(site, a, without, i), a
    )


def _attend(
    site: Site, a: QKV, controls: Sequence[Control], *, return_probs: bool = False
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n s"] | None]:
    for c in _live(controls, site, "qkv"):
        a = c.qkv(site, a)
    editors = _live(controls, site, "logits")
    b, n, h, d = a.q.shape
    s = a.k.shape[1]
    probs = None

    def edited(x: Array, some: Sequence[Control]) -> Array:
        return functools.reduce(lambda x, c: c.logits(site, x), some, x)

    def whole(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        probs = jax.nn.softmax(edited(kernels.scores(q, k).reshape(b, h, n, s), editors), axis=-1)
        return kernels.mix(probs.reshape(b * h, n, s), v), probs

    def block(row: Array, queries: Array, x: Array) -> Array:
        return edited(x[None, None], [take_rows(c, row[None]).block(queries) for c in editors])[0, 0]

    if return_probs:
        o, probs = whole(*a)
    elif editors:
        edit = block if all(overrides(c, "block") for c in editors) else None
        o = kernels.edited(n, s, b * h, lambda *a: whole(*a)[0], edit)(*a)
    else:
        o = kernels.choose(n, s, d, a.v.dtype, b * h)(*a)
    for c in _live(controls, site, "out"):
        o = c.out(site, a, o)
    return o, probs if return_probs else None


# Rows -----------------------------------------------------------------------------------------------------------------


def _map_rows(control: C, fn: Any) -> C:
    changed = {}
    for f in dataclasses.fields(control):
        kind = f.metadata.get("rows")
        if kind:
            value = getattr(control, f.name)
            changed[f.name] = jax.tree.map(lambda x, f=f, kind=kind: fn(x, kind, f.name), value)
    return dataclasses.replace(control, **changed)


def tile_rows(control: C, n: int) -> C:
    """Give every per-row leaf of a control ``n`` rows; leaves of one row are repeated.

    Raises `InputError` for a leaf that has neither one row nor ``n``.
    """

    def tile(x: Array, kind: str, name: str) -> Array:
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[0] not in (1, n):
            found = x.shape[0] if x.ndim else "no"
            raise InputError(f"{type(control).__name__}.{name}: found {found} rows, expected 1 or {n}")
        return jnp.broadcast_to(x, (n, *x.shape[1:]))

    return _map_rows(control, tile)


def take_rows(control: C, rows: Array) -> C:
    """Select rows of a control whose leaves have all been tiled."""
    return _map_rows(control, lambda x, kind, name: x[rows])


def to_branches(control: C, live: Sequence[float] = (0.0, 1.0)) -> C:
    """Repeat each sample's row once a branch (branch minor) and multiply the gates by ``live[branch]``.

    Distances between samples become distances between rows of the same branch.
    """

    def expand(x: Array, kind: str, name: str) -> Array:
        y = jnp.repeat(x, len(live), axis=0)
        if kind == "gate":
            on = jnp.tile(jnp.asarray(live, y.dtype), x.shape[0]).reshape(-1, *([1] * (y.ndim - 1)))
            y = y * on
        return y * len(live) if kind == "back" else y

    return _map_rows(control, expand)


def check_batches(control: Control, n: int, rows: int) -> None:
    """Raise `InputError` if one of ``n`` tiled rows looks out of its part of ``rows`` rows (a batch, a device)."""

    def look(x: Array, kind: str, name: str) -> Array:
        for i, backs in enumerate(np.asarray(x).reshape(n, -1)) if kind == "back" else ():
            first, last = i - i % rows, min(i - i % rows + rows, n) - 1
            for other in i - backs:
                if not first <= other <= last:
                    raise InputError(
                        f"{type(control).__name__}: row {i} needs row {other}, and rows {first} to {last} are drawn "
                        "together on one device: expected a batch size, and a share of each device, of whole groups"
                    )
        return x

    _map_rows(control, look)


def row_specs(control: C, axis: str) -> C:
    """Return the control with each leaf replaced by its PartitionSpec: rows over ``axis``, the rest replicated."""
    replicated = jax.tree.map(lambda _: PartitionSpec(), control)
    return _map_rows(replicated, lambda x, kind, name: PartitionSpec(axis))


def other_rows(back: Array, x: Array) -> Array:
    """Return for each row of ``x`` (b, ...) the one that stands ``back`` (b,) rows before it."""
    return x[jnp.arange(x.shape[0]) - back]


def rows_like(strength: Float[Array, " b"], x: Array) -> Array:
    """Reshape a per-row strength so that it broadcasts against ``x`` (b, ...), in the dtype of ``x``."""
    return strength.reshape(-1, *([1] * (x.ndim - 1))).astype(x.dtype)


def phases(controls: Sequence[Control], steps: int) -> list[tuple[int, int, Controls]]:
    """Cut ``steps`` sampling steps where the set of live controls changes.

    Returns ``(start, stop, live controls)`` in order, covering 0 to ``steps``, as `cut` does.
    """
    live = cut([c.window for c in controls], steps)
    return [(start, stop, tuple(controls[i] for i in sorted(found))) for start, stop, found in live]


def cut(windows: Sequence[tuple[float, float]], steps: int) -> list[tuple[int, int, frozenset[int]]]:
    """Cut ``steps`` sampling steps at the ends of windows.

    Returns ``(start, stop, indices of the windows that hold these steps)`` in order, covering 0 to ``steps``. A window
    (a, b) covers the step indices i with round(a * steps) <= i < round(b * steps).
    """
    spans = [(round(a * steps), round(b * steps)) for a, b in windows]
    cuts = sorted({0, steps, *(i for span in spans for i in span)})
    return [
        (start, stop, frozenset(i for i, (a, b) in enumerate(spans) if a <= start and stop <= b))
        for start, stop in itertools.pairwise(cuts)
    ]
