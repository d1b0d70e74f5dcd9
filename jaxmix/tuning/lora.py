"""LoRA: low-rank additions to weights (arXiv 2106.09685), the weights seam ``params -> params``.

For a module with kernel W (in, out), or (h, w, in, out) for a convolution::

    W' = W + strength * alpha / r * down @ up,    down (.., in, r),  up (r, out) or (1, 1, r, out)

`merge` writes W' and costs nothing when sampling: shapes stay, so another strength or another LoRA does not recompile.
`attach` leaves W alone and passes the factors to the layers, which compute ``x W + (x down) up``: for training, where a
merged copy would hold every target twice, and its gradient would be as large as W.

Here a LoRA is one part's ``{module: {"down", "up", "alpha"}}``, modules under their dotted diffusers names; r may
differ from module to module. `merge` also takes the other forms (`jaxmix.lora_forms`), which may change biases, norms
and embeddings, too.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix import lora_forms as forms
from jaxmix.types import Array, InputError, Params

Factors: TypeAlias = Mapping[str, Mapping[str, Array]]
"""``{module: {"down": (.., in, r), "up": (.., r, out), "alpha": ()}}``, or the arrays of another form."""

Modules: TypeAlias = Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]]
"""``{module: (path, {leaf: array})}``, see `modules`."""


def targets(params: Params) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Return ``{module: (path, kernel)}`` of every module of a tree that a LoRA can change."""
    found = {}
    for path, leaf in _leaves(params, ()):
        if path[-1] == "kernel" and len(leaf.shape) in (2, 4):
            found[".".join(path[:-1])] = path[:-1], leaf
    return found


def modules(params: Params) -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    """Return ``{module: (path, {leaf: array})}`` of all that a form can change: kernels, norms, embeddings."""
    found: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {}
    for path, leaf in _leaves(params, ()):
        found.setdefault(".".join(path[:-1]), (path[:-1], {}))[1][path[-1]] = leaf
    return {name: module for name, module in found.items() if set(forms.WEIGHTS) & set(module[1])}


def init(key: Array, params: Params, pattern: str, rank: int, alpha: float | None = None) -> dict[str, dict[str, Any]]:
    """Return a fresh LoRA for the modules whose names match the regular expression ``pattern`` anywhere.

    ``down`` is uniform within 1/sqrt(fan-in), like a fresh torch layer; ``up`` is zero, so nothing changes yet.
    ``alpha`` is the rank if None. Raises `InputError` for a rank below 1, or a pattern that matches no module.
    """
    if rank < 1:
        raise InputError(f"lora rank: found {rank}, expected 1 or more")
    modules = targets(params)
    chosen = choose(modules, pattern, "lora pattern")
    return {
        name: fresh(jax.random.fold_in(key, i), modules[name][1].shape, rank, alpha) for i, name in enumerate(chosen)
    }


def choose(modules: Collection[str], pattern: str, where: str) -> list[str]:
    """Return the modules in whose names a regular expression is found, in order.

    Raises `InputError` starting with ``where`` if it is none, or found in no name, with near misses.
    """
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise InputError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
    chosen = sorted(name for name in modules if search(name))
    if not chosen:
        near = difflib.get_close_matches(pattern.replace("\\", ""), modules, n=3, cutoff=0.0)
        raise InputError(
            f"{where}: {pattern!r} matches none of the {len(modules)} modules; near misses: {', '.join(near)}"
        )
    return chosen


def fresh(key: Array, shape: tuple[int, ...], rank: int, alpha: float | None = None) -> dict[str, Any]:
    """Return the factors of one module before training, for a kernel of a shape."""
    *space, fan, o = shape
    return {
        "down": _uniform(key, (*space, fan, rank), (math.prod(space) * fan) ** -0.5),
        "up": jnp.zeros((*[1] * len(space), rank, o), jnp.float32),
        "alpha": jnp.asarray(rank if alpha is None else alpha, jnp.float32),
    }


def _uniform(key: Array, shape: tuple[int, ...], bound: float) -> Array:
    """Return `jax.random.uniform` within ``bound``, from a program for every shape of about that size.

    A UNet has dozens of shapes, and a program for each takes longer to compile than all of them to run. JAX draws each
    number from its index alone, so those of a longer array begin with those of a shorter one.
    """
    if isinstance(key, jax.core.Tracer):
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    size = math.prod(shape)
    longer = max(1024, 1 << (size - 1).bit_length())
    with jax.ensure_compile_time_eval():  # also where only shapes are asked for
        drawn = np.asarray(jax.random.uniform(key, (longer,), jnp.float32, -bound, bound))
    return jnp.asarray(drawn[:size].reshape(shape))


def with_alpha(factors: Mapping[str, Mapping[str, Array]], alpha: float | None = None) -> dict[str, dict[str, Any]]:
    """Return a LoRA from the factors that train, ``down`` and ``up``, and a fixed ``alpha`` (the rank if None)."""
    return {
        name: {**f, "alpha": jnp.asarray(f["down"].shape[-1] if alpha is None else alpha, jnp.float32)}
        for name, f in factors.items()
    }


def without_alpha(lora: Factors) -> dict[str, dict[str, Any]]:
    """Return the trainable factors of a LoRA: ``{module: {"down", "up"}}``. Raises `InputError` for another form."""
    check_plain(lora)
    return {name: {"down": f["down"], "up": f["up"]} for name, f in lora.items()}


def check_plain(lora: Factors) -> None:
    """Raise `InputError` unless every module of a LoRA has `down`, `up` and `alpha` and nothing else."""
    _check_roles(lora, "a plain LoRA (down, up and alpha)", lambda roles: forms.is_plain({*roles, "alpha"}))


def check_trainable(lora: Factors) -> None:
    """Raise `InputError` unless every module of a LoRA is plain, or plain with DoRA's magnitude of each output."""

    def trains(roles: Collection[str]) -> bool:
        return forms.is_plain({*roles, "alpha"} - {"magnitude"})

    _check_roles(lora, "a plain LoRA (down, up and alpha), or one with a magnitude", trains)
    for name, f in sorted(lora.items()):
        if "magnitude" in f and f["magnitude"].size != f["up"].shape[-1]:
            raise InputError(
                f"lora: {name}: found {f['magnitude'].size} magnitudes, expected one for each of the "
                f"{f['up'].shape[-1]} outputs"
            )


def _check_roles(lora: Factors, expected: str, right: Callable[[Collection[str]], bool]) -> None:
    other = sorted(name for name, f in lora.items() if not right(f))
    if other:
        roles = lora[other[0]]
        raise InputError(
            f"lora: {other[0]}: found {forms.kind(roles)} ({', '.join(roles)}), expected {expected}: other forms can "
            "be merged and saved as kohya, not trained"
        )


def merge(
    params: Params,
    loras: Sequence[Factors],
    strengths: Sequence[float | Array] | Array,
    adder: Callable[..., Array] | None = None,
) -> Params:
    """Return the parameters with LoRAs of any form merged in, each with its strength; all other leaves are shared.

    Computed in float32 and stored in each leaf's own dtype, leaf by leaf, by ``adder`` (`add` if None). Traceable in
    everything but the modules' names. Raises `InputError` where a LoRA does not fit the parameters.
    """
    if len(loras) != len(strengths):
        raise InputError(f"lora strengths: found {len(strengths)}, expected one for each of the {len(loras)} LoRAs")
    known = modules(params)
    terms: dict[tuple[str, str], list[tuple[Mapping[str, Array], Any]]] = {}
    for lora, strength in zip(loras, strengths, strict=True):
        check(known, lora)
        for name, f in lora.items():
            for leaf, change in _by_leaf(f, known[name][1]):
                terms.setdefault((name, leaf), []).append((change, strength))
    adder = adder or add
    changed = {}
    for (name, leaf), found in terms.items():
        path, leaves = known[name]
        changed[(*path, leaf)] = adder(leaves[leaf], *zip(*found, strict=True))
    return _replace(params, changed)


def add(weight: Array, factors: Sequence[Mapping[str, Array]], strengths: Sequence[Any]) -> Array:
    """Return one weight (or bias) with changes of any form added, each with its strength, in the weight's own dtype.

    Each is expanded here, and no two of them need to be held at once. DoRA, which is not linear, starts from the weight
    as it was, so that the order does not matter.
    """
    base = total = weight.astype(jnp.float32)
    for f, strength in zip(factors, strengths, strict=True):
        if "magnitude" in f:
            changed = base + forms.scale(f) * forms.delta(f, weight.shape)
            added = total + jnp.asarray(strength, jnp.float32) * (forms.with_magnitude(changed, f["magnitude"]) - base)
        else:
            added = total + forms.scale(f, strength) * forms.delta(f, weight.shape)
        # Adding zero times something would change a negative zero, and anything if that overflows.
        total = jnp.where(jnp.asarray(strength) == 0, total, added)
    return total.astype(weight.dtype)


def _by_leaf(f: Mapping[str, Array], leaves: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Array]]]:
    """Yield the leaves that a module's arrays change, each with the arrays that do it."""
    weight = {role: x for role, x in f.items() if role != "diff_b"}
    if set(weight) - {"alpha"}:
        yield next(leaf for leaf in forms.WEIGHTS if leaf in leaves), weight
    if "diff_b" in f:
        yield "bias", {"diff": f["diff_b"]}


def attach(
    params: Params,
    lora: Factors,
    strength: float | Array = 1.0,
    dropout: float = 0.0,
    key: Array | None = None,
) -> Params:
    """Return the parameters with the factors beside the kernels, for the layers to add; differentiable in the factors.

    A plain LoRA, or one with DoRA's magnitude of each output, whose norm counts as a constant (arXiv 2402.09353,
    section 4.3). With a ``key`` each input of the addition is left out with the chance ``dropout``, as in PEFT. Raises
    `InputError` where the LoRA does not fit the parameters, or has another form.
    """
    known = modules(params)
    check_trainable(lora)
    check(known, lora)
    added = {}
    for i, (name, f) in enumerate(sorted(lora.items())):
        path, leaves = known[name]
        here = {"down": f["down"], "up": f["up"], "scale": forms.scale(f, strength)}
        if "magnitude" in f:
            here["ratio"] = f["magnitude"].reshape(-1) / jax.lax.stop_gradient(norms(leaves["kernel"], f, strength))
        if key is not None and dropout:
            here |= {"dropout": jnp.float32(dropout), "key": jax.random.fold_in(key, i)}
        added[(*path, "lora")] = here
    return _replace(params, added)


def norms(kernel: Array, f: Mapping[str, Array] | None = None, strength: float | Array = 1.0) -> Array:
    """Return the norm of the weights of each output (o,), of a kernel with its low-rank addition, float32; 1 for 0."""
    kernel = kernel.astype(jnp.float32)
    if f is not None:
        low_rank = {role: f[role] for role in ("down", "up")}
        kernel = kernel + forms.scale(f, strength) * forms.delta(low_rank, kernel.shape)
    square = jnp.sum(kernel * kernel, tuple(range(kernel.ndim - 1)))
    return jnp.sqrt(jnp.where(square > 0, square, 1.0))


def check(known: Modules, lora: Factors) -> None:
    """Raise `InputError` unless every module of the LoRA is among those of `modules`, in fitting shapes."""
    missing = sorted(set(lora) - set(known))
    if missing:
        raise InputError(
            f"lora: {len(missing)} of its {len(lora)} modules are not in this model, such as {missing[0]}, "
            "expected a LoRA for the same base"
        )
    for name, f in lora.items():
        needed = forms.lacking(f) or (["alpha"] if forms.rank(_shapes(f)) is not None and "alpha" not in f else [])
        if needed or forms.too_many(f):
            wrong = f"no {' and no '.join(needed)}" if needed else "more than one form"
            raise InputError(f"lora: {name}: found {', '.join(f)}, which is {wrong}, expected one whole form of LoRA")
        shapes, leaves = _shapes(f), _shapes(known[name][1])
        if not forms.fits(shapes, leaves):
            found = " and ".join(f"{role} {shape}" for role, shape in shapes.items() if role != "alpha")
            raise InputError(
                f"lora: {name}: found {found}, expected them to fit "
                f"{' and '.join(f'a {leaf} of {shape}' for leaf, shape in leaves.items())}; a LoRA for another base?"
            )


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {role: tuple(np.shape(x)) for role, x in arrays.items()}


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, (*path, name))
        else:
            yield (*path, name), node


def _replace(tree: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Return a copy of a nested mapping with the entries at some paths set; everything else is shared."""
    out = dict(tree)
    below: dict[str, dict[tuple[str, ...], Any]] = {}
    for (name, *rest), value in changes.items():
        if rest:
            below.setdefault(name, {})[tuple(rest)] = value
        else:
            out[name] = value
    for name, inner in below.items():
        out[name] = _replace(tree[name], inner)
    return out
