"""The keyed generator of dropout: Philox4x32-7 (Salmon et al., SC'11), written with torch integers.

The decision for entry (b, h, i, j) of the probabilities, or (i, j) of a matrix, depends on the seed and these numbers
alone, so forward, backward and every backend agree whatever tiles they work in.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 7  # the fewest that the authors found to pass every test of BigCrush
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_0, _KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a · factor; int64 wraps, but its bits are the right ones."""
    product = a * factor
    return (product >> 32) & _MASK32, product & _MASK32


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = _ROUNDS) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64 in [0, 2^32)) for each counter (c0, c1, c2, c3) under the 64-bit key `seed`."""
    c0, c1, c2, c3 = (c.to(torch.int64) & _MASK32 for c in torch.broadcast_tensors(c0, c1, c2, c3))
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _MULTIPLIER_0)
        high1, low1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEP_0) & _MASK32, (k1 + _KEY_STEP_1) & _MASK32
    return c0, c1, c2, c3


def dropout_keep(seed: Tensor, dropout_p: float, B: int, H: int, S_q: int, S_k: int, first_b: int = 0) -> Tensor:
    """(B, H, S_q, S_k) bool: the first Philox word of counter (j, i, h, b) is at least dropout_p · 2^32."""

    def axis(n: int, dim: int, first: int = 0) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = n
        return torch.arange(first, first + n, device=seed.device).view(shape)

    word = philox(seed, axis(S_k, 3), axis(S_q, 2), axis(H, 1), axis(B, 0, first_b))[0]
    return word >= int(dropout_p * 2**32)


def row_dropout(x: Tensor, seed: Tensor, dropout_p: float, n_dims: int = 1) -> Tensor:
    """x / (1 - dropout_p) where kept, else 0; x (…, *row), its last n_dims dimensions being a row i of entries j.

    Entry j of row i is kept if the first Philox word of counter (j, i, i >> 32, 0) is at least dropout_p · 2^32.
    """
    rows = x.flatten(x.dim() - n_dims).flatten(0, -2) if x.dim() > n_dims else x.reshape(1, -1)
    i = torch.arange(rows.shape[0], device=x.device)[:, None]
    j = torch.arange(rows.shape[1], device=x.device)
    word = philox(seed, j, i, i >> 32, torch.zeros_like(j))[0]
    scale = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
    return torch.where(word >= int(dropout_p * 2**32), rows * scale, 0.0).view(x.shape)
