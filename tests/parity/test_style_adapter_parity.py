"""The head of StyleAdapter against torch's layers, put together as T2I-Adapter's style head is."""

import jax
import numpy as np
import pytest

from jaxmix.controls import style_adapter as maths
from jaxmix.testing import moved
from tests.parity.oracle import assert_close

torch = pytest.importorskip("torch")


class Block(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.c_fc, self.c_proj = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x):  # (s, b, d)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.c_fc(self.ln_2(x))
        return x + self.c_proj(y * torch.sigmoid(1.702 * y))


def test_style_tokens_agree():
    width, context, tokens, blocks = 32, 24, 5, 3
    params = moved(maths.init_style_tokens(jax.random.key(0), width, context, tokens, blocks), jax.random.key(1), 0.2)

    def fill(module, node):
        for name, leaf in node.items():
            array = np.asarray(leaf)
            target = {"kernel": "weight", "scale": "weight"}.get(name, name)
            getattr(module, target).data = torch.from_numpy(array.T.copy() if name == "kernel" else array.copy())

    norms = {name: torch.nn.LayerNorm(width) for name in ("ln_pre", "ln_post")}
    for name, norm in norms.items():
        fill(norm, params[name])
    stack = []
    for i in range(blocks):
        block, node = Block(width, maths.HEADS), params[f"blocks.{i}"]
        for name in ("ln_1", "ln_2", "c_fc", "c_proj"):
            fill(getattr(block, name), node[name])
        fill(block.attn.out_proj, node["out_proj"])
        block.attn.in_proj_weight.data = torch.from_numpy(np.asarray(node["in_proj"]["kernel"]).T.copy())
        block.attn.in_proj_bias.data = torch.from_numpy(np.asarray(node["in_proj"]["bias"]).copy())
        stack.append(block)
    states = np.random.default_rng(0).standard_normal((2, 11, width)).astype("f4")
    with torch.no_grad():
        learnt = torch.from_numpy(np.asarray(params["style_embedding"]).copy()).repeat(2, 1, 1)
        x = norms["ln_pre"](torch.cat([torch.from_numpy(states), learnt], 1)).transpose(0, 1)
        for block in stack:
            x = block(x)
        expected = norms["ln_post"](x.transpose(0, 1)[:, -tokens:]) @ torch.from_numpy(
            np.asarray(params["proj"]["kernel"]).copy()
        )
    assert_close(maths.style_tokens(params, states), expected.numpy())
