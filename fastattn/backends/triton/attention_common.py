"""From a spec to the run-time arguments that the attention kernels share."""

from __future__ import annotations

from torch import Tensor

from fastattn.spec import AttentionSpec


def window_arguments(spec: AttentionSpec, S_q: int, S_k: int) -> tuple[int, int, int]:
    """-> (shift, left, right); an unbounded side is 0 and never read, a far one is cut to what 32 bits hold."""
    farthest = S_q + S_k
    left, right = (0 if side is None else min(side, farthest) for side in (spec.left, spec.right))
    return spec.shift(S_q, S_k), left, right


def dropout_arguments(spec: AttentionSpec) -> tuple[int, float]:
    """-> (threshold, scale): a probability is kept where a 32-bit word is at least threshold, and then scaled."""
    return int(spec.dropout_p * 2**32), 0.0 if spec.dropout_p == 1.0 else 1.0 / (1.0 - spec.dropout_p)


def strides(t: Tensor | None, n: int = 4) -> tuple[int, ...]:
    """Strides of an optional tensor; zeros for one that is absent."""
    return (0,) * n if t is None else t.stride()
