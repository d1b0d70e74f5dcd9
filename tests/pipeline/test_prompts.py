"""Weighted and long prompts, clip_skip and learnt embeddings: their states, and the pictures drawn from them."""

import base64
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import jaxmix
from jaxmix import InputError, Request
from jaxmix.pipeline.chunks import Reading, chunk
from jaxmix.pipeline.job import denoise
from jaxmix.pipeline.programs import encode_ids
from jaxmix.pipeline.prompt_syntax import SYNTAXES
from jaxmix.types import TruncatedPromptWarning

LONG = "cat " * 20 + ", " + "dog " * 20  # two chunks
WEIGHTED = {"a1111": "a (cat:1.5) [on] a mat", "comfy": "a (cat:1.5) on a mat", "compel": "a (cat)1.5 on a mat"}
PLAIN = "a cat on a mat"


def context(pipe, prompts, syntax="plain", max_chunks=None, **more):
    return np.asarray(pipe.encode_prompt(prompts, syntax=syntax, max_chunks=max_chunks, **more).context)


@pytest.mark.parametrize("family", ["tiny_pipeline", "tiny_sdxl"])
def test_a_short_prompt_without_weights_has_the_states_of_today_bit_for_bit(family, request):
    pipe = request.getfixturevalue(family)
    ids = [
        t([PLAIN, ""], padding="max_length", max_length=32, truncation=True)["input_ids"]
        for t in pipe.tokenizers[: len(pipe.encoders)]
    ]
    states = [
        encode_ids(encoder, pipe.params[name], jnp.asarray(i))
        for (name, encoder), i in zip(pipe.encoders, ids, strict=True)
    ]
    two = len(states) > 1
    plain = np.concatenate([s.penultimate if two else s.last_hidden_state for s in states], -1)
    for syntax in SYNTAXES:
        np.testing.assert_array_equal(context(pipe, [PLAIN, ""], syntax), plain)
    # Beside a weighted one, too.
    for syntax, weighted in WEIGHTED.items():
        found = context(pipe, [PLAIN, weighted], syntax)
        np.testing.assert_array_equal(found[0], plain[0])
        assert np.abs(found[1] - plain[0]).max() > 1e-2


def test_weights_are_those_of_each_rule(tiny_pipeline):
    z, empty = context(tiny_pipeline, [PLAIN, ""])
    w = np.ones((32, 1), np.float32)
    w[2] = 1.5
    np.testing.assert_allclose(
        context(tiny_pipeline, [WEIGHTED["comfy"]], "comfy")[0], empty + w * (z - empty), atol=1e-5
    )
    np.testing.assert_allclose(
        context(tiny_pipeline, [WEIGHTED["compel"]], "compel")[0], empty + w * (z - empty), atol=1e-5
    )
    w[3] = 1 / 1.1
    np.testing.assert_allclose(
        context(tiny_pipeline, [WEIGHTED["a1111"]], "a1111")[0],
        z * w * (z.mean() / (z * w).mean()),
        atol=1e-4,
        rtol=1e-4,
    )
    np.testing.assert_allclose(context(tiny_pipeline, ["a (cat:0)"], "comfy")[0, 2], empty[2], atol=1e-6)


def test_chunks_are_encoded_alone_and_joined(tiny_pipeline):
    found = context(tiny_pipeline, [LONG], "a1111")
    parts = [context(tiny_pipeline, [text]) for text in ("cat " * 20 + ",", "dog " * 20)]
    np.testing.assert_allclose(found, np.concatenate(parts, 1), atol=1e-6)
    filled = context(tiny_pipeline, [PLAIN, LONG])
    np.testing.assert_array_equal(filled[0, :32], context(tiny_pipeline, [PLAIN, PLAIN])[0])
    np.testing.assert_allclose(filled[0, 32:], context(tiny_pipeline, [""])[0], atol=1e-6)
    # The mean of a weighted prompt is its own, whatever is beside it.
    both = context(tiny_pipeline, [WEIGHTED["a1111"], LONG], "a1111")
    np.testing.assert_allclose(both[0, :32], context(tiny_pipeline, [WEIGHTED["a1111"]], "a1111")[0], atol=1e-5)


def test_sdxl_has_both_encoders_chunks_and_the_first_ones_pooled_state(tiny_sdxl):
    found = tiny_sdxl.encode_prompt([LONG], syntax="a1111", max_chunks=None)
    assert found.context.shape == (1, 64, 40)
    first = tiny_sdxl.encode_prompt(["cat " * 20 + ","])
    np.testing.assert_allclose(found.pooled, first.pooled, atol=1e-6)
    weighted = tiny_sdxl.encode_prompt(["a (cat:1.9)"], syntax="a1111")
    np.testing.assert_array_equal(weighted.pooled, tiny_sdxl.encode_prompt(["a cat"]).pooled)
    two = tiny_sdxl.encode_prompt(["a cat"], ["a dog"])
    np.testing.assert_array_equal(two.context[..., :16], tiny_sdxl.encode_prompt(["a cat"]).context[..., :16])
    np.testing.assert_array_equal(two.context[..., 16:], tiny_sdxl.encode_prompt(["a dog"]).context[..., 16:])


def test_a_cut_prompt_is_said(tiny_pipeline):
    request = Request(prompts=[LONG]).checked(tiny_pipeline)
    with pytest.warns(TruncatedPromptWarning, match="cut off: 'dog dog"):
        request.states(tiny_pipeline)
    request = dataclasses.replace(request, max_chunks=None)
    assert request.states(tiny_pipeline).context.shape == (1, 2, 64, 16)  # and no warning


def draw(pipe, prompts, seeds, **more):
    more = {"syntax": "a1111", "max_chunks": None} | more
    return pipe.generate(prompts, seeds, 2, 3.0, output="latent", **more)


def test_a_picture_depends_on_no_neighbour_and_each_number_of_chunks_is_one_trace(one_level):
    prompts = [LONG, PLAIN, "cat BREAK dog BREAK car", WEIGHTED["a1111"], LONG + ", (dog:0.5)"]
    seeds = [3, 1, 4, 1, 5]
    whole = draw(one_level, prompts, seeds, batch_size=2)
    assert whole.shape[0] == 5 and np.isfinite(whole).all()
    before = denoise._cache_size()
    for i in (0, 1, 3):
        alone = draw(one_level, [prompts[i]] * 2, [seeds[i], 9])
        np.testing.assert_allclose(alone[0], whole[i], atol=1e-5 * np.abs(whole).max())
    draw(one_level, ["(dog:0.3) BREAK car", LONG], [1, 2], negative_prompts=["x", "(y:1.2)"])
    assert denoise._cache_size() == before


@pytest.mark.parametrize("syntax", ["a1111", "compel", "comfy"])
def test_images_are_told_by_their_weights(one_level, syntax):
    plain = draw(one_level, [PLAIN, PLAIN], [1, 1], syntax=syntax)
    told = draw(one_level, [PLAIN, WEIGHTED[syntax]], [1, 1], syntax=syntax)
    np.testing.assert_array_equal(told[0], plain[0])
    assert np.abs(told[1] - plain[1]).max() > 1e-4


def test_a_negative_prompt_of_more_chunks_fills_up_the_prompt(tiny_pipeline):
    request = Request(prompts=[PLAIN], negatives=[LONG], max_chunks=None).checked(tiny_pipeline)
    states = np.asarray(request.states(tiny_pipeline).context)
    assert states.shape == (1, 2, 64, 16)
    np.testing.assert_allclose(states[0, 1, 32:], context(tiny_pipeline, [""])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"syntax": "a1111", "prompts": ["x", "(y:nan)"]}, r"prompts\[1\]: found the weight 'nan'"),
        ({"syntax": "a1111", "negatives": ["(y:inf)"]}, r"negative_prompts\[0\]: found the weight 'inf'"),
        ({"syntax": "a111"}, "syntax: found 'a111', expected one of plain, a1111"),
        ({"max_chunks": 0}, "max_chunks: found 0, expected a whole number of at least 1"),
        ({"clip_skip": 2}, "clip_skip: found 2, expected 0 to 1: text_encoder has 1 layers"),
        ({"clip_skip": -1}, "clip_skip: found -1"),
        ({"prompts_2": ["x"]}, "prompts_2: found some, but the model has one text encoder"),
    ],
)
def test_a_mistake_is_one_line(tiny_pipeline, fields, message):
    fields = {"prompts": ["x"], **fields}
    if len(fields["prompts"]) == 2:
        fields["negatives"] = None
    with pytest.raises(InputError, match=message) as e:
        tiny_pipeline.check(Request(**fields))
    assert "\n" not in str(e.value)


# Learnt embeddings -------------------------------------------------------------------------------------------------

VECTORS = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)


def test_a_learnt_word_stands_for_its_vectors(tiny_pipeline):
    pipe = tiny_pipeline.with_embedding({"<my-style>": VECTORS})
    tokenizer, known = pipe.tokenizers[0], pipe.known(0)
    vocabulary = pipe.text_encoder.config.vocab_size
    ids = chunk(tokenizer, 32, "a cat, <My-Style>, car", Reading(), known).ids[0]
    assert ids[4:7].tolist() == [vocabulary, vocabulary + 1, vocabulary + 2]
    # As if the table itself had the vectors.
    table = pipe.params["text_encoder"]["text_model"]["embeddings.token_embedding"]["embedding"]
    encoder = pipe.text_encoder.clone(config=dataclasses.replace(pipe.text_encoder.config, vocab_size=vocabulary + 3))
    longer = {**pipe.params["text_encoder"]["text_model"]}
    longer["embeddings.token_embedding"] = {"embedding": jnp.concatenate([table, jnp.asarray(VECTORS)])}
    expected = encode_ids(encoder, {"text_model": longer}, jnp.asarray(ids[None])).last_hidden_state
    np.testing.assert_allclose(context(pipe, ["a cat, <My-Style>, car"]), expected, atol=1e-6)
    np.testing.assert_array_equal(context(pipe, [PLAIN]), context(tiny_pipeline, [PLAIN]))
    # Weighted, negative, and with the other vectors of a second one.
    pipe = pipe.with_embedding({"string_to_param": {"*": -VECTORS[:1]}, "name": "x"}, token="badthing-v2")
    states = Request(prompts=["(<my-style>:1.3)"], negatives=["badthing-v2"], syntax="a1111").checked(pipe).states(pipe)
    assert np.isfinite(states.context).all()
    assert chunk(tokenizer, 32, "badthing-v2", Reading(), pipe.known(0)).ids[0, 1] == vocabulary + 3
    assert chunk(tokenizer, 32, "embedding:badthing-v2", Reading("comfy"), pipe.known(0)).ids[0, 1] == vocabulary + 3
    # No part of a longer word.
    assert chunk(tokenizer, 32, "badthing-v22", Reading(), pipe.known(0)).ids.max() < vocabulary


def test_a_learnt_word_is_kept_together_and_its_id_is_no_end_of_text(tiny_pipeline):
    pipe = tiny_pipeline.with_embedding({"<my-style>": VECTORS})
    ids = chunk(pipe.tokenizers[0], 32, "cat " * 28 + "<my-style>", Reading("a1111", None), pipe.known(0)).ids
    assert ids.shape[0] == 2 and ids[1, 1] >= pipe.text_encoder.config.vocab_size
    old = dataclasses.replace(pipe.text_encoder.config, eos_token_id=2)
    from jaxmix.models.clip import at_end_of_text

    ids = np.asarray([[0, 5, old.vocab_size + 1, old.vocab_size - 1, 7]])
    assert at_end_of_text(old, ids, jnp.arange(5.0).reshape(1, 5, 1))[0, 0] == 3


def test_sdxl_has_vectors_for_both_encoders(tiny_sdxl):
    made = {"clip_l": VECTORS, "clip_g": np.ones((3, 24), np.float32)}
    pipe = tiny_sdxl.with_embedding(made, "<pair>")
    assert np.abs(context(pipe, ["a <pair>"]) - context(tiny_sdxl, ["a <pair>"])).max() > 1e-2
    with pytest.raises(InputError, match="found vectors of width 16, expected 16 and 24, one for each text encoder"):
        tiny_sdxl.with_embedding({"<pair>": VECTORS})


def test_a_picture_may_hold_an_embedding_in_its_text(tiny_pipeline, tmp_path):
    held = {"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": VECTORS.tolist()}}, "name": "n"}
    text = PngInfo()
    text.add_text("sd-ti-embedding", base64.b64encode(json.dumps(held).encode()).decode())
    Image.new("RGB", (4, 4)).save(tmp_path / "hidden-style.png", pnginfo=text)
    (one,) = tiny_pipeline.with_embedding(tmp_path / "hidden-style.png").embeddings
    assert one.token == "hidden-style"
    np.testing.assert_array_equal(one.vectors[0], VECTORS)
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(InputError, match=r"plain\.png: found a picture without the text sd-ti-embedding"):
        tiny_pipeline.with_embedding(tmp_path / "plain.png")
    whole = (tmp_path / "hidden-style.png").read_bytes()
    for size in range(20, len(whole), 13):
        (tmp_path / "cut.png").write_bytes(whole[:size])
        try:
            tiny_pipeline.with_embedding(tmp_path / "cut.png")
        except InputError as error:
            assert "cut.png" in str(error)


@pytest.mark.parametrize(
    ("source", "token", "message"),
    [
        ({"<x-y>": np.zeros((2, 768), np.float32)}, None, r"width 768 \(Stable Diffusion 1\), expected 16"),
        ({"cat": VECTORS}, None, "the token 'cat', a word of the vocabulary"),
        ({"two words": VECTORS}, None, "found the token 'two words', expected a word without spaces"),
        ({"emb_params": VECTORS}, None, "found no token"),
        ({"<x-y>": VECTORS * np.nan}, None, "not finite"),
        ({"<x-y>": VECTORS.astype(int)}, None, "expected floats"),
        ({"<x-y>": VECTORS, "<z-z>": VECTORS}, None, "found 2 entries"),
        ({"<x-y>": np.zeros((31, 16), np.float32)}, None, "found 31 vectors, expected at most 30"),
        ({}, None, "expected a learnt embedding"),
        (3, None, "found int, expected a file or a dictionary"),
        ("nowhere.pt", None, "nowhere.pt: no such file"),
    ],
)
def test_what_is_no_embedding_of_the_model_is_one_line(tiny_pipeline, source, token, message):
    with pytest.raises(InputError, match=message) as e:
        tiny_pipeline.with_embedding(source, token)
    assert "\n" not in str(e.value)


# Methods -----------------------------------------------------------------------------------------------------------


def test_methods_find_their_words_in_any_chunk(one_level):
    left = np.pad(np.ones((16, 8), bool), ((0, 0), (0, 8)))
    prompts = ["a mat BREAK a (red:1.4) cat", PLAIN]
    layouts = [[jaxmix.Segment("red cat", left)], [jaxmix.Segment("cat", left)]]
    request = Request(prompts=prompts, syntax="a1111", max_chunks=None).checked(one_level)
    (control,) = jaxmix.DenseDiffusion(layouts, splice=False).apply(one_level, request).controls
    assert np.flatnonzero(np.asarray(control.tokens)[0]).tolist() == [34, 35]
    methods = (jaxmix.DenseDiffusion(layouts), jaxmix.StructuredDiffusion([["red cat"], ["cat"]]))
    vmix = jaxmix.VMix.init(jaxmix_key(), one_level).on()
    drawn = draw(one_level, prompts, [1, 2], methods=(*methods, vmix, jaxmix.ComposableDiffusion([[LONG], []])))
    assert np.isfinite(drawn).all()
    layered = draw(one_level, [PLAIN], [1], methods=(jaxmix.LayerPrompts([{"mid_block": LONG}]),))
    assert np.isfinite(layered).all()


def jaxmix_key():
    import jax

    return jax.random.key(0)


# Prompts as people write them ----------------------------------------------------------------------------------------

TAGS = "masterpiece, best quality, (ultra detailed:1.2), "
COMMUNITY = [
    "a cat",
    "(cat:1.2), [dog]",
    "((red)) car (((at night)))",
    "a boat, (by the sea:0.8), dusk",
    TAGS + "1girl, solo",
    "portrait of a man, <my-style>, (sharp focus:1.3)",
    "cat \\(animal\\), (white background:1.4",
    "dog] with a ball), simple",
    "a house : on a hill, 8k:",
    "(apple:1.1) (pear:abc) and [[plum]]",
    "BREAK a cat",
    "a red cat BREAK a blue dog",
    TAGS + "a cat in (<my-style>:1.3) by the sea, dusk, clouds, stars, snow, rain",
    "photo of a dog, " + "very sharp, " * 8,
    "(((a fish))), water, " + "[blue], " * 6 + "deep sea, bubbles, light",
    "a tree,, , (leaves:1.05),\n(wind:0.95)\nBREAK\nautumn colors",
    TAGS + "a car BREAK night street, neon, rain BREAK film grain",
    "a cat " * 25,
    "one BREAK (two:1.5) BREAK [three]",
    TAGS * 4 + "<my-style>",
]
BAD = "<bad-thing>, (worst quality:1.4), (low quality:1.4), blurry"


def test_prompts_as_people_write_them_take_one_trace_for_each_number_of_chunks(tiny_sdxl):
    pipe = tiny_sdxl
    for token, scale in (("<my-style>", 1.0), ("<bad-thing>", -1.0)):
        made = {"clip_l": scale * VECTORS, "clip_g": np.full((3, 24), scale, np.float32)}
        pipe = pipe.with_embedding(made, token)
    request = Request(prompts=COMMUNITY, negatives=[BAD] * 20, syntax="a1111", max_chunks=None).checked(pipe)
    assert set(request.chunk_counts(pipe)) == {1, 2, 3}
    before = denoise._cache_size()
    drawn = draw(pipe, COMMUNITY, range(20), negative_prompts=[BAD] * 20, batch_size=4)
    assert np.isfinite(drawn).all() and len({x.tobytes() for x in drawn}) == 20
    assert denoise._cache_size() - before <= 3
    draw(pipe, COMMUNITY[::-1], range(20), negative_prompts=["ugly"] * 20, batch_size=4)
    assert denoise._cache_size() - before <= 3
