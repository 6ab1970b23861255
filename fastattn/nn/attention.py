"""Multi-head attention as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.errors import ArgumentError
from fastattn.functional import attention
from fastattn.nn._tracing import Scriptable
from fastattn.nn.weights import as_fast_in_torch, attend_with_weights

torch.fx.wrap("attention")  # torch.fx records the call


class ContractError(ArgumentError, AssertionError, RuntimeError):
    """A call that torch.nn.MultiheadAttention refuses too, there with an AssertionError or a RuntimeError."""


class MultiheadAttention(Scriptable, nn.MultiheadAttention):
    """Attention over several learned projections at once; a drop-in for `torch.nn.MultiheadAttention`.

    ``MultiHead(Q, K, V) = Concat(head_1, …, head_H) W_O + b_O``, with
    ``head_h = softmax(q_h k_hᵀ / sqrt(D) + mask) v_h`` and ``q_h, k_h, v_h`` linear in Q, K and V.

    Below, N is the batch size, L and S count queries and keys, E = embed_dim, H = num_heads, D = E / H.

    Args:
        embed_dim: E, width of the query and of the output.
        num_heads: H, a divisor of E.
        dropout: probability of dropping an attention weight, in training.
        bias: whether the input and output projections have biases.
        add_bias_kv: append one learned key and value to the projected ones.
        add_zero_attn: append one key and value of zeros to the projected ones.
        kdim, vdim: widths of key and value; None: E.
        batch_first: query, key, value and output are (N, L, E) if True, (L, N, E) if False.
        device, dtype: of the parameters.

    Call ``module(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
    average_attn_weights=True, is_causal=False)`` with:
        query, key, value: (N, L, E), (N, S, kdim), (N, S, vdim), or as batch_first says; unbatched (L, E),
            (S, kdim), (S, vdim). The same tensor passed twice is projected by one matrix product. One strided
            nested tensor may be passed as all three, without masks.
        key_padding_mask: (N, S), or (S,) unbatched. bool, True = hide that key; floating-point is added to the scores.
        attn_mask: (L, S), or (N·H, L, S). bool, True = hide; floating-point is added to the scores.
        is_causal: a promise that attn_mask, which must be given, is the causal mask. As in torch it replaces attn_mask
            (and so the causal kernel runs, aligned top-left) only when there is no key_padding_mask and
            need_weights is False; appended keys (add_bias_kv, add_zero_attn) then count as future ones.
        need_weights: return the attention weights. Those of all heads are held while they are less than 2^26 numbers;
            above, averaged ones are accumulated one head at a time, in memory O(N·L·S). False is faster.
        average_attn_weights: average the weights over the heads.

    Returns of a call: (output, weights). The output has the query's shape. The weights are None, (N, L, S), or
    (N, H, L, S) if not averaged, without N if unbatched; S includes appended keys. As in torch they are the
    weights after dropout. A query that sees no key has weights 0 and attention output 0, where torch may give NaN.

    Raises:
        ContractError: a shape or dtype that is not the above, a nested tensor in another use, or is_causal without
            attn_mask. It is an ArgumentError as well as the AssertionError and the RuntimeError that torch raises in
            its place.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2; interface of torch.nn.MultiheadAttention.

    >>> mha = MultiheadAttention(embed_dim=64, num_heads=4, batch_first=True)
    >>> x = torch.randn(2, 10, 64)
    >>> output, weights = mha(x, x, x)
    >>> output.shape, weights.shape
    (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        # torch's TransformerEncoderLayer computes attention from our weights without calling us, unless we have a hook.
        self.register_forward_pre_hook(_be_called)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self_attention = query is key and key is value
        unmasked = attn_mask is None and key_padding_mask is None and not is_causal
        if self_attention and need_weights and unmasked and self._is_as_fast_in_torch(query):
            return super().forward(query, query, query, average_attn_weights=average_attn_weights)
        if query.is_nested or key.is_nested or value.is_nested:
            if not (self_attention and unmasked) or query.layout != torch.strided or query.dim() != 3:
                raise ContractError(
                    "MultiheadAttention does not support NestedTensor outside of self-attention over one tensor of "
                    "strided layout that holds matrices (L_n, E), without attn_mask and key_padding_mask; pad it and "
                    "pass key_padding_mask instead."
                )
            return self._attend_nested(query, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise ContractError("is_causal says that attn_mask is the causal mask, so attn_mask is needed; it is None.")
        causal = is_causal and key_padding_mask is None and not need_weights
        if causal:
            attn_mask = None
        self._check(query, key, value, key_padding_mask, attn_mask)
        batched = query.dim() == 3
        q, k, v = (self._split_heads(x, batched) for x in self._project(query, key, value))
        k, v = self._append_keys(k, v)
        mask, bias = self._merge_masks(attn_mask, key_padding_mask)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            o, weights = attend_with_weights(q, k, v, bias, mask, dropout_p, average_attn_weights)
            weights = weights if batched else weights.squeeze(0)
        else:
            alignment = "top_left" if causal else False
            o = attention(q, k, v, causal=alignment, bias=bias, mask=mask, dropout_p=dropout_p)
        return self.out_proj(self._join_heads(o, batched)), weights

    def _is_as_fast_in_torch(self, x: Tensor) -> bool:
        """True if torch's module computes self-attention with its weights, without masks, as exactly and no slower."""
        if x.is_nested or x.dim() != 3 or x.shape[-1] != self.embed_dim or not self._qkv_same_embed_dim:
            return False
        L = x.shape[1 if self.batch_first else 0]
        return as_fast_in_torch(self.num_heads * x.shape[0] * x.shape[1] * L, x) and _calls_nothing(self.out_proj)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v, each (…, E); inputs that are the same tensor share one matrix product."""
        E = self.embed_dim
        inputs, sizes = [query, key, value], [E, E, E]
        weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self._qkv_same_embed_dim:
            if query is key and key is value:  # the weight itself: of a part of it, the gradient would be copied
                return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).split(E, dim=-1))
            if key is value:
                inputs, sizes = [query, key], [E, 2 * E]
            weights = self.in_proj_weight.split(sizes)
        bias = self.in_proj_bias
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        return [
            part
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
            for part in F.linear(x, weight, bias).split(E, dim=-1)
        ]

    def _split_heads(self, x: Tensor, batched: bool) -> Tensor:
        """(N, L, E), (L, N, E) or (L, E) to a view (N, H, L, D)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.transpose(1, 2)

    def _join_heads(self, o: Tensor, batched: bool) -> Tensor:
        """(N, H, L, D) to (N, L, E), (L, N, E) or (L, E)."""
        o = o.transpose(1, 2)
        if not batched:
            o = o.squeeze(0)
        elif not self.batch_first:
            o = o.transpose(0, 1)
        return o.flatten(-2)

    @property
    def _appended(self) -> int:
        """Number of keys that belong to the module."""
        return (self.bias_k is not None) + self.add_zero_attn

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (N, H, S, D) followed by the learned key and the zero key, where there are such."""
        if not self._appended:
            return k, v
        N, H, _, D = k.shape
        extended = []
        for x, learned in ((k, self.bias_k), (v, self.bias_v)):
            parts = [x]
            if learned is not None:
                parts.append(learned.to(x.dtype).view(1, H, 1, D).expand(N, H, 1, D))
            if self.add_zero_attn:
                parts.append(x.new_zeros(N, H, 1, D))
            extended.append(torch.cat(parts, dim=2))
        return extended[0], extended[1]

    def _merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(mask, bias) to broadcast to (N, H, L, S): bool ones joined, True = attend, and floating-point ones added."""
        hidden, bias = None, None
        for x in (attn_mask, key_padding_mask):
            if x is None:
                continue
            if x is key_padding_mask:
                x = x.reshape(-1, 1, 1, x.shape[-1])
            elif x.dim() == 3:
                x = x.unflatten(0, (-1, self.num_heads))
            else:
                x = x[None, None]
            x = F.pad(x, (0, self._appended))  # the module's own keys are visible
            if x.dtype == torch.bool:
                hidden = x if hidden is None else hidden | x
            else:
                bias = x if bias is None else bias + x
        return None if hidden is None else ~hidden, bias

    def _attend_nested(self, x: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
        """Self-attention over a nested batch of (L_n, E): pad, hide the padding, nest again. Weights stay padded."""
        lengths = [t.shape[0] for t in x.unbind()]
        if not any(lengths):
            # torch pads no batch of empty sequences.
            heads = () if average else (self.num_heads,)
            empty = x.unbind()[0].new_zeros(len(lengths), *heads, 0, 0)
            return x.clone(), empty if need_weights else None
        padded = x.to_padded_tensor(0.0)  # (N, L, E)
        padding = torch.arange(padded.shape[1]) >= torch.tensor(lengths)[:, None]  # (N, L)
        if not self.batch_first:
            padded = padded.transpose(0, 1)
        o, weights = self.forward(padded, padded, padded, padding.to(x.device), need_weights, None, average)
        if not self.batch_first:
            o = o.transpose(0, 1)
        return torch.nested.as_nested_tensor([o_n[:n] for o_n, n in zip(o, lengths, strict=True)]), weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        n = query.dim()
        if n not in (2, 3):
            raise ContractError(f"Expected `query` to be (L, E) or batched with 3 dimensions, but it is {n}-D.")
        if key.dim() != n or value.dim() != n:
            raise ContractError(
                f"With a {n}-D `query`, expected `key` and `value` to be {n}-D but found {key.dim()}-D and "
                f"{value.dim()}-D tensors respectively."
            )
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != width:
                raise ContractError(f"Expected `{name}` to have width {width} but found shape {_shape(x)}.")
        batched = n == 3
        batch, length = (0, 1) if self.batch_first else (1, 0)
        if not batched:
            length = 0
        N = query.shape[batch] if batched else 1
        L, S = query.shape[length], key.shape[length]
        if key.shape[:-1] != value.shape[:-1] or (batched and key.shape[batch] != N):
            raise ContractError(
                "Expected `key` and `value` to agree in length and batch size, and with `query` in batch size, but "
                f"found shapes {_shape(query)}, {_shape(key)} and {_shape(value)} of query, key and value."
            )
        for name, mask, shapes in (
            ("key_padding_mask", key_padding_mask, [(N, S) if batched else (S,)]),
            ("attn_mask", attn_mask, [(L, S), (N * self.num_heads, L, S)]),
        ):
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise ContractError(f"Expected `{name}` to be bool or floating-point but found dtype {mask.dtype}.")
            shape = next((shape for shape in shapes if len(shape) == mask.dim()), None)
            if shape is None:
                ranks = " or ".join(f"{len(shape)}-D" for shape in shapes)
                separator = " or " if len(shapes) == 1 else ", "
                raise ContractError(
                    f"With a {n}-D `query`, expected `{name}` to be `None`{separator}{ranks} but found {mask.dim()}-D "
                    "tensor instead."
                )
            if _shape(mask) != shape:
                raise ContractError(f"Expected `{name}` shape to be {shape} but found {_shape(mask)}.")


def _be_called(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing: its presence makes torch.nn.TransformerEncoderLayer call the module."""


_be_called.of_fastattn = True  # type: ignore[attr-defined]


def _calls_nothing(out_proj: nn.Module) -> bool:
    """True if torch, which reads the weight and bias and does not call the module, computes what the module does."""
    hooked = out_proj._forward_hooks or out_proj._forward_pre_hooks or out_proj._backward_hooks
    return type(out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear and not hooked


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
