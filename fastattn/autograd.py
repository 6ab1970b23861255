"""The autograd Functions of the kernels, for code that composes its own.

    o, lse, _ = AttentionFunction.apply(
        q, k, v, bias, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, qk_scales, v_scales, spec, backend
    )  # AttentionSpec; all after v may be None; bias and mask have four dimensions, seed is int64, for dropout
    y, h, stats = LayerNormFunction.apply(x, weight, bias, residual, seed, spec, backend)  # NormSpec; all but x may be
    y, h, stats = RMSNormFunction.apply(x, weight, None, residual, seed, spec, backend)  # None; seed for dropout
    y, = GatedFunction.apply(gate, up, spec, backend)  # GatedSpec
    y, = DropoutAddFunction.apply(residual, x, seed, spec, backend)  # DropoutAddSpec
    q, k = RotaryFunction.apply(q, k, cos, sin, position_ids, cu_seqlens, spec, backend)  # RotarySpec; k may be None
    loss, *_ = CrossEntropyFunction.apply(logits, target, weight, spec, backend)  # CrossEntropySpec
    loss, *_ = LinearCrossEntropyFunction.apply(hidden, weight, target, bias, class_weight, spec, backend)
    y, = SoftmaxFunction.apply(x, mask, spec, backend)  # SoftmaxSpec; mask may be None

They check nothing: `fastattn.functional` is the checked way in. `backend` names a kernel backend ("triton"). They
work under autograd, torch.func and forward-mode AD, to any order. Kernels compute the forward, vmap of it, the first
gradient and attention's tangents; each further derivative is computed by plain torch operations, unfused: of
attention, in memory of S_q × S_k for each head.
"""

from fastattn.ops.attention import attention as _attention
from fastattn.ops.cross_entropy import cross_entropy as _cross_entropy
from fastattn.ops.dropout_add import dropout_add as _dropout_add
from fastattn.ops.gated import gated as _gated
from fastattn.ops.linear_cross_entropy import linear_cross_entropy as _linear_cross_entropy
from fastattn.ops.norm import layer_norm as _layer_norm
from fastattn.ops.norm import rms_norm as _rms_norm
from fastattn.ops.rotary import rotary as _rotary
from fastattn.ops.softmax import softmax as _softmax

AttentionFunction = _attention.function
CrossEntropyFunction = _cross_entropy.function
LinearCrossEntropyFunction = _linear_cross_entropy.function
DropoutAddFunction = _dropout_add.function
GatedFunction = _gated.function
LayerNormFunction = _layer_norm.function
RMSNormFunction = _rms_norm.function
RotaryFunction = _rotary.function
SoftmaxFunction = _softmax.function

__all__ = [
    "AttentionFunction",
    "CrossEntropyFunction",
    "DropoutAddFunction",
    "GatedFunction",
    "LayerNormFunction",
    "LinearCrossEntropyFunction",
    "RMSNormFunction",
    "RotaryFunction",
    "SoftmaxFunction",
]
