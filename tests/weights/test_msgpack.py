import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from jaxmix.models import CLIPTextConfig, CLIPTextModel
from jaxmix.types import CheckpointWarning, InputError
from jaxmix.weights import FlaxTree, load_tree, open_source
from jaxmix.weights.flax_tree import module_path
from jaxmix.weights.names import flatten, to_torch_key


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def draw(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype("f4")


TREE = {
    "down_blocks_0": {"resnets_0": {"conv1": {"kernel": draw(3, 3, 4, 5), "bias": draw(5)}}},
    "mid_block": {"attentions_0": {"query": {"kernel": draw(4, 4)}, "proj_attn": {"kernel": draw(4, 4)}}},
    "time_embedding": {"linear_1": {"kernel": draw(4, 7)}},
    "attn": {"to_out_0": {"bias": draw(3)}},
    "norm": {"scale": draw(6)},
}
TARGET = {
    "down_blocks.0": {"resnets.0": {"conv1": {"kernel": leaf(3, 3, 4, 5), "bias": leaf(5)}}},
    "mid_block": {"attentions.0": {"to_q": {"kernel": leaf(4, 4)}, "to_out.0": {"kernel": leaf(4, 4)}}},
    "time_embedding": {"linear_1": {"kernel": leaf(4, 7)}},
    "attn": {"to_out.0": {"bias": leaf(3)}},
    "norm": {"scale": leaf(6)},
}


def check(loaded, dtype="f4"):
    same = {
        "conv1": (loaded["down_blocks.0"]["resnets.0"]["conv1"], TREE["down_blocks_0"]["resnets_0"]["conv1"]),
        "query": (loaded["mid_block"]["attentions.0"]["to_q"], TREE["mid_block"]["attentions_0"]["query"]),
        "proj_attn": (loaded["mid_block"]["attentions.0"]["to_out.0"], TREE["mid_block"]["attentions_0"]["proj_attn"]),
        "linear_1": (loaded["time_embedding"]["linear_1"], TREE["time_embedding"]["linear_1"]),
        "to_out_0": (loaded["attn"]["to_out.0"], TREE["attn"]["to_out_0"]),
        "norm": (loaded["norm"], TREE["norm"]),
    }
    for name, (ours, theirs) in same.items():
        for key in theirs:
            assert np.array_equal(ours[key], theirs[key].astype(dtype)), (name, key)


@pytest.mark.parametrize("tree", [TREE, {"params": TREE}], ids=["bare", "params"])
def test_msgpack_files_and_live_trees_load(tmp_path, tree):
    (tmp_path / "diffusion_flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    check(load_tree(tmp_path, TARGET))
    check(load_tree(FlaxTree(tree, "live"), TARGET))


def test_mixed_bfloat16_files_load_when_a_precision_is_given(tmp_path):
    tree = dict(TREE, norm={"scale": jnp.asarray(TREE["norm"]["scale"], jnp.bfloat16)})
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    check(load_tree(tmp_path, TARGET, jnp.bfloat16), jnp.bfloat16)
    said = r"mixed precisions: found 6 float32 .* 1 bfloat16 \(such as norm\.weight\), loaded as float32"
    with pytest.warns(CheckpointWarning, match=said):
        assert load_tree(tmp_path, TARGET, "auto")["norm"]["scale"].dtype == jnp.float32


def test_arrays_that_flax_writes_in_pieces_load(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    data = serialization.to_bytes(TREE)
    assert data.count(b"__msgpack_chunked_array__") == 2
    (tmp_path / "flax_model.msgpack").write_bytes(data)
    check(load_tree(tmp_path, TARGET))


def test_every_cut_of_a_file_is_one_line(tmp_path):
    data = serialization.to_bytes(TREE)
    path = tmp_path / "flax_model.msgpack"
    for keep in (0, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(InputError, match=f"{path}: truncated: {keep} bytes") as error:
            open_source(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data",
    [b"<xml>", b"\x80\x04.", serialization.to_bytes(TREE) + b"x", serialization.msgpack_serialize({"a": {"b": 1}})],
)
def test_other_files_are_not_flax_weights(tmp_path, data):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not a Flax msgpack file of weights: ") as error:
        open_source(path)
    assert "\n" not in str(error.value)


def test_differences_are_listed_and_nan_is_named(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(serialization.to_bytes(dict(TREE, norm={"scale": np.full(6, np.nan, "f4")})))
    with pytest.raises(InputError, match=r"tensor 'norm\.weight' has 6 NaN or infinite values of 6"):
        load_tree(path, TARGET)
    with pytest.raises(InputError, match=r"1 missing, 1 unused\): missing: more\.weight; unused: norm\.weight"):
        load_tree(path, {key: value for key, value in TARGET.items() if key != "norm"} | {"more": {"scale": leaf(1)}})


def test_only_list_indices_lose_their_underscore():
    assert module_path(("up_blocks_12", "net_0", "kernel")) == ("up_blocks.12", "net.0", "kernel")
    assert module_path(("add_embedding", "linear_2", "kernel_0")) == ("add_embedding", "linear_2", "kernel_0")
    assert module_path(("layers", "3", "layer_norm1", "scale")) == ("layers", "3", "layer_norm1", "scale")


def test_a_live_tree_of_numpy_arrays_is_copied():
    tree = {"norm": {"scale": np.ones(2**16, "f4")}}
    loaded = load_tree(FlaxTree(tree, "live"), {"norm": {"scale": leaf(2**16)}})
    tree["norm"]["scale"][:] = 2
    assert float(loaded["norm"]["scale"].max()) == 1
    with pytest.raises(InputError, match=r"live: norm\.scale is a list, expected an array"):
        FlaxTree({"norm": {"scale": [1.0]}}, "live")


@pytest.mark.parametrize("projection", [False, True])
def test_the_flax_layout_of_clip_loads(tmp_path, projection):
    name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"architectures": [name], "vocab_size": 11, "projection_dim": 4, **sizes}
    target = CLIPTextModel(CLIPTextConfig.from_dict(config)).abstract_params()
    # transformers' Flax: nested by every dot of the torch name, with Linen's leaves.
    tree, expected = {}, {}
    for path, shape in flatten(target):
        value = draw(*shape.shape)
        *modules, _ = to_torch_key(path).split(".")
        node = tree
        for module in modules if modules[0] in ("text_model", "text_projection") else ["text_model", *modules]:
            node = node.setdefault(module, {})
        node[path[-1]], expected[path] = value, value
    assert set(tree) == ({"text_model", "text_projection"} if projection else {"text_model"})
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    loaded = dict(flatten(load_tree(tmp_path, target)))
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[path], expected[path]) for path in expected)
