"""The trainer of textual inversion on a tiny base: the file, all that stays as it was, layers, words, refusals."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from infer.generate import Config as Generate
from infer.generate import main as generate
from infer.png import read_settings
from jaxmix import InputError, LayerPrompts, Request
from jaxmix.command import parse
from jaxmix.pipeline.blocks import layer_names
from jaxmix.tuning.fit import fit
from jaxmix.weights import names
from jaxmix.weights.embedding_files import read_embedding
from tests.data.made import encoded, make_folder, picture
from tests.jobs import TWO_STEPS, killed_after, only
from train import textual_inversion as ti
from train.diffusion import make_tokenize

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def base(one_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    one_level.save(folder)
    return str(folder)


def shrunk(base, folder, **changes):
    """Return the committed config at the size of the tiny base."""
    path = CONFIGS / "textual_inversion_mini.yaml"
    cfg = parse(ti.main, ["--config", str(path), "--output_dir", str(folder)])
    small = {
        "pretrained_model_name_or_path": base,
        "scenes": {**cfg.scenes, "size": 16, "objects": 4},
        **TWO_STEPS,
        "num_vectors": 2,
        "learning_rate": 0.1,
        "validation_steps": 0,
        "validation_prompts": cfg.validation_prompts[:1],
        "validation_guidance_scale": 1.0,
        "validation_batch_size": 1,
    }
    return dataclasses.replace(cfg, **{**small, **changes})


def leaves(tree):
    """Return the leaves of a tree by their path, as copies."""
    return {".".join(path): np.array(leaf) for path, leaf in names.flatten(tree)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """Return a folder with runs of two steps: `whole`, `parts`, killed after the first and resumed, and `layers`.

    Of `whole` what was frozen is kept as it was before and after the steps, and what was not.
    """
    root = tmp_path_factory.mktemp("runs")

    def watched(cfg, state, update, frozen, *more):
        np.savez(root / "before.npz", **leaves(frozen))
        done = fit(cfg, state, update, frozen, *more)
        np.savez(root / "after.npz", **leaves(frozen))
        np.savez(root / "learns.npz", **leaves(done[0].params))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.diffusion.fit", watched)
        assert ti.main(shrunk(base, root / "whole")) == 0
    killed_after(1, root / "whole", root / "parts", exported=ti.FILE)
    assert ti.main(shrunk(base, root / "parts", resume_from_checkpoint="1")) == 0
    assert ti.main(shrunk(base, root / "layers", per_layer=True, validation_steps=2)) == 0
    return root


def test_two_vectors_learn_and_a_resumed_run_writes_the_same_file(runs, one_level):
    assert (runs / "whole" / ti.FILE).read_bytes() == (runs / "parts" / ti.FILE).read_bytes()
    (vectors,) = load_file(runs / "whole" / ti.FILE).values()
    table = np.asarray(one_level.params["text_encoder"]["text_model"]["embeddings.token_embedding"]["embedding"])
    start = table[one_level.token_ids("penguin")]
    assert vectors.shape == (2, 16) and vectors.dtype == np.float32
    assert (np.abs(vectors - start).max(1) > 0.01).all() and np.abs(vectors[0] - vectors[1]).max() > 1e-3
    pipe = one_level.with_embedding(runs / "whole" / ti.FILE)
    assert [one.token for one in pipe.embeddings] == ["<duck>"]
    np.testing.assert_array_equal(pipe.embeddings[0].vectors[0], vectors)


def test_all_other_rows_of_the_table_and_all_weights_stay_bit_for_bit(runs, one_level):
    before, after, learns = (dict(np.load(runs / f"{name}.npz")) for name in ("before", "after", "learns"))
    assert {name: x.shape for name, x in learns.items()} == {"text_encoder": (2, 16)}
    assert {name.split(".")[0] for name in after} == {"unet", "vae", "text_encoder"}
    for expected in (before, leaves({name: one_level.params[name] for name in ("unet", "vae", "text_encoder")})):
        assert after.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_array_equal(after[name], x)


def test_each_layer_draws_with_its_own_vectors_of_a_file_of_layers(runs, one_level):
    path = runs / "layers" / ti.FILE
    layers = list(layer_names(one_level))
    found = load_file(path)
    assert found.keys() == set(layers) and {x.shape for x in found.values()} == {(2, 16)}
    assert np.abs(found[layers[0]] - found[layers[1]]).max() > 1e-3  # the layers learn different things
    held = read_embedding(path)
    assert held.token == "<duck>" and list(held.layers) == sorted(layers)
    np.testing.assert_allclose(held.vectors[0], np.mean(list(found.values()), 0), rtol=1e-6)
    pipe = one_level.with_embedding(path)
    prompt = "a <duck> by the sea"
    request = Request(prompts=[prompt], steps=2, seeds=[0], guidance_scale=3.0)

    def drawn(pipe, *methods):
        return pipe.draw(request, methods, output="latent")

    own = drawn(pipe, LayerPrompts([{".": prompt}]))
    # As if each layer had a word of its own, which is a prompt of its own.
    words = one_level
    for i, name in enumerate(layers):
        words = words.with_embedding({f"<w-{i}>": found[name]})
    words = words.with_embedding({"<duck>": held.vectors[0]})
    told = {name: f"a <w-{i}> by the sea" for i, name in enumerate(layers)}
    np.testing.assert_allclose(own, drawn(words, LayerPrompts([told])), atol=1e-4)
    # Without layer prompts the word is the mean of its vectors.
    np.testing.assert_allclose(drawn(pipe), drawn(words), atol=1e-4)
    assert np.abs(own - drawn(pipe)).max() > 1e-3
    assert len(list((runs / "layers" / "pictures").iterdir())) == 1


def test_a_job_gives_layers_their_vectors_without_being_told(runs, base, tmp_path):
    path, prompt = runs / "layers" / ti.FILE, "a <duck> at night"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{prompt}", "seed": 0{more}}}\n' for more in (
        "", f', "layers": {{".": "{prompt}"}}', ', "layers": {"mid": "a cat"}')))  # fmt: skip
    how = {"model": base, "out": str(tmp_path / "out"), "steps": 2, "devices": 1, "embedding": [str(path)]}
    assert generate(Generate(prompts=str(rows), **how)) == 0
    own, told, mean = (
        np.asarray(Image.open(only(tmp_path / "out", f"000{i}_seed0.png"))).astype(int) for i in range(3)
    )
    np.testing.assert_array_equal(own, told)
    assert (own != mean).any()
    assert read_settings(only(tmp_path / "out", "0000_seed0.png"))["layers"] == {".": prompt}


def test_pictures_are_told_templates_captions_or_those_of_scenes(one_level, base, tmp_path):
    cfg = shrunk(base, tmp_path)
    word, start = ti.start_word(one_level, cfg)
    tokenize = ti.make_tokenize(word.add(one_level, start))
    plain, vocabulary = make_tokenize(one_level), one_level.text_encoder.config.vocab_size
    np.testing.assert_array_equal(tokenize("a cat by the sea")["input_ids"], plain("a cat by the sea")["input_ids"])
    assert tokenize("a <duck> cat")["input_ids"][2:4].tolist() == [vocabulary, vocabulary + 1]
    rng = np.random.default_rng(0)
    source = {"image": np.zeros((16, 16, 3), np.uint8), "id": "x", "text": "its own <duck>"}

    def said(row, **changes):
        made = ti.make_rows(lambda text: {"input_ids": text}, dataclasses.replace(cfg, **changes))
        return {str(made(row, rng)["input_ids"]) for _ in range(400)}

    objects = said(source, learnable_property="object")
    assert (
        len(objects) == 27 and all(text.count("<duck>") == 1 for text in objects) and "a photo of my <duck>" in objects
    )
    styles = said(source, learnable_property="style")
    assert len(styles) == 18 and "a small painting in the style of <duck>" in styles
    assert said(source, learnable_property="captions") == {"its own <duck>"}
    assert said(source, learnable_property="object", templates=["one {}, here"]) == {"one <duck>, here"}
    scenes = ti.open_instances(cfg, one_level, "")
    assert len(scenes) == 5 and all(row["template"].startswith("a 3d render of a") for row in scenes.rows)
    assert all("duck" not in row["template"] and row["template"].count("{}") == 1 for row in scenes.rows)
    # A folder: the word is put before captions that lack it, and is the caption of those without.
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, caption in (("a", "a <duck> asleep"), ("b", "by the sea"), ("c", None)):
        (folder / f"{name}.png").write_bytes(encoded(picture(0, (16, 16))))
        if caption:
            (folder / f"{name}.txt").write_text(caption)
    told = {"scenes": {}, "scene_object": "", "resolution": 16, "train_data_dir": str(folder)}
    rows = ti.open_instances(dataclasses.replace(cfg, **told), one_level, "<duck>", "<duck>")
    assert [e.text for e in rows.source.entries] == ["a <duck> asleep", "<duck>, by the sea", "<duck>"]


def test_sdxl_learns_vectors_for_both_encoders_and_for_each_layer(tiny_sdxl, base, tmp_path):
    cfg = shrunk(base, tmp_path, num_vectors=1)
    for per_layer in (False, True):
        word, learns = ti.start_word(tiny_sdxl, dataclasses.replace(cfg, per_layer=per_layer))
        count = len(layer_names(tiny_sdxl))
        shapes = {part: x.shape for part, x in learns.items()}
        ends = {"text_encoder": (1, 16), "text_encoder_2": (1, 24)}
        assert shapes == ({part: (count, *end) for part, end in ends.items()} if per_layer else ends)
        word.save(learns, tmp_path)
        held = tiny_sdxl.with_embedding(tmp_path / ti.FILE).embeddings[0]
        assert held.token == "<duck>" and len(held.layers) == count * per_layer
        # Before training the word is its initializer, in every layer.
        pipe = word.add(tiny_sdxl, learns)
        got, expected = (pipe.encode_prompt([f"a {name}"]) for name in ("<duck>", "penguin"))
        np.testing.assert_allclose(got.context, expected.context, atol=1e-5)
        np.testing.assert_allclose(got.pooled, expected.pooled, atol=1e-5)


def test_a_file_of_layers_that_does_not_fit_is_one_line(runs, one_level, tiny_sdxl):
    found = load_file(runs / "layers" / ti.FILE)
    first, second, *_ = found
    for tree, words in (
        ({first: found[first], second: found[second]}, "found vectors of 2 layers, expected the 4 of this model"),
        ({f"IN{i:02d}": found[first] for i in (1, 2)}, "found vectors of 2 layers, such as IN01, expected the 4"),
        ({**found, second: found[second][:1]}, f"{second}: found ((1, 16),), expected ((2, 16),) as in {first}"),
        ({**found, f"{first}.clip_g": found[first]}, f"{first}: found {first} and {first}.clip_g"),
    ):
        with pytest.raises(InputError) as e:
            one_level.with_embedding(tree, "<x-y>")
        assert words in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(InputError, match="found vectors of width 16, expected 16 and 24"):
        tiny_sdxl.with_embedding(found, "<x-y>")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"placeholder_token": "cat"}, "placeholder_token: found the token 'cat', a word of the vocabulary"),
        (
            {"placeholder_token": "my toy"},
            "placeholder_token: found the token 'my toy', expected a word without spaces",
        ),
        ({"placeholder_token": ""}, "placeholder_token: not given"),
        ({"initializer_token": " "}, "initializer_token: not given"),
        ({"num_vectors": 0}, "num_vectors: found 0, expected 1 or more"),
        ({"num_vectors": 31}, "num_vectors: found 31, expected at most 30"),
        ({"templates": ["a photo"], "learnable_property": "object"}, "templates: found 'a photo', expected one {}"),
        ({"templates": ["a {}"]}, "templates: found some with learnable_property captions"),
        ({"scene_object": "dodo"}, "scene_object: found 'dodo', expected one of"),
        ({"scenes": {}, "scene_object": "", "train_data_dir": "no/such"}, "no/such: found no such folder"),
        ({"num_instance_images": 0}, "num_instance_images: found 0"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, base, changes, words):
    with pytest.raises(InputError) as e:
        ti.main(shrunk(base, tmp_path, **changes))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_resume_with_another_word_and_an_empty_folder_are_one_line(runs, base, tmp_path):
    for changes, words in (
        ({"num_vectors": 3}, "trained with another num_vectors: found 2, expected 3"),
        ({"placeholder_token": "<goose>"}, "trained with another placeholder_token: found '<duck>'"),
        ({"per_layer": True}, "trained with another per_layer: found False, expected True"),
    ):
        with pytest.raises(InputError) as e:
            ti.main(shrunk(base, runs / "whole", **changes))
        assert words in str(e.value) and "\n" not in str(e.value)
    (tmp_path / "empty").mkdir()
    told = {"scenes": {}, "scene_object": "", "resolution": 16}
    with pytest.raises(InputError, match=r"empty: found an empty folder, expected pictures"):
        ti.main(shrunk(base, tmp_path, **told, train_data_dir=str(tmp_path / "empty")))


def test_a_broken_picture_is_named_and_replaced(one_level, base, tmp_path, capsys):
    folder = make_folder(tmp_path / "pictures", [(16, 16)] * 3)
    (folder / "001.png").write_bytes(b"not a picture")
    told = {"scenes": {}, "scene_object": "", "resolution": 16, "train_data_dir": str(folder)}
    stream = ti.open_instances(shrunk(base, tmp_path, **told), one_level, "x").in_batches(2, 0)
    assert {stream[i]["id"] for i in range(6)} == {"000.png", "002.png"}
    assert "bad row 001.png: cannot be decoded" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mini", "sd15", "sdxl"])
def test_configs_are_read(name, tmp_path):
    path = CONFIGS / f"textual_inversion_{name}.yaml"
    assert parse(ti.main, ["--config", str(path), "--output_dir", str(tmp_path)]).num_vectors == 1
