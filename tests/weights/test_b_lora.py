"""Halves of a B-LoRA and any modules of a LoRA: kept alone, or each at its own strength."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmix import InputError, LoRA, Request, apply_loras
from jaxmix.pipeline.blocks import halves
from jaxmix.testing import moved
from jaxmix.tuning import lora
from jaxmix.weights.lora_files import BLOCKS, read_blocks
from jaxmix.weights.safetensors import SafetensorsFile

CONTENT, STYLE = "up_blocks.0.attentions.0.", "up_blocks.0.attentions.1."


@pytest.fixture(scope="module")
def both(tiny_sdxl):
    """Return a LoRA of SDXL's two blocks."""
    fresh = lora.init(jax.random.key(0), tiny_sdxl.params["unet"], rf"({CONTENT}|{STYLE}).*attn[12]\.to_", 2)
    factors = lora.with_alpha(moved(lora.without_alpha(fresh), jax.random.key(1), 0.3))
    return LoRA({"unet": factors}, usual=halves(tiny_sdxl))


@pytest.fixture(scope="module")
def file(both, tiny_sdxl, tmp_path_factory):
    path = tmp_path_factory.mktemp("b_lora") / "both.safetensors"
    both.save(path, tiny_sdxl)
    return path


def changed(pipe, loras):
    """Return {module: its merged kernel} of those that differ from the base's."""
    before, after = (lora.targets(p.params["unet"]) for p in (pipe, apply_loras(pipe, loras)))
    return {name: np.asarray(k) for name, (_, k) in after.items() if not np.array_equal(k, before[name][1])}


def test_a_half_changes_its_block_alone_and_both_halves_are_the_whole(tiny_sdxl, file):
    whole = changed(tiny_sdxl, [(LoRA.load(file), 1.0)])
    style, content = (changed(tiny_sdxl, [(LoRA.load(file).only(name), 1.0)]) for name in ("style", "content"))
    assert all(name.startswith(STYLE) for name in style) and all(name.startswith(CONTENT) for name in content)
    assert len(style) == len(content) == 2 * 2 * 4  # two layers, two attentions, four projections
    jax.tree.map(np.testing.assert_array_equal, {**style, **content}, whole)
    assert not changed(tiny_sdxl, [(LoRA.load(file).only("style"), 0.0)])


def test_strengths_by_name_are_those_of_each_half_and_zero_for_the_rest(tiny_sdxl, file):
    read = LoRA.load(file, tiny_sdxl)
    one = changed(tiny_sdxl, [(read, {"style": 0.5, "content": 0.25})])
    two = changed(tiny_sdxl, [(read.only("style"), 0.5), (read.only("content"), 0.25)])
    jax.tree.map(np.testing.assert_array_equal, one, two)
    # Not squared, as the authors' script does: half the strength is half the change.
    base, name = lora.targets(tiny_sdxl.params["unet"]), next(iter(read.only("style").parts["unet"]))
    full = changed(tiny_sdxl, [(read, 1.0)])[name] - base[name][1]
    np.testing.assert_allclose(one[name] - base[name][1], 0.5 * full, atol=1e-6)
    assert all(name.startswith(STYLE) for name in changed(tiny_sdxl, [(read, {"style": 1.0})]))
    attn1 = changed(tiny_sdxl, [(read, {".": 1.0, "style": 0.0, r"attentions\.1.*attn1\.to_q": 2.0})])
    assert {name.split(".transformer")[0] + "." for name in attn1} == {CONTENT, STYLE}
    assert sum(name.startswith(STYLE) for name in attn1) == 2


def test_halves_of_two_files_serve_together(tiny_sdxl, file, both, tmp_path):
    other = LoRA({"unet": moved(both.parts["unet"], jax.random.key(5), 0.1)}, usual=both.usual)
    mixed = changed(tiny_sdxl, [(LoRA.load(file).only("style"), 1.0), (other.only("content"), 1.0)])
    style = changed(tiny_sdxl, [(both, {"style": 1.0})])
    content = changed(tiny_sdxl, [(other, {"content": 1.0})])
    jax.tree.map(np.testing.assert_array_equal, mixed, {**style, **content})
    # A half is a file of its own, too.
    both.only("style").save(tmp_path / "style.safetensors", tiny_sdxl)
    alone = LoRA.load(tmp_path / "style.safetensors", tiny_sdxl)
    jax.tree.map(np.testing.assert_array_equal, changed(tiny_sdxl, [(alone, {"style": 1, "content": 0})]), style)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_file_says_where_its_halves_are(tiny_sdxl, both, tmp_path, layout):
    swapped = LoRA(both.parts, blocks={"style": rf"^{CONTENT}", "content": rf"^{STYLE}"})
    swapped.save(tmp_path / "x.safetensors", tiny_sdxl, layout)
    read = LoRA.load(tmp_path / "x.safetensors", tiny_sdxl)
    assert read.blocks == swapped.blocks
    assert all(name.startswith(CONTENT) for name in read.only("style").parts["unet"])


def test_a_lora_without_halves_says_nothing_of_them(file):
    assert BLOCKS not in SafetensorsFile(file).metadata


def test_a_job_merges_each_half_at_its_strength(tiny_sdxl, file):
    method = LoRA.load(file).on({"style": 0.5, "content": 0})
    assert method == method and hash(method) == hash(method)
    (edit,) = method.apply(tiny_sdxl, Request(prompts=["a cat"])).weights
    merged = edit(tiny_sdxl.params)
    expected = apply_loras(tiny_sdxl, [(LoRA.load(file), {"style": 0.5})]).params
    jax.tree.map(np.testing.assert_array_equal, merged["unet"], expected["unet"])


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda f, p: LoRA.load(f, p).only("up_blocks.7"), "LoRA: 'up_blocks.7' names none of its 32 modules; near"),
        (lambda f, p: LoRA.load(f).only("stile").read(p), "near misses: style, content, "),
        (lambda f, p: LoRA.load(f, p).only("("), "LoRA: '(' is not a regular expression"),
        (lambda f, p: LoRA.load(f, p).only(), "LoRA.only: found no names"),
        (lambda f, p: LoRA.load(f, p).only(3), "LoRA: found 3, expected the name or pattern"),
        (lambda f, p: LoRA(LoRA.load(f, p).parts).only("style"), "LoRA: 'style' names none of its 32 modules"),
        (lambda f, p: LoRA.load(f, p).only("content").only("style"), "'style' (^up_blocks"),
        (lambda f, p: LoRA.load(f).on({"style": "1"}).check(p, None), "found strength '1' for 'style', expected a num"),
        (
            lambda f, p: LoRA.load(f).on({"attn3": 1.0}).check(p, None),
            "both.safetensors: LoRA: 'attn3' names none of its 32 modules",
        ),
        (lambda f, p: LoRA.load(f).on(float("inf")).check(p, None), "found strength inf, expected a number"),
    ],
)
def test_what_names_nothing_is_one_line(tiny_sdxl, file, do, words):
    with pytest.raises(InputError) as e:
        do(file, tiny_sdxl)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_damaged_names_of_blocks_are_one_line(tiny_sdxl, tmp_path):
    name = next(iter(lora.targets(tiny_sdxl.params["unet"])))
    f = {name: {"down": jnp.ones((16, 2)), "up": jnp.ones((2, 16)), "alpha": jnp.float32(2)}}
    LoRA({"unet": f}).save(tmp_path / "x.safetensors")
    for text in ("{", "[1]", '{"style": 1}'):
        save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "y.safetensors", {BLOCKS: text})
        with pytest.raises(InputError, match=f"y.safetensors: the metadata {BLOCKS} are '"):
            read_blocks(tmp_path / "y.safetensors")
