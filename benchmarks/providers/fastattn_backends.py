"""fastattn, each backend by itself; a call that one refuses is told as unsupported, with its reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastattn
from benchmarks.problems.attention import AttentionProblem, VarlenProblem
from benchmarks.problems.models import LayerProblem, TrainStepProblem
from benchmarks.problems.rows import GatedProblem, NormProblem, SoftmaxProblem
from benchmarks.provider import Call, Provider, no_compiler
from benchmarks.workload import Problem, Tensors
from fastattn import backends


def attention(backend: str, problem: AttentionProblem, tensors: Tensors) -> Call:
    causal = "bottom_right" if problem.causal else False
    window = None if problem.window is None else (problem.window, None if not problem.causal else 0)
    options: Any = {"causal": False if window else causal, "window": window, "softcap": problem.softcap}

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return fastattn.attention(q, k, v, bias=bias, mask=mask, backend=backend, **options)

    return Call(function, tensors)


def varlen_attention(backend: str, problem: VarlenProblem, tensors: Tensors) -> Call:
    longest = problem.longest

    def function(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fastattn.varlen_attention(
            *(q, k, v, cu_seqlens, cu_seqlens, longest, longest), causal=problem.causal, backend=backend
        )

    return Call(function, tensors)


def norm(backend: str, problem: NormProblem, tensors: Tensors) -> Call:
    call: Any = fastattn.layer_norm if problem.kind == "layer_norm" else fastattn.rms_norm

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        parameters = (weight, bias) if problem.kind == "layer_norm" else (weight,)
        y = call(x, problem.N, *parameters, eps=problem.EPS, residual=residual, backend=backend)
        return y if residual is None else y[0]

    return Call(function, tensors)


def softmax(backend: str, problem: SoftmaxProblem, tensors: Tensors) -> Call:
    return Call(partial(fastattn.softmax, scale=problem.scale, causal=problem.causal, backend=backend), tensors)


def cross_entropy(backend: str, problem: Problem, tensors: Tensors) -> Call:
    return Call(partial(fastattn.cross_entropy, backend=backend), tensors)


def linear_cross_entropy(backend: str, problem: Problem, tensors: Tensors) -> Call:
    return Call(partial(fastattn.linear_cross_entropy, backend=backend), tensors)


def rotary_embedding(backend: str, problem: Problem, tensors: Tensors) -> Call:
    return Call(partial(fastattn.rotary_embedding, backend=backend), tensors)


def gated(backend: str, problem: GatedProblem, tensors: Tensors) -> Call:
    return Call(partial(getattr(fastattn, problem.kind), backend=backend), tensors)


OPS: dict[str, Callable[[str, Any, Tensors], Call]] = {
    "attention": attention,
    "varlen_attention": varlen_attention,
    "layer_norm": norm,
    "rms_norm": norm,
    "softmax": softmax,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "rotary_embedding": rotary_embedding,
    "swiglu": gated,
    "geglu": gated,
}


def available(backend: str) -> Callable[[torch.device], str | None]:
    def why_not(device: torch.device) -> str | None:
        for name, variable in (("triton", "TRITON_INTERPRET"), ("cuda", "FASTATTN_EMULATE")):
            if backend == name and os.environ.get(variable) == "1":
                return f"{variable}=1: simulated kernels take a time that says nothing"
        return backends.get(backend).available(device)

    return why_not


def model(problem: LayerProblem | TrainStepProblem, tensors: Tensors) -> Call:
    return Call(problem.function(fastattn.nn), tensors)


def compiled_model(problem: LayerProblem | TrainStepProblem, tensors: Tensors) -> Call:
    torch._dynamo.reset()
    return Call(problem.function(fastattn.nn, compiled=True), tensors)


PROVIDERS = [
    *(
        Provider(f"fastattn/{name}", {op: partial(make, name) for op, make in OPS.items()}, available(name))
        for name in backends.ORDER
        if name != "reference"  # the oracle runs no race
    ),
    Provider("fastattn/nn", {"transformer_layer": model, "train_step": model}),
    Provider(
        "fastattn/nn compiled",
        {"transformer_layer": compiled_model, "train_step": compiled_model},
        no_compiler,
        slow_to_make=True,
    ),
]
