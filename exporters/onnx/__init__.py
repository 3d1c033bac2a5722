"""ONNX: `export` writes a checkpoint as a folder for onnxruntime, onnxruntime-genai and optimum."""

from exporters.onnx.export import GRAPHS, export
from exporters.onnx.precision import PRECISIONS, Quantization

__all__ = ["GRAPHS", "PRECISIONS", "Quantization", "export"]
