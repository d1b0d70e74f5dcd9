"""StyleAdapter: the head against torch's layers, what the references' order and number change, files, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmix import InputError, Request, StyleAdapter
from jaxmix.controls import style_adapter as maths
from jaxmix.models import CLIPVisionConfig, CLIPVisionModel
from jaxmix.pipeline.job import denoise
from jaxmix.pipeline.vision import ImageEncoder, shuffled
from jaxmix.testing import moved, random_params

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}


@pytest.fixture(scope="module")
def encoder():
    model = CLIPVisionModel(CLIPVisionConfig.from_dict(VISION))
    return ImageEncoder(model, random_params(model.abstract_params(), 0))


@pytest.fixture(scope="module")
def fresh(one_level, encoder):
    return StyleAdapter.init(jax.random.key(1), one_level, encoder)


@pytest.fixture(scope="module")
def adapter(fresh):
    """Return an adapter that has learnt something."""
    layers = {name: {**layer, "strength": jnp.asarray(0.8)} for name, layer in fresh.layers.items()}
    return dataclasses.replace(fresh, layers=layers, style_emb=moved(fresh.style_emb, jax.random.key(2), 0.1))


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8)


def drawn(pipe, look, **more):
    request = Request(prompts=["a cat", "a dog"], steps=2, seeds=range(2), guidance_scale=3.0)
    return pipe.draw(request, () if look is None else (look,), output="latent", **more)


def test_any_number_of_references_is_one_program_and_their_order_does_not_matter(one_level, adapter):
    base = drawn(one_level, None)
    one = drawn(one_level, adapter.on([picture(0), picture(1)], shuffle=False))
    programs = denoise._cache_size()
    three = [picture(0), picture(1), picture(2)]
    many = drawn(one_level, adapter.on([three, [picture(3)]], shuffle=False))
    again = drawn(one_level, adapter.on([three[::-1], [picture(3)]], shuffle=False))
    assert denoise._cache_size() == programs
    np.testing.assert_allclose(again, many, atol=2e-4)
    assert min(np.abs(x - base).max() for x in (one, many)) > 1e-3 and np.abs(one[0] - many[0]).max() > 1e-4
    np.testing.assert_array_equal(drawn(one_level, adapter.on([three, picture(3)], 0.0)), base)
    rows = drawn(one_level, adapter.on([three, picture(3)], [0.0, 1.0]))
    np.testing.assert_array_equal(rows[0], base[0])
    alone = drawn(one_level, adapter.on([three, [picture(3)]], shuffle=False), batch_size=1)
    np.testing.assert_allclose(alone, many, atol=1e-4)


def test_before_training_nothing_changes(one_level, fresh):
    np.testing.assert_array_equal(drawn(one_level, fresh.on(picture(0))), drawn(one_level, None))


def test_patches_are_shuffled_before_they_get_their_places(adapter, encoder):
    plain, mixed = (adapter.see([picture(0)], shuffle=s) for s in (False, True))
    assert plain.shape == (4, 16) and np.abs(plain - mixed).max() > 1e-3  # without the class token
    assert adapter.see([picture(0)] * 2, class_token=True).shape == (10, 16)
    np.testing.assert_array_equal(mixed, adapter.see([picture(0)]))  # the same each time, another for other seeds
    assert np.abs(mixed - adapter.see([picture(0)], seed=1)).max() > 1e-3
    x = np.arange(8 * 8 * 3).reshape(8, 8, 3)
    y = shuffled(x, 4, np.random.default_rng(0))
    cut = [sorted(z[i : i + 4, j : j + 4].tolist() for i in (0, 4) for j in (0, 4)) for z in (x, y)]
    assert cut[0] == cut[1] and (x != y).any()


def test_a_file_brings_back_the_adapter_bit_for_bit(one_level, adapter, encoder, tmp_path):
    adapter.save(tmp_path / "a.safetensors")
    found = StyleAdapter.load(tmp_path / "a.safetensors", one_level, encoder)
    jax.tree.map(np.testing.assert_array_equal, found.style_emb, adapter.style_emb)
    jax.tree.map(np.testing.assert_array_equal, dict(found.layers), dict(adapter.layers))
    assert "8 tokens, 3 blocks" in str(found)
    first, *rest = adapter.layers
    dataclasses.replace(adapter, layers={name: adapter.layers[name] for name in rest}).save(tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=f"its {first} has no layer, expected .* an adapter for another base"):
        StyleAdapter.load(tmp_path / "b.safetensors", one_level, encoder)


def test_a_mistake_is_one_line(one_level, adapter, encoder, tmp_path):
    save_file({"a": np.zeros(2, "f4")}, tmp_path / "other.safetensors")
    alone = dataclasses.replace(adapter, image_encoder=None)
    odd = ImageEncoder(CLIPVisionModel(CLIPVisionConfig.from_dict(VISION | {"hidden_size": 24})), {})
    for look, words in (
        (lambda: StyleAdapter.load(tmp_path / "other.safetensors", one_level), "expected a StyleAdapter"),
        (lambda: StyleAdapter.load(tmp_path / "gone.safetensors", one_level), "no such file"),
        (lambda: alone.on(picture(0)), "holds no image encoder, expected"),
        (lambda: dataclasses.replace(adapter, image_encoder=odd).on(picture(0)), "needs states of 16"),
        (lambda: adapter.on([picture(0)] * 3), "references: found 3"),
        (lambda: adapter.on([[], []]), r"references\[0\]: found none, expected one picture or more"),
        (lambda: adapter.on([picture(0), "gone.png"]), r"references\[1\]\[0\]: gone.png: no such file"),
        (lambda: adapter.on(picture(0), scale=[1.0] * 3), "StyleAdapter.scale: found 3 values"),
        (lambda: adapter.on(picture(0), blocks="nowhere"), "StyleAdapter: blocks: 'nowhere' names none"),
    ):
        with pytest.raises(InputError, match=words) as error:
            one_level.check(Request(prompts=["a cat", "a dog"], steps=2), (look(),))
        assert "\n" not in str(error.value)


def test_widths_are_told_from_the_tokens():
    emb = maths.init_style_tokens(jax.random.key(0), 16, 24, tokens=5, blocks=2)
    assert maths.widths(emb) == (16, 24) and maths.depth(emb) == 2
    states = np.random.default_rng(0).standard_normal((2, 7, 16)).astype("f4")
    tokens = maths.style_tokens(emb, states)
    assert tokens.shape == (2, 5, 24)
    np.testing.assert_allclose(maths.style_tokens(emb, states[:, ::-1]), tokens, atol=1e-5)
    with pytest.raises(InputError, match="found an image encoder of 12 channels, expected a multiple of 8"):
        maths.init_style_tokens(jax.random.key(0), 12, 24)
