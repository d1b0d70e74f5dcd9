"""LoRA files of anything that LoRA files are made of: read, or refused in one line. `JAXMIX_FUZZ` as elsewhere."""

import json
import os

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxmix import LoRA
from jaxmix.tuning import lora as low_rank
from jaxmix.types import InputError
from jaxmix.weights.lora_files import METADATA
from tests.weights.test_lora_files import CONV, FC, IN, NORM, OUT, TEXT, Q

TIMES = int(os.environ.get("JAXMIX_FUZZ", "1"))
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": TIMES == 1, "database": None}
pytestmark = pytest.mark.filterwarnings("ignore::jaxmix.CheckpointWarning")

PREFIXES = ["unet.", "text_encoder.", "text_encoder_2.", "lora_unet_", "lora_te_", "lora_te1_", "lycoris_", ""]
PREFIXES += [
    "base_model.model.",
    "diffusion_model.",
    "text_encoders.clip_l.transformer.",
    "lora_te_wrapped_transformer_",
]
MODULES = [Q, OUT, IN, CONV, NORM, TEXT, FC, "nowhere", "text_model.embeddings.position_embedding", "line\nbreak\u2028"]
PAIRS = [
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
]
ROLES = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2"]
ROLES += ["lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale", "diff", "diff_b", "w_norm", "alpha", "lora_mid.weight"]
ROLES += [
    "lora_B.bias",
    "lora_magnitude_vector",
    "lora_A.default.weight",
    "oft_blocks",
    "",
    "processor.to_q_lora.up.weight",
]
sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 16, 32]), max_size=5)
fitting = st.sampled_from([(3, 16), (16, 3), (16, 16), (16,), (32, 2, 1, 1), (3, 32, 1, 1), (2, 32, 3, 3), (16, 1), ()])
dtypes = st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.float64])
values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=2)
)


@st.composite
def tensors(draw):
    held = {}
    for _ in range(draw(st.integers(0, 4))):
        stem = draw(st.sampled_from(PREFIXES)) + draw(st.sampled_from(MODULES))
        if "_" in stem[:5] and draw(st.booleans()):
            stem = stem.replace(".", "_")
        ends = list(draw(st.sampled_from(PAIRS))) if draw(st.booleans()) else []
        ends += [f".{draw(st.sampled_from(ROLES))}" for _ in range(draw(st.integers(0, 3)))]
        for end in ends:
            shape = draw(st.one_of(fitting, sizes))
            held[stem + end] = np.full(shape, draw(st.sampled_from([0, 1, 3, 1e9, np.nan])), np.float64)
            with np.errstate(all="ignore"):
                held[stem + end] = held[stem + end].astype(draw(dtypes))
    return held


configs = st.dictionaries(
    st.sampled_from(
        ["unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "text_encoder.lora_alpha", "alpha", "."]
    ),
    st.one_of(values, st.dictionaries(st.sampled_from(["to_q", "(", "*", ".*"]), values, max_size=2)),
    max_size=3,
).map(json.dumps)


@settings(max_examples=250 * TIMES, **QUICK)
@given(tensors(), st.one_of(st.none(), configs, st.text(max_size=8)))
def test_files_of_any_tensors_are_read_or_refused(tiny_pipeline, tmp_path_factory, held, config):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_file(
        {key: np.ascontiguousarray(x) for key, x in held.items()}, path, None if config is None else {METADATA: config}
    )
    try:
        lora = LoRA.load(path, tiny_pipeline)
    except InputError as error:
        assert len(str(error).splitlines()) == 1, error
        return
    for part, modules in lora.parts.items():
        known = low_rank.modules(tiny_pipeline.params[part])
        low_rank.check(known, modules)
        for module, f in modules.items():  # shapes alone: what merges would be compiled
            for leaf, change in low_rank._by_leaf(f, known[module][1]):
                weight = known[module][1][leaf]
                made = jax.eval_shape(low_rank.add, weight, [change], [1.0])
                assert (made.shape, made.dtype) == (weight.shape, weight.dtype)
    repr(lora)
