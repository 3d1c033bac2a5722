"""Teach transformers to load compressed checkpoints without importing it.

transformers and torch take seconds to import and hundreds of megabytes; `sola-edge --help` and a measured ONNX Runtime
process need neither. So the registration waits until somebody imports transformers' quantizer table.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TABLE = "transformers.quantizers.auto"


class _RegisterAfterLoad(importlib.abc.Loader):
    """Runs the module's own loader, then our registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `TABLE` as usual and has it registered with once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfterLoad(spec.loader)
        return spec


def _register() -> None:
    from sola_edge.hf_quantizer import register

    register()


def register_with_transformers() -> None:
    """Register the `sola` quantization method now if transformers' table is loaded, else as soon as it is."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
