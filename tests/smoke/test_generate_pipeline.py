"""infer.generate with a small random pipeline from a folder: from the command line to the pixels."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from infer.flags import Config
from infer.generate import main
from infer.png import read_settings
from jaxmix.command import run
from jaxmix.pipeline.job import denoise
from jaxmix.pipeline.loading import ASSETS
from tests.jobs import only

QUICK = ["--steps", "1", "--devices", "1"]


@pytest.fixture(scope="module")
def folder(tiny_pipeline, tmp_path_factory):
    """Return the tiny pipeline as a diffusers folder."""
    path = tmp_path_factory.mktemp("tiny")
    dataclasses.replace(tiny_pipeline, tokenizer=ASSETS / "mini" / "tokenizer").save(path)
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_row_in_a_batch_is_the_image_it_is_alone(folder, tiny_pipeline, tmp_path, devices):
    rows = [
        {"prompt": "a cat", "guidance_scale": 1.0},
        {"prompt": "a dog", "seed": 9, "negative_prompt": "snow"},
        {"prompt": "a fish", "seed": 9},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    shared = {"model": str(folder), "steps": 2, "batch_size": 2, "guidance_scale": 300.0, "devices": devices}
    assert main(Config(**shared, prompts=file, out=str(out))) == 0
    arguments = {"seeds": [9], "steps": 2, "guidance_scale": 300.0, "negative_prompts": ["snow"]}
    alone = tiny_pipeline.generate(["a dog"], **arguments)[0]
    drawn = [np.asarray(Image.open(only(out, name))).astype(int) for name in ("0001_seed9.png", "0002_seed9.png")]
    assert np.abs(drawn[0] - alone).max() <= 1
    assert np.abs(drawn[1] - alone).max() > 1


def test_other_prompts_seeds_and_scales_compile_nothing_new(folder, tmp_path):
    settings = {"model": str(folder), "batch_size": 3, "steps": 2, "devices": 1}
    first = write_rows(tmp_path / "a.jsonl", [{"prompt": "a cat"}] * 5)
    before = denoise._cache_size()
    assert main(Config(**settings, prompts=first, out=str(tmp_path / "a"))) == 0
    compiled = denoise._cache_size()
    assert compiled == before + 1  # for two batches, one of them short
    rows = [{"prompt": f"a {k}", "seed": 50 + k, "guidance_scale": k, "negative_prompt": "x"} for k in range(5)]
    second = write_rows(tmp_path / "b.jsonl", rows)
    assert main(Config(**settings, prompts=second, out=str(tmp_path / "b"))) == 0
    assert denoise._cache_size() == compiled


@pytest.mark.parametrize("mode", ["text", "image", "mask", "tiles"])
def test_the_command_draws_at_another_size_from_pictures_and_in_tiles(folder, tmp_path, mode):
    picture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "start.png")
    mask = np.zeros((12, 20), np.uint8)
    mask[:, 10:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    settings = {"height": 12, "width": 20, "sampler": "dpmpp_2m_karras", "guidance_rescale": 0.5}
    if mode in ("image", "mask"):
        settings |= {"image": str(tmp_path / "start.png"), "strength": 0.5}
    if mode == "mask":
        settings |= {"mask": str(tmp_path / "mask.png")}
    if mode == "tiles":
        settings |= {"tile": 8}
    config = Config(model=str(folder), prompt="a cat", steps=4, devices=1, out=str(tmp_path / "out"), **settings)
    assert main(config) == 0
    drawn = np.asarray(Image.open(only(tmp_path / "out", "0000_seed0.png")))
    assert drawn.shape == (12, 20, 3) and drawn.std() > 1


def test_the_command_draws_long_weighted_prompts_with_learnt_words(folder, tmp_path, capsys):
    save_file({"emb_params": np.full((2, 16), 0.1, np.float32)}, tmp_path / "bad-thing.safetensors")
    words = " ".join(["apple"] * 40) + ", (bad-thing:1.3)"
    flags = ["--model", str(folder), "--prompt", words, "--embedding", str(tmp_path / "bad-thing.safetensors"), *QUICK]
    with pytest.raises(SystemExit) as end:
        run(main, [*flags, "--clip-skip", "1", "--out", str(tmp_path / "out")])
    assert end.value.code == 0 and not [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
    told = read_settings(only(tmp_path / "out", "0000_seed0.png"))
    assert (told["chunks"], told["clip_skip"], told["prompt_syntax"]) == (2, 1, "a1111")
    with pytest.raises(SystemExit):
        run(main, [*flags, "--max-chunks", "1", "--out", str(tmp_path / "short")])
    assert "--prompt: prompt: found 2 chunks of tokens, expected at most 1" in capsys.readouterr().err


def truncate(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def unknown_block(folder):
    path = folder / "unet" / "config.json"
    path.write_text(path.read_text().replace("CrossAttnDownBlock2D", "TwistedDownBlock2D"))


@pytest.mark.parametrize(
    ("damage", "found"), [(shutil.rmtree, "no such folder"), (truncate, "safetensors"), (unknown_block, "TwistedDown")]
)
def test_a_model_that_cannot_be_opened_is_one_line_and_status_2(folder, tmp_path, capsys, damage, found):
    model = shutil.copytree(folder, tmp_path / "model")
    damage(model)
    with pytest.raises(SystemExit) as end:
        run(main, ["--model", str(model), "--prompt", "a cat", "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("compile cache")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and found in lines[0]
    assert not (tmp_path / "out").exists()
