"""Paint-with-words and Structured Diffusion beside plain torch: additive masks, masks' sizes, sums of attentions."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix import Site
from jaxmix.control import KV, QKV, attend
from jaxmix.controls import layer_prompts
from jaxmix.controls import paint_with_words as paint
from jaxmix.pipeline.blocks import attn2_names
from tests.jobs import predict
from tests.parity.oracle import assert_close

torch = pytest.importorskip("torch")
from tests.parity.test_pipeline_parity import torch_pipeline  # noqa: E402

ROWS, PIXELS, TOKENS, HEADS, WIDTH = 2, 48, 11, 3, 8
SITE = Site("a.attn2", HEADS, (8, 6))
SIGMAS = np.geomspace(0.03, 14.6, 1000)


def normals(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def qkv():
    return [normals(seed, ROWS, n, HEADS, WIDTH) for seed, n in enumerate((PIXELS, TOKENS, TOKENS))]


def heads_first(x):
    return torch.tensor(x).transpose(1, 2)


def test_painting_is_attention_with_an_additive_mask():
    q, k, v = qkv()
    region = np.random.default_rng(3).random((ROWS, PIXELS, TOKENS))
    control = paint.bind({"8x6": region}, SIGMAS, weight=0.7).at(jnp.asarray(0), jnp.asarray(640))
    got = attend(SITE, QKV(*map(jnp.asarray, (q, k, v))), (control,))[0]
    q, k, v = map(heads_first, (q, k, v))
    most = (q @ k.transpose(-1, -2)).amax((1, 2, 3), keepdim=True)
    w = 0.7 * np.log(1 + SIGMAS[640]) * most * torch.tensor(region, dtype=torch.float32)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=w / WIDTH**0.5)
    assert_close(got, expected.transpose(1, 2))


@pytest.mark.parametrize("shape", [(8, 6), (3, 5), (1, 1), (16, 12)])
def test_masks_are_resized_with_aligned_corners(shape):
    mask = np.random.default_rng(4).random((16, 12)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.tensor(mask)[None, None], shape, mode="bilinear", align_corners=True)
    assert_close(paint.resize(mask, *shape), theirs[0, 0])


def test_one_key_and_many_values_are_one_attention():
    q, k, _ = qkv()
    contexts, project = normals(5, 4, ROWS, TOKENS, 16), normals(6, 16, HEADS * WIDTH)
    values = contexts.mean(0) @ project
    a = KV(jnp.asarray(k), jnp.asarray(values.reshape(ROWS, TOKENS, HEADS, WIDTH)))
    got = attend(SITE, QKV(jnp.asarray(q), *a))[0]
    probs = torch.softmax(heads_first(q) @ heads_first(k).transpose(-1, -2) / WIDTH**0.5, -1)
    each = (torch.tensor(contexts) @ torch.tensor(project)).reshape(4, ROWS, TOKENS, HEADS, WIDTH)
    assert_close(got, torch.einsum("bhns,ibshd->bnhd", probs, each) / 4)


def test_a_prompt_per_layer_is_torch_with_other_states_in_each_processor(tmp_path):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Told(AttnProcessor2_0):
        def __init__(self, states):
            super().__init__()
            self.states = states

        def __call__(self, attn, x, encoder_hidden_states=None, **more):
            return super().__call__(attn, x, self.states, **more)

    theirs = torch_pipeline("sd1")
    theirs.save_pretrained(tmp_path)
    ours = jaxmix.load(tmp_path)
    names, width = attn2_names(ours), ours.unet.config.cross_attention_dim
    states, own, x = normals(1, 2, len(names), 7, width), normals(2, 2, 7, width), normals(3, 2, 16, 16, 4)
    which = {name: np.full(2, i + 1) for i, name in enumerate(names)}
    which[names[0]][1] = 0  # the second row's own prompt
    processors = dict(theirs.unet.attn_processors)
    for i, name in enumerate(names):
        told = states[:, i].copy()
        told[1] = own[1] if i == 0 else told[1]
        processors[f"{name}.processor"] = Told(torch.from_numpy(told))
    theirs.unet.set_attn_processor(processors)
    with torch.no_grad():
        expected = theirs.unet(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), 500, torch.from_numpy(own)).sample
    control = layer_prompts.bind(states, which)
    got = predict(ours.unet, ours.params["unet"], x, jnp.asarray([500, 500]), own, (control,))
    assert_close(got, expected.numpy().transpose(0, 2, 3, 1))
