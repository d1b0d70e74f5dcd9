import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxmix
from jaxmix import InputError
from jaxmix.command import parse
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from tests.data.made import make_folder
from tests.jobs import TWO_STEPS, killed_after
from train import vmix
from train.diffusion import make_loss, make_tokenize

CONFIGS = Path(__file__).parents[2] / "configs"
DIMENSIONS = ("color", "light", "focus", "composition")


@pytest.fixture(scope="module")
def base(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline.save(folder)
    return folder


def shrunk(base, folder, **changes):
    """Return the committed config at the size of the tiny pipeline."""
    cfg = parse(vmix.main, ["--config", str(CONFIGS / "vmix_mini.yaml"), "--output_dir", str(folder)])
    small = {
        "pretrained_model_name_or_path": str(base),
        "scenes": {**cfg.scenes, "size": 16, "objects": 4},
        **TWO_STEPS,
        "rank": 2,
        "validation_steps": 0,
        "validation_prompts": cfg.validation_prompts[:1],
        "validation_scales": [1.0],
        "validation_batch_size": 6,
    }
    return dataclasses.replace(cfg, **{**small, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """Return a folder with two runs of two steps: `whole`, and `parts`, killed after the first and resumed."""
    root = tmp_path_factory.mktemp("runs")
    options = {"mixed_precision": "bf16", "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    assert vmix.main(shrunk(base, root / "whole", validation_steps=2, **options)) == 0
    killed_after(1, root / "whole", root / "parts", exported="adapter.safetensors")
    assert vmix.main(shrunk(base, root / "parts", resume_from_checkpoint="1", **options)) == 0
    return root


def test_the_shrunk_config_leaves_an_adapter_that_binds_to_its_base(runs, tiny_pipeline):
    adapter = jaxmix.VMix.load(runs / "whole" / "adapter.safetensors")
    assert adapter.config.dimensions == DIMENSIONS
    # Master weights stay float32 under bf16, and the labels are not trained.
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.params)} == {jnp.dtype("float32")}
    fresh = jaxmix.VMix.init(jax.random.key(0), tiny_pipeline, dict(parse_labels()))
    np.testing.assert_allclose(adapter.params["aes_emb"], fresh.params["aes_emb"], atol=0.05)
    assert np.abs(adapter.params["zero_proj"]["kernel"]).max() > 0
    factors = adapter.lora.parts["unet"]
    assert {name.rpartition(".")[2] for name in factors} >= {"to_q", "conv1", "proj_in"}
    assert all(f["down"].shape[-1] == 2 and float(f["alpha"]) == 2.0 for f in factors.values())
    assert max(np.abs(f["up"]).max() for f in factors.values()) > 0
    control = adapter.bind(tiny_pipeline, "color,light", 1.0)
    changed = adapter.apply_lora(tiny_pipeline)
    assert set(control.values) == {name for name, _ in adapter.config.sites}
    assert changed.params["vae"] is tiny_pipeline.params["vae"]


def parse_labels():
    cfg = parse(vmix.main, ["--config", str(CONFIGS / "vmix_mini.yaml"), "--output_dir", "unused"])
    return cfg.labels.items()


def test_the_run_draws_its_grid_and_logs_every_step(runs):
    (picture,) = (runs / "whole" / "pictures").iterdir()
    assert picture.name.endswith("0000002.png")
    with Image.open(picture) as image:
        # The base, all labels, each of four labels alone, side by side.
        assert image.width >= 6 * 16 and image.height >= 16 and image.width > 4 * image.height
    lines = (runs / "whole" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_stopping_and_resuming_gives_the_same_file_bit_for_bit(runs):
    whole, parts = ((runs / name / "adapter.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


# Pieces of a run, without one ----------------------------------------------------------------------------------------


def pieces(pipe, cfg):
    """Return everything of a step but its numbers: update, state, frozen, batch, key."""
    fresh = vmix.make_adapter(pipe, cfg)
    learns, constants = vmix.split_adapter(fresh, cfg)
    optimizer = make_optimizer(cfg)
    state = TrainState.create(learns, optimizer, ema=cfg.ema_decay > 0)
    loss = make_loss(pipe, cfg, vmix.make_predict(pipe, cfg))
    update = make_update(loss, optimizer, cfg.ema_decay, cfg.gradient_accumulation_steps)
    row = vmix.make_rows(make_tokenize(pipe), fresh.config.dimensions, cfg)
    source = {"image": np.zeros((16, 16, 3), np.uint8), "text": "a cat", "labels": ("color",), "id": "one"}
    made = row(source, np.random.default_rng(0))
    batch = {name: np.stack([x] * cfg.train_batch_size) for name, x in made.items() if name != "id"}
    return fresh, (update, state, {**pipe.params, **constants}, batch, jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [({"rank": 0}, {"vmix"}), ({"value_mixing": False}, {"lora"}), ({"ema_decay": 0.0}, {"vmix", "lora"})],
)
def test_either_part_can_be_left_out(tmp_path, base, tiny_pipeline, changes, parts):
    cfg = shrunk(base, tmp_path, **changes)
    fresh, (update, state, *rest) = pieces(tiny_pipeline, cfg)
    assert set(state.params) == parts
    after, metrics = jax.eval_shape(update, state, *rest)
    assert jax.tree.map(jnp.shape, after.params) == jax.tree.map(jnp.shape, state.params)
    assert metrics["loss"].shape == () and (after.ema is None) == (cfg.ema_decay == 0)
    exported = vmix.join_adapter(fresh, state.averaged, cfg)
    exported.save(tmp_path / "adapter.safetensors")
    again = jaxmix.VMix.load(tmp_path / "adapter.safetensors")
    assert (again.lora is None) == (cfg.rank == 0)
    jax.tree.map(np.testing.assert_array_equal, again.params, exported.params)


def test_the_optimizer_holds_the_adapter_alone_and_the_base_is_not_given_away(tmp_path, base, tiny_pipeline):
    cfg = shrunk(base, tmp_path)
    _, (update, state, frozen, batch, key) = pieces(tiny_pipeline, cfg)
    learnt = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert 2 * learnt <= held < 2 * learnt + 8  # two moments of what learns, and counters
    state_info, *other_info = update.lower(state, frozen, batch, key).args_info[0]
    assert all(leaf.donated for leaf in jax.tree.leaves(state_info))
    assert not any(leaf.donated for leaf in jax.tree.leaves(other_info))
    given = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    kept = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(frozen)}
    assert not given & kept


def test_dropped_captions_and_labels_have_their_shares(tmp_path, base):
    cfg = shrunk(base, tmp_path, caption_dropout_rate=0.2, label_dropout_rate=0.3)
    row = vmix.make_rows(lambda text: {"input_ids": np.asarray([len(text)], np.int32)}, DIMENSIONS, cfg)
    source = {"image": np.zeros((2, 2, 3), np.uint8), "text": "a cat", "labels": ("color", "focus"), "id": "one"}
    made = [row(source, np.random.default_rng(seed)) for seed in range(2000)]
    dropped = np.asarray([r["dropped"] for r in made])
    assert dropped.mean() == pytest.approx(0.2, abs=0.03)
    assert [int(r["input_ids"][0]) for r in made] == [0 if gone else 5 for gone in dropped]
    np.testing.assert_allclose(np.mean([r["present"] for r in made], 0), [0.7, 0, 0.7, 0], atol=0.03)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pretrained_model_name_or_path": ""}, "pretrained_model_name_or_path: not given, expected the base model"),
        ({"pretrained_model_name_or_path": "no/such/folder"}, "no/such/folder"),
        ({"value_mixing": False, "rank": 0}, "value_mixing: found false with rank 0, expected one of them to learn"),
        ({"lora_targets": "to_(q"}, "lora pattern: 'to_(q' is not a regular expression"),
        ({"lora_targets": "attn3"}, "'attn3' matches none of the"),
        ({"label_dropout_rate": 1.5}, "label_dropout_rate: found 1.5, expected 0 to 1"),
        ({"labels": {"colour": ("vivid", "[V]")}}, "labels: found 'colour', expected some of color, light,"),
        ({"scenes": {}}, "train_data_dir, scenes: found neither, expected one of them"),
        ({"train_data_dir": "no/such"}, "train_data_dir, scenes: found both, expected one of them"),
        ({"train_data_dir": "no/such", "scenes": {}}, "no/such"),
        (
            {"labels": {"color": ("vivid",)}},
            "labels: found ('vivid',) for 'color', expected a pair (label, rare token)",
        ),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps: found 3, expected a divisor"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, base, changes, words):
    with pytest.raises(InputError) as e:
        vmix.main(shrunk(base, tmp_path, **changes))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_label_in_the_data_that_the_config_lacks_is_one_line_with_its_row(tmp_path, base):
    folder = make_folder(tmp_path / "pictures", [(16, 16)] * 4)
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "000.png", "text": "a cat", "labels": ["shine"]}) + "\n")
    cfg = shrunk(base, tmp_path / "run", scenes={}, train_data_dir=str(folder), resolution=16)
    with pytest.raises(InputError) as e:
        vmix.main(cfg)
    for words in ("metadata.jsonl", "5", "'shine'", *DIMENSIONS):
        assert words in str(e.value)
    assert "\n" not in str(e.value)
