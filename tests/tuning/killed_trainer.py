"""Train a tiny model undisturbed and, in another folder, killed (SIGKILL) at random steps until it is done.

python -m tests.tuning.killed_trainer FOLDER: writes FOLDER/{whole,parts} and the last weights of both as whole.npz
and parts.npz. Each run is a fork of one process that has imported everything and touched no device.
"""

import os
import random
import signal
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint  # noqa: F401 - once for all forks
import tensorboardX  # noqa: F401

from jaxmix.tuning.fit import FitConfig, Hook, fit
from jaxmix.tuning.update import TrainState, make_optimizer, make_update

KILLS, STEPS = 5, 36


def loss_fn(params, frozen, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["y"].shape)
    error = jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"] + noise
    return jnp.mean(error**2), {"bin_sum": jnp.ones(4), "bin_count": jnp.ones(4)}


def batches(start):
    for step in range(start, STEPS):
        rng = np.random.default_rng(step)
        yield {name: rng.normal(size=(4, 3)).astype(np.float32) for name in ("x", "y")}


def train(folder, kill_after=0, delay=0.0):
    """Train to the end, or be killed `delay` seconds into the step that follows so many."""
    cfg = FitConfig(
        output_dir=str(folder),
        devices=1,
        train_batch_size=4,
        max_train_steps=STEPS,
        # No multiple of log_steps: rows of the logs span checkpoints.
        checkpointing_steps=3,
        log_steps=2,
        learning_rate=0.05,
        lr_scheduler="cosine",
    )
    seen = []

    def kill(step, state):
        seen.append(step)
        if len(seen) == kill_after:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    optimizer = make_optimizer(cfg)
    state = TrainState.create({"w": jnp.eye(3), "b": jnp.zeros(3)}, optimizer)
    update = make_update(loss_fn, optimizer, cfg.ema_decay)
    state, complete = fit(cfg, state, update, {}, batches, [Hook(1, kill, at_end=False)])
    assert complete
    leaves = jax.tree.leaves(jax.device_get(state))
    np.savez(Path(folder).with_suffix(".npz"), *leaves)


def forked(*arguments):
    """Run `train` in a fork; return how it ended, as os.waitstatus_to_exitcode says it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        train(*arguments)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def main(folder):
    random_numbers = random.Random(0)
    assert forked(folder / "whole") == 0
    for _ in range(KILLS):
        ended = forked(folder / "parts", random_numbers.randint(2, 6), random_numbers.uniform(0.0, 0.05))
        assert ended == -signal.SIGKILL, ended
    assert forked(folder / "parts") == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
