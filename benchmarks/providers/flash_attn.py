"""flash-attention 2, 3 and 4, of Dao-AILab: three packages with nearly one interface, over (B, S, H, D) tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.attention import AttentionProblem, VarlenProblem
from benchmarks.provider import Call, Provider, importable
from benchmarks.workload import Tensors, Workload

MODULES = {"2": "flash_attn", "3": "flash_attn_interface", "4": "flash_attn.cute"}
CAPABILITIES = {"2": (8, 9, 10, 12), "3": (9,), "4": (9, 10)}
UNBOUNDED = {"2": -1, "3": -1, "4": None}  # side of a window


def sequence_first(t: Tensor) -> Tensor:
    """(B, H, S, D) from or to (B, S, H, D)."""
    return t.transpose(1, 2)


def first(result: Any) -> Tensor:
    """The output; some versions return the LSE too."""
    return result[0] if isinstance(result, tuple) else result


def attention(version: str) -> Callable[[AttentionProblem, Tensors], Call]:
    def make(problem: AttentionProblem, tensors: Tensors) -> Call:
        flash = importlib.import_module(MODULES[version]).flash_attn_func
        options: dict[str, Any] = {"softmax_scale": problem.scale, "causal": problem.causal}
        if problem.window is not None:
            options["window_size"] = problem.window, 0 if problem.causal else UNBOUNDED[version]
        if problem.softcap is not None:
            options["softcap"] = problem.softcap

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return first(flash(q, k, v, **options))

        laid_out = {name: sequence_first(t).contiguous() for name, t in tensors.items()}
        return Call(function, laid_out, sequence_first)

    return make


def varlen_attention(version: str) -> Callable[[VarlenProblem, Tensors], Call]:
    def make(problem: VarlenProblem, tensors: Tensors) -> Call:
        flash = importlib.import_module(MODULES[version]).flash_attn_varlen_func

        def function(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
            result = flash(
                q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=problem.longest,
                max_seqlen_k=problem.longest, softmax_scale=problem.scale, causal=problem.causal,
            )  # fmt: skip
            return first(result)

        return Call(function, tensors)

    return make


def limits(version: str) -> Callable[[Workload, torch.device], str | None]:
    def why_not(workload: Workload, device: torch.device) -> str | None:
        problem = workload.problem
        assert isinstance(problem, (AttentionProblem, VarlenProblem))
        if workload.dtype == torch.float32:
            return "flash-attention computes in half precision only"
        if problem.D > 256 or problem.D % 8:
            return "flash-attention takes head dimensions up to 256 that 8 divides"
        if isinstance(problem, AttentionProblem) and problem.bias:
            return "flash-attention takes no additive bias"
        if isinstance(problem, AttentionProblem) and problem.documents:
            return "flash-attention takes no mask"
        if device.type != "cuda":
            return "flash-attention is for GPUs"
        major = torch.cuda.get_device_capability(device)[0]
        if major not in CAPABILITIES[version]:
            return f"flash-attention {version} does not run on compute capability {major}"
        return None

    return why_not


PROVIDERS = [
    Provider(
        f"flash_attn/{version}",
        {"attention": attention(version), "varlen_attention": varlen_attention(version)},
        importable(module),
        limits(version),
    )
    for version, module in MODULES.items()
]
