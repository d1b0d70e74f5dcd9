"""The same comparisons from committed files, so that they run where there is no torch.

``python -m tests.parity.make_fixtures`` wrote them with torch diffusers and transformers.
"""

import functools
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    UNet2DConditionModel,
    UNetConfig,
    VAEConfig,
)
from jaxmix.pipeline.job import denoise
from jaxmix.samplers import DDIM
from jaxmix.schedule import NoiseSchedule
from jaxmix.weights import load_tree, read_config
from tests.jobs import plain_job

FOLDER = Path(__file__).parent / "fixtures"

pytestmark = pytest.mark.skipif(find_spec("torch") is not None, reason="the live comparisons run here")


@pytest.fixture(scope="module")
def outputs():
    with np.load(FOLDER / "outputs.npz") as file:
        return dict(file)


def model(name, kind, config):
    module = kind(config.from_dict(read_config(FOLDER / name)))
    return module, load_tree(FOLDER / name, module.abstract_params())


def assert_close(got, expected, tolerance=2e-5):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_unet(outputs):
    unet, params = model("unet", UNet2DConditionModel, UNetConfig)
    got = jax.jit(unet.apply)({"params": params}, outputs["latents"], outputs["t"], outputs["context"])
    assert_close(got, outputs["prediction"])


def test_vae(outputs):
    vae, params = model("vae", AutoencoderKL, VAEConfig)
    mean, logvar = jax.jit(functools.partial(vae.apply, method="encode"))({"params": params}, outputs["images"])
    assert_close(mean, outputs["mean"])
    assert_close(logvar, outputs["logvar"])
    decoded = jax.jit(functools.partial(vae.apply, method="decode"))({"params": params}, outputs["mean"])
    assert_close(decoded, outputs["decoded"])


def test_text_encoder(outputs):
    text, params = model("text_encoder", CLIPTextModel, CLIPTextConfig)
    got = jax.jit(text.apply)({"params": params}, outputs["ids"])
    assert_close(got.last_hidden_state, outputs["states"])
    assert_close(got.pooled, outputs["pooled"])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_guided_trajectory_of_25_steps_through_the_pipelines_sampler(outputs, kind):
    unet, params = model("unet", UNet2DConditionModel, UNetConfig)
    schedule = NoiseSchedule.from_config(read_config(FOLDER / f"{kind}.json"))
    context = jnp.stack([jnp.zeros_like(outputs["context"]), outputs["context"]], axis=1)
    job = plain_job(unet, params, jnp.asarray(outputs["latents"]), context, jnp.full((2,), 7.5))
    got = denoise(job, DDIM.create(schedule, 25))
    assert_close(got, outputs[f"trajectory_{kind}"], tolerance=1e-5)
