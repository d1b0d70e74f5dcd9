"""infer.generate with a VMix adapter and LoRAs, on a small random pipeline: flags, rows, settings and mistakes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmix
from infer.flags import Config
from infer.generate import main
from infer.methods.lora import check_loras
from infer.png import read_settings
from jaxmix.command import run
from jaxmix.pipeline.job import denoise
from jaxmix.pipeline.loading import ASSETS
from jaxmix.testing import moved
from jaxmix.tuning import lora
from jaxmix.types import InputError
from tests.jobs import only

LABELS = {"color": ("vivid colors", "[V]"), "light": ("bright", "[S]")}
NAME = "0000_seed0.png"


@pytest.fixture(scope="module")
def files(tiny_pipeline, tmp_path_factory):
    """Return a folder with the pipeline ("model"), an adapter as if trained ("vmix.safetensors") and a LoRA."""
    path = tmp_path_factory.mktemp("adapters")
    dataclasses.replace(tiny_pipeline, tokenizer=ASSETS / "mini" / "tokenizer").save(path / "model")
    fresh = jaxmix.VMix.init(jax.random.key(0), tiny_pipeline, LABELS)
    factors = lora.init(jax.random.key(1), tiny_pipeline.params["unet"], r"attn1\.to_q$|conv1$", 2, 2.0)
    changed = lora.with_alpha(moved(lora.without_alpha(factors), jax.random.key(2), 0.5), 2.0)
    params = {**moved(fresh.params, jax.random.key(3), 1.0), "aes_emb": fresh.params["aes_emb"]}
    jaxmix.VMix(fresh.config, params, jaxmix.LoRA({"unet": changed})).save(path / "vmix.safetensors")
    jaxmix.LoRA({"unet": changed}).save(path / "style.safetensors")
    return path


def drawn(files, out, rows=None, **flags):
    """Draw one picture, or that of each row, and return them as (n, H, W, 3) int."""
    what = {"prompt": "a cat"}
    if rows is not None:
        path = out.with_suffix(".jsonl")
        path.write_text("".join(json.dumps({"prompt": "a cat", "seed": 0, **row}) + "\n" for row in rows))
        what = {"prompts": str(path)}
    config = Config(**what, model=str(files / "model"), out=str(out), steps=2, devices=1, guidance_scale=9.0, **flags)
    assert main(config) == 0
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(out.glob("0*.png"))])


def test_strength_zero_without_its_lora_is_the_model_itself(files, tmp_path):
    base = drawn(files, tmp_path / "base")
    off = drawn(files, tmp_path / "off", vmix=str(files / "vmix.safetensors"), vmix_scale=0.0, vmix_lora="off")
    np.testing.assert_array_equal(off, base)


def test_labels_scale_and_lora_each_change_the_picture(files, tmp_path):
    vmix = str(files / "vmix.safetensors")
    rows = [{}, {"labels": "none"}, {"labels": ["color"]}, {"vmix_scale": 0.4}, {"vmix_scale": 0}]
    on, off = (drawn(files, tmp_path / state, rows, vmix=vmix, vmix_lora=state) for state in ("on", "off"))
    style = drawn(files, tmp_path / "style", rows, vmix=vmix, vmix_lora="off", lora=f"{files / 'style.safetensors'}:1")
    pictures = [*on, *off]
    assert all(np.abs(a - b).max() > 0 for i, a in enumerate(pictures) for b in pictures[:i])
    np.testing.assert_array_equal(style, on)  # the same factors, from a file of their own


def test_other_labels_scales_and_lora_strengths_compile_nothing(files, tmp_path):
    flags = {"vmix": str(files / "vmix.safetensors"), "lora": str(files / "style.safetensors")}
    drawn(files, tmp_path / "first", **flags)
    before = denoise._cache_size()
    flags["lora"] += ":0.3"
    drawn(files, tmp_path / "second", labels="color", vmix_scale=1.7, **flags)
    assert denoise._cache_size() == before


def test_the_settings_in_a_picture_say_what_made_it(files, tmp_path):
    path = str(files / "vmix.safetensors")
    drawn(files, tmp_path / "out", vmix=path, labels="light", lora=f"{files / 'style.safetensors'}:0.5")
    found = read_settings(only(tmp_path / "out", NAME))
    assert (found["vmix"], found["vmix_lora"], found["labels"], found["vmix_scale"]) == (path, "on", "light", 1.0)
    assert found["lora"] == [f"{files / 'style.safetensors'}:0.5"]
    drawn(files, tmp_path / "plain")
    assert not {"vmix", "labels", "vmix_scale", "lora"} & set(read_settings(only(tmp_path / "plain", NAME)))


def test_a_scale_is_filled_in_for_rows_that_resume(files, tmp_path, capsys):
    vmix = str(files / "vmix.safetensors")
    drawn(files, tmp_path / "out", vmix=vmix)
    capsys.readouterr()
    drawn(files, tmp_path / "out", vmix=vmix, labels="all", vmix_scale=1.0, resume=True)
    assert "1 kept from before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--labels", "color"], "--labels: found 'color' without 'vmix' in any row, expected it there or --vmix"),
        (["--vmix", "VMIX", "--labels", "colour"], "found 'colour', expected all, none or some of color, light"),
        (["--vmix", "no.safetensors"], "no such file"),
        (["--vmix", "STYLE"], "expected a VMix adapter written by jaxmix"),
        (["--lora", "VMIX"], "LoRA"),
        (["--lora", "STYLE:nan"], "finite strength"),
        (["--lora", "STYLE:attn1=1,conv"], "--lora: found 'conv' in '"),
        (["--lora", "STYLE:attn1=1,attn1=2"], "found 'attn1' twice"),
        (["--lora", "STYLE:attn1=inf"], "finite strength"),
        (["--lora", "STYLE:attn9=1"], "'attn9' names none of its"),
        (["--vmix", "VMIX", "--vmix-lora", "maybe"], "on"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(files, tmp_path, capsys, flags, words):
    paths = {"VMIX": files / "vmix.safetensors", "STYLE": files / "style.safetensors"}
    given = []
    for flag in flags:
        name, colon, strength = flag.partition(":")
        given.append(f"{paths.get(name, name)}{colon}{strength}")
    shared = ["--prompt", "a cat", "--model", str(files / "model"), "--out", str(tmp_path / "out"), "--steps", "1"]
    with pytest.raises(SystemExit) as stop:
        run(main, [*shared, *given])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert not list((tmp_path / "out").glob("*.png"))


def test_loras_are_read_as_path_and_strength():
    both = (("a.safetensors", 0.5), ("b.safetensors", 1.0))
    assert check_loras("lora", '["a.safetensors:0.5", "b.safetensors"]') == both
    assert check_loras("lora", "a,b.safetensors:2") == (("a,b.safetensors", 2.0),)
    assert check_loras("lora", ["a.safetensors:0.5", "b.safetensors"]) == both
    assert check_loras("lora", "gs://bucket/a.safetensors") == (("gs://bucket/a.safetensors", 1.0),)
    assert check_loras("lora", "") == check_loras("lora", []) == ()
    halves = (("a.safetensors", (("style", 1.0), ("content", 0.0))),)
    assert check_loras("lora", "a.safetensors:style=1.0,content=0") == halves
    assert check_loras("lora", "b:x=1/a.safetensors") == (("b:x=1/a.safetensors", 1.0),)
    with pytest.raises(InputError, match="finite"):
        check_loras("lora", "a.safetensors:inf")


def test_a_lora_has_a_strength_for_each_of_some_modules(files, tmp_path):
    style = str(files / "style.safetensors")
    told = [":attn1=1", ":conv1=1", ":attn1=1,conv1=0", ":attn1=1,conv1=1", ""]
    attn, conv, alone, both, whole = drawn(files, tmp_path / "rows", [{"lora": [f"{style}{one}"]} for one in told])
    np.testing.assert_array_equal(attn, alone)
    np.testing.assert_array_equal(both, whole)
    assert (attn != whole).any() and (attn != conv).any()
    assert read_settings(only(tmp_path / "rows", "0002_seed0.png"))["lora"] == [f"{style}:attn1=1,conv1=0"]
