"""infer.generate with pictures to follow, on a small random pipeline, adapter and encoder: flags, rows and mistakes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import jaxmix
from infer.flags import Config
from infer.generate import main
from infer.methods.image_prompt import ImagePrompt
from infer.methods.method import BatchRows
from infer.png import read_settings
from infer.rows import Defaults, rows_of_objects
from jaxmix.command import run
from jaxmix.models import CLIPVisionConfig, CLIPVisionModel
from jaxmix.testing import random_params
from jaxmix.types import InputError
from jaxmix.weights import save_tree, write_config
from tests.jobs import only
from tests.methods.test_ip_adapter import VISION, random_adapter, tensors

SEEN = ["--ip-adapter", "ip.safetensors", "--image-embeds"]


@pytest.fixture(scope="module", autouse=True)
def loaded(one_level):
    """Let jobs have the pipeline without reading it: how models are read is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxmix, "load", lambda *_, **__: one_level)
        yield


@pytest.fixture(scope="module")
def files(one_level, tmp_path_factory):
    """Return a folder with an image encoder ("clip"), an adapter, two pictures, and what is seen in the first."""
    path = tmp_path_factory.mktemp("image_prompt")
    write_config(one_level.unet.config.to_dict(), path / "unet" / "config.json")
    save_file({"conv_in.bias": np.zeros(16, "f4")}, path / "unet" / "model.safetensors")
    model = CLIPVisionModel(CLIPVisionConfig.from_dict(VISION))
    encoder, other = (jaxmix.ImageEncoder(model, random_params(model.abstract_params(), seed)) for seed in range(2))
    save_tree(encoder.params, path / "clip" / "model.safetensors")
    write_config(model.config.to_dict(), path / "clip" / "config.json")
    adapter = random_adapter(one_level, encoder)
    save_file(tensors(one_level, adapter), path / "ip.safetensors")
    style = jaxmix.StyleAdapter.init(jax.random.key(0), one_level, encoder, blocks=1)
    layers = {name: {**layer, "strength": jnp.asarray(5.0)} for name, layer in style.layers.items()}
    dataclasses.replace(style, layers=layers).save(path / "style.safetensors")
    for i in range(2):
        picture = np.random.default_rng(i).integers(0, 256, (300, 200, 3), np.uint8)
        Image.fromarray(picture).save(path / f"{i}.png")
    Image.new("L", (16, 16), 0).save(path / "nowhere.png")
    for name, one in (("seen", encoder), ("others", other)):
        jaxmix.EmbeddingFolder(path / name, one).add([path / "0.png"], [adapter.takes])
    return path


def flags(files, out, **more):
    adapter = {"ip_adapter": f"{files / 'ip.safetensors'}:0.9", "image_encoder": str(files / "clip")}
    common = {"model": "model", "out": str(out), "steps": 2, "devices": 1, "guidance_scale": 3.0}
    return Config(**{**common, **adapter, **more})


def drawn(files, out, rows, **more):
    """Draw rows and return their pictures (n, H, W, 3) int; all have one prompt and one seed."""
    path = out.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"prompt": "a cat", "seed": 0, **row}) + "\n" for row in rows))
    assert main(flags(files, out, prompts=str(path), **more)) == 0
    names = [f"{i:04d}_seed0.png" for i in range(len(rows))]
    return np.stack([np.asarray(Image.open(only(out, name))).astype(int) for name in names])


@pytest.fixture(scope="module")
def followed(files, tmp_path_factory):
    """Return rows that one program draws, their pictures, and the folder of results."""
    one, two = str(files / "0.png"), str(files / "1.png")
    rows = [{"ip_image": one}, {"ip_image": [two]}, {"ip_image": one, "ip_scale": 0}, {"ip_image": one, "prompt": ""}]
    out = tmp_path_factory.mktemp("followed") / "a"
    return rows, drawn(files, out, rows), out


def test_rows_follow_their_pictures_and_scale_0_is_the_model_itself(files, followed, tmp_path):
    _, found, out = followed
    nowhere = {"ip_image": str(files / "0.png"), "ip_mask": str(files / "nowhere.png")}  # a mask that is all black
    more = drawn(files, tmp_path / "b", [{}] * 4 + [nowhere] * 4)  # as many as share programs with the others
    assert all(np.array_equal(found[2], x) for x in more)
    assert all(np.abs(a - b).max() > 0 for i, a in enumerate(found) for b in found[:i])
    settings = read_settings(only(out, "0000_seed0.png"))
    assert settings["ip_image"] == [str(files / "0.png")]
    assert settings["ip_adapter"] == [f"{files / 'ip.safetensors'}:0.9"]
    with Image.open(only(out, "0000_seed0_follows0.png")) as reference:
        assert reference.size == (128, 192)
    assert "follows0.png" in (out / "gallery.html").read_text()


def test_what_is_seen_is_kept_and_then_needs_no_encoder(files, followed, tmp_path, capsys):
    rows, expected, _ = followed
    kept = tmp_path / "kept"
    np.testing.assert_array_equal(drawn(files, tmp_path / "a", rows, image_embeds=str(kept)), expected)
    assert "encode: 2/2 pictures" in capsys.readouterr().err and len(list(kept.iterdir())) == 3  # and of no picture
    again = drawn(files, tmp_path / "b", rows, image_embeds=str(kept), image_encoder=None)
    np.testing.assert_array_equal(again, expected)
    assert "encode:" not in capsys.readouterr().err


def test_rows_say_in_which_steps_their_pictures_are_seen(files, one_level, tmp_path):
    one = {"prompt": "a cat", "ip_image": str(files / "0.png")}
    windows = ["0,0.5", [0, 0.5], "[0, 0.5]", None, (0.5, 1)]
    method = ImagePrompt(flags(files, tmp_path / "a", ip_window="0.25,1"))
    method.open(one_level)
    rows, bad = rows_of_objects([("a row", one | {"ip_window": x}) for x in windows], Defaults(steps=4), method.fields)
    assert not bad
    looks = [method.build(one_level, BatchRows([method.complete(row, one_level)], draft=True))[0] for row in rows]
    assert [look.window for look in looks] == [(0, 0.5)] * 3 + [(0.25, 1), (0.5, 1)]
    assert len({method.program_key([row]) for row in rows}) == 3
    assert method.fields["ip_window"].stored(rows[0]["ip_window"]) == [0, 0.5]
    with pytest.raises(InputError, match="several numbers of pictures, blocks or windows in one group"):
        method.program_key(rows)
    assert method.plan(rows[3]) == "ip-adapter ip.safetensors:0.9 from 0.25 to 1 of the steps"
    (short,), _ = rows_of_objects([("a row", one | {"ip_window": [0, 0.1]})], Defaults(steps=4), method.fields)
    with pytest.raises(InputError, match=r"^ip_window: found 0 to 0\.1, none of 4 steps, expected at least one$"):
        method.complete(short, one_level)
    for wrong in ("0.5,0.2", "0.5", "half", "0,1,1", "-1,1", "0,nan", "0,true", 7, [0, "x"], {"a": 1}):
        _, (row,) = rows_of_objects([("a row", one | {"ip_window": wrong})], Defaults(), method.fields)
        assert row.reason.endswith("expected two numbers START,END with 0 <= START < END <= 1")


@pytest.mark.parametrize("prompt", ["", None])
def test_a_flag_is_enough_without_a_prompt(files, tmp_path, prompt):
    config = flags(files, tmp_path / "a", prompt=prompt, ip_image=[str(files / "0.png")], num_images=4)
    assert main(config) == 0 and len(list((tmp_path / "a").glob("000?_seed?*.png"))) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ip-image", "0.png"], "ip_image: found 0.png without an --ip-adapter"),
        (
            ["--ip-adapter", "ip.safetensors", "--ip-image", "0.png"],
            "holds no image encoder, expected an image encoder",
        ),
        (["--ip-adapter", "nowhere", "--ip-image", "0.png"], "--ip-adapter: nowhere: no such file"),
        (["--image-encoder", "clip"], "--image-encoder: found it without an --ip-adapter"),
        (
            ["--ip-adapter", "ip.safetensors", "--image-encoder", "unet", "--ip-image", "0.png"],
            "_class_name is 'UNet",
        ),
        (["--ip-adapter", "0.png", "--image-encoder", "clip", "--ip-image", "0.png"], "0.png: not a safetensors file"),
        (["--image-embeds", "seen"], "--image-embeds: found it without an --ip-adapter"),
        (
            [*SEEN, "nowhere", "--ip-image", "0.png"],
            "--image-embeds: nowhere: no such folder, expected it, or an --image",
        ),
        ([*SEEN, "gs://x", "--ip-image", "0.png"], "--image-embeds: found 'gs://x', expected a local folder"),
        ([*SEEN, "clip", "--ip-image", "0.png"], "--image-embeds: clip: found no none.safetensors"),
        ([*SEEN, "seen", "--ip-image", "1.png"], "1.png: found no 'projected' of it in seen"),
        (
            [*SEEN, "others", "--image-encoder", "clip", "--ip-image", "0.png"],
            "others/none.safetensors: made by another image encoder: weights: found",
        ),
        (["--ip-window", "0.5,0.2"], "--ip-window: found '0.5,0.2', expected two numbers START,END"),
        (["--ip-window", "0,0.5"], "--ip-window: found '0,0.5' without 'ip_image' in any row"),
        (["--ip-image", "nowhere"], "--ip-image: no such file: nowhere"),
        (
            ["--ip-adapter", "ip.safetensors", "--image-encoder", "clip", "--ip-image", "0.png"]
            + ["--ip-subtract", "a cat"],
            "subtract: found 'a cat', but no text encoder of 12 channels",
        ),
        (["--ip-subtract", "a cat"], "--ip-subtract: found 'a cat' without 'ip_image' in any row"),
        (["--style-images", "0.png"], "style_images: found 0.png without a --style-adapter"),
        (["--style-adapter", "gone"], "gone: no such file or folder, expected a StyleAdapter"),
        (
            ["--ip-adapter", "mini-style", "--ip-image", "0.png"],
            "mini-style: it is for --style-adapter, expected an IP",
        ),
        (["--style-adapter", "ip.safetensors", "--style-images", "0.png"], "this is an IP-Adapter"),
        (["--ip-adapter", "style.safetensors", "--ip-image", "0.png"], "this is a StyleAdapter"),
        (["--style-adapter", "style.safetensors", "--style-images", "0.png"], "holds no image encoder, expected"),
        (["--layers", "nowhere: a dog"], "'nowhere' names none of"),
        (["--layers", "a dog"], "--layers: found 'a dog', expected"),
        (["--layers", "{}"], "--layers: found none, expected prompts by layer"),
        (
            ["--ip-adapter", "ip.safetensors", "--image-encoder", "clip", "--ip-image", "0.png", "--ip-blocks", "x"],
            "blocks: 'x' names none of",
        ),
        (
            ["--ip-adapter", "ip.safetensors", "--image-encoder", "clip", "--ip-image", '["0.png", "1.png"]']
            + ["--ip-mask", "0.png"],
            "ip_mask: found 1, expected one for each of 2 pictures",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(files, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as end:
        run(main, ["--model", "model", "--prompt", "a cat", "--steps", "2", "--out", str(tmp_path / "x"), *words])
    text = capsys.readouterr().err
    assert end.value.code == 2 and said in text and "Traceback" not in text


def test_rows_take_the_style_of_pictures_and_layers_have_prompts_of_their_own(files, tmp_path):
    one, two = str(files / "0.png"), str(files / "1.png")
    rows = [{"style_images": [one, two]}, {"style_images": one}, {"style_images": one, "style_scale": 0}]
    rows += [{}, {"layers": {"up_blocks": "a dog"}}, {"layers": "attn2: a cat"}]
    styled = {"style_adapter": f"{files / 'style.safetensors'}:0.8", "ip_adapter": None}
    found = drawn(files, tmp_path / "a", rows, **styled)
    assert all(np.abs(found[a] - found[b]).max() > 0 for a, b in ((0, 1), (0, 3), (1, 3), (4, 3)))
    np.testing.assert_array_equal(found[2], found[3])
    np.testing.assert_array_equal(found[5], found[3])  # the row's own prompt
    out = tmp_path / "a"
    settings = read_settings(only(out, "0000_seed0.png"))
    assert settings["style_images"] == [one, two] and settings["style_adapter"].endswith("style.safetensors:0.8")
    assert read_settings(only(out, "0004_seed0.png"))["layers"] == {"up_blocks": "a dog"}
    page = (out / "gallery.html").read_text()
    assert only(out, "0000_seed0_style1.png").name in page and "up_blocks: a dog" in page
