"""Sampling on eight virtual devices: the same noise and pixels as on one, and no device ever talks to another."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxmix
from jaxmix import InputError, VMix
from jaxmix.controls import ip_adapter
from jaxmix.models.unet import subtree
from jaxmix.pipeline.blocks import attn2_names
from jaxmix.pipeline.job import denoise, over_rows
from jaxmix.rows import take, tile
from jaxmix.samplers import DDIM
from jaxmix.samplers.noise import seed_array, step_noise
from tests.jobs import plain_job

PROMPTS = [f"a {word}" for word in ("car", "dog", "apple", "cat", "boat", "rose", "key", "cup", "hat", "bus", "fox")]
SEEDS = [11, 3, 3, 99, 12, 0, 7, 5, 2**32 - 1, 6, 8]
COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(-start)?\b"
)


@pytest.fixture(scope="module")
def mesh():
    return jaxmix.data_mesh(8)


def controls_for(pipe):
    """Return VMix with labels and strengths, and an IP-Adapter with two pictures and a scale, others for each image."""
    adapter = VMix.init(jax.random.key(0), pipe)
    params = jax.tree.map(lambda x: x + 0.1, adapter.params)
    vmix = VMix(adapter.config, params).bind(pipe, ["all", "none"] * 5 + ["color"], list(np.linspace(0, 2, 11)))
    ctx, names = pipe.unet.config.cross_attention_dim, attn2_names(pipe)
    layers = {name: {x: subtree(pipe.params["unet"], name)[x] for x in ("to_k", "to_v")} for name in names}
    tokens, none = np.random.default_rng(0).standard_normal((2, 11, 2, 4, ctx)).astype("f4")
    made = {"scale": np.linspace(0, 1, 11)[:, None] * [1, 1], "at_site": dict.fromkeys(names, 1.0)}
    return (vmix, ip_adapter.bind(layers, tokens, none, **made))


def test_eight_devices_draw_what_one_draws(tiny_pipeline, mesh):
    pipe, controls = tiny_pipeline, controls_for(tiny_pipeline)
    arguments = (PROMPTS, SEEDS, 4, list(np.linspace(1, 8, 11)), controls)
    one = pipe.generate(*arguments, output="float")
    eight = pipe.generate(*arguments, output="float", mesh=mesh)
    assert one.shape == eight.shape == (11, 16, 16, 3)
    np.testing.assert_allclose(eight, one, atol=1e-5)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_noise_of_a_step_is_the_same_to_the_bit_on_any_devices_and_in_any_order(count):
    seeds = seed_array(SEEDS[:8])
    order = np.random.default_rng(count).permutation(8)
    draw = lambda seeds: step_noise(seeds, 3, (8, 8, 4))  # noqa: E731
    one = jax.jit(draw)(jnp.asarray(seeds))
    some = jax.jit(over_rows(draw, jaxmix.data_mesh(count), PartitionSpec("data")))(jnp.asarray(seeds[order]))
    np.testing.assert_array_equal(some, np.asarray(one)[order])


def test_two_and_four_devices_draw_shuffled_rows_in_other_batches_as_one_device_does(one_level):
    """Under a sampler that draws noise in every step."""
    pipe, order = one_level, np.random.default_rng(0).permutation(11)
    how = {"steps": 3, "guidance_scale": 4.0, "sampler": "euler_ancestral", "output": "float"}
    one = pipe.generate(PROMPTS, SEEDS, **how)
    for count, batch_size in ((2, 8), (4, 4)):
        shuffled = [PROMPTS[i] for i in order], [SEEDS[i] for i in order]
        some = pipe.generate(*shuffled, **how, mesh=jaxmix.data_mesh(count), batch_size=batch_size)
        np.testing.assert_allclose(some, one[order], atol=1e-5)


def test_an_image_depends_on_its_seed_alone(tiny_pipeline, mesh):
    pipe = tiny_pipeline
    noise = pipe.initial_latents(SEEDS)
    np.testing.assert_array_equal(noise[1], noise[2])
    for i in (0, 5, 8):
        np.testing.assert_array_equal(noise[i], pipe.initial_latents([SEEDS[i]])[0])
    np.testing.assert_array_equal(noise[::-1], pipe.initial_latents(SEEDS[::-1]))
    whole = pipe.generate(PROMPTS, SEEDS, 4, 3.0, output="float")
    alone = pipe.generate([PROMPTS[5]], [SEEDS[5]], 4, 3.0, output="float", mesh=mesh)
    np.testing.assert_allclose(alone[0], whole[5], atol=1e-5)


def test_the_compiled_sampler_holds_no_collective(tiny_pipeline, mesh):
    pipe = tiny_pipeline
    controls = take(tile(controls_for(pipe), 11), range(8))
    context = pipe.encode_prompt([p for prompt in PROMPTS[:8] for p in ("", prompt)]).context.reshape(8, 2, 32, 16)
    noise = pipe.initial_latents(SEEDS[:8])
    job = plain_job(pipe.unet, pipe.params["unet"], noise, context, jnp.ones(8), controls)
    text = denoise.lower(job, DDIM.create(pipe.schedule, 4), mesh=mesh).compile().as_text()
    assert "while(" in text
    assert not COLLECTIVE.search(text)


def test_the_pattern_for_collectives_finds_one(mesh):
    """The check above can fail: a mean over the mesh is a collective."""
    spec = jax.sharding.PartitionSpec("data")
    mean = jax.shard_map(lambda x: jax.lax.pmean(x, "data"), mesh=mesh, in_specs=spec, out_specs=spec)
    assert COLLECTIVE.search(jax.jit(mean).lower(jnp.ones(8)).compile().as_text())


@pytest.mark.parametrize("count", [0, 9])
def test_a_device_count_that_does_not_exist_is_one_clear_line(count):
    with pytest.raises(InputError, match=rf"devices={count}: found 8 cpu device\(s\), expected 1 to 8"):
        jaxmix.data_mesh(count)
