"""Attention over (B, H, S, D) tensors, and over packed sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.workload import Direction, Problem, Tensors, randn

BACKWARD_PRODUCTS = 2.5  # five matrix products against the forward's two


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """o = softmax(softcap(q kᵀ / √D) + bias, masked) v, with k and v in H_kv heads.

    Keys are aligned with queries at the bottom right: row i sees j ≤ i + S_k - S_q when `causal`, of them the last
    `window` + 1 when that is not None. `documents`: lengths that make up S; a row sees its own document only.
    """

    B: int
    H: int
    S_q: int
    S_k: int
    D: int
    causal: bool = False
    H_kv: int | None = None
    window: int | None = None
    softcap: float | None = None
    bias: bool = False
    documents: tuple[int, ...] = ()

    op: ClassVar[str] = "attention"
    differentiable: ClassVar[tuple[str, ...]] = ("q", "k", "v", "bias")

    @property
    def heads_kv(self) -> int:
        return self.H if self.H_kv is None else self.H_kv

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.D)

    @property
    def plain(self) -> bool:
        """Nothing but causality and groups of heads."""
        return self.window is None and self.softcap is None and not self.bias and not self.documents

    @property
    def scores(self) -> int:
        """How many an unfused attention holds."""
        return self.B * self.H * self.S_q * self.S_k

    def result_shape(self) -> tuple[int, ...]:
        return self.B, self.H, self.S_q, self.D

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        queries, keys = (self.B, self.H, self.S_q, self.D), (self.B, self.heads_kv, self.S_k, self.D)
        tensors = {
            name: randn(*shape, dtype=dtype, device=device, seed=seed)
            for seed, (name, shape) in enumerate({"q": queries, "k": keys, "v": keys}.items())
        }
        if self.bias:
            tensors["bias"] = randn(1, self.H, self.S_q, self.S_k, dtype=dtype, device=device, seed=3)
        if self.documents:
            of = torch.arange(len(self.documents), device=device).repeat_interleave(
                torch.tensor(self.documents, device=device)
            )
            tensors["mask"] = (of[:, None] == of[None, :])[None, None]
            if self.causal:
                tensors["mask"] = tensors["mask"].tril()
        return tensors

    def visible(self, device: torch.device) -> Tensor | None:
        """(S_q, S_k) bool, of causality and window; None: everything."""
        if not self.causal and self.window is None:
            return None
        i, j = torch.arange(self.S_q, device=device)[:, None], torch.arange(self.S_k, device=device)[None, :]
        diagonal = i + self.S_k - self.S_q
        seen = j <= diagonal if self.causal else torch.ones_like(diagonal >= j)
        return seen if self.window is None else seen & (j >= diagonal - self.window)

    def compute(self, tensors: Tensors) -> Tensor:
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        group = self.H // self.heads_kv
        k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
        s = q @ k.transpose(-2, -1) * self.scale
        if self.softcap is not None:
            s = self.softcap * torch.tanh(s / self.softcap)
        if "bias" in tensors:
            s = s + tensors["bias"]
        for mask in (self.visible(q.device), tensors.get("mask")):
            if mask is not None:
                s = s.masked_fill(~mask, -torch.inf)
        return s.softmax(-1) @ v

    def parts(self) -> list[tuple[Problem, Callable[[str, Tensor], Tensor]]]:
        """Each head of k and v with its group of queries, in every sequence."""
        group = self.H // self.heads_kv
        one = replace(self, H=group, H_kv=1)

        def cut(head: int, name: str, t: Tensor) -> Tensor:
            if name == "mask":
                return t
            width = 1 if name in ("k", "v") else group
            return t[:, head * width : (head + 1) * width]

        return [(one, partial(cut, head)) for head in range(self.heads_kv)]

    @cached_property
    def pairs(self) -> int:
        """How many of the S_q × S_k scores of one head count."""
        if self.documents:
            return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.documents)
        i = torch.arange(self.S_q)
        last = i + self.S_k - self.S_q if self.causal else torch.full_like(i, self.S_k - 1)
        first = torch.zeros_like(i) if self.window is None else i + self.S_k - self.S_q - self.window
        return int((last - first.clamp(min=0) + 1).clamp(min=0).sum())

    def flops(self, direction: Direction) -> float:
        forward = 4.0 * self.B * self.H * self.pairs * self.D
        return {"forward": 1.0, "backward": BACKWARD_PRODUCTS, "step": 1 + BACKWARD_PRODUCTS}[direction] * forward

    def bytes(self, direction: Direction, itemsize: int) -> float:
        queries, keys = self.B * self.H * self.S_q * self.D, self.B * self.heads_kv * self.S_k * self.D
        bias = self.H * self.S_q * self.S_k if self.bias else 0
        mask = self.S_q * self.S_k if self.documents else 0
        lse = 4 * self.B * self.H * self.S_q
        forward = itemsize * (2 * queries + 2 * keys + bias) + mask + lse  # q, o; k, v
        backward = itemsize * (4 * queries + 4 * keys + 2 * bias) + mask + lse  # q, o, do, dq; k, v, dk, dv
        return {"forward": forward, "backward": backward, "step": forward + backward}[direction]


@dataclass(frozen=True)
class VarlenProblem(Problem):
    """Self-attention of sequences of these lengths, packed: q, k and v are (T, H, D), T the sum of the lengths."""

    lengths: tuple[int, ...]
    H: int
    D: int
    causal: bool = False

    op: ClassVar[str] = "varlen_attention"
    differentiable: ClassVar[tuple[str, ...]] = ("q", "k", "v")

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.D)

    @property
    def bounds(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    def result_shape(self) -> tuple[int, ...]:
        return self.tokens, self.H, self.D

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        tensors = {
            name: randn(*self.result_shape(), dtype=dtype, device=device, seed=seed) for seed, name in enumerate("qkv")
        }
        return tensors | {"cu_seqlens": torch.tensor(self.bounds, dtype=torch.int32, device=device)}

    def compute(self, tensors: Tensors) -> Tensor:
        packed = [tensors[name].transpose(0, 1)[None] for name in "qkv"]  # (1, H, T, D)
        results = []
        for begin, end in pairwise(self.bounds):
            q, k, v = (t[:, :, begin:end] for t in packed)
            one = AttentionProblem(1, q.shape[1], end - begin, end - begin, self.D, self.causal)
            results.append(one.compute({"q": q, "k": k, "v": v}))
        return torch.cat(results, 2)[0].transpose(0, 1)

    def parts(self) -> list[tuple[Problem, Callable[[str, Tensor], Tensor]]]:
        def cut(head: int, name: str, t: Tensor) -> Tensor:
            return t if name == "cu_seqlens" else t[:, head : head + 1]

        return [(replace(self, H=1), partial(cut, head)) for head in range(self.H)]

    def flops(self, direction: Direction) -> float:
        return sum(
            AttentionProblem(1, self.H, n, n, self.D, self.causal).flops(direction) for n in self.lengths if n > 0
        )

    def bytes(self, direction: Direction, itemsize: int) -> float:
        return AttentionProblem(1, self.H, self.tokens, self.tokens, self.D).bytes(direction, itemsize)
