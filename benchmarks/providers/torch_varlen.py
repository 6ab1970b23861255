"""torch.nn.attention.varlen, flash-attention as it comes with torch, over packed sequences."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from benchmarks.problems.attention import VarlenProblem
from benchmarks.provider import Call, Provider, importable
from benchmarks.workload import Tensors, Workload

MODULE = "torch.nn.attention.varlen"


def varlen_attention(problem: VarlenProblem, tensors: Tensors) -> Call:
    attend = importlib.import_module(MODULE).varlen_attn
    window = (-1, 0) if problem.causal else (-1, -1)

    def function(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return attend(
            q, k, v, cu_seqlens, cu_seqlens, problem.longest, problem.longest, scale=problem.scale, window_size=window
        )

    return Call(function, tensors)


def limits(workload: Workload, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "torch's attention of packed sequences is for GPUs"
    if workload.dtype == torch.float32:
        return "torch's attention of packed sequences computes in half precision only"
    return None


PROVIDERS = [Provider("torch/varlen", {"varlen_attention": varlen_attention}, importable(MODULE), limits)]
