"""What the parity tests share: torch models with nothing at its default, read into our trees and compared."""

import functools

import jax
import numpy as np
import pytest

from jaxmix.weights import load_tree

torch = pytest.importorskip("torch")

TOLERANCE = 2e-5  # of the output's largest absolute value


def perturbed(theirs):
    """Return the torch model with every parameter moved: norms and biases start where a swap would go unnoticed."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return theirs.eval()


def loaded(theirs, ours, tmp_path):
    """Save the torch model, perturbed, and read its file into our tree."""
    perturbed(theirs).save_pretrained(tmp_path)
    return load_tree(tmp_path, ours.abstract_params())


def run(module, params, *args, **options):
    """Apply in one compiled program: op by op, each of hundreds of small ones would be compiled."""
    return jax.jit(functools.partial(module.apply, **options))({"params": params}, *args)


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def assert_close(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()
