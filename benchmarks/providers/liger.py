"""Liger-Kernel, of LinkedIn: norms, losses, softmax, gated activations, by its functional interface."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems.rows import GatedProblem, NormProblem, SoftmaxProblem
from benchmarks.provider import Call, Provider, importable
from benchmarks.workload import Problem, Tensors, Workload

MODULE = "liger_kernel.transformers.functional"


def functional(name: str) -> Any:
    return getattr(importlib.import_module(MODULE), f"liger_{name}")


def rms_norm(problem: NormProblem, tensors: Tensors) -> Call:
    """Not in place: the gradient that its backward would write over is read again by the next round."""
    norm = functional("rms_norm")
    return Call(lambda x, weight: norm(x, weight, problem.EPS, in_place=False), tensors)


def layer_norm(problem: NormProblem, tensors: Tensors) -> Call:
    norm = functional("layer_norm")
    return Call(lambda x, weight, bias: norm(x, weight, bias, problem.EPS), tensors)


def softmax(problem: SoftmaxProblem, tensors: Tensors) -> Call:
    return Call(lambda x: functional("softmax")(x), tensors)


def cross_entropy(problem: Problem, tensors: Tensors) -> Call:
    """Of a copy, which is timed: it writes the gradient over the logits, which the next round reads again."""
    loss = functional("cross_entropy")

    def function(logits: Tensor, target: Tensor) -> Tensor:
        return loss(logits.clone(), target)

    return Call(function, tensors)


def linear_cross_entropy(problem: Problem, tensors: Tensors) -> Call:
    loss = functional("fused_linear_cross_entropy")
    return Call(lambda hidden, weight, target: loss(hidden, weight, target), tensors)


def swiglu(problem: GatedProblem, tensors: Tensors) -> Call:
    """On copies, which are timed: its backward writes over gate and up."""
    activate = functional("swiglu")
    return Call(lambda gate, up: activate(gate.clone(), up.clone()), tensors)


def limits(workload: Workload, device: torch.device) -> str | None:
    problem = workload.problem
    if device.type != "cuda":
        return "Liger's kernels are for GPUs"
    if isinstance(problem, NormProblem) and problem.residual:
        return "Liger's functional norms add no residual"
    if isinstance(problem, SoftmaxProblem) and (problem.causal or problem.masked):
        return "Liger's softmax has no mask"
    if isinstance(problem, SoftmaxProblem) and not hasattr(importlib.import_module(MODULE), "liger_softmax"):
        return "this version of Liger has no softmax"
    if isinstance(problem, GatedProblem) and problem.kind == "geglu":
        return "Liger's geglu is of gelu's tanh form"
    return None


PROVIDERS = [
    Provider(
        "liger",
        {
            "rms_norm": rms_norm,
            "layer_norm": layer_norm,
            "softmax": softmax,
            "cross_entropy": cross_entropy,
            "linear_cross_entropy": linear_cross_entropy,
            "swiglu": swiglu,
            "geglu": swiglu,  # refused in `limits`, with the reason
        },
        importable(MODULE),
        limits,
    )
]
