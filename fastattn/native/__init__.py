"""Builds, finds and loads the native modules. The standard library alone: setup.py loads this package by its path.

load()           fastattn._cuda, from the wheel or from the user's cache
why_not()        why load() would raise; None if it would not
load_emulator()  the same bindings and kernels on the CPU, built when first asked for
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

__all__ = ["NativeMissing", "forget", "load", "load_emulator", "why_no_emulator", "why_not"]

PACKAGE = Path(__file__).resolve().parent.parent
HOW = "`python -m fastattn build` compiles it, given nvcc"


def load(capability: tuple[int, int] | None = None) -> ModuleType:
    """fastattn._cuda; with a GPU's compute capability, one that was compiled for it. Raises NativeMissing."""
    found = _find(capability)
    if isinstance(found, str):
        raise NativeMissing(found)
    return _load(found.path, "fastattn._cuda")


def why_not(capability: tuple[int, int] | None = None) -> str | None:
    """Why `load` would raise, as a phrase with a way out; None if a module is there. Loads nothing."""
    found = _find(capability)
    return found if isinstance(found, str) else None


def where(capability: tuple[int, int] | None = None) -> Built | None:
    """The module that `load` would load."""
    found = _find(capability)
    return None if isinstance(found, str) else found


def load_emulator() -> ModuleType:
    """The kernels for the CPU: the host compiler takes a while the first time, and whenever their sources changed."""
    return _load(_emulator(), "fastattn._emulator._cuda")


def why_no_emulator() -> str | None:
    """Why `load_emulator` could not even begin: no sources, no compiler. None if it can. Compiles nothing."""
    from . import plan

    try:
        plan.emulator()
    except (BuildFailed, ToolMissing) as error:
        return str(error)
    return None


def forget() -> None:
    """Looks for modules afresh; those that are loaded stay."""
    _find.cache_clear()
    _emulator.cache_clear()


@functools.cache
def _find(capability: tuple[int, int] | None) -> Built | str:
    from . import archs, cache, plan, toolchain

    try:
        current = plan.digest(plan.read_sources(plan.csrc(), plan.PATTERNS["cuda"]))
        installed = cache.read_manifest(PACKAGE / "_cuda.json")
        found = [*([installed] if installed else []), *cache.published("cuda")]
    except (BuildFailed, UnsafeCache) as error:
        return str(error)
    abi = toolchain.abi()
    fitting = [built for built in found if built.abi == abi and built.sources == current]
    for built in fitting:
        if capability is None or archs.covers(built.archs, capability):
            return built
    if fitting:
        return (
            f"it is compiled for {', '.join(fitting[0].archs)}, not for this GPU; `python -m fastattn build` does that"
        )
    if any(built.abi == abi for built in found):
        return f"it was compiled from other sources than those that are here; {HOW} again"
    return f"it is not compiled for this machine; {HOW}"


@functools.cache
def _emulator() -> Path:
    from . import cache, plan

    try:
        return cache.build(plan.emulator())[0].path
    except (BuildFailed, ToolMissing, UnsafeCache) as error:
        raise NativeMissing(f"The emulator cannot be built: {error}") from error


@functools.cache
def _load(path: Path, name: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise NativeMissing(f"{path} does not load: {error}") from error
    return module
