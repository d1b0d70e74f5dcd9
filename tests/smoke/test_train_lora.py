"""The trainer of LoRAs on a tiny base: what it learns, its files, resuming, where captions come from, and refusals."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix import InputError
from jaxmix.command import parse
from jaxmix.models.layers import Linear
from jaxmix.testing import moved
from jaxmix.tuning import lora as low_rank
from tests.data.made import encoded, make_folder, picture
from tests.jobs import TWO_STEPS, killed_after
from train import cache_latents, lora
from train.diffusion import make_tokenize
from train.low_rank import FILE, KOHYA_FILE, make_weigh, note_ordinary, start_lora

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def base(one_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    one_level.save(folder)
    return str(folder)


def shrunk(base, folder, **changes):
    """Return the committed config at the size of the tiny base, for few modules: each makes the step compile longer."""
    cfg = parse(lora.main, ["--config", str(CONFIGS / "lora_mini.yaml"), "--output_dir", str(folder)])
    small = {
        "pretrained_model_name_or_path": base,
        "scenes": {**cfg.scenes, "size": 16, "objects": 4},
        "lora_targets": r"mid_block.*attn[12]\.to_(q|v)$",
        "rank": 3,
        "conv_rank": 0,
        "rank_pattern": {"attn2.to_q": 2},
        "use_dora": True,
        "lora_dropout": 0.3,
        **TWO_STEPS,
        "validation_steps": 0,
        "validation_prompts": cfg.validation_prompts[:1],
        "validation_batch_size": 1,
    }
    return dataclasses.replace(cfg, **{**small, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """Return a folder with two runs of two steps: `whole`, and `parts`, killed after the first and resumed."""
    root = tmp_path_factory.mktemp("runs")
    assert lora.main(shrunk(base, root / "whole", validation_steps=2)) == 0
    killed_after(1, root / "whole", root / "parts", exported=FILE)
    assert lora.main(shrunk(base, root / "parts", resume_from_checkpoint="1")) == 0
    return root


def test_stopping_and_resuming_gives_the_same_files_bit_for_bit(runs, one_level):
    for name in (FILE, KOHYA_FILE):
        assert (runs / "whole" / name).read_bytes() == (runs / "parts" / name).read_bytes()
    parts = jaxmix.LoRA.load(runs / "whole", one_level).parts
    assert set(parts) == {"unet"}
    for factors in parts.values():
        assert all(np.asarray(f["up"]).any() and "magnitude" in f for f in factors.values())
    ranks = {name: f["down"].shape[-1] for name, f in parts["unet"].items()}
    assert {rank for name, rank in ranks.items() if name.endswith("attn2.to_q")} == {2}
    assert {rank for name, rank in ranks.items() if name.endswith("attn1.to_q")} == {3}
    assert len(list((runs / "whole" / "pictures").iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": False}, "trained with another use_dora: found True, expected False"),
        ({"lora_alpha": 7.0}, "trained with another lora_alpha: found None, expected 7.0"),
        ({"lora_targets": "attn2.to_(q|v)$"}, "trained with another lora_targets: found 'mid_block"),
    ],
)
def test_a_resume_with_another_lora_is_refused(runs, base, changes, words):
    with pytest.raises(InputError) as e:
        lora.main(shrunk(base, runs / "whole", **changes))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_step_without_dropout_sees_what_the_merged_file_draws(one_level, base, tmp_path):
    cfg = shrunk(base, tmp_path, lora_dropout=0.0, use_rslora=True, lora_alpha=2.0, train_text_encoder=True)
    trained = start_lora(one_level, cfg, 0)
    learns = moved(trained.learns, jax.random.key(1), 0.1)
    weigh = jax.jit(make_weigh(trained, cfg))
    x = jax.random.normal(jax.random.key(2), (1, *one_level.latent_shape))
    predict = jax.jit(lambda p, context: one_level.unet.apply({"params": p["unet"]}, x, jnp.asarray([500]), context))
    encode = jax.jit(lambda p, ids: one_level.text_encoder.apply({"params": p["text_encoder"]}, ids).last_hidden_state)
    ids = make_tokenize(one_level)("a dog")["input_ids"][None]

    def seen(params):
        return predict(params, encode(params, ids))

    frozen = {name: one_level.params[name] for name in ("unet", "text_encoder")}
    beside = seen(weigh(learns, frozen, jax.random.key(0)))
    trained.save(learns, tmp_path, one_level, "diffusers")
    merged = jaxmix.LoRA.load(tmp_path, one_level).on(1.0)(frozen)
    np.testing.assert_allclose(beside, seen(merged), atol=2e-5)
    assert np.abs(beside - seen(frozen)).max() > 1e-3
    scale = 2.0 * math.sqrt(3) / 3
    f = jaxmix.LoRA.load(tmp_path, one_level).parts["unet"]
    assert any(abs(float(g["alpha"]) / g["down"].shape[-1] - scale) < 1e-6 for g in f.values())
    # Before training nothing is changed.
    np.testing.assert_allclose(seen(weigh(trained.learns, frozen, jax.random.key(0))), seen(frozen), atol=1e-6)


def test_dropout_leaves_out_inputs_of_the_addition_by_the_key(one_level, base, tmp_path):
    cfg = shrunk(base, tmp_path, use_dora=False)
    trained = start_lora(one_level, cfg, 0)
    name = next(name for name in trained.learns["unet"] if name.endswith("attn1.to_q"))
    f = {"down": jnp.eye(16, 3), "up": jnp.ones((3, 16)), "alpha": jnp.float32(3)}
    tree = low_rank.attach(one_level.params["unet"], {name: f}, 1.0, 0.5, jax.random.key(0))
    node = tree
    for key in low_rank.targets(one_level.params["unet"])[name][0]:
        node = node[key]
    x, plain = jnp.ones((4096, 16)), {**node, "lora": {**node["lora"], "dropout": jnp.float32(0.0)}}
    apply = jax.jit(lambda node: Linear(16, use_bias="bias" in node).apply({"params": node}, x))
    base_out = apply({key: value for key, value in node.items() if key != "lora"})
    kept, dropped = apply(plain) - base_out, apply(node) - base_out
    np.testing.assert_allclose(kept, 3.0, rtol=1e-4)
    np.testing.assert_allclose(dropped.mean(), 3.0, rtol=0.05)  # each of the three inputs is 0 or 2
    assert set(np.unique(np.round(np.asarray(dropped)[:, 0]))) == {0, 2, 4, 6}


def test_captions_come_from_files_folders_and_the_trigger_word(one_level, base, tmp_path):
    root = tmp_path / "pictures"
    for name, captions in (("3_zwx dog", {0: "zwx dog asleep"}), ("1_zwx cat", {})):
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.png").write_bytes(encoded(picture(i, (16, 16))))
            if i in captions:
                (root / name / f"{i}.txt").write_text(captions[i])
    regular = tmp_path / "reg" / "1_dog"
    regular.mkdir(parents=True)
    for i in range(3):
        (regular / f"{i}.png").write_bytes(encoded(picture(i, (16, 16))))
    told = {"scenes": {}, "resolution": 16, "train_data_dir": str(root)}
    told |= {"reg_data_dir": str(regular.parent), "prior_loss_weight": 0.5, "trigger_word": "art", "center_crop": True}
    cfg = shrunk(base, tmp_path, **told)
    rows = lora.open_rows(cfg, one_level)
    entries = {e.id: e for e in rows.source.entries}
    assert entries["3_zwx dog/0.png"].text == "art, zwx dog asleep"
    assert entries["3_zwx dog/1.png"].text == "art, zwx dog" and entries["1_zwx cat/0.png"].text == "art, zwx cat"
    assert entries["reg/1_dog/0.png"].text == "dog"
    shown = np.bincount(np.concatenate(rows.groups), minlength=len(entries))
    assert [e.id for e in entries.values()][:4] == ["1_zwx cat/0.png", "1_zwx cat/1.png", *list(entries)[2:4]]
    np.testing.assert_array_equal(shown, [1, 1, 3, 3, 3, 3, 2])  # as many regularisation pictures as others: 8
    stream = rows.in_batches(4, 0)
    row = lora.make_rows(make_tokenize(one_level), cfg)
    weights = [float(row(stream[i], np.random.default_rng(0))["loss_weight"]) for i in range(16)]
    assert sorted(weights) == [0.5] * 8 + [1.0] * 8
    # A cache has all of it.
    made = {"resolution": 16, "center_crop": True, "batch_size": 2, "trigger_word": "art"}
    made |= {"train_data_dir": str(root), "reg_data_dir": str(regular.parent), "out": str(tmp_path / "cache")}
    assert cache_latents.main(cache_latents.Config(pretrained_model_name_or_path=base, **made)) == 0
    plain = {"train_data_dir": str(tmp_path / "cache"), "reg_data_dir": "", "trigger_word": ""}
    cached = lora.open_rows(dataclasses.replace(cfg, **plain), one_level)
    assert sorted(np.bincount(np.concatenate(cached.groups))) == sorted(shown)
    stream = cached.in_batches(4, 0)
    assert sum(float(row(stream[i], np.random.default_rng(0))["loss_weight"]) for i in range(16)) == 12
    with pytest.raises(InputError, match=r"trigger_word: found it with a cache, .*, expected it for"):
        lora.open_rows(dataclasses.replace(cfg, train_data_dir=str(tmp_path / "cache")), one_level)
    with pytest.raises(InputError, match="train_text_encoder: found it with a cache of text states"):
        lora.open_rows(dataclasses.replace(cfg, **plain, train_text_encoder=True), one_level)


def test_an_ordinary_trigger_word_is_named_with_its_tokens(one_level, capsys):
    note_ordinary(one_level, "trigger_word", ["sks"])
    note_ordinary(one_level, "trigger_word", ["ohwx", "dog"])
    assert capsys.readouterr().err == ""
    note_ordinary(one_level, "trigger_word", ["dog"])
    said = capsys.readouterr().err
    assert said.startswith("note: trigger_word: 'dog' is an ordinary word to this model (tokens: dog</w> ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_targets": "attn3"}, "lora_targets: 'attn3' matches none of the"),
        (
            {"text_encoder_targets": "to_q", "train_text_encoder": True},
            "text_encoder_targets (text_encoder): 'to_q' matches none of the",
        ),
        ({"lora_targets": "("}, "lora_targets: '(' is not a regular expression"),
        ({"rank": 64}, "rank: found 64 for "),
        ({"rank_pattern": {"attn1.to_w": 2}}, "rank_pattern: 'attn1.to_w' fits none of the"),
        ({"rank": 0}, "rank: found 0, expected 1 or more"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan, expected a number above 0"),
        ({"conv_alpha": 1.0}, "conv_alpha: found 1.0 without a conv_rank"),
        ({"lora_dropout": 1.0}, "lora_dropout: found 1.0, expected 0 to less than 1"),
        ({"trigger_word": "sks"}, "trigger_word: found it with scenes"),
        ({"text_encoder_lr": 1e-4}, "text_encoder_lr: found 0.0001 without"),
        ({"scenes": {}, "train_data_dir": "no/such"}, "no/such: found no such folder"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, base, changes, words):
    with pytest.raises(InputError) as e:
        lora.main(shrunk(base, tmp_path, **changes))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_broken_picture_is_named_and_replaced(one_level, base, tmp_path, capsys):
    folder = make_folder(tmp_path / "pictures", [(16, 16)] * 3)
    (folder / "001.png").write_bytes(b"not a picture")
    told = {"scenes": {}, "resolution": 16, "train_data_dir": str(folder)}
    stream = lora.open_rows(shrunk(base, tmp_path, **told), one_level).in_batches(2, 0)
    assert {stream[i]["id"] for i in range(6)} == {"000.png", "002.png"}
    assert "bad row 001.png: cannot be decoded" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"found 1 bad rows, expected at most 0 \(max_bad_rows\); the last is 001.png"):
        stream = lora.open_rows(shrunk(base, tmp_path, **told, max_bad_rows=0), one_level).in_batches(2, 0)
        [stream[i] for i in range(6)]


def test_a_step_that_does_not_fit_is_refused_with_what_would_help(base, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmix.tuning.room.device_bytes", lambda: 10_000)
    with pytest.raises(InputError) as e:
        lora.main(shrunk(base, tmp_path))
    said = str(e.value)
    assert said.startswith("memory: the weights and the optimizer need 0.0 GiB per device, expected no more than")
    assert "what would help: --gradient_checkpointing true, --mixed_precision bf16" in said
    assert "--gradient_accumulation_steps 4, --ema_decay 0, --rank 1" in said


@pytest.mark.parametrize("name", ["lora_mini", "lora_sd15", "lora_sdxl"])
def test_configs_are_read(name, tmp_path):
    cfg = parse(lora.main, ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", str(tmp_path)])
    assert json.dumps(dataclasses.asdict(cfg)) and cfg.ranks().rank == cfg.rank
