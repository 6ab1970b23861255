"""A GPT-style Transformer whose attention and LayerNorm come from whichever library it is given."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, modules: ModuleType, d_model: int, heads: int) -> None:
        super().__init__()
        self.norm1 = modules.LayerNorm(d_model)
        self.attention = modules.MultiheadAttention(d_model, heads, batch_first=True)
        self.norm2 = modules.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Decoder only, pre-norm, learned positions, the output layer tied to the embedding.

    `modules` is torch.nn or fastattn.nn; names, shapes and order of the parameters are the same with both.
    """

    mask: Tensor  # (seq, seq), True = hidden

    def __init__(self, modules: ModuleType, vocabulary: int, d_model: int, layers: int, heads: int, seq: int) -> None:
        super().__init__()
        self.seq = seq
        self.tokens = nn.Embedding(vocabulary, d_model)
        self.positions = nn.Embedding(seq, d_model)
        self.blocks = nn.ModuleList(Block(modules, d_model, heads) for _ in range(layers))
        self.norm = modules.LayerNorm(d_model)
        self.register_buffer("mask", torch.ones(seq, seq, dtype=torch.bool).triu(1), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, 0.02²), narrower by √(2 · layers) where a branch joins the residual stream."""
        joins = ("attention.out_proj.weight", "mlp.2.weight")
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 1 / math.sqrt(2 * len(self.blocks)) if name.endswith(joins) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, S) -> logits (B, S, vocabulary)."""
        S = ids.shape[1]
        x = self.tokens(ids) + self.positions.weight[:S]  # (B, S, d_model)
        for block in self.blocks:
            x = block(x, self.mask[:S, :S])
        return nn.functional.linear(self.norm(x), self.tokens.weight)

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int, temperature: float = 0.7) -> Tensor:
        """ids (S,), followed by `count` sampled tokens."""
        for _ in range(count):
            logits = self(ids[None, -self.seq :])[0, -1].float()
            ids = torch.cat([ids, torch.multinomial((logits / temperature).softmax(-1), 1)])
        return ids
