"""LoRA: low-rank additions to weights (arXiv 2106.09685), the weights seam ``params -> params``.

For a module with kernel W (in, out), or (h, w, in, out) for a convolution::

    W' = W + strength * alpha / r * down @ up,    down (.., in, r),  up (r, out) or (1, 1, r, out)

`merge` writes W' and costs nothing when sampling: shapes stay, so another strength or another LoRA does not recompile.
`attach` leaves W alone and passes the factors to the layers, which compute ``x W + (x down) up``: for training, where a
merged copy would hold every target twice, and its gradient would be as large as W.

Here a LoRA is one part's ``{module: {"down", "up", "alpha"}}``, modules under their dotted diffusers names; r may
differ from module to module.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.types import Array, InputError, Params

Factors: TypeAlias = Mapping[str, Mapping[str, Array]]
"""``{module: {"down": (.., in, r), "up": (.., r, out), "alpha": ()}}``."""


def targets(params: Params) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Return ``{module: (path, kernel)}`` of every module of a tree that a LoRA can change."""
    found = {}
    for path, leaf in _leaves(params, ()):
        if path[-1] == "kernel" and len(leaf.shape) in (2, 4):
            found[".".join(path[:-1])] = path[:-1], leaf
    return found


def init(key: Array, params: Params, pattern: str, rank: int, alpha: float | None = None) -> dict[str, dict[str, Any]]:
    """Return a fresh LoRA for the modules whose names match the regular expression ``pattern`` anywhere.

    ``down`` is uniform within 1/sqrt(fan-in), like a fresh torch layer; ``up`` is zero, so nothing changes yet.
    ``alpha`` is the rank if None. Raises `InputError` for a rank below 1, or a pattern that matches no module.
    """
    if rank < 1:
        raise InputError(f"lora rank: found {rank}, expected 1 or more")
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise InputError(f"lora pattern: {pattern!r} is not a regular expression: {error}") from None
    modules = targets(params)
    chosen = sorted(name for name in modules if search(name))
    if not chosen:
        near = difflib.get_close_matches(pattern.replace("\\", ""), modules, n=3, cutoff=0.0)
        raise InputError(
            f"lora pattern: {pattern!r} matches none of the {len(modules)} modules; near misses: {', '.join(near)}"
        )
    out: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(chosen):
        *space, fan, o = modules[name][1].shape
        bound = (math.prod(space) * fan) ** -0.5
        drawn = _uniform(jax.random.fold_in(key, i), (*space, fan, rank), bound)
        up = jnp.zeros((*[1] * len(space), rank, o), jnp.float32)
        out[name] = {"down": drawn, "up": up, "alpha": jnp.asarray(rank if alpha is None else alpha, jnp.float32)}
    return out


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
    """Return the trainable factors of a LoRA: ``{module: {"down", "up"}}``."""
    return {name: {"down": f["down"], "up": f["up"]} for name, f in lora.items()}


def merge(params: Params, loras: Sequence[Factors], strengths: Sequence[float | Array] | Array) -> Params:
    """Return the parameters with LoRAs written into the kernels, each with its strength; the rest is shared.

    Computed in float32 and stored in each kernel's own dtype. Traceable in everything but the modules' names. Raises
    `InputError` where a LoRA does not fit the parameters.
    """
    if len(loras) != len(strengths):
        raise InputError(f"lora strengths: found {len(strengths)}, expected one for each of the {len(loras)} LoRAs")
    modules = targets(params)
    terms: dict[str, list[tuple[Mapping[str, Array], Any]]] = {}
    for lora, strength in zip(loras, strengths, strict=True):
        check(modules, lora)
        for name, f in lora.items():
            terms.setdefault(name, []).append((f, strength))
    return with_kernels(
        params, {name: add(modules[name][1], *zip(*found, strict=True)) for name, found in terms.items()}
    )


def add(kernel: Array, factors: Sequence[Mapping[str, Array]], strengths: Sequence[Any]) -> Array:
    """Return one kernel with the products of some factors added, each with its strength, in the kernel's own dtype."""
    total = kernel.astype(jnp.float32)
    for f, strength in zip(factors, strengths, strict=True):
        up = f["up"].astype(jnp.float32).reshape(f["up"].shape[-2:])
        # Full precision even where float32 products are rounded by default (TPU, GPU).
        delta = jnp.matmul(f["down"].astype(jnp.float32), up, precision="highest")
        total = total + _scale(f, strength) * delta
    return total.astype(kernel.dtype)


def with_kernels(params: Params, kernels: Mapping[str, Array]) -> Params:
    """Return the parameters with the kernels of some modules (see `targets`) set; all other leaves are shared."""
    modules = targets(params)
    return _replace(params, {(*modules[name][0], "kernel"): kernel for name, kernel in kernels.items()})


def attach(params: Params, lora: Factors, strength: float | Array = 1.0) -> Params:
    """Return the parameters with the factors beside the kernels, for the layers to add; differentiable in the factors.

    Raises `InputError` where the LoRA does not fit the parameters.
    """
    modules = targets(params)
    check(modules, lora)
    added = {}
    for name, f in lora.items():
        added[(*modules[name][0], "lora")] = {"down": f["down"], "up": f["up"], "scale": _scale(f, strength)}
    return _replace(params, added)


def check(modules: Mapping[str, tuple[tuple[str, ...], Any]], lora: Factors) -> None:
    """Raise `InputError` unless every module of the LoRA is among ``modules`` (see `targets`), in fitting shapes."""
    missing = sorted(set(lora) - set(modules))
    if missing:
        raise InputError(
            f"lora: {len(missing)} of its {len(lora)} modules are not in this model, such as {missing[0]}, "
            "expected a LoRA for the same base"
        )
    for name, f in lora.items():
        shape, down, up = modules[name][1].shape, f["down"].shape, f["up"].shape
        fits = (*down[:-1], up[-1]) == shape and up == (*[1] * (len(shape) - 2), down[-1], shape[-1])
        if not fits:
            raise InputError(
                f"lora: {name}: found down {down} and up {up}, expected them to fit a kernel of {shape}; "
                "a LoRA for another base?"
            )


def _scale(f: Mapping[str, Array], strength: Any) -> Array:
    return jnp.asarray(strength, jnp.float32) * jnp.asarray(f["alpha"], jnp.float32) / f["down"].shape[-1]


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
