"""The attention seam: sites, controls, and the one function through which all attention goes.

A method that edits attention is a `Control`: a pytree of arrays with a static pattern over site names. The UNet takes
a tuple of them as an explicit argument and applies the live ones left to right, so one trace serves any strengths, and
grad, vmap, remat and sharding of an adapter are plain JAX.

The stages, in the order in which they run::

    told     the text states that attn2 makes its keys and its values of, before the denoising loop
    kv       keys and values of attn2, before the denoising loop (they do not depend on the timestep)
    qkv      queries, keys and values
    logits   scaled scores before the softmax, float32; the only stage that forces the unfused path
    out      the mixed values before ``to_out``
    moments  mean and variance of a GroupNorm
    join     features and skip where a resnet of an up block joins them

Before them, ``prepare`` runs once per phase, outside the loop, and ``see`` once per call of the UNet, on its raw
inputs: this is where a network beside the UNet (ControlNet) computes what its ``join`` adds.

Rows are (sample, branch) with the branch minor: u0, c0, u1, c1, ... How strongly a control acts on a row is data
(`rows.gate`), never a ``chunk(2)``, so sharded rows stay on their device. A control whose rows look at earlier rows
says how far back those are (`rows.rows_back`): a distance is the same on every device, an index is not.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import jax
from jaxtyping import Float, Int

from jaxmix import kernels
from jaxmix.rows import Text, dataclass, static, take
from jaxmix.types import AnyArray, Array, InputError


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


class Told(NamedTuple):
    """The text states that one attn2 makes its keys and its values of: the same, unless a control says otherwise."""

    k: Float[AnyArray, "b s d"]
    v: Float[AnyArray, "b s d"]


class KV(NamedTuple):
    """Keys and values of one attn2 after projection and head split."""

    k: Float[Array, "b s h d"]
    v: Float[Array, "b s h d"]


class Moments(NamedTuple):
    """Mean and (biased) variance of a GroupNorm, float32, one of each per row and group."""

    mean: Float[Array, "b g"]
    var: Float[Array, "b g"]


@dataclass
class Control:
    """An edit of attention and features. Subclasses are final `jaxmix.rows.dataclass`es that override what they need.

    ``sites`` is a regular expression searched for in `Site.name`, among the sites of the overridden stages: attention
    layers (only attn2 for ``told`` and ``kv``), GroupNorms for ``moments``, the resnets of up blocks for ``join``. None
    means all of them. ``window`` is the share of the sampling steps, from start (0) to end (1), in which the control is
    live (`span` turns it into steps); outside it the sampler runs a separate scan without it.
    Numbers that may change without recompiling are arrays: convert with ``jnp.asarray(x, jnp.float32)``, since a
    Python float is weakly typed and costs one more trace.
    """

    sites: str | None = static(default=None, kw_only=True)
    window: tuple[float, float] = static(default=(0.0, 1.0), kw_only=True)

    #: What this control sets alone at each of its sites; two controls with a common claim exclude each other.
    claims: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Refuse a field with the name of a method, which it would hide: a field ``kv`` is not the stage."""
        super().__init_subclass__(**kwargs)
        for name in vars(cls).get("__annotations__", ()):
            if callable(getattr(Control, name, None)):
                raise TypeError(f"{cls.__name__}: found a field {name!r}, expected another name than a method's")

    def span(self, steps: int) -> tuple[int, int]:
        """Return the (start, stop) of the window among so many sampling steps: `rounded`, or another rule."""
        return rounded(self.window, steps)

    def at(self, step: Array, t: Array) -> Control:
        """Return the control as it is at one sampling step and its timestep; time enters a control only here."""
        return self

    def on(self) -> Array | None:
        """Return (traced, ()) whether the control does anything at all, None if its stages see to that themselves.

        For controls that change the shape of attention, whose result at strength 0 is the same only up to rounding:
        where this is false, `attend` runs as if the control were not there.
        """
        return None

    def told(self, site: Site, c: Told) -> Told:
        """Edit the text states of an attn2. Runs before the loop, so it must not depend on the step."""
        return c

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

        Override it if ``logits`` edits each query by itself and all heads alike: `attend` then never holds all the
        scores of a large grid at once.
        """
        return self

    def out(self, site: Site, a: QKV, o: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
        """Edit the attention output before ``to_out``; ``a`` is what the attention saw."""
        return o

    def moments(self, site: Site, m: Moments) -> Moments:
        """Edit the statistics of a GroupNorm."""
        return m

    def join(self, site: Site, x: Float[Array, "b h w c"], skip: Array) -> tuple[Array, Array]:
        """Edit the features and the skip (b, h, w, c2) that a resnet of an up block is about to join.

        At the very first, ``up_blocks.0.resnets.0``, the features are the output of the middle block.
        """
        return x, skip

    def prepare(self, text: Text, hw: tuple[int, int]) -> Control:
        """Return the control with everything computed that depends on neither latents nor step; ``hw``: latents' size.

        Runs once per phase, outside the loop. ``text`` has the same rows as the UNet's input: ``context`` (b, s, d),
        and SDXL's ``pooled`` and ``time_ids``.
        """
        return self

    def see(self, x: Float[Array, "b h w c"], t: Array, text: Text) -> Control:
        """Return the control for one call of the UNet with these rows, holding whatever it computes from them.

        ``x``, the timestep ``t`` () and ``text`` are the UNet's raw inputs.
        """
        return self

    def check(self, sites: Sequence[Site]) -> None:
        """Raise `InputError` if this control cannot work at the given sites; runs before anything is compiled."""


Controls = tuple[Control, ...]
_ATTENTION = ("qkv", "logits", "out")
_TEXT = ("told", "kv")


@functools.cache
def _pattern(sites: str) -> re.Pattern[str]:
    try:
        return re.compile(sites)
    except re.error as e:
        raise InputError(f"sites={sites!r} is not a regular expression: {e}") from None


def matches(control: Control, name: str) -> bool:
    """Return whether the control's pattern matches the site name."""
    return control.sites is None or _pattern(control.sites).search(name) is not None


def overrides(control: Control, stage: str) -> bool:
    """Return whether the control does anything at a stage."""
    return getattr(type(control), stage) is not getattr(Control, stage)


def _live(controls: Iterable[Control], site: Site, stage: str) -> list[Control]:
    return [c for c in controls if overrides(c, stage) and matches(c, site.name)]


def reach(
    control: Control, attention: Sequence[Site], norms: Sequence[Site] = (), joins: Sequence[Site] = ()
) -> list[Site]:
    """List the sites of a UNet at which the control's stages run, whatever its pattern says."""
    on_norms, on_joins = overrides(control, "moments"), overrides(control, "join")
    on_attention, on_text = (any(overrides(control, stage) for stage in some) for some in (_ATTENTION, _TEXT))
    found = [s for s in attention if on_attention or (on_text and s.name.endswith("attn2"))]
    if not any((on_attention, on_text, on_norms, on_joins)):
        found = list(attention)  # it overrides no stage
    return [*found, *(norms if on_norms else ()), *(joins if on_joins else ())]


def validate(
    controls: Sequence[Control], attention: Sequence[Site], norms: Sequence[Site] = (), joins: Sequence[Site] = ()
) -> None:
    """Check a tuple of controls against the sites of a UNet, before anything is compiled.

    Raises `InputError` for something that is not a control, a pattern that matches no site (with near misses), two
    controls that claim the same thing at one site, an impossible window, and whatever a control's own `check` finds.
    """
    claimed: dict[tuple[str, str], str] = {}
    for control in controls:
        kind = type(control).__name__
        if not isinstance(control, Control):
            raise InputError(f"controls: found {kind}, expected Control objects")
        start, stop = control.window
        if not 0.0 <= start < stop <= 1.0:
            raise InputError(f"{kind}: window={control.window} is not 0 <= start < stop <= 1")
        candidates = reach(control, attention, norms, joins)
        found = [s for s in candidates if matches(control, s.name)]
        if not found:
            names = [s.name for s in candidates]
            near = difflib.get_close_matches((control.sites or "").replace("\\", ""), names, n=3, cutoff=0.0)
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


def apply_told(site: Site, context: AnyArray, controls: Sequence[Control]) -> Told:
    """Apply the told stage of the controls that are live at an attn2 site to text states (b, s, d)."""
    c = Told(context, context)
    for control in _live(controls, site, "told"):
        c = control.told(site, c)
    return c


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


def apply_join(site: Site, x: Array, skip: Array, controls: Sequence[Control]) -> tuple[Array, Array]:
    """Apply the join stage of the controls that are live at a resnet of an up block."""
    for c in _live(controls, site, "join"):
        x, skip = c.join(site, x, skip)
    return x, skip


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
    """Attend without those controls, from number ``first`` on, that are off."""
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
        return edited(x[None, None], [take(c, row[None]).block(queries) for c in editors])[0, 0]

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


# Steps ----------------------------------------------------------------------------------------------------------------


def rounded(window: tuple[float, float], steps: int) -> tuple[int, int]:
    """Return the (start, stop) of a window in sampling steps, both ends rounded (halves to the even step).

    Windows that meet, such as (0, 0.3) and (0.3, 1), then meet at any number of steps, without a gap or an overlap.
    """
    return round(window[0] * steps), round(window[1] * steps)


def whole_steps(window: tuple[float, float], steps: int) -> tuple[int, int]:
    """Return the (start, stop) of the sampling steps that lie wholly in a window, the rule of diffusers' ControlNets.

    Step i is live where start <= i / steps and (i + 1) / steps <= stop, compared as diffusers compares them: 25 steps
    and an end of 0.3 make 7, where `rounded` makes 8. Windows that meet may leave a step to neither.
    """
    start, stop = window
    live = [i for i in range(steps) if not (i / steps < start or (i + 1) / steps > stop)]
    return (live[0], live[-1] + 1) if live else (0, 0)


def cut(spans: Sequence[tuple[int, int]], steps: int) -> list[tuple[int, int, frozenset[int]]]:
    """Cut ``steps`` sampling steps at the ends of spans of them.

    Returns ``(start, stop, indices of the spans that cover these steps)`` in order, from 0 to ``steps``.
    """
    cuts = sorted({0, steps, *(i for span in spans for i in span)})
    return [
        (start, stop, frozenset(i for i, (a, b) in enumerate(spans) if a <= start and stop <= b))
        for start, stop in itertools.pairwise(cuts)
    ]
