"""The one way an operator is built from kernels: schema, fake, derivatives, compiler, functorch, fast eager path.

An operator is a `Definition`: what it allocates, what fills that, and the same for its backward. From it `Operator`
makes

- the fast path for plain tensors: the launcher itself, or a classic autograd.Function when a gradient is wanted;
- a `setup_context` autograd.Function whose backward is a Function too, for torch.func and forward-mode AD;
- the custom ops `fastattn::<name>` and `fastattn::<name>_backward`, for torch.compile, export, dispatch modes and
  tensor subclasses. The allocator is also their fake, so real and traced outputs agree in shape, dtype and strides.

The kernels compute the operator and its gradient, and a definition may bring one for forward mode. When the gradient
is itself differentiated, what is needed is computed from the inputs by the definition's `reference`, to any order:
right, but unfused, which for attention holds S_q × S_k matrices. Nothing is spent on it before. A loss that keeps its
gradient instead of its input computes it from that gradient where it can, else refuses it. Code that torch.compile
compiled cannot be differentiated twice: that is PyTorch's limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fastattn.errors import NoMemoryError, UnsupportedError
from fastattn.ops.custom_ops import as_tuple, backward_op, forward_op, offer_flop_formulas
from fastattn.ops.differentiate import Tensors, forward_mode, jvp, vjp, without_tangents
from fastattn.ops.functions import (
    eager_function,
    in_place,
    transformable_backward,
    transformable_function,
)
from fastattn.spec import Spec
from fastattn.tracing import is_plain, without_memory

Mapped = tuple[Tensors, tuple[int, ...]]  # outputs and the dimension of each that vmap added
CANNOT_BE_DIFFERENTIATED_AGAIN = "its gradient cannot be differentiated again; backend='eager' computes that."


@dataclass(frozen=True)
class Definition:
    """An operator on `inputs` (names; a trailing ? means it may be None) under a spec, run by a kernel backend.

    `scalars` is the schema of what the spec adds to the tensors: `encode(spec)` gives its values, `decode(tensors by
    name, *values)` the spec again.

    Higher derivatives come from `reference`; it needs every input among `saved`. An operator that saves less gives
    `reference_backward`, the gradients in torch operations as a function of what it saves, outputs included; without
    that, or for a spec that `only_once` names, to differentiate its gradient is refused.

    Forward mode comes from `reference` too, unless there is `tangents`: (inputs, outputs, tangents of inputs, spec,
    backend) -> the tangent of each differentiable output. It is called under whatever transforms the caller, with
    tensors of that transform; None is a tangent of zero, or of an integer. It must be differentiable in everything it
    is given, so it is composed of torch operations and `Operator`s. The outputs are known as functions of the inputs.
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
    reference: Callable[[Tensors, Any], Tensors]  # (inputs, spec) -> outputs, in differentiable torch operations
    differentiable: tuple[str, ...]  # of outputs
    function_name: str
    batching: Literal["fold", "prepend", "loop"]  # how vmap adds a dimension: into dimension 0 of every tensor,
    # before all dimensions of every tensor, or by one call per element; "fold" is "loop" for a call in which tensors
    # have fewer than two dimensions, or differ in the size of dimension 0
    reference_backward: Callable[[Tensors, dict[str, Tensor | None], Any], Tensors] | None = None
    only_once: Callable[[Any], bool] | None = None  # spec -> True if `reference_backward` does not serve it
    tangents: Callable[[Tensors, Tensors, Tensors, Any, str], Tensors] | None = None
    unsaved: Callable[[Any], tuple[str, ...]] | None = None  # spec -> those of `saved` that are None under it
    traced_backward: Callable[[Tensors, dict[str, Tensor | None], Sequence[bool], Any], Tensors] | None = None
    # (grads, saved by name, wanted, spec) -> gradients: what a compiler is shown instead of a kernel, because in torch
    # operations it is fused with its neighbours
    passed: tuple[str, str] | None = None  # (input, output): the gradient of the one is that of the other, unchanged
    # Operations of the matrix products, as torch.utils.flop_counter counts them: (inputs by name, spec) and
    # (saved by name, wanted, spec) -> a number; None: there is nothing to count.
    flops: Callable[[dict[str, Tensor | None], Any], int] | None = None
    backward_flops: Callable[[dict[str, Tensor | None], Sequence[bool], Any], int] | None = None
    recycled: tuple[str, str] | None = None  # (input, saved output): the gradient of the one may take the memory of the
    # other once nobody can ask for it again; the launcher is then given one tensor for both


class Operator:
    """A `Definition` made callable: `op(inputs, spec, backend)` returns its outputs."""

    def __init__(self, definition: Definition):
        self.definition = d = definition
        self.input_names = tuple(name.rstrip("?") for name in d.inputs)
        names = self.input_names + d.outputs
        self._saved_index = tuple(names.index(name) for name in d.saved)
        self._fixed_outputs = tuple(i for i, name in enumerate(d.outputs) if name not in d.differentiable)
        # Of (grads, saved), what `backward_in_torch` is a function of.
        self.backward_reads = (True,) * len(d.outputs) + tuple(
            d.reference_backward is not None or name in self.input_names for name in d.saved
        )
        self._keeps_inputs = set(self.input_names) <= set(d.saved)
        self._recycled = d.recycled and (self.input_names.index(d.recycled[0]), d.saved.index(d.recycled[1]))
        self._passed = d.passed and (self.input_names.index(d.passed[0]), d.outputs.index(d.passed[1]))
        self._untraceable = "[]" in d.scalars  # torch.jit.trace has no lists of booleans or symbolic integers
        self._eager = eager_function(self)
        self.function = transformable_function(self)
        self.backward_function = transformable_backward(self)
        self.custom_op = forward_op(self)
        self.custom_backward = backward_op(self)

    def __call__(self, inputs: Tensors, spec: Spec, backend: str) -> Any:
        """The outputs, none of them None."""
        if is_plain(*inputs):
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
                return self._eager.apply(*inputs, spec, backend)
            return self.run(inputs, spec, backend)
        if torch.compiler.is_compiling() or not _transformed():
            if self._untraceable and torch._C._get_tracing_state() is not None:
                return self.definition.reference(inputs, spec)
            return self.call_custom(inputs, spec, backend)
        return self.function.apply(*inputs, spec, backend)

    # ---- the kernels, for plain tensors

    def run(self, inputs: Tensors, spec: Spec, backend: str) -> Tensors:
        """The outputs; one that works in place is the input itself, which autograd is told has changed."""
        self.check_memory(inputs, self.input_names, spec)
        outputs = self.definition.allocate(inputs, spec)
        self.definition.launch(outputs, inputs, spec, backend)
        if overwritten := in_place(inputs, outputs):
            increment_version(overwritten)
        return outputs

    @staticmethod
    def check_memory(tensors: Tensors, names: Sequence[str], spec: Spec) -> None:
        """Refuse a tensor whose memory was given back: a kernel would take its address, 0, for an absent tensor."""
        for t, name in zip(tensors, names, strict=True):
            if t is not None and without_memory(t):
                raise NoMemoryError(
                    f"{spec.op}: `{name}` has shape {tuple(t.shape)} and no memory; its storage was freed or never "
                    "allocated (under FSDP, use a parameter inside its module's forward)."
                )

    def fixed_outputs(self, spec: Spec) -> tuple[int, ...]:
        """Return the outputs without a derivative; a kept gradient that cannot be differentiated is one."""
        d = self.definition
        if d.only_once is None or not d.only_once(spec):
            return self._fixed_outputs
        return tuple(i for i, name in enumerate(d.outputs) if name not in d.differentiable or name in d.saved)

    def saved(self, inputs: Tensors, outputs: Tensors, spec: Spec) -> Tensors:
        everything = inputs + outputs
        if self.definition.unsaved is None:
            return tuple(everything[i] for i in self._saved_index)
        unsaved = self.definition.unsaved(spec)
        pairs = zip(self.definition.saved, self._saved_index, strict=True)
        return tuple(None if name in unsaved else everything[i] for name, i in pairs)

    def run_backward_once(
        self, grads: Tensors, saved: Tensors, wanted: Sequence[bool], spec: Spec, backend: str, last: bool
    ) -> Tensors:
        """`run_backward` for autograd, which takes a tensor that it gave; `last`: nobody will read `saved` again."""
        if self._passed is None or not wanted[self._passed[0]]:
            return self.run_backward(grads, saved, wanted, spec, backend, last)
        i, j = self._passed
        wanted = [want and k != i for k, want in enumerate(wanted)]
        grad_inputs = self.run_backward(grads, saved, wanted, spec, backend, last)
        return (*grad_inputs[:i], grads[j], *grad_inputs[i + 1 :])

    def run_backward(
        self, grads: Tensors, saved: Tensors, wanted: Sequence[bool], spec: Spec, backend: str, last: bool = False
    ) -> Tensors:
        """The gradient of each input, in memory of its own; None where it is not wanted."""
        self.check_memory(grads, self.definition.outputs, spec)
        self.check_memory(saved, self.definition.saved, spec)
        by_name = dict(zip(self.definition.saved, saved, strict=True))
        if last and self._recycled is not None and wanted[self._recycled[0]]:
            i, j = self._recycled
            wanted = [want and k != i for k, want in enumerate(wanted)]
            grad_inputs = self.definition.allocate_grads(by_name, wanted, spec)
            grad_inputs = (*grad_inputs[:i], saved[j], *grad_inputs[i + 1 :])
        else:
            grad_inputs = self.definition.allocate_grads(by_name, wanted, spec)
        self.definition.launch_backward(grad_inputs, grads, by_name, spec, backend)
        return grad_inputs

    @staticmethod
    def placeholders(grads: Tensors, like: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """A custom op returns neither None nor a tensor twice: an empty tensor for a gradient that is not wanted, and a
        copy of one that two inputs share."""
        some = next(t for t in like if t is not None)
        tensors: list[Tensor] = []
        for g in grads:
            if g is None:
                tensors.append(some.new_empty(0))
            else:
                tensors.append(g.clone() if any(g is t for t in tensors) else g)
        return tuple(tensors)

    # ---- the same for tensors of any kind

    def call_custom(self, inputs: Sequence[Tensor | None], spec: Spec, backend: str) -> Tensors:
        offer_flop_formulas()
        return as_tuple(self.custom_op(*inputs, *self.definition.encode(spec), backend))

    def call_backward(
        self, grads: Tensors, saved: Tensors, wanted: Sequence[bool], spec: Spec, backend: str
    ) -> Tensors:
        """`run_backward` under any transform, and differentiable in turn."""
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active() and self._is_last(spec):
            # Nothing that is kept leads back to the inputs, so that a second derivative would be 0 without a word.
            raise UnsupportedError(f"{spec.op}: create_graph=True was asked for; {CANNOT_BE_DIFFERENTIATED_AGAIN}")
        results = self.backward_function.apply(*grads, *saved, tuple(wanted), spec, backend)
        return tuple(g if want else None for g, want in zip(results, wanted, strict=True))

    def call_custom_backward(self, tensors: Tensors, wanted: Sequence[bool], spec: Spec, backend: str) -> Any:
        d = self.definition
        if d.traced_backward is not None:
            grads, saved = tensors[: len(d.outputs)], tensors[len(d.outputs) :]
            found = d.traced_backward(grads, dict(zip(d.saved, saved, strict=True)), wanted, spec)
            return self.placeholders(found, saved)
        offer_flop_formulas()
        return self.custom_backward(*tensors, list(wanted), *d.encode(spec), backend)

    # ---- in torch operations

    def _is_last(self, spec: Spec) -> bool:
        """True if the gradient cannot be differentiated."""
        d = self.definition
        if d.reference_backward is None:
            return not self._keeps_inputs
        return d.only_once is not None and d.only_once(spec)

    def backward_in_torch(self, grads: Tensors, saved: Tensors, wanted: Sequence[bool], spec: Spec) -> Tensors:
        """`run_backward` unfused, differentiable to any order. From `reference`, saved outputs are not read: a gradient
        depends on them only through the inputs."""
        d = self.definition
        by_name = dict(zip(d.saved, saved, strict=True))
        if self._is_last(spec):
            raise UnsupportedError(f"{spec.op}: {CANNOT_BE_DIFFERENTIATED_AGAIN}")
        if d.reference_backward is not None:
            found = d.reference_backward(grads, by_name, spec)
            return tuple(g if want else None for g, want in zip(found, wanted, strict=True))
        inputs = tuple(by_name[name] for name in self.input_names)
        return vjp(lambda inputs: d.reference(inputs, spec), inputs, wanted, grads)

    def tangents(self, inputs: Tensors, outputs: Tensors, tangents: Tensors, spec: Spec, backend: str) -> Tensors:
        """The tangent of each output, None where it is not differentiable. `inputs` and `outputs` are duals."""
        d = self.definition
        if d.tangents is None:
            by_name = dict(zip(d.outputs, jvp(lambda inputs: d.reference(inputs, spec), inputs), strict=True))
        else:
            with forward_mode(inputs):
                primals = without_tangents(inputs), without_tangents(outputs)
                found = d.tangents(*primals, tangents, spec, backend)
            by_name = dict(zip(d.differentiable, found, strict=True))
        return tuple(by_name[name] if name in d.differentiable else None for name in d.outputs)

    # ---- one more dimension, by vmap

    def map(self, size: int, in_dims: Sequence[int | None], call: Callable, tensors: Sequence[Tensor | None]) -> Mapped:
        """Map `call` over one more dimension of `tensors`, as the definition's `batching` allows."""
        batching = self.definition.batching
        pairs: list[Any] = list(zip(tensors, in_dims, strict=True))
        if batching == "prepend":
            outputs = call(*(None if t is None else _lead(t, dim, size) for t, dim in pairs))
        elif batching == "fold" and _folds(tensors, in_dims):
            outputs = call(*(None if t is None else _lead(t, dim, size).flatten(0, 1) for t, dim in pairs))
            outputs = tuple(t.unflatten(0, (size, t.shape[0] // size)) for t in outputs)
        else:
            rows = [call(*(t if dim is None else t.select(dim, i) for t, dim in pairs)) for i in range(size)]
            outputs = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return outputs, (0,) * len(outputs)


def _transformed() -> bool:
    """Whether functorch or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _folds(tensors: Sequence[Tensor | None], in_dims: Sequence[int | None]) -> bool:
    """Whether, `in_dims` apart, each tensor has two dimensions or more, the first of one size."""
    shapes = []
    for t, dim in zip(tensors, in_dims, strict=True):
        if t is not None:
            shapes.append(t.shape if dim is None else t.shape[:dim] + t.shape[dim + 1 :])
    return all(len(shape) > 1 for shape in shapes) and len({shape[0] for shape in shapes}) == 1


def _lead(t: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension first: (size, …); a tensor without one is repeated, at no cost in memory."""
    return t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
