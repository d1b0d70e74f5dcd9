"""Seven kinds of jobs draw what they drew before `Request`, `Guidance` and `LatentEdit` were there (commit e921408).

The numbers were recorded with that commit; in one environment, on one machine, they were equal to the bit.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmix
from jaxmix import DenseDiffusion, MagicFusion, Request, Segment, StyleAligned, hold
from jaxmix.samplers import Unguided
from jaxmix.testing import moved

RECORDED = Path(__file__).with_name("recorded.npz")
PROMPTS = ["a red car on the snow", "a dog"]
LEFT = np.pad(np.ones((16, 8), bool), ((0, 0), (0, 8)))
LAYOUTS = [[Segment("a red car", LEFT), Segment("the snow", ~LEFT)], [Segment("a dog", LEFT)]]


@pytest.fixture(scope="module")
def parts(tiny_pipeline):
    """Return the pipeline, an adapter, a second pipeline, two pictures."""
    fresh = jaxmix.VMix.init(jax.random.key(0), tiny_pipeline, {"color": ("vivid colors", "[V]")})
    params = {**moved(fresh.params, jax.random.key(1), 0.5), "aes_emb": fresh.params["aes_emb"]}
    other = {**tiny_pipeline.params, "unet": moved(tiny_pipeline.params["unet"], jax.random.key(5), 0.05)}
    pictures = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    adapter = jaxmix.VMix(fresh.config, params)
    return tiny_pipeline, adapter, dataclasses.replace(tiny_pipeline, params=other), pictures


def ask(prompts=PROMPTS, seeds=(1, 2), steps=4, **more):
    return Request(prompts=prompts, seeds=list(seeds), steps=steps, guidance_scale=3.0, **more)


def guided(pipe, adapter, other, pictures):
    return ask(), (adapter.on("all", 1.0), DenseDiffusion(LAYOUTS, window=(0.0, 0.5))), {}


def unguided(pipe, adapter, other, pictures):
    return ask(guidance=(Unguided(),)), (), {}


def inpainted(pipe, adapter, other, pictures):
    masks = np.zeros((2, 16, 16), np.uint8)
    masks[:, :8] = 1
    return ask(images=pictures, masks=masks, strength=0.8, sampler="euler_ancestral", steps=5), (), {}


def pinned(pipe, adapter, other, pictures):
    found = pipe.invert(pictures, PROMPTS, steps=4, guidance_scale=2.0)
    return ask(edits=(hold(found.course(1)[:1], [0], 2),)), (StyleAligned([2], shift=0.3),), {}


def one_model(pipe, adapter, other, pictures):
    return ask(), (MagicFusion(["a fish", "a boat"], k_expert=2.0, switch=400),), {}


def two_models(pipe, adapter, other, pictures):
    blend = MagicFusion(["a fish", "a boat"], k_expert=2.0, switch=400, expert=other, own_uncond=True)
    return ask(), (adapter.on("all", 1.0), blend), {}


def two_devices(pipe, adapter, other, pictures):
    return ask([*PROMPTS, "a cat", "a boat"], (1, 2, 3, 4)), (adapter.on(),), {"mesh": jaxmix.data_mesh(2)}


@pytest.mark.parametrize("case", [guided, unguided, inpainted, pinned, one_model, two_models, two_devices])
def test_the_old_numbers(parts, case):
    request, methods, how = case(*parts)
    got = parts[0].draw(request, methods, output="latent", **how)
    with np.load(RECORDED) as recorded:
        expected = recorded[case.__name__]
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-6 * np.abs(expected).max())  # other CPUs round otherwise
