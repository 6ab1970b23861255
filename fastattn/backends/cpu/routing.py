"""Calls that torch's own operations finish sooner than these kernels. `python -m benchmarks.routing` measures them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastattn.spec import AttentionSpec, CrossEntropySpec, GatedSpec, NormSpec, SoftmaxSpec, Spec, Work
from fastattn.tracing import known_true


class Limits(NamedTuple):
    """Up to how much work the way to a kernel costs more than the kernel saves: a few µs, and with a backward 50."""

    float32: int
    float32_gradient: int
    half: int  # float16 and bfloat16
    half_gradient: int

    def of(self, dtype: torch.dtype, gradient: bool) -> int:
        if dtype == torch.float32:
            return self.float32_gradient if gradient else self.float32
        return self.half_gradient if gradient else self.half


# torch adds up gradients of LayerNorm's weight and bias in the dtype of x, and in float32 less exactly than the kernel.
SMALL = {
    "attention": Limits(262_144, 1_048_576, 32_768, 16_384),
    "layer_norm": Limits(65_536, 0, 32_768, 0),
    "softmax": Limits(32_768, 262_144, 16_384, 131_072),
    "swiglu": Limits(0, 16_384, 0, 0),
    "cross_entropy": Limits(16_384, 65_536, 16_384, 32_768),
}
# A sequence of so few queries and keys, or of so few queries, leaves most of a tile of 64 by 64 without work.
SHORT = Limits(8, 24, 0, 8)
FEW_QUERIES = Limits(0, 15, 0, 0)
# In compiled code, where a kernel is called by way of the dispatcher, and torch's operations become one loop, with what
# stands before and behind them. The gradient of torch's attention is right for small scores alone, at which a compiler
# cannot look (backends/eager.py).
SMALL_COMPILED = {
    "attention": Limits(2_097_152, 0, 262_144, 0),
    "layer_norm": Limits(2_097_152, 1_048_576, 524_288, 524_288),
    "softmax": Limits(262_144, 524_288, 131_072, 262_144),
    "swiglu": Limits(262_144, 262_144, 131_072, 131_072),
    "geglu": Limits(524_288, 524_288, 131_072, 131_072),
    "cross_entropy": Limits(262_144, 131_072, 262_144, 131_072),
}
SMALL_COMPILED["rms_norm"] = SMALL_COMPILED["layer_norm"]


def faster_in_torch(spec: Spec, work: Work | None) -> str | None:
    """Why torch's operation is the faster one, as a clause; None: it is not."""
    if isinstance(spec, CrossEntropySpec) and spec.inner:
        return "its rows of classes lie together, and those of (N, V, d1, …) are copied: torch is faster there"
    compiling = torch.compiler.is_compiling()
    if work is None or not (_becomes_one_loop(spec) if compiling else _is_one_operation(spec)):
        return None
    limit = (SMALL_COMPILED if compiling else SMALL)[spec.op].of(spec.dtype, work.gradient)
    if work.queries is not None and work.keys is not None and not compiling:
        short, few = (limits.of(spec.dtype, work.gradient) for limits in (SHORT, FEW_QUERIES))
        if work.queries <= few or max(work.queries, work.keys) <= short:
            return f"{work.queries} queries and {work.keys} keys leave most of a tile empty: torch's own is faster"
    if not known_true(work.amount <= limit):
        return None
    unit = "multiply-adds of q kᵀ" if spec.op == "attention" else "elements"
    behind = " and a backward" if work.gradient else ""
    return f"a call of {work.amount} {unit}{behind} is small: up to {limit} torch's own operation is faster"


def _is_one_operation(spec: Spec) -> bool:
    """Whether `eager` computes it by one operation of torch, which is quick to call; swiglu by two."""
    if isinstance(spec, AttentionSpec):
        return spec.plain and spec.scale > 0.0
    if isinstance(spec, NormSpec):
        plain = not (spec.rms or spec.residual or spec.memory_efficient or spec.weight_offset)
        return plain and all(dtype in (None, spec.dtype) for dtype in (spec.weight_dtype, spec.bias_dtype))
    if isinstance(spec, SoftmaxSpec):
        return not (spec.mask or spec.causal or spec.inplace) and spec.scale == 1.0
    if isinstance(spec, CrossEntropySpec):
        return not (spec.probabilities or spec.z_loss or spec.softcap or spec.inplace)
    return isinstance(spec, GatedSpec) and spec.op in SMALL


def _becomes_one_loop(spec: Spec) -> bool:
    """Whether a compiler makes one loop of what `eager` computes it by, or leaves it one operation."""
    if isinstance(spec, NormSpec):
        return not (spec.dropout_p or spec.memory_efficient)
    return isinstance(spec, GatedSpec) or _is_one_operation(spec)
