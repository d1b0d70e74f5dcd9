"""Each form of LoRA against its equation in float64 by loops, and strength 0 bit for bit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import InputError
from jaxmix import lora_forms as forms
from jaxmix.tuning import lora as low_rank

KERNELS = {"dense": (4, 6), "1x1": (1, 1, 4, 6), "3x3": (3, 3, 4, 6)}
R = 2
S, STRENGTH = 3.0 / R, 0.7  # alpha / r

add = jax.jit(low_rank.add)


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("f4")


def loha(o, i, k):
    shapes = {"hada_w1_a": (o, R), "hada_w1_b": (R, i * k), "hada_w2_a": (o, R), "hada_w2_b": (R, i * k)}
    return {role: numbers(*shape, seed=n) for n, (role, shape) in enumerate(shapes.items())}


def tucker(a, b, t, o, i, space, seed):
    return {a: numbers(R, o, seed=seed), b: numbers(R, i, seed=seed + 1), t: numbers(R, R, *space, seed=seed + 2)}


def lokr(o, i, space, first, second):
    """Return factors of (2, 2) and (o / 2, i / 2), each whole, as a product, or around a Tucker core."""
    k = int(np.prod(space, dtype=int))
    f = {"whole": {"lokr_w1": numbers(2, 2)}, "halves": {"lokr_w1_a": numbers(2, R), "lokr_w1_b": numbers(R, 2)}}[first]
    if second == "whole":
        return f | {"lokr_w2": numbers(o // 2, i // 2, *space, seed=2)}
    if second == "halves":
        return f | {"lokr_w2_a": numbers(o // 2, R, seed=2), "lokr_w2_b": numbers(R, i // 2 * k, seed=3)}
    return f | tucker("lokr_w2_a", "lokr_w2_b", "lokr_t2", o // 2, i // 2, space, 2)


def cases():
    for name, shape in KERNELS.items():
        *space, i, o = shape
        k, ones = int(np.prod(space, dtype=int)), [1] * len(space)
        made = {
            "lora": {"down": numbers(*space, i, R), "up": numbers(*ones, R, o)},
            "loha": loha(o, i, k),
            "full": {"diff": numbers(*shape)},
        }
        seconds = ("whole", "halves", "core") if space else ("whole", "halves")
        for first, second in itertools.product(("whole", "halves"), seconds):
            made[f"lokr {first} {second}"] = lokr(o, i, space, first, second)
        if name == "3x3":
            middle = {"down": numbers(1, 1, i, R), "mid": numbers(3, 3, R, 3), "up": numbers(1, 1, 3, o)}
            first, second = (tucker(f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}", o, i, space, 9 * n) for n in (1, 2))
            made |= {"locon": middle, "loha around cores": first | second}
        for form, f in made.items():
            yield pytest.param(shape, f, id=f"{name} {form}")


def product_by_loops(f, a, b, t, o, i, k):
    """Return (o, i, k) from a pair of factors in torch's layout."""
    out, left, right = np.zeros((o, i, k)), np.float64(f[a]), np.float64(f[b])
    for y, x, z in itertools.product(range(o), range(i), range(k)):
        if t in f:
            core = np.float64(f[t]).reshape(R, R, k)
            out[y, x, z] = sum(core[m, n, z] * left[m, y] * right[n, x] for m in range(R) for n in range(R))
        else:
            out[y, x, z] = sum(left[y, r] * right[r, x * k + z] for r in range(R))
    return out


def change(shape, f):
    """Return s dW in our layout and float64, by the equations."""
    *space, i, o = shape
    k = int(np.prod(space, dtype=int))
    out = np.zeros((o, i, k))
    if "diff" in f:
        return np.float64(f["diff"])
    if "down" in f:
        up = np.float64(f["up"]).reshape(-1, o)
        if "mid" in f:
            return S * np.einsum("hwnm,in,mo->hwio", np.float64(f["mid"]), np.float64(f["down"])[0, 0], up)
        down = np.float64(f["down"]).reshape(k, i, R)
        for y, x, z in itertools.product(range(o), range(i), range(k)):
            out[y, x, z] = S * sum(down[z, x, r] * up[r, y] for r in range(R))
    elif "hada_w1_a" in f:
        first, second = (product_by_loops(f, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}", o, i, k) for n in (1, 2))
        out = S * first * second
    else:
        if "lokr_w1" in f:
            first = np.float64(f["lokr_w1"])
        else:
            first = product_by_loops(f, "lokr_w1_a", "lokr_w1_b", "none", 2, 2, 1)[..., 0]
        if "lokr_w2" in f:
            second = np.float64(f["lokr_w2"]).reshape(o // 2, i // 2, k)
        else:
            second = product_by_loops(f, "lokr_w2_a", "lokr_w2_b", "lokr_t2", o // 2, i // 2, k)
        for z in range(k):
            out[..., z] = np.kron(first, second[..., z])
        out *= 1.0 if {"lokr_w1", "lokr_w2"} <= set(f) else S
    return out.transpose(2, 1, 0).reshape(shape)


def with_norms(weight, g):
    """Return a weight whose every row along g's axis has the norm that g says."""
    axis = weight.ndim - 1 if g.shape[-1] == weight.shape[-1] else weight.ndim - 2
    out = np.array(weight)
    for n in range(weight.shape[axis]):
        row = np.take(weight, n, axis)
        out[(slice(None),) * axis + (n,)] = np.float64(g.reshape(-1)[n]) * row / np.sqrt((row**2).sum())
    return out


def largest_error(got, base, expected):
    return np.abs(np.float64(got) - base - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("shape", "f"), [*cases()])
def test_each_form_is_its_equation_alone_and_with_dora_on_both_axes(shape, f):
    """One program: the form, DoRA of it along the outputs and along the inputs, each at its strength."""
    *space, i, o = shape
    base, ones = numbers(*shape, seed=7), [1] * len(space)
    held = f | {"alpha": np.float32(S * R)} if forms.rank({r: x.shape for r, x in f.items()}) else f
    outputs, inputs = np.abs(numbers(*ones, 1, o)) + 1, np.abs(numbers(*ones, i, 1)) + 1
    terms = [held, held | {"magnitude": outputs}, held | {"magnitude": inputs}]
    for term in terms:
        low_rank.check({"m": (("m",), {"kernel": base})}, {"m": term})
    delta, exact = change(shape, f), np.float64(base)
    expected = [delta, *(with_norms(exact + delta, g) - exact for g in (outputs, inputs))]
    for n in range(3):
        strengths = np.where(np.arange(3) == n, np.float32(STRENGTH), 0)
        assert largest_error(add(base, terms, strengths), base, STRENGTH * expected[n]) < 1e-5
    together = np.asarray([0.5, -0.4, 1.5], "f4")
    summed = sum(m * x for m, x in zip(together, expected, strict=True))
    assert largest_error(add(base, terms, together), base, summed) < 1e-5
    np.testing.assert_array_equal(bits(add(base, terms, np.zeros(3, "f4"))), bits(base))


def bits(x):
    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_strength_zero_keeps_every_bit_even_of_a_negative_zero_or_if_a_form_overflows(dtype):
    base = jnp.asarray(numbers(4, 6), dtype).at[0].set(-0.0)
    huge = {"down": np.full((4, 2), 3e38, "f4"), "up": np.full((2, 6), 3e38, "f4"), "alpha": np.float32(9)}
    terms = [huge, huge | {"magnitude": numbers(1, 6)}, {"diff": numbers(4, 6)}]
    np.testing.assert_array_equal(bits(low_rank.add(base, terms, [0.0, 0, jnp.float32(0)])), bits(base))


def test_plain_factors_give_the_bits_that_they_always_gave():
    """The sum as it was before there were other forms, which recorded pictures depend on."""

    @jax.jit
    def before(kernel, factors, strengths):
        total = kernel.astype(jnp.float32)
        for f, strength in zip(factors, strengths, strict=True):
            up = f["up"].astype(jnp.float32).reshape(f["up"].shape[-2:])
            scale = jnp.asarray(strength, jnp.float32) * jnp.asarray(f["alpha"], jnp.float32) / f["down"].shape[-1]
            total = total + scale * jnp.matmul(f["down"].astype(jnp.float32), up, precision="highest")
        return total.astype(kernel.dtype)

    f = [{"down": numbers(3, 3, 32, 3, seed=n), "up": numbers(1, 1, 3, 48, seed=n), "alpha": 2.5} for n in (0, 1)]
    for dtype in (jnp.float32, jnp.bfloat16):
        kernel = jnp.asarray(numbers(3, 3, 32, 48, seed=5), dtype)
        strengths = np.asarray([0.7, -1.3], "f4")
        np.testing.assert_array_equal(bits(add(kernel, f, strengths)), bits(before(kernel, f, strengths)))


def test_dora_of_a_row_that_becomes_zero_is_finite():
    base = numbers(4, 6)
    f = {"diff": -base, "magnitude": np.ones((1, 6), "f4")}
    np.testing.assert_array_equal(low_rank.add(base, [f], [1.0]), np.zeros((4, 6)))


def test_biases_norms_and_embeddings_are_reached_and_dora_commutes():
    params = {
        "a": {"kernel": numbers(4, 6), "bias": numbers(6)},
        "n": {"scale": numbers(6), "bias": numbers(6, seed=1)},
        "e": {"table": {"embedding": numbers(5, 4)}},
    }
    first = {
        "a": loha(6, 4, 1) | {"alpha": np.float32(1), "magnitude": np.ones((1, 6), "f4"), "diff_b": numbers(6, seed=2)},
        "n": {"diff": numbers(6, seed=3), "diff_b": numbers(6, seed=4)},
        "e.table": {"diff": numbers(5, 4, seed=5)},
    }
    second = {"a": {"diff": numbers(4, 6, seed=6), "magnitude": np.ones((4, 1), "f4")}, "n": {"diff_b": numbers(6)}}
    made = low_rank.merge(params, [first, second], [0.5, 2.0])
    np.testing.assert_allclose(made["a"]["bias"], params["a"]["bias"] + 0.5 * first["a"]["diff_b"], rtol=1e-6)
    np.testing.assert_allclose(made["n"]["scale"], params["n"]["scale"] + 0.5 * first["n"]["diff"], rtol=1e-6)
    bias = params["n"]["bias"] + 0.5 * first["n"]["diff_b"] + 2 * second["n"]["diff_b"]
    np.testing.assert_allclose(made["n"]["bias"], bias, rtol=1e-5)
    table = params["e"]["table"]["embedding"] + 0.5 * first["e.table"]["diff"]
    np.testing.assert_allclose(made["e"]["table"]["embedding"], table, rtol=1e-6)
    turned = low_rank.merge(params, [second, first], [2.0, 0.5])
    np.testing.assert_allclose(turned["a"]["kernel"], made["a"]["kernel"], rtol=1e-5, atol=1e-5)
    with pytest.raises(
        InputError, match=r"a: found LoHa with DoRA \(.*\), expected a plain LoRA \(down, up and alpha\)"
    ):
        low_rank.attach(params, {"a": first["a"]})


BAD = {
    "another base": ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)}, "to fit a "),
    "no rank": ({"lokr_w1": (0, 2), "lokr_w2": (3, 2)}, "another base"),
    "not a product": ({"lokr_w1": (4, 2), "lokr_w2": (3, 2)}, "another base"),
    "half": ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 4)}, "which is no hada_w2_a and no hada_w2_b"),
    "half a core": ({"lokr_w1": (2, 2), "lokr_t2": (2, 2, 1, 1)}, "no lokr_w2_a and no lokr_w2_b"),
    "twice": ({"lokr_w1": (2, 2), "lokr_w1_a": (2, 2), "lokr_w1_b": (2, 2), "lokr_w2": (3, 2)}, "more than one form"),
    "two forms": ({"down": (4, 2), "up": (2, 6), "diff": (4, 6)}, "more than one form"),
    "magnitude alone": ({"magnitude": (1, 6)}, "no down and no up"),
    "magnitude of another axis": ({"diff": (4, 6), "magnitude": (6, 1)}, "another base"),
    "a bias that is not there": ({"diff_b": (6,)}, "another base"),
    "no alpha": ({"down": (4, 2), "up": (2, 6)}, "no alpha"),
}


@pytest.mark.parametrize(("shapes", "message"), BAD.values(), ids=BAD)
def test_arrays_that_are_no_form_for_the_module_are_refused_in_one_line(shapes, message):
    f = {role: np.zeros(shape, "f4") for role, shape in shapes.items()}
    if message != "no alpha":
        f["alpha"] = np.float32(1)
    with pytest.raises(InputError, match=message) as raised:
        low_rank.merge({"m": {"kernel": numbers(4, 6)}}, [{"m": f}], [1.0])
    assert str(raised.value).startswith("lora: m: found ") and "\n" not in str(raised.value)
