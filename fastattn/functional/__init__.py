"""The public functions: what each computes, what it accepts, and the way to the backend that serves it."""

from fastattn.functional._attention import attention, varlen_attention
from fastattn.functional._cross_entropy import cross_entropy, linear_cross_entropy
from fastattn.functional._dropout_add import dropout_add
from fastattn.functional._explain import explain
from fastattn.functional._gated import geglu, swiglu
from fastattn.functional._norm import layer_norm, rms_norm
from fastattn.functional._rotary import rotary_embedding
from fastattn.functional._sdpa import scaled_dot_product_attention
from fastattn.functional._softmax import log_softmax, softmax

__all__ = [
    "attention",
    "cross_entropy",
    "dropout_add",
    "explain",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
    "varlen_attention",
]
