import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmix.types import CheckpointWarning, InputError
from jaxmix.weights import load_tree
from jaxmix.weights.finite import all_finite

FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 65_535, 65_536, 199_999])
def test_one_bad_number_is_found_anywhere(dtype, place):
    array = np.full((2, 100_000), -ml_dtypes.finfo(dtype).max, dtype)
    assert all_finite(array)
    bad = [np.nan] if dtype == ml_dtypes.float8_e4m3fn else [np.nan, np.inf, -np.inf]  # which has no infinity
    for value in bad:
        array.reshape(-1)[place] = value
        assert not all_finite(array)


def test_integers_and_empty_arrays_are_finite():
    assert all_finite(np.full(3, -1, np.int32))
    assert all_finite(np.ones(3, bool))
    assert all_finite(np.empty((0, 3), np.float32))
    assert all_finite(np.asarray(1, np.float16))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [None, np.float16, "auto"])
def test_bad_numbers_are_named_with_file_and_key(tmp_path, value, dtype):
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": np.asarray([[1, value], [value, 2]], "f4"), "b.bias": np.ones(1, "f4")}, path)
    target = {"a": {"kernel": np.zeros((2, 2), "f4")}, "b": {"bias": np.zeros(1, "f4")}}
    with pytest.raises(InputError, match=f"^{path}: tensor 'a.weight' has 2 NaN or infinite values of 4, expected"):
        load_tree(path, target, dtype)


def test_numbers_too_large_for_the_precision_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"b.bias": np.asarray([1, -70_000], "f4")}, path)
    target = {"b": {"bias": np.zeros(2, "f4")}}
    with pytest.raises(InputError, match=r"'b\.bias' has values up to 7e\+04, which float16 cannot hold"):
        load_tree(path, target, np.float16)
    assert load_tree(path, target, ml_dtypes.bfloat16)["b"]["bias"][1] == ml_dtypes.bfloat16(-70_000)


def test_auto_keeps_the_precision_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"b.bias": np.ones(2, "f2"), "b.steps": np.ones(2, "i4")}, path)
    target = {"b": {"bias": np.zeros(2, "f4"), "steps": np.zeros(2, "i4")}}
    loaded = load_tree(path, target, "auto")["b"]
    assert loaded["bias"].dtype == np.float16
    assert loaded["steps"].dtype == np.int32
    save_file({"b.bias": np.ones(2, "f8"), "b.steps": np.ones(2, "i4")}, path)
    with pytest.warns(CheckpointWarning, match=r"found 1 float64 \(such as b\.bias\), loaded as float32"):
        assert load_tree(path, target, "auto")["b"]["bias"].dtype == np.float32
