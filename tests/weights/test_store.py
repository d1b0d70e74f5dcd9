import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from jaxmix.weights import load_tree, read_config, read_header, save_tree, write_config


def params_of(seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed).normal
    return {
        "down_blocks.0": {
            "conv1": {"kernel": draw(size=(3, 3, 4, 5)).astype(dtype), "bias": draw(size=5).astype(dtype)}
        },
        "norm": {"scale": draw(size=6).astype(dtype), "bias": draw(size=6).astype(dtype)},
        "proj": {"kernel": draw(size=(4, 7)).astype(dtype)},
        "tokens": {"embedding": draw(size=(9, 4)).astype(dtype)},
    }


def shapes_of(params):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    params = params_of(dtype=dtype)
    save_tree(params, tmp_path / "model.safetensors")
    loaded = load_tree(tmp_path, shapes_of(params))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
        assert isinstance(theirs, jax.Array)
        assert theirs.dtype == ours.dtype
        assert np.asarray(theirs).tobytes() == ours.tobytes()


def test_file_holds_torch_names_and_layouts(tmp_path):
    params = params_of()
    save_tree(jax.tree.map(jnp.asarray, params), tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert {name.rpartition(".")[0] for name in stored} == {"down_blocks.0.conv1", "norm", "proj", "tokens"}
    assert {name.rpartition(".")[2] for name in stored} == {"weight", "bias"}
    assert np.array_equal(stored["proj.weight"], params["proj"]["kernel"].T)
    assert np.array_equal(
        stored["down_blocks.0.conv1.weight"], params["down_blocks.0"]["conv1"]["kernel"].transpose(3, 2, 0, 1)
    )
    assert np.array_equal(stored["tokens.weight"], params["tokens"]["embedding"])


def test_casting_on_save_and_on_load(tmp_path):
    params = params_of() | {"counter": {"steps": np.arange(3, dtype=np.int32)}}
    path = tmp_path / "model.safetensors"
    save_tree(params, path, dtype=jnp.bfloat16)
    entries = read_header(path).entries
    assert entries["proj.weight"].dtype == jnp.bfloat16
    assert entries["counter.steps"].dtype == np.int32
    loaded = load_tree(path, shapes_of(params), dtype=jnp.float16)
    assert loaded["proj"]["kernel"].dtype == jnp.float16
    assert loaded["counter"]["steps"].tolist() == [0, 1, 2]
    expected = params["proj"]["kernel"].astype(ml_dtypes.bfloat16).astype(np.float16)
    assert np.array_equal(loaded["proj"]["kernel"], expected)


def test_metadata_has_the_format_and_ours(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_tree(params_of(), path, metadata={"config": json.dumps({"rank": 4})})
    assert read_header(path).metadata == {"format": "pt", "config": '{"rank": 4}'}
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt", "config": '{"rank": 4}'}
    with pytest.raises(ValueError, match="metadata 'rank' is 4"):
        save_tree(params_of(), path, metadata={"rank": 4})


class Broken:
    shape, dtype = (2,), np.dtype(np.float32)

    def __array__(self, *args, **kwargs):
        raise RuntimeError("the device is gone")


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tree(params_of(), path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="the device is gone"):
        save_tree(params_of(1) | {"zz": {"bias": Broken()}}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_two_leaves_of_one_torch_name_are_refused(tmp_path):
    leaf = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"norm\.embedding and norm\.scale both have the torch name norm\.weight"):
        save_tree({"norm": {"scale": leaf, "embedding": leaf}}, tmp_path / "model.safetensors")


def test_configs_round_trip(tmp_path):
    config = {"_class_name": "UNet2DConditionModel", "sample_size": 8}
    write_config(config, tmp_path / "unet" / "config.json")
    assert read_config(tmp_path / "unet") == read_config(tmp_path / "unet" / "config.json") == config
