"""quack, of Dao-AILab: RMSNorm, softmax and cross entropy for Hopper and newer."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from benchmarks.problems.rows import NormProblem, SoftmaxProblem
from benchmarks.provider import Call, Provider, importable
from benchmarks.workload import Problem, Tensors, Workload


def rms_norm(problem: NormProblem, tensors: Tensors) -> Call:
    norm = importlib.import_module("quack.rmsnorm").rmsnorm

    def function(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return norm(x, weight, eps=problem.EPS)
        return norm(x, weight, residual=residual, eps=problem.EPS, prenorm=True)[0]

    return Call(function, tensors)


def softmax(problem: SoftmaxProblem, tensors: Tensors) -> Call:
    return Call(importlib.import_module("quack.softmax").softmax, tensors)


def cross_entropy(problem: Problem, tensors: Tensors) -> Call:
    loss = importlib.import_module("quack.cross_entropy").cross_entropy

    def function(logits: Tensor, target: Tensor) -> Tensor:
        return loss(logits, target, ignore_index=-100, reduction="mean")

    return Call(function, tensors)


def limits(workload: Workload, device: torch.device) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return "quack is for compute capability 9.0 and newer"
    if isinstance(workload.problem, SoftmaxProblem) and (workload.problem.causal or workload.problem.masked):
        return "quack's softmax has no mask"
    return None


PROVIDERS = [
    Provider(
        "quack",
        {"rms_norm": rms_norm, "softmax": softmax, "cross_entropy": cross_entropy},
        importable("quack"),
        limits,
    )
]
