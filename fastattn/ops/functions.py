"""The autograd.Functions of an operator: the eager one, and two that torch.func and forward-mode AD can transform."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastattn.ops.differentiate import Tensors, jvp, vjp
from fastattn.tracing import is_plain

if TYPE_CHECKING:
    from fastattn.ops.define import Operator

Function = type[torch.autograd.Function]


def eager_function(op: Operator) -> Function:
    """(*inputs, spec, backend) -> outputs, for plain tensors: the classic form, the cheapest to call."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            inputs, (ctx.spec, ctx.backend) = args[:-2], args[-2:]
            outputs = op.run(inputs, ctx.spec, ctx.backend)
            if overwritten := in_place(inputs, outputs):
                ctx.mark_dirty(*overwritten)
            # What a hook has been given to keep is not ours to write over.
            ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            ctx.save_for_backward(*op.saved(inputs, outputs, ctx.spec))
            ctx.set_materialize_grads(False)
            if fixed := op.fixed_outputs(ctx.spec):
                ctx.mark_non_differentiable(*(outputs[i] for i in fixed))
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            if _all_zero(grads):
                return (None,) * len(ctx.needs_input_grad)
            saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[:-2]
            if torch.is_grad_enabled() or not is_plain(*grads):
                return *op.call_backward(grads, saved, wanted, ctx.spec, ctx.backend), None, None
            last = not (ctx.hooked or torch._C._autograd._get_current_graph_task_keep_graph())
            return *op.run_backward_once(grads, saved, wanted, ctx.spec, ctx.backend, last), None, None

    return _named(op.definition.function_name, Eager)


def _named(name: str, function: Function) -> Function:
    """The function under a name that a profiler shows, of its backward too, which torch names when a class is made."""
    return cast("Function", type(name, (function,), {}))


def transformable_function(op: Operator) -> Function:
    """(*inputs, spec, backend) -> outputs, under any transform."""

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            *inputs, spec, backend = args
            if is_plain(*inputs):
                return op.run(tuple(inputs), spec, backend)
            return op.call_custom(inputs, spec, backend)

        @staticmethod
        def setup_context(ctx, inputs, output):
            *tensors, ctx.spec, ctx.backend = inputs
            ctx.save_for_backward(*op.saved(tuple(tensors), output, ctx.spec))
            ctx.save_for_forward(*tensors, *output)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(output[i] for i in op.fixed_outputs(ctx.spec)))

        @staticmethod
        def backward(ctx, *grads):
            if _all_zero(grads):
                return (None,) * len(ctx.needs_input_grad)
            wanted = ctx.needs_input_grad[:-2]
            return *op.call_backward(grads, ctx.saved_tensors, wanted, ctx.spec, ctx.backend), None, None

        @staticmethod
        def jvp(ctx, *tangents):
            *tangents_of_inputs, _, _ = tangents
            n = len(tangents_of_inputs)
            inputs, outputs = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
            return op.tangents(inputs, outputs, tuple(tangents_of_inputs), ctx.spec, ctx.backend)

        @staticmethod
        def vmap(info, in_dims, *args):
            *inputs, spec, backend = args

            def call(*inputs):
                return op(inputs, spec, backend)

            return op.map(info.batch_size, in_dims[:-2], call, inputs)

    return _named(op.definition.function_name, Transformable)


def transformable_backward(op: Operator) -> Function:
    """(*grads, *saved, wanted, spec, backend) -> the gradient of each input, an empty tensor where it is not wanted."""
    n_grads, n = len(op.definition.outputs), len(op.definition.outputs) + len(op.definition.saved)

    class TransformableBackward(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            tensors, (wanted, spec, backend) = args[:n], args[n:]
            if is_plain(*tensors):
                grads, saved = tensors[:n_grads], tensors[n_grads:]
                return op.placeholders(op.run_backward(grads, saved, wanted, spec, backend), saved)
            return op.call_custom_backward(tensors, wanted, spec, backend)

        @staticmethod
        def setup_context(ctx, inputs, output):
            tensors, (wanted, spec, _) = inputs[:n], inputs[n:]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(g for g, want in zip(output, wanted, strict=True) if not want))

            def in_torch(tensors: Tensors) -> Tensors:
                return op.backward_in_torch(tensors[:n_grads], tensors[n_grads:], wanted, spec)

            ctx.in_torch = in_torch

        @staticmethod
        def backward(ctx, *cotangents):
            varied = [need and read for need, read in zip(ctx.needs_input_grad[:n], op.backward_reads, strict=True)]
            return *vjp(ctx.in_torch, ctx.saved_tensors, varied, cotangents), None, None, None

        @staticmethod
        def jvp(ctx, *tangents):
            return jvp(ctx.in_torch, ctx.saved_tensors)

        @staticmethod
        def vmap(info, in_dims, *args):
            tensors, rest = args[:n], args[n:]

            def call(*tensors):
                return op.backward_function.apply(*tensors, *rest)

            return op.map(info.batch_size, in_dims[:n], call, tensors)

    return TransformableBackward


def in_place(inputs: Tensors, outputs: Tensors) -> tuple[Tensor, ...]:
    """The outputs that are the inputs in their places, overwritten."""
    found: tuple[Tensor, ...] = ()
    for i, o in zip(inputs, outputs, strict=False):
        if o is i and o is not None:
            found += (o,)
    return found


def _all_zero(grads: Tensors) -> bool:
    """Whether nothing flows back, as to a node that only a second derivative comes by."""
    return grads[0] is None and all(g is None for g in grads)
