"""Large objects show themselves in a few lines, and are equal to themselves."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmix import LoRA, VMix
from jaxmix.pipeline.inverted import Inverted
from jaxmix.tuning import lora


@pytest.fixture(scope="module")
def cards(tiny_pipeline, tiny_sdxl):
    factors = LoRA({"unet": lora.init(jax.random.key(0), tiny_pipeline.params["unet"], r"attn1\.to_q$", 2)})
    adapter = VMix.init(jax.random.key(0), tiny_pipeline)
    return {
        "Pipeline": tiny_pipeline,
        "Pipeline of SDXL": tiny_sdxl,
        "LoRA": factors,
        "LoRA file": LoRA(file=(Path("a"), "b.safetensors")),
        "VMix": dataclasses.replace(adapter, lora=factors),
        "Inverted": Inverted(np.zeros((2, 5, 8, 8, 4), np.float32), {f"site.{i}": None for i in range(9)}, "own"),
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Pipeline", [r"unet: [\d,]+ parameters, float32", "images: 16 x 16 pixels", "epsilon, 1000 timesteps"]),
        ("Pipeline of SDXL", ["text_encoder_2: ", "32 tokens, 40 channels"]),
        ("LoRA", ["unet: 4 modules, rank 2"]),
        ("LoRA file", ["file: a/b.safetensors"]),
        ("VMix", ["dimensions: color, lighting, ", "4 attn2 of 16 text channels", "lora, unet: 4 modules"]),
        ("Inverted", ["images: 2, of 8 x 8 x 4 latents", "steps: 4, label own", "site.0, site.1 and 7 more"]),
    ],
)
def test_a_card_has_at_most_ten_lines_and_says_what_it_is(cards, name, words):
    card = cards[name]
    text = repr(card)
    assert text.startswith(name.split()[0]) and len(text.splitlines()) <= 10 and len(text) < 1000
    for word in words:
        assert re.search(word, text), text
    assert card._repr_html_().count("<tr>") == len(text.splitlines()) - 1
    assert card == card and hash(card) == hash(card) and card != dataclasses.replace(card)
