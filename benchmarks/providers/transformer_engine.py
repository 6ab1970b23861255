"""NVIDIA's Transformer Engine: attention, LayerNorm and RMSNorm, by its modules."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.attention import AttentionProblem
from benchmarks.problems.rows import NormProblem
from benchmarks.provider import Call, Provider, importable
from benchmarks.providers.flash_attn import sequence_first
from benchmarks.workload import Tensors, Workload

MODULE = "transformer_engine.pytorch"


def engine() -> Any:
    return importlib.import_module(MODULE)


def attention(problem: AttentionProblem, tensors: Tensors) -> Call:
    B, H, S_q, D = problem.result_shape()
    attend = engine().DotProductAttention(
        H, D, num_gqa_groups=problem.heads_kv, attention_dropout=0.0, qkv_format="bshd", softmax_scale=problem.scale,
        attn_mask_type="causal_bottom_right" if problem.causal else "no_mask",
        window_size=None if problem.window is None else (problem.window, 0 if problem.causal else -1),
    )  # fmt: skip

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v).view(B, S_q, H, D)

    laid_out = {name: sequence_first(t).contiguous() for name, t in tensors.items()}
    return Call(function, laid_out, sequence_first)


def norm(problem: NormProblem, tensors: Tensors) -> Call:
    """Parameters are handed to the module at each call, as those of a model would be its own."""
    x = tensors["x"]
    kind = engine().LayerNorm if problem.kind == "layer_norm" else engine().RMSNorm
    module = kind(problem.N, eps=problem.EPS, device=x.device, dtype=x.dtype)

    def function(x: Tensor, **parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))

    return Call(function, tensors)


def limits(workload: Workload, device: torch.device) -> str | None:
    problem = workload.problem
    if device.type != "cuda":
        return "Transformer Engine is for GPUs"
    if isinstance(problem, NormProblem) and problem.residual:
        return "Transformer Engine's norms add no residual"
    if isinstance(problem, AttentionProblem):
        if workload.dtype == torch.float32:
            return "Transformer Engine's fused attention computes in half precision only"
        if problem.softcap is not None or problem.documents:
            return "Transformer Engine has no softcap, and takes no such mask"
        if problem.bias:
            return "Transformer Engine's bias is not compared here"
    return None


PROVIDERS = [
    Provider(
        "transformer_engine",
        {"attention": attention, "layer_norm": norm, "rms_norm": norm},
        importable(MODULE),
        limits,
    )
]
