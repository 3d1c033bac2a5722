"""What a build needs from the machine: a C++ compiler, cmake and ninja (both from PyPI), cores and memory."""

import os
import shutil
from importlib import import_module
from pathlib import Path

import psutil

from sola_edge.cores import usable_cores
from sola_edge.errors import UserError

BYTES_PER_JOB = 1_500_000_000  # the largest translation units need a little over 1 GB
COMPILERS = {"posix": ("c++", "g++", "clang++"), "nt": ("cl", "clang-cl", "g++", "clang++")}


class CompilerMissing(UserError):
    """There is no C++ compiler: everything but llama.cpp still works."""


def compilers() -> str:
    """The C++ compiler that cmake will find ($CXX first). Raises CompilerMissing."""
    names = (os.environ.get("CXX", ""), *COMPILERS[os.name])
    found = next((path for name in names if name and (path := shutil.which(name.split()[0]))), None)
    if found is None:
        raise CompilerMissing(
            "no C++ compiler on this machine (looked for $CXX, " + ", ".join(COMPILERS[os.name]) + " in PATH); "
            "install one, for instance `apt install g++` or `xcode-select --install`, to build llama.cpp"
        )
    return found


def cmake_and_ninja() -> tuple[Path, Path]:
    """Paths of cmake and ninja: the PyPI packages', else the ones in PATH. Raises UserError."""
    return _program("cmake", "CMAKE_BIN_DIR"), _program("ninja", "BIN_DIR")


def default_jobs() -> int:
    """Compiler processes to run: one a usable core, as far as the free memory allows."""
    return max(1, min(usable_cores(), psutil.virtual_memory().available // BYTES_PER_JOB))


def _program(name: str, folder_attribute: str) -> Path:
    try:
        folder = getattr(import_module(name), folder_attribute)
    except (ImportError, AttributeError):
        folder = None
    found = (folder and shutil.which(name, path=str(folder))) or shutil.which(name)
    if not found:
        raise UserError(f"{name} is missing; install it with `pip install sola-edge[llama-cpp]`")
    return Path(found)
