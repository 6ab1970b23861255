"""Operations on rows, whose cost is the bytes they move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Direction, Problem, Tensors, randn


def passes(forward: float, backward: float, direction: Direction) -> float:
    return {"forward": forward, "backward": backward, "step": forward + backward}[direction]


@dataclass(frozen=True)
class NormProblem(Problem):
    """y = layer_norm(x) or rms_norm(x) over rows of N, with weight, and for the former bias.

    With `residual`, of x + residual; the sum is a second result of what a Transformer layer needs, and is counted.
    """

    kind: str  # layer_norm or rms_norm
    rows: int
    N: int
    residual: bool = False

    differentiable: ClassVar[tuple[str, ...]] = ("x", "residual", "weight", "bias")
    EPS: ClassVar[float] = 1e-5

    @property
    def op(self) -> str:  # type: ignore[override]
        return self.kind

    def result_shape(self) -> tuple[int, ...]:
        return self.rows, self.N

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        tensors = {"x": randn(self.rows, self.N, dtype=dtype, device=device)}
        if self.residual:
            tensors["residual"] = randn(self.rows, self.N, dtype=dtype, device=device, seed=1)
        tensors["weight"] = randn(self.N, dtype=dtype, device=device, seed=2)
        if self.kind == "layer_norm":
            tensors["bias"] = randn(self.N, dtype=dtype, device=device, seed=3)
        return tensors

    def also(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return (tensors["x"] + tensors["residual"],) if self.residual else ()

    def compute(self, tensors: Tensors) -> Tensor:
        x = tensors["x"] + tensors["residual"] if self.residual else tensors["x"]
        if self.kind == "layer_norm":
            return F.layer_norm(x, (self.N,), tensors["weight"], tensors["bias"], self.EPS)
        return F.rms_norm(x, (self.N,), tensors["weight"], self.EPS)

    def flops(self, direction: Direction) -> float:
        return 0.0

    def bytes(self, direction: Direction, itemsize: int) -> float:
        matrix = self.rows * self.N * itemsize
        # x (and residual) read, y (and the sum) written; then x or the sum and dy read, dx (one for both) written
        return passes(4 * matrix if self.residual else 2 * matrix, 3 * matrix, direction)


@dataclass(frozen=True)
class SoftmaxProblem(Problem):
    """softmax(scale · x) over rows of N; causal: of (…, S, S) scores; masked: of such, some keys being padding."""

    rows: int
    N: int
    causal: bool = False
    scale: float = 1.0
    masked: bool = False

    op: ClassVar[str] = "softmax"
    differentiable: ClassVar[tuple[str, ...]] = ("x",)

    def result_shape(self) -> tuple[int, ...]:
        return (self.rows // self.N, self.N, self.N) if self.causal or self.masked else (self.rows, self.N)

    @property
    def matrix_lengths(self) -> list[int]:
        """Keys of each matrix that are no padding: a quarter of them, two, three, all, over and over."""
        return [self.N * (1 + i % 4) // 4 for i in range(self.rows // self.N)]

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        tensors = {"x": randn(*self.result_shape(), dtype=dtype, device=device)}
        if self.masked:
            lengths = torch.tensor(self.matrix_lengths, device=device)
            tensors["mask"] = torch.arange(self.N, device=device) < lengths[:, None, None]  # True: kept
        return tensors

    def compute(self, tensors: Tensors) -> Tensor:
        s = tensors["x"] * self.scale if self.scale != 1.0 else tensors["x"]
        if self.masked:
            s = s.masked_fill(~tensors["mask"], -torch.inf)
        if self.causal:
            s = s.masked_fill(~torch.ones(self.N, self.N, dtype=torch.bool, device=s.device).tril(), -torch.inf)
        return torch.softmax(s, -1)

    def flops(self, direction: Direction) -> float:
        return 0.0

    def bytes(self, direction: Direction, itemsize: int) -> float:
        matrix = self.rows * self.N * itemsize
        read = matrix / 2 if self.causal else matrix  # what is masked need not be read, but its 0 is written
        if self.masked:
            read = sum(self.matrix_lengths) * self.N * itemsize
        return passes(read + matrix, 2 * read + matrix, direction)


@dataclass(frozen=True)
class CrossEntropyProblem(Problem):
    """Mean of -log softmax(logits)_target over rows of V classes; every tenth row is ignored."""

    rows: int
    V: int

    op: ClassVar[str] = "cross_entropy"
    differentiable: ClassVar[tuple[str, ...]] = ("logits",)

    def result_shape(self) -> tuple[int, ...]:
        return ()

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {
            "logits": randn(self.rows, self.V, dtype=dtype, device=device),
            "target": some_classes(self.rows, self.V, device),
        }

    def compute(self, tensors: Tensors) -> Tensor:
        return F.cross_entropy(tensors["logits"], tensors["target"])

    def flops(self, direction: Direction) -> float:
        return 0.0

    def bytes(self, direction: Direction, itemsize: int) -> float:
        matrix = self.rows * self.V * itemsize
        return passes(matrix, 2 * matrix, direction)


@dataclass(frozen=True)
class LinearCrossEntropyProblem(Problem):
    """The same of logits = hidden weightᵀ, hidden (tokens, E), weight (V, E)."""

    tokens: int
    E: int
    V: int

    op: ClassVar[str] = "linear_cross_entropy"
    differentiable: ClassVar[tuple[str, ...]] = ("hidden", "weight")

    def result_shape(self) -> tuple[int, ...]:
        return ()

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {
            "hidden": randn(self.tokens, self.E, dtype=dtype, device=device),
            "weight": randn(self.V, self.E, dtype=dtype, device=device, seed=1) * self.E**-0.5,
            "target": some_classes(self.tokens, self.V, device),
        }

    def compute(self, tensors: Tensors) -> Tensor:
        return F.cross_entropy(F.linear(tensors["hidden"], tensors["weight"]), tensors["target"])

    def flops(self, direction: Direction) -> float:
        product = 2.0 * self.tokens * self.E * self.V
        return passes(product, 2 * product, direction)

    def bytes(self, direction: Direction, itemsize: int) -> float:
        both = (self.tokens + self.V) * self.E * itemsize
        return passes(both, 2 * both, direction)


@dataclass(frozen=True)
class RotaryProblem(Problem):
    """Rotary embedding of x (B, H, S, D), half-split, with cos and sin (S, D / 2)."""

    B: int
    H: int
    S: int
    D: int

    op: ClassVar[str] = "rotary_embedding"
    differentiable: ClassVar[tuple[str, ...]] = ("x",)

    def result_shape(self) -> tuple[int, ...]:
        return self.B, self.H, self.S, self.D

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        frequencies = 10_000.0 ** -torch.arange(0, 1, 2 / self.D, device=device)
        angles = torch.outer(torch.arange(self.S, device=device), frequencies)
        x = randn(*self.result_shape(), dtype=dtype, device=device)
        return {"x": x, "cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}

    def compute(self, tensors: Tensors) -> Tensor:
        x1, x2 = tensors["x"].chunk(2, -1)
        cos, sin = tensors["cos"], tensors["sin"]
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)

    def flops(self, direction: Direction) -> float:
        return 0.0

    def bytes(self, direction: Direction, itemsize: int) -> float:
        matrix = self.B * self.H * self.S * self.D * itemsize
        return passes(2 * matrix, 2 * matrix, direction)


@dataclass(frozen=True)
class GatedProblem(Problem):
    """silu(gate) · up (swiglu) or gelu(gate) · up (geglu) of rows of N."""

    kind: str
    rows: int
    N: int

    differentiable: ClassVar[tuple[str, ...]] = ("gate", "up")

    @property
    def op(self) -> str:  # type: ignore[override]
        return self.kind

    def result_shape(self) -> tuple[int, ...]:
        return self.rows, self.N

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {
            name: randn(self.rows, self.N, dtype=dtype, device=device, seed=seed)
            for seed, name in enumerate(("gate", "up"))
        }

    def compute(self, tensors: Tensors) -> Tensor:
        activation = F.silu if self.kind == "swiglu" else F.gelu
        return activation(tensors["gate"]) * tensors["up"]

    def flops(self, direction: Direction) -> float:
        return 0.0

    def bytes(self, direction: Direction, itemsize: int) -> float:
        matrix = self.rows * self.N * itemsize
        return passes(3 * matrix, 5 * matrix, direction)


def some_classes(rows: int, V: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(5)
    target = torch.randint(V, (rows,), device=device, generator=generator)
    target[::10] = -100
    return target
