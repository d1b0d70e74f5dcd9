"""What all tests share: eight virtual devices, one compile cache, and a tiny random pipeline.

Compiling is what tests cost, so

- all workers, and the commands that tests start, share one persistent compile cache in .pytest_cache/xla (or where
  JAX_COMPILATION_CACHE_DIR says): a program is compiled once, and in the next run not at all;
- XLA optimises little in the folders named in QUICK, whose tests are about what is around a program. Those that compare
  bits of what users run are among the laws and the methods, which run what users run;
- Python looks for cycles seldom: tracing makes millions of objects;
- torch has one thread a worker: more of them only wait for each other.
"""

import dataclasses
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICK = ("smoke", "parity", "data", "scenes", "tuning", "sharding", "pipeline")
MOST_MAPS = 25_000
MOST_CACHED = 2 << 30

gc.set_threshold(200_000, 20, 100)

# Before jax is imported anywhere: the sharding tests want eight devices, and all tests want the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
CACHE = Path(os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla")))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

import jaxmix  # noqa: E402
from jaxmix import testing  # noqa: E402
from jaxmix.models import UNetConfig  # noqa: E402


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Start the compile cache over once it has grown large: code that is gone leaves its programs there."""
    ours = CACHE == ROOT / ".pytest_cache" / "xla"
    last = not hasattr(session.config, "workerinput")
    if ours and last and CACHE.is_dir() and sum(f.stat().st_size for f in CACHE.iterdir()) > MOST_CACHED:
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _compiling(request: pytest.FixtureRequest) -> Iterator[None]:
    """Optimise as the folder of a file wants it, and drop compiled programs when they are too many.

    Each holds dozens of memory maps. On Linux a process may have 65,530 of them, and LLVM crashes where it gets no
    more.
    """
    quick = request.path.parent.name in QUICK
    if quick != (os.environ.get(_LITTLE) == "1") or _maps() > MOST_MAPS:
        jax.clear_caches()  # which do not know how a program was compiled
        gc.collect()
    os.environ[_LITTLE] = "1" if quick else "0"  # for the commands that tests start
    jax.config.update(_LITTLE.lower(), quick)
    yield


_LITTLE = "JAX_DISABLE_MOST_OPTIMIZATIONS"


def _maps() -> int:
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # another system, which has no such limit either
        return 0


@pytest.fixture(scope="session")
def tiny_pipeline() -> jaxmix.Pipeline:
    """Return a complete pipeline of a few thousand random parameters, 16 px images, the embedded model's tokenizer."""
    return testing.tiny_pipeline()


@pytest.fixture(scope="session")
def one_level() -> jaxmix.Pipeline:
    """Return the same with a UNet of one level, which compiles in half the time.

    For tests in which nothing depends on maps of several sizes. Those of layouts have two levels, and so have the
    recorded numbers of every method.
    """
    pipe = testing.tiny_pipeline()
    one = {w: [f"CrossAttn{w.title()}Block2D"] for w in ("down", "up")}
    config = testing.TINY_UNET | {"block_out_channels": [16]} | {f"{w}_block_types": kind for w, kind in one.items()}
    unet = pipe.unet.clone(config=UNetConfig.from_dict(config))
    return dataclasses.replace(pipe, unet=unet, params={**pipe.params, "unet": testing.random_params(unet)})


@pytest.fixture(scope="session")
def tiny_sdxl() -> jaxmix.Pipeline:
    """Return the same with the UNet and the two text encoders of the SDXL family."""
    return testing.tiny_pipeline("sdxl")
