"""What one call computes, after every way of asking for it has been normalised.

`functional` turns the caller's keywords into one of these; everything below (operators, backends, kernels)
reads only this. Sizes that vary from batch to batch are read from the tensors, so that a new sequence length
is never a new spec. This module imports nothing of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


class AttentionInputs(NamedTuple):
    """The tensors of one call of attention, and their order in operators and backends; also one gradient for each."""

    q: Tensor  # (B, H, S_q, D); packed (1, H, T_q, D)
    k: Tensor  # (B, H_kv, S_k, D)
    v: Tensor  # (B, H_kv, S_k, D_v)
    bias: Tensor | None = None  # (B | 1, H | 1, S_q | 1, S_k | 1)
    mask: Tensor | None = None  # the same, bool
    alibi_slopes: Tensor | None = None  # (H,) or (B, H)
    sinks: Tensor | None = None  # (H,)
    seed: Tensor | None = None  # () int64, keys the dropout
    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32, contiguous
    cu_seqlens_k: Tensor | None = None
    qk_scales: Tensor | None = None  # (B, H) fp32, contiguous: what q kᵀ of 8-bit q and k is multiplied by
    v_scales: Tensor | None = None  # (B, H_kv), the same of v

    @property
    def B(self) -> int:
        """Sequences, packed or not."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1


class Work(NamedTuple):
    """How much one call computes, by which a backend says whether it is worth its overhead. No part of a spec."""

    amount: int  # elements of the input; for attention, multiply-adds of q kᵀ
    gradient: bool  # whether a backward is to come
    queries: int | None = None  # for attention, S_q and S_k
    keys: int | None = None


DIFFERENTIABLE_INPUTS = ("q", "k", "v", "bias", "alibi_slopes", "sinks")


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """o = softmax(f(q kᵀ · scale)) v, with f in the fixed order softcap, + bias + ALiBi, mask, sinks, dropout."""

    H: int  # query heads
    H_kv: int  # key and value heads; query head h reads key head h // (H // H_kv)
    D: int  # width of q and k
    D_v: int  # width of v and o
    dtype: torch.dtype  # of q, k and v
    scale: float
    left: int | None = None  # keys before the diagonal that a row still sees; None: all of them
    right: int | None = None  # keys after the diagonal that a row still sees; None: all, 0: causal
    top_left: bool = False  # the diagonal is j = i; otherwise j = i + S_k - S_q
    softcap: float | None = None
    dropout_p: float = 0.0
    bias: bool = False
    mask: bool = False
    alibi: bool = False
    sinks: bool = False
    varlen: bool = False  # sequences of unequal lengths packed into (1, H, T, D)
    deterministic: bool = False  # the same bits on every run, backward included

    @property
    def op(self) -> str:
        return "varlen_attention" if self.varlen else "attention"

    @property
    def G(self) -> int:
        """Query heads per key head."""
        return self.H // self.H_kv if self.H_kv else 1

    @property
    def windowed(self) -> bool:
        """Whether some keys are out of a row's sight by position."""
        return self.left is not None or self.right is not None

    @property
    def plain(self) -> bool:
        """Whether this is softmax(q kᵀ · scale) v over every key, and nothing else."""
        return not (
            self.windowed
            or self.softcap is not None
            or self.dropout_p
            or self.bias
            or self.mask
            or self.alibi
            or self.sinks
            or self.varlen
            or self.fp8
            or self.deterministic
        )

    @property
    def fp8(self) -> bool:
        """Whether q, k and v are 8-bit numbers, to be multiplied by a scale for each head."""
        return self.dtype == torch.float8_e4m3fn

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of o."""
        return torch.bfloat16 if self.fp8 else self.dtype

    def shift(self, S_q: Any, S_k: Any) -> Any:
        """Column of the diagonal in row 0: row i sees keys in [i + shift - left, i + shift + right]."""
        return 0 if self.top_left else S_k - S_q


@dataclass(frozen=True, slots=True)
class NormSpec:
    """LayerNorm or RMSNorm over the last dimensions of h = residual + dropout(x), or of x; at least fp32 inside."""

    dtype: torch.dtype  # of x
    weight_dtype: torch.dtype | None  # None: no weight
    bias_dtype: torch.dtype | None  # None: no bias
    eps: float
    n_dims: int = 1  # how many of the last dimensions make a row
    rms: bool = False  # no mean is subtracted, and the mean square stands for the variance
    weight_offset: float = 0.0  # what is multiplied with is weight_offset + weight
    residual_dtype: torch.dtype | None = None  # of residual and h; None: no residual
    dropout_p: float = 0.0
    memory_efficient: bool = False  # the backward reads y, not x or h
    out_dtype: torch.dtype | None = None  # of y; None: that of x

    @property
    def op(self) -> str:
        return "rms_norm" if self.rms else "layer_norm"

    @property
    def residual(self) -> bool:
        return self.residual_dtype is not None


@dataclass(frozen=True, slots=True)
class SoftmaxSpec:
    """y = softmax(scale · x) over one dimension, or its logarithm; masked entries get probability 0."""

    dtype: torch.dtype  # of x and y
    dim: int = -1  # counted from the end
    scale: float = 1.0
    log: bool = False
    mask: bool = False
    causal: bool = False  # dim is -1 and rows are the one before it
    top_left: bool = False  # as in AttentionSpec
    inplace: bool = False  # y is written over x

    op = "softmax"

    def shift(self, S_q: int, S_k: int) -> int:
        """Column of the diagonal in row 0."""
        return 0 if self.top_left else S_k - S_q


@dataclass(frozen=True, slots=True)
class GatedSpec:
    """y = a(gate) · up, a being silu, gelu, or gelu by its tanh approximation."""

    dtype: torch.dtype  # of gate, up and y
    activation: str  # "silu", "gelu" or "gelu_tanh"

    @property
    def op(self) -> str:
        return "swiglu" if self.activation == "silu" else "geglu"


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """Pairs of elements of q, and of k if there is one, rotated by the angles of each token.

    Nothing of q and k is kept for the backward, so that sizes and layouts of their gradients are said here.
    """

    dtype: torch.dtype  # of q and k
    sizes: tuple[tuple[int, ...], ...]  # of q and k: (B, H, S, D) each, or packed (T, H, D)
    tokens_first: tuple[bool, ...]  # whether in memory the heads of one token lie together
    interleaved: bool = False  # pairs (2i, 2i + 1); otherwise (i, i + R/2)
    inplace: bool = False

    op = "rotary_embedding"


@dataclass(frozen=True, slots=True)
class DropoutAddSpec:
    """y = residual + dropout(x), keyed by row and column; sizes and dtype of x are those of its gradient."""

    dtype: torch.dtype  # of residual and y
    x_dtype: torch.dtype
    sizes: tuple[int, ...]
    dropout_p: float = 0.0
    inplace: bool = False  # y takes residual's memory

    op = "dropout_add"


ElementwiseSpec: TypeAlias = GatedSpec | RotarySpec | DropoutAddSpec


@dataclass(frozen=True, slots=True)
class CrossEntropySpec:
    """-Σ_j q_j log p_j of each row, q from a class or from probabilities, and how the rows are reduced."""

    dtype: torch.dtype  # of the logits
    loss_dtype: torch.dtype
    target_dtype: torch.dtype  # of integers: classes; floating-point: probabilities
    weight_dtype: torch.dtype | None = None  # None: no class weights
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # factor on lse²
    softcap: float | None = None
    inner: bool = False  # other dimensions come after that of the classes, as in images
    gradient: bool = False  # the forward computes the gradient of the logits too
    inplace: bool = False  # and writes it over them
    differentiates: str | None = None  # "target" or "weight", if a gradient of that is wanted

    op = "cross_entropy"

    @property
    def probabilities(self) -> bool:
        return self.target_dtype.is_floating_point

    @property
    def divides(self) -> bool:
        """Whether the sum of the rows is divided by their weight."""
        return self.reduction == "mean"


@dataclass(frozen=True, slots=True)
class LinearCrossEntropySpec:
    """Cross entropy of hidden · weightᵀ + bias, whose logits are never held all at once."""

    loss: CrossEntropySpec
    chunk_size: int | None = None  # rows of logits held at once; None: as many as the backend finds right
    gradients: tuple[bool, bool, bool] = (False, False, False)  # of hidden, weight, bias: computed by the forward

    op = "linear_cross_entropy"

    @property
    def dtype(self) -> torch.dtype:
        return self.loss.dtype


Spec: TypeAlias = AttentionSpec | NormSpec | SoftmaxSpec | ElementwiseSpec | CrossEntropySpec | LinearCrossEntropySpec
