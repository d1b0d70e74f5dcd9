"""LoRA files: every naming that is in circulation is read, both that we write come back, the rest is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmix import CheckpointWarning, InputError, LoRA, apply_loras
from jaxmix.models import UNet2DConditionModel, UNetConfig
from jaxmix.models.unet import subtree
from jaxmix.testing import TINY_SDXL_UNET
from jaxmix.tuning import lora as low_rank
from jaxmix.weights import read_header
from jaxmix.weights.lora_files import METADATA, read_lora
from jaxmix.weights.lora_write import write_lora

UNET_CONFIG = UNetConfig.from_dict(TINY_SDXL_UNET).to_dict()
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
IN = "down_blocks.0.attentions.0.proj_in"  # a 1x1 convolution
CONV = "mid_block.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
FC = "text_model.encoder.layers.0.mlp.fc1"


def factors(shape, rank, seed=0):
    rng = np.random.default_rng(seed)
    *space, i, o = shape
    return {
        "down": rng.standard_normal((*space, i, rank)).astype("f4"),
        "up": rng.standard_normal((*[1] * len(space), rank, o)).astype("f4"),
        "alpha": np.float32(rank),
    }


def as_torch(f):
    """Return the two factors in torch's layout."""
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}
    return tuple(np.ascontiguousarray(f[role].transpose(axes[f[role].ndim])) for role in ("down", "up"))


def file_of(tmp_path, tensors, metadata=None):
    path = tmp_path / "lora.safetensors"
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def lora(tiny_pipeline):
    """Return dense layers, 1x1 and 3x3 convolutions and a text encoder, with ranks and alphas that differ."""
    parts = {"unet": {}, "text_encoder": {}}
    for i, (part, module, rank, alpha) in enumerate(
        [
            ("unet", Q, 3, 1.5),
            ("unet", OUT, 3, 1.5),
            ("unet", IN, 2, 2.0),
            ("unet", CONV, 4, 0.1),
            ("text_encoder", TEXT, 2, 1.0),
            ("text_encoder", FC, 5, 8.0),
        ]
    ):
        shape = low_rank.targets(tiny_pipeline.params[part])[module][1].shape
        parts[part][module] = factors(shape, rank, i) | {"alpha": np.float32(alpha)}
    return LoRA(parts)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.parts, b.parts)


@pytest.mark.parametrize("names", [("diffusers", "kohya"), ("kohya", "diffusers")])
def test_a_lora_comes_back_from_both_formats_bit_for_bit(tiny_pipeline, lora, tmp_path, names):
    path, pipe, now = tmp_path / "lora.safetensors", tiny_pipeline, lora
    for name in names:
        now.save(path, pipe, name)
        now = LoRA.load(path, pipe)
        assert_same(now, lora)
        assert {x.dtype for x in jax.tree.leaves(now.parts)} == {jnp.dtype(jnp.float32)}


def test_half_precision_files_are_read_in_float32(tiny_pipeline, lora, tmp_path):
    for dtype in (jnp.float16, jnp.bfloat16):
        lora.save(tmp_path / "half.safetensors", dtype=dtype, format="kohya")
        got = LoRA.load(tmp_path / "half.safetensors", tiny_pipeline).parts["unet"][CONV]
        np.testing.assert_array_equal(got["down"], lora.parts["unet"][CONV]["down"].astype(dtype).astype("f4"))
        assert float(got["alpha"]) == np.float32(0.1)


def test_diffusers_names_layouts_and_metadata(lora, tmp_path):
    path = tmp_path / "lora.safetensors"
    lora.save(path)
    found = load_file(path)
    assert found[f"unet.{Q}.lora_A.weight"].shape == (3, 16)
    assert found[f"unet.{CONV}.lora_A.weight"].shape == (4, 32, 3, 3)
    assert found[f"unet.{CONV}.lora_B.weight"].shape == (32, 4, 1, 1)
    assert f"text_encoder.{TEXT}.lora_linear_layer.down.weight" in found
    config = json.loads(read_header(path).metadata[METADATA])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (3, 1.5)
    assert config["unet.rank_pattern"] == {IN: 2, CONV: 4}
    # without the prefix, which transformers 5 left out: a pattern of PEFT's may leave out what stands in front
    assert config["text_encoder.target_modules"] == sorted(name.removeprefix("text_model.") for name in (FC, TEXT))


def test_kohya_names_layouts_and_alphas(lora, tmp_path):
    lora.save(tmp_path / "lora.safetensors", format="kohya")
    found = load_file(tmp_path / "lora.safetensors")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert found[f"{name}.lora_down.weight"].shape == (3, 16)
    assert found[f"{name}.lora_up.weight"].shape == (16, 3)
    assert found[f"{name}.alpha"].shape == () and found[f"{name}.alpha"] == 1.5
    assert found["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape == (2, 16, 1, 1)
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in found


UNET_NAMES = {
    "peft": (f"unet.{OUT}.lora_A.weight", f"unet.{OUT}.lora_B.weight"),
    "peft with a name": (f"unet.{OUT}.lora_A.default_0.weight", f"unet.{OUT}.lora_B.default_0.weight"),
    "peft alone": (f"base_model.model.{OUT}.lora_A.weight", f"base_model.model.{OUT}.lora_B.weight"),
    "diffusers 0.20": (f"unet.{OUT}.lora.down.weight", f"unet.{OUT}.lora.up.weight"),
    "processors": tuple(
        f"unet.{OUT.removesuffix('.to_out.0')}.processor.to_out_lora.{end}.weight" for end in ("down", "up")
    ),
    "processors alone": tuple(
        f"{OUT.removesuffix('.to_out.0')}.processor.to_out_lora.{end}.weight" for end in ("down", "up")
    ),
    "kohya": tuple(f"lora_unet_{OUT.replace('.', '_')}.lora_{end}.weight" for end in ("down", "up")),
    "original": tuple(
        f"lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0.lora_{end}.weight" for end in ("down", "up")
    ),
    "original with dots": tuple(
        f"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.lora_{end}.weight" for end in "AB"
    ),
}


@pytest.mark.parametrize("keys", UNET_NAMES.values(), ids=UNET_NAMES)
def test_every_naming_of_the_unet_is_read(tiny_pipeline, tmp_path, keys):
    f = factors((16, 16), 3)
    got = LoRA.load(file_of(tmp_path, dict(zip(keys, as_torch(f), strict=True))), tiny_pipeline)
    assert_same(got, LoRA({"unet": {OUT: f}}))  # without an alpha it is the rank


TEXT_NAMES = {
    "comfy": f"text_encoders.clip_l.transformer.{TEXT}.lora_{{}}.weight",
    "comfy without its prefix": f"clip_l.transformer.{TEXT}.lora_{{}}.weight",
    "wrapped": f"lora_te_wrapped_transformer_{TEXT.replace('.', '_')}.lora_{{}}.weight",
    "peft alone": f"base_model.model.{TEXT}.lora_{{}}.weight",
    "peft alone, transformers 5": f"base_model.model.{TEXT.removeprefix('text_model.')}.lora_{{}}.weight",
    "no prefix": f"{TEXT}.lora_{{}}.weight",
    "lycoris": f"lycoris_{TEXT.replace('.', '_')}.lora_{{}}.weight",
    "peft": f"text_encoder.{TEXT}.lora_{{}}.weight",
    "transformers 5": f"text_encoder.{TEXT.removeprefix('text_model.')}.lora_{{}}.weight",
    "diffusers": f"text_encoder.{TEXT}.lora_linear_layer.{{}}.weight",
    "old diffusers": f"text_encoder.{TEXT.removesuffix('q_proj')}to_q_lora.{{}}.weight",
    "kohya": f"lora_te_{TEXT.replace('.', '_')}.lora_{{}}.weight",
    "kohya for SDXL": f"lora_te1_{TEXT.replace('.', '_')}.lora_{{}}.weight",
}


@pytest.mark.parametrize("key", TEXT_NAMES.values(), ids=TEXT_NAMES)
def test_every_naming_of_the_text_encoder_is_read(tiny_pipeline, tmp_path, key):
    f = factors((16, 16), 2)
    ends = ("A", "B") if "lora_{}.weight" in key and key.startswith(("text", "base")) else ("down", "up")
    tensors = dict(zip(map(key.format, ends), as_torch(f), strict=True))
    assert_same(LoRA.load(file_of(tmp_path, tensors), tiny_pipeline), LoRA({"text_encoder": {TEXT: f}}))


def test_the_original_layout_of_sdxl_names_every_module_and_comes_back(tmp_path):
    unet = UNet2DConditionModel(UNetConfig.from_dict(TINY_SDXL_UNET))
    shapes = {
        "unet": {module: leaf.shape for module, (_, leaf) in low_rank.targets(unet.abstract_params()).items()},
        "text_encoder": {TEXT: (16, 16)},
        "text_encoder_2": {"text_projection": (16, 8)},
    }
    parts = {
        part: {module: factors(shape, 1, i) for i, (module, shape) in enumerate(modules.items())}
        for part, modules in shapes.items()
    }
    write_lora(tmp_path / "lora.safetensors", parts, "kohya", original_unet=unet.config.to_dict())
    keys = {key.split(".")[0] for key in load_file(tmp_path / "lora.safetensors")}
    blocks = {key.split("_blocks_")[0].split("_block_")[0] for key in keys if "block" in key and "unet" in key}
    assert blocks == {"lora_unet_input", "lora_unet_middle", "lora_unet_output"}
    assert keys >= {
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k",
        "lora_unet_input_blocks_2_0_op",
        "lora_unet_output_blocks_1_2_conv",
        "lora_unet_middle_block_0_in_layers_2",
        "lora_unet_label_emb_0_2",
        "lora_unet_out_2",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_projection",
    }
    leaves = {part: {module: {"kernel": shape} for module, shape in held.items()} for part, held in shapes.items()}
    got = read_lora(tmp_path / "lora.safetensors", leaves, unet.config.to_dict())
    jax.tree.map(np.testing.assert_array_equal, got, parts)


def test_dense_and_pointwise_factors_are_reshaped_to_the_module(tiny_pipeline, tmp_path):
    """Some files keep dense layers as 1x1 convolutions, and the projections of SD 1.5 as dense layers."""
    dense, pointwise = factors((16, 16), 3), factors((1, 1, 16, 16), 3)
    q, p = as_torch(dense), as_torch(pointwise)
    tensors = {
        f"unet.{Q}.lora_A.weight": q[0][..., None, None],
        f"unet.{Q}.lora_B.weight": q[1][..., None, None],
        f"unet.{IN}.lora_A.weight": p[0][..., 0, 0],
        f"unet.{IN}.lora_B.weight": p[1][..., 0, 0],
    }
    got = LoRA.load(file_of(tmp_path, tensors), tiny_pipeline)
    assert_same(got, LoRA({"unet": {Q: dense, IN: pointwise}}))


def pair(module=Q, shape=(16, 16), rank=4):
    down, up = as_torch(factors(shape, rank))
    return {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"unet.lora_alpha": 7}, 7),
        ({"unet.lora_alpha": 7, "unet.alpha_pattern": {"attn1.to_q": 2.5}}, 2.5),
        ({"unet.lora_alpha": 7, "unet.alpha_pattern": {"^down_blocks.*to_q": 3}}, 3),
        ({"unet.lora_alpha": 7, "unet.alpha_pattern": {"attn1": 3}}, 7),
        ({"unet.lora_alpha": 0}, 0),
        ({"unet.lora_alpha": None}, 4),
        ({"unet.lora_alpha": 7, "unet.use_rslora": True}, 14),  # 7 / sqrt(4) = 14 / 4
        ({"text_encoder.lora_alpha": 7}, 4),
    ],
)
def test_alpha_of_peft_metadata(tiny_pipeline, tmp_path, config, alpha):
    path = file_of(tmp_path, pair(), {METADATA: json.dumps(config)})
    assert float(LoRA.load(path, tiny_pipeline).parts["unet"][Q]["alpha"]) == alpha


def test_a_folder_of_peft_is_read_with_its_config(tiny_pipeline, tmp_path):
    tensors = {key.replace("unet.", "base_model.model."): x for key, x in pair().items()}
    file_of(tmp_path, tensors).rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 9}))
    assert float(LoRA.load(tmp_path, tiny_pipeline).parts["unet"][Q]["alpha"]) == 9


def test_a_folder_needs_a_name_where_it_holds_several_files(tiny_pipeline, lora, tmp_path):
    for name in ("a", "b"):
        lora.save(tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"found a\.safetensors, b\.safetensors, expected one LoRA file"):
        LoRA.load(tmp_path, tiny_pipeline)
    assert_same(LoRA.load(tmp_path, tiny_pipeline, "b.safetensors"), lora)
    lora.save(tmp_path / "pytorch_lora_weights.safetensors")
    assert_same(LoRA.load(tmp_path, tiny_pipeline), lora)


KOHYA = f"lora_unet_{Q.replace('.', '_')}"
Z = np.zeros((4, 4), "f4")
BAD = {
    "no tensors of a LoRA": ({"unet.conv_in.weight": Z}, r"no LoRA in it: found 1 tensors, such as unet\.conv_in"),
    "nothing at all": ({}, "no LoRA in it: found 0 tensors"),
    "textual inversions alone": ({"bundle_emb.x.clip_l": Z}, "no LoRA in it: found 0 tensors"),
    "half of a Tucker decomposition": ({f"{KOHYA}.lora_mid.weight": Z}, r"unet \S+ has mid but no down and no up"),
    "dora alone": ({f"{KOHYA}.dora_scale": Z}, "has dora_scale but no down and no up"),
    "half of LoHa": ({f"{KOHYA}.hada_w1_a": Z}, "has hada_w1_a but no hada_w1_b and no hada_w2_a and no hada_w2_b"),
    "half of LoKr": ({f"{KOHYA}.lokr_w1": Z}, "has lokr_w1 but no lokr_w2"),
    "two forms": (pair() | {f"{KOHYA}.diff": Z}, "expected one form of LoRA"),
    "a difference of another base": ({f"{KOHYA}.diff": Z}, r"found diff \[4, 4\] for weights \[16, 16\]"),
    "oft": ({f"{KOHYA}.oft_blocks": Z}, "1 of 1 tensors are OFT"),
    "glora": (dict.fromkeys((f"{KOHYA}.{x}.weight" for x in ("a1", "a2", "b1", "b2")), Z), "4 of 4 tensors are GLoRA"),
    "ia3": ({f"{KOHYA}.weight": Z, f"{KOHYA}.on_input": Z}, r"are \(IA\)\^3"),
    "several alphas": (
        pair() | {f"{KOHYA}.alpha": np.arange(3, dtype="f4")},
        "alpha has 3 values, expected one number",
    ),
    "no alpha at all": (pair() | {f"{KOHYA}.alpha": np.zeros(0, "f4")}, "alpha has 0 values, expected one number"),
    "another base alone": (
        pair("down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"),
        rf"1 of 1 modules are not in this model: unet down_blocks\.7\S* \(near: {Q}\); a LoRA for another base\?",
    ),
    "another pipeline": (
        {f"lora_te2_text_projection.lora_{end}.weight": Z for end in ("down", "up")},
        "1 of 1 modules are not in this model: text_encoder_2 text_projection; a LoRA for another base",
    ),
    "other shapes": (
        pair(shape=(24, 16)),
        rf"1 of 1 modules have other shapes than this model: unet {Q} found down \[4, 24\] up \[16, 4\] for weights "
        r"\[16, 16\]; a LoRA for another base",
    ),
    "another extent": (pair(CONV, (1, 1, 32, 32)), r"found down \[4, 32, 1, 1\] up \[32, 4, 1, 1\] for weights"),
    "other ranks": (
        {f"unet.{Q}.lora_A.weight": np.zeros((3, 16), "f4"), f"unet.{Q}.lora_B.weight": np.zeros((16, 4), "f4")},
        r"found down \[3, 16\] up \[16, 4\]",
    ),
    "half a pair": ({f"unet.{Q}.lora_A.weight": np.zeros((3, 16), "f4")}, rf"unet {Q} has down but no up"),
    "alpha alone": ({f"{KOHYA}.alpha": np.float32(1)}, "has alpha but no down and no up"),
    "twice": (pair() | {f"{KOHYA}.lora_down.weight": np.zeros((3, 16), "f4")}, rf"unet {Q} is set twice, by "),
    "not finite": (
        {key: np.full_like(x, np.nan) for key, x in pair().items()},
        rf"tensor 'unet\.{Q}\.lora_A\.weight' has NaN or infinite values",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=BAD)
def test_a_file_that_is_no_lora_for_this_model_is_refused_in_one_line(tiny_pipeline, tmp_path, tensors, message):
    path = file_of(tmp_path, tensors)
    with pytest.raises(InputError, match=message) as raised:
        LoRA.load(path, tiny_pipeline)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_many_strange_modules_are_counted(tiny_pipeline, tmp_path):
    tensors = {key: x for i in range(20, 30) for key, x in pair(Q.replace("blocks.0.att", f"blocks.{i}.att")).items()}
    with pytest.raises(InputError, match=r"10 of 10 modules are not in this model: .*, \.\.\. and 7 more; a LoRA"):
        LoRA.load(file_of(tmp_path, tensors), tiny_pipeline)


def test_bad_metadata_and_paths_are_refused(tiny_pipeline, lora, tmp_path):
    with pytest.raises(InputError, match=f"the metadata {METADATA} is not JSON"):
        LoRA.load(file_of(tmp_path, pair(), {METADATA: "{"}), tiny_pipeline)
    with pytest.raises(InputError, match="no such file"):
        LoRA.load(tmp_path / "none.safetensors", tiny_pipeline)
    (tmp_path / "pickle.pt").touch()
    with pytest.raises(InputError, match="found a Python pickle"):
        LoRA.load(tmp_path / "pickle.pt", tiny_pipeline)
    with pytest.raises(InputError, match=r"expected a file that ends in \.safetensors"):
        lora.save(tmp_path / "lora.bin")
    with pytest.raises(InputError, match="lora format: found 'peft', expected one of diffusers, kohya"):
        lora.save(tmp_path / "x.safetensors", format="peft")
    with pytest.raises(InputError, match="the LoRA has no modules"):
        LoRA({"unet": {}}).save(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="1 of its 1 modules are not in this model"):
        LoRA({"unet": {"nowhere": factors((4, 4), 1)}}).save(tmp_path / "x.safetensors", tiny_pipeline)


def loha(o=16, i=16, k=1, r=2):
    shapes = {"hada_w1_a": (o, r), "hada_w1_b": (r, i * k), "hada_w2_a": (o, r), "hada_w2_b": (r, i * k)}
    return {
        role: np.random.default_rng(n).standard_normal(s).astype("f4") for n, (role, s) in enumerate(shapes.items())
    }


def numbers(*shape):
    return np.random.default_rng([9, *shape]).standard_normal(shape).astype("f4")


NORM, CONV_KEY = "down_blocks.0.attentions.0.transformer_blocks.0.norm1", f"lora_unet_{CONV.replace('.', '_')}"
FORMS = {
    "loha": ({f"{KOHYA}.{role}": x for role, x in loha().items()} | {f"{KOHYA}.alpha": np.float32(3)}, {"unet": [Q]}),
    "loha of peft": ({f"base_model.model.{Q}.{role}.default": x for role, x in loha().items()}, {"unet": [Q]}),
    "loha of a convolution": ({f"{CONV_KEY}.{role}": x for role, x in loha(32, 32, 9).items()}, {"unet": [CONV]}),
    "lokr": (
        {f"{CONV_KEY}.lokr_w1": numbers(4, 4), f"{CONV_KEY}.lokr_w2": numbers(8, 8, 3, 3), f"{CONV_KEY}.alpha": Z[0]},
        {"unet": [CONV]},
    ),
    "lokr in halves": (
        {
            f"{KOHYA}.lokr_w1_a": numbers(4, 2), f"{KOHYA}.lokr_w1_b": numbers(2, 4),
            f"{KOHYA}.lokr_w2": numbers(4, 4), f"{KOHYA}.alpha": np.full((1, 1), 5, "f4"),
        },
        {"unet": [Q]},
    ),
    "locon": (
        {
            f"{CONV_KEY}.lora_down.weight": numbers(3, 32, 1, 1), f"{CONV_KEY}.lora_mid.weight": numbers(2, 3, 3, 3),
            f"{CONV_KEY}.lora_up.weight": numbers(32, 2, 1, 1),
        },
        {"unet": [CONV]},
    ),
    "dora": (pair() | {f"{KOHYA}.dora_scale": numbers(16, 1)}, {"unet": [Q]}),
    "dora by inputs": (pair() | {f"{KOHYA}.dora_scale": numbers(1, 16)}, {"unet": [Q]}),
    "dora of peft": (
        pair(CONV, (3, 3, 32, 32)) | {f"unet.{CONV}.lora_magnitude_vector.weight": numbers(1, 32, 1, 1)},
        {"unet": [CONV]},
    ),
    "full": ({f"{KOHYA}.diff": numbers(16, 16), f"lora_te_{FC.replace('.', '_')}.diff_b": numbers(32)},
             {"unet": [Q], "text_encoder": [FC]}),
    "norms": ({f"lora_unet_{NORM.replace('.', '_')}.{x}_norm": numbers(16) for x in "wb"}, {"unet": [NORM]}),
    "biases": (pair(OUT) | {f"unet.{OUT}.lora_B.bias": numbers(16)}, {"unet": [OUT]}),
    "a table": (
        {"lora_te_text_model_embeddings_position_embedding.diff": numbers(32, 16)},
        {"text_encoder": ["text_model.embeddings.position_embedding"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "modules"), FORMS.values(), ids=FORMS)
def test_every_form_is_read_merged_and_written_back_bit_for_bit(tiny_pipeline, tmp_path, tensors, modules):
    lora = LoRA.load(file_of(tmp_path, tensors), tiny_pipeline)
    assert {part: list(held) for part, held in lora.parts.items()} == modules
    merged = apply_loras(tiny_pipeline, [(lora, 0.5)]).params
    for part, held in modules.items():
        for module in held:
            before, after = (subtree(p[part], module) for p in (tiny_pipeline.params, merged))
            assert any(
                np.abs(np.asarray(a) - b).max() > 1e-4
                for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
            )
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), p) for p in (tiny_pipeline.params, merged)]
    assert shapes[0] == shapes[1]  # so the programs that take them are the same
    jax.tree.map(np.testing.assert_array_equal, apply_loras(tiny_pipeline, [(lora, 0)]).params, tiny_pipeline.params)
    lora.save(tmp_path / "again.safetensors", tiny_pipeline, "kohya")
    assert_same(LoRA.load(tmp_path / "again.safetensors", tiny_pipeline), lora)
    modules = [f for held in lora.parts.values() for f in held.values()]
    if all(set(f) == {"down", "up", "alpha", "magnitude"} and f["magnitude"].shape[-2] == 1 for f in modules):
        lora.save(tmp_path / "peft.safetensors")
        assert_same(LoRA.load(tmp_path / "peft.safetensors", tiny_pipeline), lora)
    elif any(set(f) != {"down", "up", "alpha"} for f in modules):
        with pytest.raises(InputError, match=r'hold plain LoRA, and DoRA of it .* expected format="kohya"'):
            lora.save(tmp_path / "no.safetensors")


def test_dora_scales_say_their_axis(tiny_pipeline, tmp_path):
    for name, shape in (("dora", (1, 16)), ("dora by inputs", (16, 1)), ("dora of peft", (1, 1, 1, 32))):
        tensors, _ = FORMS[name]
        (f,) = LoRA.load(file_of(tmp_path, tensors), tiny_pipeline).parts["unet"].values()
        assert f["magnitude"].shape == shape


def test_the_form_of_a_lora_is_on_its_card(tiny_pipeline, tmp_path):
    for name, words in (("loha", "rank 2, LoHa"), ("lokr", "1 modules, LoKr"), ("dora", "rank 4, LoRA with DoRA")):
        assert words in repr(LoRA.load(file_of(tmp_path, FORMS[name][0]), tiny_pipeline))


def test_what_belongs_to_nothing_is_one_warning(tiny_pipeline, tmp_path):
    strange = {"emb.vectors": Z, "bundle_emb.cat.string_to_param.*": Z, f"unet.{Q}.lora_B.bias": numbers(16)}
    other = pair("down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q")
    path = file_of(tmp_path, pair() | strange | other)
    with pytest.warns(CheckpointWarning) as said:
        lora = LoRA.load(path, tiny_pipeline)
    assert_same(lora, LoRA({"unet": {Q: factors((16, 16), 4)}}))
    (text,) = (str(warning.message) for warning in said)
    assert text.startswith(f"{path}: 1 tensors of bundled textual inversions are left out; 2 of 6 tensors belong to no")
    assert f"emb.vectors, unet.{Q}.lora_B.bias" in text and "1 of 2 modules are not in this model" in text
    assert text.endswith("; a LoRA for another base?") and "\n" not in text


@pytest.mark.parametrize(
    "alpha", [np.float32(3), np.full(1, 3, "f4"), np.full((1, 1, 1), 3, "f2"), np.full(4, 3, "i8")]
)
def test_alpha_of_any_shape_is_one_number(tiny_pipeline, tmp_path, alpha):
    found = LoRA.load(file_of(tmp_path, pair() | {f"{KOHYA}.alpha": alpha}), tiny_pipeline).parts["unet"][Q]
    assert float(found["alpha"]) == 3 and found["alpha"].shape == ()


def test_a_folder_of_peft_adapters_by_part_is_one_lora(tiny_pipeline, tmp_path):
    for part, module, alpha in (("unet", Q, 0), ("text_encoder", TEXT, 6)):
        (tmp_path / part).mkdir()
        tensors = {key.replace("unet.", "base_model.model."): x for key, x in pair(module).items()}
        file_of(tmp_path, tensors).rename(tmp_path / part / "adapter_model.safetensors")
        (tmp_path / part / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
    found = LoRA.load(tmp_path, tiny_pipeline).parts
    assert {part: list(held) for part, held in found.items()} == {"unet": [Q], "text_encoder": [TEXT]}
    assert (float(found["unet"][Q]["alpha"]), float(found["text_encoder"][TEXT]["alpha"])) == (0, 6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"unet.lora_alpha": "7"}, "lora_alpha is '7', expected a number"),
        ({"unet.lora_alpha": float("nan")}, "lora_alpha is nan, expected a number"),
        ({"unet.lora_alpha": True}, "lora_alpha is True, expected a number"),
        ({"unet.alpha_pattern": ["x"]}, r"alpha_pattern is \['x'\], expected an object"),
        ({"unet.alpha_pattern": {"(": 1}}, r"alpha_pattern has '\(': "),
        ({"unet.alpha_pattern": {"to_q": "x"}}, "alpha_pattern to_q is 'x', expected a number"),
    ],
)
def test_peft_values_of_the_wrong_kind_are_named(tiny_pipeline, tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        LoRA.load(file_of(tmp_path, pair(), {METADATA: json.dumps(config)}), tiny_pipeline)


def test_names_with_commas_spaces_and_tildes_open(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my, lora ~1.SAFETENSORS", "~x.safetensors"):
        file_of(tmp_path, pair()).rename(tmp_path / name)
        assert list(LoRA.load(name, tiny_pipeline).parts["unet"]) == [Q]
    assert list(LoRA.load("~/~x.safetensors").read(tiny_pipeline).parts["unet"]) == [Q]
    with pytest.raises(InputError, match="not a path"):
        LoRA.load("~nobody-by-this-name/x.safetensors")


def test_a_text_encoder_of_its_own_is_told_by_its_widths(tmp_path):
    shapes = {"text_encoder": {TEXT: {"kernel": (16, 16)}}, "text_encoder_2": {TEXT: {"kernel": (24, 24)}}}
    for width, part in ((16, "text_encoder"), (24, "text_encoder_2")):
        tensors = {key.replace("unet.", "base_model.model."): x for key, x in pair(TEXT, (width, width)).items()}
        assert list(read_lora(file_of(tmp_path, tensors), shapes | {"unet": {}}, UNET_CONFIG)) == [part]
