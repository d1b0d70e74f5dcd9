"""VMix as methods state it: identity at the start, one attention map, values mixed once per prompt."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmix import InputError, LoRA, Site, VMix
from jaxmix.control import KV, QKV, attend
from jaxmix.controls import vmix as maths
from jaxmix.models.unet import sites
from jaxmix.pipeline.job import denoise
from jaxmix.testing import moved, normal
from jaxmix.tuning import lora
from jaxmix.weights import read_header
from tests.jobs import Unconditional, predict

LABELS = {"color": ("vibrant color", "[V]"), "light": ("bright light", "[S]"), "focus": ("sharp focus", "[T]")}


@pytest.fixture(scope="module")
def fresh(one_level):
    return VMix.init(jax.random.key(0), one_level, LABELS)


@pytest.fixture(scope="module")
def trained(fresh):
    """Return an adapter with every learnt array moved away from its start."""
    params = moved(fresh.params, jax.random.key(1), 0.3)
    return VMix(fresh.config, {**params, "aes_emb": fresh.params["aes_emb"]})


@pytest.fixture(scope="module")
def with_lora(one_level, trained):
    """Return the trained adapter with a LoRA: two patterns, each with its own rank and alpha."""
    params, factors = one_level.params["unet"], {}
    for i, (pattern, rank, alpha) in enumerate([(r"attn2\.to_(q|k|v)$", 3, 2.0), (r"resnets\.0\.conv1$", 2, 5.0)]):
        made = lora.init(jax.random.key(i), params, pattern, rank, alpha)
        factors |= {k: {**f, "up": 0.2 * normal(jax.random.key(9), f["up"].shape)} for k, f in made.items()}
    return dataclasses.replace(trained, lora=LoRA({"unet": factors}))


def draw(pipe, *controls, methods=()):
    prompts = ["a red apple", "a car"]
    return pipe.generate(prompts, [3, 4], 3, 4.0, controls=controls, methods=methods, output="latent")


@pytest.mark.parametrize(("labels", "scale"), [("all", 1.0), ("none", 2.0), ("color,focus", 0.7)])
def test_an_untrained_adapter_is_the_base_bit_for_bit(one_level, fresh, labels, scale):
    control = fresh.bind(one_level, labels, scale)
    np.testing.assert_array_equal(draw(one_level, control), draw(one_level))


def test_zero_scale_is_the_base_bit_for_bit_after_training(one_level, trained):
    np.testing.assert_array_equal(draw(one_level, trained.bind(one_level, "all", 0.0)), draw(one_level))


def test_labels_and_scale_change_the_image_after_training(one_level, trained):
    base = draw(one_level)
    seen = [draw(one_level, trained.bind(one_level, *a)) for a in (("all", 1), ("all", 2), ("color", 1))]
    for i, x in enumerate([base, *seen]):
        for y in seen[i:]:
            assert np.abs(x - y).max() > 1e-4


def test_one_label_set_and_scale_an_image(one_level, trained):
    pipe = one_level
    both = draw(pipe, trained.bind(pipe, ["all", "color"], [0.0, 1.5]))
    np.testing.assert_array_equal(both[0], draw(pipe)[0])
    np.testing.assert_allclose(both[1], draw(pipe, trained.bind(pipe, "color", 1.5))[1], rtol=1e-5, atol=3e-5)


def test_unconditional_rows_are_untouched(one_level, trained):
    """Where only the unconditional branch is left, the adapter must not show at all."""
    pipe = one_level
    control = trained.bind(pipe, "all", 1.0)
    drawn = [draw(pipe, *controls, methods=[Unconditional()]) for controls in ((control,), ())]
    np.testing.assert_array_equal(*drawn)


def test_the_first_attn2_keeps_the_attention_map_of_the_content(one_level, trained):
    pipe = one_level
    x, context = normal(jax.random.key(0), (2, 8, 8, 4)), pipe.encode_prompt(["a car", "a dog"]).context

    def probs(*controls):
        _, seen = predict(pipe.unet, pipe.params["unet"], x, 500, context, controls, mutable="probs")
        block = seen["probs"]["down_blocks.0"]["attentions.0"]["transformer_blocks.0"]
        return np.asarray(block["attn2"]["probs"])

    for scale in (0.5, 2.0):
        np.testing.assert_array_equal(probs(trained.bind(pipe, "all", scale)), probs())


def test_two_branches_equal_the_mixed_value(trained):
    """softmax(QK) V_c + scale * softmax(QK) V_a, written out, against the one attention that the control runs."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 4, 4)).astype(np.float32) for n in (9, 32, 32))
    name, inner = trained.config.sites[0]
    site = Site(name, 4, (3, 3))
    present, scale = jnp.asarray([[1.0, 0, 1], [0, 1, 0]]), jnp.asarray([0.7, 1.9])
    control = maths.bind(trained.params, present, scale)
    got, _ = attend(site, QKV(q, *control.kv(site, KV(k, v))))
    va = np.asarray(maths.aesthetic_context(trained.params, present) @ trained.params["to_v"][name]["kernel"])
    content, _ = attend(site, QKV(q, k, v))
    aesthetic, _ = attend(site, QKV(q, k, jnp.asarray(va.reshape(2, 32, 4, inner // 4))))
    np.testing.assert_allclose(got, content + scale[:, None, None, None] * aesthetic, atol=2e-6)


def test_the_projection_follows_the_paper_in_plain_numpy(trained):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), trained.params)
    present = np.asarray([[1, 0, 1], [0, 0, 0]])
    f = np.stack([[p["aes_emb"][i, present[b, i]] for i in range(3)] for b in range(2)])
    tokens = np.zeros((2, 32, 16))
    for c in range(32):  # F acts along the tokens: each of the C positions is a mixture of the N embeddings
        tokens[:, c] = sum(p["token_proj"]["kernel"][i, c] * f[:, i] for i in range(3)) + p["token_proj"]["bias"][c]
    normed = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    out = (normed * p["norm"]["scale"] + p["norm"]["bias"]) @ p["zero_proj"]["kernel"] + p["zero_proj"]["bias"]
    np.testing.assert_allclose(maths.aesthetic_context(trained.params, jnp.asarray(present)), out, atol=2e-5)


def test_an_absent_label_is_its_rare_token_and_not_zero(one_level, fresh):
    emb = fresh.params["aes_emb"]
    texts = [text for label, rare in LABELS.values() for text in (rare, label)]
    alone = [one_level.encode_text([text]).pooled[0] for text in texts]
    np.testing.assert_allclose(emb.reshape(6, -1), jnp.stack(alone), atol=1e-5)
    assert float(jnp.abs(emb[:, 0]).min(-1).max()) > 0 and float(jnp.abs(emb[:, 0] - emb[:, 1]).max()) > 1e-3


def test_gradients_reach_the_zero_layer_first_and_everything_by_step_three(one_level, fresh):
    pipe = one_level
    x, context = normal(jax.random.key(0), (2, 8, 8, 4)), pipe.encode_prompt(["a car", "a dog"]).context
    present = jnp.asarray([[1.0, 0, 1], [0, 1, 0]])
    optimizer = optax.adam(1e-2)

    def loss(params):
        control = maths.bind(params, present, jnp.ones(2))
        return jnp.mean(jnp.square(pipe.unet.apply({"params": pipe.params["unet"]}, x, 500, context, (control,))))

    grad = jax.jit(jax.grad(loss))
    params, state = fresh.params, optimizer.init(fresh.params)
    start = params
    for step in range(3):
        g = grad(params)
        if step == 0:
            moving = {
                jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_leaves_with_path(g) if jnp.abs(v).max() > 0
            }
            assert moving == {"['zero_proj']['kernel']", "['zero_proj']['bias']"}
        g = {**g, "aes_emb": jnp.zeros_like(g["aes_emb"])}
        updates, state = optimizer.update(g, state)
        params = optax.apply_updates(params, updates)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(params), strict=True):
        if "aes_emb" not in jax.tree_util.keystr(path):
            assert float(jnp.abs(a - b).max()) > 0, jax.tree_util.keystr(path)


def test_f_a_depends_on_the_label_set_alone(one_level, trained):
    values = [trained.bind(one_level, "color,focus", s).values for s in (0.5, 2.0)]
    jax.tree.map(np.testing.assert_array_equal, *values)


def test_label_sets_and_scales_compile_once(one_level, trained):
    draw(one_level, trained.bind(one_level, "all", 1.0))
    before = denoise._cache_size()
    for labels, scale in (("none", 0.5), ("color", 2), (["all", "color"], [0.0, 1.0])):
        draw(one_level, trained.bind(one_level, labels, scale))
    assert denoise._cache_size() == before


def test_the_file_holds_everything_bit_for_bit(tmp_path, one_level, trained):
    trained.save(tmp_path / "adapter.safetensors")
    again = VMix.load(tmp_path / "adapter.safetensors")
    assert again.config == trained.config
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_there_is_one_new_matrix_an_attn2_and_nothing_else(one_level, fresh):
    attn2 = {s.name for s in sites(one_level.unet.config, (8, 8)) if s.name.endswith("attn2")}
    assert set(fresh.params["to_v"]) == attn2 and len(attn2) == 4
    assert set(fresh.params) == {"aes_emb", "token_proj", "norm", "zero_proj", "to_v"}


def test_a_file_that_is_no_adapter_is_one_clear_line(tmp_path, one_level):
    one_level.save(tmp_path)
    with pytest.raises(InputError, match="expected a VMix adapter written by jaxmix"):
        VMix.load(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")


def test_an_adapter_for_another_unet_is_one_clear_line(one_level, fresh):
    config = maths.VMixConfig(fresh.config.labels, 32, 24, fresh.config.sites)
    with pytest.raises(InputError, match="UNet with 4 attn2 of 16 text channels, expected the adapter's 4 of 24"):
        VMix(config, fresh.params).bind(one_level)


def test_an_unknown_label_lists_the_known_ones(one_level, fresh):
    with pytest.raises(InputError, match=r"found 'colour', expected all, none or some of color, light, focus"):
        fresh.bind(one_level, "colour")


def test_rows_that_do_not_fit_the_prompts_are_an_error(one_level, fresh):
    with pytest.raises(InputError, match="found 3 rows, expected 1 or 2"):
        draw(one_level, fresh.bind(one_level, ["all", "none", "all"]))


# Stable Diffusion XL --------------------------------------------------------------------------------------------------


def test_labels_of_sdxl_are_both_encoders_states_before_the_last_layer_at_the_end_of_the_text(tiny_sdxl):
    pipe = tiny_sdxl
    adapter = VMix.init(jax.random.key(0), pipe, LABELS)
    assert adapter.config.context_dim == 16 + 24 and {c for _, c in adapter.config.sites} == {32}
    for i, pair in enumerate(LABELS.values()):
        for j, text in enumerate(reversed(pair)):  # the rare token first
            ids = np.asarray(pipe.tokenizer(text, padding="max_length", max_length=32)["input_ids"])
            end = int(np.flatnonzero(ids == pipe.tokenizer.eos_token_id)[0])
            assert 1 < end < 31
            parts = [
                encoder.apply({"params": pipe.params[name]}, ids[None]).penultimate[0, end]
                for name, encoder in (("text_encoder", pipe.text_encoder), ("text_encoder_2", pipe.text_encoder_2))
            ]
            np.testing.assert_allclose(adapter.params["aes_emb"][i, j], np.concatenate(parts), atol=1e-5)


def test_an_adapter_of_one_family_on_another_is_one_clear_line(tiny_sdxl, fresh):
    message = "found a UNet with 8 attn2 of 40 text channels, expected the adapter's 4 of 16"
    for use in (fresh.bind, fresh.apply_lora):
        with pytest.raises(InputError, match=message):
            use(tiny_sdxl)


# The LoRA that is trained along ---------------------------------------------------------------------------------------


def test_the_lora_is_a_part_of_its_own(one_level, trained, with_lora):
    """Off, it leaves the base and the values alone; at strength 0 and before training it is the base, bit for bit."""
    pipe, base = one_level, one_level.params["unet"]
    assert trained.apply_lora(pipe) is pipe  # there is none
    jax.tree.map(np.testing.assert_array_equal, with_lora.bind(pipe).values, trained.bind(pipe).values)
    jax.tree.map(np.testing.assert_array_equal, with_lora.apply_lora(pipe, 0.0).params["unet"], base)
    factors = with_lora.lora.parts["unet"]
    untrained = {name: {**f, "up": 0 * f["up"]} for name, f in factors.items()}
    start = dataclasses.replace(with_lora, lora=LoRA({"unet": untrained}))
    jax.tree.map(np.testing.assert_array_equal, start.apply_lora(pipe).params["unet"], base)

    merged = with_lora.apply_lora(pipe, 0.5)
    assert merged.params["vae"] is pipe.params["vae"] and merged.params["text_encoder"] is pipe.params["text_encoder"]
    expected = lora.merge(base, [factors], [0.5])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.params["unet"], expected)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), merged.params["unet"], base)
    assert {".".join(path) for path in flat_names(changed)} == set(factors)


def flat_names(tree, path=()):
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from flat_names(node, (*path, name))
        elif node:
            yield path


def test_the_file_holds_the_lora_with_its_alphas_bit_for_bit(tmp_path, with_lora):
    with_lora.save(tmp_path / "adapter.safetensors")
    again = VMix.load(tmp_path / "adapter.safetensors")
    assert again.config == with_lora.config
    jax.tree.map(np.testing.assert_array_equal, again.params, with_lora.params)
    found, expected = again.lora.parts["unet"], with_lora.lora.parts["unet"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {(f["down"].shape[-1], float(f["alpha"])) for f in found.values()} == {(3, 2.0), (2, 5.0)}


def test_a_file_without_a_lora_has_none(tmp_path, trained):
    trained.save(tmp_path / "adapter.safetensors")
    assert VMix.load(tmp_path / "adapter.safetensors").lora is None


def test_a_smaller_file_holds_half_the_bytes_of_each_number(tmp_path, with_lora):
    with_lora.save(tmp_path / "whole.safetensors")
    with_lora.save(tmp_path / "half.safetensors", dtype=jnp.float16)
    again = VMix.load(tmp_path / "half.safetensors")
    assert again.params["zero_proj"]["kernel"].dtype == jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), again.params, with_lora.params)
    entries = (read_header(tmp_path / name).entries for name in ("whole.safetensors", "half.safetensors"))
    whole, half = (sum(entry.nbytes for entry in of.values()) for of in entries)
    assert 2 * half == whole


def rewritten(source, path, change):
    """Write a copy of an adapter's file whose config has been changed by ``change``, or is the text that it is."""
    config = json.loads(read_header(source).metadata["jaxmix"])
    raw = source.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + size])
    head["__metadata__"]["jaxmix"] = change if isinstance(change, str) else json.dumps(change(config))
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return path


def without(key):
    return lambda config: {k: v for k, v in config.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{oh", "the metadata 'jaxmix' is broken (Expecting property name"),
        ("[1]", "the metadata 'jaxmix' is broken"),
        (without("tokens"), "the metadata 'jaxmix' is broken (no 'tokens')"),
        (lambda c: {**c, "labels": ["color"]}, "the metadata 'jaxmix' is broken"),
        (lambda c: {**c, "lora_alpha": {"attn2": "much"}}, "the metadata 'jaxmix' is broken"),
        (lambda c: {**c, "class": "IPAdapter"}, "found IPAdapter, expected a VMix adapter"),
        (lambda c: {**c, "lora_alpha": {"nowhere": 1.0}}, "found no tensor lora.nowhere.down, expected it"),
        (lambda c: {**c, "context_dim": 24}, "does not fit the model"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, with_lora, change, message):
    with_lora.save(tmp_path / "adapter.safetensors")
    path = rewritten(tmp_path / "adapter.safetensors", tmp_path / "broken.safetensors", change)
    with pytest.raises(InputError) as e:
        VMix.load(path)
    assert message in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_missing_file_is_one_line_that_names_it(tmp_path):
    with pytest.raises(InputError, match=r"absent\.safetensors: no such file, expected a VMix adapter or one of mini-"):
        VMix.load(tmp_path / "absent.safetensors")
