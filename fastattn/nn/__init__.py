"""Drop-in modules: torch.nn's constructors, parameters and results, on fastattn's kernels."""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.gated import GEGLU, SwiGLU
from fastattn.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.positional import LearnedPositionalEncoding, SinusoidalPositionalEncoding
from fastattn.nn.rotary import RotaryEmbedding
from fastattn.nn.softmax import LogSoftmax, Softmax
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GEGLU",
    "CrossEntropyLoss",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "SwiGLU",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
