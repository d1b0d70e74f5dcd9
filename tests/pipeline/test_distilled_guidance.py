"""A pipeline whose UNet is told the guidance scale, as those of latent consistency models are."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxmix
from jaxmix.models import UNet2DConditionModel
from jaxmix.samplers import Unguided
from jaxmix.types import InputError


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    unet = UNet2DConditionModel(dataclasses.replace(tiny_pipeline.unet.config, time_cond_proj_dim=8))
    params = {**tiny_pipeline.params, "unet": unet.init_params(jax.random.key(5))}
    return dataclasses.replace(tiny_pipeline, unet=unet, params=params, sampler="lcm", default_steps=2)


def test_one_row_an_image_is_told_its_own_scale(pipe):
    request = pipe.check(jaxmix.Request(prompts=["a", "b"], seeds=[1, 1], guidance_scale=[1.0, 8.5], sampler="lcm"))
    job = pipe.job(request, request.solver(pipe))
    assert [type(g) for g in job.guidance] == [Unguided]
    assert job.model.scale.tolist() == [1.0, 8.5]
    x = pipe.draw(request, output="latent")
    alone = pipe.draw(request.take([1]), output="latent")
    np.testing.assert_allclose(x[1:], alone, rtol=0, atol=2e-4)
    less = pipe.draw(dataclasses.replace(request, guidance_scale=np.asarray([1.0, 1.0])), output="latent")
    np.testing.assert_allclose(less[0], x[0], rtol=0, atol=2e-4)
    assert np.abs(less[1] - x[1]).max() > 1e-3


def test_what_needs_a_second_branch_is_refused_in_one_line(pipe):
    compose = jaxmix.ComposableDiffusion([["a", "b"]])
    for how in ({"guidance_rescale": 0.5}, {"methods": compose}):
        with pytest.raises(InputError, match="found it with a latent consistency model") as error:
            pipe.generate(["a"], **how)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="invert: found a latent consistency model"):
        pipe.invert(latents=np.zeros((1, *pipe.latent_shape), "f4"), steps=2)


def test_a_saved_folder_opens_as_it_was(pipe, tmp_path):
    pipe.save(tmp_path)
    again = jaxmix.load(tmp_path)
    assert again.unet.config.time_cond_proj_dim == 8 and again.sampler == "lcm" and again.default_steps == 2
    kernel = ("time_embedding", "cond_proj", "kernel")
    ours, read = pipe.params["unet"], again.params["unet"]
    for key in kernel:
        ours, read = ours[key], read[key]
    np.testing.assert_array_equal(ours, read)
