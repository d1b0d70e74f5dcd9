"""What library callers give: accepted where it has one plain meaning, else one error that names it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmix import InputError, NotFiniteWarning, Request, TruncatedPromptWarning
from jaxmix.pipeline import memory
from jaxmix.pipeline.given import mask_values, pictures
from jaxmix.pipeline.job import denoise
from jaxmix.samplers import make_solver
from tests.laws.controls import make

BYTES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)


def checked(pipe, **fields):
    return Request(**{"prompts": ["a dog", "a cat"], **fields}).checked(pipe)


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"prompts": "a dog"}, "prompts", ["a dog"]),
        ({"prompts": ("a", "b")}, "prompts", ["a", "b"]),
        ({"prompts": np.array(["a", "b"])}, "prompts", ["a", "b"]),
        ({"seeds": 7}, "seeds", [7, 8]),
        ({"seeds": np.int64(7)}, "seeds", [7, 8]),
        ({"seeds": jnp.arange(2)}, "seeds", [0, 1]),
        ({"seeds": [7.0, np.uint64(2**63)]}, "seeds", [7, 2**63]),
        ({"negatives": "fog"}, "negatives", ["fog", "fog"]),
        ({"negatives": [None, ""]}, "negatives", [None, ""]),
        ({"height": 24.0}, "height", 24),
        ({"height": np.int32(24)}, "height", 24),
        ({"steps": jnp.asarray(4)}, "steps", 4),
        ({"guidance_scale": jnp.asarray([2.0, 3.0])}, "guidance_scale", [2.0, 3.0]),
        ({"guidance_scale": np.float64(2)}, "guidance_scale", [2.0, 2.0]),
        ({"images": BYTES, "strength": np.float32(0.5)}, "strength", 0.5),
    ],
)
def test_what_has_one_meaning_is_accepted(tiny_pipeline, fields, name, expected):
    found = getattr(checked(tiny_pipeline, **fields), name)
    assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": [None]}, r"prompts\[0\]: found None, expected text"),
        ({"prompts": ["a", b"b"]}, r"prompts\[1\]: found b'b', expected text"),
        ({"prompts": ["a", "\ud800"]}, r"prompts\[1\]: holds half a surrogate pair"),
        ({"prompts": None}, "prompts: found None"),
        ({"prompts": 3}, "prompts: found 3, expected a list"),
        ({"prompts": {}}, "prompts: found {}, expected a list"),
        ({"seeds": "7"}, "seeds: found '7', expected a whole number"),
        ({"seeds": [1, 2.5]}, "seed of row 1: found 2.5, expected a whole number from 0"),
        ({"seeds": [1]}, "seeds: found 1, expected one for each of the 2 prompts"),
        ({"seeds": True}, "seeds: found True"),
        ({"seeds": -1}, "seeds: found -1, expected a whole number of at least 0"),
        ({"seeds": 2**64 - 1}, "seed of row 1: found 18446744073709551616"),
        ({"height": "64"}, "height: found '64', expected a whole number"),
        ({"width": float("nan")}, "width: found nan"),
        ({"steps": 2.5}, "steps: found 2.5"),
        ({"steps": [2]}, r"steps: found \[2\]"),
        ({"guidance_scale": 1e308}, "guidance_scale: found 1e"),
        ({"guidance_scale": 10**400}, "guidance_scale: found 1"),
        ({"guidance_scale": float("inf")}, "expected finite numbers"),
        ({"guidance_scale": "7"}, "guidance_scale: found '7', expected a number"),
        ({"guidance_rescale": 5.0}, "guidance_rescale: found 5.0, expected numbers from 0 to 1"),
        ({"prompts": [["a", "b"], ["c"]]}, r"prompts\[0\]: found \['a', 'b'\], expected text"),
        ({"seeds": [[1, 2], [3]]}, r"seed of row 0: found \[1, 2\]"),
        ({"images": BYTES, "height": 24}, "height: found 24 with images of 16 x 16 pixels, expected 16"),
        ({"controls": 3}, "controls: found int, expected Control objects"),
        ({"latents": np.full((2, 8, 8, 4), np.nan)}, "latents: found numbers that are not finite"),
        ({"images": BYTES.astype(float)}, r"images: found floats from \S+ to 255, expected them from 0 to 1"),
        ({"images": BYTES / 127.5 - 1}, r"images: found floats from -1 to"),
        ({"images": np.full((2, 16, 16, 3), np.nan)}, "images: found numbers that are not finite"),
        ({"images": BYTES.astype(np.int16) - 1}, "images: found int16 from -1 to"),
        ({"images": BYTES.astype(object)}, "images: found object"),
        ({"images": [BYTES[0], BYTES[1, :8]]}, "of several shapes"),
    ],
)
def test_anything_else_is_one_error(tiny_pipeline, fields, message):
    with pytest.raises(InputError, match=message) as error:
        checked(tiny_pipeline, **fields)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: found 0, expected a whole number of at least 1"),
        ({"batch_size": "8"}, "batch_size: found '8'"),
        ({"tile": -1}, "tile: found -1"),
        ({"progress": 3}, "progress: found 3, expected true, false or a function"),
        ({"output": "png"}, "output: found 'png'"),
    ],
)
def test_options_of_drawing_are_checked_before_anything_compiles(tiny_pipeline, options, message):
    before = denoise._cache_size()
    with pytest.raises(InputError, match=message):
        tiny_pipeline.generate(["a dog"], steps=4, **options)
    assert denoise._cache_size() == before


def test_pictures_of_other_ranges_are_the_same_picture():
    exact = BYTES.astype(np.float32) / 255
    for same in (exact, exact.astype(np.float64), BYTES.astype(np.uint16) * 257, jnp.asarray(exact), exact * 1.02):
        found = pictures("images", same)
        assert found.dtype == np.float32 and np.abs(found - exact).max() < 0.03 and found.max() <= 1
    for same in (BYTES, BYTES.astype(np.int64), BYTES.tolist(), [Image.fromarray(x) for x in BYTES]):
        np.testing.assert_array_equal(pictures("images", same), BYTES)
    assert pictures("images", BYTES[0]).shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(pictures("images", BYTES > 127), (BYTES > 127).astype(np.float32))


def test_masks_are_set_from_half_their_range_on():
    where = np.random.default_rng(1).random((2, 4, 4)) > 0.5
    full = where.astype(np.uint8) * 255
    for mask in (where, where.astype(np.uint8), where.astype(np.int64), where.astype(float), full / 255):
        np.testing.assert_array_equal(mask_values("masks", mask), where.astype(np.float32))
    for mask in (full, full.astype(np.int64)):
        np.testing.assert_array_equal(mask_values("masks", mask), full)
    with pytest.raises(InputError, match="masks: found floats from 0 to 255"):
        mask_values("masks", full.astype(float))


def test_a_control_by_itself_and_a_mask_by_itself_are_enough(one_level):
    control = make("out on attn1", 1.0)
    options = {"images": BYTES[0], "masks": np.ones((16, 16, 1)), "strength": 1.0, "seeds": 3, "output": "latent"}
    one = one_level.generate("a dog", steps=1, controls=control, **options)
    assert one.shape == (1, 8, 8, 4) and np.isfinite(one).all()


def test_a_mask_means_the_same_in_any_batch(one_level):
    """The darkest mask of bytes is empty, whatever is drawn beside it."""
    masks = np.zeros((2, 16, 16), np.uint8)
    masks[0], masks[1] = 255, 1
    asked = Request(prompts=["a", "b"], images=BYTES, masks=masks).checked(one_level)
    assert [bool(asked.take([row]).latent_masks(one_level).any()) for row in range(2)] == [True, False]


# Guidance of at most 1 ------------------------------------------------------------------------------------------------


def draw(pipe, scale, **more):
    request = Request(prompts=["a dog", "a car"], negatives=["fog", None], seeds=[3, 4], steps=2, guidance_scale=scale)
    return pipe.draw(request, output="latent", **more)


def test_a_scale_of_at_most_1_is_the_prompts_prediction_at_half_the_cost_and_in_any_company(one_level):
    alone = draw(one_level, 0.0)
    before = denoise._cache_size()
    for scale in (1.0, -2.0, [0.5, 1.0]):
        np.testing.assert_array_equal(draw(one_level, scale), alone)
    assert denoise._cache_size() == before
    other = Request(prompts=["a dog", "a car"], seeds=[3, 4], steps=2, guidance_scale=1.0)
    np.testing.assert_array_equal(one_level.draw(other, output="latent"), alone)  # whatever the negative prompts
    mixed = draw(one_level, [0.0, 5.0])
    assert denoise._cache_size() == before + 1
    np.testing.assert_allclose(mixed[0], alone[0], atol=2e-4)
    for scale in ([5.0, 0.0], [7.0, 2.0]):
        draw(one_level, scale)
    assert denoise._cache_size() == before + 1
    np.testing.assert_array_equal(mixed[1], draw(one_level, [7.0, 5.0])[1])
    # No row of an unconditional branch is in the program.
    for scale, rows in ((1.0, 2), (1.1, 4)):
        asked = Request(prompts=["a dog", "a car"], steps=2, guidance_scale=scale).checked(one_level)
        solver = make_solver("ddim", one_level.schedule, 2)
        program = str(jax.make_jaxpr(denoise.__wrapped__)(one_level.job(asked, solver), solver))
        inputs = set(re.findall(r"f32\[(\d+),8,8,16\]", program))
        assert inputs == {str(rows)}, "the rows of the UNet's feature maps"


def test_inverting_without_guidance_above_1_runs_the_prompt_alone(one_level):
    found = [one_level.invert(BYTES, ["a dog", "a car"], steps=2, guidance_scale=s).noise for s in (None, 1.0, 0.0)]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


# Warnings, and what is too large --------------------------------------------------------------------------------------


def test_words_cut_off_and_pictures_that_are_not_finite_are_warnings(tiny_pipeline):
    words = " ".join(["apple"] * 40)
    with pytest.warns(TruncatedPromptWarning, match=r"prompt 'apple.* is too long for the model; cut off: 'apple"):
        tiny_pipeline.invert(BYTES[:1], [words], steps=1)
    broken = np.zeros((2, 8, 8, 4), np.float32)
    broken[1, 0, 0, 0] = np.nan
    with pytest.warns(NotFiniteWarning, match="images 1: each holds numbers that are not finite"):
        images = tiny_pipeline.decode(broken)
    assert images[0].std() > 0
    assert np.isnan(tiny_pipeline.decode(broken, output="float")[1]).any()


def test_a_size_is_refused_by_the_memory_its_largest_product_takes(tiny_pipeline, monkeypatch):
    pipe = tiny_pipeline
    monkeypatch.setattr(memory, "device_bytes", lambda: 2**30)
    pipe.check_size(8, 8)
    pipe.check_size(256, 256)
    with pytest.raises(InputError, match=r"found 8192 x 8192 pixels, which take at least .* no more than the 1.0"):
        pipe.check_size(4096, 4096)
    huge = Request(prompts=["a dog"], height=800000, width=800000, steps=1)
    for refuse in (pipe.draw, pipe.check):
        with pytest.raises(InputError, match="found 800000 x 800000 pixels"):
            refuse(huge)
    # A tile bounds the decoder, not the UNet; a picture to start from is encoded whole.
    whole, tiled, encoded = (
        memory.least_bytes(pipe, (512, 512), *how) for how in ((None, False), (8, False), (8, True))
    )
    assert tiled < whole <= encoded
    assert memory.least_bytes(pipe, (512, 1024), 8) > 1.9 * tiled
    monkeypatch.undo()
    assert memory.device_bytes() > 2**28
