import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmix.types import InputError
from jaxmix.weights import load_tree, open_source

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TARGET = {"a": {"kernel": leaf(3, 2), "bias": leaf(2)}, "n": {"scale": leaf(2)}}
TENSORS = {
    "a.weight": np.arange(6, dtype="f4").reshape(2, 3),
    "a.bias": np.arange(2, dtype="f4"),
    "n.weight": np.full(2, 7, "f4"),
}
SHARDS = {"one.safetensors": ["a.weight", "n.weight"], "two.safetensors": ["a.bias"]}


def write(folder, shards=SHARDS, weight_map=None, index=INDEX):
    for name, keys in shards.items():
        save_file({key: TENSORS[key] for key in keys}, folder / name)
    if weight_map is None:
        weight_map = {key: name for name, keys in shards.items() for key in keys}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "index", [INDEX, "model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.fp16.json"]
)
def test_shards_load_as_one_model(tmp_path, index):
    write(tmp_path, index=index)
    for path in (tmp_path, tmp_path / index):
        loaded = load_tree(path, TARGET)
        assert np.array_equal(loaded["a"]["kernel"], TENSORS["a.weight"].T)
        assert np.array_equal(loaded["a"]["bias"], TENSORS["a.bias"])
        assert np.array_equal(loaded["n"]["scale"], TENSORS["n.weight"])


def test_one_whole_file_is_preferred_to_shards(tmp_path):
    write(tmp_path)
    save_file({key: value + 1 for key, value in TENSORS.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert load_tree(tmp_path, TARGET)["n"]["scale"].tolist() == [8, 8]


def one_line(folder):
    with pytest.raises(InputError) as error:
        open_source(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder / INDEX))
    return str(error.value)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "one.safetensors").unlink()
    assert "the shard one.safetensors with 2 tensors is missing" in one_line(tmp_path)


def test_a_key_in_two_shards_is_named(tmp_path):
    write(tmp_path, SHARDS | {"two.safetensors": ["a.bias", "n.weight"]})
    assert "'n.weight' is in two shards, one.safetensors and two.safetensors" in one_line(tmp_path)


def test_a_key_outside_of_its_shard_is_named(tmp_path):
    found = {"a.weight": "one.safetensors", "n.weight": "one.safetensors"}
    write(tmp_path, weight_map=found | {"a.bias": "two.safetensors", "b.bias": "two.safetensors"})
    assert "'b.bias' is in no shard, expected it in two.safetensors" in one_line(tmp_path)
    write(tmp_path, weight_map=found | {"a.bias": "two.safetensors", "n.weight": "two.safetensors"})
    assert "'n.weight' is in one.safetensors, expected it in two.safetensors" in one_line(tmp_path)


def test_a_key_that_the_index_forgets_is_named(tmp_path):
    write(tmp_path, weight_map={"a.weight": "one.safetensors", "a.bias": "two.safetensors"})
    assert "1 tensors in the shards are not in the index: n.weight" in one_line(tmp_path)


@pytest.mark.parametrize("shard", ["../one.safetensors", "/one.safetensors", "one.bin", 7])
def test_an_index_reaches_only_safetensors_beside_it(tmp_path, shard):
    write(tmp_path, weight_map={"a.weight": shard})
    assert f"weight_map has {shard!r} for 'a.weight'" in one_line(tmp_path)


@pytest.mark.parametrize(("text", "complaint"), [("{", "not JSON"), ("[]", "no weight_map"), ("{}", "no weight_map")])
def test_a_damaged_index_is_one_line(tmp_path, text, complaint):
    (tmp_path / INDEX).write_text(text)
    assert complaint in one_line(tmp_path)


def test_a_damaged_tensor_is_named_with_its_shard(tmp_path):
    write(tmp_path)
    save_file({"a.bias": np.asarray([1, np.nan], "f4")}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match=r"two\.safetensors: tensor 'a\.bias' has 1 NaN or infinite values of 2"):
        load_tree(tmp_path, TARGET)
