"""xformers' memory_efficient_attention, which takes the fastest of the kernels it has, over (B, S, H, D) tensors."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.attention import AttentionProblem, VarlenProblem
from benchmarks.provider import Call, Provider, importable
from benchmarks.providers.flash_attn import sequence_first
from benchmarks.workload import Tensors, Workload


def module(name: str) -> Any:
    return importlib.import_module(f"xformers.ops{name}")


def attention(problem: AttentionProblem, tensors: Tensors) -> Call:
    attend = module("").memory_efficient_attention
    masks = module(".fmha.attn_bias")
    mask = masks.LowerTriangularFromBottomRightMask() if problem.causal else None

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        given = mask if bias is None else bias.expand(problem.B, -1, -1, -1)
        return attend(q, k, v, attn_bias=given, scale=problem.scale)

    laid_out = {n: t if n == "bias" else sequence_first(t).contiguous() for n, t in tensors.items()}
    return Call(function, laid_out, lambda t: t if is_square(problem, t) else sequence_first(t))


def is_square(problem: AttentionProblem, t: Tensor) -> bool:
    """Whether this is the gradient of the bias, (1, H, S_q, S_k), whose layout is the problem's."""
    return problem.bias and tuple(t.shape) == (1, problem.H, problem.S_q, problem.S_k)


def varlen_attention(problem: VarlenProblem, tensors: Tensors) -> Call:
    attend = module("").memory_efficient_attention
    mask = module(".fmha.attn_bias").BlockDiagonalMask.from_seqlens(list(problem.lengths))
    mask = mask.make_causal() if problem.causal else mask

    def function(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return attend(q[None], k[None], v[None], attn_bias=mask, scale=problem.scale)[0]

    return Call(function, tensors)


def limits(workload: Workload, device: torch.device) -> str | None:
    problem = workload.problem
    if device.type != "cuda":
        return "xformers' kernels are for GPUs"
    if isinstance(problem, AttentionProblem):
        if problem.heads_kv != problem.H:
            return "xformers has no gradient for grouped heads, and wants five dimensions for them"
        if problem.softcap is not None:
            return "xformers has no softcap"
        if problem.window is not None or problem.documents:
            return "xformers takes this mask for packed sequences only"
    return None


PROVIDERS = [
    Provider(
        "xformers",
        {"attention": attention, "varlen_attention": varlen_attention},
        importable("xformers.ops"),
        limits,
    )
]
