"""The oracle as a backend: every feature, on every device, holding the whole S_q × S_k matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.attention import attention as _attention
from fastattn.reference.layer_norm import layer_norm as _layer_norm
from fastattn.reference.softmax import softmax as _softmax
from fastattn.spec import AttentionSpec, NormSpec, SoftmaxSpec

NAME = "reference"
COMPOSITE = True


def available(device: torch.device) -> str | None:
    return None


def unsupported(spec: AttentionSpec | NormSpec | SoftmaxSpec, device: torch.device) -> str | None:
    return None


def describe(spec: AttentionSpec | NormSpec | SoftmaxSpec, device: torch.device) -> str:
    return "plain torch operations, unfused"


def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, want_lse: bool = False, **features: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return _attention(q, k, v, spec, **features)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    return _layer_norm(x, x.shape[-spec.n_dims :], weight, bias, spec.eps)


def softmax(x: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    return _softmax(
        x, spec.dim, scale=spec.scale, mask=mask, causal=spec.causal, top_left=spec.top_left, log=spec.log
    )
