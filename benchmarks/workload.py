"""What is measured, as data: a problem, which says what is computed, and a workload, which is one point of a curve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward", "step"]  # a step is both, which is how losses and models are run
Tensors = Mapping[str, Tensor]


class Problem(ABC):
    """A computation on tensors of known sizes. Each kind is a frozen dataclass; providers look it up by `op`."""

    op: ClassVar[str]
    differentiable: ClassVar[tuple[str, ...]]  # of the inputs

    @abstractmethod
    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Every tensor that a provider is given, the same at each call."""

    @abstractmethod
    def result_shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def compute(self, tensors: Tensors) -> Tensor:
        """The result in plain torch operations, unfused, in the dtype of the tensors: in float64 the truth."""

    def also(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """What a program needs beside the result: a compiler that is not asked for it never writes it."""
        return ()

    @abstractmethod
    def flops(self, direction: Direction) -> float:
        """Floating-point operations of the matrix products that the mathematics needs."""

    @abstractmethod
    def bytes(self, direction: Direction, itemsize: int) -> float:
        """The fewest bytes that have to move: each input read once, each result written once."""

    def parts(self) -> list[tuple[Problem, Callable[[str, Tensor], Tensor]]]:
        """Smaller problems whose results and gradients, one behind the other in dimension 1, are this one's.

        Each with what cuts its own part out of the input, or of the result (`y`), of a given name. Their truths are
        computed one after another, which takes less memory than all at once.
        """
        return [(self, lambda name, t: t)]


@dataclass(frozen=True)
class Workload:
    """A problem in one dtype and direction, and its place in tables and plots."""

    family: str
    name: str  # stable: two runs are compared by it
    problem: Problem
    dtype: torch.dtype
    direction: Direction
    series: str
    size: int
    quick: bool = False  # whether `--quick` has it

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def flops(self) -> float:
        return self.problem.flops(self.direction)

    @property
    def bytes(self) -> float:
        return self.problem.bytes(self.direction, self.dtype.itemsize)

    def __str__(self) -> str:
        return f"{self.family} {self.name} {self.dtype_name} {self.direction}"


def randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Standard normal, made on the device: at these sizes the host would take longer than the benchmark."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)
