"""Training a VMix adapter against the paper's equations (arXiv 2412.20800) in plain torch.

Ours is `train.vmix` as its command runs it. It and the oracle get the same latents, text states, timesteps and noise.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmix import VMix
from jaxmix.models import UNet2DConditionModel, UNetConfig
from jaxmix.schedule import NoiseSchedule
from jaxmix.testing import TINY_SDXL_UNET
from jaxmix.tuning.loss import draw_timesteps
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from jaxmix.weights.names import flatten
from tests.parity.oracle import loaded
from tests.parity.vmix_oracle import BETAS, Adapter, Oracle, Record
from train.diffusion import make_loss
from train.vmix import Config, join_adapter, make_adapter, make_predict, split_adapter

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

RELATIVE = 1e-4
ROWS, STEPS = 4, 3
LABELS = {"color": ("vibrant color", "[V]"), "light": ("bright light", "[S]"), "focus": ("sharp focus", "[T]")}
SD15_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
COMMON = {
    "output_dir": "unused",
    "pretrained_model_name_or_path": "unused",
    "train_data_dir": "unused",
    "labels": LABELS,
    "rank": 2,
    "lora_alpha": 3.0,
    "sample_posterior": False,
    "train_batch_size": ROWS,
    "learning_rate": 1e-2,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-4,  # far above the rounding of float32, of which Adam's first steps otherwise see the sign
    "adam_weight_decay": 0.3,
    "max_grad_norm": 0.05,
    "ema_decay": 0.15,
}
DEAD = ("vmix", "token_proj", "bias")
"""F's bias moves all channels of a token alike, and F's norm takes that away again: its gradient is rounding alone."""
LINEARS = r"attn[12]\.to_(q|k|v|out\.0)$|ff\.net|proj_(in|out)$"
CONVOLUTIONS = r"resnets\.\d+\.conv|samplers\.\d+\.conv$"
CASES = {
    "sd15": (SD15_UNET, "epsilon", {"lora_targets": f"{LINEARS}|{CONVOLUTIONS}"}),
    "sd2": (
        SD15_UNET | {"use_linear_projection": True, "attention_head_dim": (2, 4)},
        "v_prediction",
        {"snr_gamma": 5.0, "noise_offset": 0.1, "gradient_accumulation_steps": 2, "lora_targets": LINEARS},
    ),
    "sdxl": (
        TINY_SDXL_UNET,
        "epsilon",
        {"snr_gamma": 3.0, "weighting_scheme": "logit_normal", "gradient_checkpointing": True, "lora_targets": LINEARS},
    ),
}


# Ours -----------------------------------------------------------------------------------------------------------------


def keep_gradients():
    """Return an optimiser's first link that keeps the gradients it sees as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )


@dataclasses.dataclass
class Problem:
    """One case: a base, a config, a batch, and both trainers."""

    pipe: object
    cfg: Config
    batch: dict
    frozen: dict
    fresh: VMix
    update: object
    optimizer: object
    oracle: Oracle
    key: jax.Array

    def start(self, moved):
        learns, _ = split_adapter(self.fresh, self.cfg)
        learns = jax.tree.map(jnp.array, learns)
        if moved:  # away from zeros, so that gradients reach everything
            leaves, tree = jax.tree.flatten(learns)
            rng = np.random.default_rng(3)
            learns = jax.tree.unflatten(tree, [x + 0.2 * rng.standard_normal(x.shape, np.float32) for x in leaves])
        return learns

    def ours(self, learns):
        state = TrainState.create(jax.tree.map(jnp.array, learns), self.optimizer, ema=True)
        records = []
        for _ in range(STEPS):
            state, metrics = self.update(state, self.frozen, self.batch, self.key)
            trees = (state.opt_state[0], state.params, state.ema)
            records.append(Record(float(metrics["loss"]), *(dict(flatten(jax.device_get(x))) for x in trees)))
        return records

    def draws(self):
        """Return the timesteps and the noise of each step: a list of (rows, numbers), one a micro-batch."""
        count = self.cfg.gradient_accumulation_steps
        out = []
        for step in range(STEPS):
            key = jax.random.fold_in(self.key, step)
            keys = [key] if count == 1 else [jax.random.fold_in(key, j) for j in range(count)]
            micro = []
            for j, k in enumerate(keys):
                key_t, key_noise, key_offset = jax.random.split(jax.random.split(k)[1], 3)
                rows = np.arange(j, ROWS, count)
                shape = (len(rows), 8, 8, 4)
                drawn = {
                    "t": draw_timesteps(key_t, len(rows), 1000, self.cfg.logit_normal),
                    "noise": jax.random.normal(key_noise, shape),
                    "offset": jax.random.normal(key_offset, (len(rows), 1, 1, 4)),
                }
                micro.append((rows, {name: np.array(x) for name, x in drawn.items()}))
            out.append(micro)
        return out

    def both(self, moved):
        start = self.start(moved)
        return self.ours(start), self.oracle.run(dict(flatten(start)), self.batch, self.draws())


@dataclasses.dataclass
class OracleConfig(Config):
    """The trainer's config with what its batches say beside it."""

    scaling: float = 1.0
    empty: dict = dataclasses.field(default_factory=dict)


def make_batch(pipe, rng):
    d, tokens = pipe.unet.config.cross_attention_dim, pipe.text_length

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    batch = {
        "latents_mean": 5.0 * normal(ROWS, 8, 8, 4),
        "latents_std": np.full((ROWS, 8, 8, 4), 0.1, np.float32),
        "context": normal(ROWS, tokens, d),
        "present": np.asarray([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], np.float32),
        "dropped": np.asarray([0, 0, 1, 0], np.float32),
    }
    empty = {"context": normal(tokens, d)}
    if pipe.text_encoder_2 is not None:
        batch["pooled"], empty["pooled"] = normal(ROWS, 20), normal(20)
        batch["time_ids"] = np.asarray([[16, 16, 0, 0, 16, 16], [24, 16, 0, 4, 16, 16]] * 2, np.float32)
    return batch, empty


@pytest.fixture(scope="module", params=CASES)
def problem(request, tiny_pipeline, tmp_path_factory):
    unet_config, prediction_type, options = CASES[request.param]
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**unet_config)
    ours = UNet2DConditionModel(UNetConfig.from_dict(dict(theirs.config)))
    params = loaded(theirs, ours, tmp_path_factory.mktemp("unet"))
    theirs.requires_grad_(False).double()
    schedule = NoiseSchedule.from_config({**BETAS, "prediction_type": prediction_type})
    pipe = request.getfixturevalue("tiny_sdxl" if request.param == "sdxl" else "tiny_pipeline")
    pipe = dataclasses.replace(pipe, unet=ours, params={**pipe.params, "unet": params}, schedule=schedule)
    batch, empty = make_batch(pipe, np.random.default_rng(0))
    cfg = OracleConfig(**COMMON, **options, scaling=pipe.vae.config.scaling_factor, empty=empty)
    fresh = make_adapter(pipe, cfg)
    _, constants = split_adapter(fresh, cfg)
    optimizer = optax.chain(keep_gradients(), make_optimizer(cfg))
    update = make_update(
        make_loss(pipe, cfg, make_predict(pipe, cfg)), optimizer, cfg.ema_decay, cfg.gradient_accumulation_steps
    )
    adapter = Adapter(theirs, constants["aes_emb"], pipe.text_length, cfg.lora_targets, cfg.rank, cfg.lora_alpha)
    oracle = Oracle(theirs, prediction_type, cfg, adapter)
    frozen = {"unet": params, "empty": empty, **constants}
    return Problem(pipe, cfg, batch, frozen, fresh, update, optimizer, oracle, jax.random.key(7))


@pytest.fixture(scope="module")
def moved(problem):
    return problem.both(moved=True)


@pytest.fixture(scope="module")
def from_the_start(problem):
    return problem.both(moved=False)


def assert_trees_agree(got, expected):
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        if np.abs(value).max() < 1e-12:
            assert np.abs(got[path]).max() < (1e-6 if path == DEAD else 1e-12), path
            continue
        difference = np.abs(np.asarray(got[path], np.float64) - value).max()
        assert got[path].shape == value.shape and difference <= RELATIVE * np.abs(value).max(), path


def norm(grads):
    return np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))


def test_the_loss_and_every_gradient_agree(problem, moved):
    for got, expected in zip(*moved, strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=RELATIVE)
        assert norm(expected.grads) > problem.cfg.max_grad_norm  # so that clipping is at work below
        assert_trees_agree(got.grads, expected.grads)
        assert min(np.abs(g).max() for path, g in expected.grads.items() if path != DEAD) > 1e-6


def test_three_optimizer_steps_agree_in_every_parameter_and_its_average(problem, moved):
    start = dict(flatten(problem.start(moved=True)))
    for got, expected in zip(*moved, strict=True):
        assert_trees_agree(got.params, expected.params)
        assert_trees_agree(got.ema, expected.ema)
    # What they have moved by agrees too, not only what they have become.
    changes = [{path: x - np.asarray(start[path], np.float64) for path, x in r[-1].params.items()} for r in moved]
    for path, change in changes[1].items():
        assert path == DEAD or np.linalg.norm(changes[0][path] - change) <= 10 * RELATIVE * np.linalg.norm(change), path
    assert any(np.abs(got.ema[path] - got.params[path]).max() > 1e-4 for path in got.params)


def test_from_the_true_start_the_same_parts_learn_first(from_the_start):
    first = {("vmix", "zero_proj", "kernel"), ("vmix", "zero_proj", "bias")}
    for records in from_the_start:
        reached = {path for path, g in records[0].grads.items() if np.abs(g).max() > 0}
        assert reached == first | {path for path in records[0].grads if path[-1] == "up"}
        assert all(np.abs(g).max() > 1e-7 for path, g in records[2].grads.items() if path != DEAD)
    for got, expected in zip(*from_the_start, strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=RELATIVE)
        assert_trees_agree(got.grads, expected.grads)
        assert_trees_agree(got.params, expected.params)


def test_what_is_exported_is_the_average(problem, moved):
    state = {}
    for path, value in moved[0][-1].ema.items():
        node = state
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    adapter = join_adapter(problem.fresh, state, problem.cfg)
    np.testing.assert_array_equal(
        adapter.params["zero_proj"]["kernel"], moved[0][-1].ema["vmix", "zero_proj", "kernel"]
    )
    np.testing.assert_array_equal(adapter.params["aes_emb"], problem.fresh.params["aes_emb"])
    factors = adapter.lora.parts["unet"]
    assert factors.keys() == problem.fresh.lora.parts["unet"].keys()
    assert {float(f["alpha"]) for f in factors.values()} == {problem.cfg.lora_alpha}
