"""The online softmax; every case of a maximum of -inf is handled here."""

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.constants import INF, LOG2_E, NEG_INF
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
def online_softmax(s, row_max, row_sum, scale):
    """One more tile of logits scale · s: -> (p, rescale, row_max, row_sum).

    p = exp(scale · (s - row_max)) (M, N), not yet normalised; what was summed before must be multiplied by rescale.
    A row that has seen nothing yet keeps row_max = -inf, and subtracts 0 instead.
    """
    factor = scale * LOG2_E
    new_max = tl.maximum(row_max, tl.max(s, 1))
    offset = finite_max(new_max)
    rescale = tl.exp2((row_max - offset) * factor)
    p = tl.exp2((s - offset[:, None]) * factor)
    return p, rescale, new_max, row_sum * rescale + tl.sum(p, 1)


@triton.jit
def add_sink(acc, row_max, row_sum, scale, sink):
    """One more logit, without a value, to sums whose logits are scale · s; the maximum that is returned is a logit."""
    new_max = tl.maximum(row_max * scale, sink)
    offset = finite_max(new_max)
    rescale = tl.exp2(tl.fma(row_max, scale, -offset) * LOG2_E)
    return scaled(acc, rescale[:, None]), new_max, row_sum * rescale + tl.exp2((sink - offset) * LOG2_E)


@triton.jit
def load_sink(SINKS, stride_sink_h, h, b, B, F: tl.constexpr):
    """The sink of head h; rows after the last of B packed sequences have none."""
    if F.SINKS:
        return tl.where(b < B, tl.load(SINKS + h * stride_sink_h).to(tl.float32), NEG_INF)
    else:
        return NEG_INF


@triton.jit
def rounded_off(a, b, total):
    """a + b - total, where total = a + b was rounded. Source: Knuth, TAOCP 4.2.2, theorem B."""
    second = total - a
    return (a - (total - second)) + (b - second)


@triton.jit
def finish_softmax(acc, row_max, row_sum, scale, sink, F: tl.constexpr):
    """-> (o, lse, lse_low): o = acc / row_sum, lse + lse_low = log Σ exp, lse_low being what fp32 rounds off lse.

    A row that saw nothing has o = 0, lse = -inf and lse_low = 0.
    """
    if F.SINKS:
        acc, row_max, row_sum = add_sink(acc, row_max, row_sum, scale, sink)
        scale = 1.0
    empty = row_sum == 0.0
    safe_sum = tl.where(empty, 1.0, row_sum)
    highest = row_max * scale
    log_sum = tl.log(safe_sum)
    lse = highest + log_sum
    lse_low = rounded_off(highest, log_sum, lse) + tl.fma(row_max, scale, -highest)
    o = ()
    for i in tl.static_range(len(acc)):
        o = o + (acc[i] / safe_sum[:, None],)
    return o, tl.where(empty, NEG_INF, lse), tl.where(empty, 0.0, lse_low)


@triton.jit
def load_lse(LSE, LSE_LOW, m, S_q):
    """-> (lse, lse_low) of rows m, lse = +inf for a row that saw nothing or lies beyond S_q, so that its p is 0."""
    lse = tl.load(LSE + m, mask=m < S_q, other=NEG_INF)
    return tl.where(lse == NEG_INF, INF, lse), tl.load(LSE_LOW + m, mask=m < S_q, other=0.0)


@triton.jit
def probability(s, lse, lse_low, scale):
    """p = exp(scale · s - lse - lse_low); the rows' statistics broadcast to s."""
    return tl.exp2(tl.fma(tl.fma(s, scale, -lse), LOG2_E, -lse_low * LOG2_E))
