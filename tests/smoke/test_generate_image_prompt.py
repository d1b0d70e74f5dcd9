"""infer.generate with pictures to follow, on a small random pipeline, adapter and encoder: flags, rows and mistakes."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import jaxmix
from infer.flags import Config
from infer.generate import main
from infer.png import read_settings
from jaxmix.command import run
from jaxmix.models import CLIPVisionConfig, CLIPVisionModel
from jaxmix.testing import random_params
from jaxmix.weights import save_tree, write_config
from tests.jobs import only
from tests.methods.test_ip_adapter import VISION, tensors


@pytest.fixture(scope="module")
def files(one_level, tmp_path_factory):
    """Return a folder with the pipeline ("model"), an image encoder ("clip"), an adapter and two pictures."""
    path = tmp_path_factory.mktemp("image_prompt")
    one_level.save(path / "model")
    encoder = CLIPVisionModel(CLIPVisionConfig.from_dict(VISION))
    params = random_params(encoder.abstract_params(), 0)
    save_tree(params, path / "clip" / "model.safetensors")
    write_config(encoder.config.to_dict(), path / "clip" / "config.json")
    adapter = jaxmix.IPAdapter.init(jax.random.key(1), one_level, jaxmix.ImageEncoder(encoder, params))
    save_file(tensors(one_level, adapter), path / "ip.safetensors")
    for i in range(2):
        picture = np.random.default_rng(i).integers(0, 256, (300, 200, 3), np.uint8)
        Image.fromarray(picture).save(path / f"{i}.png")
    Image.new("L", (16, 16), 0).save(path / "nowhere.png")
    return path


def flags(files, out, **more):
    adapter = {"ip_adapter": f"{files / 'ip.safetensors'}:0.9", "image_encoder": str(files / "clip")}
    common = {"model": str(files / "model"), "out": str(out), "steps": 2, "devices": 1, "guidance_scale": 3.0}
    return Config(**{**common, **adapter, **more})


def drawn(files, out, rows, **more):
    """Draw rows and return their pictures (n, H, W, 3) int; all have one prompt and one seed."""
    path = out.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"prompt": "a cat", "seed": 0, **row}) + "\n" for row in rows))
    assert main(flags(files, out, prompts=str(path), **more)) == 0
    names = [f"{i:04d}_seed0.png" for i in range(len(rows))]
    return np.stack([np.asarray(Image.open(only(out, name))).astype(int) for name in names])


def test_rows_follow_their_pictures_and_scale_0_is_the_model_itself(files, tmp_path):
    one, two = str(files / "0.png"), str(files / "1.png")
    rows = [{}, {"ip_image": one}, {"ip_image": [two]}, {"ip_image": one, "ip_scale": 0}]
    rows += [{"ip_image": one, "ip_mask": str(files / "nowhere.png")}, {"ip_image": one, "prompt": ""}]
    found = drawn(files, tmp_path / "a", rows)
    np.testing.assert_array_equal(found[3], found[0])
    np.testing.assert_array_equal(found[4], found[0])  # a mask that shows the picture nowhere
    changed = [found[i] for i in (0, 1, 2, 5)]
    assert all(np.abs(a - b).max() > 0 for i, a in enumerate(changed) for b in changed[:i])
    settings = read_settings(only(tmp_path / "a", "0001_seed0.png"))
    assert settings["ip_image"] == [one] and settings["ip_adapter"] == [f"{files / 'ip.safetensors'}:0.9"]
    with Image.open(only(tmp_path / "a", "0001_seed0_follows0.png")) as reference:
        assert reference.size == (128, 192)
    assert "follows0.png" in (tmp_path / "a" / "gallery.html").read_text()


def test_a_flag_is_enough_without_a_prompt(files, tmp_path):
    for prompt in ("", None):
        config = flags(files, tmp_path / str(prompt), prompt=prompt, ip_image=[str(files / "0.png")])
        assert main(config) == 0 and len(list((tmp_path / str(prompt)).glob("0000_seed0*.png"))) == 2


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
            ["--ip-adapter", "ip.safetensors", "--image-encoder", "model/unet", "--ip-image", "0.png"],
            "_class_name is 'UNet",
        ),
        (["--ip-adapter", "0.png", "--image-encoder", "clip", "--ip-image", "0.png"], "0.png: not a safetensors file"),
        (["--ip-image", "nowhere"], "--ip-image: no such file: nowhere"),
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
