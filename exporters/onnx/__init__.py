"""ONNX: `export` writes a checkpoint as a folder for onnxruntime, onnxruntime-genai and optimum."""

from exporters.onnx.export import GRAPHS, export
from exporters.onnx.grams import Text, rounding_text
from exporters.onnx.precision import PRECISIONS, Quantization, slow

__all__ = ["GRAPHS", "PRECISIONS", "Quantization", "Text", "export", "rounding_text", "slow"]
