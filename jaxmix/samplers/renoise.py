"""ReNoise: Real Image Inversion Through Iterative Noising (arXiv 2403.14602), with its regularisation of the noise.

A step of DDIM inversion asks for z = G(z_prev, eps(z, t)), in which z is on both sides. ReNoise iterates: y = z_prev,
then for i = 0 ... N::

    eps_i = eps(y, t),   y = G(z_prev, eps_i)

In the range of averaging eps_i is added to a mean, and from where that range begins eps_i and, at the end, the mean
are regularised against eps' = eps(q-sample(z_0, t; eta), t): R rounds of ::

    e <- e - a clip(grad KL(e, eps'), -c, c),   then K times   e <- e - b grad A(e) / K

KL compares the mean and the variance of the patches of 4 x 4 of every channel; A is what is left of the correlation of
each channel with itself, rolled by a random distance, over a pyramid of averages. Whatever is not finite is not taken.

Where we differ from the authors' code: its noise correction is left out (DDIM has none, and it is off in the settings
of InstantStyle-Plus); images that do not fill whole patches or pyramids leave their rest out; and eta and the rolls
come from `jax.random`, by the seed of each image, where torch has one generator that goes on from step to step. So the
numbers of two runs of the same seed there and here differ as those of two seeds do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxmix.rows import dataclass, numbers, per_row, static
from jaxmix.samplers.inversion import DDIMInversion
from jaxmix.samplers.noise import seed_array
from jaxmix.schedule import NoiseSchedule, prediction_to_eps
from jaxmix.types import Array, InputError, shown, whole

PATCH, COARSEST, TINY = 4, 8, 1e-6

RowsFn = Callable[[Array, Array, Array], Array]
"""``(x, t, step) -> prediction`` of rows (n, h, w, c), or of each row twice, (2 n, h, w, c)."""


class Plan(NamedTuple):
    """What the steps of one part of an inversion do: ``iterations`` N, and the range of averaging."""

    iterations: int
    average: tuple[int, int]
    regularise: bool

    @property
    def compares(self) -> bool:
        """Whether anything is regularised, for which the noise of the noised image is needed."""
        return self.regularise and self.iterations >= self.average[0]


@dataclasses.dataclass(frozen=True)
class ReNoise:
    """How an inversion is refined (arXiv 2403.14602); the defaults are those of InstantStyle-Plus (2407.00788).

    ``iterations`` N takes N + 1 predictions a step. Predictions of the iterations in ``below`` (first, stop) are
    averaged at timesteps under ``switch``, those in ``above`` at all others; under it N is at most the stop of
    ``below``. With ``regularise`` predictions from the first of the range on are regularised: ``rounds`` of a step of
    ``kl_rate`` on the divergence, its gradient within ``kl_clip``, and of ``rolls`` steps that add up to
    ``correlation_rate`` on the correlation. ``seed`` is one for all images, or one for each.

    ``iterations=0, regularise=False`` is plain DDIM inversion, bit for bit. Counts and ranges are part of the program,
    all other numbers are not.
    """

    iterations: int = 1
    below: tuple[int, int] = (0, 5)
    above: tuple[int, int] = (8, 10)
    switch: float = 250
    regularise: bool = True
    rounds: int = 4
    rolls: int = 5
    kl_rate: float = 0.065
    kl_clip: float = 100.0
    correlation_rate: float = 20.0
    seed: int | Sequence[int] = 7865

    def __post_init__(self) -> None:
        """Refuse counts, ranges and numbers that mean nothing, with an `InputError`."""
        for name, least in (("iterations", 0), ("rounds", 1), ("rolls", 0)):
            whole(f"ReNoise: {name}", getattr(self, name), least)
        for name in ("below", "above"):
            ends = getattr(self, name)
            if not (isinstance(ends, tuple) and len(ends) == 2 and all(isinstance(x, int) and x >= 0 for x in ends)):
                raise InputError(f"ReNoise: {name}: found {shown(ends)}, expected (first, stop) of iterations from 0")
        for name in ("switch", "kl_rate", "kl_clip", "correlation_rate"):
            numbers(f"ReNoise: {name}", getattr(self, name), 1, least=0.0)

    @property
    def plain(self) -> bool:
        """Whether this is the plain inversion."""
        return self.iterations == 0 and not self.regularise

    def bind(self, schedule: NoiseSchedule, steps: int, n: int) -> Refined:
        """Return what an inversion of ``n`` images in so many steps is refined with.

        Raises `InputError` for a wrong number of seeds, and seeds out of range.
        """
        given: Sequence[int] = [self.seed] * n if isinstance(self.seed, (int, np.integer)) else list(self.seed)
        if len(given) != n:
            raise InputError(f"ReNoise: seed: found {len(given)} seeds, expected 1 or one for each of the {n} images")
        under = Plan(min(self.iterations, self.below[1]), self.below, self.regularise)
        over = Plan(self.iterations, self.above, self.regularise)
        few = int((schedule.timesteps(steps) < self.switch).sum())
        parts = [(0, few, under), (few, steps, over)]
        return Refined(
            seeds=jnp.asarray(seed_array(given)),
            kl_rate=jnp.asarray(self.kl_rate, jnp.float32),
            kl_clip=jnp.asarray(self.kl_clip, jnp.float32),
            correlation_rate=jnp.asarray(self.correlation_rate, jnp.float32),
            rounds=self.rounds,
            rolls=self.rolls,
            parts=tuple(part for part in parts if part[0] < part[1]),
        )


@dataclass
class Refined:
    """A `ReNoise` for the images of an inversion: ``parts`` are (start, stop, plan) of its steps."""

    seeds: Int[Array, "n 2"] = per_row()
    kl_rate: Float[Array, ""]
    kl_clip: Float[Array, ""]
    correlation_rate: Float[Array, ""]
    rounds: int = static(default=4)
    rolls: int = static(default=5)
    parts: tuple[tuple[int, int, Plan], ...] = static(default=())

    @property
    def compares(self) -> bool:
        """Whether any step needs the noise of the noised image."""
        return any(plan.compares for _, _, plan in self.parts)

    def noise(self, shape: tuple[int, ...]) -> Float[Array, "n h w c"]:
        """Return the noise of each image, of which there is one for all steps."""
        keys = _keys(self.seeds, 0, 0)
        return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)

    def draw(self, step: Array | int, call: int, h: int, c: int) -> Int[Array, "rounds rolls n levels c"]:
        """Return the distances of the rolls of one regularisation, the ``call``-th of a step, for maps of height h."""
        sides = jnp.asarray(_heights(h), jnp.int32)[:, None]

        def row(key: Array) -> Array:
            shape = (self.rounds, self.rolls, len(sides), c)
            return jax.random.randint(key, shape, 0, jnp.maximum(sides // 2, 1), jnp.int32)

        return jnp.moveaxis(jax.vmap(row)(_keys(self.seeds, 1 + step, call)), 0, 2)

    def regularised(self, e: Array, towards: Array, step: Array | int, call: int) -> Array:
        """Return predicted noise, regularised, or as it is in rows in which that is no number."""
        rolls = self.draw(step, call, e.shape[1], e.shape[3])
        made = regularised(e, towards, rolls, self.kl_rate, self.kl_clip, self.correlation_rate)
        return jnp.where(jnp.isnan(made).any((1, 2, 3), keepdims=True), e, made)


def _keys(seeds: Array, step: Array | int, call: int) -> Array:
    def key(half: Array) -> Array:
        made = jax.random.wrap_key_data(half, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(made, step), call)

    return jax.vmap(key)(jnp.asarray(seeds, jnp.uint32))


def _heights(h: int) -> list[int]:
    found = [h]
    while found[-1] > COARSEST:
        found.append(found[-1] // 2)
    return found


def divergence(e: Float[Array, "n h w c"], towards: Float[Array, "n h w c"]) -> Float[Array, " n"]:
    """Return KL: how far the mean and the unbiased variance of the patches of ``e`` are from those of ``towards``."""

    def moments(x: Array) -> tuple[Array, Array]:
        n, h, w, c = x.shape
        a, b = h // PATCH, w // PATCH
        x = x[:, : a * PATCH, : b * PATCH].reshape(n, a, PATCH, b, PATCH, c)
        return x.mean((2, 4)), x.var((2, 4), ddof=1)

    (mean, var), (mean_r, var_r) = moments(e), moments(towards)
    ratio = jnp.log((var_r + TINY) / (var + TINY)) + (var + (mean - mean_r) ** 2) / (var_r + TINY) - 1
    return jnp.abs(ratio).sum((1, 2, 3))


def correlation(e: Float[Array, "n h w c"], rolls: Int[Array, "n levels c"]) -> Float[Array, " n"]:
    """Return A: the squared correlations of every channel with itself, rolled along each axis, at every level."""
    maps = jnp.moveaxis(e, 3, 1)
    total = jnp.zeros(e.shape[0])
    for level in range(rolls.shape[1]):
        if level:
            n, c, h, w = maps.shape
            maps = maps[:, :, : h - h % 2, : w - w % 2].reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
        for axis in (0, 1):
            turned = jax.vmap(jax.vmap(lambda x, s, axis=axis: jnp.roll(x, s, axis)))(maps, rolls[:, level])
            total = total + ((maps * turned).mean((2, 3)) ** 2).sum(1)
    return total


def regularised(
    e: Float[Array, "n h w c"],
    towards: Float[Array, "n h w c"],
    rolls: Int[Array, "rounds rolls n levels c"],
    kl_rate: Array | float,
    kl_clip: Array | float,
    correlation_rate: Array | float,
) -> Float[Array, "n h w c"]:
    """Return predicted noise made more like noise: Reg(e, towards), with given distances of the rolls, float32."""
    count = rolls.shape[1]

    def once(e: Array, distances: Array) -> tuple[Array, None]:
        return e - correlation_rate * jax.grad(lambda x: correlation(x, distances).sum())(e) / count, None

    def turn(e: Array, distances: Array) -> tuple[Array, None]:
        slope = jax.grad(lambda x: divergence(x, towards).sum())(e)
        e = e - kl_rate * jnp.clip(slope, -kl_clip, kl_clip)
        return jax.lax.scan(once, e, distances)[0], None

    return jax.lax.scan(turn, e, rolls)[0]


def renoised(single: RowsFn, double: RowsFn, inversion: DDIMInversion, x: Array, how: Refined) -> Array:
    """Run a refined inversion from clean latents x (n, h, w, c); return its states (S + 1, n, h, w, c), float32.

    ``single`` predicts the n rows, ``double`` 2 n rows, which are all rows and then all once more.
    """
    clean = jnp.asarray(x, jnp.float32)
    n = clean.shape[0]
    eta = how.noise(clean.shape[1:])
    move = dataclasses.replace(inversion, prediction_type="epsilon")

    def eps_of(pred: Array, y: Array, level: Array) -> Array:
        abar = inversion.alphas_cumprod[level]
        signal, sigma = jnp.sqrt(abar), jnp.sqrt(1 - abar)
        return prediction_to_eps(inversion.prediction_type, pred.astype(jnp.float32), y, signal, sigma)

    def step(z: Array, i: Array, plan: Plan) -> tuple[Array, Array]:
        t, y, towards, averaged = inversion.timesteps[i], z, jnp.zeros(()), []
        for k in range(plan.iterations + 1):
            # The first guess y = z is at the level before the step, all others are at the one after it.
            level = i if k == 0 else i + 1
            if k == 0 and plan.compares:
                abar = inversion.alphas_cumprod[i + 1]
                noisy = jnp.sqrt(abar) * clean + jnp.sqrt(1 - abar) * eta
                both = double(jnp.concatenate([y, noisy]), t, i)
                eps, towards = eps_of(both[:n], y, level), eps_of(both[n:], noisy, i + 1)
            else:
                eps = eps_of(single(y, t, i), y, level)
            if plan.average[0] <= k < plan.average[1]:
                averaged.append(eps)
            if plan.compares and k >= plan.average[0]:
                eps = how.regularised(eps, towards, i, k)
            y = move.step(i, z, eps)
        if averaged:
            mean = sum(averaged[1:], averaged[0]) / len(averaged)
            if plan.compares:
                mean = how.regularised(mean, towards, i, plan.iterations + 1)
            y = move.step(i, z, mean)
        return y, z

    states, z = [], clean
    for start, stop, plan in how.parts:
        z, before = jax.lax.scan(functools.partial(step, plan=plan), z, jnp.arange(start, stop, dtype=jnp.int32))
        states.append(before)
    return jnp.concatenate([*states, z[None]])
