"""Layers that every model shares: products on flattened tokens, convolutions, GroupNorm with a control stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float, Num

from jaxmix.control import Control, Moments, Site, apply_moments
from jaxmix.sharding import gathered
from jaxmix.types import AnyArray, Array

Padding: TypeAlias = Sequence[tuple[int, int]]  # (top, bottom), (left, right)

_kernel_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")  # as in torch layers
LOW_RANK = "lora"
"""Where a module finds ``{"down", "up", "scale"}``, a low-rank addition to its kernel, if its parameters hold one.

Further, for training: ``ratio`` (out,), by which the outputs are multiplied before the bias (DoRA), and ``dropout``,
() float32, with ``key``, a random key: the chance that an input of the addition is left out.
"""

_TINY_IMAGE = 4 * 4  # pixels of the output up to which a convolution on the CPU is faster as a product ...
_MANY = 512 * 512  # ... if it has at least this many pairs of inputs and outputs; with fewer it only compiles longer
_SMALL_IMAGE = 64 * 64  # pixels up to which a convolution on the CPU is faster with Eigen ...
_FEW = 16  # ... unless it has fewer outputs than this
_LARGE_IMAGE = 32 * 32  # pixels from which the means of norms on the CPU are faster as products


class Linear(nn.Module):
    """A dense layer over the last axis.

    With ``conv`` the kernel is stored as that of a 1x1 convolution, (1, 1, in, out), as in some checkpoints.
    """

    features: int
    use_bias: bool = True
    conv: bool = False
    dtype: Any = jnp.float32
    kernel_init: Any = _kernel_init

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*b i"]) -> Float[Array, "*b o"]:
        i = x.shape[-1]
        shape = (1, 1, i, self.features) if self.conv else (i, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        x, kernel = jnp.asarray(x, self.dtype), gathered(kernel.astype(self.dtype)).reshape(i, self.features)
        y = product(x, kernel)
        if self.has_variable("params", LOW_RANK):
            factors = self.get_variable("params", LOW_RANK)

            def added(x: Array, down: Array, up: Array) -> Array:
                return product(product(x, down.reshape(i, -1)), up)

            y = _with_low_rank(factors, self.dtype, x, y, added, lambda x: product(x, kernel))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class Conv(nn.Module):
    """A 3x3 convolution, NHWC, padded by one pixel on each side unless told otherwise."""

    features: int
    stride: int = 1
    padding: Padding = ((1, 1), (1, 1))
    dtype: Any = jnp.float32
    kernel_init: Any = _kernel_init

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        kernel = gathered(kernel.astype(self.dtype))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        x = jnp.asarray(x, self.dtype)
        how = self.stride, tuple(self.padding)
        y = convolve(x, kernel, *how)
        if self.has_variable("params", LOW_RANK):
            factors = self.get_variable("params", LOW_RANK)

            def added(x: Array, down: Array, up: Array) -> Array:
                return product(convolve(x, down, *how), up)

            y = _with_low_rank(factors, self.dtype, x, y, added, lambda x: convolve(x, kernel, *how))
        return y + bias


def _with_low_rank(
    factors: Mapping[str, Array],
    dtype: Any,
    x: Array,
    y: Array,
    added: Callable[[Array, Array, Array], Array],
    apply: Callable[[Array], Array],
) -> Array:
    """Return the outputs y of a kernel for inputs x with the low-rank addition beside it; see `LOW_RANK`.

    ``added(x, down, up)`` is the addition, ``apply(x)`` the kernel.
    """
    up = gathered(factors["up"])
    up = (up.reshape(up.shape[-2:]) * factors["scale"]).astype(dtype)
    seen = x
    if "dropout" in factors:
        keep = 1.0 - factors["dropout"]
        kept = jax.random.bernoulli(factors["key"], keep, x.shape)
        seen = jnp.where(kept, x / keep.astype(dtype), jnp.zeros((), dtype))
    low = added(seen, gathered(factors["down"]).astype(dtype), up)
    if "ratio" not in factors:
        return y + low
    # In float32: a ratio differs from 1 by less than bfloat16 can say. Under dropout PEFT changes the direction of what
    # is left of the inputs alone: y + (ratio - 1) (W x') + ratio (W_low x'), and so does this.
    ratio, low = factors["ratio"], low.astype(jnp.float32)
    if "dropout" not in factors:
        return ((y.astype(jnp.float32) + low) * ratio).astype(dtype)
    return (y.astype(jnp.float32) + (ratio - 1.0) * apply(seen).astype(jnp.float32) + ratio * low).astype(dtype)


# What depends on the platform is decided when the program is lowered, in functions that are compiled once per shape:
# without `jit` a call outside any program would recompile its branches each time. Inlined, they leave no trace.


@functools.partial(jax.jit, static_argnames=("stride", "padding"), inline=True)
def convolve(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """Convolve (b, h, w, i) with (3, 3, i, o), padded by ((top, bottom), (left, right))."""
    plain = functools.partial(_convolve, stride=stride, padding=padding)
    pixels = x.shape[1] * x.shape[2]
    if pixels <= _TINY_IMAGE * stride**2 and kernel.shape[2] * kernel.shape[3] >= _MANY:
        on_cpu = functools.partial(_convolve_by_product, stride=stride, padding=padding)
    elif pixels <= _SMALL_IMAGE and stride == 1 and kernel.shape[-1] >= _FEW:
        on_cpu = functools.partial(_convolve_beside, stride=stride, padding=padding)
    else:
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)


@functools.partial(jax.jit, inline=True)
def product(x: Array, kernel: Array) -> Array:
    """Multiply the last axis of (..., i) with (i, o)."""
    if x.ndim <= 2:
        return x @ kernel
    return jax.lax.platform_dependent(x, kernel, cpu=_flat_product, default=jnp.matmul)


@functools.partial(jax.jit, inline=True)
def mean_over_pixels(y: Array) -> Array:
    """Return the mean of each channel, (b, h, w, c) to (b, c)."""
    if y.shape[1] * y.shape[2] < _LARGE_IMAGE:
        return _mean_by_sum(y)
    return jax.lax.platform_dependent(y, cpu=_mean_by_product, default=_mean_by_sum)


def _convolve(x: Array, kernel: Array, stride: int, padding: Padding, beside: int = 0) -> Array:
    rows, (left, right) = padding
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (rows, (left, right + beside)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y[:, :, : y.shape[2] - beside] if beside else y


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve_beside(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    # XLA:CPU gives a symmetric convolution to YNNPACK, which repacks the kernel in every call: slower than Eigen if the
    # image is small. One more column on the right, dropped again, keeps it with Eigen.
    return _convolve(x, kernel, stride, padding, beside=1)


@functools.partial(_convolve_beside.defjvp, symbolic_zeros=True)
def _convolve_beside_jvp(stride: int, padding: Padding, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # Eigen does not accept the column in the gradient of the kernel, which would run as a plain loop, taking 15 to 60
    # times as long as that of the symmetric convolution.
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _convolve_beside(x, kernel, stride, padding)
    terms = [
        _convolve(a, b, stride, padding)
        for a, b in ((dx, kernel), (x, dkernel))
        if not isinstance(a, SymbolicZero) and not isinstance(b, SymbolicZero)
    ]
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def _convolve_by_product(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    # With few pixels and many channels, reading the kernel is all the work, and XLA:CPU's convolutions take many times
    # as long as one product of patches with the kernel (scripts.bench.changes, SD 1.5 at 16x16).
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h, w = ((side - 3) // stride + 1 for side in x.shape[1:3])
    patches = [
        x[:, i : i + (h - 1) * stride + 1 : stride, j : j + (w - 1) * stride + 1 : stride]
        for i in range(3)
        for j in range(3)
    ]
    b, (i, o) = x.shape[0], kernel.shape[2:]
    return (jnp.concatenate(patches, -1).reshape(b * h * w, 9 * i) @ kernel.reshape(9 * i, o)).reshape(b, h, w, o)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with float32 statistics and torch's epsilon (flax's default is 1e-6)."""

    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


class GroupNorm(nn.Module):
    """GroupNorm over (h, w, channels of a group), float32 statistics; controls may edit them (`Control.moments`)."""

    groups: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], controls: Sequence[Control] = ()) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        g = self.groups
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        y = x.astype(jnp.float32)

        def mean_of(y: Array) -> Array:
            # Scaled before the sum rather than after, where the product may be fused with what a control (or epsilon)
            # adds, and a control of strength 0 would change the last bit.
            per_channel = mean_over_pixels(y)
            return (per_channel.reshape(b, g, c // g) * (g / c)).sum(-1)

        def to_channels(per_group: Array) -> Array:
            return jnp.repeat(per_group, c // g, axis=1)[:, None, None, :]

        mean = mean_of(y)
        var = mean_of(jnp.square(y - to_channels(mean)))  # E[x^2] - E[x]^2 would cancel where the mean is large
        m = Moments(mean, var)
        if controls:
            m = apply_moments(Site(".".join(self.path), 0, (h, w)), m, controls)
        a = to_channels(jax.lax.rsqrt(m.var + self.eps)) * scale.astype(jnp.float32)
        return ((y - to_channels(m.mean)) * a + bias.astype(jnp.float32)).astype(self.dtype)


def _flat_product(x: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    # On XLA:CPU the weight gradient of a product with more axes is several times slower. On a TPU, flattened tokens
    # made the compiler keep transposed copies of the attention's kernels outside the loop: 0.7 GiB for SDXL.
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _mean_by_sum(y: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    return (y * (1.0 / (y.shape[1] * y.shape[2]))).sum((1, 2))


def _mean_by_product(y: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    # XLA:CPU sums over rows on one core, a column at a time; its matrix products are threaded and blocked.
    b, h, w, c = y.shape
    weights = jnp.full((b, 1, h * w), 1.0 / (h * w), y.dtype)
    return jnp.matmul(weights, y.reshape(b, h * w, c), precision="highest")[:, 0]


def timestep_embedding(
    t: Num[Array, " b"], dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float | int = 0
) -> Float[Array, "b dim"]:
    """Embed timesteps as sinusoids, float32 (arXiv 2006.11239, appendix B; periods from 2 pi to 10000 * 2 pi)."""
    half = dim // 2
    freqs = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    args = t.astype(jnp.float32)[:, None] * freqs
    parts = [jnp.cos(args), jnp.sin(args)] if flip_sin_to_cos else [jnp.sin(args), jnp.cos(args)]
    return jnp.pad(jnp.concatenate(parts, -1), ((0, 0), (0, dim % 2)))


def upsample_nearest(x: Float[Array, "b h w c"], hw: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Enlarge by nearest neighbour, with the source index floor(i * in / out) as in torch."""
    b, h, w, c = x.shape
    if hw == (2 * h, 2 * w):
        return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    rows, cols = (jnp.arange(o) * i // o for o, i in zip(hw, (h, w), strict=True))
    return x[:, rows][:, :, cols]
