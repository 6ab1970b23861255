"""The autograd Functions of the kernels, for code that composes its own.

    o, lse = AttentionFunction.apply(q, k, v, seed, spec, backend)  # AttentionSpec; seed: None, or int64 for dropout
    y, mean, rstd = LayerNormFunction.apply(x, weight, bias, spec, backend)  # NormSpec; weight, bias may be None
    y, = SoftmaxFunction.apply(x, mask, spec, backend)  # SoftmaxSpec; mask may be None

They check nothing: `fastattn.functional` is the checked way in. `backend` names a kernel backend ("triton"). They work
under torch.func.grad and vmap; double backward and forward-mode AD raise NotImplementedError.
"""

from fastattn.ops.attention import attention as _attention
from fastattn.ops.layer_norm import layer_norm as _layer_norm
from fastattn.ops.softmax import softmax as _softmax

AttentionFunction = _attention.function
LayerNormFunction = _layer_norm.function
SoftmaxFunction = _softmax.function

__all__ = ["AttentionFunction", "LayerNormFunction", "SoftmaxFunction"]
