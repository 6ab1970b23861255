"""The attention forward of csrc/cuda/sm90: from tensors and spec to addresses, strides and sizes."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastattn.backends.cuda.module import load, stream_of
from fastattn.spec import AttentionInputs, AttentionSpec

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_ALIGNMENT = 16  # bytes, of what TMA moves


def attention_forward(o: Tensor, lse: Tensor, lse_low: Tensor, x: AttentionInputs, spec: AttentionSpec) -> None:
    if x.B == 0:  # packed rows may be there even so, and see nothing
        o.zero_()
        lse.fill_(-math.inf)
        lse_low.zero_()
        return
    q, k, v = (movable(t) for t in (x.q, x.k, x.v))
    cu = {name: t.data_ptr() for name in ("cu_seqlens_q", "cu_seqlens_k") if (t := getattr(x, name)) is not None}
    sides = {name: side for name in ("left", "right") if (side := getattr(spec, name)) is not None}
    stream = stream_of(q)
    counter = _counter(q.device, stream)  # in a name, as it has to outlive the launch
    with torch.cuda.device_of(q):
        load(q.device).attention_forward(
            q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), o=o.data_ptr(), lse=lse.data_ptr(),
            lse_low=lse_low.data_ptr(), q_strides=q.stride()[:3], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
            o_strides=o.stride()[:3],
            B=x.B, H=spec.H, H_kv=spec.H_kv, S_q=q.shape[2], S_k=k.shape[2], D=spec.D, D_v=spec.D_v,
            dtype=_DTYPES[spec.dtype], scale=spec.scale, softcap=spec.softcap or 0.0, **sides,
            bottom_right=not spec.top_left, **cu, counter=counter.data_ptr(), stream=stream,
        )  # fmt: skip


def movable(t: Tensor) -> Tensor:
    """The tensor itself where TMA can read it as it lies, else a contiguous copy."""
    apart = _ALIGNMENT // t.element_size()
    fits = t.data_ptr() % _ALIGNMENT == 0 and (t.stride(-1) == 1 or t.shape[-1] == 1)
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        fits = fits and (size <= 1 or (stride > 0 and stride % apart == 0))
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def _counter(device: torch.device, stream: int) -> Tensor:
    """Two zeros, from which CTAs claim tiles, and which the last one leaves as zeros.

    One launch at a time may use them: those of one stream follow one another, and a graph, which may be replayed beside
    anything, gets its own.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    return _counter_of(device, stream)


@functools.cache
def _counter_of(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)
