"""The tangents of attention's o and lse, in torch operations on a few rows of scores at a time.

    ts = f'(a) ∘ scale (tq kᵀ + q tkᵀ) + tbias - tslope · distance        p = softmax(s, sink)
    tlse = rowsum(p ∘ ts) + p_sink tsink        tp = p ∘ (ts - tlse)        to = dropout(tp) v + dropout(p) tv

Memory is linear in S. Shapes as in the forward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.reference.dropout import philox
from fastattn.spec import AttentionInputs, AttentionSpec

_ROWS = 128  # of scores held at once, in every head


def attention_tangents(
    to: Tensor,
    tlse: Tensor,
    t: AttentionInputs,
    x: AttentionInputs,
    o: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    spec: AttentionSpec,
) -> None:
    """Fill to and tlse from the tangents of the inputs; None: 0."""
    to.zero_()
    tlse.zero_()
    for b in range(x.B):
        if x.cu_seqlens_q is None or x.cu_seqlens_k is None:
            at, rows, keys = b, slice(None), slice(None)
        else:
            bounds = x.cu_seqlens_q[b : b + 2].tolist(), x.cu_seqlens_k[b : b + 2].tolist()
            at, rows, keys = 0, slice(*bounds[0]), slice(*bounds[1])
        sequence = _Sequence(b, x, t, spec, at, rows, keys)
        to_b, tlse_b = to[at, :, rows], tlse[at, :, rows]
        for first in range(0, to_b.shape[1], _ROWS):
            part = slice(first, first + _ROWS)
            to_part, tlse_b[:, part] = sequence.tangents(part)
            to_b[:, part] = to_part.to(to.dtype)


class _Sequence:
    """One sequence: q (H, S_q, D), k (H, S_k, D), v (H, S_k, D_v) in fp32, and what acts on their scores."""

    def __init__(
        self, b: int, x: AttentionInputs, t: AttentionInputs, spec: AttentionSpec, at: int, rows: slice, keys: slice
    ):
        def wide(tensor: Tensor | None, part: slice) -> Tensor | None:
            if tensor is None:
                return None
            heads = tensor[at, :, part].float()
            return heads if heads.shape[0] == spec.H else heads.repeat_interleave(spec.G, dim=0)

        self.b, self.x, self.t, self.spec = b, x, t, spec
        self.q, self.k, self.v = wide(x.q, rows), wide(x.k, keys), wide(x.v, keys)
        self.tq, self.tk, self.tv = wide(t.q, rows), wide(t.k, keys), wide(t.v, keys)

    def tangents(self, part: slice) -> tuple[Tensor, Tensor]:
        """to (H, M, D_v) and tlse (H, M) of some rows."""
        q, k, v, x, t, spec = self.q, self.k, self.v, self.x, self.t, self.spec
        assert q is not None
        assert k is not None
        assert v is not None
        S_q, S_k = q.shape[1], k.shape[1]
        q = q[:, part]
        i = torch.arange(S_q)[part, None]  # (M, 1)
        j = torch.arange(S_k)
        s = q @ k.mT * spec.scale
        ts = torch.zeros_like(s)
        if self.tq is not None:
            ts += self.tq[:, part] @ k.mT * spec.scale
        if self.tk is not None:
            ts += q @ self.tk.mT * spec.scale
        if spec.softcap is not None:
            u = torch.tanh(s / spec.softcap)
            s, ts = spec.softcap * u, ts * (1.0 - u * u)
        for score, tensor in ((s, x.bias), (ts, t.bias)):
            if tensor is not None:
                score += self._cut(tensor, part, S_q, S_k).float()
        distance = (i + S_k - S_q - j).abs().float()
        for score, slopes in ((s, x.alibi_slopes), (ts, t.alibi_slopes)):
            if slopes is not None:
                score -= (slopes[self.b] if slopes.dim() == 2 else slopes).float()[:, None, None] * distance

        keep = self._visible(i, j, part, S_q, S_k)
        if keep is not None:
            s, ts = torch.where(keep, s, -math.inf), torch.where(keep, ts, 0.0)
        p, p_sink = self._probabilities(s)
        tlse = torch.where(p == 0.0, 0.0, p * ts).sum(-1, keepdim=True)
        if p_sink is not None and t.sinks is not None:
            tlse = tlse + torch.where(p_sink == 0.0, 0.0, p_sink * t.sinks.float()[:, None, None])
        tp = torch.where(p == 0.0, 0.0, p * (ts - tlse))
        if spec.dropout_p > 0.0:
            factor = self._dropout(i, j)
            p, tp = p * factor, tp * factor
        to = _weighted(tp, v, keep)
        if self.tv is not None:
            to = to + _weighted(p, self.tv, keep)
        return to, tlse[..., 0]

    def _probabilities(self, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """p (H, M, S_k) and that of the sink (H, M, 1). Divided by their own sum, not by the lse, whose rounding would
        leave something of ts - tlse where all of it cancels."""
        sinks = self.x.sinks
        if sinks is not None:
            s = torch.cat((s, sinks.float()[:, None, None].expand(*s.shape[:2], 1)), -1)
        if s.shape[-1] == 0:
            return s, None
        top = s.amax(-1, keepdim=True)
        p = torch.exp(s - torch.where(top == -math.inf, 0.0, top))
        total = p.sum(-1, keepdim=True)
        p = p / torch.where(total == 0.0, 1.0, total)
        return (p, None) if sinks is None else (p[..., :-1], p[..., -1:])

    def _cut(self, tensor: Tensor, part: slice, S_q: int, S_k: int) -> Tensor:
        """Of a bias or mask (B | 1, H | 1, S_q | 1, S_k | 1), what these rows read: (H | 1, M | 1, S_k | 1)."""
        entries = tensor[self.b if tensor.shape[0] > 1 else 0]
        entries = entries[:, :S_q][:, part] if entries.shape[1] > 1 else entries
        return entries[..., :S_k] if entries.shape[2] > 1 else entries

    def _visible(self, i: Tensor, j: Tensor, part: slice, S_q: int, S_k: int) -> Tensor | None:
        """(H | 1, M, S_k), True where a row sees a key; None: everywhere."""
        spec = self.spec
        if not spec.windowed and self.x.mask is None:
            return None
        diagonal = i + spec.shift(S_q, S_k)
        keep = torch.ones(1, len(i), S_k, dtype=torch.bool)
        if spec.left is not None:
            keep = keep & (j >= diagonal - spec.left)
        if spec.right is not None:
            keep = keep & (j <= diagonal + spec.right)
        return keep if self.x.mask is None else keep & self._cut(self.x.mask, part, S_q, S_k)

    def _dropout(self, i: Tensor, j: Tensor) -> Tensor:
        p, seed = self.spec.dropout_p, self.x.seed
        assert seed is not None
        h = torch.arange(self.spec.H)[:, None, None]
        word = philox(seed, j, i, h, torch.tensor(self.b))[0]
        return torch.where(word >= int(p * 2**32), 0.0 if p == 1.0 else 1.0 / (1.0 - p), 0.0)


def _weighted(p: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    """p v; an inf or NaN in v reaches the rows that see its key, no others."""
    finite = v.isfinite()
    if keep is None or finite.all():
        return p @ v
    seen = keep.float() @ (~finite).float()
    return torch.where(seen > 0.0, math.nan, p @ torch.where(finite, v, 0.0))
