"""The trainer of B-LoRAs on a tiny base: two blocks alone, halves that the file names, refusals."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import jaxmix
from jaxmix import InputError
from jaxmix.command import parse
from jaxmix.testing import tiny_pipeline
from scripts.bench.train_memory import Config as Memory
from scripts.bench.train_memory import count, trainer_config
from scripts.bench.train_shapes import abstract_pipeline, b_lora_pieces
from tests.data.made import encoded, picture
from tests.jobs import TWO_STEPS
from train import b_lora
from train.low_rank import FILE, KOHYA_FILE

CONFIGS = Path(__file__).parents[2] / "configs"
BLOCKS = {"style_blocks": r"^up_blocks\.0\.attentions\.1\.", "content_blocks": "^mid_block"}


@pytest.fixture(scope="module")
def base(one_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    one_level.save(folder)
    return str(folder)


def shrunk(base, folder, **changes):
    """Return the committed config at the size of the tiny base."""
    cfg = parse(b_lora.main, ["--config", str(CONFIGS / "b_lora_mini.yaml"), "--output_dir", str(folder)])
    small = {
        "pretrained_model_name_or_path": base,
        "scenes": {**cfg.scenes, "size": 16, "objects": 4},
        **BLOCKS,
        "rank": 2,
        **TWO_STEPS,
        "validation_steps": 0,
        "validation_prompts": cfg.validation_prompts[:1],
        "validation_guidance_scale": 1.0,
        "validation_batch_size": 1,
    }
    return dataclasses.replace(cfg, **{**small, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """Return a folder with a run of two steps; that a stopped run ends in the same file is tested of `train.lora`."""
    root = tmp_path_factory.mktemp("runs")
    assert b_lora.main(shrunk(base, root / "whole", validation_steps=2)) == 0
    return root


def test_two_blocks_learn_and_the_file_names_them(runs, one_level):
    for name in (FILE, KOHYA_FILE):
        made = jaxmix.LoRA.load(runs / "whole" / name, one_level)
        assert made.blocks == {"style": BLOCKS["style_blocks"], "content": BLOCKS["content_blocks"]}
        halves = {key: set(made.only(key).parts["unet"]) for key in ("style", "content")}
        assert all(len(half) == 8 for half in halves.values())  # one layer, two attentions, four projections
        assert halves["style"] | halves["content"] == set(made.parts["unet"])
        assert all(name.startswith("mid_block") for name in halves["content"])
        assert all(np.asarray(f["up"]).any() for f in made.parts["unet"].values())
    assert len(list((runs / "whole" / "pictures").iterdir())) == 1


def test_a_resume_with_other_blocks_is_refused(runs, base):
    with pytest.raises(InputError, match=r"trained with another style_blocks: found '.up_blocks") as e:
        b_lora.main(shrunk(base, runs / "whole", style_blocks=r"up_blocks\.0\.attentions\.0"))
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_the_recipe_for_sdxl_changes_160_layers_of_the_papers_two_blocks():
    cfg = trainer_config(Memory(trainer="b_lora", model="sdxl"))
    pipe = abstract_pipeline("sdxl", cfg.dtype)
    made = b_lora_pieces(pipe, cfg, 1, 128, cached=False, tiny=False)
    (modules,) = made.learns.values()
    assert len(modules) == 160 and {name[:24] for name in modules} == {f"up_blocks.0.attentions.{i}" for i in range(2)}
    # Rank 64 beside squares of 1280, and beside the keys and values of the text, which is 2048 wide.
    assert count(made.learns) == 20 * 64 * (6 * 2 * 1280 + 2 * (2048 + 1280))


def test_one_picture_is_a_file_or_a_folder(one_level, base, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "one.png", tmp_path / "folder" / "one.png"):
        path.write_bytes(encoded(picture(0, (16, 16))))
    seen = []
    for given in (tmp_path / "one.png", tmp_path / "folder"):
        cfg = shrunk(base, tmp_path, scenes={}, scene_object="", resolution=16, instance_data_dir=str(given))
        stream = b_lora.open_instances(cfg, one_level, "a [v]").in_batches(2, 0)
        assert {stream[i]["id"] for i in range(4)} == {"one.png"}
        seen.append(stream[0]["image"])
    np.testing.assert_array_equal(*seen)
    # A broken one is named; there is no other to take its place.
    (tmp_path / "one.png").write_bytes(b"no picture")
    cfg = dataclasses.replace(cfg, instance_data_dir="", train_data_dir=str(tmp_path / "one.png"))
    with pytest.raises(InputError, match=r"one\.png") as e:
        b_lora.open_instances(cfg, one_level, "a [v]").in_batches(2, 0)[0]
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"style_blocks": "up_blocks.7"}, "style_blocks: 'up_blocks.7' matches none of the 32 modules; near misses: "),
        ({"content_blocks": "up_blocks"}, "style_blocks, content_blocks: both find up_blocks.0.attentions.1."),
        ({"content_blocks": "("}, "content_blocks: '(' is not a regular expression"),
        ({"lora_targets": "attn3"}, "lora_targets: 'attn3' matches none of the"),
        ({"rank": 17}, "rank: found 17 for mid_block."),
        ({"rank": None}, "rank: found null"),
        ({"train_text_encoder": True}, "train_text_encoder: found it with two blocks of the UNet"),
        ({"conv_rank": 2}, "conv_rank: found it with two blocks of the UNet"),
        ({"instance_prompt": " "}, "instance_prompt: not given"),
        ({"scene_object": "dodo"}, "scene_object: found 'dodo', expected one of "),
        ({"scenes": {}}, "train_data_dir, scenes: found neither"),
        ({"scenes": {}, "train_data_dir": "x"}, "scene_object: found it without scenes"),
        ({"scenes": {}, "scene_object": "", "train_data_dir": "no.png"}, "no.png: no such file, expected a picture"),
        ({"pretrained_model_name_or_path": "no/such"}, "no/such"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, base, changes, words):
    with pytest.raises(InputError) as e:
        b_lora.main(shrunk(base, tmp_path, **changes))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_lora_file_or_another_family_as_the_base_is_one_line(runs, tmp_path, base):
    """The base of the config is a LoRA's file; and an SDXL base has no scenes."""
    tiny_pipeline("sdxl").save(tmp_path / "sdxl")
    for given, words in ((runs / "whole" / FILE, FILE), (tmp_path / "sdxl", "scenes: found an SDXL base")):
        with pytest.raises(InputError) as e:
            b_lora.main(
                shrunk(base, tmp_path, pretrained_model_name_or_path=str(given), style_blocks="", content_blocks="")
            )
        assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["b_lora_mini", "b_lora_sd15", "b_lora_sdxl"])
def test_configs_are_read(name, tmp_path):
    cfg = parse(b_lora.main, ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", str(tmp_path)])
    assert cfg.ranks().rank == cfg.rank
