"""Whether tensors are plain data that a kernel may read now. Imports nothing of ours."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """True in ordinary eager mode: no compiler, no functorch transform, no forward-mode AD, no dispatch mode,
    no tensor subclass that something else has to see through, and no view whose sign is still to be changed."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN_TYPES or t.is_neg()):
            return False
    return True
