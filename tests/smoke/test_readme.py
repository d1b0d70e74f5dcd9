"""Every block of the README runs as it is written, with the files that it names in the folder where it runs.

Blocks marked sh, which install and test, are what CI itself runs. Of training, which takes hours, the command line and
its config are read; tests/smoke/test_train_*.py run the trainers.
"""

import dataclasses
import importlib
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmix import command
from jaxmix.models import CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig
from jaxmix.testing import TINY_TEXT, TINY_UNET, random_params

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.S | re.M)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if line]


def as_told_by_a_file(pipe):
    """Return a tiny pipeline of the heads, norms and vocabulary that a single file is taken to have."""
    whole = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    unet = UNet2DConditionModel(UNetConfig.from_dict(TINY_UNET | {"attention_head_dim": 8, "norm_num_groups": 16}))
    text = CLIPTextModel(CLIPTextConfig.from_dict(TINY_TEXT | whole | {"num_attention_heads": 1}))
    own = random_params({"unet": unet.abstract_params(), "text_encoder": text.abstract_params()})
    return dataclasses.replace(pipe, unet=unet, text_encoder=text, params={**pipe.params, **own})


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_pipeline):
    """Return a folder with what the README takes for there."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "jaxmix", "train"):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for name in ("car.png", "photos/a.png", "paintings/b.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / name)
    (folder / "rows.jsonl").write_text('{"prompt": "a cat", "seed": 3}\n{"prompt": "a (dog:1.2)", "steps": 5}\n')
    tiny_pipeline.save(folder / "stable-diffusion-v1-5")
    as_told_by_a_file(tiny_pipeline).save(folder / "anyCommunityModel.safetensors")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def test_blocks_are_of_known_kinds():
    assert {kind for kind, _ in BLOCKS} == {"sh", "python", "bash"} and len(BLOCKS) > 8


def test_python_runs_from_the_first_block_to_the_last(place):
    names = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), names)
    assert [np.shape(names[name]) for name in ("images", "drawn")] == [(1, 128, 128, 3), (1, 64, 64, 3)]
    assert (place / "cat.png").is_file() and (place / "converted" / "model_index.json").is_file()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:60])
def test_commands_run(place, line):
    python, _, module, *arguments = shlex.split(line)
    assert python == "python"
    main = importlib.import_module(module).main
    if module.startswith("train."):
        assert command.parse(main, arguments).max_train_steps > 1
        return
    with pytest.raises(SystemExit) as ended:
        command.run(main, arguments)
    assert ended.value.code == 0
    out = place / arguments[arguments.index("--out") + 1]
    assert any(out.glob("0*.png")) and (out / "gallery.html").is_file()
