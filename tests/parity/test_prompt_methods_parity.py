"""Paint-with-words and Structured Diffusion beside plain torch: additive masks, masks' sizes, sums of attentions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix import Site
from jaxmix.control import KV, QKV, attend
from jaxmix.controls import paint_with_words as paint
from tests.parity.oracle import assert_close

torch = pytest.importorskip("torch")

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
