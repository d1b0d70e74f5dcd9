import numpy as np
import pytest

from jaxmix.weights import names


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("down_blocks.0", "resnets.0", "conv1", "kernel"), "down_blocks.0.resnets.0.conv1.weight"),
        (("mid_block", "attentions.0", "to_out.0", "bias"), "mid_block.attentions.0.to_out.0.bias"),
        (("conv_norm_out", "scale"), "conv_norm_out.weight"),
        (("embeddings.token_embedding", "embedding"), "embeddings.token_embedding.weight"),
        (("values", "queries"), "values.queries"),
    ],
)
def test_module_paths_are_torch_names(path, key):
    assert names.to_torch_key(path) == key


@pytest.mark.parametrize(
    ("shape", "torch_shape"),
    [((3, 7), (7, 3)), ((2, 5, 3, 7), (7, 3, 2, 5)), ((4, 3, 7), (7, 3, 4)), ((7,), (7,))],
)
def test_kernels_change_layout_and_back(shape, torch_shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    path = ("conv", "kernel")
    torch_array = names.to_torch_layout(path, array)
    assert names.to_torch_shape(path, shape) == torch_array.shape == torch_shape
    assert np.array_equal(names.from_torch_layout(path, torch_array), array)


def test_dense_and_convolution_entries_land_where_torch_has_them():
    dense = np.arange(6).reshape(2, 3)
    assert names.to_torch_layout(("d", "kernel"), dense)[2, 1] == dense[1, 2]
    conv = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert names.to_torch_layout(("c", "kernel"), conv)[4, 3, 1, 2] == conv[1, 2, 3, 4]


def test_embeddings_keep_their_layout():
    table = np.arange(6).reshape(2, 3)
    assert names.to_torch_layout(("e", "embedding"), table) is table


def test_flatten_and_unflatten_are_inverse():
    tree = {"a.0": {"b": {"kernel": 1}, "bias": 2}, "c": {"scale": 3}}
    assert names.unflatten(dict(names.flatten(tree))) == tree


@pytest.mark.parametrize(
    ("old", "new"), [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")]
)
def test_old_vae_attention_names_match_the_new(old, new):
    expected = {f"encoder.mid_block.attentions.0.{new}.weight": None}
    assert names.match(f"encoder.mid_block.attentions.0.{old}.weight", expected) == next(iter(expected))
    assert names.match(f"encoder.mid_block.resnets.0.{old}.weight", expected) is None


def test_clip_names_match_with_and_without_prefix():
    assert names.match("text_model.final_layer_norm.bias", {"final_layer_norm.bias": 0}) == "final_layer_norm.bias"
    key = "text_model.final_layer_norm.bias"
    assert names.match("final_layer_norm.bias", {key: 0}) == key


def test_only_attention_weights_lose_their_one_by_one_window():
    key = "encoder.mid_block.attentions.0.to_q.weight"
    assert names.fold_shape(key, (4, 4, 1, 1), (4, 4)) == (4, 4)
    assert names.fold_shape(key, (4, 4, 3, 3), (4, 4)) == (4, 4, 3, 3)
    assert names.fold_shape(key, (4, 4, 1, 1), (4, 4, 1, 1)) == (4, 4, 1, 1)
    assert names.fold_shape("down_blocks.0.attentions.0.proj_in.weight", (4, 4, 1, 1), (4, 4)) == (4, 4, 1, 1)
