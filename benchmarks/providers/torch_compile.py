"""torch.compile of the unfused operation, and of torch.nn's models."""

from __future__ import annotations

from functools import partial

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.problems.models import LayerProblem, TrainStepProblem
from benchmarks.provider import Call, Provider, no_compiler, unfused_limits
from benchmarks.providers.torch_ops import OPS
from benchmarks.workload import Problem, Tensors


def compiled(problem: Problem, tensors: Tensors) -> Call:
    torch._dynamo.reset()  # a limit on how often one piece of code is compiled counts over all workloads
    # A backward that is timed again and again must leave its saved tensors alone.
    torch._functorch.config.donated_buffer = False

    @partial(torch.compile, dynamic=False)
    def function(**given: Tensor) -> tuple[Tensor, ...]:
        return problem.compute(given), *(t.detach() for t in problem.also(given))

    return Call(lambda **given: function(**given)[0], tensors)


def model(problem: LayerProblem | TrainStepProblem, tensors: Tensors) -> Call:
    torch._dynamo.reset()
    return Call(problem.function(torch.nn, compiled=True), tensors)


PROVIDERS = [
    Provider(
        "torch/compile",
        {op: compiled for op in OPS if op != "varlen_attention"} | {"transformer_layer": model, "train_step": model},
        no_compiler,
        unfused_limits,
    )
]
