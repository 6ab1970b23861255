"""Cross entropy of a tile: scores, class, q and gradient. The equations are in `..cross_entropy`."""

import triton
import triton.language as tl

from fastattn.backends.triton.blocks.constants import NEG_INF
from fastattn.backends.triton.blocks.rows import load_rows
from fastattn.backends.triton.blocks.score import tanh

NAN: tl.constexpr = tl.constexpr(float("nan"))


@triton.jit
def load_scores(x, m, n, stride_m, stride_n, N, read, softcap, SOFTCAP: tl.constexpr):
    """s (BLOCK_M, BLOCK_N) of rows to be read; -inf after the last class."""
    s = load_rows(x, m, n, stride_m, stride_n, read[:, None] & (n < N)[None, :])
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    return tl.where((n < N)[None, :], s, NEG_INF)


@triton.jit
def load_class(target, m, stride_m, M, V, ignore_index, PROBABILITIES: tl.constexpr):
    """The class t of each row, -1 where there is none; which rows count; NaN for one whose class is none of V, or 0.

    Rows with probabilities have no class, and all count.
    """
    if PROBABILITIES:
        return tl.full((m.shape[0],), -1, tl.int32), m < M, tl.zeros((m.shape[0],), tl.float32)
    else:
        t = tl.load(target + m * stride_m, mask=m < M, other=0).to(tl.int64)
        counts = (m < M) & (t != ignore_index)
        exists = (t >= 0) & (t < V)
        tl.device_assert(exists | ~counts, "cross_entropy: a target is neither a class nor ignore_index")
        poison = tl.where(exists | ~counts, 0.0, NAN)
        return tl.where(exists & counts, t, -1).to(tl.int32), counts, poison


@triton.jit
def class_in_slice(t, first, N):
    """The class t of each row, counted from `first`, if it is one of the N that begin there; else -1."""
    return tl.where((t >= first) & (t < first + N), t - first, -1)


@triton.jit
def class_weights(weight, n, stride_w, N):
    """w (BLOCK_N,), 0 after the last class."""
    return tl.load(weight + n.to(tl.int64) * stride_w, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def weight_of_class(weight, t, stride_w):
    """w_t of each row, 0 for one without a class."""
    if weight is None:
        return tl.where(t >= 0, 1.0, 0.0)
    else:
        return tl.load(weight + t.to(tl.int64) * stride_w, mask=t >= 0, other=0.0).to(tl.float32)


@triton.jit
def load_q(
    target, weight, m, n, t, w_t, stride_tm, stride_tn, stride_w, N, V, read, smoothing,
    PROBABILITIES: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """q (BLOCK_M, BLOCK_N) of N of V classes, 0 after the last."""
    if PROBABILITIES:
        q = load_rows(target, m, n, stride_tm, stride_tn, read[:, None] & (n < N)[None, :])
        if SMOOTHED:
            q = tl.where((n < N)[None, :], q * (1.0 - smoothing) + smoothing / V, 0.0)
        if weight is not None:
            q *= class_weights(weight, n, stride_w, N)[None, :]
    else:
        q = tl.where(n[None, :] == t[:, None], ((1.0 - smoothing) * w_t)[:, None], 0.0)
        if SMOOTHED:
            if weight is None:
                q += tl.where(n < N, smoothing / V, 0.0)[None, :]
            else:
                q += (smoothing / V * class_weights(weight, n, stride_w, N))[None, :]
    return q


@triton.jit
def sum_beside(q, n, t):
    """Σ_j≠t q_j over a tile: in one sum with the entry of the class, the small ones beside it would be rounded."""
    return tl.sum(tl.where(n[None, :] == t[:, None], 0.0, q), 1)


@triton.jit
def entry_of_class(w_t, V, smoothing, SMOOTHED: tl.constexpr):
    """q_t of each row's class, 0 for one without a class."""
    if SMOOTHED:
        return (1.0 - smoothing) * w_t + smoothing / V * w_t
    return w_t


@triton.jit
def score_of_class(x, m, t, stride_m, stride_n, softcap, SOFTCAP: tl.constexpr):
    """s_t of each row's class, 0 for one without a class."""
    s = tl.load(x + m * stride_m + t.to(tl.int64) * stride_n, mask=t >= 0, other=0.0).to(tl.float32)
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    return s


@triton.jit
def loss_beside(q, log_p, n, t, N):
    """-Σ_j≠t q_j log p_j over a tile."""
    return -tl.sum(tl.where((n < N)[None, :] & (n[None, :] != t[:, None]), q * log_p, 0.0), 1)


@triton.jit
def score_gradient(s, e, q, share, pull, factor, softcap, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr):
    """dx = (share · e - q + pull · e) · ds / dx · factor, with e = exp(s - max), of sum Σ e:

    share = Σ q / Σ e and pull = 2 z_loss lse / Σ e.
    """
    dx = share[:, None] * e - q
    if Z_LOSS:  # apart from share: where p is close to q the difference of those two is small
        dx += pull[:, None] * e
    dx *= factor[:, None]
    if SOFTCAP:
        ratio = s / softcap
        dx *= 1.0 - ratio * ratio
    return dx
