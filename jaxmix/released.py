"""The configurations of the released models: Stable Diffusion 1.5, 2.1 (at 768 px, and its 512 px base) and XL base.

One entry per model, one dictionary per part, named as in a diffusers folder, with the keys of diffusers and
transformers. Only keys that change what is computed are listed; all others have the one value that this library
supports. The scheduler is the one we assume for a single file of the model, since such a file holds none.

Plain data on the ground floor, so that every room, the benchmarks and the tests read the same table. To change a value,
make your own dictionary: ``{**RELEASED["sdxl"]["unet"], "sample_size": 64}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # the number of heads, despite its name
    "norm_num_groups": 32,
}
_UNET_2 = {**_UNET, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
_UNET_XL = {
    **_UNET,
    "sample_size": 128,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,  # 1280 of the pooled text and 6 numbers of 256
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
_VAE_XL = {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,  # as in the files; to transformers, an end of 2 means "the largest id ends the text"
    "eos_token_id": 2,
    "pad_token_id": 1,
    "projection_dim": 768,
}
_OPEN_CLIP_H = {
    **_CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: the last one is not used
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPEN_CLIP_G = {
    **_CLIP_L,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_VIT_L = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_DDIM = {**_EULER, "_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}

RELEASED: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "sd15": {"unet": _UNET, "vae": _VAE, "text_encoder": _CLIP_L, "scheduler": _DDIM},
    "sd21_base": {"unet": _UNET_2, "vae": _VAE, "text_encoder": _OPEN_CLIP_H, "scheduler": _DDIM},
    "sd21": {
        "unet": {**_UNET_2, "sample_size": 96},
        "vae": {**_VAE, "sample_size": 768},
        "text_encoder": _OPEN_CLIP_H,
        "scheduler": {**_DDIM, "prediction_type": "v_prediction"},
    },
    # The image encoders of the published IP-Adapters: of OpenAI, and two of LAION.
    "clip_vit_l": {"image_encoder": _VIT_L},
    "clip_vit_h": {
        "image_encoder": {
            **_VIT_L,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "hidden_act": "gelu",
            "projection_dim": 1024,
        }
    },
    "clip_vit_bigg": {
        "image_encoder": {
            **_VIT_L,
            "hidden_size": 1664,
            "intermediate_size": 8192,
            "num_hidden_layers": 48,
            "hidden_act": "gelu",
            "projection_dim": 1280,
        }
    },
    "sdxl": {
        "unet": _UNET_XL,
        "vae": _VAE_XL,
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP_G,
        "scheduler": _EULER,
    },
}
"""Model, then part, then key."""
