"""ControlNet as a method: what leaves the base bit for bit, what compiles nothing, and what each mistake is called."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxmix
from jaxmix import ControlNet, InputError, Request
from jaxmix.controls import controlnet as maths
from jaxmix.models import ControlNetConfig
from jaxmix.models.controlnet import HintEncoder
from jaxmix.pipeline.job import denoise
from jaxmix.pipeline.vision import as_hint
from jaxmix.rows import to_branches
from jaxmix.samplers import DDIM
from jaxmix.testing import normal, random_params
from jaxmix.weights import save_tree
from tests.jobs import Unconditional, plain_job

PROMPTS = ["a dog", "a red car"]
PICTURES = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in range(2)]


@pytest.fixture(scope="module")
def fresh(tiny_pipeline):
    return ControlNet.init(jax.random.key(0), tiny_pipeline)


@pytest.fixture(scope="module")
def net(fresh):
    return trained(fresh, 1)


def trained(net, seed):
    """Return a net of random weights, whose convolutions have left zero."""
    params = random_params(jaxmix.models.ControlNetModel(net.config), seed)
    quiet = {name: jax.tree.map(lambda x: 0.3 * x, x) for name, x in params.items() if name.startswith("controlnet_")}
    return dataclasses.replace(net, params={**params, **quiet})


def draw(pipe, *methods, **more):
    request = Request(prompts=PROMPTS, seeds=[1, 2], steps=4, guidance_scale=3.0, **more)
    return pipe.draw(request, methods, output="latent")


@pytest.fixture(scope="module")
def base(tiny_pipeline):
    return draw(tiny_pipeline)


def test_a_fresh_net_and_a_scale_of_zero_are_the_base_bit_for_bit_and_no_number_compiles_anew(
    tiny_pipeline, base, fresh, net
):
    on = draw(tiny_pipeline, net.on(PICTURES, 0.8))
    assert np.abs(on - base).max() > 1e-2
    before = denoise._cache_size()
    np.testing.assert_array_equal(draw(tiny_pipeline, fresh.on(PICTURES)), base)
    np.testing.assert_array_equal(draw(tiny_pipeline, net.on(PICTURES, 0.0)), base)
    np.testing.assert_array_equal(draw(tiny_pipeline, net.on(PICTURES, 0.0, guess=True)), base)
    broken = dataclasses.replace(net, params=jax.tree.map(lambda x: np.nan * x, net.params))
    np.testing.assert_array_equal(draw(tiny_pipeline, broken.on(PICTURES, 0.0)), base)
    half = draw(tiny_pipeline, net.on(PICTURES, [0.0, 0.8]))
    np.testing.assert_array_equal(half[0], base[0])
    np.testing.assert_array_equal(half[1], on[1])
    other = draw(tiny_pipeline, net.on(PICTURES[::-1], 0.8))
    guessed = draw(tiny_pipeline, net.on(PICTURES, 0.8, guess=[True, False]))
    np.testing.assert_array_equal(guessed[1], on[1])
    assert min(np.abs(other - on).max(), np.abs(guessed[0] - on[0]).max()) > 1e-3
    assert denoise._cache_size() == before


@pytest.fixture(scope="module")
def on_one_level(one_level):
    """Return a pipeline that compiles in half the time, its net, and what it draws without."""
    config = ControlNetConfig.of_unet(one_level.unet.config, (16, 32))
    return one_level, trained(ControlNet(config, {}), 1), draw(one_level)


def test_two_equal_nets_at_half_are_one_and_others_add_up(on_one_level):
    pipe, net, _ = on_one_level
    second, third = (trained(net, seed).on(PICTURES[1], 0.4) for seed in (2, 3))
    both = draw(pipe, net.on(PICTURES[0], 0.4), net.on(PICTURES[0], 0.4))
    whole = draw(pipe, net.on(PICTURES[0], 0.8), dataclasses.replace(second, scale=0.0))
    np.testing.assert_allclose(both, whole, atol=1e-5 * np.abs(whole).max())
    before = denoise._cache_size()
    added = draw(pipe, net.on(PICTURES[0], 0.4), second)
    assert min(np.abs(added - x).max() for x in (both, draw(pipe, net.on(PICTURES[0], 0.4), third))) > 1e-3
    assert denoise._cache_size() == before, "other weights are other numbers"


def test_guessing_leaves_the_unconditional_branch_alone(on_one_level):
    pipe, net, _ = on_one_level
    plain = draw(pipe, Unconditional())
    np.testing.assert_array_equal(draw(pipe, net.on(PICTURES, guess=True), Unconditional()), plain)
    assert np.abs(draw(pipe, net.on(PICTURES), Unconditional()) - plain).max() > 1e-3


def test_outside_of_its_window_the_program_does_not_contain_the_net(on_one_level):
    pipe, net, base = on_one_level
    model = jaxmix.models.ControlNetModel(net.config)
    context = pipe.encode_prompt(["", "a dog"]).context.reshape(1, 2, 32, 16)

    def loops(*windows):
        pixels = np.zeros((1, 16, 16, 3))
        bound = [maths.bind(model, net.params, pixels, scale=[1.0], guess=[False], window=w) for w in windows]
        job = plain_job(pipe.unet, pipe.params["unet"], pipe.initial_latents([1]), context, jnp.ones(1), tuple(bound))
        jaxpr = jax.make_jaxpr(denoise.__wrapped__)(job, DDIM.create(pipe.schedule, 4)).jaxpr
        scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
        return [(e.params["length"], len(e.params["jaxpr"].jaxpr.eqns)) for e in scans]

    ((_, plain),) = loops()
    inside, outside = loops((0.0, 0.4))  # 0.4 of 4 steps are 1.6, of which one is whole
    assert inside[0] == 1 and outside == (3, plain) and inside[1] > plain
    assert loops((0.3, 0.45)) == [(4, plain)]  # no whole step
    np.testing.assert_array_equal(draw(pipe, net.on(PICTURES, window=(0.3, 0.45))), base)


def test_weights_of_guessing_are_those_of_diffusers_and_pooled_nets_see_conditional_rows_alone(net):
    np.testing.assert_allclose(maths.guess_weights(13)[[0, 1, 11, 12]], [0.1, 0.1212, 0.8254, 1.0], atol=1e-4)
    np.testing.assert_allclose(maths.guess_weights(10)[[1, 8, 9]], [0.1292, 0.7743, 1.0], atol=1e-4)
    pooled = dataclasses.replace(net.config, global_pool_conditions=True)
    for config, plain in ((net.config, [1.0, 1.0]), (pooled, [0.0, 1.0])):
        model = jaxmix.models.ControlNetModel(config)
        for guess in (False, True):
            control = maths.bind(model, {}, np.zeros((1, 2, 2, 3)), scale=[1.0], guess=[guess])
            rows = to_branches(control)
            assert np.maximum(rows.live, rows.both).tolist() == ([0.0, 1.0] if guess else plain)
            weighs = guess and config is net.config
            np.testing.assert_allclose(control.weights[0], maths.guess_weights(5) if weighs else np.ones(5), rtol=1e-6)


def test_a_net_of_sdxl_sees_each_rows_pooled_text_and_numbers(tiny_sdxl):
    model = jaxmix.models.ControlNetModel(ControlNetConfig.of_unet(tiny_sdxl.unet.config, (16, 32)))
    params = random_params(model)

    @jax.jit
    def embedded(pooled, time_ids):
        text = jaxmix.Text(jnp.zeros((2, 32, 40)), pooled, time_ids)
        return model.embed_text(params, text, (8, 8))[1]

    one = embedded(jnp.ones((2, 20)), jnp.ones((2, 6)))
    other = embedded(jnp.asarray([[1.0] * 20, [2.0] * 20]), jnp.ones((2, 6)))
    np.testing.assert_array_equal(one[0], other[0])
    assert np.abs(one[1] - other[1]).max() > 1e-3
    assert np.abs(embedded(jnp.ones((2, 20)), 2 * jnp.ones((2, 6))) - one).max() > 1e-3


def test_gradients_reach_the_zero_convolutions_first(on_one_level):
    """As in the first step of training: until they have moved, nothing before them has a gradient."""
    _, net, _ = on_one_level
    model = jaxmix.models.ControlNetModel(net.config)
    zero = ("controlnet_down", "controlnet_mid")
    first = {n: jax.tree.map(jnp.zeros_like, x) if n.startswith(zero) else x for n, x in net.params.items()}
    text = jaxmix.Text(jnp.ones((1, 3, 16)))

    @jax.jit
    def gradient(params):
        def loss(params):
            control = maths.bind(model, params, np.ones((1, 16, 16, 3)), scale=[1.0], guess=[False])
            seen = control.prepare(text, (8, 8)).see(jnp.ones((1, 8, 8, 4)), jnp.asarray(3), text)
            return sum(x.sum() for x in seen.residuals)

        return jax.tree.map(lambda x: jnp.abs(x).max(), jax.grad(loss)(params))

    def moves(params):
        return {name: max(map(float, jax.tree.leaves(g))) > 0 for name, g in gradient(params).items()}

    assert moves(first) == {name: name.startswith(zero) for name in net.params}
    assert all(moves(net.params).values())


def test_a_fresh_encoder_of_pictures_passes_edges_on_where_pytorchs_weights_lose_them():
    model = HintEncoder(ControlNetConfig())
    edges = (np.random.default_rng(0).random((2, 64, 64, 1)) < 0.15).astype(np.float32).repeat(3, -1)
    params = dict(model.init(jax.random.key(0), edges)["params"])
    last = params["conv_out"]["kernel"]
    kernel = normal(jax.random.key(1), last.shape) * last[..., 0].size ** -0.5
    params["conv_out"] = {**params["conv_out"], "kernel": kernel}

    def size(gain):
        scaled = {k: x if k == "conv_out" else {**x, "kernel": gain * x["kernel"]} for k, x in params.items()}
        return float(model.apply({"params": scaled}, edges).std())

    pytorch = (0.356 / 3) ** 0.5  # its weights have a variance of 1 / (3 inputs)
    assert 0.1 < size(1.0) < 3 and size(1.0) > 100 * size(pytorch)


def test_pictures_come_in_every_form_and_keep_their_range(tmp_path):
    picture = np.random.default_rng(5).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    expected = np.asarray(Image.fromarray(picture).resize((48, 32), Image.Resampling.LANCZOS), np.float32) / 255
    for given in (tmp_path / "x.png", str(tmp_path / "x.png"), Image.fromarray(picture), picture):
        np.testing.assert_array_equal(as_hint(given, (32, 48), "x"), expected)
    floats = as_hint(picture / 255, (32, 48), "x")
    assert floats.min() == 0 and floats.max() == 1 and floats.dtype == np.float32
    even = picture // 4 + 96  # which does not overshoot between the passes, where bytes are rounded and cut
    np.testing.assert_allclose(as_hint(even / 255, (32, 48), "x"), as_hint(even, (32, 48), "x"), atol=1.5 / 255)
    fine = np.full((4, 4, 3), 0.1234567, np.float32)
    np.testing.assert_array_equal(as_hint(fine, (4, 4), "x"), fine)
    grey = Image.fromarray(picture[..., 0])
    assert as_hint(grey, (20, 30), "x").shape == (20, 30, 3)


def test_a_card_says_what_it_is_and_a_setting_that_no_tensor_shows_can_be_given(net, tmp_path):
    assert str(net).splitlines()[0] == "ControlNet" and "4 skips of (16, 32), 16 text channels" in str(net)
    net.save(tmp_path / "net")
    pooled = ControlNet.load(tmp_path / "net", config={"global_pool_conditions": True})
    assert pooled.config == dataclasses.replace(net.config, global_pool_conditions=True)
    assert "rgb, 1/2 of their size, means over the picture" in str(pooled)
    with pytest.raises(InputError, match=r"net: .* global_pool_conditions is 1, expected true or false"):
        ControlNet.load(tmp_path / "net", config={"global_pool_conditions": 1})


CASES = [
    (lambda n: n.on(PICTURES[0][:8]), r"ControlNet: pictures: found 8 x 16 pixels, expected the shape .* 16 x 16"),
    (lambda n: n.on([PICTURES[0], np.zeros((16, 20, 3), np.uint8)]), r"pictures\[1\]: found 16 x 20 pixels"),
    (lambda n: n.on(PICTURES[0] / 127.5 - 1), r"ControlNet: pictures: found float64 values, .* from 0 to 1"),
    (lambda n: n.on(np.full((16, 16, 3), np.nan)), r"ControlNet: pictures: found float64 values"),
    (lambda n: n.on(np.zeros((16, 16), np.uint8)), r"found \(16, 16\), expected a picture"),
    (lambda n: n.on("nowhere.png"), r"ControlNet: pictures: nowhere.png: no such file, expected a picture"),
    (lambda n: n.on(PICTURES * 2), r"ControlNet.pictures: found 4 values, expected 1 or one for each of the 2"),
    (lambda n: n.on(PICTURES, [1.0]), r"ControlNet.scale: found 1 values, expected 1 or one for each of the 2"),
    (lambda n: n.on(PICTURES, np.inf), r"ControlNet: scale: found inf, expected finite numbers"),
    (lambda n: n.on(PICTURES, "strong"), r"ControlNet: scale: found 'strong', expected a number"),
    (lambda n: n.on(PICTURES, guess=[True]), r"ControlNet.guess: found 1 values"),
    (lambda n: n.on(PICTURES, guess=0.5), r"ControlNet: guess: found 0.5, expected True or False"),
    (lambda n: n.on(PICTURES, window=(0.5, 0.2)), r"window=\(0.5, 0.2\) is not 0 <= start < stop <= 1"),
]


@pytest.mark.parametrize(("make", "message"), CASES)
def test_a_mistake_is_one_line_before_anything_compiles(tiny_pipeline, net, make, message):
    before = denoise._cache_size()
    with pytest.raises(InputError, match=message) as error:
        draw(tiny_pipeline, make(net))
    assert "\n" not in str(error.value) and denoise._cache_size() == before


def test_a_net_for_another_base_is_refused(tiny_pipeline, tiny_sdxl, one_level, net, tmp_path):
    with pytest.raises(InputError, match=r"its cross_attention_dim is 16, expected 40; a ControlNet for another base"):
        draw(tiny_sdxl, net.on(PICTURES))
    with pytest.raises(InputError, match=r"its block_out_channels is \(16, 32\), expected \(16,\)"):
        draw(one_level, net.on(PICTURES))
    longer = dataclasses.replace(net.config, conditioning_embedding_out_channels=(16, 32, 96, 256))
    with pytest.raises(InputError, match=r"it makes pictures 8 times smaller, expected 2 times"):
        dataclasses.replace(net, config=longer).check(tiny_pipeline)
    control = maths.bind(jaxmix.models.ControlNetModel(net.config), {}, np.zeros((1, 2, 2, 3)), scale=[1], guess=[0])
    with pytest.raises(InputError, match="ControlNet: outputs for 4 skips, expected the 2 of this UNet"):
        one_level.check_controls((control,), (8, 8))
    tiny_pipeline.check_controls((control.replace(sites=r"up_blocks\.1"),), (8, 8))
    net.save(tmp_path / "net")
    with pytest.raises(InputError, match=r"net: its cross_attention_dim is 16, expected 40"):
        ControlNet.load(tmp_path / "net", tiny_sdxl)


def tensors(*keys):
    return {key: np.zeros((4, 4), "f4") for key in keys}


OTHERS = {
    "a ControlNet-Union": ["task_embedding", "controlnet_mid_block.weight"],
    "a ControlNet-Union ": ["control_add_embedding.linear_1.weight", "controlnet_mid_block.weight"],
    "a control-LoRA": ["lora_controlnet", "input_hint_block.0.weight"],
    "a ControlLLLite": ["lllite_unet_input_blocks_4_1.cond_emb.weight"],
    "a ControlNet-XS": ["control_to_base_for_conv_in.weight", "control_model.x.weight"],
    "a T2I-Adapter": ["adapter.body.0.resnets.0.block1.weight"],
    "a T2I-Adapter ": ["body.0.block1.weight"],
    "a ControlNet of a diffusion transformer": ["controlnet_blocks.0.weight", "transformer_blocks.0.x.weight"],
    "a LoRA": ["lora_unet_x.lora_up.weight"],
    "a UNet in the layout of diffusers": ["down_blocks.0.resnets.0.conv1.weight"],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_named(tmp_path, kind):
    save_tree(tensors(*OTHERS[kind]), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"this is {kind.strip()}.*, expected a ControlNet of Stable Diffusion"):
        ControlNet.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ControlNetUnionModel", r"a ControlNet-Union \(ControlNetUnionModel\)"),
        ("T2IAdapter", "a T2I-Adapter"),
        ("UNetControlNetXSModel", "a ControlNet-XS"),
        ("FluxControlNetModel", "a FluxControlNetModel"),
        (3, "a 3"),
    ],
)
def test_a_folder_of_another_kind_is_named(tmp_path, name, what):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(InputError, match=f"this is {what}.* by its config.json, expected a ControlNet of"):
        ControlNet.load(tmp_path)


def test_files_that_cannot_be_read_are_one_line(tmp_path, net):
    net.save(tmp_path / "net")
    held = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    whole = held.read_bytes()

    def refused(path, message):
        with pytest.raises(InputError, match=message) as error:
            ControlNet.load(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none", "found no such file or folder, expected a ControlNet of")
    refused(tmp_path / "net" / "config.json", r"found '.json', expected a ControlNet .* as .safetensors")
    for name in ("x.pth", "x.bin", "x.ckpt"):
        (tmp_path / name).write_bytes(b"x")
        refused(tmp_path / name, r"found a Python pickle, .*; convert it: python -c .*torch.load\('.*x\.")
    held.rename(tmp_path / "net" / "diffusion_pytorch_model.bin")
    refused(tmp_path / "net", r"diffusion_pytorch_model.bin: found a Python pickle, .* convert it: python -c")
    held.write_bytes(whole[:-8])
    refused(tmp_path / "net", "truncated")
    broken = {**net.params, "conv_in": {"kernel": np.full((3, 3, 4, 16), np.nan, "f4"), "bias": np.zeros(16, "f4")}}
    save_tree(broken, held)
    refused(tmp_path / "net", "conv_in.weight' has 576 NaN or infinite values")
    for left_out in ("controlnet_mid_block", "conv_in", "down_blocks.0", "mid_block", "controlnet_cond_embedding"):
        save_tree({k: v for k, v in net.params.items() if k != left_out}, tmp_path / "part.safetensors")
        refused(tmp_path / "part.safetensors", "part.safetensors: ")
    save_tree({"control_model": {"input_hint_block.0": {"kernel": np.ones((3, 3, 3, 16))}}}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", r"0 input blocks, downsampling at \[\], and 1 convolutions")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    for key, value, message in (
        ("controlnet_conditioning_channel_order", "grb", "order is 'grb', expected 'rgb' or 'bgr'"),
        ("conditioning_channels", 1, "conditioning_channels=1 is not supported, expected 3"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn", "mid_block_type is 'UNetMidBlock2DSimpleCrossAttn'"),
        ("class_embed_type", "timestep", "class_embed_type='timestep' is not supported"),
    ):
        (tmp_path / "net" / "config.json").write_text(json.dumps(config | {key: value}))
        held.write_bytes(whole)
        refused(tmp_path / "net", message)
    with pytest.raises(InputError, match="found the name of a file, expected that of a folder"):
        net.save(tmp_path / "x.safetensors")
