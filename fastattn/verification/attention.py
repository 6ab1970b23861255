"""Checks of attention: each option by itself, at sizes that no tile divides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.verification.check import Check, Tensors

B, H, S, D = 1, 4, 77, 48
BOUNDS = (0, 33, 33, 34, 77)  # of packed sequences: one of them empty, one a single token
HIDDEN_KEYS = 7


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * D**-0.5


def attention(
    name: str,
    change: Callable[..., Tensor] = lambda s: s,
    more: Mapping[str, tuple[int, ...]] | None = None,
    **options: Any,
) -> Check:
    """`change(s, …)` is what `options`, and the inputs and constants beyond q, k and v, do to the scaled scores."""

    def theirs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **given: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        s = change(scores(q, k), **given)
        if sinks is not None:
            s = torch.cat((s, sinks[:, None, None].expand(*s.shape[:3], 1)), -1)
        nothing = (s == -torch.inf).all(-1, keepdim=True)  # a row that sees no key gives 0
        p = s.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
        return p[..., : k.shape[2]] @ v

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str, **given: Any) -> Tensor:
        return fastattn.attention(q, k, v, **given, **options, backend=backend)

    shapes = dict.fromkeys("qkv", (B, H, S, D)) | dict(more or {})
    return Check(f"attention, {name}", theirs, ours, shapes)


def distance(s: Tensor) -> Tensor:
    """i - j."""
    i, j = (torch.arange(n, device=s.device) for n in s.shape[-2:])
    return i[:, None] - j[None, :]


def causal(s: Tensor) -> Tensor:
    return s.masked_fill(distance(s) < 0, -torch.inf)


def window(s: Tensor) -> Tensor:
    return s.masked_fill((distance(s) < -3) | (distance(s) > 20), -torch.inf)


def alibi(s: Tensor, alibi_slopes: Tensor) -> Tensor:
    return s - (alibi_slopes[:, None, None] * distance(s).abs()).to(s.dtype)


def slopes(device: torch.device) -> Tensors:
    return {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)}


def masked(s: Tensor, mask: Tensor) -> Tensor:
    return s.masked_fill(~mask, -torch.inf)


def some_mask(device: torch.device) -> Tensors:
    """Row 5 sees nothing, and nobody sees the last keys."""
    mask = (torch.rand(S, S, generator=torch.Generator().manual_seed(2)) > 0.3).to(device)
    mask[5] = False
    mask[:, -HIDDEN_KEYS:] = False
    return {"mask": mask}


def attention_checks() -> Iterator[Check]:
    yield attention("plain")
    yield attention("causal", causal, causal=True)
    yield attention("grouped heads", causal, {"k": (B, 2, S, D), "v": (B, 2, S, D)}, causal=True)
    yield attention("window", window, window=(20, 3))
    yield attention("other width of v", more={"v": (B, H, S, 80)})
    yield attention("softcap", lambda s: 2.0 * torch.tanh(s / 2.0), softcap=2.0)
    yield attention("bias", lambda s, bias: s + bias, {"bias": (1, H, S, S)})
    yield attention("sinks", more={"sinks": (H,)})
    yield replace(attention("alibi", alibi), constants=slopes)
    last = (slice(None), slice(None), slice(-HIDDEN_KEYS, None))
    yield replace(attention("mask, NaN behind it", masked), constants=some_mask, hidden={"k": last, "v": last})
    yield Check("varlen_attention", packed, ours_packed, dict.fromkeys("qkv", (BOUNDS[-1], H, D)))


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of each sequence of (T, H, D) tensors."""
    results = []
    for begin, end in pairwise(BOUNDS):
        a, b, c = (t[begin:end].transpose(0, 1) for t in (q, k, v))  # (H, length, D)
        results.append((causal(scores(a, b)).softmax(-1) @ c).transpose(0, 1))
    return torch.cat(results)


def ours_packed(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32, device=q.device)
    longest = max(end - begin for begin, end in pairwise(BOUNDS))
    return fastattn.varlen_attention(*(q, k, v, cu_seqlens, cu_seqlens, longest, longest), causal=True, backend=backend)
