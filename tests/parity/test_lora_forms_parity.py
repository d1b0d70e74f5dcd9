"""The forms of LoRA that PEFT has, merged by it and by us: the same weights.

Where PEFT errs (LoKr of two whole factors), tests/tuning/test_forms.py has the equation.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.tuning import lora as low_rank
from jaxmix.weights.lora_files import read_lora
from jaxmix.weights.names import from_torch_layout

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT about itself


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense = torch.nn.Linear(12, 8)
        self.pointwise = torch.nn.Conv2d(8, 12, 1)
        self.conv = torch.nn.Conv2d(8, 16, 3)

    def forward(self, x):
        return x


CONFIGS = {
    "lora with biases": lambda: peft.LoraConfig(r=3, lora_alpha=5, lora_bias=True),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5),
    "loha around cores": lambda: peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=5, decompose_both=True),
    "lokr around a core": lambda: peft.LoKrConfig(r=1, alpha=5, use_effective_conv2d=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_weights_are_those_of_peft(name, tmp_path):
    base = Small()
    weights = {module: getattr(base, module) for module in ("dense", "pointwise", "conv")}
    ours = {
        module: {
            "kernel": np.ascontiguousarray(from_torch_layout(("kernel",), layer.weight.detach().numpy())),
            "bias": layer.bias.detach().numpy().copy(),
        }
        for module, layer in weights.items()
    }
    config = CONFIGS[name]()
    config.target_modules = list(weights)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn_like(p)
                p.copy_(p + 0.3 * noise.abs() if "magnitude" in key else 0.4 * noise)
    model.save_pretrained(tmp_path)
    shapes = {module: {leaf: x.shape for leaf, x in leaves.items()} for module, leaves in ours.items()}
    unet = {"block_out_channels": [4], "layers_per_block": 1, "down_block_types": ["x"], "up_block_types": ["x"]}
    (found,) = read_lora(tmp_path / "adapter_model.safetensors", {"unet": shapes}, unet).values()
    assert set(found) == set(weights)
    got = low_rank.merge({k: {leaf: jnp.asarray(x) for leaf, x in v.items()} for k, v in ours.items()}, [found], [1.0])
    model.merge_and_unload()
    for module, layer in weights.items():
        layer = getattr(base, module)
        expected = from_torch_layout(("kernel",), layer.weight.detach().numpy())
        for a, b, before in (
            (got[module]["kernel"], expected, ours[module]["kernel"]),
            (got[module]["bias"], layer.bias.detach().numpy(), ours[module]["bias"]),
        ):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
            assert np.abs(b - before).max() > 1e-2 or b.ndim == 1
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
