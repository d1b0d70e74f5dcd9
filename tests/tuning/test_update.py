import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmix.tuning.update import (
    OptimizerConfig,
    TrainState,
    make_learning_rate,
    make_optimizer,
    make_update,
    update_average,
)
from jaxmix.types import InputError


def loss_fn(params, frozen, batch, key):
    noise = jax.random.normal(key)
    error = batch["x"] @ params["w"] + frozen["bias"] - batch["y"]
    return jnp.mean(error**2), {"noise": noise}


def problem(rows=8):
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(rows, 3)).astype(np.float32), "y": rng.normal(size=(rows, 2)).astype(np.float32)}
    return {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}, {"bias": jnp.ones(2)}, batch


def test_average_follows_the_formula_with_a_warmed_up_decay():
    params, frozen, batch = problem()
    optimizer, decay = optax.sgd(0.1), 0.3
    state, update = TrainState.create(params, optimizer), make_update(loss_fn, optimizer, decay)
    expected = np.asarray(params["w"], np.float64)
    for step in range(6):
        state, _ = update(state, frozen, batch, jax.random.key(0))
        rate = min(decay, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * np.asarray(state.params["w"], np.float64)
        np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)


def test_average_stays_where_the_parameters_stay():
    same = {"w": jnp.full((2,), 3.0)}
    np.testing.assert_array_equal(update_average(same, same, jnp.asarray(5), 0.9)["w"], same["w"])


def test_accumulated_micro_batches_equal_one_batch():
    params, frozen, batch = problem()
    optimizer, states = optax.sgd(0.1), []
    for accumulate in (1, 4):
        state = TrainState.create(jax.tree.map(jnp.array, params), optimizer, ema=False)
        state, metrics = make_update(loss_fn, optimizer, 0.0, accumulate)(state, frozen, batch, jax.random.key(0))
        states.append((state.params["w"], metrics["loss"], metrics["grad_norm"]))
    for one, many in zip(*states, strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-5)


def test_micro_batch_j_has_the_rows_j_and_every_further_one():
    params, frozen, batch = problem()
    optimizer, seen = optax.sgd(0.0), []

    def shown(params, frozen, batch, key):
        jax.debug.callback(lambda x: seen.append(x.tolist()), batch["x"], ordered=True)
        return loss_fn(params, frozen, batch, key)

    update = make_update(shown, optimizer, 0.0, accumulate=4)
    jax.block_until_ready(update(TrainState.create(params, optimizer, ema=False), frozen, batch, jax.random.key(0)))
    jax.effects_barrier()
    assert seen == [batch["x"][j::4].tolist() for j in range(4)]


def test_each_step_draws_its_own_numbers_and_only_the_step_decides():
    params, frozen, batch = problem()
    optimizer, key = optax.sgd(0.0), jax.random.key(7)
    update = make_update(loss_fn, optimizer, 0.0)
    state, drawn = TrainState.create(params, optimizer, ema=False), []
    for _ in range(3):
        state, metrics = update(state, frozen, batch, key)
        drawn.append(float(metrics["noise"]))
    assert drawn == [float(jax.random.normal(jax.random.fold_in(key, step))) for step in range(3)]
    assert len(set(drawn)) == 3


def test_wsd_warms_up_stays_and_cools_down_over_the_last_steps():
    rate = make_learning_rate(
        OptimizerConfig(learning_rate=2.0, lr_warmup_steps=4, lr_cooldown_steps=5, max_train_steps=20)
    )
    np.testing.assert_allclose([rate(s) for s in (0, 1, 3, 4, 15)], [0.5, 1.0, 2.0, 2.0, 2.0])
    np.testing.assert_allclose([rate(s) for s in (16, 18, 20, 30)], [1.6, 0.8, 0.0, 0.0], atol=1e-6)


def test_cosine_ends_at_zero():
    rate = make_learning_rate(OptimizerConfig(lr_scheduler="cosine", learning_rate=1.0, max_train_steps=10))
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [1.0, 0.5, 0.0], atol=1e-6)


def test_gradients_are_clipped_to_the_global_norm():
    cfg = OptimizerConfig(max_grad_norm=0.5, adam_beta1=0.0, adam_weight_decay=0.0)
    optimizer = make_optimizer(cfg)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    _, state = optimizer.update({"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}, optimizer.init(params), params)
    (adam,) = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    np.testing.assert_allclose(adam.mu["a"], [0.3, 0.0], rtol=1e-5)
    np.testing.assert_allclose(adam.mu["b"], 0.4, rtol=1e-5)


def test_biases_and_norms_do_not_decay():
    optimizer = make_optimizer(OptimizerConfig(adam_weight_decay=0.1, learning_rate=1.0))
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    changes, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(changes["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(changes["bias"], 0.0)


@pytest.mark.parametrize(
    "change", [{"lr_scheduler": "linear"}, {"max_train_steps": 0}, {"lr_warmup_steps": 8, "lr_cooldown_steps": 5}]
)
def test_impossible_schedules_are_named(change):
    with pytest.raises(InputError, match=next(iter(change)) if len(change) == 1 else "lr_cooldown_steps"):
        make_learning_rate(OptimizerConfig(**{"max_train_steps": 10, **change}))
