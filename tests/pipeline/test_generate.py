"""What `Pipeline.generate` promises beyond text to image: samplers, sizes, start images, masks, batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import InputError
from jaxmix.pipeline import programs
from jaxmix.pipeline.job import denoise
from jaxmix.sharding import data_mesh

PROMPTS, SEEDS = ["a cat", "a dog", "a red apple"], [3, 1, 4]


def draw(pipe, prompts=PROMPTS, seeds=SEEDS, steps=4, guidance_scale=3.0, output="latent", **settings):
    return pipe.generate(prompts, seeds, steps, guidance_scale, output=output, **settings)


def pictures(n, height=16, width=16):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


def right_half(n, height, width):
    masks = np.zeros((n, height, width), np.uint8)
    masks[:, :, width // 2 :] = 255
    return masks


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde"])
def test_a_stochastic_row_depends_on_its_own_seed_alone(tiny_pipeline, sampler):
    whole = draw(tiny_pipeline, sampler=sampler)
    alone = draw(tiny_pipeline, sampler=sampler, mesh=data_mesh(3))  # a device each
    limit = 1e-5 * np.abs(whole).max()  # 3e-4: a random UNet throws latents far
    np.testing.assert_allclose(alone, whole, atol=limit)
    assert np.abs(draw(tiny_pipeline, seeds=[3, 1, 5], sampler=sampler)[2] - whole[2]).max() > 1e-2


def test_samplers_of_one_kind_and_their_numbers_share_a_program(tiny_pipeline):
    draw(tiny_pipeline, sampler="euler", guidance_rescale=0.2)
    before = denoise._cache_size()
    draw(
        tiny_pipeline, ["x", "y", "z"], [7, 8, 9], guidance_scale=[1.0, 2.0, 9.0], sampler="euler", guidance_rescale=0.7
    )
    assert denoise._cache_size() == before


def test_no_rescaling_is_bit_for_bit_the_plain_program(tiny_pipeline):
    np.testing.assert_array_equal(draw(tiny_pipeline, guidance_rescale=[0.0] * 3), draw(tiny_pipeline))
    assert np.abs(draw(tiny_pipeline, guidance_rescale=[0, 0.8, 0])[1] - draw(tiny_pipeline)[1]).max() > 1e-3


def test_less_strength_stays_closer_to_the_image(tiny_pipeline):
    images = pictures(3)
    start = np.asarray(tiny_pipeline.encode_images(images))
    far = [
        np.abs(draw(tiny_pipeline, images=images, strength=s, guidance_scale=1.0) - start).mean() for s in (0.25, 0.75)
    ]
    assert far[0] < far[1]


def test_what_is_not_masked_is_the_image_at_the_end(tiny_pipeline):
    images, masks = pictures(3, 16, 24), right_half(3, 16, 24)
    start = np.asarray(tiny_pipeline.encode_images(images))
    for strength in (0.5, 1.0):
        drawn = draw(tiny_pipeline, images=images, masks=masks, strength=strength)
        np.testing.assert_allclose(drawn[:, :, :6], start[:, :, :6], atol=1e-6)
        assert np.abs(drawn[:, :, 6:] - start[:, :, 6:]).mean() > 1e-2


def test_start_images_are_the_same_on_many_devices_and_in_any_batch(tiny_pipeline):
    settings = {"images": pictures(3, 16, 24), "masks": right_half(3, 16, 24), "strength": 0.5}
    whole = draw(tiny_pipeline, **settings)
    np.testing.assert_allclose(draw(tiny_pipeline, mesh=data_mesh(2), **settings), whole, atol=1e-5)
    np.testing.assert_allclose(draw(tiny_pipeline, batch_size=2, **settings), whole, atol=1e-5)


def test_large_images_are_decoded_one_by_one_to_the_same_pixels(tiny_pipeline, monkeypatch):
    pipe = tiny_pipeline
    latents = jnp.asarray(draw(pipe))
    whole = programs.decode(pipe.vae, None, None, pipe.params["vae"], latents)
    monkeypatch.setattr(programs, "_LARGE", 1)
    one_by_one = jax.jit(lambda p, z: programs.decode.__wrapped__(pipe.vae, None, None, p, z))
    np.testing.assert_allclose(one_by_one(pipe.params["vae"], latents), whole, atol=1e-5)
    assert "while" in one_by_one.lower(pipe.params["vae"], latents).as_text()


def test_images_left_on_the_device_are_those_that_are_copied(tiny_pipeline):
    whole = draw(tiny_pipeline, output="float")
    left = draw(tiny_pipeline, output="device")
    assert isinstance(left, jax.Array)
    np.testing.assert_array_equal(left, whole)
    cut = draw(tiny_pipeline, output="device", batch_size=2)  # the last batch is filled up
    np.testing.assert_allclose(cut, whole, rtol=0, atol=1e-5)


def test_tiles_reach_every_pixel(tiny_pipeline):
    whole = draw(tiny_pipeline, output="float", height=48, width=40)
    tiles = draw(tiny_pipeline, output="float", height=48, width=40, tile=12)
    assert whole.shape == tiles.shape == (3, 48, 40, 3)
    # Norms see a tile and not the image, so the two are alike and no more.
    assert 0 < np.abs(whole - tiles).mean() < 0.1
    np.testing.assert_array_equal(draw(tiny_pipeline, output="float", tile=12), draw(tiny_pipeline, output="float"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "eular"}, "eular"),
        ({"height": 15}, "height: found 15 pixels, expected a multiple of 2"),
        ({"width": 0}, "width: found 0, expected a whole number of at least 1"),
        ({"images": pictures(3), "strength": 0.1}, "strength is 0.1 with 4 steps"),
        ({"images": pictures(2)}, r"images: found shape \(2, 16, 16, 3\), expected \(3, H, W, 3\)"),
        ({"images": pictures(3, 15, 16)}, "height: found 15 pixels, expected a multiple of 2"),
        ({"images": pictures(3)[..., 0]}, r"images: found shape \(3, 16, 16\), expected \(3, H, W, 3\)"),
        ({"masks": np.ones((3, 16, 16))}, "masks: found masks alone"),
        ({"images": pictures(3), "masks": np.ones((3, 8, 8))}, r"masks: found shape \(3, 8, 8\)"),
        (
            {"guidance_rescale": [0.1, 0.2]},
            "guidance_rescale: found 2 values, expected 1 or one for each",
        ),
        ({"tile": 0}, "tile: found 0, expected a whole number of at least 1"),
    ],
)
def test_a_mistake_is_one_line(tiny_pipeline, settings, message):
    with pytest.raises(InputError, match=message) as e:
        draw(tiny_pipeline, **{"output": "uint8", **settings})
    assert "\n" not in str(e.value)
