"""The public functions: what each computes, what it accepts, and the way to the backend that serves it."""

from fastattn.functional._attention import attention, varlen_attention
from fastattn.functional._cross_entropy import cross_entropy
from fastattn.functional._explain import explain
from fastattn.functional._norm import layer_norm, rms_norm
from fastattn.functional._softmax import log_softmax, softmax
from fastattn.functional._sdpa import scaled_dot_product_attention

__all__ = [
    "attention",
    "cross_entropy",
    "explain",
    "layer_norm",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
    "varlen_attention",
]
