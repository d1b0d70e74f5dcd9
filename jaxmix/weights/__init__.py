"""Bytes on disk to parameter trees and back, in the names and layouts of torch diffusers and transformers."""

from jaxmix.weights.flax_tree import FlaxTree
from jaxmix.weights.load import find_weights, load_tree, open_source, read_config
from jaxmix.weights.names import to_torch_key
from jaxmix.weights.safetensors import Header, SafetensorsFile, read_header
from jaxmix.weights.source import Entry, Source, stored_dtype
from jaxmix.weights.store import save_tree, write_config

__all__ = [
    "Entry",
    "FlaxTree",
    "Header",
    "SafetensorsFile",
    "Source",
    "find_weights",
    "load_tree",
    "open_source",
    "read_config",
    "read_header",
    "save_tree",
    "stored_dtype",
    "to_torch_key",
    "write_config",
]
