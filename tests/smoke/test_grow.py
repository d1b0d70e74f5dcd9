"""A model grown from one with another autoencoder: its outer convolutions and positions are new, all else is kept."""

import jax
import numpy as np
import pytest

import jaxmix
from jaxmix.types import InputError
from scripts.mini import grow
from train.text_to_image import load_tokenizer


def test_a_grown_model_has_the_new_latents_and_longer_captions_and_keeps_everything_else(tmp_path, capsys):
    out = tmp_path / "grown"
    assert grow.main(grow.Config(scenes=16, batch_size=20, out=str(out))) == 0
    made, first = jaxmix.load(str(out)), jaxmix.load("mini")
    assert made.latent_shape == (16, 16, 8) and made.text_length == 48
    assert load_tokenizer(str(out / "tokenizer")).model_max_length == 48, "captions are padded to the encoder's length"
    kept = [jax.tree.leaves({k: v for k, v in p.params["unet"].items() if "conv_" not in k}) for p in (made, first)]
    assert all(np.array_equal(a, b) for a, b in zip(*kept, strict=True))
    ids = np.arange(20)[None]
    long, short = (
        p.text_encoder.apply({"params": p.params["text_encoder"]}, ids).last_hidden_state for p in (made, first)
    )
    np.testing.assert_allclose(long, short, atol=1e-5)  # the words mean what they did
    told = capsys.readouterr().out
    share = float(told.split("new to old: ")[1].split(" %")[0])
    assert 70 < share < 100
    for bad, said in (
        ({"size": 100}, "size: found 100, expected a multiple of 8"),
        ({"positions": 8}, "positions: found 8"),
    ):
        with pytest.raises(InputError, match=said):
            grow.main(grow.Config(out=str(out), **bad))
