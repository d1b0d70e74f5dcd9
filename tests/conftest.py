"""Fixtures that every test folder shares: eight virtual devices and a tiny random pipeline."""

import gc
import os
from collections.abc import Iterator

# Before jax is imported anywhere: the sharding tests want eight devices, and all tests want the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

from jaxtyping import install_import_hook  # noqa: E402

# Shapes and types in the models' annotations are checked here, and cost nothing in production. Controls are left out:
# their fields hold whatever a tree of that structure may hold (gradients, shapes, partition specs).
install_import_hook([f"jaxmix.models.{m}" for m in ("attention", "clip", "layers", "unet", "vae")], "beartype.beartype")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import jaxmix  # noqa: E402
from jaxmix.models import (  # noqa: E402
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    UNet2DConditionModel,
    UNetConfig,
    VAEConfig,
)
from jaxmix.pipeline.loading import ASSETS  # noqa: E402
from jaxmix.schedule import NoiseSchedule  # noqa: E402

TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
TINY_VAE = {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
TINY_SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def random_leaf(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Return random weights: products keep their scale, norms are near one, biases near zero."""
    if name == "kernel":
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)
    around = {"scale": 1.0, "bias": 0.0, "embedding": 0.0}[name]
    return jnp.asarray(around + rng.standard_normal(shape) * (0.5 if name == "embedding" else 0.05), jnp.float32)


@pytest.fixture(scope="module", autouse=True)
def _free_programs() -> Iterator[None]:
    """Drop the compiled programs of a file once it is done.

    Each holds dozens of memory maps. On Linux a process may have 65,530 of them, and LLVM crashes where it gets no
    more.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def tiny_pipeline() -> jaxmix.Pipeline:
    """A complete pipeline of a few thousand random parameters, 16 px images, the embedded model's tokenizer."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(ASSETS / "mini" / "tokenizer"))
    text = {
        "architectures": ["CLIPTextModel"],
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    modules = {
        "unet": UNet2DConditionModel(UNetConfig.from_dict(TINY_UNET)),
        "vae": AutoencoderKL(VAEConfig.from_dict(TINY_VAE)),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(text)),
    }
    # From the shapes and not by init_params, whose three programs would have to be compiled first.
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: random_leaf(rng, path[-1].key, leaf.shape),
        {name: module.abstract_params() for name, module in modules.items()},
    )
    return jaxmix.Pipeline(
        **modules, params=params, schedule=NoiseSchedule.from_config(TINY_SCHEDULE), tokenizer=tokenizer
    )
