"""Encoder and decoder stacks as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastattn.functional import dropout_add
from fastattn.functional._plan import has_kernels
from fastattn.nn._tracing import Scriptable
from fastattn.nn.attention import MultiheadAttention, _be_called
from fastattn.nn.norm import LayerNorm, RMSNorm

Activation: TypeAlias = str | Callable[[Tensor], Tensor]
Device: TypeAlias = torch.device | str | None

torch.fx.wrap("dropout_add")  # torch.fx records the call


_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_DROP_INS = {nn.MultiheadAttention: MultiheadAttention, nn.LayerNorm: LayerNorm}


class TransformerEncoderLayer(Scriptable, nn.TransformerEncoderLayer):
    """Self-attention, then a feed-forward network; a drop-in for `torch.nn.TransformerEncoderLayer`.

    Post-norm: ``x = norm1(x + attn(x)); y = norm2(x + ff(x))``.
    Pre-norm (norm_first): ``x = x + attn(norm1(x)); y = x + ff(norm2(x))``.
    ``ff(x) = linear2(activation(linear1(x)))``, with dropout after the activation and on each branch.

    Args:
        d_model: E, width of the input and output.
        nhead: attention heads, a divisor of d_model.
        dim_feedforward: width between linear1 and linear2.
        dropout: probability of zeroing an element, and of dropping an attention weight, in training.
        activation: "relu", "gelu" or a function of a tensor.
        layer_norm_eps: eps of both norms.
        batch_first: src is (N, S, E) if True, (S, N, E) if False; unbatched (S, E).
        norm_first: pre-norm if True.
        bias: whether the linear layers, projections and norms have biases.
        device, dtype: of the parameters.

    Call ``module(src, src_mask=None, src_key_padding_mask=None, is_causal=False)`` with:
        src_mask: (S, S) or (N·nhead, S, S). bool, True = hide; floating-point is added to the scores.
        src_key_padding_mask: (N, S), or (S,) unbatched; bool or floating-point likewise.
        is_causal: a promise that src_mask, which must be given, is the causal mask.

    Returns of a call: a tensor of src's shape. torch's own inference kernels are never used, so training and
    evaluation differ by dropout alone.

    Raises:
        ContractError: src or a mask has another shape or dtype, or is_causal without src_mask; it is an
            AssertionError and a RuntimeError, as in torch.
        RuntimeError: activation is another string.

    Source: Vaswani et al. 2017, "Attention Is All You Need"; pre-norm: Xiong et al. 2020, "On Layer Normalization in
    the Transformer Architecture"; interface of torch.nn.TransformerEncoderLayer.

    >>> layer = TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True)
    >>> layer(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        _adopt_children(self)
        # 0 is "neither": torch's TransformerEncoder then gives this layer padded tensors, not nested ones.
        self.activation_relu_or_gelu = 0

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        # torch's forward turns bool masks into floating-point ones. Here they stay bool all the way to the kernel,
        # unless a block or an attention that somebody else wrote receives them.
        if not (_keeps(self, "_sa_block") and _is_our_attention(self.self_attn)):
            src_mask, src_key_padding_mask = _additive(src_mask, src_key_padding_mask, src.dtype, "src_mask")
        mask = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        attend, feed = _self_attention(self, mask), _feed_forward(self, self.dropout2)
        x = src
        if self.norm_first:
            y, x = _add_norm(x, attend(self.norm1(x)), self.norm2)
            return _add(x, feed(y))
        x, _ = _add_norm(x, attend(x), self.norm1)
        x, _ = _add_norm(x, feed(x), self.norm2)
        return x


class TransformerDecoderLayer(Scriptable, nn.TransformerDecoderLayer):
    """Self-attention, attention to an encoder's output, a feed-forward network; a drop-in for torch's.

    Post-norm: ``x = norm1(x + self_attn(x)); x = norm2(x + cross_attn(x, memory)); y = norm3(x + ff(x))``.
    Pre-norm (norm_first): the norm is taken of each branch's input instead.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as of `TransformerEncoderLayer`.

    Call ``module(tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
    memory_key_padding_mask=None, tgt_is_causal=False, memory_is_causal=False)`` with tgt (N, T, E) and memory
    (N, S, E), or as batch_first says, or unbatched. tgt_mask is (T, T) or (N·nhead, T, T), memory_mask (T, S) or
    (N·nhead, T, S), the padding masks (N, T) and (N, S); bool, True = hide, or floating-point, added to the scores.
    tgt_is_causal and memory_is_causal promise that the mask given is the causal one.

    Returns of a call: a tensor of tgt's shape.

    Raises:
        ContractError: an argument of another shape or dtype, or a promise without its mask.
        RuntimeError: activation is a string other than "relu" and "gelu".

    Source: as of `TransformerEncoderLayer`; interface of torch.nn.TransformerDecoderLayer.

    >>> layer = TransformerDecoderLayer(d_model=64, nhead=4, batch_first=True)
    >>> layer(torch.randn(2, 5, 64), torch.randn(2, 10, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        _adopt_children(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        own = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        cross = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask, "is_causal": memory_is_causal}
        attend, attend_memory = _self_attention(self, own), _cross_attention(self, memory, cross)
        feed = _feed_forward(self, self.dropout3)
        x = tgt
        if self.norm_first:
            y, x = _add_norm(x, attend(self.norm1(x)), self.norm2)
            y, x = _add_norm(x, attend_memory(y), self.norm3)
            return _add(x, feed(y))
        x, _ = _add_norm(x, attend(x), self.norm1)
        x, _ = _add_norm(x, attend_memory(x), self.norm2)
        x, _ = _add_norm(x, feed(x), self.norm3)
        return x


class TransformerEncoder(Scriptable, nn.TransformerEncoder):
    """A stack of encoder layers; a drop-in for `torch.nn.TransformerEncoder`.

    ``y = norm(layer_n(… layer_1(src)))``.

    Args:
        encoder_layer: copied num_layers times, parameters and all.
        num_layers: how many copies.
        norm: applied to the last layer's output; None: nothing is.
        enable_nested_tensor, mask_check: accepted for torch's sake. Padding is handled by the attention kernel, so
            inputs are never converted to nested tensors.

    Call ``module(src, mask=None, src_key_padding_mask=None, is_causal=None)``: arguments as of the layer.
    ``is_causal=None`` compares mask with the causal one and, if equal, runs the causal kernel; under torch.compile,
    where values cannot be looked at, mask is used as it is.

    Returns of a call: a tensor of src's shape.

    Raises: what encoder_layer raises.

    Source: Vaswani et al. 2017, "Attention Is All You Need"; interface of torch.nn.TransformerEncoder.

    >>> encoder = TransformerEncoder(TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True), num_layers=2)
    >>> encoder(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        # As in the layer, bool masks stay bool, unless a layer that somebody else wrote receives them; and there is no
        # conversion to nested tensors.
        if is_causal is None:
            is_causal = _is_causal(mask)
        if not all(map(_runs_our_forward, self.layers)):
            mask, src_key_padding_mask = _additive(mask, src_key_padding_mask, src.dtype, "mask")
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(Scriptable, nn.TransformerDecoder):
    """A stack of decoder layers; a drop-in for `torch.nn.TransformerDecoder`.

    ``y = norm(layer_n(… layer_1(tgt, memory) …, memory))``.

    Args:
        decoder_layer: copied num_layers times, parameters and all.
        num_layers: how many copies.
        norm: applied to the last layer's output; None: nothing is.

    Call ``module(tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
    memory_key_padding_mask=None, tgt_is_causal=None, memory_is_causal=False)``: arguments as of the layer;
    ``tgt_is_causal=None`` as is_causal of `TransformerEncoder`.

    Returns of a call: a tensor of tgt's shape.

    Raises: what decoder_layer raises.

    Source: Vaswani et al. 2017, "Attention Is All You Need"; interface of torch.nn.TransformerDecoder.

    >>> decoder = TransformerDecoder(TransformerDecoderLayer(d_model=64, nhead=4, batch_first=True), num_layers=2)
    >>> decoder(torch.randn(2, 5, 64), torch.randn(2, 10, 64)).shape
    torch.Size([2, 5, 64])
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        # torch looks at the mask's values unconditionally, which torch.compile cannot.
        if tgt_is_causal is None:
            tgt_is_causal = _is_causal(tgt_mask)
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )


class Transformer(Scriptable, nn.Transformer):
    """An encoder and a decoder; a drop-in for `torch.nn.Transformer`.

    ``memory = encoder(src); y = decoder(tgt, memory)``, each stack ending in a LayerNorm.

    Args:
        d_model, nhead: as of the layers.
        num_encoder_layers, num_decoder_layers: depth of each stack.
        dim_feedforward, dropout, activation: as of the layers.
        custom_encoder, custom_decoder: modules to use in place of the stacks.
        layer_norm_eps, batch_first, norm_first, bias, device, dtype: as of the layers.

    Call ``module(src, tgt, src_mask=None, tgt_mask=None, memory_mask=None, src_key_padding_mask=None,
    tgt_key_padding_mask=None, memory_key_padding_mask=None, src_is_causal=None, tgt_is_causal=None,
    memory_is_causal=False)``: arguments as of `TransformerEncoder` and `TransformerDecoder`.

    Returns of a call: a tensor of tgt's shape.

    Raises:
        RuntimeError: src and tgt differ in batch size, or their width is not d_model.
        ContractError: what the layers refuse.

    Source: Vaswani et al. 2017, "Attention Is All You Need"; interface of torch.nn.Transformer.

    >>> model = Transformer(d_model=64, nhead=4, num_encoder_layers=1, num_decoder_layers=1, batch_first=True)
    >>> model(torch.randn(2, 10, 64), torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps)
        rest = (batch_first, norm_first, bias, device, dtype)

        # The encoder before the decoder: parameters are drawn in torch's order.
        if custom_encoder is None:
            norm = LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
            custom_encoder = TransformerEncoder(TransformerEncoderLayer(*sizes, *rest), num_encoder_layers, norm)
        if custom_decoder is None:
            norm = LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
            custom_decoder = TransformerDecoder(TransformerDecoderLayer(*sizes, *rest), num_decoder_layers, norm)
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )


def _adopt_children(layer: nn.Module) -> None:
    """Give the attention and norms that torch's constructor built our forward; parameters stay as torch drew them."""
    for child in layer.children():
        if drop_in := _DROP_INS.get(type(child)):
            child.__class__ = drop_in


# A branch of a layer and the dropout that is still to be applied to it, None where it has been.
Branch: TypeAlias = tuple[Tensor, nn.Dropout | None]


def _keeps(layer: nn.Module, block: str) -> bool:
    """Whether `block`, a method that torch's layers call, is torch's still; a subclass or a layer may have its own."""
    if block in layer.__dict__:
        return False
    return any(getattr(type(layer), block) is getattr(base, block) for base in _LAYERS if isinstance(layer, base))


def _additive(
    mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype, name: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return both masks as torch's encoder hands them on: floating-point, -inf where a bool one is True."""
    padding = F._canonical_mask(
        key_padding_mask, "src_key_padding_mask", F._none_or_dtype(mask), other_name=name, target_type=dtype
    )
    return F._canonical_mask(mask, name, None, "", dtype, check_other=False), padding


def _is_our_attention(module: nn.Module) -> bool:
    """True if a call of the module is our attention and nothing more; its own hook does nothing."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return (
        type(module) is MultiheadAttention
        and all(hook is _be_called for hook in hooks)
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
    )


def _runs_our_forward(layer: nn.Module) -> bool:
    """True if a call of the encoder layer is our forward; a subclass may have other blocks, which that hands on to."""
    if getattr(type(layer), "forward", None) is not TransformerEncoderLayer.forward or "forward" in layer.__dict__:
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or _has_any_global_hook())


def _self_attention(layer: Any, mask: dict[str, Any]) -> Callable[[Tensor], Branch]:
    if not _keeps(layer, "_sa_block"):
        *masks, is_causal = mask.values()
        named = {"is_causal": is_causal} if isinstance(layer, nn.TransformerEncoderLayer) else {}  # as torch calls them
        masks += [] if named else [is_causal]
        return lambda x: (layer._sa_block(x, *masks, **named), None)
    return lambda x: (layer.self_attn(x, x, x, need_weights=False, **mask)[0], layer.dropout1)


def _cross_attention(layer: Any, memory: Tensor, mask: dict[str, Any]) -> Callable[[Tensor], Branch]:
    if not _keeps(layer, "_mha_block"):
        return lambda x: (layer._mha_block(x, memory, *mask.values()), None)
    return lambda x: (layer.multihead_attn(x, memory, memory, need_weights=False, **mask)[0], layer.dropout2)


def _feed_forward(layer: Any, dropout: nn.Dropout) -> Callable[[Tensor], Branch]:
    if not _keeps(layer, "_ff_block"):
        return lambda x: (layer._ff_block(x), None)
    return lambda x: (layer.linear2(layer.dropout(layer.activation(layer.linear1(x)))), dropout)


def _is_itself(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a call of the module is its class's forward and nothing more: no subclass, no other forward, no hooks."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in kinds and not hooks and "forward" not in module.__dict__ and not _has_any_global_hook()


def _to_fuse(x: Tensor, branch: Branch) -> tuple[Tensor, float]:
    """The branch and the dropout left to a kernel: that of a plain nn.Dropout, where there are kernels."""
    y, dropout = branch
    if dropout is None:
        return y, 0.0
    if not _is_itself(dropout, (nn.Dropout,)) or dropout.inplace or x.is_nested or not has_kernels(x.device):
        return dropout(y), 0.0
    return y, dropout.p if dropout.training else 0.0


def _add(x: Tensor, branch: Branch) -> Tensor:
    """x + dropout(branch)."""
    y, dropout_p = _to_fuse(x, branch)
    return dropout_add(y, x, dropout_p) if dropout_p else x + y


def _add_norm(x: Tensor, branch: Branch, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """norm(h) and h = x + dropout(branch), in one kernel if the norm is ours and the types are those of torch's."""
    # Of two types h has the wider one, and so does torch's y; ours has that of the branch but under autocast.
    one_type = x.dtype == branch[0].dtype or (
        x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype == torch.float32
    )
    if _is_itself(norm, (LayerNorm, RMSNorm)) and one_type and not x.is_nested:
        y, dropout_p = _to_fuse(x, branch)
        return norm(y, residual=x, dropout_p=dropout_p)
    h = _add(x, branch)
    return norm(h), h


def _is_causal(mask: Tensor | None) -> bool:
    """Whether mask is (S, S) and hides exactly what lies in the future; False where its values are not to be had."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != mask.shape[1] or torch.compiler.is_compiling():
        return False
    return torch.equal(mask, nn.Transformer.generate_square_subsequent_mask(mask.shape[0], mask.device, mask.dtype))
