"""Which features a kernel is compiled with, and the values they run on.

`Features` is a constexpr: a feature that is off leaves no instruction behind. A new feature adds one flag here, its
value to `Window` or `Score`, and one device function in its own file; the loops of the kernels stay as they are.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from fastattn.spec import AttentionSpec

_MAX_TILE = 256  # rows or columns


@dataclass(frozen=True)
class Features:
    """Constexpr flags of the attention kernels."""

    LEFT: bool = False  # the window is bounded on the left
    RIGHT: bool = False  # the window is bounded on the right; causal is right = 0
    PRESCALED: bool = False  # the score function scales; otherwise the exponential does
    SOFTCAP: bool = False
    BIAS: bool = False
    ALIBI: bool = False
    MASK: bool = False  # a bool mask; tiles are then visited by list
    SINKS: bool = False
    DROPOUT: bool = False
    VARLEN: bool = False  # packed sequences
    FP8: bool = False  # 8-bit q, k and v, with a scale for each head
    WIDE: bool = False  # offsets inside one tile may pass 2^31 elements

    @classmethod
    def of(cls, spec: AttentionSpec, *tensors: Tensor | None) -> "Features":
        """The features of a call on these tensors."""
        return cls(
            LEFT=spec.left is not None,
            RIGHT=spec.right is not None,
            # max(scale · s) is scale · max(s) only for a positive scale, and what is added is not to be scaled
            PRESCALED=spec.scale <= 0.0 or spec.softcap is not None or spec.bias or spec.alibi or spec.fp8,
            SOFTCAP=spec.softcap is not None,
            BIAS=spec.bias,
            ALIBI=spec.alibi,
            MASK=spec.mask,
            SINKS=spec.sinks,
            DROPOUT=spec.dropout_p > 0.0,
            VARLEN=spec.varlen,
            FP8=spec.fp8,
            WIDE=any(_MAX_TILE * max(t.stride()[-2:]) >= 2**31 for t in tensors if t is not None),
        )

    def __str__(self) -> str:
        return ", ".join(name for name, on in vars(self).items() if on) or "none"


class Window(NamedTuple):
    """Row i sees key j iff i + shift - left <= j <= i + shift + right and j < S_k, and the mask, if any, agrees."""

    S_q: tl.tensor
    S_k: tl.tensor
    shift: tl.tensor
    left: tl.tensor
    right: tl.tensor
    mask: tl.tensor  # pointer to entry (0, 0) of a head; of what is absent, 0, since Triton 3.6 cannot return None
    stride_h: tl.tensor
    stride_m: tl.tensor
    stride_n: tl.tensor


class Score(NamedTuple):
    """What turns q kᵀ into the logits of one head."""

    scale: tl.tensor
    softcap: tl.tensor
    slope: tl.tensor
    bias: tl.tensor  # pointer to entry (0, 0)
    stride_m: tl.tensor
    stride_n: tl.tensor


class Scores(NamedTuple):
    """The same of every head of a sequence."""

    scale: tl.tensor
    softcap: tl.tensor
    slopes: tl.tensor  # pointer to that of head 0
    stride_slope: tl.tensor
    bias: tl.tensor  # pointer to entry (0, 0, 0)
    stride_h: tl.tensor
    stride_m: tl.tensor
    stride_n: tl.tensor


class Dropout(NamedTuple):
    """The key of one head's dropout, and its rate."""

    seed: tl.tensor
    b: tl.tensor
    h: tl.tensor
    threshold: tl.tensor  # dropout_p · 2^32
    scale: tl.tensor  # 1 / (1 - dropout_p)
