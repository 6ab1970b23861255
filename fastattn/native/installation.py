"""What `pip install` compiles: nothing, unless there is something to compile with and something to compile for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import archs as architectures
from . import plan, toolchain
from .errors import BuildFailed, ToolMissing, UnknownArch


@dataclass(frozen=True)
class Decision:
    archs: tuple[str, ...] = ()
    reason: str = ""  # why nothing is compiled
    required: bool = False  # FASTATTN_BUILD=1: a build that fails, or is not possible, stops the installation


def decide(environment: Mapping[str, str]) -> Decision:
    """What FASTATTN_BUILD, FASTATTN_CUDA_ARCHS and this machine ask for. Raises UnknownArch, or ValueError."""
    asked = environment.get("FASTATTN_BUILD", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"FASTATTN_BUILD is {asked!r}; it must be 0 (compile nothing), 1 (compile, or fail) or unset.")
    if asked == "0":
        return Decision(reason="FASTATTN_BUILD is 0")
    required = asked == "1"
    named = environment.get("FASTATTN_CUDA_ARCHS", "")
    try:
        archs = architectures.parse(named) if named.strip() else ()
        toolchain.find_nvcc()
        toolchain.find_gxx()
        toolchain.find_ninja()
        toolchain.find_pybind11()
        toolchain.python_include()
        plan.csrc()
        archs = archs or architectures.present()
    except (ToolMissing, BuildFailed) as error:
        return Decision(reason=str(error), required=required)
    except UnknownArch as error:
        raise UnknownArch(f"FASTATTN_CUDA_ARCHS: {error}") from error
    if not archs:
        return Decision(reason="there is no NVIDIA GPU here, and FASTATTN_CUDA_ARCHS names none", required=required)
    return Decision(archs, required=required)
