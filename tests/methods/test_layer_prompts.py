"""A prompt per layer: which layers hear it, rows by themselves, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxmix import DenseDiffusion, InputError, LayerPrompts, Request, Segment, StructuredDiffusion
from jaxmix.methods.layer_prompts import _by_layer
from jaxmix.models import UNet2DConditionModel, UNetConfig
from jaxmix.pipeline.blocks import attn2_names, layer_names
from jaxmix.weights.embedding_files import PLUS

PROMPTS = ["a cat", "a dog"]


def drawn(pipe, told, **more):
    request = Request(prompts=PROMPTS, steps=2, seeds=range(2), guidance_scale=3.0)
    return pipe.draw(request, () if told is None else (LayerPrompts(told, **more),), output="latent")


def test_layers_hear_their_prompts_and_rows_their_own(one_level):
    base = drawn(one_level, None)
    np.testing.assert_array_equal(drawn(one_level, [{}, {}]), base)
    np.testing.assert_array_equal(drawn(one_level, [{"attn2": "a cat"}, {"attn2": "a dog"}]), base)  # their own
    some = drawn(one_level, [{"up_blocks": "a fish"}, {}])
    assert np.abs(some[0] - base[0]).max() > 1e-3
    np.testing.assert_array_equal(some[1], base[1])
    whole = drawn(one_level, [{"attn2": "a fish"}, {"attn2": "a fish"}])
    plain = one_level.draw(
        Request(prompts=["a fish"] * 2, steps=2, seeds=range(2), guidance_scale=3.0), output="latent"
    )
    np.testing.assert_allclose(whole, plain, atol=1e-4)
    # The last of several that name a layer counts.
    again = drawn(one_level, [{"attn2": "a boat", "blocks": "a fish"}, {"attn2": "a fish"}])
    np.testing.assert_allclose(again, whole, atol=1e-4)


def test_layers_are_named_by_patterns_and_as_p_plus_names_them(one_level, monkeypatch):
    names = attn2_names(one_level)
    assert _by_layer(one_level, {r"^mid": "x"}, "") == {name: "x" for name in names if name.startswith("mid")}
    sixteen = [f"{half}_blocks.{i}.attentions.{j}.attn2" for half, n in (("down", 2), ("up", 3)) for i in range(3)
               for j in range(n)]  # fmt: skip
    sixteen.append("mid_block.attentions.0.attn2")
    monkeypatch.setattr("jaxmix.pipeline.blocks.attn2_names", lambda pipe: sixteen)
    found = {key: list(_by_layer(one_level, {key: "x"}, "")) for key in PLUS}
    assert found["IN01"] == ["down_blocks.0.attentions.0.attn2"] and found["MID"] == [sixteen[-1]]
    assert found["OUT11"] == ["up_blocks.2.attentions.2.attn2"] and len({x[0] for x in found.values()}) == 16


def test_the_layers_of_stable_diffusion_are_those_that_sd_scripts_names():
    """IN04 is the input block 4 of the original UNet: the first of the second level, and so on."""
    pipe = SimpleNamespace(unet=UNet2DConditionModel(UNetConfig(attention_head_dim=8)), latent_shape=(64, 64, 4))
    short = {name: layer.split(".transformer_blocks")[0] for name, layer in layer_names(pipe).items()}
    assert tuple(short) == PLUS
    assert short["IN01"] == "down_blocks.0.attentions.0" and short["IN05"] == "down_blocks.1.attentions.1"
    assert short["MID"] == "mid_block.attentions.0"
    assert short["OUT03"] == "up_blocks.1.attentions.0" and short["OUT11"] == "up_blocks.3.attentions.2"


def test_a_mistake_is_one_line(one_level):
    left = np.ones((16, 16), bool)
    layout = DenseDiffusion([[Segment("a cat", left)], [Segment("a dog", left)]])
    for methods, words in (
        ([LayerPrompts([{}])], r"found \[{}\], expected a mapping of layers for each of 2 images"),
        ([LayerPrompts({"up": "x"})], "expected a mapping of layers for each of 2 images"),
        ([LayerPrompts([{"nowhere": "x"}, {}])], r"LayerPrompts: prompts\[0\]: 'nowhere' names none of"),
        ([LayerPrompts([{"up_blocks": 3}, {}])], r"prompts\[0\]: 'up_blocks': found 3, expected a prompt"),
        ([LayerPrompts(["a cat", {}])], r"prompts\[0\]: found 'a cat', expected a mapping from layers to prompts"),
        ([LayerPrompts([{"up_blocks": "x"}, {}]), layout], "both set its places of the keys"),
        ([LayerPrompts([{"up_blocks": "x"}, {}]), StructuredDiffusion([["cat"], []])], "both set its text states"),
    ):
        with pytest.raises(InputError, match=words) as error:
            one_level.check(Request(prompts=PROMPTS, steps=2), tuple(methods))
        assert "\n" not in str(error.value)
