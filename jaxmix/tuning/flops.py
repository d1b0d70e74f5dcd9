"""How much of a device a program uses: its FLOPs, peak rates of devices, memory once compiled."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Dense peak rates of one JAX device in TFLOP/s as (bfloat16, float32), from the vendors' data sheets. float32 is the
# rate of float32 products at JAX's default precision: TF32 on these GPUs, bfloat16 passes on a TPU. Names are searched
# for in `device_kind`, and the first match wins. A v7 chip appears as two devices.
_PEAKS = (
    ("TPU v7", 1153.5, 1153.5),
    ("TPU7x", 1153.5, 1153.5),
    ("TPU v6", 918.0, 918.0),
    ("TPU v5p", 459.0, 459.0),
    ("TPU v5 lite", 197.0, 197.0),
    ("TPU v5e", 197.0, 197.0),
    ("TPU v5", 459.0, 459.0),
    ("TPU v4", 275.0, 275.0),
    ("H200", 989.4, 494.7),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.5, 417.7),
    ("H100", 989.4, 494.7),
    ("A100", 312.0, 156.0),
)


@dataclasses.dataclass(frozen=True)
class Peak:
    """The combined peak FLOP/s of devices, and where the figure comes from."""

    flops: float
    label: str


def peak(devices: Sequence[Any], dtype: Any) -> Peak:
    """Return the combined peak of `devices` for products in `dtype`.

    That of the data sheet for the accelerators in the table; else the rate that a large float32 matrix product reaches
    here and now, which is lower on a busy machine. The virtual devices of a CPU share it: it counts once per process.
    """
    kind = devices[0].device_kind
    rate = data_sheet_rate(kind, dtype)
    if rate is not None:
        return Peak(rate * len(devices), f"{len(devices)} x {kind}")
    on_cpu = devices[0].platform == "cpu"
    count = len({d.process_index for d in devices}) if on_cpu else len(devices)
    return Peak(_measured_rate() * count, f"measured float32 matrix product, {count} x {kind}")


def data_sheet_rate(kind: str, dtype: Any) -> float | None:
    """Return the dense FLOP/s of one device of a kind for products in `dtype`, None for a kind not in the table."""
    for name, half, single in _PEAKS:
        if name.lower() in kind.lower():
            return 1e12 * (half if jnp.dtype(dtype) == jnp.bfloat16 else single)
    return None


def _measured_rate(size: int = 1024, repeats: int = 3) -> float:
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def memory_of(compiled: Any) -> tuple[int, str]:
    """Return what one device needs for a compiled program as the compiler reports it, in bytes and in words (GiB).

    (0, "") if it does not.
    """
    found = compiled.memory_analysis()
    if found is None:
        return 0, ""
    held, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
    # Outputs that reuse donated arguments take no memory of their own.
    new = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    total = max(getattr(found, "peak_memory_in_bytes", 0), held + temporary + new)
    gib = [x / 2**30 for x in (total, held, temporary)]
    return total, f"{gib[0]:.3g} GiB per device at most: arguments {gib[1]:.3g}, temporaries {gib[2]:.3g}"


def model_flops(jaxpr: Any) -> float:
    """Return the FLOPs of the matrix products and convolutions in a (closed) jaxpr, of all devices together.

    A multiplication with its addition counts 2. Counting happens before compilation, so that loops count as often as
    they run (XLA's cost analysis counts a scan once), and a product with the same operands counts once however often it
    is done: the recomputation of `gradient_checkpointing` is not work of the model, except in loops that carry
    something. A cond counts its costliest branch, and kernels by platform their plain one, since those that are opaque
    to JAX (Pallas, cuDNN) show no products; a while loop of unknown length counts once. Sums, norms and activations are
    left out.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return _Count().run(inner, [object() for _ in inner.invars])[0]


class _Count:
    """Walk a jaxpr, giving equal values equal numbers, and count each distinct product once."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._fresh = 0

    def run(self, jaxpr: Any, arguments: Sequence[Any]) -> tuple[float, list[Any]]:
        """Return (FLOPs not yet counted, the numbers of the outputs)."""
        env: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
        env |= {var: ("const", id(var)) for var in jaxpr.constvars}

        def read(atom: Any) -> Any:
            if hasattr(atom, "val"):
                value = np.asarray(atom.val) if not hasattr(atom.val, "_base_array") else atom.val
                return ("literal", str(value), str(atom.aval))
            return env[atom]

        total = 0.0
        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            flops, outputs = self._equation(eqn, inputs)
            total += flops
            env |= dict(zip(eqn.outvars, outputs, strict=True))
        return total, [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[Any]) -> tuple[float, list[Any]]:
        name, params = eqn.primitive.name, eqn.params
        body = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
        inner: Any = getattr(body, "jaxpr", body)  # some are closed, some open
        inline = inner is not None and name not in ("scan", "while")
        if name == "cond":
            return self.run(_branch(params).jaxpr, inputs[1:])
        if name == "scan" and all(_stacked(inner.outvars, eqn.outvars)):
            return self._each(inner, params, inputs, _stacked(inner.invars, eqn.invars))
        if inline and len(getattr(inner, "invars", ())) == len(inputs) and len(inner.outvars) == len(eqn.outvars):
            return self.run(inner, inputs)
        key = (name, _static(params), *inputs)
        seen = key in self._numbers
        number = self._numbers.setdefault(key, len(self._numbers))
        outputs = [(number, i) for i in range(len(eqn.outvars))]
        return (0.0 if seen else self._flops(eqn, name, params)), outputs

    def _each(
        self, body: Any, params: dict[str, Any], inputs: list[Any], stacked: list[bool]
    ) -> tuple[float, list[Any]]:
        """Count a loop without a carry: its values are those of the body, one for each slice."""
        slices = [
            ("slice", params["reverse"], number) if sliced else number
            for number, sliced in zip(inputs, stacked, strict=True)
        ]
        flops, outputs = self.run(body, slices)
        return params["length"] * flops, [("stack", params["reverse"], number) for number in outputs]

    def _flops(self, eqn: Any, name: str, params: dict[str, Any]) -> float:
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
            return 2.0 * eqn.outvars[0].aval.size * depth
        if name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            depth = math.prod(kernel[axis] for axis in spec[1:])
            # Zeros between the values (the gradient of a stride) do not count as work.
            return 2.0 * eqn.outvars[0].aval.size * depth / math.prod(params["lhs_dilation"])
        if name == "scan":
            return params["length"] * model_flops(params["jaxpr"])
        if name == "while":
            return model_flops(params["body_jaxpr"])
        return 0.0


def _stacked(inside: Sequence[Any], outside: Sequence[Any]) -> list[bool]:
    """Return which values of a loop are slices of something stacked outside; the others are shared or carried.

    Told by their ranks, since the parameters that count them are internal to JAX and are renamed between releases.
    """
    return [len(y.aval.shape) > len(x.aval.shape) for x, y in zip(inside, outside, strict=True)]


def _branch(params: dict[str, Any]) -> Any:
    """Return the branch of a cond that counts, chosen by its contents so that a recomputation picks the same one."""
    branches = params["branches"]
    platforms = params.get("branches_platforms")
    if platforms is not None and None in platforms:
        return branches[platforms.index(None)]
    return max(branches, key=model_flops)


def _static(params: dict[str, Any]) -> Any:
    """Return something hashable that tells parameters of one primitive apart; inner programs by identity."""
    return tuple((key, id(v) if "jaxpr" in key else str(v)) for key, v in sorted(params.items()))
