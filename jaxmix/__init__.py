"""Stable Diffusion in JAX and Flax with attention control, for TPUs and GPUs."""

from jaxmix.adapters import VMix
from jaxmix.control import KV, QKV, Control, Moments, Site, gate, per_row, static
from jaxmix.fusing import MagicFusion
from jaxmix.inverted import Inverted, hold
from jaxmix.loading import from_flax, load
from jaxmix.loras import LoRA, apply_loras
from jaxmix.methods import Segment, dense_diffusion, style_aligned
from jaxmix.pipeline import Pipeline
from jaxmix.sharding import data_mesh
from jaxmix.style_transfer import style_id
from jaxmix.types import InputError

__version__ = "0.1.0"

__all__ = [
    "KV",
    "QKV",
    "Control",
    "InputError",
    "Inverted",
    "LoRA",
    "MagicFusion",
    "Moments",
    "Pipeline",
    "Segment",
    "Site",
    "VMix",
    "apply_loras",
    "data_mesh",
    "dense_diffusion",
    "from_flax",
    "gate",
    "hold",
    "load",
    "per_row",
    "static",
    "style_aligned",
    "style_id",
]
