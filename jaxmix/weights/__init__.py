"""Bytes on disk to parameter trees and back, in the names and layouts of torch diffusers and transformers."""

from jaxmix.weights.load import find_weights, load_tree, read_config
from jaxmix.weights.names import to_torch_key
from jaxmix.weights.safetensors import Header, read_header
from jaxmix.weights.store import save_tree, write_config

__all__ = [
    "Header",
    "find_weights",
    "load_tree",
    "read_config",
    "read_header",
    "save_tree",
    "to_torch_key",
    "write_config",
]
