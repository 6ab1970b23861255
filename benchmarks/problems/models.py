"""What the kernels are for: a Transformer layer, and a training step of a GPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from benchmarks.problems.attention import BACKWARD_PRODUCTS, AttentionProblem
from benchmarks.workload import Direction, Problem, Tensors, randn

INPUTS = ("x", "mask", "ids", "target")


class Layer(nn.Module):
    """A pre-norm Transformer layer, causal."""

    def __init__(self, library: ModuleType, d_model: int, heads: int) -> None:
        super().__init__()
        self.layer = library.TransformerEncoderLayer(
            d_model, heads, 4 * d_model, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x, mask, is_causal=True)


class GPT(nn.Module):
    """Embeddings, layers, norm and the loss of the next token; the output layer is tied to the embedding."""

    def __init__(self, library: ModuleType, V: int, d_model: int, heads: int, layers: int, S: int) -> None:
        super().__init__()
        self.fused_loss = library is fastattn.nn
        self.tokens, self.positions = nn.Embedding(V, d_model), nn.Embedding(S, d_model)
        self.layers = nn.ModuleList(Layer(library, d_model, heads) for _ in range(layers))
        self.norm = library.LayerNorm(d_model)

    def forward(self, ids: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight  # (B, S, d_model)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        if self.fused_loss:
            return fastattn.linear_cross_entropy(x, self.tokens.weight, target)
        return F.cross_entropy(F.linear(x, self.tokens.weight).flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class ModelProblem(Problem):
    """A module whose parameters are inputs of the problem, so that every library is given the same."""

    B: int
    S: int
    d_model: int
    heads: int

    def module(self, library: ModuleType, device: torch.device | str) -> nn.Module:
        raise NotImplementedError

    def activations(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        raise NotImplementedError

    def function(self, library: ModuleType, compiled: bool = False) -> Callable[..., Tensor]:
        """The module of that library, as a function of its parameters and its input."""
        module = self.module(library, "meta")

        def function(**tensors: Tensor) -> Tensor:
            given = {name: t for name, t in tensors.items() if name in INPUTS}
            parameters = {name: t for name, t in tensors.items() if name not in INPUTS}
            return torch.func.functional_call(module, parameters, kwargs=given)

        return torch.compile(function, dynamic=False) if compiled else function

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.module(nn, "meta").named_parameters()}

    @property
    def differentiable(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("x", *self.shapes)

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """GPT-2's initialisation, norms at 1 and biases at 0."""
        tensors = self.activations(dtype, device)
        tensors["mask"] = torch.ones(self.S, self.S, dtype=torch.bool, device=device).triu(1)
        for seed, (name, shape) in enumerate(self.shapes.items()):
            if len(shape) > 1:
                tensors[name] = randn(*shape, dtype=dtype, device=device, seed=seed) * 0.02
            else:
                tensors[name] = torch.full(shape, float(name.endswith("weight")), dtype=dtype, device=device)
        return tensors

    def compute(self, tensors: Tensors) -> Tensor:
        return self.function(nn)(**tensors)

    def layer_flops(self, direction: Direction) -> float:
        products = 2.0 * self.B * self.S * 12 * self.d_model**2
        attention = AttentionProblem(self.B, self.heads, self.S, self.S, self.d_model // self.heads, causal=True).flops(
            "forward"
        )
        backward = 2 * products + BACKWARD_PRODUCTS * attention
        return {"forward": products + attention, "backward": backward, "step": products + attention + backward}[
            direction
        ]


@dataclass(frozen=True)
class LayerProblem(ModelProblem):
    op: ClassVar[str] = "transformer_layer"

    def module(self, library: ModuleType, device: torch.device | str) -> nn.Module:
        with torch.device(device):
            return Layer(library, self.d_model, self.heads)

    def activations(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"x": randn(self.B, self.S, self.d_model, dtype=dtype, device=device, seed=98)}

    def result_shape(self) -> tuple[int, ...]:
        return self.B, self.S, self.d_model

    def flops(self, direction: Direction) -> float:
        return self.layer_flops(direction)

    def bytes(self, direction: Direction, itemsize: int) -> float:
        weights, x = 12 * self.d_model**2 * itemsize, self.B * self.S * self.d_model * itemsize
        return {"forward": weights + 2 * x, "backward": 2 * weights + 3 * x, "step": 3 * weights + 5 * x}[direction]


@dataclass(frozen=True)
class TrainStepProblem(ModelProblem):
    """Loss and the gradient of every parameter of a GPT; the optimizer, which is the same for all, is left out."""

    layers: int
    V: int

    op: ClassVar[str] = "train_step"

    def module(self, library: ModuleType, device: torch.device | str) -> nn.Module:
        with torch.device(device):
            return GPT(library, self.V, self.d_model, self.heads, self.layers, self.S)

    def activations(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(3)
        ids = torch.randint(self.V, (self.B, self.S + 1), device=device, generator=generator)
        return {"ids": ids[:, :-1].contiguous(), "target": ids[:, 1:].contiguous()}

    def result_shape(self) -> tuple[int, ...]:
        return ()

    def flops(self, direction: Direction) -> float:
        head = 2.0 * self.B * self.S * self.d_model * self.V
        factor = {"forward": 1, "backward": 2, "step": 3}[direction]
        return self.layers * self.layer_flops(direction) + factor * head

    def bytes(self, direction: Direction, itemsize: int) -> float:
        parameters = self.layers * 12 * self.d_model**2 + self.V * self.d_model
        return {"forward": 1, "backward": 2, "step": 3}[direction] * parameters * itemsize
