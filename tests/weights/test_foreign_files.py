"""Files as other tools name, mark, split and shrink them, and models that are put together from several."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmix
from jaxmix.pipeline.tokens import open_tokenizer
from jaxmix.types import CheckpointWarning, InputError
from jaxmix.weights import load_tree, names
from jaxmix.weights.files import preferred, user_path
from jaxmix.weights.part_files import open_part
from jaxmix.weights.single_file import open_single_file
from tests.weights.test_single_file import UNET, VAE, files, params, targets  # noqa: F401


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def one_line(*args, **kwargs):
    with pytest.raises(InputError) as error:
        jaxmix.load(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def one_note(*args, **kwargs):
    with pytest.warns(CheckpointWarning) as said:
        pipe = jaxmix.load(*args, **kwargs)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    return pipe, str(said[0].message)


@pytest.fixture(scope="module")
def sd1(files):  # noqa: F811
    return load_file(files["sd1"])


@pytest.fixture(scope="module")
def whole(files):  # noqa: F811
    return jaxmix.load(files["sd1"])


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("sd1") / "pipeline"
    whole.save(path)
    return path


def written(path, tensors, metadata=None):
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, path, metadata)
    return path


def renamed(tensors, prefix, to):
    return {to + key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}


def torch_names(tree):
    return {names.to_torch_key(p): names.to_torch_layout(p, np.asarray(x)) for p, x in names.flatten(tree)}


def alone(kind, part, sd1, folder, whole, tmp_path):
    """Return a part of the model as a file or folder of its own."""
    prefix = {"unet": UNET, "vae": VAE}[part]
    match kind:
        case "checkpoint":
            return written(tmp_path / "all.safetensors", sd1)
        case "with prefix":
            return written(tmp_path / "part.safetensors", renamed(sd1, prefix, prefix))
        case "comfy":
            return written(tmp_path / "part.safetensors", renamed(sd1, prefix, "diffusion_model."))
        case "bare":
            return written(tmp_path / "PART.SAFETENSORS", renamed(sd1, prefix, ""))
        case "diffusers":
            return written(tmp_path / "part.safetensors", torch_names(whole.params[part]))
        case "folder":
            return folder / part
        case "pipeline":
            return folder


KINDS = ["checkpoint", "with prefix", "comfy", "bare", "diffusers", "folder", "pipeline"]


@pytest.mark.parametrize(
    ("kind", "part"), [(k, p) for k in KINDS for p in ("unet", "vae") if (k, p) != ("comfy", "vae")]
)
def test_a_part_of_its_own_is_read_from_anything_that_has_it(kind, part, sd1, folder, whole, targets, tmp_path):  # noqa: F811
    config = getattr(whole, part).config.to_dict()
    opened = open_part(alone(kind, part, sd1, folder, whole, tmp_path), part, config, [])
    assert same(load_tree(opened.source, getattr(whole, part).abstract_params()), whole.params[part])
    assert opened.config is None or opened.config["block_out_channels"] == config["block_out_channels"]


def test_a_checkpoint_without_a_vae_takes_one(sd1, folder, whole, tmp_path):
    path = written(tmp_path / "x.safetensors", {key: x for key, x in sd1.items() if not key.startswith(VAE)})
    assert one_line(path).endswith("; --vae (vae=) names one")
    pipe = jaxmix.load(path, vae=folder / "vae")
    assert same(pipe.params, whole.params) and pipe.vae == whole.vae


@pytest.mark.parametrize("single", [False, True])
def test_a_unet_alone_takes_the_rest_from_a_base(single, sd1, files, folder, whole, tmp_path):  # noqa: F811
    given = alone("bare", "unet", sd1, folder, whole, tmp_path)
    pipe = jaxmix.load(given, base=files["sd1"] if single else folder)
    assert same(pipe.params, whole.params) and pipe.unet == whole.unet
    assert one_line(given).endswith("; --base (base=) takes the rest from another")


def test_a_unet_says_its_schedule_over_the_bases(sd1, folder, tmp_path):
    tensors = renamed(sd1, UNET, UNET)
    marked = tensors | {"v_pred": np.zeros(0, "f4"), "ztsnr": np.zeros(0, "f4")}
    schedule = jaxmix.load(written(tmp_path / "v.safetensors", marked), base=folder).schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == ("v_prediction", True)
    assert schedule.timestep_spacing == "trailing"
    path = written(tmp_path / "m.safetensors", tensors, {"modelspec.prediction_type": "v"})
    pipe, said = one_note(path, base=folder)
    assert pipe.schedule.prediction_type == "v_prediction" and said.startswith(f"{path}: prediction_type v_pred")


def test_parts_that_do_not_fit_are_one_line(files, sd1, folder, tmp_path):  # noqa: F811
    text = one_line(files["sdxl"], base=folder)
    assert str(files["sdxl"]) in text and "in no unet like the model's, such as" in text
    path = written(tmp_path / "vae.safetensors", renamed(sd1, VAE, ""))
    assert "vae.safetensors: this is a VAE alone (it has" in one_line(path, base=folder)
    assert "vae: nowhere: found no such folder or file" in one_line(folder, vae="nowhere")
    assert "base: nowhere: found no such folder or file" in one_line(folder, base="nowhere")
    assert "expected a VAE as .safetensors" in one_line(folder, vae=folder / "model_index.json")


def test_metadata_tells_the_prediction_type_where_the_tensors_leave_it_open(sd1, tmp_path):
    key = "modelspec.prediction_type"
    path = written(tmp_path / "v.safetensors", sd1, {key: "v"})
    pipe, said = one_note(path)
    assert pipe.schedule.prediction_type == "v_prediction"
    assert said == f"{path}: prediction_type v_prediction, as its metadata says ({key})"
    notes = []
    assert open_single_file(path, None, "epsilon", notes=notes).scheduler["prediction_type"] == "epsilon" and not notes
    assert open_single_file(written(path, sd1, {key: "flow"}), notes=notes).scheduler["prediction_type"] == "epsilon"
    assert notes.pop().endswith("expected epsilon or v: ignored")
    marked = written(path, sd1 | {"v_pred": np.zeros(0, "f4")}, {key: "epsilon"})
    assert open_single_file(marked, notes=notes).scheduler["prediction_type"] == "v_prediction" and not notes


def test_the_schedule_can_be_told(folder):
    schedule = jaxmix.load(folder, prediction_type="v_prediction", rescale_betas_zero_snr=True).schedule
    assert schedule.prediction_type == "v_prediction" and schedule.alphas_cumprod[-1] == 0
    assert schedule.timestep_spacing == "trailing"
    assert not jaxmix.load(folder, rescale_betas_zero_snr=False).schedule.rescale_betas_zero_snr
    assert "prediction_type is 'v', expected one of epsilon" in one_line(folder, prediction_type="v")
    assert "rescale_betas_zero_snr: found 'yes'" in one_line(folder, rescale_betas_zero_snr="yes")


F8 = ml_dtypes.float8_e4m3fn


def test_plain_fp8_is_widened_exactly(sd1, tmp_path):
    narrow = {key: x.astype(F8) if x.dtype == np.float16 and x.ndim > 1 else x for key, x in sd1.items()}
    wide = {key: x.astype("f4") if x.dtype == F8 else x for key, x in narrow.items()}
    path = tmp_path / "fp8.safetensors"
    from jaxmix.weights.safetensors import encode_header

    with path.open("wb") as file:  # the safetensors package knows no fp8 of NumPy
        file.write(encode_header({key: (x.dtype, x.shape) for key, x in narrow.items()}, {}))
        for x in narrow.values():
            file.write(x.tobytes())
    expected = jaxmix.load(written(tmp_path / "wide.safetensors", wide)).params
    assert same(jaxmix.load(path).params, expected)
    with pytest.warns(CheckpointWarning, match=r"float8_e4m3fn .*, loaded as (float32|bfloat16)") as said:
        pipe = jaxmix.load(path, "auto")
    assert len(said) == 3 and same(pipe.params, expected)  # one for each part


def test_scaled_fp8_is_multiplied_by_its_scale(sd1, tmp_path):
    from jaxmix.weights.safetensors import encode_header

    rng, narrow, wide = np.random.default_rng(0), {}, dict(sd1)
    chosen = [k for k, x in sd1.items() if k.endswith(".weight") and x.ndim >= 2]
    for i, key in enumerate(chosen):
        scale = rng.uniform(0.5, 2, () if i % 2 else (len(sd1[key]), *[1] * (i % 3))).astype("f4")
        rows = scale if scale.ndim == 0 else scale.reshape(-1, *[1] * (sd1[key].ndim - 1))
        narrow[key] = (sd1[key] / rows).astype(F8)
        narrow[key.removesuffix("weight") + ("scale_weight" if i % 2 else "weight_scale")] = scale
        narrow[key.removesuffix("weight") + "scale_input"] = np.float32(3)
        wide[key] = narrow[key].astype("f4") * rows
    narrow |= {key: x for key, x in sd1.items() if key not in narrow} | {"scaled_fp8": np.zeros(2, F8)}
    path = tmp_path / "scaled.safetensors"
    arrays = {key: np.asarray(x) for key, x in narrow.items()}
    with path.open("wb") as file:
        file.write(encode_header({key: (x.dtype, x.shape) for key, x in arrays.items()}, {}))
        for x in arrays.values():
            file.write(x.tobytes())
    pipe = jaxmix.load(path)
    assert same(pipe.params, jaxmix.load(written(tmp_path / "wide.safetensors", wide)).params)
    pipe.save(tmp_path / "again.safetensors")  # without the scales, which would be applied twice
    assert same(jaxmix.load(tmp_path / "again.safetensors").params, pipe.params)


def test_variants_are_found_in_a_fixed_order():
    whole, other = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.{}.safetensors"
    index = "model.safetensors.index.{}.json"
    order = [whole, other.format("fp16"), index.format("fp16"), other.format("bf16"), "model.EMA.safetensors"]
    order += [other.format("fp8"), other.format("non_ema"), "diffusion_flax_model.msgpack"]
    for i in range(len(order)):
        assert preferred(reversed(order[i:])) == order[i]
    assert preferred(["model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors", "x.json"]) is None
    assert preferred(["MODEL.SAFETENSORS"]) == "MODEL.SAFETENSORS"


def test_a_folder_of_variants_marks_and_upper_case_opens(folder, whole, tmp_path):
    path = shutil.copytree(folder, tmp_path / "pipeline")
    for part, name in (("unet", "non_ema"), ("vae", "bf16")):
        held = path / part / "diffusion_pytorch_model.safetensors"
        held.rename(path / part / f"diffusion_pytorch_model.{name}.safetensors")
    (path / "text_encoder" / "model.safetensors").rename(path / "text_encoder" / "MODEL.SAFETENSORS")
    for config in [*path.rglob("*.json"), *path.rglob("merges.txt")]:
        config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    pipe = jaxmix.load(path)
    assert same(pipe.params, whole.params)
    assert pipe.tokenizers[0]("a cat")["input_ids"] == whole.tokenizers[0]("a cat")["input_ids"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "model_index.json",
        "vae/config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ],
)
@pytest.mark.parametrize(("content", "said"), [(POINTER, "an LFS pointer"), (b"<!DOCTYPE html>\n<p>", "a web page")])
def test_what_stands_in_for_a_file_is_said(folder, tmp_path, name, content, said):
    path = shutil.copytree(folder, tmp_path / "pipeline")
    (path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        open_tokenizer(path / "tokenizer") if "tokenizer" in name else jaxmix.load(path)
    assert str(error.value).startswith(f"{path / name}: ") and "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_named(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "pipeline")
    with pytest.raises(InputError, match=r"gives the token id .* but the text encoder has 40 tokens"):
        jaxmix.load(path).tokenize(["a cat"])


def test_unknown_keys_are_one_note_a_file(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "pipeline")
    config = path / "unet" / "config.json"
    held = json.loads(config.read_text())
    averaged = {"decay": 0.99, "optimization_step": 7, "use_ema_warmup": False, "_comment": "x", "act_fn": None}
    config.write_text(json.dumps(held | averaged | {"sample_size": None, "note": "mine", "future": 1.5}))
    pipe, said = one_note(path)
    assert said == f"{config}: unknown keys are ignored: future=1.5, note='mine'" and pipe.unet.config.sample_size == 64
    config.write_text(json.dumps(held | {"layers_per_block": "two"}))
    assert one_line(path).endswith("UNet2DConditionModel config: layers_per_block is 'two', expected a whole number")


def test_a_home_is_expanded_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert user_path("~/x") == tmp_path / "x"
    (tmp_path / "~x, y.safetensors").touch()
    assert str(user_path("~x, y.safetensors")) == "~x, y.safetensors"
    with pytest.raises(InputError, match="not a path"):
        user_path("~nobody-by-this-name/x")


def test_lenient_schedules_are_saved_as_they_were(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "pipeline")
    index = path / "model_index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "_jaxmix"}))
    config = path / "scheduler" / "scheduler_config.json"
    asked = {"_class_name": "DEISMultistepScheduler", "solver_order": 3, "use_beta_sigmas": True, "solver_type": "bh2"}
    config.write_text(json.dumps(json.loads(config.read_text()) | asked | {"shift_terminal": None}))
    pipe, said = one_note(path)
    assert said.startswith(f"{config}: there is no DEISMultistepScheduler here") and pipe.sampler == "dpmpp_2m_beta"
    dataclasses.replace(pipe, sampler="dpmpp_2m").save(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert {key: kept[key] for key in asked} == asked
    assert jaxmix.load(path, sampler="euler").sampler == "euler"  # without a note


def test_half_precisions_of_two_kinds_are_widened(folder, tmp_path):
    from jaxmix.weights.source import Entry, Source, stored_dtype

    class Held(Source):
        where = "here"

        def __init__(self, *kinds):
            self.kinds = kinds

        @property
        def entries(self):
            return {str(i): Entry(np.dtype(kind), (1,)) for i, kind in enumerate(self.kinds)}

        def read(self, key):
            raise NotImplementedError

    notes = []
    for kinds, widest in (
        ((np.float16,), np.float16),
        ((jnp.bfloat16, np.int32), jnp.bfloat16),
        ((), np.float32),
    ):
        assert stored_dtype(Held(*kinds), notes) == widest and not notes
    for kinds, widest in (
        ((np.float16, jnp.bfloat16), np.float32),
        ((F8,), jnp.bfloat16),
        ((F8, np.float16), np.float32),
        ((np.float64,), np.float32),
        ((F8, jnp.bfloat16), jnp.bfloat16),
    ):
        assert stored_dtype(Held(*kinds), notes) == widest and notes.pop()
