"""Gated activations."""

from __future__ import annotations

import math
from types import ModuleType

from torch import Tensor

from fastattn import _arguments as check
from fastattn import backends
from fastattn.errors import ArgumentError, ArgumentTypeError, kind
from fastattn.functional._plan import cached, wants_gradient
from fastattn.ops.gated import gated as gated_op
from fastattn.spec import GatedSpec, Work


def gated_spec(fn: str, shapes, dtypes, devices, approximate: str) -> GatedSpec:
    """The two of each are of gate and up."""
    check.same_float_dtype(fn, ("gate", "up"), dtypes, devices)
    gate, up = shapes
    if gate != up:
        raise ArgumentError(f"{fn}: `up` has shape {tuple(up)} and `gate` has {tuple(gate)}; they must be equal.")
    if fn == "swiglu":
        return GatedSpec(dtypes[0], "silu")
    if not isinstance(approximate, str):
        raise ArgumentTypeError(f'{fn}: `approximate` is {kind(approximate)}; it must be "none" or "tanh".')
    if approximate not in ("none", "tanh"):
        raise ArgumentError(f'{fn}: `approximate` is {approximate!r}; it must be "none" or "tanh".')
    return GatedSpec(dtypes[0], "gelu" if approximate == "none" else "gelu_tanh")


@cached
def _plan(fn, backend, gradient, approximate, gate_shape, up_shape, *facts) -> tuple[ModuleType, GatedSpec]:
    spec = gated_spec(fn, (gate_shape, up_shape), facts[:2], facts[2:], approximate)
    return backends.select(spec, facts[2], backend, Work(math.prod(gate_shape), gradient)), spec


def _gated(fn: str, gate: Tensor, up: Tensor, approximate: str, backend: str | None) -> Tensor:
    check.check_tensor(fn, "gate", gate)
    check.check_tensor(fn, "up", up)
    run, spec = _plan(
        fn, backend, wants_gradient(gate, up), approximate, gate.shape, up.shape, gate.dtype, up.dtype, gate.device,
        up.device,
    )  # fmt: skip
    if run.COMPOSITE:
        return run.gated(gate, up, spec)
    (y,) = gated_op((gate, up), spec, run.NAME)
    return y


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """The gated activation of Llama's feed-forward layers, in one pass.

        y = silu(gate) · up,   silu(x) = x σ(x) = x / (1 + exp(−x))

    Args:
        gate: any shape and strides, float16, bfloat16, float32 or float64; the arithmetic is in at least float32.
            Halves of one projection, `gate, up = x.chunk(2, -1)`, are read where they lie.
        up: shape, dtype and device of gate, any strides.
        backend: "cuda", "triton", "cpu", "eager" or "reference", which then never falls back; None: the first that can.

    Returns:
        y, shape and dtype of gate, under autocast too. inf and NaN are where `F.silu(gate) * up` has them.

    Memory moved, in tensors of y's size: 3 (gate and up are read, y is written); backward 5 (dy, gate and up are read,
    both gradients are written). The backward computes the activation again: gate and up alone are kept for it.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape or device.
        UnsupportedError: the backend asked for cannot compute it.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).

    Example:
        >>> swiglu(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
        tensor([0.0000, 1.4621])
    """
    return _gated("swiglu", gate, up, "none", backend)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """The gated activation with gelu, as in Gemma's and T5's feed-forward layers, in one pass.

        y = gelu(gate) · up,   gelu(x) = x Φ(x) = ½ x (1 + erf(x / √2))
        approximate="tanh":    gelu(x) = ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))

    Args:
        gate, up, backend: as in `swiglu`.
        approximate: "none" for the exact function, "tanh" for its approximation.

    Returns:
        y, shape and dtype of gate, under autocast too. inf and NaN are where `F.gelu(gate, approximate) * up` has them;
        its gradient, NaN in torch where the square of a finite gate overflows, is that of the formula.

    Memory moved, Raises: as `swiglu`.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020); torch.nn.functional.gelu.

    Example:
        >>> geglu(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
        tensor([0.0000, 1.6827])
    """
    return _gated("geglu", gate, up, approximate, backend)
