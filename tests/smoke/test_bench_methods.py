"""The bench's programs of IP-Adapter and of the training-free methods."""

import jax
import numpy as np
import pytest

from jaxmix.types import InputError
from scripts.bench.ours import materialize
from scripts.bench.programs import program
from scripts.bench.rows import ADAPTERS, METHODS, BenchRow

ROW = BenchRow("mini", "sample", 8, 2, "float32", 2, tiny=True)


# That of a StyleAdapter is that of an IP-Adapter with more tokens.
@pytest.mark.parametrize("engine", [name for name in (*ADAPTERS, *METHODS) if name != "ours-style-adapter"])
def test_a_method_changes_what_is_drawn_by_a_fitting_amount_of_work(engine):
    plain, made = program("ours", ROW), program(engine, ROW)
    work = made.flops() / plain.flops()
    three = (1.4, 1.55)  # branches, where the plain sampler has two
    bounds = {"ours-fusion": three, "ours-composable": three, "ours-aligned": (1.0, 1.3)}
    # A net is the way down and the middle again, on rows of both branches, and two are twice that.
    bounds |= {"ours-controlnet": (1.2, 1.6), "ours-controlnet-2": (1.4, 2.2)}
    # An inversion of two predictions a step, the second of them of two rows, beside the run with the net.
    bounds |= {"ours-together": (1.2, 1.6), "ours-instantstyle-plus": (2.0, 3.2)}
    low, high = bounds.get(engine, (1.0, 1.05))
    assert low <= work <= high
    weights, inputs = materialize(plain)
    held, more = materialize(made)
    held = {**held, "unet": weights} if "unet" in held else weights  # the same model, whatever else a program takes
    calls = [(plain, weights, inputs), (made, held, {**more, **inputs})]
    pictures = [np.asarray(jax.jit(p.fn)(*x)) for p, *x in calls]
    assert all(np.isfinite(x).all() for x in pictures)
    assert pictures[0].shape == pictures[1].shape and np.abs(pictures[0] - pictures[1]).max() > 1e-4


def test_rows_without_a_part_for_a_method_are_refused():
    with pytest.raises(InputError, match="has a part in the sampler alone"):
        program("ours-dense", BenchRow("mini", "unet", 8, 1, "float32", 0, tiny=True))
    with pytest.raises(InputError, match="a group has two images at least"):
        program("ours-aligned", BenchRow("mini", "sample", 8, 1, "float32", 2, tiny=True))
