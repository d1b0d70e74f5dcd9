"""ControlNets in torch diffusers and here: residuals, the UNet that takes them, whole runs, files both ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxmix
from jaxmix import ControlNet, Request
from jaxmix.controls import controlnet as maths
from jaxmix.models import ControlNetConfig, ControlNetModel, UNetConfig
from jaxmix.released import RELEASED
from jaxmix.rows import Text
from jaxmix.weights.controlnet_files import told_config
from jaxmix.weights.names import flatten, to_torch_key, to_torch_shape
from jaxmix.weights.single_file_names import controlnet_table
from tests.parity.oracle import assert_close, loaded, nhwc, perturbed

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import save_file  # noqa: E402

from tests.parity.test_pipeline_parity import BLOCKS, torch_pipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and torch about themselves

HW, PIXELS, STEPS = (16, 24), (32, 48), 4


def picture(seed, hw=(40, 60)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*hw, 3), np.uint8))


class Both:
    def __init__(self, family, folder):
        self.theirs, self.sdxl, self.folder = torch_pipeline(family), family == "sdxl", folder
        self.theirs.save_pretrained(folder / "pipe")
        self.pipe = jaxmix.load(folder / "pipe")
        self.nets, self.ours = [], []
        for i in range(1 if self.sdxl else 2):
            net = diffusers.ControlNetModel.from_unet(self.theirs.unet, conditioning_embedding_out_channels=(16, 32))
            perturbed(net).save_pretrained(folder / f"net{i}")
            self.nets.append(net)
            self.ours.append(ControlNet.load(folder / f"net{i}", self.pipe))
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((2, *HW, 4)).astype("f4")
        self.context = rng.standard_normal((2, 7, self.pipe.unet.config.cross_attention_dim)).astype("f4")
        self.hint = rng.random((2, *PIXELS, 3)).astype("f4")
        self.pooled = rng.standard_normal((2, 24)).astype("f4") if self.sdxl else None
        self.time_ids = np.asarray([[32, 48, 0, 0, 32, 48]] * 2, "f4") if self.sdxl else None

    @functools.cached_property
    def tensors(self):
        added = {}
        if self.sdxl:
            added = {"text_embeds": torch.from_numpy(self.pooled), "time_ids": torch.from_numpy(self.time_ids)}
        x, hint = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (self.x, self.hint))
        return x, 500, torch.from_numpy(self.context), hint, added

    def torch_outputs(self, net, scale, guess=False):
        """Return the residuals of both rows, and what the UNet makes of them."""
        x, t, context, hint, added = self.tensors
        with torch.no_grad():
            skips, middle = net(
                x, t, context, hint, scale, added_cond_kwargs=added, guess_mode=guess, return_dict=False
            )
            residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
            y = self.theirs.unet(x, t, context, added_cond_kwargs=added, **residuals).sample
        return [nhwc(r) for r in (*skips, middle)], nhwc(y)

    def outputs(self, net, scale, guess=False):
        model = ControlNetModel(net.config)
        control = maths.bind(model, net.params, self.hint, scale=[scale] * 2, guess=[guess] * 2)
        text = Text(jnp.asarray(self.context), self.pooled, self.time_ids)
        return outputs(self.pipe.unet, self.pipe.params["unet"], self.x, text, control)

    def torch_latents(self, nets, images, **settings):
        kind = "StableDiffusionXLControlNetPipeline" if self.sdxl else "StableDiffusionControlNetPipeline"
        more = {} if self.sdxl else {"requires_safety_checker": False}
        parts = {k: v for k, v in self.theirs.components.items() if v is not None or not self.sdxl}
        parts = {k: v for k, v in parts.items() if k not in ("image_encoder",)}
        pipe = getattr(diffusers, kind)(**parts, controlnet=nets, **more)
        pipe.set_progress_bar_config(disable=True)
        found = pipe(
            ["a red apple"], image=images, height=PIXELS[0], width=PIXELS[1], num_inference_steps=STEPS,
            guidance_scale=3.0, latents=torch.from_numpy(self.x[:1].transpose(0, 3, 1, 2).copy()),
            output_type="latent", **settings,
        ).images  # fmt: skip
        return nhwc(found)

    def latents(self, *methods):
        request = Request(
            prompts=["a red apple"], steps=STEPS, guidance_scale=3.0, latents=self.x[:1], sampler=self.pipe.sampler
        )
        return self.pipe.draw(request, methods, output="latent")


@functools.partial(jax.jit, static_argnames=("unet",))
def outputs(unet, params, x, text, control):
    """Return the scaled residuals of a net, and what the UNet makes of them."""
    seen = control.prepare(text, HW).see(x, jnp.asarray(500), text)
    added = None if text.pooled is None else jaxmix.models.AddedCond(text.pooled, text.time_ids)
    return seen.residuals, unet.apply({"params": params}, x, 500, text.context, (seen,), added)


def assert_same_path(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max() * STEPS)


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def both(request, tmp_path_factory):
    return Both(request.param, tmp_path_factory.mktemp(request.param))


one_family = pytest.mark.parametrize("both", ["sd1"], indirect=True)  # for what no family changes


def test_residuals_agree_and_what_the_unet_makes_of_them(both):
    for guess in (False, True):
        expected, output = both.torch_outputs(both.nets[0], 0.7, guess)
        found, got = both.outputs(both.ours[0], 0.7, guess)
        assert len(found) == len(expected) == both.ours[0].config.outputs
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
        assert_close(got, output)
    plain, _ = both.outputs(both.ours[0], 0.0)
    assert not any(np.any(x) for x in plain) and all(np.abs(x).max() > 1e-2 for x in expected)


@one_family
def test_pooled_residuals_and_the_other_order_of_channels_agree(both):
    settings = {"global_pool_conditions": True, "controlnet_conditioning_channel_order": "bgr"}
    theirs = diffusers.ControlNetModel.from_config(both.nets[0].config, **settings)
    theirs.load_state_dict(both.nets[0].state_dict())
    ours = dataclasses.replace(both.ours[0], config=dataclasses.replace(both.ours[0].config, **settings))
    for guess in (False, True):  # neither changes the weights of pooled outputs
        expected, output = both.torch_outputs(theirs, 0.7, guess)
        found, got = both.outputs(ours, 0.7, guess)
        assert all(x.shape[1:3] == (1, 1) for x in found)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
        # Our rows are all conditional here, and so is every row of the torch net.
        assert_close(got, output)


def test_whole_runs_agree_with_and_without_guessing(both):
    shown = picture(1)
    base = both.latents(both.ours[0].on(shown, 0.0))
    if both.sdxl:  # for the others see tests/methods
        np.testing.assert_array_equal(base, both.latents())
    for guess in (False, True):
        expected = both.torch_latents(both.nets[0], shown, controlnet_conditioning_scale=0.8, guess_mode=guess)
        assert_same_path(both.latents(both.ours[0].on(shown, 0.8, guess=guess)), expected)
        assert np.abs(expected - base).max() > 1e-2 * np.abs(base).max()


@one_family
def test_whole_runs_of_two_nets_agree_with_scales_and_windows_of_their_own(both):
    shown, scales = [picture(1), picture(2)], [0.8, 0.5]
    nets = diffusers.MultiControlNetModel(both.nets)
    windows = [(0.0, 1.0), (0.3, 0.8)]  # of 4 steps: all, and only the third
    starts, ends = (list(x) for x in zip(*windows, strict=True))
    told = {"controlnet_conditioning_scale": scales, "control_guidance_start": starts, "control_guidance_end": ends}
    expected = both.torch_latents(nets, shown, **told)
    methods = [net.on(*x) for net, *x in zip(both.ours, shown, scales, windows, strict=True)]
    got = both.latents(*methods)
    assert_same_path(got, expected)
    assert np.abs(got - both.latents(methods[0])).max() > 1e-3 * np.abs(got).max()


SMALL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (0, 1),
    "conditioning_embedding_out_channels": (16, 32),
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
    **{k: BLOCKS[k] for k in ("block_out_channels", "layers_per_block", "norm_num_groups")},
}


def test_nets_with_less_attention_than_their_base_agree(tmp_path):
    theirs = diffusers.ControlNetModel(**SMALL)
    ours = ControlNetModel(ControlNetConfig.from_dict(dict(theirs.config)))
    params = loaded(theirs, ours, tmp_path)
    x, context, hint = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 16), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        skips, middle = theirs(x, 7, context, hint, return_dict=False)

    @jax.jit
    def residuals(params, x, context, hint):
        kv, _ = ours.embed_text(params, Text(context), (8, 8))
        return ours.apply({"params": params}, x, 7, kv, ours.embed_hint(params, hint))

    got = residuals(params, nhwc(x), context.numpy(), nhwc(hint))
    for a, b in zip((*got.skips, got.middle), (*skips, middle), strict=True):
        assert_close(a, nhwc(b))


def original(net, blocks=2, layers=1, hints=4):
    """Return a net's tensors under the authors' names."""
    table = controlnet_table("control_model.", blocks, layers, hints)
    return {table.of_ours(key).key: x.contiguous() for key, x in net.state_dict().items()}


def flat(params):
    return {to_torch_key(path): np.asarray(leaf) for path, leaf in flatten(params)}


def assert_same_net(found, expected):
    a, b = flat(found.params), flat(expected.params)
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
    assert found.config == expected.config


@one_family
def test_the_authors_layout_is_the_same_net_to_diffusers_and_here(both, tmp_path):
    """Under its prefix beside the whole model that it was trained with, bare, and in diffusers' layout."""
    held = original(both.nets[0])
    assert "control_model.input_hint_block.0.weight" in held and "control_model.zero_convs.3.0.bias" in held
    assert "control_model.input_blocks.2.0.op.weight" in held and "control_model.middle_block_out.0.weight" in held
    beside = {f"model.diffusion_model.{k.removeprefix('control_model.')}": x.clone() for k, x in held.items()}
    bare = {k.removeprefix("control_model."): x for k, x in held.items()}
    for name, state in {
        "whole": held | beside | {"first_stage_model.x": torch.ones(1)},
        "bare": bare | {"cond_stage_model.x": torch.ones(1)},
        "diffusers": {k: x.contiguous() for k, x in both.nets[0].state_dict().items()},
    }.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        assert_same_net(ControlNet.load(tmp_path / f"{name}.safetensors", both.pipe), both.ours[0])


@one_family
def test_diffusers_reads_the_authors_layout_as_we_do(both, tmp_path):
    theirs = perturbed(diffusers.ControlNetModel.from_unet(both.theirs.unet))  # its reader knows four levels only
    save_file(original(theirs, hints=8), tmp_path / "net.safetensors")
    theirs.save_pretrained(tmp_path / "net")
    found = diffusers.ControlNetModel.from_single_file(
        str(tmp_path / "net.safetensors"), config=str(tmp_path / "net"), local_files_only=True
    ).state_dict()
    ours = flat(ControlNet.load(tmp_path / "net.safetensors").params)
    assert found.keys() == ours.keys() == theirs.state_dict().keys()
    back = flat(ControlNet.load(tmp_path / "net").params)
    for key, x in theirs.state_dict().items():
        assert torch.equal(found[key], x) and np.array_equal(ours[key], back[key])


def test_what_we_save_opens_in_diffusers_and_here(both, tmp_path):
    both.ours[0].save(tmp_path / "ours")
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "ours")
    expected = both.nets[0].state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[key]) for key, x in theirs.state_dict().items())
    configs = [{k: list(v) if isinstance(v, tuple) else v for k, v in x.config.items()} for x in (theirs, both.nets[0])]
    assert all(configs[0][key] == value for key, value in configs[1].items() if key[0] != "_")
    assert_same_net(ControlNet.load(tmp_path / "ours"), both.ours[0])
    both.ours[0].save(tmp_path / "half", jnp.float16)
    half = ControlNet.load(tmp_path / "half" / "diffusion_pytorch_model.safetensors")  # alone, as stored
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {np.dtype(np.float16)}
    assert ControlNet.load(tmp_path / "half", both.pipe).params["conv_in"]["kernel"].dtype == np.float32


SIZES = {"sd15": (361_279_120, 13), "sd21": (364_228_240, 13), "sdxl": (1_251_014_160, 10)}


@pytest.mark.parametrize("model", SIZES)
def test_every_tensor_of_the_released_sizes_is_used_once_and_their_shapes_tell_the_config(model):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(RELEASED[model]["unet"])
        theirs = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    config = ControlNetConfig.from_dict(dict(theirs.config), notes := [])
    made = ControlNetModel(config).abstract_params()
    target = {to_torch_key(path): to_torch_shape(path, leaf.shape) for path, leaf in flatten(made)}
    assert target == {key: tuple(x.shape) for key, x in theirs.named_parameters()}
    assert (sum(int(np.prod(s)) for s in target.values()), config.outputs) == SIZES[model]
    assert ControlNetConfig.from_dict(told_config("x", target)) == config and notes == []
    assert ControlNetConfig.of_unet(UNetConfig.from_dict(RELEASED[model]["unet"])) == config
