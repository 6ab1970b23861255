"""The oracle as a backend: every feature, on every device, holding the whole S_q × S_k matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.reference.attention import attention as _attention
from fastattn.reference.layer_norm import layer_norm as _layer_norm
from fastattn.reference.softmax import softmax as _softmax
from fastattn.reference.softmax import softmax_gradient as _softmax_gradient
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    return_lse: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    call: dict[str, Any] = {"bias": bias, "mask": mask, "alibi_slopes": alibi_slopes, "sinks": sinks, "seed": seed}
    if not torch._C._is_any_autocast_enabled():
        return _attention(q, k, v, spec, **call)
    with torch.autocast(q.device.type, enabled=False):
        return _attention(q, k, v, spec, **call)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    return _layer_norm(x, x.shape[-spec.n_dims :], weight, bias, spec.eps)


def softmax(x: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    return _softmax(x, spec.dim, scale=spec.scale, mask=mask, causal=spec.causal, top_left=spec.top_left, log=spec.log)


def softmax_gradient(dy: Tensor, y: Tensor, mask: Tensor | None, spec: SoftmaxSpec) -> Tensor:
    return _softmax_gradient(
        dy, y, mask, spec.dim, scale=spec.scale, causal=spec.causal, top_left=spec.top_left, log=spec.log
    )
