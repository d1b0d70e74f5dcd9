"""LoRAs between torch diffusers with PEFT and here: what one of them writes the other reads, with the same effect."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmix
from jaxmix import LoRA, apply_loras
from jaxmix.models.unet import AddedCond
from jaxmix.tuning import lora as low_rank

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from diffusers.training_utils import _collate_lora_metadata  # noqa: E402
from diffusers.utils import convert_state_dict_to_diffusers  # noqa: E402
from diffusers.utils.state_dict_utils import (  # noqa: E402
    convert_all_state_dict_to_peft,
    convert_state_dict_to_kohya,
)
from safetensors.torch import load_file, save_file  # noqa: E402

from tests.parity.test_pipeline_parity import torch_pipeline  # noqa: E402

# Of diffusers, PEFT and torch about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-5  # of the output's largest absolute value
PROMPT = "a red apple by the sea"
FILE = "pytorch_lora_weights.safetensors"
UNET = r"attn[12]\.to_|ff\.net|proj_in|proj_out|conv|time_emb|linear_"
TEXT = r"_proj|fc"


class Both:
    """One pipeline of random weights in torch and here, and what each computes: text states, then the UNet on them."""

    def __init__(self, family, folder):
        self.theirs = torch_pipeline(family)
        self.theirs.save_pretrained(folder)
        self.ours = jaxmix.load(folder)
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((1, 16, 16, 4)).astype("f4")
        self.time_ids = np.asarray([[32, 32, 0, 0, 32, 32]], "f4")
        self.sdxl = family == "sdxl"
        self.parts = ["unet", "text_encoder"] + ["text_encoder_2"] * self.sdxl
        self._unet = jax.jit(self.ours.unet.apply)  # once: every LoRA is other numbers in the same parameters

    def torch_outputs(self):
        with torch.no_grad():
            context, _, *rest = self.theirs.encode_prompt(
                PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            added = None
            if self.sdxl:
                added = {"text_embeds": rest[0], "time_ids": torch.from_numpy(self.time_ids)}
            x = torch.from_numpy(self.x.transpose(0, 3, 1, 2).copy())
            y = self.theirs.unet(x, 500, context, added_cond_kwargs=added).sample
        return context.numpy(), y.numpy().transpose(0, 2, 3, 1)

    def our_outputs(self, *loras):
        pipe = apply_loras(self.ours, loras)
        text, added = pipe.encode_prompt([PROMPT]), None
        encoded = text.context
        if self.sdxl:
            added = AddedCond(text.pooled, jnp.asarray(self.time_ids))
        y = self._unet({"params": pipe.params["unet"]}, self.x, 500, encoded, (), added)
        return np.asarray(encoded), np.asarray(y)

    def assert_same(self, *loras):
        """Assert that the torch pipeline as it is now equals ours with these LoRAs, and differs from that without."""
        base = self.base
        for got, expected, before in zip(self.our_outputs(*loras), self.torch_outputs(), base, strict=True):
            largest = np.abs(expected).max()
            np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * largest)
            assert np.abs(expected - before).max() > 1e-2 * largest

    @property
    def base(self):
        if not hasattr(self, "_base"):
            self._base = self.our_outputs()
        return self._base

    def random_lora(self, seed, alphas, unet=UNET):
        """Return a LoRA on every part, of two ranks; ``alphas`` are taken in turn."""
        rng = np.random.default_rng(seed)
        made = {}
        for part in self.parts:
            modules = low_rank.targets(self.ours.params[part])
            chosen = [m for m in sorted(modules) if re.search(unet if part == "unet" else TEXT, m)]
            made[part] = {}
            for i, module in enumerate(chosen):
                *space, fan, o = modules[module][1].shape
                rank = (3, 2, 3)[i % 3]
                size = (np.prod(space, dtype=int) * fan * rank) ** -0.5
                made[part][module] = {
                    "down": (rng.standard_normal((*space, fan, rank)) * size).astype("f4"),
                    "up": (0.5 * rng.standard_normal((*[1] * len(space), rank, o))).astype("f4"),
                    "alpha": np.float32(alphas[i % len(alphas)]),
                }
        return LoRA(made)


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def both(request, tmp_path_factory):
    return Both(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def clean(both):
    yield both
    both.theirs.unload_lora_weights()


def test_diffusers_reads_what_we_write_for_it(clean, tmp_path):
    """Dense layers, both kinds of convolution and the text encoders, with ranks and alphas that differ by module."""
    lora = clean.random_lora(0, (1.0, 4.0, 2.5))
    lora.save(tmp_path / FILE, clean.ours)
    clean.theirs.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="one")
    clean.assert_same((lora, 1.0))
    clean.theirs.set_adapters(["one"], [0.4])
    clean.assert_same((lora, 0.4))


def test_two_loras_with_their_strengths_add_as_in_diffusers(clean, tmp_path):
    loras = [clean.random_lora(seed, (2.0, 1.0), "attn2") for seed in (0, 1)]
    for name, lora in zip("ab", loras, strict=True):
        lora.save(tmp_path / f"{name}.safetensors")
        clean.theirs.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    clean.theirs.set_adapters(["a", "b"], [0.7, -0.5])
    clean.assert_same((loras[0], 0.7), (loras[1], -0.5))


def test_a_text_encoder_lora_without_attention_is_read_by_diffusers(clean, tmp_path):
    whole = clean.random_lora(0, (2.0,), "attn2").parts
    lora = LoRA({"unet": whole["unet"], "text_encoder": {m: f for m, f in whole["text_encoder"].items() if "fc" in m}})
    lora.save(tmp_path / FILE)
    clean.theirs.load_lora_weights(tmp_path, weight_name=FILE)
    clean.assert_same((lora, 1.0))


def test_diffusers_reads_our_kohya_files(clean, tmp_path):
    """One alpha: diffusers 0.42 loses the alphas of single modules of kohya's files on the way to PEFT."""
    lora = clean.random_lora(0, (1.5,))
    lora.save(tmp_path / FILE, clean.ours, "kohya")
    assert any(("input_blocks" in key) == clean.sdxl for key in load_file(tmp_path / FILE) if "attn1" in key)
    clean.theirs.load_lora_weights(tmp_path, weight_name=FILE)
    clean.assert_same((lora, 1.0))


class Named:
    """A model whose adapter is called as in diffusers' training scripts."""

    def __init__(self, model):
        self.peft_config = {"default": next(iter(model.peft_config.values()))}


def add_by_peft(both):
    """Add LoRAs to the torch pipeline as diffusers' training scripts do, with random numbers; return their states."""
    torch.manual_seed(0)
    states = {}
    for part in both.parts:
        model, unet = getattr(both.theirs, part), part == "unet"
        config = peft.LoraConfig(
            r=3,
            lora_alpha=2,
            rank_pattern={"to_q": 2, "fc1": 4},
            alpha_pattern={"to_q": 5, "q_proj": 5},
            target_modules=["to_q", "to_out.0", "conv1", "proj_in", "ff.net.2"]
            if unet
            else ["q_proj", "out_proj", "fc1"],
        )
        model.add_adapter(config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(0.3 * torch.randn_like(p))
        states[part] = peft.get_peft_model_state_dict(model, adapter_name=next(iter(model.peft_config)))
    return states


def test_we_read_what_diffusers_writes(clean, tmp_path):
    states = add_by_peft(clean)
    clean.theirs.save_lora_weights(
        tmp_path,
        **{f"{part}_lora_layers": convert_state_dict_to_diffusers(state) for part, state in states.items()},
        **_collate_lora_metadata({part: Named(getattr(clean.theirs, part)) for part in clean.parts}),
    )
    lora = LoRA.load(tmp_path, clean.ours)
    assert {float(f["alpha"]) for f in lora.parts["unet"].values()} == {2, 5}
    clean.assert_same((lora, 1.0))


def test_we_read_the_kohya_files_that_diffusers_converts_and_reads(clean, tmp_path):
    states = add_by_peft(clean)
    clean.theirs.unload_lora_weights()
    flat = {f"{part}.{key}": x for part, state in states.items() for key, x in state.items()}
    kohya = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(flat))
    # The converter writes the ranks for alphas; another number shows that it is read.
    kohya = {key: torch.tensor(1.5) if key.endswith(".alpha") else x.contiguous() for key, x in kohya.items()}
    save_file(kohya, tmp_path / "kohya.safetensors")
    clean.theirs.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    lora = LoRA.load(tmp_path, clean.ours)
    assert {f["down"].shape[-1] for f in lora.parts["text_encoder"].values()} == {3, 4}
    clean.assert_same((lora, 1.0))


def test_halves_of_a_b_lora_are_those_of_its_authors_filter(clean, tmp_path):
    """Its authors keep a half by the name of its block in the keys, and load what is left into diffusers' UNet."""
    modules = low_rank.targets(clean.ours.params["unet"])
    content, style, *_ = sorted({m.split(".transformer")[0] for m in modules if re.match(r"up_blocks.*attn2", m)})
    made = clean.random_lora(3, (2.0,), rf"({content}|{style})\..*attn[12]\.to_")
    # Their script knows no alpha.
    factors = {module: {**f, "alpha": np.float32(f["down"].shape[-1])} for module, f in made.parts["unet"].items()}
    blocks = {"style": rf"^{re.escape(style)}\.", "content": rf"^{re.escape(content)}\."}
    LoRA({"unet": factors}, blocks=blocks).save(tmp_path / FILE, clean.ours)
    read, states = LoRA.load(tmp_path / FILE, clean.ours), load_file(tmp_path / FILE)
    for name, block in (("style", f"unet.{style}"), ("content", f"unet.{content}")):
        half = {key: x for key, x in states.items() if block in key}
        assert 0 < len(half) < len(states)
        clean.theirs.load_lora_weights({**half})
        expected, base = clean.torch_outputs()[1], clean.base[1]
        largest = np.abs(expected).max()
        assert np.abs(expected - base).max() > 1e-2 * largest
        for lora in ((read.only(name), 1.0), (LoRA.load(tmp_path / FILE), {name: 1.0})):
            np.testing.assert_allclose(clean.our_outputs(lora)[1], expected, rtol=0, atol=TOLERANCE * largest)
        clean.theirs.unload_lora_weights()
    clean.theirs.load_lora_weights(tmp_path, weight_name=FILE)
    expected = clean.torch_outputs()[1]
    got = clean.our_outputs((read, {"style": 1.0, "content": 1.0}))[1]
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
