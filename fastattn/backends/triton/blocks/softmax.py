"""The online softmax; every case of a maximum of -inf is handled here."""

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.constants import INF, LN_2, LOG2_E, NEG_INF
from fastattn.backends.triton.blocks.tile import scaled


@triton.jit
def finite_max(row_max):
    """The maximum of each row so far; 0 as long as nothing but -inf has come by."""
    return tl.where(row_max == NEG_INF, 0.0, row_max)


@triton.jit
def online_sum(row_max, row_sum, s):
    """The maximum of each row so far, and Σ exp(s - maximum), with one more tile of s."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    offset = finite_max(new_max)
    return new_max, row_sum * tl.exp(row_max - offset) + tl.sum(tl.exp(s - offset[:, None]), 1)


@triton.jit
def online_softmax(s, row_max, row_sum, factor):
    """One more tile of logits: -> (p, rescale, row_max, row_sum).

    p = exp2(factor · (s - row_max)) (M, N), not yet normalised; what was summed before must be multiplied by rescale.
    A row that has seen nothing yet keeps row_max = -inf, and subtracts 0 instead.
    """
    new_max = tl.maximum(row_max, tl.max(s, 1))
    offset = finite_max(new_max) * factor
    rescale = tl.exp2(row_max * factor - offset)
    p = tl.exp2(s * factor - offset[:, None])
    return p, rescale, new_max, row_sum * rescale + tl.sum(p, 1)


@triton.jit
def add_sink(acc, row_max, row_sum, sink):
    """One more logit, without a value, to sums whose logits are in base 2; so is the sink."""
    new_max = tl.maximum(row_max, sink)
    offset = finite_max(new_max)
    rescale = tl.exp2(row_max - offset)
    return scaled(acc, rescale[:, None]), new_max, row_sum * rescale + tl.exp2(sink - offset)


@triton.jit
def load_sink(SINKS, stride_sink_h, h, b, B, F: tl.constexpr):
    """The sink of head h, in base 2; rows after the last of B packed sequences have none."""
    if F.SINKS:
        return tl.where(b < B, tl.load(SINKS + h * stride_sink_h).to(tl.float32) * LOG2_E, NEG_INF)
    else:
        return NEG_INF


@triton.jit
def finish_softmax(acc, row_max, row_sum, factor, sink, F: tl.constexpr):
    """-> (o, lse): o = acc / row_sum, lse = log Σ exp; a row that saw nothing has o = 0 and lse = -inf."""
    row_max = row_max * factor
    if F.SINKS:
        acc, row_max, row_sum = add_sink(acc, row_max, row_sum, sink)
    empty = row_sum == 0.0
    safe_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, NEG_INF, (row_max + tl.log2(safe_sum)) * LN_2)
    o = ()
    for i in tl.static_range(len(acc)):
        o = o + (acc[i] / safe_sum[:, None],)
    return o, lse


@triton.jit
def load_lse(LSE, m, S_q):
    """lse of rows m in base 2; +inf for a row that saw nothing or lies beyond S_q, so that its p below is 0."""
    lse = tl.load(LSE + m, mask=m < S_q, other=NEG_INF)
    return tl.where(lse == NEG_INF, INF, lse * LOG2_E)


@triton.jit
def probability(s, lse, factor):
    """p = exp(logit - lse), from logits s and the lse of `load_lse`, which broadcast."""
    return tl.exp2(s * factor - lse)
