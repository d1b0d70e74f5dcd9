"""The forms that a LoRA's change of one module can have: what each adds to a weight W, and which shapes it needs.

A module's arrays, by role; (i, o) are the axes of W, which a convolution has behind its (h, w), and s = alpha / r::

    LoRA    down (.., i, r), up (.., r, o)                    s down @ up                       arXiv 2106.09685
    LoCon   and mid (h, w, n, m), down (1, 1, i, n),
            up (1, 1, m, o)                                   s sum_nm down[i,n] mid[n,m] up[m,o]
    LoHa    hada_w1_a (o, r), hada_w1_b (r, i h w), and w2    s (w1_a @ w1_b) * (w2_a @ w2_b)   arXiv 2108.06098
            or with hada_t1 (m, n, h, w), w1_a (m, o), w1_b (n, i), and t2
    LoKr    lokr_w1 (o1, i1), lokr_w2 (o2, i2, h, w)          s kron(w1, w2)                    arXiv 2309.14859
            or a and b of either, or of w2 with lokr_t2, as in LoHa
    full    diff, as W                                        diff
    DoRA    any of these and magnitude g (.., 1, o) or        g (W + dW) / |W + dW| - W         arXiv 2402.09353
            (.., i, 1)

`down`, `up`, `mid`, `diff` and `magnitude` have the layout of our kernels, those of LoHa and LoKr the layout of the
files, which is torch's. r is that of `down`, `hada_w1_b`, or the factor of LoKr that is a product (of two the second);
if neither is one, s is 1. DoRA's norm is over all axes but the one that g has. `diff_b` is added to a bias.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from jaxmix.types import Array

WEIGHTS = ("kernel", "scale", "embedding")
"""The leaves that are called `weight` in torch."""

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_TUCKER_LOHA = ("hada_t1", "hada_t2")
_HALVES = {w: (f"lokr_{w}", f"lokr_{w}_a", f"lokr_{w}_b") for w in ("w1", "w2")}
_LOKR = {*_HALVES["w1"], *_HALVES["w2"], "lokr_t2"}
_FORMS = ({"down", "up", "mid"}, {*_LOHA, *_TUCKER_LOHA}, _LOKR, {"diff"})


def kind(roles: Collection[str]) -> str:
    """Return the name of the form that has such roles, of which none is lacking: "LoRA", "LoHa with DoRA", ..."""
    if "down" in roles:
        name = "LoCon" if "mid" in roles else "LoRA"
    else:
        starts = {"hada_": "LoHa", "lokr_": "LoKr", "diff": "full"}
        name = next((name for start, name in starts.items() if any(r.startswith(start) for r in roles)), "nothing")
        if name == "full" and "diff" not in roles:
            return "bias"
    return f"{name} with DoRA" if "magnitude" in roles else name


def is_plain(roles: Collection[str]) -> bool:
    """Return whether a module has the factors of a plain LoRA and nothing else."""
    return set(roles) == {"down", "up", "alpha"}


def lacking(roles: Collection[str]) -> list[str]:
    """Return the roles without which a module's others mean nothing; see `too_many` for the opposite."""
    has = set(roles)
    needed: list[str] = []
    low_rank, loha, lokr, _ = (has & form for form in _FORMS)
    if low_rank:
        needed += ["down", "up"]
    if loha:
        needed += [*_LOHA, *(_TUCKER_LOHA if has & set(_TUCKER_LOHA) else ())]
    if lokr:
        for whole, *halves in _HALVES.values():
            if has & set(halves) or (whole == "lokr_w2" and "lokr_t2" in has):
                needed += halves
            elif whole not in has:
                needed.append(whole)
    if not any(has & form for form in _FORMS) and ("magnitude" in has or "diff_b" not in has):
        needed += ["down", "up"]
    return [role for role in needed if role not in has]


def too_many(roles: Collection[str]) -> bool:
    """Return whether a module has two forms at once, or one factor of LoKr both whole and as a product."""
    has = set(roles)
    twice = any(whole in has and has & set(halves) for whole, *halves in _HALVES.values())
    return sum(bool(has & form) for form in _FORMS) > 1 or twice or {"lokr_w2", "lokr_t2"} <= has


def rank(shapes: Shapes) -> int | None:
    """Return the rank that alpha is divided by, or None if the form has no alpha."""
    if "down" in shapes:
        return shapes["down"][-1]
    return next((shapes[role][0] for role in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if role in shapes), None)


def fits(shapes: Shapes, leaves: Shapes) -> bool:
    """Return whether a module's arrays, of which none is lacking, have shapes that fit its ``leaves``."""
    if "diff_b" in shapes and shapes["diff_b"] != leaves.get("bias"):
        return False
    if "diff" in shapes and shapes["diff"] != next((leaves[leaf] for leaf in WEIGHTS if leaf in leaves), None):
        return False
    roles = set(shapes) - {"diff_b", "diff", "alpha"}
    if not roles:
        return True
    kernel = leaves.get("kernel", ())
    if len(kernel) not in (2, 4):
        return False
    *space, i, o = kernel
    ones = (1,) * len(space)
    if "magnitude" in shapes and shapes["magnitude"] not in ((*ones, 1, o), (*ones, i, 1)):
        return False
    if "down" in shapes:
        return _fits_low_rank(shapes, kernel)
    if "hada_w1_a" in shapes:
        return all(
            _product_shape(shapes.get(t), shapes[a], shapes[b]) in _ways(o, i, tuple(space))
            for t, a, b in zip(_TUCKER_LOHA, _LOHA[::2], _LOHA[1::2], strict=True)
        )
    if roles == {"magnitude"}:
        return True
    first, second = (_factor_shape(shapes, w) for w in _HALVES)
    if first is None or second is None or len(first) != 2 or len(second) not in (2, 4) or 0 in first:
        return False
    return o % first[0] == i % first[1] == 0 and second in _ways(o // first[0], i // first[1], tuple(space))


def delta(f: Mapping[str, Array], shape: Shape) -> Array:
    """Return what a form adds to a weight of a shape, before `scale`, in the weight's layout and float32."""
    f = {role: x.astype(jnp.float32) for role, x in f.items() if role != "alpha"}
    if "diff" in f:
        return f["diff"].reshape(shape)
    if "down" in f:
        up = f["up"].reshape(f["up"].shape[-2:])
        if "mid" in f:
            down = f["down"].reshape(f["down"].shape[-2:])
            return _einsum("hwnm,in,mo->hwio", f["mid"], down, up)
        # Full precision even where float32 products are rounded by default (TPU, GPU).
        return jnp.matmul(f["down"], up, precision="highest")
    *space, i, o = shape
    if "hada_w1_a" in f:
        first, second = (
            _product(f.get(t), f[a], f[b]).reshape(o, i, *space)
            for t, a, b in zip(_TUCKER_LOHA, _LOHA[::2], _LOHA[1::2], strict=True)
        )
        made = first * second
    else:
        first, second = (_factor(f, w) for w in _HALVES)
        second = second.reshape(second.shape[0], i // first.shape[1], -1)
        made = _einsum("ac,bdk->abcdk", first, second).reshape(o, i, *space)
    return jnp.transpose(made, (*range(2, len(shape)), 1, 0))


def scale(f: Mapping[str, Array], strength: Any = 1.0) -> Array:
    """Return what `delta` is multiplied by: a strength times alpha / r, or the strength alone if there is no rank."""
    strength, r = jnp.asarray(strength, jnp.float32), rank({role: x.shape for role, x in f.items()})
    return strength if r is None else strength * jnp.asarray(f["alpha"], jnp.float32) / r


def with_magnitude(weight: Array, magnitude: Array) -> Array:
    """Return a weight with the norms along the axes that ``magnitude`` does not have set to it, in float32.

    Rows whose norm is zero have no direction and stay zero.
    """
    axes = tuple(axis for axis, size in enumerate(magnitude.shape) if size == 1)
    square = jnp.sum(weight * weight, axes, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return magnitude.astype(jnp.float32) * (weight / norm)


def _fits_low_rank(shapes: Shapes, kernel: Shape) -> bool:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    *space, i, o = kernel
    ones = (1,) * len(space)
    if len(down) != len(kernel) or len(up) != len(kernel) or 0 in (down[-1], up[-2]):
        return False
    if mid is None:
        return down[:-1] == kernel[:-1] and up == (*ones, down[-1], o)
    return (
        bool(space)
        and (down[:-1], up) == ((*ones, i), (*ones, up[-2], o))
        and mid == (*space, down[-1], up[-2])
    )  # fmt: skip


def _ways(o: int, i: int, space: Shape) -> tuple[Shape, ...]:
    """Return the shapes that a weight (o, i) with spatial axes may have in a file."""
    flat, whole = (o, i * math.prod(space)), (o, i, *(space or (1, 1)))
    return flat, whole


def _product_shape(t: Shape | None, a: Shape, b: Shape) -> Shape | None:
    """Return the shape of a factor from that of its halves, or None if they do not fit each other."""
    if len(a) != 2 or len(b) != 2 or 0 in (*a, *b):
        return None
    if t is None:
        return (a[0], b[1]) if a[1] == b[0] else None
    return (a[1], b[1], *t[2:]) if len(t) == 4 and t[:2] == (a[0], b[0]) else None


def _product(t: Array | None, a: Array, b: Array) -> Array:
    """Return a factor from its halves: (o, r) @ (r, i ..), or around a Tucker core (m, n, h, w)."""
    return jnp.matmul(a, b, precision="highest") if t is None else _einsum("mnhw,mo,ni->oihw", t, a, b)


def _factor_shape(shapes: Shapes, w: str) -> Shape | None:
    whole, a, b = _HALVES[w]
    core = shapes.get("lokr_t2") if w == "w2" else None
    return shapes[whole] if whole in shapes else _product_shape(core, shapes[a], shapes[b])


def _factor(f: Mapping[str, Array], w: str) -> Array:
    whole, a, b = _HALVES[w]
    return f[whole] if whole in f else _product(f.get("lokr_t2") if w == "w2" else None, f[a], f[b])


def _einsum(of: str, *arrays: Array) -> Array:
    return jnp.einsum(of, *arrays, precision="highest")
