"""torch's FlexAttention, compiled, with the block mask and score modification that each workload needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.problems.attention import AttentionProblem, VarlenProblem
from benchmarks.provider import Call, Provider, no_compiler
from benchmarks.workload import Tensors, Workload


def attention(problem: AttentionProblem, tensors: Tensors) -> Call:
    torch._dynamo.reset()
    block_mask = block_mask_of(problem, tensors["q"].device)
    flex = torch.compile(flex_attention, dynamic=False)
    grouped = problem.heads_kv != problem.H

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return flex(
            q, k, v, score_mod=score_mod_of(problem, bias), block_mask=block_mask, scale=problem.scale,
            enable_gqa=grouped,
        )  # fmt: skip

    return Call(function, tensors)


def varlen_attention(problem: VarlenProblem, tensors: Tensors) -> Call:
    """Of one sequence that is the files one behind the other, each of which sees itself only."""
    T = problem.tokens
    whole = AttentionProblem(1, problem.H, T, T, problem.D, problem.causal, documents=problem.lengths)
    laid_out = {name: tensors[name].transpose(0, 1)[None].contiguous() for name in "qkv"}  # (1, H, T, D)
    return replace(attention(whole, laid_out), canonical=lambda t: t[0].transpose(0, 1))


def block_mask_of(problem: AttentionProblem, device: torch.device) -> Any:
    """Of what `AttentionProblem.visible` and its documents say; None: every block is full."""
    if not problem.causal and problem.window is None and not problem.documents:
        return None
    shift = problem.S_k - problem.S_q
    lengths = torch.tensor(problem.documents or (problem.S_k,), device=device)
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i + shift) if problem.causal else (j >= 0)
        if problem.window is not None:
            seen = seen & (j >= i + shift - problem.window)
        return seen & (document[i] == document[j]) if problem.documents else seen

    return create_block_mask(visible, None, None, problem.S_q, problem.S_k, device=device)


def score_mod_of(problem: AttentionProblem, bias: Tensor | None) -> Any:
    if problem.softcap is None and bias is None:
        return None

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if problem.softcap is not None:
            s = problem.softcap * torch.tanh(s / problem.softcap)
        return s if bias is None else s + bias[0, h, i, j]

    return score_mod


def limits(workload: Workload, device: torch.device) -> str | None:
    if device.type == "cpu" and workload.direction != "forward":
        return "FlexAttention has no backward on CPUs"
    problem = workload.problem
    assert isinstance(problem, (AttentionProblem, VarlenProblem))
    if problem.D < 16:
        return "FlexAttention needs head dimensions of 16 and more"
    return None


PROVIDERS = [
    Provider("torch/flex", {"attention": attention, "varlen_attention": varlen_attention}, no_compiler, limits)
]
