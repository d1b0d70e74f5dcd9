"""DDIM trajectories against torch diffusers' DDIMScheduler."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.samplers import DDIM, Phase, classifier_free_guidance, sample
from jaxmix.schedule import NoiseSchedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
STEPS, SCALE = 25, 7.5
SPACINGS = {"leading": {}, "leading, offset 1": {"steps_offset": 1}} | {
    spacing: {"timestep_spacing": spacing} for spacing in ("trailing", "linspace")
}


def weights():
    draw = np.random.default_rng(0).normal
    return [(draw(size=size) / size[0] ** 0.5).astype("f4") for size in ((4, 16), (3, 16), (16, 4))]


def small_model(xp, x, t, context):
    """A perceptron on pixels that mixes x, t and context, in numpy-like library `xp`."""
    first, second, last = (xp.asarray(weight) for weight in weights())
    return xp.tanh(x @ first + (context @ second)[:, None, None, :] + t / 1000) @ last


def relative(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def torch_trajectory(scheduler, predict, x, scale=SCALE, eta=0.0, noises=None):
    scheduler.set_timesteps(STEPS)
    states = []
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            uncond, cond = predict(x, t)
            noise = None if noises is None else noises[i]
            x = scheduler.step(uncond + scale * (cond - uncond), t, x, eta=eta, variance_noise=noise).prev_sample
            states.append(x)
    return torch.stack(states).numpy()


@jax.jit
def jax_trajectory(solver, x, context, noises, scale):
    rows = context.reshape(-1, context.shape[-1])
    guided = classifier_free_guidance(lambda x, t, step: small_model(jnp, x, t, rows), scale)
    last, starts = sample(
        [Phase(guided, 0, STEPS)], solver, x, record=lambda x, pred, i: x, noise_fn=lambda i: noises[i]
    )
    return jnp.concatenate([starts[1:], last[None]])


def run_both(config, scale=SCALE, eta=0.0, **changes):
    """Returns the states after every step, (steps, n, h, w, c), of ours and of torch."""
    draw = np.random.default_rng(1).normal
    x, context = draw(size=(3, 4, 4, 4)).astype("f4"), draw(size=(3, 2, 3)).astype("f4")  # context: (n, branch, d)
    noises = draw(size=(STEPS, *x.shape)).astype("f4")

    def predict(x, t):
        return [small_model(torch, x, float(t), torch.from_numpy(context[:, branch])) for branch in (0, 1)]

    scheduler = diffusers.DDIMScheduler(**(STABLE_DIFFUSION | config | changes))
    theirs = torch_trajectory(scheduler, predict, torch.from_numpy(x), scale, eta, torch.from_numpy(noises))

    solver = DDIM.create(NoiseSchedule.from_config(dict(scheduler.config)), STEPS, eta)
    return jax_trajectory(solver, x, context, noises, scale), theirs


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_guided_trajectories_agree(prediction_type, spacing, set_alpha_to_one):
    ours, theirs = run_both(spacing, prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one)
    assert max(itertools.starmap(relative, zip(ours, theirs, strict=True))) <= 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_trajectories_agree_on_the_cosine_schedule(prediction_type):
    config = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "prediction_type": prediction_type}
    assert relative(*run_both(config)) <= 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_clipped_trajectories_agree(prediction_type, limit):
    # At scale 1: clipping makes guided trajectories chaotic, torch's own run included.
    config = {"clip_sample": True, "clip_sample_range": limit, "prediction_type": prediction_type}
    ours, theirs = run_both(config, scale=1.0)
    assert relative(ours, theirs) <= 1e-5
    assert relative(run_both(config | {"clip_sample": False}, scale=1.0)[0], theirs) > 1e-2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_every_single_step_agrees_with_clipping_and_noise(prediction_type, eta):
    draw = np.random.default_rng(3).normal
    scheduler = diffusers.DDIMScheduler(
        **(STABLE_DIFFUSION | {"clip_sample": True, "prediction_type": prediction_type})
    )
    scheduler.set_timesteps(STEPS)
    solver = DDIM.create(NoiseSchedule.from_config(dict(scheduler.config)), STEPS, eta)
    assert solver.timesteps.tolist() == scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps):
        x, pred, noise = draw(size=(3, 2, 4, 4, 4)).astype("f4")
        args = torch.from_numpy(pred), t, torch.from_numpy(x)
        expected = scheduler.step(*args, eta=eta, variance_noise=torch.from_numpy(noise)).prev_sample.numpy()
        assert relative(solver.step(i, jnp.asarray(x), jnp.asarray(pred), jnp.asarray(noise)), expected) <= 2e-6


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_trajectories_agree(eta):
    ours, theirs = run_both({"steps_offset": 1}, eta=eta)
    assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_trajectories_around_a_unet_agree(prediction_type, tmp_path):
    from jaxmix.models import UNet2DConditionModel, UNetConfig
    from jaxmix.weights import load_tree, read_config

    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=24, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    unet = UNet2DConditionModel(UNetConfig.from_dict(read_config(tmp_path)))
    params = load_tree(tmp_path, unet.abstract_params())

    draw = np.random.default_rng(2).normal
    x, context = draw(size=(2, 8, 8, 4)).astype("f4"), draw(size=(4, 7, 24)).astype("f4")  # rows: u0, c0, u1, c1
    config = STABLE_DIFFUSION | {"steps_offset": 1, "set_alpha_to_one": False, "prediction_type": prediction_type}

    def predict(x, t):
        rows = theirs(x.repeat_interleave(2, dim=0), t, torch.from_numpy(context)).sample
        return rows[0::2], rows[1::2]

    start = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    expected = torch_trajectory(diffusers.DDIMScheduler(**config), predict, start)[-1].transpose(0, 2, 3, 1)

    @jax.jit
    def run(params, x, context, scale):
        guided = classifier_free_guidance(lambda x, t, step: unet.apply({"params": params}, x, t, context), scale)
        return sample([Phase(guided, 0, STEPS)], DDIM.create(NoiseSchedule.from_config(config), STEPS), x)

    assert relative(run(params, x, context, SCALE), expected) <= 1e-5
