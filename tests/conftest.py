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
import pytest  # noqa: E402

import jaxmix  # noqa: E402
from jaxmix import testing  # noqa: E402


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
    """Return a complete pipeline of a few thousand random parameters, 16 px images, the embedded model's tokenizer."""
    return testing.tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_sdxl() -> jaxmix.Pipeline:
    """Return the same with the UNet and the two text encoders of the SDXL family."""
    return testing.tiny_pipeline("sdxl")
