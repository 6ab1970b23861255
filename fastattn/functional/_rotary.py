"""Rotary position embedding."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor

from fastattn import _arguments as check
from fastattn import backends
from fastattn.errors import ArgumentError, ArgumentTypeError, UnsupportedError, kind
from fastattn.functional._overwrite import check_overwritten, overwritable
from fastattn.functional._plan import cached, facts
from fastattn.ops.rotary import rotary as rotary_op
from fastattn.spec import RotarySpec
from fastattn.tracing import is_plain

FN = "rotary_embedding"


@overload
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def rotary_embedding(
    x: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def rotary_embedding(
    x: Tensor | tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def rotary_embedding(
    x: Tensor | tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotate pairs of elements of each head by angles that grow with the token's position; q and k in one launch.

        y1 = x1 cos − x2 sin,   y2 = x2 cos + x1 sin   for each pair (x1, x2) of the first R elements of D

    Args:
        x: (B, H, S, D), or packed (T, H, D) with `cu_seqlens` or `position_ids`; or a pair (q, k) of these, which may
            differ in H. float16, bfloat16, float32 or float64, any strides: a transposed (B, S, H, D) is read as it
            lies, and the result laid out alike. The arithmetic is in at least float32.
        cos: (S_max, R/2), the row of a token being that of its position; or (B, S, R/2) or (1, S, R/2), chosen for each
            token already. Any floating dtype, any strides. R ≤ D, the other D − R elements pass through.
        sin: shape of cos.
        interleaved: pairs are (2i, 2i + 1), as in GPT-J; False: (i, i + R/2), as in GPT-NeoX and Llama.
        position_ids: (S,) or (B, S), of packed x (T,), int32 or int64: each token's position. A position outside of the
            table is refused where it is seen, on a CPU; on a GPU its token becomes NaN.
        cu_seqlens: (B + 1,) int32 or int64, rising from 0, of packed x: positions restart where sequence b begins, at
            cu_seqlens[b]. Tokens after the last sequence are not rotated. Values are checked on a CPU only.
        inplace: write over x, which is returned and must not overlap itself; nothing of x is kept for gradients. A view
            that gets one, and under transforms and compilers any x, is written over by a copy of the result.
        backend: "cuda", "triton", "cpu", "eager" or "reference", which then never falls back; None: the first that can.

    Returns:
        y, or a pair of these: shape and dtype of x, under autocast too. The gradient of x is the inverse rotation of
        y's. cos and sin have none.

    Memory moved: x is read and y written once, in place only the R rotated elements of a head; cos and sin are read
    once for four heads. The backward moves the same.

    Raises:
        ArgumentTypeError, ArgumentError: an argument of the wrong type, dtype, shape, device or value.
        UnsupportedError: cos or sin requires a gradient; the backend asked for cannot compute it.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Example:
        >>> angles = torch.outer(torch.arange(16.0), 10000.0 ** -torch.arange(0, 1, 2 / 32))
        >>> q, k = torch.randn(2, 8, 16, 32), torch.randn(2, 2, 16, 32)
        >>> q, k = rotary_embedding((q, k), angles.cos(), angles.sin())
        >>> k.shape
        torch.Size([2, 2, 16, 32])
    """
    arguments, q, k = rotary_arguments(x, cos, sin, interleaved, position_ids, cu_seqlens, inplace)
    run, spec = _plan(backend, *arguments)
    check_rotary_values(q, cos, position_ids, cu_seqlens)
    tables = cos, sin, position_ids, None if cu_seqlens is None else check.as_int32(cu_seqlens)
    if run.COMPOSITE:
        rotated = run.rotary_embedding((q,) if k is None else (q, k), *tables, spec)
    else:
        rotated = rotary_op((q, k, *tables), spec, run.NAME)
    if inplace and (run.COMPOSITE or not spec.inplace):
        rotated = tuple(t.copy_(y) for t, y in zip((q,) if k is None else (q, k), rotated, strict=False))
    return rotated[0] if k is None else (rotated[0], rotated[1])


def rotary_arguments(
    x: Any, cos: Any, sin: Any, interleaved: Any, position_ids: Any, cu_seqlens: Any, inplace: Any
) -> tuple[tuple, Tensor, Tensor | None]:
    """What `rotary_spec` takes, of arguments that are checked to be tensors; and x as q and k."""
    if isinstance(x, (tuple, list)):
        if len(x) != 2:
            raise ArgumentError(f"{FN}: `x` is {kind(x)} of {len(x)}; it must be a tensor, or a pair (q, k) of them.")
        tensors = {"q": x[0], "k": x[1]}
    else:
        tensors = {"x": x}
    for name, t in {**tensors, "cos": cos, "sin": sin}.items():
        check.check_tensor(FN, name, t)
    q, k = (*tensors.values(), None)[:2]
    check.check_tensor(FN, "position_ids", position_ids, optional=True)
    if cu_seqlens is not None:
        check.check_cu_seqlens(FN, "cu_seqlens", cu_seqlens, q.device)
    check.check_bool(FN, "interleaved", interleaved)
    check.check_bool(FN, "inplace", inplace)
    for name, t in (("cos", cos), ("sin", sin)):
        if t.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(f"{FN}: `{name}` requires a gradient, which is not computed; detach it.")
    if inplace:
        check_overwritten(FN, tensors)
        if k is q:
            raise ArgumentError(f"{FN}: `q` and `k` are one tensor, which cannot be written over twice.")
        inplace = overwritable(tensors.values(), cos, sin, position_ids, cu_seqlens)
    given = tuple(facts(t) for t in (q, k, cos, sin, position_ids, cu_seqlens))
    return (*given, tuple(map(_tokens_first, tensors.values())), interleaved, inplace), q, k


def _tokens_first(t: Tensor) -> bool:
    """Whether the heads of a token lie closer together than the tokens of a head."""
    if t.dim() < 3:
        return False
    return bool(t.stride(-3) > t.stride(-2)) if t.dim() == 3 else bool(t.stride(-2) > t.stride(-3))


@cached
def _plan(backend, *arguments) -> tuple[ModuleType, RotarySpec]:
    spec = rotary_spec(*arguments)
    return backends.select(spec, arguments[0][2], backend), spec


def rotary_spec(q, k, cos, sin, position_ids, cu_seqlens, tokens_first, interleaved, inplace) -> RotarySpec:
    """The first six are (shape, dtype, device), or None."""
    name = "x" if k is None else "q"
    shape, dtype, device = q
    check.check_float_dtype(FN, name, dtype)
    if len(shape) not in (3, 4):
        raise ArgumentError(f"{FN}: `{name}` has shape {tuple(shape)}; it must be (B, H, S, D), or packed (T, H, D).")
    packed = len(shape) == 3
    if packed and position_ids is None and cu_seqlens is None:
        raise ArgumentError(
            f"{FN}: `{name}` has shape {tuple(shape)}, packed (T, H, D); it needs `cu_seqlens` or `position_ids`."
        )
    if cu_seqlens is not None and not packed:
        raise ArgumentError(f"{FN}: `{name}` has shape {tuple(shape)}; with `cu_seqlens` it must be packed (T, H, D).")
    if cu_seqlens is not None and position_ids is not None:
        raise ArgumentError(f"{FN}: `cu_seqlens` and `position_ids` both say where tokens are; give one of them.")
    if k is not None:
        _check_pair(q, k)
    B, S = (1, shape[0]) if packed else (shape[0], shape[2])
    _check_tables(name, q, cos, sin, B, S, positions=position_ids is not None or packed)
    if position_ids is not None:
        _check_position_ids(name, position_ids, B, S, packed, device)
    sizes = tuple(tuple(t[0]) for t in (q, k) if t is not None)
    return RotarySpec(dtype, sizes, tokens_first, interleaved, inplace)


def _check_pair(q, k) -> None:
    check.same_float_dtype(FN, ("q", "k"), (q[1], k[1]), (q[2], k[2]))
    heads = -2 if len(q[0]) == 3 else -3
    rest_q, rest_k = (tuple(size for i, size in enumerate(t[0]) if i - len(t[0]) != heads) for t in (q, k))
    if len(q[0]) != len(k[0]) or rest_q != rest_k:
        raise ArgumentError(
            f"{FN}: `k` has shape {tuple(k[0])} and `q` has {tuple(q[0])}; they may differ in the number of heads only."
        )


def _check_tables(name: str, q, cos, sin, B: int, S: int, positions: bool) -> None:
    """cos and sin against (B, H, S, D) or packed tokens; `positions`: rows are chosen by other ones than 0 to S."""
    for table, (_, dtype, device) in (("cos", cos), ("sin", sin)):
        check.check_float_dtype(FN, table, dtype)
        check.check_same_device(FN, table, device, name, q[2])
    shape = tuple(cos[0])
    if tuple(sin[0]) != shape:
        raise ArgumentError(f"{FN}: `sin` has shape {tuple(sin[0])} and `cos` has {shape}; they must be equal.")
    if len(shape) not in (2, 3) or (len(shape) == 3 and positions):
        also = "" if positions else ", or (B, S, R/2)"
        raise ArgumentError(f"{FN}: `cos` has shape {shape}; it must be (S_max, R/2){also}.")
    R, D = 2 * shape[-1], q[0][-1]
    if not 0 < R <= D:
        raise ArgumentError(
            f"{FN}: `cos` has {shape[-1]} columns, for R = {R} rotated elements of a head; "
            f"R must be 2 to D = {D}, the width of `{name}`."
        )
    if len(shape) == 3 and (shape[0] not in (1, B) or shape[1] != S):
        raise ArgumentError(
            f"{FN}: `cos` has shape {shape}; for `{name}` it must be (B, S, R/2) = ({B}, {S}, {R // 2})."
        )
    if len(shape) == 2 and not positions and shape[0] < S:
        raise ArgumentError(
            f"{FN}: `cos` has {shape[0]} rows, one for each position, and `{name}` has S = {S} tokens; "
            "there must be a row for each."
        )
    if shape[-2] == 0 and S > 0:
        raise ArgumentError(f"{FN}: `cos` has no rows; it must be (S_max, R/2), a row for each position.")


def _check_position_ids(name: str, position_ids, B: int, S: int, packed: bool, device: torch.device) -> None:
    shape, dtype, own = position_ids
    if dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError(f"{FN}: `position_ids` has dtype {check.dtype_name(dtype)}; it must be int32 or int64.")
    check.check_same_device(FN, "position_ids", own, name, device)
    if tuple(shape) not in ((S,),) if packed else tuple(shape) not in ((S,), (B, S)):
        accepted = f"(T,) = ({S},)" if packed else f"(S,) = ({S},) or (B, S) = ({B}, {S})"
        raise ArgumentError(f"{FN}: `position_ids` has shape {tuple(shape)}; it must be {accepted}.")


def check_rotary_values(q: Tensor, cos: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Positions against the table, where they lie on a CPU and are no compiler's."""
    rows = cos.shape[-2]
    if position_ids is not None and position_ids.is_cpu and is_plain(position_ids) and position_ids.numel():
        low, high = (int(end) for end in torch.aminmax(position_ids))
        if low < 0 or high >= rows:
            raise ArgumentError(
                f"{FN}: `position_ids` runs from {low} to {high}; `cos` has rows for positions 0 to {rows - 1}."
            )
    if cu_seqlens is not None and cu_seqlens.is_cpu and is_plain(cu_seqlens):
        bounds = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in pairwise(bounds)]
        if bounds[0] != 0 or min(lengths, default=0) < 0 or bounds[-1] > q.shape[0]:
            raise ArgumentError(
                f"{FN}: `cu_seqlens` runs from {bounds[0]} to {bounds[-1]} with a shortest sequence of "
                f"{min(lengths, default=0)}; it must rise from 0 to at most T = {q.shape[0]}."
            )
        if max(lengths, default=0) > rows:
            raise ArgumentError(
                f"{FN}: `cu_seqlens` has a sequence of {max(lengths)}; `cos` has rows for positions 0 to {rows - 1}."
            )
