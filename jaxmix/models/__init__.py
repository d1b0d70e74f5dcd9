"""Flax Linen models under diffusers' names: the only room that imports flax.linen."""

from jaxmix.models.clip import CLIPTextModel
from jaxmix.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from jaxmix.models.tiling import decode_tiled
from jaxmix.models.unet import AddedCond, UNet2DConditionModel
from jaxmix.models.vae import AutoencoderKL

__all__ = [
    "AddedCond",
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextModel",
    "UNet2DConditionModel",
    "UNetConfig",
    "VAEConfig",
    "decode_tiled",
]
