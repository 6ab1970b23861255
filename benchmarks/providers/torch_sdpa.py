"""torch.nn.functional.scaled_dot_product_attention, each of its backends by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.problems.attention import AttentionProblem
from benchmarks.provider import Call, Provider, unfused_limits
from benchmarks.workload import Tensors, Workload

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_CPU = ("flash", "math")


def make(backend: SDPBackend) -> Callable[[AttentionProblem, Tensors], Call]:
    def attention(problem: AttentionProblem, tensors: Tensors) -> Call:
        mask = mask_of(problem, tensors)
        is_causal = problem.causal and problem.S_q == problem.S_k and mask is None
        grouped = problem.heads_kv != problem.H

        def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **rest: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=bias if bias is not None else mask, is_causal=is_causal, enable_gqa=grouped
                )

        return Call(function, tensors)

    return attention


def mask_of(problem: AttentionProblem, tensors: Tensors) -> Tensor | None:
    """What torch is told of a mask: nothing for plain causality, its own bias for other corners, else all of it."""
    if "mask" in tensors:
        return tensors["mask"]
    if problem.window is not None:
        return problem.visible(tensors["q"].device)
    if problem.causal and problem.S_q > 1 and problem.S_q != problem.S_k:
        return causal_lower_right(problem.S_q, problem.S_k)
    return None


def limits(name: str) -> Callable[[Workload, torch.device], str | None]:
    def why_not(workload: Workload, device: torch.device) -> str | None:
        problem = workload.problem
        assert isinstance(problem, AttentionProblem)
        if problem.softcap is not None:
            return "SDPA has no softcap"
        if problem.bias and problem.causal:
            return "SDPA takes a bias or is_causal, not both"
        if device.type == "cpu" and name not in ON_CPU:
            return "this backend of SDPA is for GPUs"
        if name == "flash" and device.type == "cuda" and (problem.bias or problem.window or problem.documents):
            return "SDPA's flash backend takes no mask"
        return unfused_limits(workload, device) if name == "math" else None

    return why_not


PROVIDERS = [Provider(f"torch/{name}", {"attention": make(b)}, limits=limits(name)) for name, b in BACKENDS.items()]
