"""Phrases in prompts whose two text encoders cut them differently, as SDXL's do, and what methods make of them."""

import dataclasses

import numpy as np
import pytest

from jaxmix import DenseDiffusion, InputError, PaintWithWords, Request, Segment, StructuredDiffusion
from jaxmix.pipeline.phrases import encoded_alone, find_phrase
from jaxmix.testing import random_params
from jaxmix.weights.single_file import CLIP_TOKENIZER

PROMPT = "wow!! a cat left of a car"
LEFT = np.pad(np.ones((16, 8), bool), ((0, 0), (0, 8)))
LAYOUT = [Segment("a cat", LEFT), Segment("car", ~LEFT)]


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl):
    """Tiny SDXL with CLIP's whole vocabulary and tokenizers: the second one pads with "!", as the released one does."""
    from transformers import CLIPTokenizer

    first, second = (CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), **more) for more in ({}, {"pad_token": "!"}))
    made, params = {"tokenizer": first, "tokenizer_2": second}, dict(tiny_sdxl.params)
    for name, tokenizer in (("text_encoder", first), ("text_encoder_2", second)):
        encoder = getattr(tiny_sdxl, name)
        ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = dataclasses.replace(encoder.config, vocab_size=len(tokenizer), **ids)
        made[name] = dataclasses.replace(encoder, config=config)
        params[name] = random_params(made[name], 7)
    return dataclasses.replace(tiny_sdxl, params=params, **made)


def test_the_tokenizers_differ_as_those_of_sdxl_do(sdxl):
    first, second = (t.convert_ids_to_tokens(i) for t, i in zip(sdxl.tokenizers, sdxl.ids_of(PROMPT), strict=True))
    assert first == ["wow</w>", "!!</w>", "a</w>", "cat</w>", "left</w>", "of</w>", "a</w>", "car</w>"]
    assert second == ["wow</w>", "!", "!", *first[2:]]


def test_a_phrase_is_found_by_each_tokenizer(sdxl):
    cat, a = (find_phrase(sdxl, PROMPT, text, "here") for text in ("a cat", "a"))
    assert cat.starts == ((3,), (4,)) and cat.lengths == (2, 2)
    assert a.starts == ((3, 7), (4, 8))
    np.testing.assert_array_equal(a.tokens(1), [4, 8])
    np.testing.assert_array_equal(cat.tokens(1, 1), [4, 5])
    # A word that is only part of a piece for one of them is in the prompt for the other alone.
    for text, prompt in (("wow!", PROMPT), ("a dog", PROMPT), ("!", "a cat"), ("car", "cat " * 40 + "car")):
        with pytest.raises(InputError, match="here: the phrase is not in the prompt"):
            find_phrase(sdxl, prompt, text, "here")


def test_one_encoder_has_one_place(tiny_pipeline):
    found = find_phrase(tiny_pipeline, PROMPT, "a cat", "here")
    assert found.starts == ((4,),) and found.lengths == (2,)  # mini's vocabulary has no !!


def test_states_of_a_phrase_alone_go_where_each_encoder_has_it(sdxl):
    request = Request(prompts=[PROMPT]).checked(sdxl)
    plain = np.asarray(request.states(sdxl).context)
    got = np.asarray(DenseDiffusion([LAYOUT]).apply(sdxl, request).text.context)
    alone = {text: np.asarray(sdxl.encode_prompt([text]).context)[0] for text in ("a cat", "car")}
    expected = plain.copy()
    expected[0, 1, 3:5, :16], expected[0, 1, 4:6, 16:] = alone["a cat"][1:3, :16], alone["a cat"][1:3, 16:]
    expected[0, 1, 8:9, :16], expected[0, 1, 9:10, 16:] = alone["car"][1:2, :16], alone["car"][1:2, 16:]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    pieces = list(encoded_alone(sdxl, [(0, find_phrase(sdxl, PROMPT, "a cat", "here"))]))
    assert [(p.image, p.tokens.tolist(), p.states.shape) for p in pieces] == [
        (0, [3, 4], (2, 16)),
        (0, [4, 5], (2, 24)),
    ]


def test_a_column_is_a_phrases_if_it_is_for_either_encoder(sdxl):
    request = Request(prompts=[PROMPT]).checked(sdxl)
    (dense,) = DenseDiffusion([LAYOUT], splice=False).apply(sdxl, request).controls
    tokens = np.asarray(dense.tokens)[0]
    assert tokens[3:6].tolist() == [1, 1, 1] and tokens[8:10].tolist() == [2, 2] and np.count_nonzero(tokens) == 5
    (paint,) = PaintWithWords([LAYOUT]).apply(sdxl, request).controls
    corner = np.asarray(paint.painted["4x4"])[0, 0]
    assert np.nonzero(corner)[0].tolist() == [3, 4, 5] and {*corner[3:6]} == {1.0}


def test_sdxl_draws_under_both_methods(sdxl):
    def draw(by):
        methods = PaintWithWords([LAYOUT], weight=by), StructuredDiffusion([["a cat", "a car"]], strength=by)
        return sdxl.generate([PROMPT], [1], 2, 3.0, methods=methods, output="latent")

    off, on = draw(0.0), draw(1.0)
    assert np.isfinite(on).all() and np.abs(on - off).max() > 1e-4


def test_a_column_may_be_of_two_segments(sdxl):
    """Token 5 is "left" for the first encoder and "cat" for the second."""
    layout = [Segment("a cat", LEFT), Segment("left", ~LEFT)]
    request = Request(prompts=[PROMPT]).checked(sdxl)
    (dense,) = DenseDiffusion([layout], splice=False).apply(sdxl, request).controls
    assert np.asarray(dense.tokens)[0, 3:7].tolist() == [1, 1, 3, 2]
    (paint,) = PaintWithWords([layout]).apply(sdxl, request).controls
    assert (np.asarray(paint.painted["4x4"])[0, :, 5] == 1).sum() >= 8
