"""Where the compilers, ninja and pybind11's headers are, and which versions."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import BuildFailed, ToolMissing

SYSTEM_NVCC = Path("/usr/local/cuda/bin/nvcc")
NVCC_HOW = (
    "It comes with the CUDA toolkit (https://developer.nvidia.com/cuda-downloads), from conda "
    "(`conda install -c nvidia cuda-nvcc cuda-cudart-static`) or from PyPI "
    "(`pip install 'cuda-toolkit[nvcc,cudart]==13.0.*'`)."
)


@dataclass(frozen=True)
class Nvcc:
    """nvcc, and what it is called with everywhere."""

    path: Path
    library_folders: tuple[Path, ...] = ()  # those that its own profile does not name

    @functools.cached_property
    def version(self) -> str:
        return _version(str(self.path), "--version")

    def short_version(self) -> str:
        """As in "13.0.88"."""
        words = self.version.replace(",", " ").split()
        return next((word[1:] for word in words if word[:1] == "V" and word[1:2].isdigit()), "of unknown version")

    def architectures(self) -> frozenset[str]:
        """What this nvcc can compile for, variants with an `a` included."""
        listed = frozenset(_version(str(self.path), "--list-gpu-code").split())
        return listed | {f"{name}a" for name in listed if int(name.removeprefix("sm_").rstrip("af")) >= 90}


def find_nvcc() -> Nvcc:
    """nvcc in CUDA_HOME or CUDA_PATH, on PATH, in /usr/local/cuda or from the wheels, in this order."""
    tried = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            tried.append(f"{variable} ({home})")
            if _is_program(path := Path(home) / "bin/nvcc"):
                return Nvcc(path, _wheel_libraries(path))
    if found := shutil.which("nvcc"):
        return Nvcc(Path(found), _wheel_libraries(Path(found)))
    for path in (SYSTEM_NVCC, *_wheel_nvccs()):
        if _is_program(path):
            return Nvcc(path, _wheel_libraries(path))
    places = ", ".join((*tried, "PATH", str(SYSTEM_NVCC.parent.parent), "Python's installed packages"))
    raise ToolMissing(f"nvcc, NVIDIA's compiler, is missing: it is not in {places}. {NVCC_HOW}")


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _wheel_nvccs() -> Iterator[Path]:
    """nvcc of the nvidia-cuda-nvcc wheels: site-packages/nvidia/cu13/bin/nvcc."""
    for folder in map(Path, dict.fromkeys(filter(None, sys.path))):
        yield from sorted(folder.glob("nvidia/*/bin/nvcc"), reverse=True)


def _wheel_libraries(nvcc: Path) -> tuple[Path, ...]:
    """The wheels have lib, where nvcc's profile says lib64."""
    lib = nvcc.resolve().parent.parent / "lib"
    return (lib,) if (lib / "libcudart_static.a").is_file() else ()


@dataclass(frozen=True)
class Gxx:
    command: tuple[str, ...]  # CXX may hold options, or a launcher such as ccache

    @functools.cached_property
    def version(self) -> str:
        return _version(*self.command, "--version")

    def for_nvcc(self) -> tuple[str, ...]:
        """nvcc takes a program without options; where there are some, it is left to find g++ itself."""
        return (f"-ccbin={self.command[0]}",) if len(self.command) == 1 else ()


def find_gxx() -> Gxx:
    """The host compiler: CXX, else g++, c++ or clang++ on PATH."""
    if command := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(command[0]) is None:
            raise ToolMissing(f"CXX is {os.environ['CXX']!r}, and there is no such program.")
        return Gxx(tuple(command))
    for name in ("g++", "c++", "clang++"):
        if found := shutil.which(name):
            return Gxx((found,))
    raise ToolMissing("A C++17 compiler is missing: CXX is not set, and g++, c++ and clang++ are not on PATH.")


def find_ninja() -> str:
    """ninja of the pip package, which is pinned, else that on PATH."""
    folders = [os.path.dirname(sys.executable), sysconfig.get_path("scripts")]
    if (spec := importlib.util.find_spec("ninja")) and spec.origin:
        package = Path(spec.origin).parent
        # site-packages/ninja -> bin of the same prefix, or of the same `pip install --target`
        folders += [str(package.parents[3] / "bin"), str(package.parent / "bin"), str(package / "data/bin")]
    for path in (os.pathsep.join(folders), None):
        if found := shutil.which("ninja", path=path):
            return found
    raise ToolMissing("ninja is missing: `pip install ninja`, or `pip install 'fastattn[build]'`.")


def find_pybind11() -> Path:
    """The folder of pybind11's headers, from its Python package."""
    spec = importlib.util.find_spec("pybind11")
    if spec is not None and spec.origin and (folder := Path(spec.origin).parent / "include").is_dir():
        return folder
    raise ToolMissing("pybind11 is missing: `pip install pybind11`, or `pip install 'fastattn[build]'`.")


def pybind11_version() -> str:
    """The digits of its version, from its own header."""
    header = find_pybind11() / "pybind11/detail/common.h"
    numbers = re.findall(r"define PYBIND11_VERSION_(?:MAJOR|MINOR|MICRO|PATCH)\s+(\w+)", header.read_text())
    return ".".join(numbers)


def python_include() -> Path:
    """The folder of Python.h."""
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise ToolMissing(f"Python.h is missing in {folder}: Debian and Ubuntu ship it as {package}.")
    return folder


def abi() -> str:
    """What a module must have been built for to be imported here: cpython-311-x86_64-linux-gnu."""
    return str(sysconfig.get_config_var("SOABI"))


@functools.cache
def _version(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildFailed(f"`{shlex.join(command)}` does not run: {error}") from error
