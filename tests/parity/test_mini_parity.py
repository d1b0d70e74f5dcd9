"""The embedded model opened by torch diffusers: the same images from the same latents."""

import numpy as np
import pytest

import jaxmix
from jaxmix.pipeline.loading import ASSETS

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPTS = [
    "a 3d render of a rocket at night",
    "an ink drawing of a cat on a plain yellow background",
    "a glossy cartoon of a penguin in the snow",
    "a flat illustration of a sailboat by the sea",
]


@pytest.mark.filterwarnings("ignore")  # of diffusers and torch about themselves
def test_torch_diffusers_opens_the_folder_and_draws_the_same_images(capsys):
    pipe = jaxmix.load("mini")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(ASSETS / "mini"), torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    latents = pipe.initial_latents([1, 2, 3, 4])
    ours = pipe.generate(PROMPTS, latents=latents, steps=25, guidance_scale=3.0)
    start = torch.from_numpy(np.asarray(latents).transpose(0, 3, 1, 2).copy())
    drawn = theirs(PROMPTS, latents=start, num_inference_steps=25, guidance_scale=3.0, output_type="np").images
    difference = np.abs(ours.astype(int) - np.round(drawn * 255).astype(int))
    same, close = float((difference == 0).mean()), float((difference <= 1).mean())
    with capsys.disabled():
        print(
            f" {100 * same:.3f} % of the values equal, {100 * close:.3f} % within 1/255, largest {difference.max()}/255"
        )
    assert close > 0.999
