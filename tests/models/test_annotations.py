"""The shapes and types in the models' annotations, checked while the models are traced.

In a process of its own: checking all of them wherever a test traces a model would cost the suite half a minute, and
tracing twice would find nothing more. Controls are left out: their fields hold whatever a tree of that structure may
hold (gradients, shapes, partition specs).
"""

import subprocess
import sys

PROGRAM = """
from jaxtyping import install_import_hook
checked = ["attention", "blocks", "clip", "controlnet", "layers", "unet", "vae"]
install_import_hook([f"jaxmix.models.{m}" for m in checked], "beartype.beartype")

import jax
import jax.numpy as jnp
from jaxmix import testing
from jaxmix.models import AddedCond, AutoencoderKL, ControlNetConfig, ControlNetModel, UNet2DConditionModel
from tests.laws.controls import CASES, make

def trace(module, *inputs, **options):
    shapes = [x if hasattr(x, "shape") else jax.ShapeDtypeStruct(x, jnp.float32) for x in inputs]
    run = lambda p, *i: jax.tree.leaves(module.apply({"params": p}, *i, **options))
    return jax.eval_shape(run, module.abstract_params(), *shapes)

for family, dtype in (("sd1", jnp.float32), ("sdxl", jnp.bfloat16)):
    pipe = testing.tiny_pipeline(family)
    controls = tuple(make(case, 1.0) for case in CASES)
    cfg = pipe.unet.config
    more = AddedCond(jnp.zeros((2, 20)), jnp.zeros((2, 6))) if family == "sdxl" else None
    chosen, remat = ((), False) if family == "sd1" else (controls, True)
    unet = UNet2DConditionModel(cfg, dtype=dtype, remat=remat)
    trace(unet, (2, 6, 8, 4), jnp.zeros(2), (2, 7, cfg.cross_attention_dim), controls=chosen, added=more)
    net = ControlNetModel(ControlNetConfig.of_unet(cfg, (16, 32)), dtype=dtype, remat=remat)
    trace(net, (2, 6, 8, 4), jnp.zeros(2), (2, 7, cfg.cross_attention_dim), (2, 6, 8, 16), added=more)
    for text in (pipe.text_encoder, pipe.text_encoder_2):
        if text is not None:
            trace(text.clone(dtype=dtype), jnp.zeros((2, 32), jnp.int32))
    vae = AutoencoderKL(pipe.vae.config, dtype=dtype)
    trace(vae, (2, 16, 8, 3))
    trace(vae, (2, 8, 4, 4), method="decode")
print("all traced")
try:
    trace(pipe.vae, (16, 8, 3), method="encode")
except Exception as error:
    print(type(error).__name__)
"""


def test_the_models_keep_their_annotations_and_refuse_other_shapes():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:2] == ["all traced", "TypeCheckError"]
