"""Write the fixtures that let the parity tests run without torch: tiny random models, inputs and torch's outputs.

Needs the `parity` extra. The files are committed; run this again only when the set of fixtures changes.

    python -m tests.parity.make_fixtures
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from tests.parity.oracle import nhwc, perturbed

FOLDER = Path(__file__).parent / "fixtures"
STEPS, SCALE = 25, 7.5


@torch.no_grad()
def main() -> None:
    """Write one folder a model and one npz with inputs and outputs."""
    torch.manual_seed(0)
    unet = perturbed(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    )
    vae = perturbed(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
    )
    text = perturbed(
        transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=40,
                hidden_size=12,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=9,
                bos_token_id=38,
                eos_token_id=39,
            )
        )
    )
    for name, model in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        model.save_pretrained(FOLDER / name)

    latents, t, context = torch.randn(2, 4, 8, 6), torch.tensor([20, 801]), torch.randn(2, 9, 12)
    images = torch.rand(1, 3, 16, 12) * 2 - 1
    ids = torch.randint(0, 38, (2, 9))
    ids[0, 5:], ids[1, 8] = 39, 39
    encoded, moments = text(ids), vae.encode(images).latent_dist
    out = {
        "latents": nhwc(latents),
        "t": t.numpy(),
        "context": context.numpy(),
        "prediction": nhwc(unet(latents, t, context).sample),
        "images": nhwc(images),
        "mean": nhwc(moments.mean),
        "logvar": nhwc(moments.logvar),
        "decoded": nhwc(vae.decode(moments.mean).sample),
        "ids": ids.numpy().astype(np.int32),
        "states": encoded.last_hidden_state.numpy(),
        "pooled": encoded.pooler_output.numpy(),
    }
    for kind in ("epsilon", "v_prediction"):
        config = {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": kind,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
        scheduler = diffusers.DDIMScheduler(**config)
        scheduler.set_timesteps(STEPS)
        x, uncond = latents, torch.zeros_like(context)
        for step in scheduler.timesteps:
            u, c = (unet(x, step, rows).sample for rows in (uncond, context))
            x = scheduler.step(u + SCALE * (c - u), step, x).prev_sample
        out[f"trajectory_{kind}"] = nhwc(x)
        (FOLDER / f"{kind}.json").write_text(json.dumps({"_class_name": "DDIMScheduler", **config}, indent=1) + "\n")
    np.savez_compressed(FOLDER / "outputs.npz", **out)
    size = sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file())
    print(f"wrote {FOLDER}: {size / 1024:.0f} KiB, diffusers {diffusers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
