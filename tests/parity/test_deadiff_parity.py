"""DEADiff's checkpoint, put together from torch's modules: tokens, and a UNet whose attention joins text and tokens."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix import DEADiff, InputError, Request
from jaxmix.controls import deadiff as maths
from jaxmix.pictures import clip_pixels
from jaxmix.pipeline.blocks import attn2_names
from jaxmix.pipeline.job import denoise
from jaxmix.weights.single_file_names import unet_table
from tests.jobs import predict
from tests.parity.oracle import assert_close, perturbed
from tests.parity.test_vision_parity import TINY, as_open_clip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from tests.parity.test_pipeline_parity import torch_pipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and torch about themselves

QUERIES, VOCABULARY = 5, 4200
CONTENT = r"^(mid_block|up_blocks\.0\.)"  # the tiny UNet has other levels than the released one


class Reader(torch.nn.Module):
    """One of the two readers: LAVIS' vision transformer, Q-Former and the authors' projection, from other parts."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        vision = transformers.CLIPVisionConfig(**TINY | {"projection_dim": 8})
        self.vision = perturbed(transformers.CLIPVisionModelWithProjection(vision))
        self.ln_vision = perturbed(torch.nn.LayerNorm(64))
        heads = max(1, width // 64)
        config = transformers.InstructBlipQFormerConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, num_attention_heads=heads,
            intermediate_size=2 * width, encoder_hidden_size=64, cross_attention_frequency=1,
            max_position_embeddings=16,
        )  # fmt: skip
        self.qformer = perturbed(transformers.InstructBlipQFormerModel(config))
        self.queries = torch.nn.Parameter(torch.randn(1, QUERIES, width))
        self.norm = perturbed(torch.nn.LayerNorm(width, eps=1e-12))
        self.dense1, self.dense2 = torch.nn.Linear(width, 3 * width), torch.nn.Linear(3 * width, width)

    def forward(self, pixels, word):
        states = self.ln_vision(self.vision(pixels).last_hidden_state)
        ids = torch.tensor([word]).repeat(len(pixels), 1)
        out = self.qformer(
            input_ids=ids, query_embeds=self.queries.repeat(len(pixels), 1, 1), encoder_hidden_states=states
        )
        x = out.last_hidden_state[:, :QUERIES]
        y = self.dense1(self.norm(x))
        return x + self.dense2(y * torch.sigmoid(1.702 * y))

    def tensors(self, slot):
        """Return the tensors under the names of the checkpoint."""
        vision = as_open_clip({k: x.contiguous() for k, x in self.vision.state_dict().items()})
        made = {
            f"{slot}_blip.visual_encoder.{key.removeprefix('visual.')}": x
            for key, x in vision.items()
            if key.startswith("visual.") and "ln_post" not in key and key != "visual.proj"
        }
        made |= {f"{slot}_blip.ln_vision.{k}": x for k, x in self.ln_vision.state_dict().items()}
        made[f"{slot}_blip.query_tokens"] = self.queries.data
        for key, x in self.qformer.state_dict().items():
            key = re.sub(r"\.attention\.attention\.", ".attention.self.", key)
            key = re.sub(r"\.crossattention\.attention\.", ".crossattention.self.", key)
            key = re.sub(r"^embeddings\.layernorm", "embeddings.LayerNorm", key)
            made[f"{slot}_blip.Qformer.bert.{key}"] = x
        parts = {"dense1": self.dense1, "dense2": self.dense2, "LayerNorm": self.norm}
        return made | {
            f"{slot}_proj_layer.{name}.{k}": x for name, part in parts.items() for k, x in part.state_dict().items()
        }


class Joint:
    """The authors' attention: one softmax over text and tokens."""

    def __init__(self, to_k, to_v, tokens):
        self.to_k, self.to_v, self.tokens = to_k, to_v, tokens

    def __call__(self, attn, x, encoder_hidden_states=None, **more):
        k = torch.cat([attn.to_k(encoder_hidden_states), self.tokens @ self.to_k.T], 1)
        v = torch.cat([attn.to_v(encoder_hidden_states), self.tokens @ self.to_v.T], 1)
        q, k, v = (attn.head_to_batch_dim(y) for y in (attn.to_q(x), k, v))
        o = attn.batch_to_head_dim(torch.softmax(q @ k.transpose(-1, -2) * attn.scale, -1) @ v)
        return attn.to_out[1](attn.to_out[0](o))


@dataclasses.dataclass
class Both:
    theirs: object
    pipe: jaxmix.Pipeline
    readers: dict
    layers: dict
    tensors: dict
    adapter: DEADiff


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deadiff")
    theirs = torch_pipeline("sd1")
    theirs.save_pretrained(folder)
    pipe = jaxmix.load(folder)
    width, table = pipe.unet.config.cross_attention_dim, unet_table(pipe.unet.config.to_dict())
    readers = {slot: Reader(width, i).eval() for i, slot in enumerate(maths.SLOTS)}
    layers, tensors = {}, {"cond_stage_model.x": torch.ones(2), "ctx_embeddings_cache": torch.zeros(1, QUERIES, width)}
    for name in attn2_names(pipe):
        inner = theirs.unet.get_submodule(name).to_q.out_features
        layers[name] = [torch.randn(inner, width) * width**-0.5 for _ in "kv"]
        link = table.of_ours(f"{name}.to_k.weight")
        module = link.key.removesuffix("to_k.weight")
        tensors |= {f"{module}i_to_{x}.weight": y for x, y in zip("kv", layers[name], strict=True)}
    for slot, reader in readers.items():
        tensors |= reader.tensors(slot)
    tensors = {key: x.contiguous() for key, x in tensors.items()}
    save_file(tensors, folder / "deadiff.safetensors")
    return Both(theirs, pipe, readers, layers, tensors, DEADiff.load(folder / "deadiff.safetensors", pipe, CONTENT))


def picture(seed, hw=(40, 30)):
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), np.uint8)


def told(both, slot, image):
    """Return the tokens that torch makes of a picture."""
    pixels = clip_pixels(image, TINY["image_size"], squash=True).transpose(2, 0, 1)[None].copy()
    with torch.no_grad():
        return both.readers[slot](torch.from_numpy(pixels), maths.WORD_IDS[slot])


def test_heads_of_the_qformer_are_those_of_bert():
    reader = Reader(128, 3).eval()
    held = {k.removeprefix("style_blip.Qformer.bert."): np.asarray(x) for k, x in reader.tensors("style").items()}
    words = held["embeddings.word_embeddings.weight"][list(maths.WORD_IDS["style"])]
    params = maths.as_parameters(
        {k: x for k, x in held.items() if k.startswith("encoder") or k.endswith("Norm.weight")}
    )
    params["embeddings.LayerNorm"]["bias"] = held["embeddings.LayerNorm.bias"]
    params |= {"query_tokens": np.asarray(reader.queries.data)}
    params["words"] = words + held["embeddings.position_embeddings.weight"][:3]
    states = np.random.default_rng(0).standard_normal((2, 9, 64)).astype("f4")
    with torch.no_grad():
        expected = reader.qformer(
            input_ids=torch.tensor([maths.WORD_IDS["style"]] * 2), query_embeds=reader.queries.repeat(2, 1, 1),
            encoder_hidden_states=torch.from_numpy(states),
        ).last_hidden_state[:, :QUERIES]  # fmt: skip
    assert_close(maths.qformer(params, jnp.asarray(states)), expected.numpy())


@pytest.mark.parametrize("slot", maths.SLOTS)
def test_tokens_are_those_of_the_authors_parts(both, slot):
    assert_close(both.adapter.see(slot, picture(1))[None], told(both, slot, picture(1)).numpy())


@pytest.mark.parametrize("given", [("style",), ("content",), ("style", "content")], ids="+".join)
def test_the_unet_is_that_of_one_softmax_over_text_and_tokens(both, given):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 16, 16, 4)).astype("f4")
    text = rng.standard_normal((2, 7, both.pipe.unet.config.cross_attention_dim)).astype("f4")
    tokens = {slot: torch.zeros(2, QUERIES, text.shape[-1]) for slot in maths.SLOTS}
    for slot in given:
        tokens[slot][1] = told(both, slot, picture(5))[0]  # row 0 is the unconditional one
    weight = 0.7
    kept = dict(both.theirs.unet.attn_processors)
    both.theirs.unet.set_attn_processor(
        {
            name: Joint(*both.layers[name[:-10]], weight * tokens[both.adapter.slots[name[:-10]]])
            if "attn2" in name
            else old
            for name, old in kept.items()
        }
    )
    with torch.no_grad():
        noisy = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        expected = both.theirs.unet(noisy, 500, torch.from_numpy(text)).sample
    both.theirs.unet.set_attn_processor(kept)
    control = maths.bind(
        both.adapter.layers,
        {slot: tokens[slot].numpy() for slot in tokens},
        both.adapter.slots,
        scale=np.full(2, weight),
    )
    got = predict(both.pipe.unet, both.pipe.params["unet"], x, jnp.asarray([500, 500]), text, (control,))
    assert_close(got, expected.numpy().transpose(0, 2, 3, 1))


def test_pictures_style_images_row_by_row_and_scale_zero_is_the_base(both, tmp_path):
    def drawn(method):
        request = Request(prompts=["a cat", "a dog"], steps=2, seeds=range(2), guidance_scale=3.0)
        return both.pipe.draw(request, () if method is None else (method,), output="latent")

    base, adapter = drawn(None), both.adapter
    styled = drawn(adapter.on(picture(0)))
    programs = denoise._cache_size()
    np.testing.assert_array_equal(drawn(adapter.on(picture(0), scale=0.0)), base)
    rows = drawn(adapter.on([picture(0), None], content=[None, picture(1)], scale=[1.0, 0.0]))
    np.testing.assert_array_equal(rows[0], styled[0])
    np.testing.assert_array_equal(rows[1], base[1])
    content = drawn(adapter.on(content=picture(0)))
    assert denoise._cache_size() == programs
    assert min(np.abs(x - y).max() for x, y in ((styled, base), (content, base), (styled, content))) > 1e-3
    assert both.adapter.slots["mid_block.attentions.0.transformer_blocks.0.attn2"] == "content"
    assert "mid_block.attentions.0" in str(adapter)


def test_the_authors_layers_are_numbers_4_to_8_of_stable_diffusion():
    """In the order of input_blocks.7, 8, middle, output_blocks.3, 4."""
    released = [f"down_blocks.{i}.attentions.{j}." for i in range(3) for j in range(2)]
    released += ["mid_block.attentions.0.", *(f"up_blocks.{i}.attentions.{j}." for i in (1, 2, 3) for j in range(3))]
    assert [i for i, name in enumerate(released) if re.search(maths.CONTENT, name)] == [4, 5, 6, 7, 8]


def test_a_mistake_is_one_line(both, one_level, tmp_path):
    def damaged(name, change):
        held = dict(both.tensors)
        change(held)
        save_file(held, tmp_path / f"{name}.safetensors")
        return lambda: DEADiff.load(tmp_path / f"{name}.safetensors", both.pipe, CONTENT)

    def on(**options):
        return lambda: both.pipe.check(Request(prompts=["a", "b"], steps=2), (both.adapter.on(**options),))

    (tmp_path / "deadiff_v1.ckpt").write_bytes(b"\x80\x02")
    save_file({"image_proj.x": torch.ones(2), "ip_adapter.1.x": torch.ones(2)}, tmp_path / "ip.safetensors")
    whole = tmp_path / "whole.safetensors"
    save_file(both.tensors, whole)
    key = "content_blip.Qformer.bert.encoder.layer.1.output_query.dense.weight"
    for look, words in (
        (lambda: DEADiff.load(tmp_path / "deadiff_v1.ckpt", both.pipe), "Python pickle.*convert it: python -c"),
        (lambda: DEADiff.load(tmp_path / "gone.safetensors", both.pipe), "no such file, expected a checkpoint of DEAD"),
        (lambda: DEADiff.load(tmp_path / "ip.safetensors", both.pipe), "this is an IP-Adapter .* expected a check"),
        (lambda: DEADiff.load(whole, one_level), "cross-attentions of this model, expected the"),
        (lambda: DEADiff.load(whole, both.pipe, "nowhere"), "content_layers: 'nowhere' names none"),
        (lambda: jaxmix.IPAdapter.load(whole, both.pipe), "this is a DEADiff checkpoint"),
        (damaged("less", lambda held: held.pop(key)), f"found no {key}, expected all tensors"),
        (damaged("nan", lambda held: held.update({key: held[key] * np.nan})), f"{key}' has NaN"),
        (damaged("blind", lambda h: h.pop("style_blip.visual_encoder.conv1.weight")), "no style_blip.visual_encoder"),
        (damaged("few", lambda h: h.pop("style_blip.query_tokens")), "found no style_blip.query_tokens"),
        (
            damaged("cut", lambda h: h.update({key: h[key][:, 1:].contiguous()})),
            "content_blip: .* expected all tensors of its Q-Former and projection, that fit",
        ),
        (on(), "neither a style nor a content"),
        (on(style=picture(0), scale=-1.0), "scale: found -1.0, expected numbers >= 0"),
        (on(style=[picture(0)] * 3), "style: found 3"),
        (on(style=[None, "gone.png"]), r"style\[1\]: gone.png: no such file"),
    ):
        with pytest.raises(InputError, match=words) as error:
            look()
        assert "\n" not in str(error.value)
