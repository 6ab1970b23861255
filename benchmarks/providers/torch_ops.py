"""torch, the operations that a program would use without any library; compiled, in torch_compile.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems.models import LayerProblem, TrainStepProblem
from benchmarks.problems.rows import LinearCrossEntropyProblem
from benchmarks.provider import Call, Provider, unfused_limits
from benchmarks.workload import Problem, Tensors

# SDPA stands in torch_sdpa.py; its unfused form is here, as many programs still write it.
OPS = (
    "attention", "varlen_attention", "layer_norm", "rms_norm", "softmax", "cross_entropy", "linear_cross_entropy",
    "rotary_embedding", "swiglu", "geglu",
)  # fmt: skip


def unfused(problem: Problem, tensors: Tensors) -> Call:
    return Call(lambda **given: problem.compute(given), tensors)


def model(problem: LayerProblem | TrainStepProblem, tensors: Tensors) -> Call:
    return Call(problem.function(torch.nn), tensors)


def chunked(problem: LinearCrossEntropyProblem, tensors: Tensors) -> Call:
    """F.linear_cross_entropy of torch 2.13, which does not hold the logits."""
    options = torch.nn.LinearCrossEntropyOptions()

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, options=options)

    return Call(function, tensors)


def has_chunked(device: torch.device) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no F.linear_cross_entropy"


PROVIDERS = [
    Provider(
        "torch/eager",
        dict.fromkeys(OPS, unfused) | dict.fromkeys(("transformer_layer", "train_step"), model),
        limits=unfused_limits,
    ),
    Provider("torch/chunked", {"linear_cross_entropy": chunked}, has_chunked),
]
