"""Checkpoints as other tools write and damage them: they open, or are refused in one line.

`JAXMIX_FUZZ=10` makes ten times as many cases.
"""

import json
import os
import random
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import jaxmix
from jaxmix.models import CLIPTextConfig, UNetConfig, VAEConfig
from jaxmix.pipeline.chunks import tokenize
from jaxmix.pipeline.tokens import open_tokenizer
from jaxmix.released import RELEASED
from jaxmix.samplers import default_sampler, differences, make_solver
from jaxmix.schedule import NoiseSchedule
from jaxmix.schedulers import HARMLESS, SCHEDULERS
from jaxmix.testing import TINY_SCHEDULE, TINY_TEXT, TINY_UNET, TINY_VAE
from jaxmix.types import CheckpointWarning, InputError
from jaxmix.weights import open_source

TIMES = int(os.environ.get("JAXMIX_FUZZ", "1"))
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": TIMES == 1, "database": None}
pytestmark = pytest.mark.filterwarnings("ignore::jaxmix.CheckpointWarning")

numbers = st.sampled_from([0, 1, -1, 2, 3, 4, 8, 16, 7.0, 0.5, 1e308, -0.0, 2**31, 2**64, 10**30, 10**400])
texts = st.one_of(st.sampled_from(["", "linear", "v_prediction", "DownBlock2D", "1000", "NaN"]), st.text(max_size=5))
scalars = st.one_of(st.none(), st.booleans(), numbers, st.floats(), texts)
values = st.recursive(scalars, lambda x: st.one_of(st.lists(x, max_size=4), st.dictionaries(texts, x, max_size=2)))


def changes(*configs):
    keys = sorted({key for config in configs for key in config})
    return st.dictionaries(st.one_of(st.sampled_from(keys), texts), values, max_size=4)


def one_line(error):
    text = str(error)
    assert text and "\n" not in text and len(text) < 5000, text[:300]


UNETS = [TINY_UNET, RELEASED["sd15"]["unet"], RELEASED["sdxl"]["unet"], dict.fromkeys(UNetConfig.fixed)]
MODELS = {
    UNetConfig: UNETS,
    VAEConfig: [TINY_VAE, dict.fromkeys(VAEConfig.fixed)],
    CLIPTextConfig: [TINY_TEXT, RELEASED["sdxl"]["text_encoder_2"]],
}


@pytest.mark.parametrize("cls", MODELS)
@settings(max_examples=100 * TIMES, **QUICK)
@given(st.data())
def test_configs_of_models_are_read_or_refused(cls, data):
    config = {**data.draw(st.sampled_from(MODELS[cls])), **data.draw(changes(*MODELS[cls]))}
    try:
        made = cls.from_dict(config)
        assert cls.from_dict(made.to_dict()) == made
    except InputError as error:
        one_line(error)


SCHEDULES = [TINY_SCHEDULE, dict.fromkeys([*HARMLESS, "timestep_spacing", "rescale_betas_zero_snr", "trained_betas"])]


@settings(max_examples=250 * TIMES, **QUICK)
@given(st.sampled_from([*SCHEDULERS, "FlowMatchEulerDiscreteScheduler", None]), changes(*SCHEDULES), st.integers(1, 30))
def test_configs_of_schedulers_are_read_or_refused(name, changed, steps):
    config = json.loads(json.dumps({**TINY_SCHEDULE, "_class_name": name, **changed}))
    try:
        schedule = NoiseSchedule.from_config(config)
        assert NoiseSchedule.from_config(schedule.to_config()).alphas_cumprod is not None
        differences(schedule)
        make_solver(default_sampler(schedule), schedule, steps)
    except InputError as error:
        one_line(error)


@pytest.fixture(scope="module")
def saved(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline.save(folder)
    return folder


def damage(content, rng):
    """Return bytes with some changed, lost, repeated or put in front."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(7):
            case 0:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del content[at:]
            case 2:
                content[at:at] = content[at : at + rng.randrange(40)]
            case 3:
                content[:0] = b"\xef\xbb\xbf"
            case 4:
                content[:] = rng.choice(
                    [b"", b"null", b"[]", b"{}", b"7", b'"x"', b"[" * 3000, b"version https://git-lfs"]
                )
            case 5:
                digits = [i for i, b in enumerate(content[:5000]) if 48 <= b <= 57]
                if digits:
                    content[rng.choice(digits)] = rng.choice(b"0123456789-e.")
            case _:
                content[at : at + 4] = b"\xff\xfe\x00\x00"
    return bytes(content)


@settings(max_examples=250 * TIMES, **QUICK)
@given(st.integers(0, 2**32))
def test_damaged_safetensors_and_indices_are_read_or_refused(tmp_path_factory, seed):
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("files")
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({"a.weight": np.ones((2, 3), "f4"), "b.bias": np.ones(2, "f2")}, path, {"format": "pt"})
    if seed % 3 == 0:
        path.rename(folder / "x.safetensors")
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": dict.fromkeys(["a.weight", "b.bias"], "x.safetensors")}))
    path.write_bytes(damage(path.read_bytes(), rng))
    try:
        source = open_source(folder)
        for key in source.entries:
            source.read(key)
    except InputError as error:
        one_line(error)
    shutil.rmtree(folder)


STRANGE = [None, 0, -1, 1.5, True, "", "x", [], {}, ["a"], {"a": 1}, 10**30, "BertTokenizer", {"content": 5}]
ADDED = ["tokenizer_class", "model_max_length", "pad_token", "added_tokens_decoder", "errors", "model", "normalizer"]


def change_value(held, rng):
    """Change, drop or add one value somewhere in a JSON object or list."""
    places = list(held) if isinstance(held, dict) else list(range(len(held)))
    if isinstance(held, dict) and (not places or rng.random() < 0.1):
        held[rng.choice(ADDED)] = rng.choice(STRANGE)
    elif places:
        place = rng.choice(places)
        if rng.random() < 0.5 and isinstance(held[place], (dict, list)) and held[place]:
            change_value(held[place], rng)
        elif rng.random() < 0.8:
            held[place] = rng.choice(STRANGE)
        else:
            del held[place]


JSONS = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"]
JSONS += ["scheduler/scheduler_config.json"]


@settings(max_examples=50 * TIMES, **QUICK)
@given(st.sampled_from(JSONS), st.integers(0, 2**32))
def test_folders_with_a_damaged_config_open_or_are_refused(saved, tmp_path_factory, name, seed):
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("folder"), dirs_exist_ok=True, copy_function=os.link)
    content = damage((folder / name).read_bytes(), random.Random(seed))
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            jaxmix.load(folder)
    except InputError as error:
        one_line(error)
    shutil.rmtree(folder)


@settings(max_examples=100 * TIMES, **QUICK)
@given(st.integers(0, 2**32))
def test_damaged_tokenizers_work_or_are_refused(saved, tmp_path_factory, seed):
    rng = random.Random(seed)
    folder = shutil.copytree(saved / "tokenizer", tmp_path_factory.mktemp("tokenizer"), dirs_exist_ok=True)
    path = rng.choice(sorted(folder.iterdir()))
    if rng.random() < 0.1:
        path.unlink()
    elif seed % 2 and path.suffix == ".json":
        held = json.loads(path.read_text())
        change_value(held, rng)
        path.write_text(json.dumps(held))
    else:
        path.write_bytes(damage(path.read_bytes(), rng))
    try:
        tokenize(open_tokenizer(folder), 16, ["", "a \0 cat \u732b " * 9], 9000)
    except InputError as error:
        one_line(error)
    shutil.rmtree(folder)
