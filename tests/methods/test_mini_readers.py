"""The embedded adapters that read pictures: they open by name, do what their cards say, and keep the package small."""

import numpy as np
import pytest

import jaxmix
from jaxmix.methods import ip_adapter, style_adapter
from jaxmix.pipeline.blocks import at_sites
from jaxmix.types import InputError
from jaxmix.weights.files import ASSETS
from train.scenes import Scenes
from train.scorer import load_scorer

STEPS, N = 6, 8


@pytest.fixture(scope="module")
def pipe():
    return jaxmix.load("mini")


@pytest.fixture(scope="module")
def scenes():
    held = Scenes(split="held_out_pairs", seed=31, two_objects=0.0, three_objects=0.0)
    return [held[i] for i in range(N)]


def test_all_are_there_and_the_package_stays_small():
    assert set(ip_adapter.EMBEDDED) == {"mini-ip", "mini-ip-plus"} and set(style_adapter.EMBEDDED) == {"mini-style"}
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 85e6


def test_a_picture_alone_brings_its_background(pipe, scenes):
    """By far the surest of what it brings; scripts.effects.image_prompts measures the rest, of both kinds."""
    adapter = jaxmix.IPAdapter.load("mini-ip", pipe)
    assert (adapter.kind, jaxmix.IPAdapter.load("mini-ip-plus", pipe).kind) == ("base", "plus")
    pictures, empty = [[scene["image"]] for scene in scenes], [""] * N
    drawn = [pipe.generate(empty, range(N), STEPS, methods=(adapter.on(pictures, scale),)) for scale in (0.0, 1.0)]
    np.testing.assert_array_equal(drawn[0], pipe.generate(empty, range(N), STEPS))
    scorer, wanted = load_scorer(), np.asarray([scene["background_name"] for scene in scenes])
    found = [np.asarray(scorer.backgrounds)[scorer(images)["background"].argmax(-1)] for images in drawn]
    without, right = (np.mean(names == wanted) for names in found)
    assert right >= 0.6 and right > without + 0.3


def test_the_presets_of_three_levels_are_those_measured_on_the_embedded_model(pipe):
    for preset, block in (("style", "up_blocks.2.attentions.0"), ("layout", "up_blocks.1.attentions.1")):
        assert list(at_sites(pipe, preset)) == [f"{block}.transformer_blocks.0.attn2"]


def test_a_style_adapter_at_scale_0_is_the_model_itself_and_else_is_not(pipe, scenes):
    adapter = jaxmix.StyleAdapter.load("mini-style", pipe)
    pictures = [[scene["image"]] for scene in scenes]
    prompts = ["a cat", "a heart"] * (N // 2)
    plain = pipe.generate(prompts, range(N), STEPS)
    np.testing.assert_array_equal(pipe.generate(prompts, range(N), STEPS, methods=(adapter.on(pictures, 0.0),)), plain)
    styled = pipe.generate(prompts, range(N), STEPS, methods=(adapter.on(pictures),))
    assert np.abs(styled.astype(int) - plain).mean() > 2


def test_another_model_is_one_clear_line(tiny_pipeline):
    for load in (jaxmix.IPAdapter.load, jaxmix.StyleAdapter.load):
        name = "mini-ip" if load == jaxmix.IPAdapter.load else "mini-style"
        with pytest.raises(InputError, match="an adapter for another base") as error:
            load(name, tiny_pipeline)
        assert "\n" not in str(error.value)
