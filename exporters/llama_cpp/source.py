"""The pinned llama.cpp source: a PyPI source package, verified and unpacked once into the cache folder.

`llama-cpp-python` vendors a llama.cpp with its converter and gguf-py, and its own package `llama_cpp` binds libllama
through ctypes. PyPI keeps a released file for good, and pip gets it wherever pip works.
"""

import tarfile
from pathlib import Path

from filelock import FileLock

from sola_edge import cache
from sola_edge.errors import UserError
from sola_edge.files import replace_folder
from sola_edge.progress import status

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP_COMMIT = "0c1e57098"
# Earlier releases in which the addition was compiled, by the SHA-256 of their source package.
EARLIER = {
    "0.3.33": "369ba03d02caaef42c1ed07bbdc454f7436e47c7675b8b9757fa13fbac6acd92",
    "0.3.28": "958227b394f413425d6039952096daa0b8b98328c6b99d652862aec775f1672d",
}


def cache_folder() -> Path:
    """Where sources and builds are kept. Raises UserError if it cannot be created."""
    return cache.cache_folder("llama-cpp").absolute()


def source_tree() -> Path:
    """The unpacked source package (with `vendor/llama.cpp` and `llama_cpp` in it), unchanged; needs no compiler.

    The first call downloads about 77 MB with pip; later calls only look. Raises UserError if pip cannot get the
    package, or got another file than the pinned one.
    """
    folder = cache_folder() / f"source-{VERSION}-{SDIST_SHA256[:8]}"
    tree = folder / f"llama_cpp_python-{VERSION}"
    if not tree.is_dir():
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not tree.is_dir():
                _unpack(folder)
    return tree


def converter() -> Path:
    """llama.cpp's own `convert_hf_to_gguf.py`. Raises UserError as `source_tree` does."""
    return source_tree() / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"


def sdist(version: str, sha256: str) -> Path:
    """The source package of a version, from the cache or downloaded (50 to 80 MB). Raises UserError as `source_tree` does."""
    # of this package the source; what pip needs to read the source's metadata may come as wheels
    return cache.pypi_file(f"{PACKAGE}=={version}", sha256, "--no-binary", PACKAGE)


def _unpack(folder: Path) -> None:
    """Fetch the package and unpack it into the folder, refusing entries that would land outside."""
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python cannot unpack archives safely; use 3.10.12, 3.11.4 or newer")
    with (
        status(f"Getting the source of llama.cpp ({PACKAGE} {VERSION})"),
        replace_folder(folder) as partial,
        tarfile.open(sdist(VERSION, SDIST_SHA256)) as archive,
    ):
        archive.extractall(partial, filter="data")
