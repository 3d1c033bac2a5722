"""ONNX: `export` writes a checkpoint as a folder for onnxruntime, onnxruntime-genai and optimum."""

from exporters.onnx.export import GRAPHS, PRECISIONS, export

__all__ = ["GRAPHS", "PRECISIONS", "export"]
