"""The custom ops fastattn::<name> and fastattn::<name>_backward, for compilers, dispatch modes and tensor subclasses.

Where a derivative may be asked for they are the operator's autograd.Functions, which call them again below autograd.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn.ops.differentiate import Tensors, no_autocast
from fastattn.tracing import is_plain

if TYPE_CHECKING:
    from fastattn.ops.define import Operator

_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")
_FLOP_FORMULAS: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}


def offer_flop_formulas() -> None:
    """Tell torch.utils.flop_counter what the ops count for, if the program has loaded it; to do so takes 0.2 s.

    A counter that is already at work has copied the formulas that torch knew when it was made.
    """
    if torch.compiler.is_compiling() or "torch.utils.flop_counter" not in sys.modules:
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from torch.utils.flop_counter import flop_registry

    counters = (getattr(mode, "counter", None) for mode in _get_current_dispatch_mode_stack())
    for registry in (flop_registry, *(getattr(counter, "flop_registry", {}) for counter in counters)):
        for packet, formula in _FLOP_FORMULAS.items():
            registry.setdefault(packet, formula)


def as_tuple(result: Any) -> Tensors:
    return (result,) if isinstance(result, Tensor) else result


def _as_result(outputs: tuple) -> Any:
    """A custom op with one output returns the tensor itself."""
    return outputs[0] if len(outputs) == 1 else outputs


def forward_op(op: Operator) -> torch._ops.OpOverload:
    """(*inputs, *scalars, backend) -> outputs."""
    d, n = op.definition, len(op.definition.inputs)
    tensors = ", ".join(f"Tensor{'?' if name.endswith('?') else ''} {name.rstrip('?')}" for name in d.inputs)
    schema = f"({tensors}, {d.scalars}, str backend) -> ({', '.join(['Tensor'] * len(d.outputs))})"

    def parse(args):
        inputs, (*values, backend) = args[:n], args[n:]
        return inputs, d.decode(dict(zip(op.input_names, inputs, strict=True)), *values), backend

    def kernel(*args):
        inputs, spec, backend = parse(args)
        with no_autocast(inputs):
            return _as_result(op.run(inputs, spec, backend))

    def fake(*args):
        inputs, spec, _ = parse(args)
        return _as_result(d.allocate(inputs, spec))

    def differentiable(*args):
        inputs, spec, backend = parse(args)
        return _as_result(op.function.apply(*inputs, spec, backend))

    def vmap(info, in_dims, *args):
        def call(*inputs):
            return as_tuple(op.custom_op(*inputs, *args[n:]))

        outputs, dims = op.map(info.batch_size, in_dims[:n], call, args[:n])
        return _as_result(outputs), _as_result(dims)

    registered = _register(d.name, schema, n, kernel, fake, differentiable, vmap)
    if count := d.flops:

        def flops(*args, out_val=None, **kwargs):
            inputs, spec, _ = parse(args)
            return count(dict(zip(op.input_names, inputs, strict=True)), spec)

        _FLOP_FORMULAS[registered.overloadpacket] = flops
    return registered


def backward_op(op: Operator) -> torch._ops.OpOverload:
    """(*grads, *saved, wanted, *scalars, backend) -> the gradient of each input, empty where it is not wanted."""
    d, n_grads = op.definition, len(op.definition.outputs)
    n = n_grads + len(d.saved)
    tensors = ", ".join(f"Tensor? {name}" for name in (*(f"grad_{o}" for o in d.outputs), *d.saved))
    schema = f"({tensors}, bool[] wanted, {d.scalars}, str backend) -> ({', '.join(['Tensor'] * len(d.inputs))})"

    def parse(args):
        saved, (wanted, *values, backend) = args[n_grads:n], args[n:]
        return saved, tuple(wanted), d.decode(dict(zip(d.saved, saved, strict=True)), *values), backend

    def kernel(*args):
        saved, wanted, spec, backend = parse(args)
        with no_autocast(saved):
            return op.placeholders(op.run_backward(args[:n_grads], saved, wanted, spec, backend), saved)

    def fake(*args):
        saved, wanted, spec, _ = parse(args)
        return op.placeholders(d.allocate_grads(dict(zip(d.saved, saved, strict=True)), wanted, spec), saved)

    def differentiable(*args):
        _, *rest = parse(args)
        return op.backward_function.apply(*args[:n], *rest)

    def vmap(info, in_dims, *args):
        def call(*tensors):
            return op.custom_backward(*tensors, *args[n:])

        return op.map(info.batch_size, in_dims[:n], call, args[:n])

    registered = _register(f"{d.name}_backward", schema, n, kernel, fake, differentiable, vmap)
    if count := d.backward_flops:

        def flops(*args, out_val=None, **kwargs):
            saved, wanted, spec, _ = parse(args)
            return count(dict(zip(d.saved, saved, strict=True)), wanted, spec)

        _FLOP_FORMULAS[registered.overloadpacket] = flops
    return registered


def _register(
    name: str, schema: str, n_tensors: int, kernel: Callable, fake: Callable, differentiable: Callable, vmap: Callable
) -> torch._ops.OpOverload:
    qualified = f"fastattn::{name}"
    torch.library.define(qualified, schema, lib=_LIBRARY, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.fastattn, name).default

    @torch._disable_dynamo
    def autograd(keyset, *args):
        tensors = args[:n_tensors]
        if not _differentiated(tensors):
            if is_plain(*tensors):  # nothing is left below but the kernel: the way through the dispatcher takes 8 µs
                return kernel(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{qualified}: torch.func differentiates fastattn's functions, not its custom ops."
            )
        return differentiable(*args)

    torch.library.register_kernel(qualified, None, kernel, lib=_LIBRARY)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_vmap(qualified, vmap, lib=_LIBRARY)
    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return op


def _differentiated(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient may be asked for, or one of these has a tangent."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    forward = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
    return forward and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
