"""The pruned tokeniser: opened by transformers, true to CLIP's splitting, long enough for every caption."""

import json
from pathlib import Path

import numpy as np
import pytest

from train.scenes import LABEL_WORDS, Scenes, label_phrase
from train.scenes.captions import plural

FOLDER = Path(__file__).parents[2] / "jaxmix" / "assets" / "mini" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTokenizer.from_pretrained(FOLDER)


def test_special_tokens_are_the_last_ids(tokenizer):
    size = len(json.loads((FOLDER / "vocab.json").read_text()))
    assert len(tokenizer) == size and 4000 < size < 9000
    assert tokenizer.bos_token_id == size - 2
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == size - 1
    ids = tokenizer("A CAT", padding="max_length", max_length=8).input_ids
    assert ids[0] == size - 2 and ids[3:] == [size - 1] * 5
    assert ids == tokenizer("a cat", padding="max_length", max_length=8).input_ids


def test_every_caption_fits_the_text_length(tokenizer):
    length = json.loads((FOLDER.parent / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    assert tokenizer.model_max_length == length <= 48
    for settings in ({}, {"objects": 96, "label_words": 1.0, "labelled": 1.0}):
        scenes = Scenes(**settings)
        texts = []
        for i in range(10_000):
            plan = scenes.plan(np.random.Generator(np.random.Philox(key=[0, i])))
            texts.append(", ".join(filter(None, [scenes.caption(plan), label_phrase(plan.labels)])))
        assert max(len(ids) for ids in tokenizer(texts).input_ids) <= length


def test_captions_of_places_fit_the_longer_text_length(tokenizer):
    scenes = Scenes(
        size=32, arrangement="anywhere", two_objects=0.1, three_objects=0.8, place_words=1.0, labelled=1.0, counts=0.1
    )
    texts = []
    for i in range(3000):
        plan = scenes.plan(np.random.Generator(np.random.Philox(key=[0, i])))
        texts.append(", ".join(filter(None, [scenes.caption(plan), label_phrase(plan.labels)])))
    assert 32 < max(len(ids) for ids in tokenizer(texts, verbose=False).input_ids) <= 48
    for word in ("left", "right", "top", "bottom", "middle", "two", "three", "row", "above"):
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert all(len(tokenizer.tokenize(plural(name))) <= 4 for name in Scenes().object_names)


def test_words_of_captions_are_whole_pieces(tokenizer):
    """Splitting equals CLIP's: these pieces are what the full vocabulary gives."""
    caption = "a glossy cartoon of a big butterfly left of a teddy bear on a striped background, vivid colors"
    expected = caption.replace(",", " ,")
    assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in expected.split()]
    assert tokenizer.tokenize("checkered") == ["chec", "kered</w>"]
    assert tokenizer.tokenize("3d") == ["3</w>", "d</w>"]
    for name in (*Scenes(objects=96).object_names, *(w for pair in LABEL_WORDS.values() for w in pair)):
        assert len(tokenizer.tokenize(name)) <= 4, name


@pytest.mark.parametrize("text", ["xylophones", "café", "日本", "🦄", "zqxj 42"])
def test_words_outside_the_vocabulary_are_spelled_in_bytes(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
