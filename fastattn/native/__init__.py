"""Builds, finds and loads the native modules. The standard library alone: setup.py loads this package by its path.

load()           fastattn._cuda, from the wheel or from the user's cache
why_not()        why load() would raise; None if it would not
load_emulator()  the same bindings and kernels on the CPU, built when first asked for
load_cpu()       fastattn._cpu, likewise from the wheel or from the cache; why_no_cpu() as above
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .errors import BuildFailed, NativeMissing, ToolMissing, UnsafeCache

if TYPE_CHECKING:
    from .cache import Built

__all__ = [
    "NativeMissing",
    "built",
    "forget",
    "load",
    "load_cpu",
    "load_emulator",
    "why_no_cpu",
    "why_no_emulator",
    "why_not",
]

PACKAGE = Path(__file__).resolve().parent.parent
HOW = "`python -m fastattn build` compiles it, given nvcc"


def load(capability: tuple[int, int] | None = None) -> ModuleType:
    """fastattn._cuda; with a GPU's compute capability, one that was compiled for it. Raises NativeMissing."""
    found = _find(capability)
    if isinstance(found, str):
        raise NativeMissing(found)
    return _load(found.path)


def why_not(capability: tuple[int, int] | None = None) -> str | None:
    """Why `load` would raise, as a phrase with a way out; None if a module is there. Loads nothing."""
    found = _find(capability)
    return found if isinstance(found, str) else None


def load_cpu() -> ModuleType:
    """fastattn._cpu. Raises NativeMissing."""
    found = _find_cpu()
    if isinstance(found, str):
        raise NativeMissing(found)
    return _load(found.path)


def why_no_cpu() -> str | None:
    """Why `load_cpu` would raise, as a phrase with a way out; None if a module is there. Loads nothing."""
    found = _find_cpu()
    return found if isinstance(found, str) else None


def built(target: str) -> list[Built]:
    """The modules of "cuda", "emulator" or "cpu" that fit these sources and this Python, the one to take first."""
    from . import plan, toolchain

    current, abi = plan.digest(plan.read_sources(plan.csrc(), plan.PATTERNS[target])), toolchain.abi()
    return [module for module in _there(target) if module.sources == current and module.abi == abi]


def load_emulator() -> ModuleType:
    """The kernels for the CPU: the host compiler takes a while the first time, and whenever their sources changed."""
    return _load(_emulator())


def why_no_emulator() -> str | None:
    """Why `load_emulator` could not even begin: no sources, no compiler. None if it can. Compiles nothing."""
    from . import plan

    try:
        plan.emulator()
    except (BuildFailed, ToolMissing) as error:
        return str(error).rstrip(".")
    return None


def forget() -> None:
    """Looks for modules afresh; those that are loaded stay."""
    _find.cache_clear()
    _find_cpu.cache_clear()
    _emulator.cache_clear()


@functools.cache
def _find(capability: tuple[int, int] | None) -> Built | str:
    from . import archs

    if capability is not None and capability < (8, 0):
        return f"its kernels are for compute capability 8.0 and newer, this GPU has {capability[0]}.{capability[1]}"
    try:
        fitting = built("cuda")
        for module in fitting:
            if capability is None or archs.covers(module.archs, capability):
                return module
        if fitting:
            there = ", ".join(fitting[0].archs)
            return f"it is compiled for {there}, not for this GPU; `python -m fastattn build` does that"
        if _there("cuda"):
            return "it was compiled from other sources, or for another Python; `python -m fastattn build` does it anew"
    except (BuildFailed, UnsafeCache) as error:
        return str(error).rstrip(".")
    return f"it is not compiled for this machine; {HOW}"


@functools.cache
def _find_cpu() -> Built | str:
    try:
        if fitting := built("cpu"):
            return fitting[0]
        if _there("cpu"):
            return "it was compiled from other sources, or for another Python; `python -m fastattn build` does it anew"
    except (BuildFailed, UnsafeCache) as error:
        return str(error).rstrip(".")
    return "it is not compiled for this machine; `python -m fastattn build` compiles it, given a C++ compiler"


def _there(target: str) -> list[Built]:
    """Every module of a target, whether it fits or not: that of the wheel, then those of the cache."""
    from . import cache

    installed = cache.read_manifest(PACKAGE / f"_{target}.json")
    return [*([installed] if installed else []), *cache.published(target)]


@functools.cache
def _emulator() -> Path:
    from . import cache, plan

    try:
        return cache.build(plan.emulator())[0].path
    except (BuildFailed, ToolMissing, UnsafeCache) as error:
        raise NativeMissing(f"The emulator cannot be built: {error}") from error


@functools.cache
def _load(path: Path) -> ModuleType:
    # pybind11 keeps modules by their full name: two of one name would be the first, whatever the second's file holds.
    # Python finds PyInit__cuda by the last part.
    parent = "fastattn" if path.parent == PACKAGE else f"fastattn.{path.parent.name}"
    name = f"{parent}.{path.name.partition('.')[0]}"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise NativeMissing(f"{path} does not load: {error}") from error
    return module
