"""What llama.cpp needs to run factored weights: our C++, and the build of a pinned llama.cpp with it."""

from exporters.llama_cpp.build import Build, build, find, info
from exporters.llama_cpp.source import converter, source_tree
from exporters.llama_cpp.toolchain import CompilerMissing

__all__ = ["Build", "CompilerMissing", "build", "converter", "find", "info", "source_tree"]
