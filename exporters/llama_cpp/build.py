"""Build the pinned llama.cpp, or a user's own checkout, with our addition or without, once, into the cache folder.

A finished build is a folder named after what determines it (version or checkout, our addition, cmake arguments, processor):
`bin` holds tools and shared libraries side by side, `python` the ctypes package `llama_cpp` (of the pinned one alone: it fits
no other), `build.json` says what it is. It is renamed into place when complete; an interrupted build keeps its objects and is
taken up by the next call.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from exporters.llama_cpp import edits, source
from exporters.llama_cpp.toolchain import cmake_and_ninja, compilers, default_jobs
from sola_edge.errors import UserError
from sola_edge.files import replace_folder
from sola_edge.progress import status, track

TOOLS = ("llama-perplexity", "llama-bench", "llama-quantize", "llama-completion", "llama-imatrix", "llama-server")
CMAKE_ARGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
# AMX kernels of this llama.cpp crash when GCC drops the tile configuration that it does not see used
# (ggml-org/llama.cpp#20824); without the macro ggml takes its AVX-512 kernels instead.
WITHOUT_AMX = tuple(f"-DCMAKE_{language}_FLAGS_RELEASE=-O3 -DNDEBUG -U__AMX_INT8__" for language in ("C", "CXX"))
MANIFEST = "build.json"
CHOSEN = "SOLA_EDGE_LLAMA_CPP"  # environment variable: folder of the build that is to be used
OWN = "own"  # stands for the version of a user's checkout
# what a build reads of a checkout
COMPILED = ("CMakeLists.txt", "cmake", "common", "ggml", "include", "src", "tools", "vendor")


@dataclass(frozen=True)
class Build:
    """A finished build."""

    folder: Path

    @property
    def bin(self) -> Path:
        """Folder of the tools."""
        return self.folder / "bin"

    @property
    def lib(self) -> Path:
        """Folder of libllama and the ggml libraries (the same one: they find each other beside themselves)."""
        return self.bin

    @property
    def python(self) -> Path:
        """Folder to put on PYTHONPATH: `import llama_cpp` then binds this build's libllama."""
        return self.folder / "python"

    @property
    def converter(self) -> Path:
        """llama.cpp's own `convert_hf_to_gguf.py`."""
        return source.converter()

    def tool(self, name: str) -> Path:
        """Path of a tool such as `llama-bench`. Raises KeyError if this build has no such tool."""
        path = self.bin / (f"{name}.exe" if os.name == "nt" else name)
        if not path.is_file():
            raise KeyError(f"{self.bin} has no {name}")
        return path

    def environment(self) -> dict[str, str]:
        """This process's environment, with which a Python subprocess can `import llama_cpp`."""
        paths = [str(self.python), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LLAMA_CPP_LIB_PATH": str(self.lib)}

    def manifest(self) -> dict[str, Any]:
        """What was built: version, commit, addition, cmake arguments, processor."""
        return json.loads((self.folder / MANIFEST).read_text())


def build(
    jobs: int | None = None,
    cmake_args: Sequence[str] = (),
    checkout: Path | None = None,
    addition: bool = True,
    targets: Sequence[str] = TOOLS,
) -> Build:
    """The build with these extra cmake arguments, made now if it is not there (about 5 to 15 core minutes).

    `jobs`: compiler processes, by default as many as cores and memory allow. checkout: a llama.cpp of one's own instead of the
    pinned one; it is read and left as it is. addition: False makes the unmodified llama.cpp that others have. targets: cmake's,
    for a build of its own that `find` passes over (`llama`: the library alone).
    Raises toolchain.CompilerMissing without a C++ compiler and UserError when the source cannot be had or the addition does not
    fit it, a tool is missing or the compilation fails.
    """
    manifest = _manifest(cmake_args, checkout, addition)
    if tuple(targets) != TOOLS:
        manifest["targets"] = list(targets)
    folder = _folder(manifest)
    if not (folder / MANIFEST).is_file():
        compilers()
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not (folder / MANIFEST).is_file():
                _build_into(folder, manifest, jobs or default_jobs(), checkout)
    return Build(folder)


def find() -> Build | None:
    """The build that CHOSEN names, else the newest of the pinned version with this addition for this processor, or None.

    Builds nothing. Raises UserError where CHOSEN is set and names no build.
    """
    chosen = os.environ.get(CHOSEN)
    if chosen:
        if not (Path(chosen) / MANIFEST).is_file():
            raise UserError(
                f"{CHOSEN}={chosen} is no build of `sola-edge llama-cpp build`: it has no {MANIFEST}; unset it"
            )
        return Build(Path(chosen))
    wanted = _manifest(())
    del wanted["cmake_args"]
    manifests = sorted(source.cache_folder().glob(f"build-*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    for path in reversed(manifests):
        manifest = json.loads(path.read_text())
        if "targets" not in manifest and wanted.items() <= manifest.items():
            return Build(path.parent)
    return None


def info(found: Build | None = None) -> dict[str, Any]:
    """What is pinned and what is built (that build, or the one that is found), as plain values for JSON."""
    found = found or find()
    return {
        "package": f"{source.PACKAGE}=={source.VERSION}",
        "llama_cpp_commit": source.LLAMA_CPP_COMMIT,
        "cache": str(source.cache_folder()),
        "built": found is not None,
        "folder": str(found.folder) if found else None,
        "cmake_args": found.manifest()["cmake_args"] if found else None,
        "tools": {name: str(found.tool(name)) for name in TOOLS} if found else {},
    }


def _manifest(cmake_args: Sequence[str], checkout: Path | None = None, addition: bool = True) -> dict[str, Any]:
    commit = source.LLAMA_CPP_COMMIT if checkout is None else OWN
    named = f"-DLLAMA_BUILD_COMMIT={commit}{'-sola-edge' if addition else ''}"
    manifest = {
        "version": source.VERSION if checkout is None else OWN,
        "llama_cpp_commit": commit,
        "addition": edits.fingerprint() if addition else None,
        "cmake_args": [*CMAKE_ARGS, named, *(WITHOUT_AMX if os.name == "posix" else ()), *cmake_args],
        "processor": _processor(),
    }
    return manifest if checkout is None else {**manifest, "checkout": _state_of(checkout)}


def _state_of(checkout: Path) -> str:
    """Digest of names, sizes and times of all files that are compiled. Raises UserError for a folder that has none."""
    roots = [checkout / name for name in COMPILED if (checkout / name).exists()]
    if not roots:
        raise UserError(
            f"{checkout} is no llama.cpp checkout: it has no CMakeLists.txt and no src; give its root folder"
        )
    digest = hashlib.sha256()
    for path in sorted(path for root in roots for path in (root, *root.rglob("*")) if path.is_file()):
        facts = path.stat()
        digest.update(f"{path.relative_to(checkout)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _processor() -> str:
    """Name and, on Linux, a digest of the instruction sets: ggml compiles for the processor at hand."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()}-{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def _folder(manifest: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return source.cache_folder() / f"build-{manifest['version']}-{digest[:12]}"


def _build_into(folder: Path, manifest: dict[str, Any], jobs: int, checkout: Path | None) -> None:
    work = folder.with_name(f"{folder.name}.work")
    patched = work / "llama.cpp"
    if not patched.is_dir():
        with status("Preparing the source of llama.cpp"), replace_folder(patched) as partial:
            if checkout:
                _copy_checkout(checkout, partial)
            else:
                pinned = source.source_tree() / "vendor" / "llama.cpp"
                shutil.copytree(pinned, partial, copy_function=_link, dirs_exist_ok=True)
            if manifest["addition"]:
                edits.apply(partial)
    _compile(patched, work, manifest["cmake_args"], jobs, manifest.get("targets", TOOLS))
    with replace_folder(folder) as partial:
        shutil.copytree(work / "build" / "bin", partial / "bin", symlinks=True, copy_function=_link)
        if checkout is None:
            _python_package(source.source_tree() / "llama_cpp", partial / "python" / "llama_cpp")
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(work, ignore_errors=True)


def _copy_checkout(checkout: Path, target: Path) -> None:
    """All but what git and earlier builds keep in its root; never links, for the owner goes on editing."""
    for path in checkout.iterdir():
        if path.name == ".git" or path.name.startswith("build"):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name, symlinks=True)
        else:
            shutil.copy2(path, target / path.name)


def _link(from_: str, to: str) -> None:
    """Hard link where the file system can, else copy."""
    try:
        os.link(from_, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(from_, to, follow_symlinks=False)


def _python_package(package: Path, target: Path) -> None:
    """The ctypes package; its `lib` is our `bin`, so that it finds libllama without any setting."""
    shutil.copytree(package, target, ignore=shutil.ignore_patterns("lib", "__pycache__", "server"))
    if os.name != "nt":
        (target / "lib").symlink_to(Path("..") / ".." / "bin")


def _compile(patched: Path, work: Path, cmake_args: Sequence[str], jobs: int, targets: Sequence[str]) -> None:
    cmake, ninja = cmake_and_ninja()
    build_folder = work / "build"
    log = work / "build.log"
    configure = [str(cmake), "-S", str(patched), "-B", str(build_folder), "-G", "Ninja", *cmake_args]
    with status("Configuring llama.cpp"):
        _run([*configure, f"-DCMAKE_MAKE_PROGRAM={ninja}"], log, "configuring llama.cpp")
    run = [str(ninja), "-C", str(build_folder), f"-j{jobs}", *targets]
    steps = _ninja_steps(run, log)
    total = next(steps, 0)
    for _ in track(steps, f"Building llama.cpp ({jobs} jobs)", total=total):
        pass


def _run(command: Sequence[str], log: Path, what: str) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    log.write_text(result.stdout)
    if result.returncode != 0:
        raise _failure(what, log)


def _ninja_steps(command: Sequence[str], log: Path) -> Iterator[int]:
    """Run ninja; yield the number of steps, then once for every further step that is done."""
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    with (
        log.open("a", buffering=1) as stream,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            stream.write(line)
            step, _, rest = line.removeprefix("[").partition("/")
            if line.startswith("[") and step.isdecimal():
                yield int(rest.partition("]")[0])
    if process.returncode != 0:
        raise _failure("building llama.cpp", log)


def _failure(what: str, log: Path) -> UserError:
    """The error for a failed step: the first complaint in its log and where the log is."""
    lines = log.read_text(errors="replace").splitlines()
    words = ("fatal error", "error:", "CMake Error", "Killed", "FAILED")
    found = [line.strip() for word in words for line in lines if word in line]
    reason = found[0] if found else (lines[-1] if lines else "no output")
    hint = "; out of memory: build with fewer jobs" if any("Killed" in line for line in lines) else ""
    return UserError(f"{what} failed: {reason[:300]} (all of it: {log}){hint}")
