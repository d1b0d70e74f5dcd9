"""IP-Adapter as a method: pictures per image, blocks, masks and scales, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from jaxmix import InputError, Request
from jaxmix.control import QKV, Site, attend
from jaxmix.controls import ip_adapter as maths
from jaxmix.methods.ip_adapter import Embeddings, IPAdapter
from jaxmix.models import CLIPVisionConfig, CLIPVisionModel
from jaxmix.models.unet import sites, subtree
from jaxmix.pipeline import references
from jaxmix.pipeline.blocks import at_sites, attn2_names
from jaxmix.pipeline.job import denoise
from jaxmix.pipeline.vision import ImageEncoder
from jaxmix.testing import random_params

VISION = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 12,
}


@pytest.fixture(scope="module")
def encoder():
    model = CLIPVisionModel(CLIPVisionConfig.from_dict(VISION))
    return ImageEncoder(model, random_params(model.abstract_params(), 0))


def random_adapter(pipe, encoder, kind="base"):
    """Return an adapter of random numbers, for which nothing is compiled."""

    def init(key):
        made = IPAdapter.init(key, pipe, encoder, kind)
        return made.projection, made.layers

    return IPAdapter(kind, *random_params(jax.eval_shape(init, jax.random.key(0)), 1), encoder)


@pytest.fixture(scope="module")
def adapter(one_level, encoder):
    return random_adapter(one_level, encoder)


def picture(seed, hw=(9, 11)):
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), np.uint8)


def request(n=2, **more):
    prompts = ["a cat", "a dog", "a fish"][:n]
    return Request(prompts=prompts, steps=2, seeds=range(n), guidance_scale=3.0, **more)


def drawn(pipe, look, n=2, **more):
    return pipe.draw(request(n), () if look is None else (look,), output="latent", **more)


def test_each_image_sees_its_pictures_in_any_batch(one_level, adapter):
    a, b, c = (picture(i) for i in (0, 1, 7))
    whole = drawn(one_level, adapter.on([a, b]))
    three = drawn(one_level, adapter.on([a, b, c]), n=3, batch_size=2)
    np.testing.assert_array_equal(three[:2], whole)
    turned = Request(prompts=["a fish", "a dog", "a cat"], steps=2, seeds=[2, 1, 0], guidance_scale=3.0)
    turned = one_level.draw(turned, (adapter.on([c, b, a]),), output="latent", batch_size=2)
    np.testing.assert_allclose(turned[::-1], three, atol=1e-4)
    other = drawn(one_level, adapter.on([a, c]))
    np.testing.assert_array_equal(other[0], whole[0])
    assert np.abs(other[1] - whole[1]).max() > 1e-3
    one = drawn(one_level, adapter.on(a))  # for all
    np.testing.assert_array_equal(one[0], whole[0])


def test_scale_0_is_the_base_bit_for_bit_and_nothing_is_traced_again(one_level, adapter):
    base = drawn(one_level, None)
    first = drawn(one_level, adapter.on(picture(0), 1.0))
    before = denoise._cache_size()
    np.testing.assert_array_equal(drawn(one_level, adapter.on(picture(3), 0.0)), base)
    np.testing.assert_array_equal(drawn(one_level, adapter.on([picture(0), picture(1)], [1.0, 0.0]))[1], base[1])
    assert denoise._cache_size() == before and np.abs(first - base).max() > 1e-3


def attended(pipe, look):
    """Return what two images attend to at one site, without (if the look is None) or with their pictures."""
    asked = pipe.check(request(), () if look is None else (look,))
    controls = () if look is None else look.apply(pipe, asked).controls
    site = next(site for site in sites(pipe.unet.config, asked.hw(pipe)) if site.name == attn2_names(pipe)[0])
    width = subtree(pipe.params["unet"], site.name)["to_q"]["kernel"].shape[1]
    rng, d = np.random.default_rng(0), width // site.heads
    shapes = [(2, n, site.heads, d) for n in (site.hw[0] * site.hw[1], 5, 5)]
    out, _ = attend(site, QKV(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)), controls)
    return np.asarray(out)


def test_two_equal_pictures_are_one_and_their_order_does_not_matter(one_level, adapter):
    a, b = picture(0), picture(1)
    one, both = (attended(one_level, adapter.on(x)) for x in (a, [[a, a], [a, b]]))
    np.testing.assert_allclose(both[0], one[0], atol=1e-5)
    np.testing.assert_allclose(attended(one_level, adapter.on([[a, a], [b, a]]))[1], both[1], atol=1e-5)
    assert np.abs(both[1] - one[1]).max() > 1e-3


def test_masks_say_where_a_picture_is_seen(one_level, adapter):
    hw = (one_level.latent_shape[0] * one_level.vae.config.factor,) * 2
    none, ones, left = np.zeros(hw, np.uint8), Image.fromarray(np.full(hw, 255, np.uint8)), np.zeros(hw)
    left[:, : hw[1] // 2] = 1
    base, seen = attended(one_level, None), attended(one_level, adapter.on(picture(0)))
    got = attended(one_level, adapter.on(picture(0), masks=[none, ones]))
    np.testing.assert_array_equal(got[0], base[0])
    np.testing.assert_allclose(got[1], seen[1], atol=1e-5)
    half = attended(one_level, adapter.on(picture(0), masks=[left, left])).reshape(2, *one_level.latent_shape[:2], -1)
    base, seen = (x.reshape(half.shape) for x in (base, seen))
    np.testing.assert_array_equal(half[:, :, -1], base[:, :, -1])
    np.testing.assert_allclose(half[:, :, 0], seen[:, :, 0], atol=1e-5)


def test_ready_embeddings_need_no_encoder(one_level, adapter, tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    seen = adapter.embed([tmp_path / "a.png"])
    assert seen.shown.shape == (1, 12) and not seen.none.any()
    alone = dataclasses.replace(adapter, image_encoder=None)
    np.testing.assert_array_equal(
        drawn(one_level, alone.on(seen)), drawn(one_level, adapter.on(str(tmp_path / "a.png")))
    )
    with pytest.raises(InputError, match=r"holds no image encoder, expected an image encoder \(its projection of 12\)"):
        drawn(one_level, alone.on(picture(0)))
    with pytest.raises(InputError, match="holds no image encoder"):
        alone.embed([picture(0)])


def test_what_is_subtracted_from_a_picture_is_not_seen(one_level, adapter):
    seen = adapter.embed([picture(0)]).shown[0]
    nothing = drawn(one_level, adapter.on(Embeddings(np.zeros((1, 12), "f4"), np.zeros(12, "f4"))))
    np.testing.assert_allclose(drawn(one_level, adapter.on(picture(0), subtract=seen)), nothing, atol=1e-4)
    whole = drawn(one_level, adapter.on(picture(0)))
    np.testing.assert_array_equal(drawn(one_level, adapter.on(picture(0), subtract=seen, subtract_scale=0.0)), whole)
    rows = drawn(one_level, adapter.on(picture(0), subtract=[seen, 0 * seen]), batch_size=2)
    np.testing.assert_array_equal(rows[1], whole[1])


def test_a_phrase_is_subtracted_where_the_pipeline_can_read_it(tiny_sdxl, encoder):
    width = tiny_sdxl.text_encoder_2.config.projection_dim
    seen = ImageEncoder(CLIPVisionModel(CLIPVisionConfig.from_dict(VISION | {"projection_dim": width})), encoder.params)
    adapter = random_adapter(tiny_sdxl, seen)
    look = adapter.on(
        Embeddings(np.ones((1, width), "f4"), np.zeros(width, "f4")), subtract="a cat", subtract_scale=0.5
    )
    expected = 0.5 * np.asarray(tiny_sdxl.encode_prompt(["a cat"]).pooled)
    np.testing.assert_allclose(look._content(tiny_sdxl, 2), np.repeat(expected, 2, 0), rtol=1e-6)


def test_a_phrase_is_read_by_the_text_encoder_of_the_adapters_own_clip(one_level, adapter, monkeypatch):
    said = np.arange(12, dtype="f4")[None]
    monkeypatch.setattr(ImageEncoder, "has_texts", True)
    monkeypatch.setattr(ImageEncoder, "texts", lambda self, phrases: np.repeat(said, len(phrases), 0))
    look = adapter.on(picture(0), subtract=["a cat", None, said[0]], subtract_scale=[0.5, 1.0, 2.0])
    np.testing.assert_allclose(look._content(one_level, 3), np.concatenate([0.5 * said, 0 * said, 2 * said]))


def test_a_negative_picture_is_what_the_unconditional_rows_see(one_level, adapter):
    a = drawn(one_level, adapter.on(picture(0)))
    assert np.abs(drawn(one_level, adapter.on(picture(0), negative=picture(5))) - a).max() > 1e-4


def test_blocks_are_named_by_presets_patterns_and_dictionaries(tiny_pipeline):
    names = attn2_names(tiny_pipeline)
    assert names[-1].startswith("mid_block.") and set(at_sites(tiny_pipeline, None)) == set(names)
    up = [name for name in names if name.startswith("up_blocks.")]
    assert list(at_sites(tiny_pipeline, r"^up_blocks\.")) == up
    assert set(at_sites(tiny_pipeline, {"up": 0.5})) == set(up) and at_sites(tiny_pipeline, {"up": 0.5})[up[0]] == 0.5
    assert set(at_sites(tiny_pipeline, "style+layout")) == set(at_sites(tiny_pipeline, "style")) | set(
        at_sites(tiny_pipeline, "layout")
    )
    for blocks, message in {
        "nowhere": "'nowhere' names none of .*, nor style, layout",
        "(": "is not a regular expression",
        7: "expected a preset, a pattern or a dictionary",
    }.items():
        with pytest.raises(InputError, match=message):
            at_sites(tiny_pipeline, blocks)
    for dictionary, message in (
        ({"left": 1.0}, "found 'left', expected down, mid or up"),
        ({"up": {"one": 1.0}}, "found 'one', expected such as block_1"),
        ({"up": {"block_9": 1.0}}, "up.block_9 has no cross-attention"),
        ({"mid": "much"}, "mid: found 'much', expected a number"),
        ({"mid": float("nan")}, "expected a number"),
        ({"up": {"block_1": [1.0] * 7}}, "found 7 scales, expected"),
    ):
        with pytest.raises(InputError, match=message):
            at_sites(tiny_pipeline, dictionary)


def test_what_does_not_fit_is_one_line_before_anything_is_compiled(one_level, adapter, encoder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"x")
    hw = (one_level.latent_shape[0] * one_level.vae.config.factor,) * 2
    plus = random_adapter(one_level, encoder, "plus")
    odd = ImageEncoder(CLIPVisionModel(CLIPVisionConfig.from_dict(VISION | {"projection_dim": 9})), encoder.params)
    for look, message in (
        (lambda: adapter.on("nowhere.png"), "nowhere.png: no such file"),
        (lambda: adapter.on(tmp_path / "broken.png"), "broken.png: not a picture"),
        (lambda: adapter.on([picture(0)] * 3), "IP-Adapter.pictures: found 3 values, expected 1 or one for each"),
        (lambda: adapter.on([[picture(0)], [picture(0)] * 2]), r"found \[1, 2\] pictures an image"),
        (lambda: adapter.on([[], []]), r"found \[0\] pictures"),
        (lambda: adapter.on(picture(0), "much"), "scale: found 'much'"),
        (lambda: adapter.on(picture(0), float("nan")), "scale: found nan, expected finite"),
        (lambda: adapter.on([[picture(0)] * 2] * 2, [[1.0, 0.5]] * 2), "share a softmax, expected masks"),
        (lambda: adapter.on(picture(0), blocks="nowhere"), "IP-Adapter: blocks: 'nowhere' names none of"),
        (lambda: adapter.on(picture(0), masks=[np.ones((hw[0], 2 * hw[0]))] * 2), "expected the shape of"),
        (lambda: adapter.on(picture(0), masks=[[np.ones(hw)] * 2] * 2), "found 2, expected one for each of 1"),
        (lambda: adapter.on(np.full((8, 8, 3), 7.0)), "expected uint8, or numbers from 0 to 1"),
        (lambda: adapter.on(7), "expected a picture"),
        (lambda: adapter.on(picture(0), subtract="a cat"), "or CLIP's projection of the phrase, "),
        (lambda: adapter.on(picture(0), subtract=np.ones(5)), r"subtract: found shape \(5,\), expected \(12,\)"),
        (lambda: adapter.on(picture(0), subtract=np.ones(12), subtract_scale=None), "subtract_scale: found None"),
        (lambda: plus.on(picture(0), subtract=np.ones(12)), "found a plus adapter, which reads no projection"),
        (lambda: dataclasses.replace(adapter, image_encoder=odd).on(picture(0)), "needs .*, found an image encoder"),
    ):
        with pytest.raises(InputError, match=message) as error:
            one_level.check(request(), (look(),))
        assert "\n" not in str(error.value)


def tensors(one_level, adapter):
    """Return the published form of an adapter."""
    held = {}
    for name, x in {"proj": adapter.projection["proj"], "norm": adapter.projection["norm"]}.items():
        held |= {f"image_proj.{name}.weight": np.asarray(x.get("kernel", x.get("scale"))).T}
        held |= {f"image_proj.{name}.bias": np.asarray(x["bias"])}
    for i, name in enumerate(attn2_names(one_level)):
        for x in "kv":
            held[f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight"] = np.asarray(adapter.layers[name][f"to_{x}"]["kernel"]).T
    return {key: np.ascontiguousarray(x) for key, x in held.items()}


def test_files_are_read_and_others_are_said_to_be_what_they_are(one_level, adapter, tmp_path):
    held, path = tensors(one_level, adapter), tmp_path / "ip.safetensors"
    save_file(held, path)
    found = IPAdapter.load(path, one_level)
    jax.tree.map(np.testing.assert_array_equal, (found.projection, found.layers), (adapter.projection, adapter.layers))
    assert "base, 4 tokens" in repr(found) and found.kind == "base"
    face = {key.replace("_proj.proj.", "_proj.proj.0."): x for key, x in held.items()}
    wide = held | {key: np.tile(x, (1, 2)) for key, x in held.items() if key.startswith("ip_adapter.1.")}
    for given, message in (
        ({k: x for k, x in held.items() if k.startswith("image_proj")}, "expected an IP-Adapter"),
        ({k: x for k, x in held.items() if not k.startswith("ip_adapter.1.")}, "an adapter for another base"),
        ({k: x for k, x in held.items() if k != "ip_adapter.1.to_k_ip.weight"}, "an adapter for another base"),
        (wide, r"its \S+attn2 has .*; an adapter for another base"),
        (face, "an IP-Adapter FaceID; its pictures go through insightface"),
        (face | {"image_proj.perceiver_resampler.proj_in.weight": np.ones(2)}, "FaceID Plus"),
        (held | {"image_proj.norm.bias": np.full(16, np.nan, "f4")}, "image_proj.norm.bias' has NaN"),
    ):
        save_file(given, path)
        with pytest.raises(InputError, match=message) as error:
            IPAdapter.load(path, one_level)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    (tmp_path / "x.bin").write_bytes(b"\x80")
    with pytest.raises(InputError, match=r"x\.bin: found a Python pickle.*convert it: python -c"):
        IPAdapter.load(tmp_path / "x.bin", one_level)
    with pytest.raises(InputError, match="found no such file, expected an IP-Adapter"):
        IPAdapter.load(tmp_path / "nowhere.safetensors", one_level)


def test_an_untrained_adapter_copies_the_texts_keys_and_values(one_level, encoder):
    """With the text's own states for tokens the output before to_out is (1 + scale) times the text's attention."""
    name = attn2_names(one_level)[0]
    # Compiled, what is drawn at random for the projection, and not looked at here, costs nothing.
    layer = jax.jit(lambda key: IPAdapter.init(key, one_level, encoder).layers)(jax.random.key(0))[name]
    rng = np.random.default_rng(0)
    context = jnp.asarray(rng.standard_normal((1, 5, layer["to_k"]["kernel"].shape[0])), jnp.float32)
    k, v = ((context @ layer[x]["kernel"]).reshape(1, 5, 2, -1) for x in ("to_k", "to_v"))
    q = jnp.asarray(rng.standard_normal((1, 4, *k.shape[2:])), jnp.float32)
    made = {"scale": [[0.5]], "at_site": {name: 1.0}}
    control = maths.bind({name: layer}, context[:, None], 0 * context[:, None], **made)
    site = Site(name, 2, (2, 2))
    plain, _ = attend(site, QKV(q, k, v))
    both, _ = attend(site, QKV(q, k, v), (control,))
    np.testing.assert_allclose(both, 1.5 * plain, rtol=1e-5, atol=1e-6)
    plus = random_adapter(one_level, encoder, "plus")
    assert maths.tokens_of("plus", plus.projection) == 16 and plus.embed([picture(0)]).none.shape == (5, 16)


def test_what_is_kept_of_pictures_is_bounded(monkeypatch):
    monkeypatch.setattr(references, "MOST_KEPT", 2)
    kept = {}
    assert [references.remember(kept, key, 10 * key) for key in range(5)] == [0, 10, 20, 30, 40]
    assert kept == {3: 30, 4: 40}
