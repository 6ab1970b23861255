"""What `pip install` compiles: what there is a compiler for and, of the CUDA kernels, something to compile for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import archs as architectures
from . import plan, toolchain
from .errors import BuildFailed, ToolMissing, UnknownArch


@dataclass(frozen=True)
class Decision:
    """Whether one module is compiled, and for which architectures."""

    target: str  # "cuda" or "cpu"
    compiles: bool = False
    archs: tuple[str, ...] = ()  # of GPUs
    reason: str = ""  # why it is not compiled
    required: bool = False  # FASTATTN_BUILD=1: a build that fails, or is not possible, stops the installation

    def plan(self) -> plan.Plan:
        return plan.cuda(self.archs) if self.target == "cuda" else plan.cpu()


def decide(environment: Mapping[str, str]) -> dict[str, Decision]:
    """For "cuda" and "cpu", what FASTATTN_BUILD, FASTATTN_CUDA_ARCHS and this machine ask for.

    Raises UnknownArch, or ValueError.
    """
    asked = environment.get("FASTATTN_BUILD", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"FASTATTN_BUILD is {asked!r}; it must be 0 (compile nothing), 1 (compile, or fail) or unset.")
    if asked == "0":
        return {target: Decision(target, reason="FASTATTN_BUILD is 0") for target in ("cuda", "cpu")}
    required = asked == "1"
    return {"cuda": _decide_cuda(environment, required), "cpu": _decide_cpu(required)}


def _decide_cuda(environment: Mapping[str, str], required: bool) -> Decision:
    named = environment.get("FASTATTN_CUDA_ARCHS", "")
    try:
        archs = architectures.parse(named) if named.strip() else ()
        toolchain.find_nvcc()
        _find_common_tools()
        archs = archs or architectures.present()
    except (ToolMissing, BuildFailed) as error:
        return Decision("cuda", reason=str(error), required=required)
    except UnknownArch as error:
        raise UnknownArch(f"FASTATTN_CUDA_ARCHS: {error}") from error
    if not archs:
        reason = "there is no NVIDIA GPU here, and FASTATTN_CUDA_ARCHS names none"
        return Decision("cuda", reason=reason, required=required)
    return Decision("cuda", True, archs, required=required)


def _decide_cpu(required: bool) -> Decision:
    try:
        _find_common_tools()
    except (ToolMissing, BuildFailed) as error:
        return Decision("cpu", reason=str(error), required=required)
    return Decision("cpu", True, required=required)


def _find_common_tools() -> None:
    toolchain.find_gxx()
    toolchain.find_ninja()
    toolchain.find_pybind11()
    toolchain.python_include()
    plan.csrc()
