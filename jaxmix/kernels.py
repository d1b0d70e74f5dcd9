"""Attention kernels, and which one runs where.

`choose` is called by `jaxmix.control.attend` alone. Every kernel takes q (b, n, h, d), k and v (b, s, h, d), computes
softmax(q k^T / sqrt(d)) v with a float32 softmax, and returns (b, n, h, d) in the dtype of v:

    plain    XLA, any shape; holds all (b, h, n, s) scores
    chunked  CPU, long sequences, and edited scores anywhere: blocks of query rows, one head at a time
    cudnn    GPU, half precision: cuDNN's fused attention through `jax.nn.dot_product_attention`
    splash   TPU, long sequences: JAX's Pallas splash attention
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Float

from jaxmix.types import Array

Kernel: TypeAlias = Callable[[Array, Array, Array], Array]
Edit: TypeAlias = Callable[[Array, Array, Array], Array]
"""(row (), numbers of queries (m,), scaled scores (m, s) of one head, float32) to the scores as edited."""

_log = logging.getLogger(__name__)
_CHUNK = 512  # query rows of a block: on XLA:CPU the fastest of 64 to 1024 at 1024 and 4096 tokens
_CPU_SCORES = 512 * 512  # scores of a head from which blocks pay on the CPU
_CPU_ALL = 2**23  # scores of all heads and rows from which a quarter of that is enough: they outgrow the shared cache
_MANY_SCORES = 2048 * 2048  # edited scores of a head from which no accelerator should hold those of all heads and rows
_TPU_TOKENS = 1024  # queries and keys from which splash pays; the 77 keys of a prompt never do
_TPU_BLOCK = 512


def scores(q: Float[Array, "b n h d"], k: Float[Array, "b s h d"]) -> Float[Array, "bh n s"]:
    """Return q k^T / sqrt(d), float32.

    Plain batched products over (row, head): on XLA:CPU several times faster than a bqhd einsum, elsewhere XLA fuses it
    as well. The scale is folded into q so that no second (n, s) array is made.
    """
    b, n, h, d = q.shape
    q = (q * jnp.asarray(d**-0.5, q.dtype)).transpose(0, 2, 1, 3).reshape(b * h, n, d)
    k = k.transpose(0, 2, 3, 1).reshape(b * h, d, k.shape[1])
    return jnp.matmul(q, k, preferred_element_type=jnp.float32)


def mix(probs: Float[Array, "bh n s"], v: Float[Array, "b s h d"]) -> Float[Array, "b n h d"]:
    """Return the values mixed by the attention probabilities."""
    b, s, h, d = v.shape
    v = v.transpose(0, 2, 1, 3).reshape(b * h, s, d)
    o = jnp.matmul(probs.astype(v.dtype), v)
    return o.reshape(b, h, -1, d).transpose(0, 2, 1, 3)


def plain(q: Array, k: Array, v: Array) -> Array:
    """Attend through all scores at once."""
    return mix(jax.nn.softmax(scores(q, k), axis=-1), v)


def chunked(q: Array, k: Array, v: Array, size: int = _CHUNK, edit: Edit | None = None) -> Array:
    """Attend block by block of ``size`` query rows, one (row, head) at a time, so that the scores stay in the cache.

    The gradient recomputes each block instead of keeping its scores. ``edit`` changes the scores of each block; in the
    padding after the last query it is given that query's number again.
    """
    b, n, h, d = q.shape
    s = k.shape[1]
    blocks = -(-n // size)
    size = -(-n // blocks)  # even blocks, so that little is padded
    q = (q * jnp.asarray(d**-0.5, q.dtype)).transpose(0, 2, 1, 3).reshape(b * h, n, d)
    q = jnp.pad(q, ((0, 0), (0, blocks * size - n), (0, 0))).reshape(b * h * blocks, size, d)
    k = k.transpose(0, 2, 3, 1).reshape(b * h, d, s)
    v = v.transpose(0, 2, 1, 3).reshape(b * h, s, d)

    @jax.checkpoint
    def block(number: Array, q: Array, k: Array, v: Array) -> Array:
        x = jnp.matmul(q, k, preferred_element_type=jnp.float32)
        if edit is not None:
            queries = jnp.minimum(number % blocks * size + jnp.arange(size), n - 1)
            x = edit(number // (blocks * h), queries, x)
        e = jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))
        total = e.sum(-1, keepdims=True)  # divided after the product: (size, d) numbers instead of (size, s)
        return (jnp.matmul(e.astype(v.dtype), v) / total).astype(v.dtype)

    # One loop over all blocks, not a second one over heads around it: each loop costs compile time at every layer.
    numbers = jnp.arange(b * h * blocks)
    o = jax.lax.map(lambda x: block(*x, k[x[0] // blocks], v[x[0] // blocks]), (numbers, q))
    o = o.reshape(b, h, blocks * size, d)
    return o[:, :, :n].transpose(0, 2, 1, 3)


def cudnn(q: Array, k: Array, v: Array) -> Array:
    """Attend by cuDNN's fused kernel; half precision only."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def splash(q: Array, k: Array, v: Array, *, interpret: bool = False) -> Array:
    """Attend by the Pallas splash kernel for TPUs; sequences must be multiples of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, n, h, d = q.shape
    s = k.shape[1]
    mask = masks.MultiHeadMask([masks.FullMask((n, s)) for _ in range(h)])
    bq, bk = math.gcd(n, _TPU_BLOCK), math.gcd(s, _TPU_BLOCK)
    sizes = kernel.BlockSizes(
        block_q=bq, block_kv=bk, block_kv_compute=bk, block_q_dkv=bq, block_kv_dkv=bk, block_kv_dkv_compute=bk,
        block_q_dq=bq, block_kv_dq=bk,
    )  # fmt: skip
    attend = kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret)
    q = q * jnp.asarray(d**-0.5, q.dtype)
    o = _on_own_rows(jax.vmap(attend))(*(x.transpose(0, 2, 1, 3) for x in (q, k, v)))
    return o.transpose(0, 2, 1, 3).astype(v.dtype)


def _in_blocks(n: int, s: int, heads: int) -> bool:
    """Return whether blocks are faster on the CPU; with the 77 keys of a prompt they are not."""
    large = n * s >= _CPU_SCORES and min(n, s) > _CHUNK // 2
    return large or (n * s >= _CPU_SCORES // 4 and min(n, s) >= _CHUNK // 2 and heads * n * s >= _CPU_ALL)


def edited(n: int, s: int, heads: int, whole: Kernel, edit: Edit | None) -> Kernel:
    """Return the kernel for scores that controls edit: ``edit`` a block of queries of one head, ``whole`` all of them.

    Blocks fit the CPU's cache and spare an accelerator's memory: the scores of SD 1.5 at 512 px would take 0.5 GiB per
    image and branch, several times over. Smaller ones are faster there as one product. Without ``edit`` all is one
    block.
    """
    if edit is None or not _in_blocks(n, s, heads):
        return whole
    blocks = functools.partial(chunked, edit=edit)
    return blocks if n * s >= _MANY_SCORES else functools.partial(jax.lax.platform_dependent, cpu=blocks, default=whole)


def _on_own_rows(kernel: Kernel) -> Kernel:
    """Run a kernel on each device's rows if a mesh is in scope (training): Pallas kernels cannot be partitioned.

    Inside a shard_map (sampling) each device already has its own rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
    if mesh.size == 1 or not axes:
        return kernel
    rows = PartitionSpec(axes)
    return jax.shard_map(kernel, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)


def choose(n: int, s: int, d: int, dtype: jnp.dtype, heads: int = 1) -> Kernel:
    """Return the kernel for ``n`` queries, ``s`` keys and ``heads`` heads (of all rows) of size ``d``.

    The platform's kernel is picked when the program is lowered, so a program traced here may be compiled for a TPU
    elsewhere; only cuDNN must be present when tracing.
    """
    kernels: dict[str, Kernel] = {}
    if _in_blocks(n, s, heads):
        kernels["cpu"] = chunked
    # Tracing for a TPU needs its compiler, libtpu.
    if (jax.default_backend() == "tpu" or _has_libtpu()) and not _refused("splash", n, s, d, _splash_limits(n, s)):
        kernels["tpu"] = splash
    if jax.default_backend() == "gpu" and not _refused("cuDNN", n, s, d, _cudnn_limits(d, dtype)):
        kernels["cuda"] = cudnn
    if not kernels:
        return plain
    return _by_platform(tuple(kernels.items()))


@functools.cache  # one function per choice, so that calls outside any program compile once per shape
def _by_platform(kernels: tuple[tuple[str, Kernel], ...]) -> Kernel:
    return jax.jit(functools.partial(jax.lax.platform_dependent, **dict(kernels), default=plain), inline=True)


@functools.cache
def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _splash_limits(n: int, s: int) -> str | None:
    if min(n, s) < _TPU_TOKENS:
        return f"sequences below {_TPU_TOKENS} are faster without it"
    return "sequences must be multiples of 128" if n % 128 or s % 128 else None


def _cudnn_limits(d: int, dtype: jnp.dtype) -> str | None:
    capability = _cuda_capability()
    if capability < 8:
        return "it needs a CUDA GPU of compute capability 8.0 or higher"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it does not support {jnp.dtype(dtype)}"
    most = 256 if capability >= 9 else 128
    return f"heads must be multiples of 8 and at most {most}" if d % 8 or d > most else None


def _cuda_capability() -> float:
    """Return the compute capability of the local GPUs, 0 if they are not NVIDIA's."""
    device = jax.local_devices(backend="gpu")[0]
    return float(device.compute_capability) if "cuda" in device.client.platform_version else 0.0


def _refused(name: str, n: int, s: int, d: int, reason: str | None) -> bool:
    if reason is not None:
        _say(f"attention of {n} queries, {s} keys, heads of {d}: XLA instead of {name}: {reason}")
    return reason is not None


@functools.cache  # once per shape
def _say(message: str) -> None:
    _log.info(message)
