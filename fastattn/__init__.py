"""fastattn: fused attention, LayerNorm and softmax for PyTorch Transformers, right at the edges.

o = fastattn.attention(q, k, v, causal=True)          # (B, H, S, D)
model = fastattn.nn.TransformerEncoderLayer(512, 8)   # torch.nn's arguments, state dict and outputs
"""

from fastattn import autograd, errors, functional, nn
from fastattn.functional import (
    attention,
    cross_entropy,
    dropout_add,
    explain,
    geglu,
    layer_norm,
    linear_cross_entropy,
    log_softmax,
    rms_norm,
    rotary_embedding,
    scaled_dot_product_attention,
    softmax,
    swiglu,
    varlen_attention,
)

__version__ = "0.1.0"

__all__ = [
    "attention",
    "autograd",
    "cross_entropy",
    "dropout_add",
    "errors",
    "explain",
    "functional",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "nn",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
    "varlen_attention",
]
