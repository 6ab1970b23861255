"""What is compiled from which sources, with which flags: one Plan per module, and the key that names its result."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from . import archs as architectures
from . import toolchain
from .errors import BuildFailed, UnknownArch

PACKAGE = Path(__file__).resolve().parent.parent
SUFFIXES = (".h", ".cpp", ".cu")

# Patterns of paths below csrc, where * matches / too.
CUDA_BINDINGS = ("bindings_*.cpp", "!bindings_cpu.cpp")
CUDA_FILES = ("*.h", *CUDA_BINDINGS, "cuda/*.h", "cuda/*.cu", "!cpu/*", "!emulator/*", "!*tests/*")
EMULATOR_FILES = (*(name for name in CUDA_FILES if name != "!emulator/*"), "emulator/*.h", "emulator/*.cpp")
HOPPER_SOURCES = ("cuda/sm90/*.cu",)
CPU_FILES = ("bindings_cpu.cpp", "cpu/*.h", "cpu/*.cpp", "!*tests/*")

NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc/cuda", "-Icsrc")
KERNEL_FLAGS = ("-lineinfo", "-Xptxas=-v")
NVCC_LINK = ("-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL")
GXX_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Icsrc/emulator", "-Icsrc/cuda", "-Icsrc")
GXX_LINK = ("-shared", "-pthread")
# Sums are contracted where the source says fma, and nowhere else: every instruction set rounds alike.
CPU_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Icsrc",
    "-Wno-psabi",
)
CPU_LINK = ("-shared", "-fopenmp")
PER_ISA = b"namespace fastattn::FASTATTN_ISA"  # what a source that is compiled for each instruction set holds
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
ISAS: dict[str, dict[str, tuple[str, ...]]] = {  # machine -> the sets of csrc/cpu/dispatch.h and their flags
    "x86_64": {
        "baseline": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    }
}


def csrc() -> Path:
    """The sources: inside the package when installed, beside it in a checkout."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "cuda/launch.h").is_file():
            return folder
    raise BuildFailed(f"the C++ sources are missing: neither {PACKAGE / 'csrc'} nor {PACKAGE.parent / 'csrc'} has them")


def select(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The names that match a pattern, and none of those with a leading !."""
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]

    def matches(name: str, pattern: str) -> bool:
        # "*.h" is a file of the folder itself; below a folder, * reaches its subfolders too.
        return fnmatchcase(name, pattern) and ("/" in pattern or "/" not in name)

    return tuple(
        name for name in names if any(matches(name, p) for p in wanted) and not any(matches(name, p) for p in excluded)
    )


def read_sources(folder: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    """Path below csrc -> content, of every source that matches, in a fixed order."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    return {name: (folder / name).read_bytes() for name in select(names, patterns)}


def digest(sources: dict[str, bytes]) -> str:
    """sha256 over names and contents."""
    total = hashlib.sha256()
    for name, content in sources.items():
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


@dataclass(frozen=True)
class Unit:
    """One source and the command that compiles it, up to `-c source -o object`."""

    source: str  # below csrc
    command: tuple[str, ...]
    is_kernel: bool = False  # ptxas speaks of it
    variant: str = ""  # a source may be compiled several times

    @property
    def object(self) -> str:
        return f"obj/{'.'.join(filter(None, (self.source, self.variant)))}.o"


@dataclass(frozen=True)
class Plan:
    """All that decides what a build gives. Commands run in a folder that holds csrc, and name sources relative."""

    target: str  # "cuda", "emulator", "cpu"
    module: str  # the last part of its name, as in PYBIND11_MODULE
    sources: dict[str, bytes] = field(repr=False)
    units: tuple[Unit, ...]
    link: tuple[str, ...]  # up to `objects -o module`
    compilers: tuple[str, ...] = field(repr=False)  # the full text of each version
    compiler: str  # one line for people
    archs: tuple[str, ...] = ()  # GPUs', or instruction sets
    abi: str = field(default_factory=toolchain.abi)

    @property
    def filename(self) -> str:
        return f"{self.module}.{self.abi}.so"

    @functools.cached_property
    def sources_digest(self) -> str:
        return digest(self.sources)

    @functools.cached_property
    def workplace_key(self) -> str:
        """Of compilers, architectures and ABI: builds that differ in nothing else share a folder, and its objects."""
        return self._hash([self.compilers, self.link, self.archs, self.abi])

    @functools.cached_property
    def key(self) -> str:
        commands = [(unit.source, unit.command) for unit in self.units]
        return self._hash([self.workplace_key, self.sources_digest, commands])

    def _hash(self, parts: object) -> str:
        return hashlib.sha256(json.dumps([self.target, parts]).encode()).hexdigest()[:32]

    def manifest(self) -> dict[str, object]:
        """What lies beside the module, for whoever looks whether it fits."""
        return {
            "target": self.target,
            "module": self.filename,
            "sources": self.sources_digest,
            "archs": list(self.archs),
            "abi": self.abi,
            "compiler": self.compiler,
        }


def _python_flags() -> tuple[str, ...]:
    # The version is in the command, so that another pybind11 in the same place is compiled against afresh.
    version = f"-DFASTATTN_PYBIND11={toolchain.pybind11_version()}"
    return (version, "-isystem", str(toolchain.find_pybind11()), "-isystem", str(toolchain.python_include()))


def cuda(archs: Sequence[str], folder: Path | None = None, bindings: bool = True) -> Plan:
    """fastattn._cuda for some architectures; Hopper's kernels only if sm_90a is among them.

    Without bindings, the kernels alone, which need neither pybind11 nor Python's headers.
    """
    nvcc, gxx = toolchain.find_nvcc(), toolchain.find_gxx()
    for arch in archs:
        if arch not in (able := nvcc.architectures()):
            known = ", ".join(name for name in architectures.ACCEPTED if name in able)
            raise UnknownArch(f"nvcc {nvcc.short_version()} cannot compile for {arch}; it can for {known}.")
    sources = read_sources(folder or csrc(), CUDA_FILES)
    hopper = select(list(sources), HOPPER_SOURCES)
    start = (str(nvcc.path), *gxx.for_nvcc(), *NVCC_FLAGS)
    python = _python_flags() if bindings else ()

    def units() -> Iterator[Unit]:
        for name in sources:
            if name.endswith(".cpp") and bindings:
                yield Unit(name, (*start, f"-DFASTATTN_SM90={int(architectures.HOPPER in archs)}", *python))
            elif name.endswith(".cu"):
                own = [arch for arch in archs if name not in hopper or arch == architectures.HOPPER]
                generate = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in own]
                if own:
                    yield Unit(name, (*start, *KERNEL_FLAGS, *generate), is_kernel=True)

    libraries = (f"-L{library}" for library in nvcc.library_folders)
    return Plan(
        target="cuda",
        module="_cuda",
        sources=sources,
        units=tuple(units()),
        link=(str(nvcc.path), *gxx.for_nvcc(), *NVCC_LINK, *libraries),
        compilers=(nvcc.version, gxx.version),
        compiler=f"nvcc {nvcc.short_version()}",
        archs=tuple(archs),
    )


def emulator(folder: Path | None = None) -> Plan:
    """The same bindings and kernels, compiled by the host compiler with the emulator's headers in place of CUDA's."""
    gxx = toolchain.find_gxx()
    sources = read_sources(folder or csrc(), EMULATOR_FILES)
    python = _python_flags()

    def units() -> Iterator[Unit]:
        for name in sources:
            if name.endswith(".cpp"):
                yield Unit(name, (*gxx.command, *GXX_FLAGS, "-DFASTATTN_SM90=1", *python))
            elif name.endswith(".cu"):
                yield Unit(name, (*gxx.command, *GXX_FLAGS, "-xc++"))

    return Plan(
        target="emulator",
        module="_cuda",
        sources=sources,
        units=tuple(units()),
        link=(*gxx.command, *GXX_LINK),
        compilers=(gxx.version,),
        compiler=gxx.version.partition("\n")[0],
    )


def cpu(folder: Path | None = None) -> Plan:
    """fastattn._cpu: its kernels once for every instruction set of this kind of machine, of which one runs."""
    gxx = toolchain.find_gxx()
    sources = read_sources(folder or csrc(), CPU_FILES)
    isas = ISAS.get(platform.machine(), {"baseline": ()})
    python = _python_flags()

    def units() -> Iterator[Unit]:
        for name, content in sources.items():
            if name.endswith(".cpp") and PER_ISA in content:
                for isa, flags in isas.items():
                    command = (*gxx.command, *CPU_FLAGS, *flags, f"-DFASTATTN_ISA={isa}")
                    yield Unit(name, command, variant=isa)
            elif name.endswith(".cpp"):
                yield Unit(name, (*gxx.command, *CPU_FLAGS, *python))

    return Plan(
        target="cpu",
        module="_cpu",
        sources=sources,
        units=tuple(units()),
        link=(*gxx.command, *CPU_LINK),
        compilers=(gxx.version,),
        compiler=gxx.version.partition("\n")[0],
        archs=tuple(isas),
    )


PATTERNS = {"cuda": CUDA_FILES, "emulator": EMULATOR_FILES, "cpu": CPU_FILES}
