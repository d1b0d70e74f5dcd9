"""scripts.effects.vmix: its statistics, its measures on real labelled scenes, and runs on a tiny model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxmix
from jaxmix import command
from jaxmix.models import UNet2DConditionModel
from jaxmix.types import InputError
from scripts.effects import vmix as effects_vmix
from scripts.effects.draw import Condition, Studio
from scripts.effects.measures import (
    attention_distance,
    effects,
    make_prompts,
    measure_pictures,
    real_scenes,
    with_words,
)
from scripts.effects.stats import Effect, matrix_verdicts, paired, pooled, ratio
from train.scenes import DIMENSIONS, measure
from train.scorer import load_scorer
from train.segmenter import load_segmenter

LABELS = {d: (f"good {d}", f"[{d[0].upper()}]") for d in DIMENSIONS}


# Statistics -----------------------------------------------------------------------------------------------------------


def test_the_paired_test_agrees_with_scipy():
    rng = np.random.default_rng(0)
    before, after = rng.standard_normal(30), rng.standard_normal(30) + 0.4
    found, expected = paired(after, before), stats.ttest_rel(after, before)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-9)
    assert found.in_sd == pytest.approx((after - before).mean() / before.std(ddof=1))


def test_pairs_with_a_nan_are_left_out():
    found = paired(np.array([1.0, np.nan, 3.0, 5.0]), np.array([0.0, 0.0, np.nan, 2.0]))
    assert (found.n, found.mean, found.sd) == (2, 2.0, pytest.approx(np.std([0, 0, 2], ddof=1)))


def test_equal_measurements_are_an_effect_of_exactly_zero():
    values = np.random.default_rng(0).standard_normal(5)
    assert paired(values, values).zero and paired(values, values).p == 1.0
    assert not paired(values + 1.0, values).zero


def test_a_ratio_of_effects_has_the_error_of_both():
    a, b = Effect(2.0, 0.3, 0.0, 10, 1.0), Effect(4.0, 0.4, 0.0, 10, 1.0)
    share, half = ratio(a, b)
    assert share == 0.5 and half == pytest.approx(np.hypot(0.3, 0.2) / 4)


def test_effects_are_pooled_in_their_units():
    found = pooled([Effect(2.0, 0.3, 0.0, 10, 1.0), Effect(-8.0, 4.0, 0.0, 9, 2.0)], [1.0, 10.0])
    assert found.mean == pytest.approx(1.2) and found.half == pytest.approx(0.5) and found.n == 9


def test_the_matrix_must_be_strong_on_its_diagonal_and_no_wider_than_the_scenes():
    def matrix(own, other):
        size = {True: own, False: other}
        return {a: {b: Effect(size[a == b], 0.0, 0.0, 9, 1.0) for b in DIMENSIONS} for a in DIMENSIONS}

    def judge(own, other):
        return [v.passed for v in matrix_verdicts(matrix(own, other), matrix(1.0, 0.1))]

    assert judge(0.7, -0.25) == [True] * 5
    assert judge(0.5, 0.0) == [False] * 4 + [True]
    assert judge(-0.7, 0.0) == [False] * 4 + [True]
    assert judge(0.7, 0.35) == [True] * 4 + [False] * 12


# Measures -------------------------------------------------------------------------------------------------------------


def test_prompts_are_distinct_for_three_rounds_and_stay_as_they_grow():
    rows = make_prompts("held_out_pairs", 300, 5)
    assert len({row["caption"] for row in rows}) == 300
    assert [row["caption"] for row in make_prompts("held_out_pairs", 20, 5)] == [row["caption"] for row in rows[:20]]
    assert with_words("a car", ("light", "color")) == "a car, vivid colors, bright"


def test_each_label_of_real_scenes_moves_its_own_measure_up():
    rows = make_prompts("held_out_pairs", 40, 5)
    scenes = real_scenes(rows, 40, 5, DIMENSIONS)
    judges = load_segmenter(), load_scorer()
    measures = {name: measure_pictures(images, rows, *judges) for name, images in scenes.items()}
    assert measures[""]["object"].mean() > 0.95 and measures[""]["style"].mean() > 0.9
    wrong = measure_pictures(scenes[""], rows[1:] + rows[:1], *judges)
    assert wrong["object"].mean() < 0.3
    found = effects({name: m for name, m in measures.items() if name}, measures[""])
    for d in DIMENSIONS:
        assert found[d][d].in_sd > 0.3 and found[d][d].p < 0.01, d
        assert found["all"][d].p < 0.01, d
    assert found["composition"]["color"].in_sd == pytest.approx(0, abs=0.2)


def test_a_share_of_the_real_scenes_has_the_opposite_of_a_label_that_they_lack():
    rows = make_prompts("held_out_pairs", 20, 5)
    plain = real_scenes(rows, 20, 5, DIMENSIONS)
    some = real_scenes(rows, 20, 5, DIMENSIONS, {"focus": 0.5})
    sharp = {
        k: np.array([measure(image)["focus"] for image in images]) for k, images in {**some, "plain": plain[""]}.items()
    }
    blurred = sharp[""] < sharp["plain"]
    assert 3 < blurred.sum() < 17
    np.testing.assert_array_equal(some[""][~blurred], plain[""][~blurred])
    np.testing.assert_array_equal(some["focus"], plain["focus"])
    np.testing.assert_array_equal(some["all"], plain["all"])


# Runs on a tiny model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_pipeline):
    """Return the tiny pipeline with pictures of 64 px."""
    config = dataclasses.replace(tiny_pipeline.unet.config, sample_size=32)
    return dataclasses.replace(tiny_pipeline, unet=UNet2DConditionModel(config), default_steps=2)


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Return the tiny pipeline as a folder, an untrained adapter for it, and one that changes pictures."""
    root = tmp_path_factory.mktemp("effects")
    tiny.save(root / "model")
    fresh = jaxmix.VMix.init(jax.random.key(0), tiny, LABELS)
    fresh.save(root / "fresh.safetensors")
    width = fresh.config.context_dim
    kernel = jax.random.normal(jax.random.key(1), (width, width)) / np.sqrt(width)
    params = {**fresh.params, "zero_proj": {"kernel": kernel, "bias": jnp.zeros(width)}}
    dataclasses.replace(fresh, params=params).save(root / "changed.safetensors")
    return root


@pytest.fixture(scope="module")
def run(files):
    """Run the script on the tiny model with four prompts, two steps, and return its folder."""

    def run(adapter, *flags):
        out = files / adapter
        cfg = command.parse(
            effects_vmix.main,
            ["--model", str(files / "model"), "--adapter", str(files / f"{adapter}.safetensors"), "--out", str(out)]
            + ["--prompts", "4", "--scenes", "4", "--batch_size", "4", "--map_prompts", "2", "--grid_rows", "2"]
            + ["--scales", "[2.0]", *flags],
        )
        assert effects_vmix.main(cfg) == 0
        return out

    return run


@pytest.mark.slow
def test_an_untrained_adapter_has_no_effect_at_all_and_the_report_says_so(run, capsys):
    out = run("fresh")
    assert "THE ADAPTER CHANGES NOTHING" in capsys.readouterr().out
    found = json.loads((out / "effects.json").read_text())
    for name in ("all 1", "all 2", *(f"{d} alone" for d in DIMENSIONS)):
        assert all(found["effects"][name][d]["mean"] == 0 for d in DIMENSIONS), name
    assert all(found["effects"]["words"][d]["mean"] != 0 for d in ("color", "light", "focus"))
    assert set(found["attention_distance"]["all 1"].values()) == {0.0}
    assert not any(v["passed"] for v in found["verdicts"] if " alone " in v["text"])
    assert all(set(row) == {"object", "style"} for row in found["scenes_accuracy"].values())


@pytest.mark.slow
def test_pictures_are_kept_between_runs_and_an_ablation_draws_its_own_alone(run, files, capsys, monkeypatch):
    out = run("changed")
    shown = capsys.readouterr().out
    assert "CHANGES NOTHING" not in shown
    kept = sorted((out / "drawn").iterdir())
    pictures = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert set(pictures) == {"scales.png", "labels.png"}
    drawn = []
    generate = Studio._generate
    monkeypatch.setattr(Studio, "_generate", lambda self, *a, **k: drawn.append(k) or generate(self, *a, **k))
    fine = ("--finetuned", str(files / "model"), "--full", str(files / "model"), "--markdown")
    run("changed", "--value_only", str(files / "changed.safetensors"), *fine)
    shown = capsys.readouterr().out
    # Held-out captions of the fine-tuned style, twice; the rest has been drawn before under the same numbers.
    assert [k for k in drawn if not k] == [{}, {}] and len(drawn) == 3
    assert len(list((out / "drawn").iterdir())) == len(kept) + 2
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == pictures
    assert "a fine-tuned model keeps" in shown and "| trained: value mixing only |" in shown
    found = json.loads((out / "effects.json").read_text())
    assert found["effects"]["trained: value mixing only"] == found["effects"]["all 1"]
    assert found["effects"]["trained: full fine-tuning"]["color"]["mean"] == 0
    assert 0 < found["attention_distance"]["all 1"]["up_blocks.1.attentions.0.transformer_blocks.0.attn2"] < 1


def test_a_lora_is_merged_and_its_absence_is_an_error(tiny, tmp_path):
    vmix = jaxmix.VMix.init(jax.random.key(0), tiny, LABELS)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    factors = {"down": jnp.ones((16, 2)), "up": jnp.ones((2, 16)), "alpha": jnp.float32(2)}
    adapters = {"with": dataclasses.replace(vmix, lora=jaxmix.LoRA({"unet": {name: factors}})), "without": vmix}
    studio = Studio({"base": tiny}, adapters, tmp_path, 2, None, 4, 0)
    pipe = studio.pipeline(Condition(adapter="with", lora=0.5))
    found = attention_distance(tiny, pipe, (), ["a car"], jnp.zeros((1, 32, 32, 4)))
    assert min(found.values()) >= 0 and max(found.values()) > 0.001
    with pytest.raises(InputError, match="without: found no LoRA"):
        studio.pipeline(Condition(adapter="without", lora=1.0))


def test_an_adapter_for_other_dimensions_is_one_clear_line(tiny, files, tmp_path, capsys):
    path = tmp_path / "paper.safetensors"
    jaxmix.VMix.init(jax.random.key(0), tiny).save(path)
    with pytest.raises(SystemExit) as stop:
        command.run(
            effects_vmix.main, ["--model", str(files / "model"), "--adapter", str(path), "--out", str(tmp_path)]
        )
    assert stop.value.code == 2
    expected = "an adapter for color, lighting, composition, focus, emotion, texture, expected color, light, focus"
    assert expected in capsys.readouterr().err
