import json
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmix.types import InputError
from jaxmix.weights import SafetensorsFile, find_weights, load_tree, read_config, read_header


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def model(tmp_path):
    """Return a file of three tensors and the tree it fits."""
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": np.ones((2, 3), "f4"), "a.bias": np.ones(2, "f4"), "n.weight": np.ones(2, "f4")}, path)
    return path, {"a": {"kernel": leaf(3, 2), "bias": leaf(2)}, "n": {"scale": leaf(2)}}


def test_all_differences_are_listed_at_once(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "shape.weight": np.ones((2, 3), "f4"),
        "rank.weight": np.ones((2, 3, 1, 1), "f4"),
        "int.bias": np.ones(2, "i4"),
    }
    tensors |= {"text_model.twice.bias": np.ones(1, "f4"), "twice.bias": np.ones(1, "f4")}
    tensors |= {f"unused.{i}": np.ones(1, "f4") for i in range(10)}
    save_file(tensors, path)
    target = {"shape": {"kernel": leaf(3, 4)}, "rank": {"kernel": leaf(3, 2)}, "int": {"bias": leaf(2)}}
    target |= {"twice": {"bias": leaf(1)}, "missing": {"scale": leaf(5)}}
    with pytest.raises(InputError) as error:
        load_tree(path, target)
    text = one_line(error)
    assert text.startswith(
        f"{path}: does not fit the model: 15 tensors found, 5 expected "
        "(1 missing, 10 unused, 1 wrong shape, 1 wrong rank, 1 wrong dtype, 1 set twice): "
    )
    assert "missing: missing.weight;" in text
    assert "unused: unused.0, unused.1, " in text
    assert "unused.7, ... and 2 more;" in text
    assert "unused.8" not in text
    assert "wrong shape: shape.weight found [2, 3] expected [4, 3];" in text
    assert "wrong rank: rank.weight found [2, 3, 1, 1] expected [2, 3];" in text
    assert "wrong dtype: int.bias found int32 expected float32;" in text
    assert "set twice: twice.bias by " in text


def test_nothing_is_read_before_the_names_agree(model, monkeypatch):
    path, target = model
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(InputError, match="1 missing"):
        load_tree(path, target | {"more": {"bias": leaf(1)}})


def test_position_ids_of_old_text_encoders_are_ignored(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(
        {"text_model.n.weight": np.ones(2, "f4"), "text_model.embeddings.position_ids": np.ones((1, 7), "i8")}, path
    )
    assert load_tree(path, {"n": {"scale": leaf(2)}})["n"]["scale"].tolist() == [1, 1]
    with pytest.raises(InputError, match=r"unused: text_model\.embeddings\.position_ids"):
        load_tree(path, {"n": {"scale": leaf(2)}}, ignore=())


@pytest.mark.parametrize("window", [(), (1, 1)])
def test_old_vae_attention_loads(tmp_path, window):
    draw = np.random.default_rng(0).normal
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    weights = {name: draw(size=(4, 4)).astype("f4") for name in old}
    prefix = "decoder.mid_block.attentions.0."
    tensors = {f"{prefix}{name}.weight": weight.reshape(4, 4, *window) for name, weight in weights.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    target = {"decoder": {"mid_block": {"attentions.0": {new: {"kernel": leaf(4, 4)} for new in old.values()}}}}
    loaded = load_tree(tmp_path, target)["decoder"]["mid_block"]["attentions.0"]
    for name, new in old.items():
        assert np.array_equal(loaded[new]["kernel"], weights[name].T)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_files_are_one_line(model, keep):
    path, target = model
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=f"{path}: (truncated|not a safetensors file): .* expected") as error:
        load_tree(path, target)
    assert f"{path.stat().st_size} bytes" in one_line(error)


def rewrite_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a.bias"].update(dtype="F31"),
        lambda header: header["a.bias"].update(shape=[-2]),
        lambda header: header["a.bias"].update(shape=[3]),
        lambda header: header["a.bias"].pop("data_offsets"),
        lambda header: header["a.weight"].update(data_offsets=[0, 8]),
        lambda header: header.update(b=7),
        lambda header: header.update(__metadata__=[1]),
        lambda header: header.update({"line\nbreak": header["a.weight"]}),
    ],
)
def test_corrupt_headers_are_one_line(model, change):
    path, target = model
    rewrite_header(path, change)
    with pytest.raises(InputError, match=f"{path}: corrupt: ") as error:
        load_tree(path, target)
    one_line(error)


def test_other_files_are_not_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"neither")
    with pytest.raises(InputError, match="not a safetensors file"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe{]")
    with pytest.raises(InputError, match="corrupt: the safetensors header is not valid"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 2) + b"{}" + b"more")
    with pytest.raises(InputError, match="corrupt: 14 bytes, expected 10"):
        read_header(path)


def test_weights_are_found_in_a_folder(tmp_path):
    for name in ("model.fp16.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).touch()
        assert find_weights(tmp_path).name == name


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "sd-v1-5.ckpt", "model.pt"])
def test_pickles_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x80\x04")
    for given in (path, tmp_path):
        with pytest.raises(InputError, match=r"pickle, which can run code .* safe_serialization=True") as error:
            load_tree(given, {})
        assert name in one_line(error)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/nowhere: no such file or folder"):
        find_weights(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no weights: found no files, expected diffusion_pytorch_model or model"):
        find_weights(tmp_path)
    with pytest.raises(InputError, match=r"nowhere\.safetensors: no such file"):
        read_header(tmp_path / "nowhere.safetensors")


def test_bad_configs_are_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        read_config(path)
    with pytest.raises(InputError, match=r"no config\.json or"):
        read_config(tmp_path)
    for content, complaint in [
        (b"{\n,", "not JSON: .* at line 2"),
        (b"[]", "found a JSON list"),
        (b"\xff", "not a UTF-8"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=complaint) as error:
            read_config(tmp_path)
        one_line(error)


MEASURE = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxmix.weights import load_tree

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

path, dtype, layers = sys.argv[1], sys.argv[2], int(sys.argv[3])
kernel = jax.ShapeDtypeStruct((3, 3, 512, 1024), dtype)
tree = {f"layers.{i}": {"conv": {"kernel": kernel}} for i in range(layers)}
tree["tokens"] = {"embedding": jax.ShapeDtypeStruct((20480, 1024), dtype)}
jax.block_until_ready(jnp.ones((256, 256)) @ jnp.ones((256, 256)))
before = peak()
params = jax.block_until_ready(load_tree(path, tree))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's record of peak memory")
@pytest.mark.parametrize(("stored", "wanted"), [("float32", "float32"), ("float16", "float32"), ("float16", "float16")])
def test_peak_memory_stays_near_the_size_of_the_model(tmp_path, stored, wanted):
    # A third of the file is one tensor, as in a text encoder.
    layers = 7 if wanted == "float32" else 17
    tensors = {f"layers.{i}.conv.weight": np.full((1024, 512, 3, 3), i, stored) for i in range(layers)}
    tensors["tokens.weight"] = np.full((20480, 1024), 7, stored)
    save_file(tensors, tmp_path / "model.safetensors")
    size = sum(tensor.size for tensor in tensors.values()) * np.dtype(wanted).itemsize
    assert size > 200e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path), wanted, str(layers)]
    growth = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.9 * size < growth <= 1.3 * size, f"peak is {growth / size:.2f} times the model"
