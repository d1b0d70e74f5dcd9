"""Three steps of train.lora, dreambooth and textual_inversion against diffusers' models, PEFT and AdamW in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmix
from jaxmix.pipeline.blocks import layer_names
from jaxmix.tuning.loss import draw_timesteps
from jaxmix.tuning.update import TrainState, make_optimizer, make_update
from jaxmix.weights import names
from train import dreambooth, lora
from train import textual_inversion as ti
from train.diffusion import make_loss, make_predict, make_tokenize
from train.low_rank import FILE, KOHYA_FILE, make_weigh, start_lora, text_rates

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from tests.parity.test_pipeline_parity import torch_pipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4  # of the largest value of each array
STEPS, GAMMA, RATE, TEXT_RATE = 3, 5.0, 1e-3, 2e-4
KEYS = {
    "output_dir": "unused",
    "pretrained_model_name_or_path": "unused",
    "train_data_dir": "unused",
    "sample_posterior": False,
    "caption_dropout_rate": 0.0,
    "snr_gamma": GAMMA,
    "learning_rate": RATE,
    "lr_scheduler": "constant_with_warmup",
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-5,
    "max_grad_norm": 0.0,
    "ema_decay": 0.0,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}
WEIGHT_DECAY = 1e-2
EPSILON = 1e-5  # of AdamW: with less, gradients that are zero but for rounding become whole steps


def rows_of(pipe, make, cfg, sources):
    """Return the batch of rows, all alike but for their numbers, as the trainer makes it."""
    transform = make(make_tokenize(pipe), cfg)
    rng = np.random.default_rng(0)
    rows = []
    for i, source in enumerate(sources):
        image = rng.integers(0, 256, (32, 32, 3), np.uint8)
        ids = np.asarray([40, 36, 2, 4, 32, 32], np.float32)
        rows.append(transform({"image": image, "time_ids": ids, "id": str(i), **source}, rng))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "id"}


def drawn(key, step, micro, shape):
    """Return the timesteps and the noise of one micro-batch, as the update draws them."""
    key = jax.random.fold_in(jax.random.fold_in(key, step), micro)
    key_noise = jax.random.split(key)[1]
    key_t, key_noise, _ = jax.random.split(key_noise, 3)
    return np.asarray(draw_timesteps(key_t, shape[0], 1000)), np.asarray(jax.random.normal(key_noise, shape))


class Torch:
    """A pipeline in torch, and its loss for what one micro-batch sees."""

    def __init__(self, theirs):
        self.theirs, self.sdxl = theirs, hasattr(theirs, "text_encoder_2")
        self.abar = torch.from_numpy(np.asarray(theirs.scheduler.alphas_cumprod))
        theirs.vae.requires_grad_(False)

    def loss(self, batch, t, noise):
        images = torch.from_numpy(batch["image"].transpose(0, 3, 1, 2).astype("f4") / 127.5 - 1)
        z = self.theirs.vae.encode(images).latent_dist.mean * self.theirs.vae.config.scaling_factor
        t, noise = torch.from_numpy(t.astype("i8")), torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
        abar = self.abar[t][:, None, None, None]
        noisy = abar.sqrt() * z + (1 - abar).sqrt() * noise
        ids = torch.from_numpy(batch["input_ids"].astype("i8"))
        context, added = self.encode(ids, batch)
        found = self.predict(noisy, t, context, added, ids, batch)
        snr = self.abar[t] / (1 - self.abar[t])
        weights = torch.minimum(snr, torch.tensor(GAMMA)) / snr
        if "loss_weight" in batch:
            weights = weights * torch.from_numpy(batch["loss_weight"])
        return (weights * ((found - noise) ** 2).mean((1, 2, 3))).mean()

    def encode(self, ids, batch):
        added = None
        if self.sdxl:
            first = self.theirs.text_encoder(ids, output_hidden_states=True)
            second = self.theirs.text_encoder_2(
                torch.from_numpy(batch["input_ids_2"].astype("i8")), output_hidden_states=True
            )
            context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
            added = {"text_embeds": second[0], "time_ids": torch.from_numpy(batch["time_ids"])}
        else:
            context = self.theirs.text_encoder(ids)[0]
        return context, added

    def predict(self, noisy, t, context, added, ids, batch):
        return self.theirs.unet(noisy, t, context, added_cond_kwargs=added).sample


def three_steps(pipe, cfg, learns, frozen, batch, model, groups, weigh=None, predict=None):
    """Run three steps in both and compare the losses.

    `groups` are ({name: torch parameter}, learning rate). Returns our weights, our gradients of the first step, theirs.
    """
    cfg.adam_weight_decay = WEIGHT_DECAY
    optimizer = make_optimizer(cfg, text_rates(cfg) if hasattr(cfg, "text_encoder_lr") else None)
    state = TrainState.create(learns, optimizer, ema=False)
    update = make_update(make_loss(pipe, cfg, predict or make_predict(pipe, cfg), weigh), optimizer, 0.0, 2)
    parameters = [
        {"params": some, "lr": rate, "weight_decay": WEIGHT_DECAY * decays}
        for params, rate in groups
        for decays in (True, False)
        if (some := [p for n, p in params.items() if (p.ndim > 1 and "magnitude" not in n) == decays])
    ]
    theirs = torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=EPSILON)
    key, shape = jax.random.key(7), (2, 16, 16, 4)
    for step in range(STEPS):
        state, metrics = update(state, frozen, batch, key)
        theirs.zero_grad()
        total = 0.0
        for micro in range(2):
            rows = {name: x[micro::2] for name, x in batch.items()}
            loss = model.loss(rows, *drawn(key, step, micro, shape)) / 2
            loss.backward()
            total += float(loss)
        np.testing.assert_allclose(float(metrics["loss"]), total, rtol=TOLERANCE)
        if step == 0:  # Adam's first moment is a tenth of the gradient
            ours = jax.tree.map(lambda x: np.asarray(x) * 10, optax.tree.get(state.opt_state, "mu"))
            grads = {name: p.grad for params, _ in groups for name, p in params.items()}
            # None: a layer that SDXL does not read.
            first = {name: np.zeros(1, "f4") if g is None else g.numpy().copy() for name, g in grads.items()}
        theirs.step()
    return state.params, ours, first


def assert_same(found, expected, name):
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=max(TOLERANCE * size, 1e-7), err_msg=name)
    return size


def test_dreambooth_of_all_weights_and_the_text_encoder(tmp_path):
    """min-SNR weights of each row in both halves, the prior's mean over its own rows, in two micro-batches."""
    theirs = torch_pipeline("sd1")
    theirs.save_pretrained(tmp_path)
    pipe = jaxmix.load(tmp_path)
    told = {"instance_prompt": "a sks dog", "class_prompt": "a dog", "with_prior_preservation": True}
    cfg = dreambooth.Config(**KEYS, **told, train_text_encoder=True, prior_loss_weight=0.6)
    sources = [{"text": (cfg.instance_prompt, cfg.class_prompt)[i % 2], "half": i % 2} for i in range(4)]
    batch = rows_of(pipe, dreambooth.make_rows, cfg, sources)
    np.testing.assert_allclose(batch["loss_weight"], [2, 1.2, 2, 1.2])
    learns = {part: jax.tree.map(jnp.array, pipe.params[part]) for part in dreambooth.full_parts(pipe, cfg)}
    frozen = {"vae": pipe.params["vae"]}
    known = {f"{part}.{name}": p for part in learns for name, p in getattr(theirs, part).named_parameters()}
    params, ours, first = three_steps(pipe, cfg, learns, frozen, batch, Torch(theirs), [(known, RATE)])
    last = {name: p.detach().numpy() for name, p in known.items()}
    for found, expected in ((ours, first), (params, last)):
        seen = {}
        for part, tree in found.items():
            short = {name.removeprefix(f"{part}."): name for name in expected if name.startswith(f"{part}.")}
            for path, leaf in names.flatten(tree):
                name = short[names.match(names.to_torch_key(path), short)]
                seen[name] = assert_same(names.to_torch_layout(path, np.asarray(leaf)), expected[name], name)
        assert seen.keys() == expected.keys() and min(seen.values()) > 0


ROLES = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}


def test_lora_of_all_parts_with_dora_in_files_that_diffusers_reads(tmp_path):
    """Ranks and alphas by pattern, convolutions, rsLoRA, another learning rate for both text encoders; then files."""
    theirs = torch_pipeline("sdxl")
    theirs.save_pretrained(tmp_path)
    pipe = jaxmix.load(tmp_path)
    cfg = lora.Config(
        **KEYS, rank=4, lora_alpha=3.0, rank_pattern={"to_q": 2}, alpha_pattern={r"to_(q|k)": 5.0}, conv_rank=3,
        use_dora=True, use_rslora=True, train_text_encoder=True, text_encoder_lr=TEXT_RATE, prior_loss_weight=0.6,
    )  # fmt: skip
    trained = start_lora(pipe, cfg, 0)
    rng = np.random.default_rng(1)
    learns = {
        part: {
            module: {
                **f,
                "up": jnp.asarray(0.2 * rng.standard_normal(f["up"].shape), jnp.float32),
                "magnitude": f["magnitude"] * jnp.asarray(rng.uniform(0.8, 1.2, f["magnitude"].shape), jnp.float32),
            }
            for module, f in factors.items()
        }
        for part, factors in trained.learns.items()
    }
    trained.save(learns, tmp_path, pipe, "both")
    theirs.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="one")
    known = {
        f"{part}.{name}".replace(".one", "").removesuffix(".weight"): p.requires_grad_(True)
        for part in learns
        for name, p in getattr(theirs, part).named_parameters()
        if "lora_" in name
    }
    groups = [({n: p for n, p in known.items() if n.startswith("text_encoder") == text}, rate)
              for text, rate in ((False, RATE), (True, TEXT_RATE))]  # fmt: skip
    sources = [{"text": f"{'a sks ' * (i % 2)}dog number {i}", "regular": i % 2 == 1} for i in range(4)]
    batch = rows_of(pipe, lora.make_rows, cfg, sources)
    np.testing.assert_allclose(batch["loss_weight"], np.float32([1, 0.6, 1, 0.6]))
    weigh = make_weigh(trained, cfg)
    start = jax.tree.map(jnp.array, learns)
    params, ours, first = three_steps(pipe, cfg, start, dict(pipe.params), batch, Torch(theirs), groups, weigh)
    last = {name: p.detach().numpy() for name, p in known.items()}
    for found, expected in ((ours, first), (params, last)):
        seen = {}
        for part, factors in found.items():
            for module, f in factors.items():
                for role, leaf in f.items():
                    leaf = names.to_torch_layout(("kernel",), np.asarray(leaf))  # magnitudes have one axis
                    ends = (module, module.removeprefix("text_model."))
                    name = next(n for m in ends if (n := f"{part}.{m}.{ROLES[role]}") in expected)
                    shape = last[name].shape
                    seen[name] = assert_same(leaf.reshape(shape), np.broadcast_to(expected[name], shape), name)
        assert seen.keys() == expected.keys()
        # A quarter of SDXL's text encoders' modules here are those of layers that it does not read.
        assert np.mean(np.asarray(list(seen.values())) > 0) > 0.9
    # What is written is read back there and here, in both layouts, with the alphas that rsLoRA makes of them.
    trained.save(params, tmp_path, pipe, "both")
    states = load_file(tmp_path / FILE)
    assert sum("lora_magnitude_vector" in key for key in states) == sum(map(len, params.values()))
    for name in (FILE, KOHYA_FILE):
        again = jaxmix.LoRA.load(tmp_path, pipe, name).parts
        jax.tree.map(np.testing.assert_array_equal, again, dict(trained.lora(params).parts))
    with torch.no_grad():
        ids = torch.from_numpy(batch["input_ids"].astype("i8"))
        before = theirs.text_encoder(ids)[0].numpy()
        theirs.unload_lora_weights()
        theirs.load_lora_weights(tmp_path, weight_name=FILE)
        after = theirs.text_encoder(ids)[0].numpy()
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


class Table(torch.nn.Module):
    """A text encoder's table with learnt rows behind it: those of one layer, or the mean of all layers' if None."""

    def __init__(self, table, vectors):
        super().__init__()
        self.table, self.vectors, self.layer = table.weight.detach(), vectors, None

    def forward(self, ids):
        learnt = self.vectors
        if learnt.ndim == 3:
            learnt = learnt.mean(0) if self.layer is None else learnt[self.layer]
        return torch.nn.functional.embedding(ids, torch.cat([self.table, learnt]))


class TorchWord(Torch):
    """A pipeline with learnt rows, whose layers are told prompts with their own if they have any."""

    def __init__(self, theirs, learns, layers):
        super().__init__(theirs)
        self.layers, self.tables, self.learns = layers, [], {}
        for part, vectors in learns.items():
            encoder = getattr(theirs, part)
            self.learns[part] = torch.nn.Parameter(torch.from_numpy(np.array(vectors)))
            self.tables.append(Table(encoder.get_input_embeddings(), self.learns[part]))
            encoder.requires_grad_(False).set_input_embeddings(self.tables[-1])
        theirs.unet.requires_grad_(False)

    def predict(self, noisy, t, context, added, ids, batch):
        from diffusers.models.attention_processor import AttnProcessor2_0

        class Told(AttnProcessor2_0):
            def __init__(self, states):
                super().__init__()
                self.states = states

            def __call__(self, attn, x, encoder_hidden_states=None, **more):
                return super().__call__(attn, x, self.states, **more)

        processors = dict(self.theirs.unet.attn_processors)
        for i, name in enumerate(self.layers):
            for table in self.tables:
                table.layer = i
            processors[f"{name}.processor"] = Told(self.encode(ids, batch)[0])
        for table in self.tables:
            table.layer = None
        self.theirs.unet.set_attn_processor(processors)
        return super().predict(noisy, t, context, added, ids, batch)


@pytest.mark.parametrize(("family", "per_layer"), [("sd1", False), ("sdxl", True)])
def test_textual_inversion_of_both_encoders_and_of_layers(tmp_path, family, per_layer):
    """Two vectors, with weight decay; then the file, which diffusers and A1111's rule read as we do."""
    theirs = torch_pipeline(family)
    theirs.save_pretrained(tmp_path)
    pipe = jaxmix.load(tmp_path)
    told = {"placeholder_token": "<toy>", "initializer_token": "cat by", "num_vectors": 2}
    cfg = ti.Config(**KEYS, **told, learnable_property="captions", per_layer=per_layer)
    word, start = ti.start_word(pipe, cfg)
    rng = np.random.default_rng(1)
    start = {part: x + 0.3 * rng.standard_normal(x.shape).astype("f4") for part, x in start.items()}
    tokenize = ti.make_tokenize(word.add(pipe, start))
    sources = [{"text": f"a <toy> number {i}"} for i in range(4)]
    batch = rows_of(pipe, lambda _, cfg: ti.make_rows(tokenize, cfg), cfg, sources)
    assert (batch["input_ids"] >= pipe.text_encoder.config.vocab_size).sum(1).tolist() == [2] * 4
    model = TorchWord(theirs, start, list(layer_names(pipe).values()) if per_layer else [])
    learns = jax.tree.map(jnp.array, start)
    how = {"weigh": ti.make_weigh(per_layer), "predict": ti.make_predict(pipe, cfg)}
    groups = [(model.learns, RATE)]
    params, ours, first = three_steps(pipe, cfg, learns, dict(pipe.params), batch, model, groups, **how)
    last = {part: p.detach().numpy() for part, p in model.learns.items()}
    for found, expected in ((ours, first), (params, last)):
        assert found.keys() == expected.keys()
        assert min(assert_same(np.asarray(x), expected[part], part) for part, x in found.items()) > 0
    word.save(params, tmp_path)
    ours, prompt = pipe.with_embedding(tmp_path / ti.FILE), "a <toy> by the sea"
    if per_layer:
        return
    held = load_file(tmp_path / ti.FILE)
    assert type(held) is dict and list(held) == ["<toy>"] and held["<toy>"].shape == (2, 16)  # A1111 asks no more
    fresh = torch_pipeline(family)
    fresh.load_textual_inversion(str(tmp_path))
    with torch.no_grad():
        expected, _ = fresh.encode_prompt(prompt, "cpu", 1, False)
    assert_same(np.asarray(ours.encode_prompt([prompt]).context), expected.numpy(), prompt)
