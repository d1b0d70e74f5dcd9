"""The trainer of StyleAdapter on a tiny base: what it learns, what a step sees, resuming, and refusals."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix import InputError
from jaxmix.command import parse
from jaxmix.controls import style_adapter as maths
from jaxmix.testing import random_params
from jaxmix.weights.files import ASSETS
from tests.data.made import make_folder, picture
from tests.jobs import TWO_STEPS, killed_after
from train import clip, style_adapter
from train.diffusion import make_tokenize

CONFIG = Path(__file__).parents[2] / "configs" / "style_adapter_mini.yaml"
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def seen_by(tmp_path_factory):
    """Return the folder of a tiny CLIP of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    told = {
        "vision": {**TOWER, "image_size": 16, "patch_size": 8},
        "text_encoder": {**TOWER, "max_position_embeddings": 16},
    }
    cfg = clip.Config(output_dir="unused", tokenizer=str(ASSETS / "mini" / "tokenizer"), projection_dim=12, **told)
    configs = clip.make_configs(cfg)
    modules = {"vision": jaxmix.models.CLIPVisionModel(configs[0]), "text": jaxmix.models.CLIPTextModel(configs[1])}
    params = {name: random_params(module.abstract_params(), 0) for name, module in modules.items()}
    clip.export(folder, {**params, "logit_scale": jnp.zeros(())}, configs, cfg.tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def base(one_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    one_level.save(folder)
    return str(folder)


def shrunk(base, seen_by, folder, **changes):
    """Return the committed config at the size of the tiny base."""
    cfg = parse(style_adapter.main, ["--config", str(CONFIG), "--output_dir", str(folder)])
    small = {
        "pretrained_model_name_or_path": base,
        "image_encoder": seen_by,
        "scenes": {**cfg.scenes, "size": 16, "objects": 4},
        "references": 2,
        "blocks": 1,
        **TWO_STEPS,
        "validation_steps": 0,
        "validation_prompts": cfg.validation_prompts[:1],
        "validation_scales": [1.0],
        "validation_batch_size": 6,
    }
    return dataclasses.replace(cfg, **{**small, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, seen_by):
    """Return a folder with two runs of two steps: `whole`, and `parts`, killed after the first and resumed."""
    root = tmp_path_factory.mktemp("runs")
    assert style_adapter.main(shrunk(base, seen_by, root / "whole", validation_steps=2)) == 0
    killed_after(1, root / "whole", root / "parts", exported=style_adapter.FILE)
    assert style_adapter.main(shrunk(base, seen_by, root / "parts", resume_from_checkpoint="1")) == 0
    return root


def test_stopping_and_resuming_gives_the_same_file_bit_for_bit(runs, one_level, seen_by):
    whole, parts = ((runs / name / style_adapter.FILE).read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    adapter = jaxmix.StyleAdapter.load(runs / "whole" / style_adapter.FILE, one_level, seen_by)
    assert min(abs(float(layer["strength"])) for layer in adapter.layers.values()) > 0  # every layer learnt
    assert len(list((runs / "whole" / "pictures").iterdir())) == 1


def test_the_step_sees_what_sampling_does(one_level, base, seen_by, tmp_path):
    encoder = jaxmix.ImageEncoder.load(seen_by)
    for options in ({}, {"class_token": True}):
        cfg = shrunk(base, seen_by, tmp_path, shuffle=False, **options)
        adapter = jaxmix.StyleAdapter.init(jax.random.key(0), one_level, encoder, blocks=1)
        shown = [picture(0), picture(9)]
        batch = {"references": encoder.pixels(shown * 2).reshape(2, 2, 16, 16, 3), "unstyled": np.asarray([0, 1], "f4")}
        made = style_adapter.make_tokens(encoder, cfg)
        found = jax.jit(made)({"style_emb": adapter.style_emb}, {"image_encoder": encoder.params}, batch)
        states = adapter.see(shown, shuffle=False, **options)
        np.testing.assert_allclose(found[0], maths.style_tokens(adapter.style_emb, states[None])[0], atol=2e-5)
        assert not np.asarray(found[1]).any()


def test_rows_have_views_or_other_scenes_of_their_style(one_level, base, seen_by, tmp_path):
    encoder, tokenize = jaxmix.ImageEncoder.load(seen_by), make_tokenize(one_level)
    cfg = shrunk(base, seen_by, tmp_path, style_word_rate=0.0)
    scenes = style_adapter.open_rows(cfg, one_level)
    for others in (scenes.by_style[name] for name in scenes.scenes.styles):
        assert {others[i]["style_name"] for i in range(4)} == {others.styles[0]}
    said = []
    row = style_adapter.make_rows(lambda text: said.append(text) or tokenize(text), encoder, cfg)
    made = row(scenes[3], np.random.default_rng(1))
    assert made["references"].shape == (2, 16, 16, 3) and " of " in scenes[3]["text"]
    assert all(" of " not in text for text in said)  # captions do not say the style
    again = row(scenes[3], np.random.default_rng(1))
    np.testing.assert_array_equal(made["references"], again["references"])
    folder = make_folder(tmp_path / "pictures", [(16, 24)] * 3)
    told = {"scenes": {}, "train_data_dir": str(folder), "resolution": 16, "references_from": "views"}
    cfg = shrunk(base, seen_by, tmp_path, **told)
    rows = style_adapter.open_rows(cfg, one_level)
    made = style_adapter.make_rows(tokenize, encoder, cfg)(rows[0], np.random.default_rng(0))
    assert made["references"].shape == (2, 16, 16, 3)
    for seed in range(20):
        part = style_adapter.view(picture(3, (16, 24)), np.random.default_rng(seed))
        assert 8 <= part.shape[0] == part.shape[1] <= 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_encoder": ""}, "image_encoder: not given, expected the CLIP that reads the references"),
        ({"references": 0}, "references: found 0, expected 1 or more"),
        ({"style_dropout_rate": 0.9, "caption_dropout_rate": 0.2}, "found a sum above 1"),
        ({"scenes": {}, "train_data_dir": "no/such"}, "references_from: found style without scenes"),
        ({"validation_images": ["a.png"]}, "validation_images: found 1, expected one for each of 0"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, base, seen_by, changes, words):
    with pytest.raises(InputError) as e:
        style_adapter.main(shrunk(base, seen_by, tmp_path, **changes))
    assert words in str(e.value) and "\n" not in str(e.value)
