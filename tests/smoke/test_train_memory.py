"""scripts.bench.train_memory: counts and bytes of the trainer's own step, on the real shapes and on shrunk models."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmix.types import InputError
from scripts.bench.train_memory import (
    GIB,
    Config,
    checks,
    count,
    make_step,
    size,
    trainer_config,
)
from scripts.bench.train_shapes import abstract_pipeline, controlnet_pieces, ip_adapter_pieces, vmix_pieces

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"platform": "cpu", "tiny": True, "rank": 2, "mixed_precision": "no", "lora_targets": r"attn2\.to_q$"}


@pytest.mark.parametrize(("model", "width"), [("sd15", 768), ("sd21", 1024)])
def test_the_adapter_of_a_real_model_has_the_sizes_of_the_paper(model, width):
    """F: 6 -> 77 tokens and a norm of the text's width; Z: width -> width; W_V^a: one of each attn2's to_v."""
    cfg = trainer_config(Config(model=model))
    pipe = abstract_pipeline(model, cfg.dtype)
    made = vmix_pieces(pipe, cfg, 1, 64, cached=False, tiny=False)
    found = {name: count(tree) for name, tree in made.parts.items()}
    assert found["F and its norm"] == 6 * 77 + 77 + 2 * width
    assert found["Z"] == width * width + width
    values = 5 * 320 + 5 * 640 + 6 * 1280  # SD 1 and 2 have 16 attn2: two in each way down, three up, one between
    assert found["W_V^a"] == width * values
    assert sum(found.values()) == count(made.learns) and made.frozen["aes_emb"].shape == (6, 2, width)
    assert count(pipe.params["unet"]) == {"sd15": 859_520_964, "sd21": 865_910_724}[model]
    assert count(pipe.params["text_encoder"]) == {"sd15": 123_060_480, "sd21": 340_387_840}[model]


@pytest.mark.parametrize(
    ("model", "kind", "projection", "layers"),
    [
        ("sd15", "base", 3_150_336, 19_169_280),
        ("sd15", "plus", 29_918_208, 19_169_280),
        ("sd15", "full", 2_625_024, 19_169_280),
        ("sdxl", "plus", 82_961_664, 340_787_200),
    ],
)
def test_an_ip_adapter_of_a_real_model_has_the_sizes_of_the_published_ones(model, kind, projection, layers):
    cfg = trainer_config(Config(trainer="ip_adapter", model=model, kind=kind))
    made = ip_adapter_pieces(abstract_pipeline(model, cfg.dtype), cfg, 1, 64, cached=True, tiny=False)
    assert {name: count(tree) for name, tree in made.parts.items()} == {
        "projection": projection,
        "keys and values": layers,
    }
    assert set(made.frozen) == (set() if kind == "base" else {"grey"})  # a cache has read the pictures


@pytest.mark.parametrize(("model", "expected"), [("sd15", 361_279_120), ("sdxl", 1_251_014_160)])
def test_a_controlnet_of_a_real_model_has_the_size_of_the_published_ones(model, expected):
    cfg = trainer_config(Config(trainer="controlnet", model=model))
    made = controlnet_pieces(abstract_pipeline(model, cfg.dtype), cfg, 1, 64, cached=True, tiny=False)
    assert count(made.learns) == sum(map(count, made.parts.values())) == expected
    assert made.batch["hint"].shape == (1, 512, 512, 3)


@pytest.mark.parametrize(
    ("trainer", "told", "expected"),
    [
        ("lora", {"rank": 4}, {"unet": 797_184, "text_encoder": 294_912}),  # as diffusers' scripts print them
        ("dreambooth", {}, {"unet": 859_520_964}),
        ("dreambooth", {"rank": 4}, {"unet": 797_184}),
        ("textual_inversion", {}, {"text_encoder": 768}),
    ],
)
def test_trainers_of_a_subject_learn_what_they_should_of_a_real_model(trainer, told, expected):
    config = Config(trainer=trainer, model="sd15", mixed_precision="bf16", **told)
    step = make_step(config, trainer_config(config))
    assert {name: count(tree) for name, tree in step.parts.items()} == expected
    assert count(step.state.params) == sum(expected.values())
    assert ("unet" in step.frozen) == ("rank" in told or trainer in ("lora", "textual_inversion"))
    assert {leaf.dtype for leaf in jax.tree.leaves(step.state.params)} == {np.dtype("float32")}


def test_the_state_of_a_real_step_is_the_adapters_alone_and_the_base_is_there_once():
    config = Config(model="sd15")
    step = make_step(config, trainer_config(config))
    adapter = count(step.state.params)
    assert 0 <= count(step.state) - 4 * adapter < 16
    base = abstract_pipeline("sd15", "bfloat16").params
    assert size(step.frozen) + size(step.spare) == 2 * count(base) + 4 * 6 * 2 * 768
    assert size(step.frozen) < 2 * GIB


def test_a_cached_step_takes_no_encoder():
    config = Config(model="sdxl", cached=True, **SMALL)
    step = make_step(config, trainer_config(config))
    assert set(step.frozen) == {"unet", "aes_emb", "empty"}
    assert {"latents_mean", "latents_std", "context", "pooled", "time_ids"} <= set(step.batch)


def test_a_check_fails_where_something_is_held_twice():
    found = {f"{name}_bytes": 100 for name in ("frozen", "state", "batch", "alias")}
    found |= {"argument_bytes": 301, "parameters": {"Z": 10}, "state_values": 42, "averaged": True, "fsdp": 1}
    assert all(checks(found).values())
    assert all(checks(found | {"fsdp": 4, "argument_bytes": 320}).values())  # padding of split weights
    assert not all(checks(found | {"fsdp": 4, "argument_bytes": 401}).values())
    assert not all(checks(found | {"argument_bytes": 401}).values())
    assert not all(checks(found | {"alias_bytes": 0}).values())
    assert not all(checks(found | {"state_values": 142}).values())


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"platform": "tpu", "steps": 2}, "expected platform cpu to run"),
        ({"platform": "cpu", "fsdp": 2}, "expected 1 on the one device"),
        ({"per_device_batch": 0}, "per_device_batch: found 0"),
    ],
)
def test_numbers_that_no_run_has_are_refused(keys, says):
    with pytest.raises(InputError, match=says):
        Config(**keys)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.yaml: no such file"):
        trainer_config(Config(recipe=str(tmp_path / "gone.yaml")))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_recipes_say_what_the_paper_says(name):
    cfg = trainer_config(Config(model=name))
    assert cfg.learning_rate == {"sd15": 1e-4, "sdxl": 1e-5}[name]
    assert cfg.max_train_steps == 50_000 and len(cfg.labels) == 6
    assert cfg.mixed_precision == "bf16" and cfg.gradient_checkpointing
    # What the command line of this script replaces, as it stands in the file.
    assert "train_batch_size: 256\n" in (ROOT / "configs" / f"vmix_{name}.yaml").read_text()


def test_a_shrunk_step_runs_and_holds_everything_once(tmp_path):
    out = tmp_path / "memory.json"
    keys = {**SMALL, "model": "sdxl", "cached": True, "latents": 8, "steps": 2, "out": str(out)}
    flags = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in keys.items()]
    command = [sys.executable, "-m", "scripts.bench.train_memory", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(out.read_text())
    assert all(found["checks"].values()) and len(found["step_s"]) == 2 and found["flops"] > 0
    assert abs(found["losses"][0]) < 1e6 and found["peak_rss_bytes"] > found["argument_bytes"] > 0
    assert dataclasses.asdict(Config(**keys)) == found["config"]
