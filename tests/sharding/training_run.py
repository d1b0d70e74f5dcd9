"""A tiny diffusion trainer that the tests run on any mesh, and as one of several processes.

python -m tests.sharding.training_run PORT PROCESS FOLDER ...: train to the end in each folder, as one of two
processes; in those called `stopped` and `long` process 0 is told to stop (SIGTERM) in step 7, in `long` steps take
longer than processes may take to agree.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.schedule import NoiseSchedule
from jaxmix.tuning import fit as training
from jaxmix.tuning.fit import FitConfig, Hook, fit
from jaxmix.tuning.loss import diffusion_loss
from jaxmix.tuning.update import TrainState, make_optimizer, make_update

ROWS, STEPS, WIDTH = 16, 20, 64
SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def make_loss():
    schedule = NoiseSchedule.from_config(SCHEDULE)

    def loss_fn(params, frozen, batch, key):
        def predict(noisy, t):
            time = jnp.sin(t[:, None] * 0.01 * jnp.arange(1, WIDTH + 1) / WIDTH)
            x = jax.nn.silu(conv(noisy, frozen["conv_in"]) + time[:, None, None])
            x = jax.nn.silu(x @ (frozen["mix"] + params["down"] @ params["up"]) + params["bias"])
            return conv(x, params["conv_out"])

        return diffusion_loss(predict, schedule, batch["latents"], key)

    return loss_fn


def weights():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)

    frozen = {"conv_in": normal(3, 3, 4, WIDTH), "mix": normal(WIDTH, WIDTH)}
    params = {"down": normal(WIDTH, WIDTH), "up": normal(WIDTH, WIDTH)}
    params |= {"bias": np.zeros(WIDTH, np.float32), "conv_out": normal(3, 3, WIDTH, 4)}
    return jax.tree.map(jnp.asarray, params), frozen


def batches(start):
    """Yield this process's rows of the batches from `start` on."""
    share = ROWS // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    for step in range(start, STEPS):
        latents = np.random.default_rng(step).normal(size=(ROWS, 8, 8, 4)).astype(np.float32)
        yield {"latents": latents[mine], "id": np.array([f"row-{step}-{i}" for i in range(ROWS)])[mine]}


def config(folder, **changes):
    base = {"output_dir": str(folder), "train_batch_size": ROWS, "max_train_steps": STEPS, "log_steps": 1}
    return FitConfig(**{**base, "learning_rate": 1e-3, "gradient_accumulation_steps": 2, **changes})


def parts(cfg):
    """Return (state, update, frozen) of a run."""
    params, frozen = weights()
    optimizer = make_optimizer(cfg)
    update = make_update(make_loss(), optimizer, cfg.ema_decay, cfg.gradient_accumulation_steps)
    return TrainState.create(params, optimizer), update, frozen


def train(cfg, hooks=(), batches=batches):
    return fit(cfg, *parts(cfg), batches, hooks)


def late(start):
    for batch in batches(start):
        time.sleep(0.1)
        yield batch


def main(port, process, *folders):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))

    def stop(step, state):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    for folder in map(Path, folders):
        stopped, long = folder.name in ("stopped", "long"), folder.name == "long"
        training._AGREE_SECONDS = 0.1 if long else 60.0
        state, complete = train(config(folder, fsdp=2), [Hook(1, stop)] if stopped else (), late if long else batches)
        # They ask each other after steps 1, 2, 7 and 12, or after each.
        assert (complete, int(state.step)) == ((False, 8 if long else 12) if stopped else (True, STEPS))
        assert state.params["down"].shape == (WIDTH, WIDTH)  # whole in every process


if __name__ == "__main__":
    main(*sys.argv[1:])
