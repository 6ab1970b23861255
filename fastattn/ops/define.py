"""The one way an operator is built from kernels: schema, fake, derivative, compiler, functorch and the fast eager path.

An operator is a `Definition`: what it allocates, what fills that, and the same for its backward. From it `Operator`
makes

- the fast path for plain tensors: the launcher itself, or a classic autograd.Function when a gradient is wanted;
- a `setup_context` autograd.Function whose backward is a Function too, for torch.func (grad, vmap) and forward-mode AD;
- the custom ops `fastattn::<name>` and `fastattn::<name>_backward`, for torch.compile, export, dispatch modes and
  tensor subclasses. The allocator is also their fake, so real and traced outputs agree in shape, dtype and strides.

Double backward and forward-mode AD raise NotImplementedError by the operator's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastattn.backends import Spec
from fastattn.tracing import is_plain

Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Definition:
    """An operator on `inputs` (names; a trailing ? means it may be None) under a spec, run by a kernel backend.

    `scalars` is the schema of what the spec adds to the tensors: `encode(spec)` gives its values, `decode(tensors by
    name, *values)` the spec again.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    saved: tuple[str, ...]  # of inputs and outputs, what the backward reads
    scalars: str
    encode: Callable[[Any], tuple]
    decode: Callable[..., Any]
    allocate: Callable[[Tensors, Any], Tensors]
    launch: Callable[[Tensors, Tensors, Any, str], None]  # (outputs, inputs, spec, backend)
    allocate_grads: Callable[[dict[str, Tensor | None], Sequence[bool], Any], Tensors]  # (saved by name, wanted, spec)
    launch_backward: Callable[[Tensors, Tensors, dict[str, Tensor | None], Any, str], None]
    differentiable: tuple[str, ...]  # of outputs
    function_name: str
    batching: Literal["fold", "prepend", "loop"]  # how vmap adds a dimension: into dimension 0 of every tensor,
    # before all dimensions of every tensor, or by one call per element


class Operator:
    """A `Definition` made callable: `op(inputs, spec, backend)` returns its outputs."""

    def __init__(self, definition: Definition):
        self.definition = d = definition
        self.name = f"fastattn::{d.name}"
        names = tuple(name.rstrip("?") for name in d.inputs) + d.outputs
        self._saved_index = tuple(names.index(name) for name in d.saved)
        self._fixed_outputs = tuple(i for i, name in enumerate(d.outputs) if name not in d.differentiable)
        self._make_custom_ops()
        self._make_functions()

    # ---- what every path runs

    def _run(self, inputs: Tensors, spec: Spec, backend: str) -> Tensors:
        outputs = self.definition.allocate(inputs, spec)
        self.definition.launch(outputs, inputs, spec, backend)
        return outputs

    def _saved(self, inputs: Tensors, outputs: Tensors) -> Tensors:
        everything = inputs + outputs
        return tuple(everything[i] for i in self._saved_index)

    def _run_backward(
        self, grads: Tensors, saved: Tensors, wanted: Sequence[bool], spec: Spec, backend: str
    ) -> Tensors:
        """The gradient of each input; None where it is not wanted."""
        by_name = dict(zip(self.definition.saved, saved, strict=True))
        grad_inputs = self.definition.allocate_grads(by_name, wanted, spec)
        self.definition.launch_backward(grad_inputs, grads, by_name, spec, backend)
        return grad_inputs

    # ---- the call

    def __call__(self, inputs: Tensors, spec: Spec, backend: str) -> Any:
        """The outputs, none of them None."""
        if is_plain(*inputs):
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
                return self._eager.apply(*inputs, spec, backend)
            return self._run(inputs, spec, backend)
        if torch.compiler.is_compiling() or not _transformed():
            return self._call_custom(inputs, spec, backend)
        return self.function.apply(*inputs, spec, backend)

    def _call_custom(self, inputs: Sequence[Tensor | None], spec: Spec, backend: str) -> Tensors:
        return _as_tuple(self._custom_op(*inputs, *self.definition.encode(spec), backend))

    def _call_backward(
        self, grads: Tensors, saved: Tensors, wanted: Sequence[bool], spec: Spec, backend: str
    ) -> Tensors:
        """Gradients under any transform, None where not wanted; differentiating them again raises."""
        results = self._backward_function.apply(*grads, *saved, len(grads), tuple(wanted), spec, backend)
        return tuple(g if want else None for g, want in zip(results, wanted, strict=True))

    # ---- autograd.Functions

    def _make_functions(self) -> None:
        op = self

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):
                inputs, (ctx.spec, ctx.backend) = args[:-2], args[-2:]
                outputs = op._run(inputs, ctx.spec, ctx.backend)
                ctx.save_for_backward(*op._saved(inputs, outputs))
                ctx.set_materialize_grads(False)
                ctx.mark_non_differentiable(*(outputs[i] for i in op._fixed_outputs))
                return outputs

            @staticmethod
            def backward(ctx, *grads):
                run = op._call_backward if torch.is_grad_enabled() else op._run_backward
                return *run(grads, ctx.saved_tensors, ctx.needs_input_grad[:-2], ctx.spec, ctx.backend), None, None

        class Transformable(torch.autograd.Function):
            @staticmethod
            def forward(*args):
                *inputs, spec, backend = args
                if is_plain(*inputs):
                    return op._run(tuple(inputs), spec, backend)
                return op._call_custom(inputs, spec, backend)

            @staticmethod
            def setup_context(ctx, inputs, output):
                *tensors, ctx.spec, ctx.backend = inputs
                ctx.save_for_backward(*op._saved(tuple(tensors), output))
                ctx.set_materialize_grads(False)
                ctx.mark_non_differentiable(*(output[i] for i in op._fixed_outputs))

            @staticmethod
            def backward(ctx, *grads):
                wanted = ctx.needs_input_grad[:-2]
                return *op._call_backward(grads, ctx.saved_tensors, wanted, ctx.spec, ctx.backend), None, None

            @staticmethod
            def jvp(ctx, *tangents):
                raise op._no_forward_mode()

            @staticmethod
            def vmap(info, in_dims, *args):
                *inputs, spec, backend = args
                return op._vmap(info.batch_size, in_dims[:-2], lambda *t: op(t, spec, backend), inputs)

        class TransformableBackward(torch.autograd.Function):
            @staticmethod
            def forward(*args):
                *tensors, n_grads, wanted, spec, backend = args
                if is_plain(*tensors):
                    grads, saved = tuple(tensors[:n_grads]), tuple(tensors[n_grads:])
                    return op._placeholders(op._run_backward(grads, saved, wanted, spec, backend), saved)
                return op._custom_backward(*tensors, list(wanted), *op.definition.encode(spec), backend)

            @staticmethod
            def setup_context(ctx, inputs, output):
                pass

            @staticmethod
            def backward(ctx, *grads):
                raise op._no_double_backward()

            @staticmethod
            def jvp(ctx, *tangents):
                raise op._no_forward_mode()

            @staticmethod
            def vmap(info, in_dims, *args):
                *tensors, n_grads, wanted, spec, backend = args

                def call(*tensors):
                    return op._backward_function.apply(*tensors, n_grads, wanted, spec, backend)

                return op._vmap(info.batch_size, in_dims[:-4], call, tensors)

        Eager.__name__ = Transformable.__name__ = self.definition.function_name
        self._eager, self.function, self._backward_function = Eager, Transformable, TransformableBackward

    def _no_double_backward(self) -> NotImplementedError:
        return NotImplementedError(f"{self.name}: double backward is not implemented; backend='reference' computes it.")

    def _no_forward_mode(self) -> NotImplementedError:
        return NotImplementedError(f"{self.name}: forward-mode AD is not implemented; backend='reference' computes it.")

    @staticmethod
    def _placeholders(grads: Tensors, like: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """An operator cannot return None: a gradient that is not wanted becomes an empty tensor."""
        some = next(t for t in like if t is not None)
        return tuple(some.new_empty(0) if g is None else g for g in grads)

    def _vmap(self, size: int, in_dims: Sequence[Any], call: Callable[..., Any], tensors: Sequence[Any]):
        """Map `call` over one more dimension of `tensors`, as the definition's `batching` allows."""
        batching = self.definition.batching
        if batching == "loop":
            rows = []
            for i in range(size):
                parts = (t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True))
                rows.append(call(*parts))
            outputs = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        else:
            led = (_lead(t, dim, size) for t, dim in zip(tensors, in_dims, strict=True))
            if batching == "prepend":
                outputs = call(*led)
            else:
                outputs = call(*(t if t is None else t.flatten(0, 1) for t in led))
                outputs = tuple(t.unflatten(0, (size, t.shape[0] // size)) for t in outputs)
        return outputs, (0,) * len(outputs)

    # ---- custom ops

    def _make_custom_ops(self) -> None:
        d, n = self.definition, len(self.definition.inputs)
        tensors = ", ".join(f"Tensor{'?' if name.endswith('?') else ''} {name.rstrip('?')}" for name in d.inputs)
        schema = f"({tensors}, {d.scalars}, str backend) -> ({', '.join(['Tensor'] * len(d.outputs))})"
        backward_tensors = ", ".join(f"Tensor? {name}" for name in [f"grad_{o}" for o in d.outputs] + list(d.saved))
        backward_schema = (
            f"({backward_tensors}, bool[] wanted, {d.scalars}, str backend) -> ({', '.join(['Tensor'] * n)})"
        )
        n_grads, n_backward = len(d.outputs), len(d.outputs) + len(d.saved)

        names = tuple(name.rstrip("?") for name in d.inputs)

        def forward(*args):
            inputs, (*values, backend) = args[:n], args[n:]
            spec = d.decode(dict(zip(names, inputs, strict=True)), *values)
            with _no_autocast(inputs):
                return _as_result(self._run(inputs, spec, backend))

        def forward_fake(*args):
            inputs, (*values, _) = args[:n], args[n:]
            spec = d.decode(dict(zip(names, inputs, strict=True)), *values)
            return _as_result(d.allocate(inputs, spec))

        def backward(*args):
            tensors, (wanted, *values, backend) = args[:n_backward], args[n_backward:]
            grads, saved = tensors[:n_grads], tensors[n_grads:]
            spec = d.decode(dict(zip(d.saved, saved, strict=True)), *values)
            with _no_autocast(tensors):
                return self._placeholders(self._run_backward(grads, saved, wanted, spec, backend), saved)

        def backward_fake(*args):
            saved, (wanted, *values, _) = args[n_grads:n_backward], args[n_backward:]
            by_name = dict(zip(d.saved, saved, strict=True))
            return self._placeholders(d.allocate_grads(by_name, wanted, d.decode(by_name, *values)), saved)

        self._custom_op = torch.library.custom_op(self.name, forward, mutates_args=(), schema=schema)
        self._custom_backward = torch.library.custom_op(
            f"{self.name}_backward", backward, mutates_args=(), schema=backward_schema
        )
        self._custom_op.register_fake(forward_fake)
        self._custom_backward.register_fake(backward_fake)

        def setup_context(ctx, inputs, output):
            outputs = _as_tuple(output)
            ctx.save_for_backward(*self._saved(inputs[:n], outputs))
            ctx.rest = inputs[n:]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(outputs[i] for i in self._fixed_outputs))

        def autograd(ctx, *grads):
            wanted = list(ctx.needs_input_grad[:n])
            results = self._custom_backward(*grads, *ctx.saved_tensors, wanted, *ctx.rest)
            grad_inputs = tuple(g if want else None for g, want in zip(results, wanted, strict=True))
            return *grad_inputs, *(None for _ in ctx.rest)

        def no_double_backward(ctx, *grads):
            raise self._no_double_backward()

        def vmap(info, in_dims, *args):
            outputs, dims = self._vmap(
                info.batch_size, in_dims[:n], lambda *ts: _as_tuple(self._custom_op(*ts, *args[n:])), args[:n]
            )
            return _as_result(outputs), _as_result(dims)

        def vmap_backward(info, in_dims, *args):
            return self._vmap(
                info.batch_size,
                in_dims[:n_backward],
                lambda *ts: self._custom_backward(*ts, *args[n_backward:]),
                args[:n_backward],
            )

        self._custom_op.register_autograd(autograd, setup_context=setup_context)
        self._custom_op.register_vmap(vmap)
        self._custom_backward.register_autograd(no_double_backward)
        self._custom_backward.register_vmap(vmap_backward)


def _as_result(outputs: Tensors) -> Any:
    """A custom op with one output returns the tensor itself."""
    return outputs[0] if len(outputs) == 1 else outputs


def _as_tuple(result: Any) -> Tensors:
    return (result,) if isinstance(result, Tensor) else result


def _transformed() -> bool:
    """Whether functorch or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _no_autocast(tensors: Sequence[Tensor | None]):
    """The caller's casts are done; nothing inside an operator is cast again."""
    device = next(t.device.type for t in tensors if t is not None)
    return torch.autocast(device, enabled=False)


def _lead(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped dimension first: (size, …); a tensor without one is repeated, at no cost in memory."""
    if t is None:
        return None
    return t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
