"""Latent consistency models against diffusers: the UNet that is told its guidance, and whole runs of its pipeline."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.models import UNet2DConditionModel, UNetConfig
from jaxmix.models.unet import guidance_embedding
from jaxmix.pipeline.job import Denoiser, Job, denoise
from jaxmix.rows import Text
from jaxmix.samplers import Unguided, make_solver, step_noise
from jaxmix.schedule import NoiseSchedule
from jaxmix.types import InputError
from jaxmix.weights import read_config
from tests.parity.oracle import assert_close, loaded, nhwc, run

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SCALES = np.asarray([1.0, 2.5, 8.5], "f4")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a tiny UNet of torch that is told its guidance, ours, and our parameters."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=24, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), time_cond_proj_dim=16,
        norm_num_groups=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("unet")
    theirs.save_pretrained(folder)
    ours = UNet2DConditionModel(UNetConfig.from_dict(read_config(folder)))
    return theirs, ours, loaded(theirs, ours, folder)


def embedded(scales):
    pipe = object.__new__(diffusers.StableDiffusionPipeline)
    return pipe.get_guidance_scale_embedding(torch.from_numpy(scales) - 1, embedding_dim=16)


def test_guidance_is_embedded_as_diffusers_does():
    ours = guidance_embedding(UNetConfig(time_cond_proj_dim=16), SCALES)
    np.testing.assert_allclose(ours, embedded(SCALES).numpy(), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="time_cond_proj_dim is None"):
        guidance_embedding(UNetConfig(), SCALES)


def test_a_run_of_lcm_agrees(pair):
    """The whole program, with one row an image, told scales of each image's own."""
    theirs, ours, params = pair
    draw = np.random.default_rng(1).normal
    x, context = draw(size=(3, 8, 8, 4)).astype("f4"), draw(size=(3, 2, 7, 24)).astype("f4")
    config = {"_class_name": "LCMScheduler"}
    solver = make_solver("lcm", NoiseSchedule.from_config(config), 4)
    seeds = jnp.asarray([3, 4, 5], jnp.uint32)
    job = Job(
        jnp.asarray(x), Denoiser(ours, params, Text(jnp.asarray(context)), (), jnp.asarray(SCALES)), (Unguided(),),
        seeds=seeds,
    )  # fmt: skip
    made = denoise(job, solver)

    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(4)
    state, module = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), diffusers.schedulers.scheduling_lcm
    noises = iter(step_noise(seeds, i, x.shape[1:]) for i in range(4))

    def noise(*args, **kwargs):
        return torch.from_numpy(np.asarray(next(noises)).transpose(0, 3, 1, 2).copy())

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "randn_tensor", noise)
        for t in scheduler.timesteps:
            pred = theirs(state, t, torch.from_numpy(context[:, 1]), timestep_cond=embedded(SCALES)).sample
            state = scheduler.step(pred, t, state).prev_sample
    assert np.abs(made - nhwc(state)).max() <= 2e-4 * np.abs(nhwc(state)).max()
    told_less = dataclasses.replace(job, model=dataclasses.replace(job.model, scale=jnp.ones(3)))
    again = denoise(told_less, solver)
    np.testing.assert_allclose(again[0], made[0], rtol=0, atol=1e-5)
    assert np.abs(again[2] - made[2]).max() > 1e-2


def test_the_unet_agrees_told_and_untold(pair):
    theirs, ours, params = pair
    draw = np.random.default_rng(2).normal
    x, context = draw(size=(3, 8, 8, 4)).astype("f4"), draw(size=(3, 7, 24)).astype("f4")
    state = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    for cond in (draw(size=(3, 16)).astype("f4"), None):
        told = None if cond is None else torch.from_numpy(cond)
        expected = theirs(state, 500, torch.from_numpy(context), timestep_cond=told).sample
        assert_close(run(ours, params, x, 500, context, (), None, cond), nhwc(expected))
    with pytest.raises(InputError, match="timestep_cond: found 8 channels, expected 16 with this model"):
        ours.apply({"params": params}, x, 500, context, (), None, np.zeros((3, 8)))
