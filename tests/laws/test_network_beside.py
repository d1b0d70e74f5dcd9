"""The seam for networks beside the UNet, `prepare`, `see` and `join`, with a stand-in of a ControlNet."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import Control, InputError, Request
from jaxmix.control import Site, validate, whole_steps
from jaxmix.models.unet import join_sites, norm_sites, sites
from jaxmix.pipeline.job import denoise
from jaxmix.rows import dataclass, gate, like, per_row, static
from jaxmix.samplers import DDIM
from jaxmix.testing import normal
from tests.jobs import Unconditional, plain_job

HW = (8, 8)


class Net(nn.Module):
    """From latents, timestep and text to one channel of residuals."""

    @nn.compact
    def __call__(self, x, t, context):
        y = nn.Conv(4, (3, 3))(x) + nn.Dense(4)(context.mean(1))[:, None, None]
        return nn.Conv(1, (3, 3))(nn.silu(y + jnp.asarray(t, jnp.float32) / 1000))


@dataclass
class Beside(Control):
    """Add what a network makes of the UNet's inputs and of a hint (rows, h, w, 4) to every skip and to the middle."""

    net: Net = static()
    params: dict
    hint: jax.Array = per_row()
    strength: jax.Array = gate()
    embedded: jax.Array | None = per_row(default=None)
    residual: jax.Array | None = per_row(default=None)

    def prepare(self, text, hw):
        assert text.context.shape[0] == self.hint.shape[0] and self.hint.shape[1:3] == hw
        return dataclasses.replace(self, embedded=jnp.tanh(self.hint @ self.params["hint"]))

    def see(self, x, t, text):
        made = self.net.apply({"params": self.params["net"]}, x + self.embedded, t, text.context)
        return dataclasses.replace(self, residual=made)

    def join(self, site, x, skip):
        add = jax.image.resize(self.residual, (x.shape[0], *site.hw, 1), "bilinear") * like(self.strength, x)
        return (x + add if site.name == "up_blocks.0.resnets.0" else x), skip + add


@dataclass
class AsDiffusersHasIt(Beside):
    """The same with the window's rule of diffusers' ControlNets."""

    def span(self, steps):
        return whole_steps(self.window, steps)


def beside(strength=1.0, seed=0, n=1, kind=Beside, **options):
    net, keys = Net(), jax.random.split(jax.random.key(seed), 3)
    params = jax.jit(net.init)(keys[0], jnp.zeros((1, *HW, 4)), 0, jnp.zeros((1, 32, 16)))["params"]
    params = {"net": params, "hint": normal(keys[1], (4, 4))}
    hint = normal(keys[2], (n, *HW, 4))
    return kind(net, params, hint, jnp.full((n,), jnp.float32(strength)), **options)


def draw(pipe, *controls, methods=(), **more):
    request = Request(prompts=["a dog", "a red car"], seeds=[1, 2], steps=4, guidance_scale=3.0, **more)
    return pipe.draw(request.add(controls=controls), methods, output="latent")


def test_strength_zero_is_absent_bit_for_bit_and_no_strength_traces_anew(tiny_pipeline):
    base = draw(tiny_pipeline)
    on = draw(tiny_pipeline, beside(0.5))
    assert np.abs(on - base).max() > 1e-3
    before = denoise._cache_size()
    np.testing.assert_array_equal(draw(tiny_pipeline, beside(0.0)), base)
    assert np.abs(draw(tiny_pipeline, beside(1.0)) - on).max() > 1e-3
    assert denoise._cache_size() == before


def test_a_closed_gate_leaves_its_row_and_every_unconditional_branch_alone(tiny_pipeline):
    base = draw(tiny_pipeline)
    half = draw(tiny_pipeline, dataclasses.replace(beside(n=2), strength=jnp.asarray([0.0, 1.0])))
    np.testing.assert_array_equal(half[0], base[0])
    assert np.abs(half[1] - base[1]).max() > 1e-3
    np.testing.assert_array_equal(*(draw(tiny_pipeline, *c, methods=[Unconditional()]) for c in ((), (beside(),))))


def test_two_at_once_add_up_and_two_halves_are_a_whole(tiny_pipeline):
    one, other = draw(tiny_pipeline, beside(0.5)), draw(tiny_pipeline, beside(0.5, seed=1))
    both = draw(tiny_pipeline, beside(0.5), beside(0.5, seed=1))
    assert min(np.abs(both - x).max() for x in (one, other)) > 1e-3
    whole = draw(tiny_pipeline, beside(1.0))
    np.testing.assert_allclose(draw(tiny_pipeline, beside(0.5), beside(0.5)), whole, atol=2e-4)


def test_a_window_is_a_scan_of_its_own_and_the_hint_is_embedded_outside_of_it(tiny_pipeline):
    pipe = tiny_pipeline
    context = pipe.encode_prompt(["", "a dog"]).context.reshape(1, 2, 32, 16)
    noise = pipe.initial_latents([1])

    def loops(*controls):
        job = plain_job(pipe.unet, pipe.params["unet"], noise, context, jnp.ones(1), controls)
        jaxpr = jax.make_jaxpr(denoise.__wrapped__)(job, DDIM.create(pipe.schedule, 4)).jaxpr
        bodies = [e.params["jaxpr"].jaxpr.eqns for e in jaxpr.eqns if e.primitive.name == "scan"]
        tanh = [sum(e.primitive.name == "tanh" for e in eqns) for eqns in (jaxpr.eqns, *bodies)]
        return [[(e.primitive.name, tuple(v.aval.shape for v in e.outvars)) for e in body] for body in bodies], tanh

    (plain,), _ = loops()
    (inside, outside), (before, *within) = loops(beside(window=(0.0, 0.5)))
    assert outside == plain and len(inside) > len(plain)
    assert (before, *within) == (1, 0, 0)
    early, whole = draw(pipe, beside(window=(0.0, 0.5))), draw(pipe, beside())
    both = draw(pipe, beside(window=(0.0, 0.5)), beside(window=(0.5, 1.0)))
    np.testing.assert_allclose(both, whole, atol=2e-4)
    assert np.abs(early - whole).max() > 1e-3


def test_a_control_may_have_another_rule_for_its_window(tiny_pipeline):
    pipe = tiny_pipeline
    context = pipe.encode_prompt(["", "a dog"]).context.reshape(1, 2, 32, 16)
    for kind, expected in ((Beside, [2, 2]), (AsDiffusersHasIt, [1, 3])):  # 0.4 of 4 steps are 1.6
        control = beside(window=(0.0, 0.4), kind=kind)
        job = plain_job(pipe.unet, pipe.params["unet"], pipe.initial_latents([1]), context, jnp.ones(1), (control,))
        jaxpr = jax.make_jaxpr(denoise.__wrapped__)(job, DDIM.create(pipe.schedule, 4)).jaxpr
        assert [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"] == expected


def test_join_sites_are_the_resnets_of_the_up_blocks_and_patterns_are_checked_against_them(tiny_pipeline):
    cfg = tiny_pipeline.unet.config
    names = [site.name for site in join_sites(cfg, HW)]
    assert names == [f"up_blocks.{i}.resnets.{j}" for i in range(2) for j in range(2)]
    where = sites(cfg, HW), norm_sites(cfg, HW), join_sites(cfg, HW)
    validate((beside(), beside(sites=r"up_blocks\.0")), *where)
    with pytest.raises(InputError, match=r"matches none of the 4 sites; near misses: up_blocks\.\d\.resnets"):
        validate((beside(sites="down_blocks"),), *where)
    seen = []

    @dataclass
    class Watch(Control):
        def join(self, site, x, skip):
            seen.append((site, x.shape[1:3], skip.shape[1:3]))
            return x, skip

    zeros = jnp.zeros((1, *HW, 4)), 0, jnp.zeros((1, 7, 16))
    jax.eval_shape(lambda p: tiny_pipeline.unet.apply({"params": p}, *zeros, (Watch(),)), tiny_pipeline.params["unet"])
    assert [site for site, _, _ in seen] == list(join_sites(cfg, HW))
    assert all(site.hw == x == skip for site, x, skip in seen) and isinstance(seen[0][0], Site)
