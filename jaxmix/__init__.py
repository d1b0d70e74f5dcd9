"""Stable Diffusion in JAX and Flax with attention control, for TPUs and GPUs."""

from jaxmix.control import KV, QKV, Control, Moments, Site
from jaxmix.methods.composable import ComposableDiffusion, split_and
from jaxmix.methods.controlnet import ControlNet
from jaxmix.methods.deadiff import DEADiff
from jaxmix.methods.dense_diffusion import DenseDiffusion, dense_diffusion
from jaxmix.methods.instantstyle_plus import InstantStylePlus
from jaxmix.methods.ip_adapter import IPAdapter
from jaxmix.methods.layer_prompts import LayerPrompts
from jaxmix.methods.lora import LoRA, apply_loras
from jaxmix.methods.magic_fusion import MagicFusion
from jaxmix.methods.paint_with_words import PaintWithWords
from jaxmix.methods.structured_diffusion import StructuredDiffusion
from jaxmix.methods.style_adapter import StyleAdapter
from jaxmix.methods.style_aligned import StyleAligned, style_aligned
from jaxmix.methods.style_id import StyleID, style_id
from jaxmix.methods.vmix import VMix
from jaxmix.pipeline.descriptors import CSD
from jaxmix.pipeline.embedded import EmbeddingFolder, Embeddings
from jaxmix.pipeline.inverted import Inverted, hold
from jaxmix.pipeline.layouts import Segment
from jaxmix.pipeline.loading import from_flax, load
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import Method, Request, Sizes, WeightEdit
from jaxmix.pipeline.showing import Preview
from jaxmix.pipeline.vision import ImageEncoder
from jaxmix.rows import Text, dataclass, gate, per_row, static
from jaxmix.samplers import Guidance, LatentEdit, ReNoise
from jaxmix.sharding import data_mesh
from jaxmix.types import CheckpointWarning, InputError, NotFiniteWarning, TruncatedPromptWarning

__version__ = "0.2.0"

__all__ = [
    "CSD",
    "KV",
    "QKV",
    "CheckpointWarning",
    "ComposableDiffusion",
    "Control",
    "ControlNet",
    "DEADiff",
    "DenseDiffusion",
    "EmbeddingFolder",
    "Embeddings",
    "Guidance",
    "IPAdapter",
    "ImageEncoder",
    "InputError",
    "InstantStylePlus",
    "Inverted",
    "LatentEdit",
    "LayerPrompts",
    "LoRA",
    "MagicFusion",
    "Method",
    "Moments",
    "NotFiniteWarning",
    "PaintWithWords",
    "Pipeline",
    "Preview",
    "ReNoise",
    "Request",
    "Segment",
    "Site",
    "Sizes",
    "StructuredDiffusion",
    "StyleAdapter",
    "StyleAligned",
    "StyleID",
    "Text",
    "TruncatedPromptWarning",
    "VMix",
    "WeightEdit",
    "apply_loras",
    "data_mesh",
    "dataclass",
    "dense_diffusion",
    "from_flax",
    "gate",
    "hold",
    "load",
    "per_row",
    "split_and",
    "static",
    "style_aligned",
    "style_id",
]
