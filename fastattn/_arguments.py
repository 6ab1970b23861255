"""From the caller's keywords to a spec: every check of the public functions, each error a sentence.

The `*_spec` functions see shapes, dtypes and plain values, not tensors, so that their answers can be kept.
"""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.errors import ArgumentError, ArgumentIndexError, ArgumentTypeError, UnsupportedError, kind
from fastattn.spec import AttentionSpec, NormSpec, SoftmaxSpec
from fastattn.tracing import is_plain, known_true, may_be_true

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST_FLOAT: Any = sys.float_info.max
FARTHEST = 2**62  # a window as wide hides nothing, and sums of positions with it would pass int64
_ALIGNMENTS = ("top_left", "bottom_right")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(fn: str, name: str, value: Any, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, Tensor):
        accepted = "a torch.Tensor or None" if optional else "a torch.Tensor"
        raise ArgumentTypeError(f"{fn}: `{name}` is {kind(value)}; it must be {accepted}.")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ArgumentTypeError(f"{fn}: `{name}` has layout {layout}; it must be strided.")


def is_causal_bias(t: Any) -> bool:
    """True for a tensor without numbers that torch.nn.attention.bias's causal_upper_left or causal_lower_right made."""
    if type(t) is Tensor:
        return False
    from torch.nn.attention.bias import CausalBias

    return isinstance(t, CausalBias)


def check_float_dtype(fn: str, name: str, dtype: torch.dtype, also: tuple[torch.dtype, ...] = ()) -> None:
    if dtype not in (*also, *FLOAT_DTYPES):
        accepted = ", ".join(dtype_name(d) for d in (*also, *FLOAT_DTYPES))
        raise ArgumentTypeError(f"{fn}: `{name}` has dtype {dtype_name(dtype)}; it must be one of {accepted}.")


def check_same_device(fn: str, name: str, device: torch.device, first: str, expected: torch.device) -> None:
    if device != expected:
        raise ArgumentError(f"{fn}: `{name}` is on {device} and `{first}` on {expected}; they must be on one device.")


def check_real(fn: str, name: str, value: Any, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        accepted = "a number or None" if optional else "a number"
        raise ArgumentTypeError(f"{fn}: `{name}` is {kind(value)}; it must be {accepted}.")
    if not -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT:  # comparisons, which a compiler can trace
        given = "an int beyond float64" if isinstance(value, int) else value
        raise ArgumentError(f"{fn}: `{name}` is {given}; it must be finite.")


def check_bool(fn: str, name: str, value: Any) -> bool:
    """Return the truth value of True, False or one of numpy's."""
    if isinstance(value, bool):
        return value
    if not is_numpy_bool(value):
        raise ArgumentTypeError(f"{fn}: `{name}` is {kind(value)}; it must be True or False.")
    return bool(value)


def is_numpy_bool(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")


def integer(value: Any) -> Any:
    """Return an int or SymInt as it is, an integer of another type (numpy's) as an int, and None for all else."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    if isinstance(value, Tensor):  # its value may change, and what is planned for a call is remembered
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_dropout_p(fn: str, value: Any) -> None:
    check_real(fn, "dropout_p", value)
    if not 0.0 <= value <= 1.0:
        raise ArgumentError(f"{fn}: `dropout_p` is {value}; it must be a probability between 0 and 1.")


def check_broadcast(fn: str, name: str, shape: Sequence[int], target: Sequence[int], axes: str) -> None:
    fits = len(shape) <= len(target) and all(
        known_true(a == 1) or may_be_true(a == b) for a, b in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ArgumentError(
            f"{fn}: `{name}` has shape {tuple(shape)}, which does not broadcast to {axes} = {tuple(target)}."
        )


def alignment(fn: str, causal: Any, S_q: int, S_k: int) -> tuple[bool, bool]:
    """-> (is it causal, is the diagonal top-left)."""
    if not isinstance(causal, (bool, str)) and is_numpy_bool(causal):
        causal = bool(causal)
    if causal is False:
        return False, False
    if causal is True:
        if S_q != S_k:
            raise ArgumentError(
                f"{fn}: `causal=True` is ambiguous for S_q = {S_q} and S_k = {S_k}; "
                'say causal="top_left" (row i sees keys up to i) or "bottom_right" (the last row sees the last key).'
            )
        return True, False
    if isinstance(causal, str) and causal in _ALIGNMENTS:
        return True, causal == "top_left"
    error, given = (ArgumentError, repr(causal)) if isinstance(causal, str) else (ArgumentTypeError, kind(causal))
    raise error(f'{fn}: `causal` is {given}; it must be False, True, "top_left" or "bottom_right".')


def window_sides(fn: str, window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        given = f"{kind(window)} of {len(window)}" if isinstance(window, (tuple, list)) else kind(window)
        raise ArgumentTypeError(
            f"{fn}: `window` is {given}; it must be None or a pair (left, right), None for unbounded."
        )
    return _window_side(fn, "left", window[0]), _window_side(fn, "right", window[1])


def _window_side(fn: str, name: str, given: Any) -> int | None:
    if given is None:
        return None
    if (side := integer(given)) is None:
        raise ArgumentTypeError(
            f"{fn}: the {name} side of `window` is {kind(given)}; it must be an int, or None for unbounded."
        )
    if side < 0:
        raise ArgumentError(
            f"{fn}: the {name} side of `window` is {side}; it must be 0 or more, or None for unbounded."
        )
    return None if isinstance(side, int) and side >= FARTHEST else side


def attention_shapes(fn: str, q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> None:
    for name, shape, axes in (
        ("q", q, "(B, H, S_q, D)"),
        ("k", k, "(B, H_kv, S_k, D)"),
        ("v", v, "(B, H_kv, S_k, D_v)"),
    ):
        if len(shape) != 4:
            raise ArgumentError(f"{fn}: `{name}` has shape {tuple(shape)}; it must have four dimensions {axes}.")
    for name, shape, other, expected, dim, axis in (
        ("k", k, "q", q, 0, "batch size"),
        ("v", v, "q", q, 0, "batch size"),
        ("v", v, "k", k, 1, "number of heads"),
        ("v", v, "k", k, 2, "sequence length"),
        ("k", k, "q", q, 3, "head dimension"),
    ):
        if shape[dim] != expected[dim]:
            raise ArgumentError(
                f"{fn}: `{name}` has {axis} {shape[dim]} and `{other}` has {expected[dim]}; they must be equal."
            )
    if (q[1] != 0) if k[1] == 0 else (q[1] % k[1] != 0):
        raise ArgumentError(
            f"{fn}: `q` has {q[1]} heads and `k` has {k[1]}; H must be a multiple of H_kv (grouped-query attention)."
        )


def same_float_dtype(
    fn: str,
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    devices: Sequence[torch.device],
    also: tuple[torch.dtype, ...] = (),
) -> None:
    check_float_dtype(fn, names[0], dtypes[0], also)
    for name, dtype, device in zip(names[1:], dtypes[1:], devices[1:], strict=True):
        if dtype != dtypes[0]:
            raise ArgumentTypeError(
                f"{fn}: `{name}` has dtype {dtype_name(dtype)} and `{names[0]}` has {dtype_name(dtypes[0])}; "
                "they must be equal."
            )
        check_same_device(fn, name, device, names[0], devices[0])


class Sequences(NamedTuple):
    """Where packed sequences begin and end, and how long they are at most."""

    cu_seqlens_q: Tensor  # (B + 1,) int32, contiguous
    cu_seqlens_k: Tensor
    max_seqlen_q: int | Tensor
    max_seqlen_k: int | Tensor

    @property
    def B(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1


def sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> Sequences:
    """The checked arguments of packed sequences; values that are on a CPU, and no compiler's, are looked at."""
    fn = "varlen_attention"
    for name, t, axes in (("q", q, "(T_q, H, D)"), ("k", k, "(T_k, H_kv, D)"), ("v", v, "(T_k, H_kv, D_v)")):
        check_tensor(fn, name, t)
        if t.dim() != 3:
            raise ArgumentError(f"{fn}: `{name}` has shape {tuple(t.shape)}; it must have three dimensions {axes}.")
    cu = []
    for side, t, longest, rows in (
        ("q", cu_seqlens_q, max_seqlen_q, q.shape[0]),
        ("k", cu_seqlens_k, max_seqlen_k, k.shape[0]),
    ):
        check_cu_seqlens(fn, f"cu_seqlens_{side}", t, q.device)
        check_max_seqlen(fn, f"max_seqlen_{side}", longest)
        if t.is_cpu and is_plain(t):
            check_lengths(fn, side, t, longest, rows)
        cu.append(as_int32(t))
    if cu[0].shape != cu[1].shape:
        raise ArgumentError(
            f"{fn}: `cu_seqlens_k` has {cu[1].shape[0]} entries and `cu_seqlens_q` has {cu[0].shape[0]}; "
            "both must have one more than there are sequences."
        )
    return Sequences(cu[0], cu[1], max_seqlen_q, max_seqlen_k)


def check_seqused(sequences: Sequences, seqused_q: Any, seqused_k: Any, bounds: tuple[Tensor, Tensor]) -> None:
    """Check how many rows of each sequence count; `bounds` are cu_seqlens of q and k as they were given."""
    fn = "varlen_attention"
    for side, used, cu_seqlens in zip("qk", (seqused_q, seqused_k), bounds, strict=True):
        name = f"seqused_{side}"
        check_tensor(fn, name, used, optional=True)
        if used is None:
            continue
        if used.dtype not in (torch.int32, torch.int64):
            raise ArgumentTypeError(f"{fn}: `{name}` has dtype {dtype_name(used.dtype)}; it must be int32 or int64.")
        check_same_device(fn, name, used.device, "q", cu_seqlens.device)
        if tuple(used.shape) != (sequences.B,):
            raise ArgumentError(
                f"{fn}: `{name}` has shape {tuple(used.shape)}; it must be (B,) = ({sequences.B},): one number for "
                "each sequence."
            )
        if used.is_cpu and is_plain(used, cu_seqlens):
            for b, (n, length) in enumerate(zip(used.tolist(), cu_seqlens.diff().tolist(), strict=True)):
                if not 0 <= n <= length:
                    raise ArgumentError(
                        f"{fn}: `{name}` is {n} for sequence {b}, which has {length} rows; it must be between 0 and "
                        "that."
                    )


def as_int32(cu_seqlens: Tensor) -> Tensor:
    """Return checked bounds as the kernels read them: contiguous, in the dtype that they count rows in."""
    return cu_seqlens.int().contiguous()


def check_cu_seqlens(fn: str, name: str, t: Any, device: torch.device) -> None:
    check_tensor(fn, name, t)
    if t.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError(f"{fn}: `{name}` has dtype {dtype_name(t.dtype)}; it must be int32 or int64.")
    check_same_device(fn, name, t.device, "q", device)
    if t.dim() != 1 or t.shape[0] == 0:
        raise ArgumentError(
            f"{fn}: `{name}` has shape {tuple(t.shape)}; it must be (B + 1,): where each of B sequences begins, "
            "and where the last ends."
        )


def check_max_seqlen(fn: str, name: str, value: Any) -> None:
    accepted = "an int, or an integer tensor of one element"
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ArgumentTypeError(
                f"{fn}: `{name}` is a tensor of dtype {dtype_name(value.dtype)}; it must be {accepted}."
            )
        if value.numel() != 1:
            raise ArgumentError(f"{fn}: `{name}` is a tensor of shape {tuple(value.shape)}; it must be {accepted}.")
    elif integer(value) is None:
        raise ArgumentTypeError(f"{fn}: `{name}` is {kind(value)}; it must be {accepted}.")
    elif value < 0:
        raise ArgumentError(f"{fn}: `{name}` is {value}; it must be 0 or more.")


def check_lengths(fn: str, side: str, cu_seqlens: Tensor, longest: int | Tensor, rows: int) -> None:
    """The values of cu_seqlens against T and against max_seqlen."""
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if bounds[0] != 0 or min(lengths, default=0) < 0 or bounds[-1] > rows:
        raise ArgumentError(
            f"{fn}: `cu_seqlens_{side}` runs from {bounds[0]} to {bounds[-1]} with a shortest sequence of "
            f"{min(lengths, default=0)}; it must rise from 0 to at most T_{side} = {rows}."
        )
    bound = known_length(longest)
    if bound is not None and bound < max(lengths, default=0):
        raise ArgumentError(
            f"{fn}: `max_seqlen_{side}` is {bound} and `cu_seqlens_{side}` has a sequence of {max(lengths)}; "
            "it must be the longest of them, or more."
        )


def known_length(longest: int | Tensor) -> int | None:
    """The value of max_seqlen; None for a tensor that cannot be read without stopping a stream or a compiler."""
    if isinstance(longest, Tensor):
        return int(longest) if longest.is_cpu and is_plain(longest) else None
    return longest


def packed_alignment(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k) -> str:
    """causal=True for packed sequences: only where both sides are known to have the same lengths."""
    for name, of_q, of_k in (("cu_seqlens", cu_seqlens_q, cu_seqlens_k), ("seqused", seqused_q, seqused_k)):
        if of_q is not of_k:
            raise ArgumentError(
                f"varlen_attention: `causal=True` is ambiguous unless `{name}_k` is the same tensor as `{name}_q`; "
                'say causal="top_left" (row i of a sequence sees its keys up to i) or "bottom_right" (the last row '
                "sees the last key)."
            )
    return "bottom_right"


def attention_spec(
    fn, shapes, dtypes, devices, causal, window, scale, softcap, dropout_p, deterministic, present
) -> AttentionSpec:
    """Three are of q, k and v; `present` says which of (bias, mask, alibi_slopes, sinks, cu_seqlens) were given."""
    q, k, v = shapes
    attention_shapes(fn, q, k, v)
    same_float_dtype(fn, ("q", "k", "v"), dtypes, devices, also=(torch.float8_e4m3fn,))
    check_real(fn, "scale", scale, optional=True)
    check_real(fn, "softcap", softcap, optional=True)
    if softcap is not None and softcap <= 0:
        raise ArgumentError(f"{fn}: `softcap` is {softcap}; it must be positive, or None for no cap.")
    check_dropout_p(fn, dropout_p)
    check_bool(fn, "deterministic", deterministic)
    is_causal, top_left = alignment(fn, causal, q[2], k[2])
    left, right = window_sides(fn, window)
    if is_causal:
        right = 0 if right is None else min(right, 0)
    bias, mask, alibi, sinks, varlen = present
    D = q[3] or 1  # scores of no width are 0: `widened` makes them those of a column of zeros
    return AttentionSpec(
        H=q[1],
        H_kv=k[1],
        D=D,
        D_v=v[3],
        dtype=dtypes[0],
        scale=D**-0.5 if scale is None else float(scale),
        left=left,
        right=right,
        top_left=top_left,
        softcap=None if softcap is None else float(softcap),
        dropout_p=float(dropout_p),
        bias=bias,
        mask=mask,
        alibi=alibi,
        sinks=sinks,
        varlen=varlen,
        deterministic=deterministic,
    )


def widened(t: Tensor) -> Tensor:
    """Return q or k as `attention_spec` describes it: a head dimension of 0 becomes a column of zeros."""
    return t if t.shape[3] else torch.nn.functional.pad(t, (0, 1))


def check_attention_features(
    fn: str, q: Tensor, k: Tensor, bias, mask, alibi_slopes, sinks, packed: Sequences | None = None
) -> None:
    """The optional tensors of attention against the shapes of q and k, or of packed sequences."""
    B, H = q.shape[:2]
    lengths: tuple[int | None, ...] = (q.shape[2], k.shape[2])
    axes = "(B, H, S_q, S_k)"
    if packed is not None:
        B, axes = packed.B, "(B, H, max_seqlen_q, max_seqlen_k)"
        lengths = known_length(packed.max_seqlen_q), known_length(packed.max_seqlen_k)
    for name, t in (("bias", bias), ("mask", mask), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if t is None:
            continue
        if is_causal_bias(t):
            raise ArgumentTypeError(
                f"{fn}: `{name}` is a CausalBias, which holds no numbers; say `causal` instead, "
                '"top_left" or "bottom_right".'
            )
        check_tensor(fn, name, t, optional=True)
        check_same_device(fn, name, t.device, "q", q.device)
        if name == "mask":
            if t.dtype != torch.bool:
                raise ArgumentTypeError(
                    f"{fn}: `mask` has dtype {dtype_name(t.dtype)}; it must be bool, True where a row attends to a key "
                    "(an additive mask is `bias`)."
                )
        elif name == "bias" and t.dtype == torch.bool:
            raise ArgumentTypeError(f"{fn}: `bias` has dtype bool; it must be floating (a bool mask is `mask`).")
        else:
            check_float_dtype(fn, name, t.dtype)
        if name in ("bias", "mask"):
            sizes = zip((B, H, *lengths), ((1,) * 4 + tuple(t.shape))[-4:], strict=True)
            target = tuple(own if size is None else size for size, own in sizes)
            check_broadcast(fn, name, t.shape, target, axes)
    if alibi_slopes is not None and alibi_slopes.shape not in ((H,), (B, H)):
        raise ArgumentError(
            f"{fn}: `alibi_slopes` has shape {tuple(alibi_slopes.shape)}; "
            f"it must be (H,) = ({H},) or (B, H) = ({B}, {H})."
        )
    if sinks is not None and sinks.shape != (H,):
        raise ArgumentError(f"{fn}: `sinks` has shape {tuple(sinks.shape)}; it must be (H,) = ({H},).")


def fp8_scales(fn: str, spec: AttentionSpec, B: int, tensors: Sequence[Tensor | None], scales: dict[str, Any]):
    """-> (qk_scales (B, H), v_scales (B, H_kv)) of 8-bit inputs; (None, None) of others, which have none.

    `tensors` are all that a gradient could be wanted of; `scales` are q_scale, k_scale and v_scale.
    """
    if not spec.fp8:
        for name, scale in scales.items():
            if scale is not None:
                raise ArgumentError(
                    f"{fn}: `{name}` is {kind(scale)}, but `q`, `k` and `v` have dtype {dtype_name(spec.dtype)}; "
                    "only float8_e4m3fn inputs have scales."
                )
        return None, None
    for name, scale in scales.items():
        check_tensor(fn, name, scale, optional=True)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, *scales.values())):
        raise UnsupportedError(
            f"{fn}: float8_e4m3fn inputs have a forward only, and an input requires a gradient; "
            "use torch.no_grad() or detach it."
        )
    device = next(t.device for t in tensors if t is not None)
    full = []
    for (name, scale), heads, axis in zip(
        scales.items(), (spec.H, spec.H_kv, spec.H_kv), ("H", "H_kv", "H_kv"), strict=True
    ):
        if scale is None:
            full.append(torch.ones(B, heads, device=device))
            continue
        check_same_device(fn, name, scale.device, "q", device)
        if scale.dtype != torch.float32:
            raise ArgumentTypeError(f"{fn}: `{name}` has dtype {dtype_name(scale.dtype)}; it must be float32.")
        if scale.shape not in ((heads,), (B, heads)):
            raise ArgumentError(
                f"{fn}: `{name}` has shape {tuple(scale.shape)}; "
                f"it must be ({axis},) = ({heads},) or (B, {axis}) = ({B}, {heads})."
            )
        full.append(scale.expand(B, heads))
    q_scale, k_scale, v_scale = full
    return (q_scale * k_scale.repeat_interleave(spec.G, 1)).contiguous(), v_scale.contiguous()


def row_shape(fn: str, normalized_shape: Any) -> tuple:
    """The last dimensions of x that a norm runs over, one for an integer."""
    if (size := integer(normalized_shape)) is not None:
        return (size,)
    if not isinstance(normalized_shape, (tuple, list)):
        raise ArgumentTypeError(
            f"{fn}: `normalized_shape` is {kind(normalized_shape)}; it must be an int or a list or tuple of ints."
        )
    return tuple(normalized_shape)


def norm_spec(
    fn: str, x: tuple, normalized_shape: tuple, weight: tuple | None, bias: tuple | None, residual: tuple | None,
    eps: Any, dropout_p: Any, weight_offset: Any, memory_efficient: Any, out_dtype: torch.dtype | None,
) -> NormSpec:  # fmt: skip
    """`normalized_shape` comes from `row_shape`; tensors are (shape, dtype, device), or None."""
    x_shape, x_dtype, x_device = x
    check_float_dtype(fn, "x", x_dtype)
    for n in normalized_shape:
        if integer(n) is None:
            raise ArgumentTypeError(
                f"{fn}: `normalized_shape` holds {kind(n)}; it must be an int or a list or tuple of ints."
            )
    if not normalized_shape or tuple(x_shape[-len(normalized_shape) :]) != normalized_shape:
        raise ArgumentError(
            f"{fn}: `normalized_shape` is {normalized_shape}, but `x` has shape {tuple(x_shape)}; "
            "it must be the last dimensions of x, at least one."
        )
    if eps is None and fn == "rms_norm":
        eps = torch.finfo(torch.promote_types(x_dtype, torch.float32)).eps
    check_real(fn, "eps", eps)
    if eps < 0:
        raise ArgumentError(f"{fn}: `eps` is {eps}; it must be 0 or more.")
    check_dropout_p(fn, dropout_p)
    check_real(fn, "weight_offset", weight_offset)
    check_bool(fn, "memory_efficient", memory_efficient)
    required = {"weight": normalized_shape, "bias": normalized_shape, "residual": tuple(x_shape)}
    called = {"weight": "normalized_shape", "bias": "normalized_shape", "residual": "the shape of x"}
    for name, facts in (("weight", weight), ("bias", bias), ("residual", residual)):
        if facts is None:
            continue
        shape, dtype, device = facts
        check_float_dtype(fn, name, dtype)
        check_same_device(fn, name, device, "x", x_device)
        if tuple(shape) != required[name]:
            raise ArgumentError(
                f"{fn}: `{name}` has shape {tuple(shape)}; it must be {called[name]} = {required[name]}."
            )
    if dropout_p and residual is None:
        raise ArgumentError(
            f"{fn}: `dropout_p` is {dropout_p} without a residual; it drops what is added to `residual`, so give one."
        )
    if weight_offset and weight is None:
        raise ArgumentError(f"{fn}: `weight_offset` is {weight_offset} without a weight to add it to; give `weight`.")
    return NormSpec(
        dtype=x_dtype,
        weight_dtype=None if weight is None else weight[1],
        bias_dtype=None if bias is None else bias[1],
        eps=float(eps),
        n_dims=len(normalized_shape),
        rms=fn == "rms_norm",
        weight_offset=float(weight_offset),
        residual_dtype=None if residual is None else residual[1],
        dropout_p=float(dropout_p),
        memory_efficient=memory_efficient,
        out_dtype=out_dtype,
    )


def softmax_spec(fn: str, x: Sequence[int], dtype, dim, scale, causal, mask: bool, inplace: bool) -> SoftmaxSpec:
    check_float_dtype(fn, "x", dtype)
    if (known := integer(dim)) is None:
        raise ArgumentTypeError(f"{fn}: `dim` is {kind(dim)}; it must be an int.")
    dim = known
    n = max(len(x), 1)  # a 0-d tensor counts as one of length 1, as in torch
    if not -n <= dim < n:
        raise ArgumentIndexError(
            f"{fn}: `dim` is {dim}; for an x of {len(x)} dimensions it must lie between {-n} and {n - 1}."
        )
    check_real(fn, "scale", scale)
    dim = dim if dim < 0 else dim - n
    is_causal = top_left = False
    if causal is not False:
        if len(x) < 2 or dim != -1:
            raise ArgumentError(
                f"{fn}: `causal` needs x (…, S_q, S_k) and dim=-1; x has shape {tuple(x)} and `dim` is {dim}."
            )
        is_causal, top_left = alignment(fn, causal, x[-2], x[-1])
    return SoftmaxSpec(dtype, dim, float(scale), fn == "log_softmax", mask, is_causal, top_left, inplace)
