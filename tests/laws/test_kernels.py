"""Every attention kernel computes the same attention, and the choice of one is settled and logged."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxmix import kernels
from jaxmix.control import QKV, Control, Site, attend
from jaxmix.pipeline.job import over_rows
from jaxmix.sharding import data_mesh, rows_over, train_mesh
from jaxmix.testing import normal


def qkv(n, s, h, d, b=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(n + s + d), 3)
    return tuple(normal(k, (b, m, h, d)).astype(dtype) for k, m in zip(keys, (n, s, s), strict=True))


def reference(q, k, v):
    """Return attention by its definition, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    x = np.einsum("bnhd,bshd->bhns", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(x - x.max(-1, keepdims=True))
    return np.einsum("bhns,bshd->bnhd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("n", "s"), [(16, 77), (64, 64), (100, 30)])
def test_plain_is_the_definition(n, s):
    args = qkv(n, s, 3, 8)
    np.testing.assert_allclose(kernels.plain(*args), reference(*args), atol=2e-6)


@pytest.mark.parametrize(("n", "s", "size"), [(64, 64, 16), (100, 30, 32), (7, 9, 512)])
def test_chunked_is_the_definition_for_any_length(n, s, size):
    args = qkv(n, s, 2, 8)
    got = jax.jit(functools.partial(kernels.chunked, size=size))(*args)
    np.testing.assert_allclose(got, reference(*args), atol=2e-6)


def test_scores_are_edited_by_row_query_and_block():
    args = qkv(70, 50, 2, 8)
    by = normal(jax.random.key(1), (2, 70, 50))
    got = jax.jit(functools.partial(kernels.chunked, size=32, edit=lambda row, i, x: x + by[row, i]))(*args)
    x = kernels.scores(*args[:2]).reshape(2, 2, 70, 50) + by[:, None]
    expected = kernels.mix(jax.nn.softmax(x, -1).reshape(4, 70, 50), args[2])
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_no_accelerator_holds_all_edited_scores_of_a_large_image():
    """Lowered for a TPU: 4096 x 4096 scores are a loop, 1024 x 1024 one product, unless all are needed at once."""

    @struct.dataclass
    class AtOnce(Control):
        def logits(self, site, x):
            return x + 1

    @struct.dataclass
    class ByBlock(AtOnce):
        def block(self, queries):
            return self

    def loops(control, side):
        site, shape = Site("a.attn1", 1, (side, side)), jax.ShapeDtypeStruct((1, side * side, 1, 8), jnp.float32)
        traced = jax.jit(lambda *a: attend(site, QKV(*a), (control,))[0]).trace(shape, shape, shape)
        return "while" in traced.lower(lowering_platforms=("tpu",)).as_text()

    assert [loops(c, side) for c in (AtOnce(), ByBlock()) for side in (32, 64)] == [False, False, False, True]


def test_chunked_survives_large_scores():
    q, k, v = qkv(32, 32, 1, 8)
    got = kernels.chunked(q * 1e3, k, v, size=16)
    np.testing.assert_allclose(got, kernels.plain(q * 1e3, k, v), atol=1e-5)


def test_chunked_has_the_gradients_of_plain():
    args = qkv(48, 48, 2, 8)

    def loss(kernel, *args):
        return (kernel(*args) ** 2).sum()

    grads = [
        jax.jit(jax.grad(functools.partial(loss, kernel), argnums=(0, 1, 2)))(*args)
        for kernel in (kernels.plain, functools.partial(kernels.chunked, size=16))
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), *grads)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    args = qkv(64, 64, 2, 16, dtype=jnp.bfloat16)
    for kernel in (kernels.plain, functools.partial(kernels.chunked, size=32)):
        got = kernel(*args)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), reference(*args), atol=0.02)


def test_splash_is_the_definition_when_interpreted():
    args = qkv(256, 128, 2, 64)
    np.testing.assert_allclose(kernels.splash(*args, interpret=True), reference(*args), atol=2e-5)


def test_splash_runs_on_the_rows_of_each_device_in_a_sampler():
    args, mesh = qkv(128, 128, 1, 64, b=2), data_mesh(2)
    attend = over_rows(functools.partial(kernels.splash, interpret=True), mesh, jax.sharding.PartitionSpec("data"))
    np.testing.assert_allclose(jax.jit(attend)(*args), reference(*args), atol=2e-5)


def test_splash_runs_on_the_rows_of_each_device_under_a_training_mesh():
    args = qkv(128, 128, 2, 64, b=4)
    mesh = train_mesh(2, jax.devices()[:4])
    rows = [jax.device_put(x, rows_over(mesh)) for x in args]
    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(kernels.splash, interpret=True)).lower(*rows).compile()
        out = compiled(*rows)
    assert out.sharding.is_equivalent_to(rows[0].sharding, out.ndim)
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(out, reference(*args), atol=2e-5)


def test_long_sequences_take_blocks_on_the_cpu_and_short_ones_do_not():
    def loops(n, s, b=1):
        args = [jax.ShapeDtypeStruct((b, m, 2, 8), jnp.float32) for m in (n, s, s)]
        kernel = kernels.choose(n, s, 8, jnp.dtype(jnp.float32), 2 * b)
        return "while" in jax.jit(kernel).lower(*args).compile().as_text()

    assert loops(1024, 1024) and loops(256, 512, 32)
    assert not loops(256, 256) and not loops(1024, 77, 32) and not loops(256, 512) and not loops(144, 256, 256)


def test_attend_gives_what_the_kernel_gives_and_editing_scores_avoids_it(monkeypatch):
    a = QKV(*qkv(1024, 1024, 2, 8, b=1))
    site = Site("down_blocks.0.attentions.0.transformer_blocks.0.attn1", 2, (32, 32))
    chosen = []
    choose = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda *args: chosen.append(args) or choose(*args))
    o, probs = jax.jit(lambda a: attend(site, a))(a)
    assert chosen == [(1024, 1024, 8, jnp.float32, 2)] and probs is None
    np.testing.assert_allclose(o, reference(*a), atol=2e-6)

    class Scores(Control):
        def logits(self, site, x):
            return x

    for extra in ({"controls": (Scores(),)}, {"return_probs": True}):
        o, _ = jax.jit(lambda a, extra=extra: attend(site, a, **extra))(a)
        np.testing.assert_allclose(o, reference(*a), atol=2e-6)
    assert len(chosen) == 1


@pytest.mark.parametrize(
    ("capability", "d", "dtype", "reason"),
    [
        (8.0, 160, jnp.bfloat16, "cuDNN: heads must be multiples of 8 and at most 128"),
        (9.0, 260, jnp.bfloat16, "cuDNN: heads must be multiples of 8 and at most 256"),
        (9.0, 40, jnp.float32, "cuDNN: it does not support float32"),
        (7.5, 40, jnp.float16, "cuDNN: it needs a CUDA GPU of compute capability 8.0 or higher"),
    ],
)
def test_a_fallback_on_the_gpu_says_why(monkeypatch, caplog, capability, d, dtype, reason):
    n, s = 4096, 77
    monkeypatch.setattr(kernels, "_cuda_capability", lambda: capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernels._say.cache_clear()
    with caplog.at_level(logging.INFO, "jaxmix.kernels"):
        kernels.choose(n, s, d, jnp.dtype(dtype))
        kernels.choose(n, s, d, jnp.dtype(dtype))
    assert [r.message for r in caplog.records if "cuDNN" in r.message] == [
        f"attention of {n} queries, {s} keys, heads of {d}: XLA instead of {reason}"
    ]


@pytest.mark.parametrize(("capability", "d"), [(8.0, 40), (9.0, 160)])
def test_the_gpu_takes_cudnn_where_it_can(monkeypatch, capability, d):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "_cuda_capability", lambda: capability)
    chosen = kernels.choose(1024, 77, d, jnp.dtype(jnp.bfloat16))
    assert chosen is kernels._by_platform((("cuda", kernels.cudnn),))


def test_a_fallback_on_the_tpu_says_why(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    kernels._say.cache_clear()
    with caplog.at_level(logging.INFO, "jaxmix.kernels"):
        kernels.choose(4096, 77, 64, jnp.dtype(jnp.bfloat16))
        kernels.choose(1100, 1100, 64, jnp.dtype(jnp.bfloat16))
        kernels.choose(4096, 4096, 64, jnp.dtype(jnp.bfloat16))
    assert [r.message.split("splash: ")[1] for r in caplog.records] == [
        "sequences below 1024 are faster without it",
        "sequences must be multiples of 128",
    ]
