"""GGUF: a checkpoint, dense or compressed, into one file for llama.cpp."""

from exporters.gguf.export import GGUFExport, export
from exporters.gguf.llama_quantize import BLOCKS, Importance
from exporters.gguf.shards import parse_size
from exporters.gguf.types import TYPES

__all__ = ["BLOCKS", "TYPES", "GGUFExport", "Importance", "export", "parse_size"]
