"""Tells whether tensors are plain data that a kernel may read now. Imports nothing of ours."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_DEVICES = ("CPU", "CUDA", "XPU", "HPU", "MPS", "MTIA", "PrivateUse1")
_ORDINARY_KEYS = {
    "ADInplaceOrView",
    *(f"{kind}{device}" for kind in ("", "Autograd", "Autocast") for device in _DEVICES),
}
_ordinary: dict[int, bool] = {}  # by the bits of a set of dispatch keys


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """True if nothing watches, and each tensor is an ordinary dense one.

    A compiler, a functorch transform, forward-mode AD, a dispatch mode or torch.jit.trace watches. What is ordinary is
    listed, not what is not: a tensor with any other dispatch key (a subclass, nested, sparse, meta, fake, batched by
    autograd's is_grads_batched, a view whose sign is still to be changed, a tensor of zeros without memory) is none.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN_TYPES or not _is_ordinary(t)):
            return False
    return True


def _is_ordinary(t: torch.Tensor) -> bool:
    keys = torch._C._dispatch_keys(t)
    bits = keys.raw_repr()
    if (known := _ordinary.get(bits)) is None:
        names = str(keys).removeprefix("DispatchKeySet(").removesuffix(")").split(", ")
        known = _ordinary[bits] = set(names) <= _ORDINARY_KEYS
    return known


def without_memory(t: torch.Tensor) -> bool:
    """True if a plain tensor has elements and no memory that holds them, as a parameter between two uses of FSDP."""
    return t.data_ptr() == 0 and t.numel() > 0
