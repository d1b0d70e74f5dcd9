"""VMix's training in plain torch, from the paper's equations (arXiv 2412.20800): the oracle of `test_vmix_parity`.

diffusers' UNet in float64 with two attention branches in every attn2 and a LoRA in forward hooks, diffusers' noise
schedule, torch's AdamW and gradient clipping.
"""

import dataclasses
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class TwoBranches:
    """An attn2's processor: softmax(Q K_c) V_c + gate * softmax(Q K_c) V_a, each branch on its own."""

    def __init__(self, adapter, to_v):
        self.adapter, self.to_v = adapter, to_v

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        v_a = self.to_v(self.adapter.context())
        q, k, v, v_a = heads(q), heads(k), heads(v), heads(v_a)
        probs = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        content, aesthetic = probs @ v, probs @ v_a
        mixed = content + self.adapter.gate[:, None, None, None] * aesthetic
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


class Adapter(torch.nn.Module):
    """F, Z, W_V^a and the LoRA, put into a frozen UNet."""

    def __init__(self, unet, aes_emb, tokens, pattern, rank, alpha):
        super().__init__()
        n, _, d = aes_emb.shape
        self.aes_emb = torch.tensor(np.asarray(aes_emb))
        self.token_proj, self.norm = torch.nn.Linear(n, tokens), torch.nn.LayerNorm(d)
        self.zero_proj = torch.nn.Linear(d, d)
        self.to_v, self.down, self.up = (torch.nn.ModuleDict() for _ in range(3))
        for name, module in unet.named_modules():
            if name.endswith(".attn2"):
                to_v = torch.nn.Linear(d, module.to_v.out_features, bias=False)
                module.set_processor(TwoBranches(self, to_v))
                self.to_v[name.replace(".", "/")] = to_v
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        found = [(name, m) for name, m in unet.named_modules() if isinstance(m, kinds) and re.search(pattern, name)]
        for name, module in found:
            if isinstance(module, torch.nn.Linear):
                down = torch.nn.Linear(module.in_features, rank, bias=False)
                up = torch.nn.Linear(rank, module.out_features, bias=False)
            else:
                size = (module.kernel_size, module.stride, module.padding)
                down = torch.nn.Conv2d(module.in_channels, rank, *size, bias=False)
                up = torch.nn.Conv2d(rank, module.out_channels, 1, bias=False)
            self.down[name.replace(".", "/")], self.up[name.replace(".", "/")] = down, up

            def add(module, args, out, down=down, up=up):
                return out + alpha / rank * up(down(args[0]))

            module.register_forward_hook(add)
        self.double()

    def context(self):
        f = torch.stack(
            [torch.stack([self.aes_emb[i, int(on)] for i, on in enumerate(row)]) for row in self.present]
        ).double()
        return self.zero_proj(self.norm(self.token_proj(f.transpose(1, 2)).transpose(1, 2)))

    def by_path(self):
        """Return {our path: parameter}."""
        out = {}
        for name in ("token_proj", "norm", "zero_proj"):
            layer = getattr(self, name)
            out["vmix", name, "scale" if name == "norm" else "kernel"] = layer.weight
            out["vmix", name, "bias"] = layer.bias
        out |= {("vmix", "to_v", name.replace("/", "."), "kernel"): m.weight for name, m in self.to_v.items()}
        for factor in ("down", "up"):
            layers = getattr(self, factor)
            out |= {("lora", name.replace("/", "."), factor): m.weight for name, m in layers.items()}
        return out


def to_torch(array):
    """Return (.., in, out) as torch has it, (out, in, ..)."""
    array = np.asarray(array, np.float64)
    return torch.tensor(np.moveaxis(array, (-1, -2), (0, 1)) if array.ndim > 1 else array)


def from_torch(tensor):
    array = tensor.detach().numpy().copy()
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


@dataclasses.dataclass
class Record:
    """What a step left behind: loss and gradients before clipping, parameters and average after it; by our paths."""

    loss: float
    grads: dict
    params: dict
    ema: dict


class Oracle:
    """The plain torch trainer."""

    def __init__(self, unet, prediction_type, cfg, adapter):
        self.unet, self.cfg, self.adapter = unet, cfg, adapter
        self.schedule = diffusers.DDPMScheduler(**BETAS, prediction_type=prediction_type)

    def loss(self, batch, drawn):
        """Return the mean squared error of some rows."""
        cfg, schedule = self.cfg, self.schedule
        x, noise, t = (torch.tensor(a) for a in (batch["latents_mean"], drawn["noise"], drawn["t"]))
        x = x.double() * cfg.scaling
        noise = noise.double()
        if cfg.noise_offset:
            noise = noise + cfg.noise_offset * torch.tensor(drawn["offset"]).double()
        x, noise = x.permute(0, 3, 1, 2), noise.permute(0, 3, 1, 2)
        dropped = torch.tensor(batch["dropped"]).bool()
        self.adapter.present, self.adapter.gate = batch["present"], 1.0 - dropped.double()
        context = torch.where(
            dropped[:, None, None], torch.tensor(cfg.empty["context"]), torch.tensor(batch["context"])
        )
        added = None
        if "pooled" in batch:
            pooled = torch.where(dropped[:, None], torch.tensor(cfg.empty["pooled"]), torch.tensor(batch["pooled"]))
            added = {"text_embeds": pooled.double(), "time_ids": torch.tensor(batch["time_ids"]).double()}
        predicted = self.unet(
            schedule.add_noise(x, noise, t), t, context.double(), added_cond_kwargs=added, return_dict=False
        )[0]
        v = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(x, noise, t) if v else noise
        per_row = ((predicted - target) ** 2).flatten(1).mean(1)
        if cfg.snr_gamma is not None:
            snr = training_utils.compute_snr(schedule, t).double()
            per_row = per_row * torch.clamp(snr, max=cfg.snr_gamma) / (snr + 1 if v else snr)
        return per_row.mean()

    def run(self, start, batch, draws):
        """Train from `start` and return a record a step; `draws` has one list of micro-batches a step."""
        cfg, params = self.cfg, self.adapter.by_path()
        with torch.no_grad():
            for path, value in start.items():
                params[path].copy_(to_torch(value))
        matrices = [p for p in params.values() if p.ndim > 1]
        vectors = [p for p in params.values() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": cfg.adam_weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        betas = (cfg.adam_beta1, cfg.adam_beta2)
        optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.adam_epsilon)
        ema = {path: from_torch(p) for path, p in params.items()}
        records = []
        for step, micro in enumerate(draws):
            optimizer.zero_grad()
            total = 0.0
            for rows, drawn in micro:
                loss = self.loss({name: x[rows] for name, x in batch.items()}, drawn) / len(micro)
                loss.backward()
                total += loss.item()
            grads = {path: from_torch(p.grad) for path, p in params.items()}
            torch.nn.utils.clip_grad_norm_(params.values(), cfg.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = cfg.learning_rate * min(1.0, (step + 1) / cfg.lr_warmup_steps)
            optimizer.step()
            decay = min(cfg.ema_decay, (1 + step) / (10 + step))
            now = {path: from_torch(p) for path, p in params.items()}
            ema = {path: decay * ema[path] + (1 - decay) * now[path] for path in now}
            records.append(Record(total, grads, now, ema))
        return records
