"""Kernels in C++ for CPU tensors (csrc/cpu), for every instruction set, chosen when they run.

The native module is loaded with the first kernel that runs, not with fastattn.
"""

from __future__ import annotations

import torch

from fastattn.backends.cpu import attention, attention_jvp, loss, module, routing, rows
from fastattn.spec import Spec, Work

NAME = "cpu"
COMPOSITE = False

attention_forward, attention_backward = attention.attention_forward, attention.attention_backward
attention_tangents = attention_jvp.attention_tangents
norm_forward, norm_backward = rows.norm_forward, rows.norm_backward
softmax_forward, softmax_backward = rows.softmax_forward, rows.softmax_backward
gated_forward, gated_backward = rows.gated_forward, rows.gated_backward
rotary_embedding = rows.rotary_embedding
dropout_add_forward, dropout_add_backward = rows.dropout_add_forward, rows.dropout_add_backward
cross_entropy_forward, cross_entropy_backward = loss.cross_entropy_forward, loss.cross_entropy_backward
cross_entropy_scale = loss.cross_entropy_scale
linear_cross_entropy_forward = loss.linear_cross_entropy_forward
linear_cross_entropy_backward = loss.linear_cross_entropy_backward
linear_cross_entropy_scale = loss.linear_cross_entropy_scale


def available(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"its kernels are for CPU tensors, not for device {device.type!r}"
    return module.why_not()


available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(spec: Spec, device: torch.device) -> str | None:
    if spec.dtype not in module.DTYPES:
        return module.other_dtype(spec.dtype)
    return rows.unsupported(spec)


def only_on_request(spec: Spec, device: torch.device, work: Work | None) -> str | None:
    return routing.faster_in_torch(spec, work)


def describe(spec: Spec, device: torch.device) -> str:
    return f"{module.load().isa()}, {module.threads()} threads"
