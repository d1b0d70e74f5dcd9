import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.schedule import NoiseSchedule
from jaxmix.testing import normal
from jaxmix.tuning.loss import bin_losses, diffusion_loss, draw_timesteps, min_snr_weights

GAMMA = 5.0


def schedule(prediction_type):
    return NoiseSchedule.from_config(
        {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type}
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_match_the_paper(prediction_type):
    noise = schedule(prediction_type)
    t = np.array([0, 1, 250, 500, 900, 999])
    abar = noise.alphas_cumprod[t].astype(np.float64)
    snr = abar / (1 - abar)
    expected = np.minimum(snr, GAMMA) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    found = min_snr_weights(noise.snr(jnp.asarray(t)), GAMMA, prediction_type)
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # 1 - abar cancels in float32 near t = 0


def test_rows_are_weighted_beside_min_snr_in_one_mean_over_all():
    latents, weights = normal(jax.random.key(0), (4, 4, 4, 2)), jnp.asarray([2.0, 0.0, 0.5, 1.0])

    def loss(row_weights):
        how = (lambda x, t: 0.3 * x, schedule("epsilon"), latents, jax.random.key(1), GAMMA)
        return float(diffusion_loss(*how, row_weights=row_weights)[0])

    each = [loss(jnp.eye(4)[i]) for i in range(4)]
    np.testing.assert_allclose(loss(weights), np.dot(each, weights), rtol=1e-5)
    np.testing.assert_allclose(loss(None), sum(each), rtol=1e-5)


def test_zero_terminal_snr_gives_finite_weights():
    snr = jnp.array([0.0, 1e-12, 2.0])
    np.testing.assert_allclose(min_snr_weights(snr, GAMMA, "epsilon"), [1.0, 1.0, 1.0])
    np.testing.assert_allclose(min_snr_weights(snr, GAMMA, "v_prediction"), [0.0, 1e-12, 2 / 3], rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_has_no_loss(prediction_type):
    noise = schedule(prediction_type)
    latents = normal(jax.random.key(0), (16, 4, 4, 2))

    def exact(x, t):
        abar = jnp.asarray(noise.alphas_cumprod)[t][:, None, None, None]
        eps = (x - jnp.sqrt(abar) * latents) / jnp.sqrt(1 - abar)
        return eps if prediction_type == "epsilon" else jnp.sqrt(abar) * eps - jnp.sqrt(1 - abar) * latents

    for gamma in (None, GAMMA):
        loss, _ = diffusion_loss(exact, noise, latents, jax.random.key(1), snr_gamma=gamma)
        assert loss < 1e-6


def test_a_zero_prediction_loses_the_target_power_and_bins_hold_every_row():
    latents = jnp.zeros((64, 8, 8, 4))
    loss, metrics = diffusion_loss(lambda x, t: jnp.zeros_like(x), schedule("epsilon"), latents, jax.random.key(0))
    assert abs(float(loss) - 1.0) < 0.05
    np.testing.assert_array_equal(metrics["bin_count"], [16, 16, 16, 16])
    np.testing.assert_allclose(metrics["bin_sum"].sum() / 64, loss, rtol=1e-5)


def test_noise_offset_adds_power_that_is_constant_over_the_picture():
    seen = []
    latents = jnp.zeros((256, 4, 4, 2))

    def predict(x, t):
        seen.append(x)
        return x

    diffusion_loss(predict, schedule("epsilon"), latents, jax.random.key(0), noise_offset=0.0)
    diffusion_loss(predict, schedule("epsilon"), latents, jax.random.key(0), noise_offset=1.0)
    difference = np.asarray(seen[1] - seen[0])
    assert np.ptp(difference, axis=(1, 2)).max() < 1e-6
    assert difference.std() > 0.3


def test_the_loss_is_float32_even_for_a_bfloat16_model():
    predict = lambda x, t: x.astype(jnp.bfloat16)  # noqa: E731
    loss, _ = diffusion_loss(predict, schedule("epsilon"), jnp.ones((4, 2, 2, 1), jnp.bfloat16), jax.random.key(0))
    assert loss.dtype == jnp.float32


def test_timesteps_are_uniform_and_spread_evenly():
    keys = jax.random.split(jax.random.key(0), 500)
    t = np.asarray(jax.vmap(lambda k: draw_timesteps(k, 8, 1000))(keys))
    assert t.min() >= 0 and t.max() <= 999
    np.testing.assert_allclose(t.mean(0), 499.5, atol=60)  # each row alone is uniform
    assert (np.diff(np.sort(t, axis=1), axis=1) >= 124).all()  # together they cover the range


def test_bins_split_the_timesteps_in_quarters():
    found = bin_losses(jnp.array([1.0, 2.0, 4.0, 8.0, 16.0]), jnp.array([0, 249, 250, 999, 750]), 1000)
    np.testing.assert_array_equal(found["bin_sum"], [3, 4, 0, 24])
    np.testing.assert_array_equal(found["bin_count"], [2, 1, 0, 2])


def test_logit_normal_timesteps_follow_their_quantiles():
    t = np.asarray(draw_timesteps(jax.random.key(0), 4096, 1000, logit_normal=(0.4, 1.0)))
    assert t.min() >= 0 and t.max() <= 999
    logits = np.log((t + 0.5) / (999.5 - t))
    np.testing.assert_allclose([logits.mean(), logits.std()], [0.4, 1.0], atol=0.02)
    uniform = np.asarray(draw_timesteps(jax.random.key(0), 4096, 1000))
    middle = [np.mean((x >= 250) & (x < 750)) for x in (t, uniform)]
    assert middle[0] > 0.6 > 0.52 > middle[1]
