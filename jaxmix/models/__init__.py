"""Flax Linen models under diffusers' names: the only room that imports flax.linen."""

from jaxmix.models.clip import CLIPTextModel
from jaxmix.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxmix.models.config import UNetConfig, VAEConfig
from jaxmix.models.controlnet import ControlNetConfig, ControlNetModel
from jaxmix.models.tiling import decode_tiled
from jaxmix.models.unet import AddedCond, UNet2DConditionModel
from jaxmix.models.vae import AutoencoderKL
from jaxmix.models.vision import CLIPVisionModel

__all__ = [
    "AddedCond",
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPVisionConfig",
    "CLIPVisionModel",
    "ControlNetConfig",
    "ControlNetModel",
    "UNet2DConditionModel",
    "UNetConfig",
    "VAEConfig",
    "decode_tiled",
]
