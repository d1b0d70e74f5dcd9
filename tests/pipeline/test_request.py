"""`Request` and `Pipeline.draw`: what is checked, what batches hold, what the old keywords still say."""

import inspect

import jax
import numpy as np
import pytest

import jaxmix
from jaxmix import DenseDiffusion, InputError, LoRA, MagicFusion, Request, Segment, StyleAligned, StyleID
from jaxmix.pipeline.batching import pack
from jaxmix.pipeline.job import denoise
from jaxmix.samplers import Unguided
from jaxmix.testing import moved
from jaxmix.tuning import lora

HALF = np.pad(np.ones((16, 8), bool), ((0, 0), (0, 8)))


def test_generate_has_at_most_24_parameters():
    assert len(inspect.signature(jaxmix.Pipeline.generate).parameters) <= 24


def test_a_request_says_all_that_an_image_depends_on(tiny_pipeline):
    request = Request(prompts=["a dog", "a cat", "a car"], guidance_scale=[1.0, 2.0, 3.0], height=24)
    full = request.checked(tiny_pipeline)
    assert (full.steps, full.sampler, full.seeds, full.negatives) == (25, "ddim", [0, 1, 2], [None] * 3)
    assert (full.height, full.width, full.sizes.ids) == (24, 16, (24, 16, 0, 0, 24, 16))
    part = full.take([2, 0, 2])
    assert part.prompts == ["a car", "a dog", "a car"] and part.guidance_scale.tolist() == [3.0, 1.0, 3.0]
    assert full.repeat(2).prompts == ["a dog", "a dog", "a cat", "a cat", "a car", "a car"]


@pytest.mark.parametrize(
    ("n", "size", "devices", "groups"),
    [(5, None, 1, None), (5, 2, 1, None), (5, 2, 2, None), (7, 4, 1, (3, 2, 2)), (7, None, 2, (3, 2, 2)),
     (8, 3, 1, (2,) * 4), (4, None, 2, (2, 2)), (6, 12, 4, (3, 3)), (5, 3, 1, (3, 2))],
)  # fmt: skip
def test_batches_are_of_one_size_and_hold_every_image_once_and_every_group_whole(n, size, devices, groups):
    batches = list(pack(n, size, devices, groups))
    assert len({len(batch.rows) for batch in batches}) == 1
    assert [int(i) for batch in batches for i in batch.rows[batch.kept]] == list(range(n))
    for batch in batches:
        assert len(batch.rows) % devices == 0 and sum(batch.groups) == len(batch.rows)
        share = len(batch.rows) // devices
        edges = set(np.cumsum(batch.groups).tolist())
        assert all(share * k in edges for k in range(1, devices + 1)), "no group lies on two devices"


def test_groups_of_a_method_stay_together_in_any_batch(tiny_pipeline):
    prompts, seeds = ["a dog", "a red car", "an apple", "a fish", "a boat"], [1, 2, 3, 4, 5]
    request = Request(prompts=prompts, seeds=seeds, steps=4, guidance_scale=3.0)
    method = StyleAligned([3, 2], strength=[1.0, 1.0, 0.5, 1.0, 1.0])
    whole = tiny_pipeline.draw(request, (method,), output="latent")
    np.testing.assert_allclose(tiny_pipeline.draw(request, (method,), output="latent", batch_size=3), whole, atol=1e-4)
    said = []
    tiny_pipeline.draw(request, (method,), output="latent", batch_size=3, progress=lambda *a: said.append(a))
    assert said == [(3, 5), (5, 5)]
    with pytest.raises(InputError, match="expected room for a group of 3 on each"):
        tiny_pipeline.draw(request, (method,), batch_size=2)


def test_a_lora_is_read_for_the_pipeline_it_meets_and_merged_once(tmp_path, tiny_pipeline, monkeypatch):
    factors = lora.init(jax.random.key(2), tiny_pipeline.params["unet"], r"attn1\.to_q$", 2, 2.0)
    factors = lora.with_alpha(moved(lora.without_alpha(factors), jax.random.key(3), 0.3), 2.0)
    known = LoRA({"unet": factors})
    known.save(tmp_path / "some.safetensors")
    found = LoRA.load(tmp_path / "some.safetensors")
    request = Request(prompts=["a dog", "a cat"], steps=4)
    merged = jaxmix.apply_loras(tiny_pipeline, [(known, 0.5)]).draw(request, output="latent")
    calls = []
    from jaxmix.methods import lora as module

    monkeypatch.setattr(module, "merge", lambda *a, real=module.merge: calls.append(a) or real(*a))
    got = tiny_pipeline.draw(request, (found.on(0.5),), output="latent", batch_size=1)
    np.testing.assert_allclose(got, merged, atol=2e-4)  # batches of other sizes round otherwise
    assert len(calls) == 1, "once for both batches"
    with pytest.raises(InputError, match="no such file"):
        LoRA.load(tmp_path / "another.safetensors")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((object(),), r"methods: found object, expected one such as MagicFusion\(\.\.\.\)"),
        (LoRA(), r"methods: found LoRA, expected LoRA\.on\(\.\.\.\)"),
        ((StyleAligned([3]),), r"groups: found sizes \[3\], expected sizes that add up to the 2 images"),
        ((StyleAligned([2], strength=[1.0]),), "StyleAligned.strength: found 1 values"),
        (
            (StyleAligned(pictures={0: np.zeros((8, 16, 3))}),),
            r"group 0 has shape \(8, 16, 3\), expected \(16, 16, 3\)",
        ),
        ((DenseDiffusion([["a dog"]] * 2),), r"image 0, segment 0: found str, expected a Segment\(phrase, mask\)"),
        ((DenseDiffusion([[Segment("a cow", HALF)]] * 2),), "the phrase is not in the prompt 'a dog'"),
        ((DenseDiffusion([[Segment("a dog", HALF)]]),), "layouts: found 1, expected one for each of the 2 prompts"),
        ((StyleID(),), "expected either content and style pictures, or found and pairs"),
        ((StyleID([np.zeros((8, 8, 3))] * 2, [np.zeros((16, 16, 3))] * 2),), r"content 0 has shape \(8, 8, 3\)"),
        (
            (StyleID([np.zeros((16, 16, 3))] * 2, [np.zeros((16, 16, 3))] * 2), MagicFusion(["a", "b"])),
            "Unguided and SaliencyBlend exclude each other",
        ),
        (
            (StyleID([np.zeros((16, 16, 3))] * 2, [np.zeros((16, 16, 3))] * 2), StyleAligned()),
            "exclude each other at .*attn1: both set its keys",
        ),
        (
            (StyleID([np.zeros((16, 16, 3))] * 2, [np.zeros((16, 16, 3))] * 2, stored=False), MagicFusion(["a", "b"])),
            "StyleID and MagicFusion exclude each other: the former adds rows",
        ),
        ((MagicFusion(["a", "b"]), MagicFusion(["a", "b"])), "SaliencyBlend and SaliencyBlend exclude each other"),
        ((LoRA({"text_encoder_2": {}}).on(1.0),), "which this pipeline lacks"),
        ((LoRA().on(float("nan")),), "found strength nan, expected a number"),
    ],
)
def test_methods_that_cannot_be_are_one_line_before_anything_compiles(tiny_pipeline, methods, message):
    before = denoise._cache_size()
    with pytest.raises(InputError, match=message) as e:
        tiny_pipeline.generate(["a dog", "a dog"], steps=4, methods=methods)
    assert "\n" not in str(e.value) and denoise._cache_size() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": []}, "expected a list of at least one prompt"),
        ({"span": (2, 2)}, "stop: found step 2, expected 3 to 4"),
        ({"span": (4, None)}, "start: found step 4, expected 0 to 3"),
        ({"guidance_scale": [1.0]}, "guidance_scale: found 1 values, expected 1 or one for each of the 2 prompts"),
        ({"guidance_scale": [1.0, float("nan")]}, "expected finite numbers"),
        ({"branches": (["a"],)}, r"branches\[0\]: found 1, expected one for each"),
        ({"guidance": (Unguided(), Unguided())}, "Unguided and Unguided exclude each other"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(tiny_pipeline, fields, message):
    request = {"prompts": ["a dog", "a cat"], "steps": 4, **fields}
    with pytest.raises(InputError, match=message):
        tiny_pipeline.draw(Request(**request))


def test_a_run_in_two_spans_is_one_run(tiny_pipeline):
    request = {"prompts": ["a dog", "a cat"], "steps": 4, "guidance_scale": 3.0}
    whole = tiny_pipeline.draw(Request(**request), output="latent")
    half = tiny_pipeline.draw(Request(**request, span=(0, 2)), output="latent")
    rest = tiny_pipeline.draw(Request(**request, span=(2, None), latents=half), output="latent")
    np.testing.assert_allclose(rest, whole, atol=1e-5)


def test_the_keywords_of_the_last_release_go_on_with_a_warning(tiny_pipeline):
    pipe, prompts = tiny_pipeline, ["a dog", "a cat"]
    request = Request(prompts=prompts, steps=4, guidance=(Unguided(),))
    with pytest.warns(DeprecationWarning, match="guided="):
        got = pipe.generate(prompts, steps=4, guided=False, output="latent")
    np.testing.assert_array_equal(got, pipe.draw(request, output="latent"))
    fusion = MagicFusion(["a fish", "a boat"], switch=0)
    with pytest.warns(DeprecationWarning, match="fusion="):
        got = pipe.generate(prompts, steps=4, fusion=fusion, output="latent")
    np.testing.assert_array_equal(got, pipe.generate(prompts, steps=4, methods=(fusion,), output="latent"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidence'"):
        pipe.generate(prompts, guidence=1)
