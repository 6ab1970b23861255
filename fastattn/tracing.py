"""Tells whether tensors are plain data that a kernel may read now. Imports nothing of ours."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_DEVICES = ("CPU", "CUDA", "XPU", "HPU", "MPS", "MTIA", "PrivateUse1")
_ORDINARY_KEYS = {"ADInplaceOrView"} | {f"{key}{device}" for key in ("", "Autograd", "Autocast") for device in _DEVICES}


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """True if nothing watches, and each tensor is an ordinary dense one.

    A compiler, a functorch transform, forward-mode AD, a dispatch mode or torch.jit.trace watches. An ordinary tensor
    is no subclass, has memory to point to, or no elements, and that memory holds its numbers as they are. A tensor that
    is_grads_batched batches, a nested, sparse, meta or fake one, a tensor of zeros without memory and a view whose sign
    is still to be changed are none.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    try:
        for t in tensors:
            if t is not None:
                if type(t) not in _PLAIN_TYPES or t.is_neg() or t.is_nested:
                    return False
                if not t.data_ptr() and not _is_ordinary(t):
                    return False
    except RuntimeError:  # of data_ptr, where there is nothing that it could return
        return False
    return True


def _is_ordinary(t: torch.Tensor) -> bool:
    """True if torch dispatches the tensor by its device alone; this takes longer than to look at its address."""
    names = str(torch._C._dispatch_keys(t)).removeprefix("DispatchKeySet(").removesuffix(")").split(", ")
    return set(names) <= _ORDINARY_KEYS


def without_memory(t: torch.Tensor) -> bool:
    """True if a plain tensor has elements and no memory that holds them, as a parameter between two uses of FSDP."""
    return t.data_ptr() == 0 and t.numel() > 0


def without_numbers(t: torch.Tensor) -> bool:
    """True if the tensor has a shape and no numbers, as on the meta device and while a program is traced."""
    return t.is_meta or isinstance(t, torch._subclasses.FakeTensor) or torch._is_functional_tensor(t)


def known_true(condition: bool | torch.SymBool) -> bool:
    """True if the condition holds for certain; a compiler does not guard on a size that it leaves open."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def may_be_true(condition: bool | torch.SymBool) -> bool:
    """True if the condition holds, or depends on data that a compiler does not have."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(condition)


def compiled_under_a_derivative() -> bool:
    """True while torch.compile traces a call inside torch.func's grad, vjp or jvp."""
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active() and _differentiated()


def _differentiated() -> bool:
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    derivatives = (TransformType.Grad, TransformType.Jvp)
    return any(interpreter.key() in derivatives for interpreter in retrieve_all_functorch_interpreters())


# As torch.compiler.assume_constant_result marks a function that a compiler calls and does not trace; that imports it.
_differentiated._dynamo_marked_constant = True  # type: ignore[attr-defined]
