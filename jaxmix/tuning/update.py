"""The optimisation step: from a loss function to one jitted update with donated state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec

from jaxmix.sharding import DATA, FSDP
from jaxmix.types import InputError

LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@struct.dataclass
class TrainState:
    """Everything that a step changes, and nothing else: what a checkpoint holds.

    step: () int32, updates done so far. params: the tree that learns. ema: its running average, or None.
    opt_state: optax state. The random key is not state: step k uses fold_in(key, k).
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation, ema: bool = True) -> TrainState:
        """Return the state before the first step; the average starts as a copy of the parameters."""
        copied = jax.tree.map(jnp.array, params)
        return cls(jnp.zeros((), jnp.int32), params, copied if ema else None, optimizer.init(params))

    @property
    def averaged(self) -> Any:
        """The parameters to sample from and to export: the average if there is one."""
        return self.params if self.ema is None else self.ema


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW, its learning-rate schedule and the average of the weights, named as in diffusers' trainers.

    Attributes:
        learning_rate: the highest learning rate, reached after the warm-up.
        lr_scheduler: constant_with_warmup, cosine (to zero at max_train_steps) or wsd (constant, then linear to zero).
        lr_warmup_steps: steps of linear growth from zero.
        lr_cooldown_steps: wsd only: steps at the end of max_train_steps of a linear fall to zero.
        max_train_steps: updates in the whole run, including those before a resume.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_epsilon: added to the root of the second moment.
        adam_weight_decay: decoupled decay, on arrays of two or more axes only (no biases, no norms).
        max_grad_norm: gradients are scaled down to this global norm; 0 for no limit.
        ema_decay: decay of the average of the weights; 0 keeps none.
        gradient_accumulation_steps: micro-batches per update; train_batch_size counts all of them together.
    """

    learning_rate: float = 1e-4
    lr_scheduler: str = "wsd"
    lr_warmup_steps: int = 0
    lr_cooldown_steps: int = 0
    max_train_steps: int = 1000
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    gradient_accumulation_steps: int = 1


def make_learning_rate(cfg: OptimizerConfig) -> optax.Schedule:
    """Return step -> learning rate for `cfg.lr_scheduler`."""
    peak, warm, total, cool = cfg.learning_rate, cfg.lr_warmup_steps, cfg.max_train_steps, cfg.lr_cooldown_steps
    if total < 1:
        raise InputError(f"max_train_steps: found {total}, expected 1 or more")
    if cfg.lr_scheduler == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0 if warm else peak, peak, warm, max(total, warm + 1))
    if cfg.lr_scheduler not in ("wsd", "constant_with_warmup"):
        raise InputError(f"lr_scheduler: found {cfg.lr_scheduler!r}, expected wsd, constant_with_warmup or cosine")
    if cfg.lr_scheduler == "constant_with_warmup" or not cool:
        cool, start = 1, total
    else:
        start = total - cool
        if start < warm:
            raise InputError(f"lr_cooldown_steps: found {cool}, expected at most {total - warm} after the warm-up")

    def learning_rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        up = (step + 1.0) / warm if warm else 1.0
        down = (total - step) / cool if start < total else 1.0
        return peak * jnp.clip(jnp.minimum(up, down), 0.0, 1.0)

    return learning_rate


def make_optimizer(cfg: OptimizerConfig, rates: Mapping[str, float] | None = None) -> optax.GradientTransformation:
    """Return clipping by global norm followed by AdamW under `make_learning_rate(cfg)`.

    `rates` multiply the learning rate of parts of the parameters, by the first key of their path.
    """
    adamw = optax.adamw(
        make_learning_rate(cfg),
        b1=cfg.adam_beta1,
        b2=cfg.adam_beta2,
        eps=cfg.adam_epsilon,
        weight_decay=cfg.adam_weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    clip = optax.clip_by_global_norm(cfg.max_grad_norm) if cfg.max_grad_norm else optax.identity()
    if not rates:
        return optax.chain(clip, adamw)

    def scale(updates: Any, params: Any) -> Any:
        return {name: optax.tree.scale(rates.get(name, 1.0), tree) for name, tree in updates.items()}

    return optax.chain(clip, adamw, optax.stateless(scale))


def update_average(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """Return the average after one more step; its decay warms up as min(decay, (1 + step) / (10 + step)).

    Without the warm-up the random initial weights would stay in a short run's average.
    """
    step = jnp.asarray(step, jnp.float32)
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (rate * (new - old)).astype(old.dtype), ema, params)


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int = 1,
    by_layer: Collection[str] = (),
) -> Callable[[TrainState, Any, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the jitted `update(state, frozen, batch, key) -> (state, metrics)`; `state` is donated.

    loss_fn(params, frozen, batch, key) -> (scalar loss, metrics) is differentiated with respect to `params` alone;
    `frozen` holds the weights that do not learn, as an argument so that they do not become constants of the program.
    Every leaf of `batch` has the rows first; `accumulate` splits them into this many micro-batches of equal size, whose
    gradients and metrics are averaged: micro-batch j has the rows j, j + accumulate, ..., so that no row leaves its
    device. `key` is the run's key: the step is folded in here, so a resumed run draws the same numbers.

    Under `jax.set_mesh` of a mesh (data, fsdp) rows stay on their devices, and weights that are split over fsdp are
    gathered at the start of the loss, in every micro-batch: the devices exchange whole weights, never activations.
    Those under the keys `by_layer` are left to their layers, which gather each for its own time
    (`jaxmix.sharding.gathered`): for models that no device can hold whole.
    """

    def whole_loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss_fn(_gather(params, by_layer), _gather(frozen, by_layer), _keep_rows(batch), key)

    grad_fn = jax.value_and_grad(whole_loss, has_aux=True)

    def micro_steps(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        if accumulate == 1:
            return grad_fn(params, frozen, batch, key)
        micro = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        micro = _keep_rows(micro, axis=1)

        def body(total: Any, inputs: Any) -> tuple[Any, None]:
            rows, index = inputs
            out = grad_fn(params, frozen, rows, jax.random.fold_in(key, index))
            return jax.tree.map(lambda a, b: a + b / accumulate, total, out), None

        shapes = jax.eval_shape(grad_fn, params, frozen, jax.tree.map(lambda x: x[0], micro), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(body, zeros, (micro, jnp.arange(accumulate)))[0]

    def update(state: TrainState, frozen: Any, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, metrics), grads = micro_steps(state.params, frozen, batch, jax.random.fold_in(key, state.step))
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        ema = None if state.ema is None else update_average(state.ema, params, state.step, ema_decay)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return jax.jit(update, donate_argnums=0)


def _gather(weights: Any, by_layer: Collection[str] = ()) -> Any:
    """Constrain weights to be whole on every device if the mesh in scope splits any, but for those of some keys."""
    if jax.sharding.get_abstract_mesh().shape.get(FSDP, 1) == 1:
        return weights
    if by_layer and isinstance(weights, Mapping):
        return {name: tree if name in by_layer else _gather(tree) for name, tree in weights.items()}
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), weights)


def _keep_rows(batch: Any, axis: int = 0) -> Any:
    """Constrain rows to stay split over the mesh in scope if there is one."""
    if FSDP not in jax.sharding.get_abstract_mesh().shape:
        return batch
    spec = PartitionSpec(*([None] * axis), (DATA, FSDP))
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, spec), batch)
