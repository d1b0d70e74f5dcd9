"""IP-Adapters in torch diffusers and here: the same files, pictures, masks and scales give the same predictions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxmix
from jaxmix.controls import ip_adapter as maths
from jaxmix.methods.ip_adapter import Embeddings, IPAdapter
from jaxmix.models.unet import AddedCond
from jaxmix.pipeline.blocks import at_sites, attn2_names
from jaxmix.rows import to_branches
from tests.parity.oracle import assert_close

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.parity.test_pipeline_parity import torch_pipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and torch about themselves

CLIP = {"base": 12, "plus": 20, "full": 20}
SEEN = {"base": (12,), "plus": (9, 20), "full": (257, 20)}


def state_dict(kind, ctx, unet, seed=0):
    """Return an adapter of random numbers under the names of the published files."""
    rng = np.random.default_rng(seed)

    def t(*shape, scale=None):
        scale = scale or shape[-1] ** -0.5
        return torch.from_numpy((rng.standard_normal(shape) * scale).astype("f4"))

    def norm(width):
        return {"weight": 1 + t(width, scale=0.1), "bias": t(width, scale=0.1)}

    def named(name, tensors):
        return {f"{name}.{leaf}": x for leaf, x in tensors.items()}

    width = CLIP[kind]
    if kind == "base":
        held = {"proj.weight": t(4 * ctx, width), "proj.bias": t(4 * ctx, scale=0.1), **named("norm", norm(ctx))}
    elif kind == "full":
        held = {"proj.0.weight": t(width, width), "proj.0.bias": t(width, scale=0.1)}
        held |= {"proj.2.weight": t(ctx, width), "proj.2.bias": t(ctx, scale=0.1), **named("proj.3", norm(ctx))}
    else:
        inner = 128
        held = {"latents": t(1, 5, inner), "proj_in.weight": t(inner, width), "proj_in.bias": t(inner, scale=0.1)}
        held |= {"proj_out.weight": t(ctx, inner), "proj_out.bias": t(ctx, scale=0.1), **named("norm_out", norm(ctx))}
        for i in range(4):
            a, b = f"layers.{i}.0", f"layers.{i}.1"
            held |= {**named(f"{a}.norm1", norm(inner)), **named(f"{a}.norm2", norm(inner))}
            held |= {f"{a}.to_q.weight": t(inner, inner), f"{a}.to_kv.weight": t(2 * inner, inner)}
            held |= {f"{a}.to_out.weight": t(inner, inner), **named(f"{b}.0", norm(inner))}
            held |= {f"{b}.1.weight": t(4 * inner, inner), f"{b}.3.weight": t(inner, 4 * inner)}
    layers = {}
    for i, name in enumerate(k for k in unet.attn_processors if "attn2" in k):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        layers |= {f"{2 * i + 1}.to_{x}_ip.weight": t(inner, ctx, scale=1.0) for x in "kv"}
    return {"image_proj": held, "ip_adapter": layers}


def file_of(path, state):
    flat = {f"{part}.{key}": x.contiguous() for part, held in state.items() for key, x in held.items()}
    save_file(flat, path)
    return path


class Both:
    def __init__(self, family, folder):
        self.theirs = torch_pipeline(family)
        self.theirs.save_pretrained(folder)
        self.ours = jaxmix.load(folder)
        self.sdxl = family == "sdxl"
        rng = np.random.default_rng(0)
        self.ctx = self.ours.unet.config.cross_attention_dim
        self.x = rng.standard_normal((2, 16, 16, 4)).astype("f4")
        self.context = rng.standard_normal((2, 7, self.ctx)).astype("f4")
        self.pooled = rng.standard_normal((2, 24)).astype("f4")
        self.time_ids = np.asarray([[32, 32, 0, 0, 32, 32]] * 2, "f4")

    def torch_output(self, embeds, masks=None):
        added = {"image_embeds": embeds}
        if self.sdxl:
            added |= {"text_embeds": torch.from_numpy(self.pooled), "time_ids": torch.from_numpy(self.time_ids)}
        x = torch.from_numpy(self.x.transpose(0, 3, 1, 2).copy())
        kwargs = {} if masks is None else {"ip_adapter_masks": masks}
        with torch.no_grad():
            y = self.theirs.unet(
                x,
                500,
                torch.from_numpy(self.context),
                added_cond_kwargs=added,
                cross_attention_kwargs=kwargs or None,
            ).sample
        return y.numpy().transpose(0, 2, 3, 1)

    def our_output(self, adapters, shown, scales, at_site=None, masks=None):
        """Return what the UNet predicts for embeddings (2, m, ...) of each adapter, which both rows see."""
        added = AddedCond(jnp.asarray(self.pooled), jnp.asarray(self.time_ids)) if self.sdxl else None
        ours = [(a.projection, a.layers) for a in adapters]
        at_site = dict.fromkeys(attn2_names(self.ours), 0.0 if at_site else 1.0) | (at_site or {})
        scales = [np.broadcast_to(np.asarray(s, "f4"), x.shape[:2]) for s, x in zip(scales, shown, strict=True)]
        kinds = tuple(a.kind for a in adapters)
        given = (self.ours.params["unet"], self.x, self.context, added, ours, shown, scales, at_site, masks)
        return np.asarray(predicted(self.ours.unet, kinds, *given))


def control_of(kind, projection, layers, shown, scale, at_site, masks=None):
    n, m = shown.shape[:2]
    tokens = maths.project(kind, projection, jnp.asarray(shown).reshape(n * m, *shown.shape[2:]))
    tokens = tokens.reshape(n, m, *tokens.shape[1:])
    return maths.bind(layers, tokens, 0 * tokens, scale=scale, at_site=at_site, masks=masks)


@functools.partial(jax.jit, static_argnames=("unet", "kinds"))
def predicted(unet, kinds, params, x, context, added, adapters, shown, scales, at_site, masks):
    """One program for all kinds at once: whatever is not asked for has the scale 0."""
    each = zip(kinds, adapters, shown, scales, strict=True)
    controls = tuple(control_of(k, *a, seen, scale, at_site, masks) for k, a, seen, scale in each)
    return unet.apply({"params": params}, x, 500, context, controls, added)


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def both(request, tmp_path_factory):
    return Both(request.param, tmp_path_factory.mktemp(request.param))


def loaded(both, tmp_path, kinds):
    states = [state_dict(kind, both.ctx, both.theirs.unet, seed) for seed, kind in enumerate(kinds)]
    both.theirs.unet._load_ip_adapter_weights(states)
    return [IPAdapter.load(file_of(tmp_path / f"{i}.safetensors", state), both.ours) for i, state in enumerate(states)]


def draws(kind, m=1, seed=5):
    return np.random.default_rng(seed).standard_normal((2, m, *SEEN[kind])).astype("f4")


def set_scale(both, scales):
    for processor in both.theirs.unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = list(scales)


KINDS = ["base", "plus", "full"]


def test_every_kind_agrees_alone_and_beside_the_others(both, tmp_path):
    adapters = loaded(both, tmp_path, KINDS)
    assert [adapter.kind for adapter in adapters] == KINDS
    shown = [draws("base", 3), draws("plus"), draws("full")]
    plain = both.our_output(adapters, shown, [0.0] * 3)
    for scales in ([0.7, 0.0, 0.0], [0.0, 0.7, 0.0], [0.0, 0.0, 0.7], [0.5, 0.8, 0.3]):
        set_scale(both, scales)
        expected = both.torch_output([torch.from_numpy(x) for x in shown])
        assert_close(both.our_output(adapters, shown, scales), expected)
        assert np.abs(expected - plain).max() > 1e-2 * np.abs(plain).max()


def test_dictionaries_of_scales_agree(both, tmp_path):
    adapters = loaded(both, tmp_path, KINDS)
    shown = [draws("base", 3), draws("plus"), draws("full")]
    dictionary = {"up": {"block_0": [0.3, 1.0]}} if both.sdxl else {"down": {"block_0": [0.3]}, "up": 0.5}
    type(both.theirs).set_ip_adapter_scale(both.theirs, [dictionary, 0.0, 0.0])
    expected = both.torch_output([torch.from_numpy(x) for x in shown])
    assert_close(both.our_output(adapters, shown, [1.0, 0.0, 0.0], at_sites(both.ours, dictionary)), expected)


one_family = pytest.mark.parametrize("both", ["sd1"], indirect=True)  # for what no family changes


@one_family
def test_masks_agree(both, tmp_path):
    (adapter,) = loaded(both, tmp_path, ["base"])
    shown = draws("base", 2)
    processor = diffusers.image_processor.IPAdapterMaskProcessor()
    drawn = np.zeros((2, 32, 32), np.uint8)
    drawn[0, :, :13], drawn[1, 7:, 13:] = 255, 255
    made = processor.preprocess([Image.fromarray(x) for x in drawn], height=32, width=32)
    masks = [made.reshape(1, 2, 32, 32)]
    set_scale(both, [[0.6, 1.1]])
    expected = both.torch_output([torch.from_numpy(shown)], masks)
    grids = maths.mask_grids((drawn / 255.0)[None].repeat(2, 0), [(16, 16), (8, 8)])
    assert_close(both.our_output([adapter], [shown], [[0.6, 1.1]], masks=grids), expected)


@one_family
def test_trajectories_agree(both, tmp_path):
    """With guidance: the unconditional rows attend to the tokens of an embedding of zeros. The file is one of ours."""
    (adapter,) = loaded(both, tmp_path, ["base"])
    adapter.save(tmp_path / "ours.safetensors")
    both.theirs.unload_ip_adapter()
    both.theirs.load_ip_adapter(str(tmp_path), "", "ours.safetensors", image_encoder_folder=None)
    set_scale(both, [0.8])
    shown = draws("base")[0]
    both.theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(3).standard_normal((1, 16, 16, 4)).astype("f4")
    embeds = torch.from_numpy(np.stack([0 * shown, shown]))
    expected = both.theirs(
        "a red apple",
        num_inference_steps=4,
        guidance_scale=3.0,
        ip_adapter_image_embeds=[embeds],
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
        output_type="latent",
    ).images
    look = adapter.on(Embeddings(shown, 0 * shown[0]), 0.8)
    request = jaxmix.Request(
        prompts=["a red apple"], steps=4, guidance_scale=3.0, latents=latents / 1.0, sampler=both.ours.sampler
    )
    got = both.ours.draw(request, (look,), output="latent")
    expected = expected.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max() * 4)


def test_a_unet_that_diffusers_saved_and_a_training_checkpoint_are_the_same_adapter(both, tmp_path):
    for kind in ("base", "plus", "full"):
        state = state_dict(kind, both.ctx, both.theirs.unet)
        both.theirs.unet._load_ip_adapter_weights([state])
        one = IPAdapter.load(file_of(tmp_path / "x.safetensors", state), both.ours)
        save_file({k: v.contiguous() for k, v in both.theirs.unet.state_dict().items()}, tmp_path / "u.safetensors")
        one.save(tmp_path / "ours.safetensors")
        saved, flat = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "x.safetensors")
        assert saved.keys() == flat.keys() and all(torch.equal(saved[key], flat[key]) for key in flat)
        training = {"image_proj_model": state["image_proj"], "adapter_modules": state["ip_adapter"]}
        training["unet"] = {"conv_in.bias": torch.ones(3)}
        for other in (tmp_path / "u.safetensors", file_of(tmp_path / "t.safetensors", training)):
            found = IPAdapter.load(other, both.ours)
            assert found.kind == kind
            for a, b in ((one.projection, found.projection), (one.layers, found.layers)):
                flat = [dict(jaxmix.weights.names.flatten(x)) for x in (a, b)]
                assert flat[0].keys() == flat[1].keys()
                assert all(np.array_equal(flat[0][k], flat[1][k]) for k in flat[0])


def test_unconditional_rows_see_no_picture():
    control = maths.bind({}, np.ones((2, 1, 4, 8)), np.zeros((2, 1, 4, 8)), scale=np.ones((2, 1)), at_site={})
    one = to_branches(control, (0.0, 1.0))
    assert np.asarray(one.live).tolist() == [0, 1, 0, 1]
