"""What tests of a kernel need: inputs, and a tolerance that comes from the dtype instead of from the author.

A result may be at most twice as far from the float64 result as the same mathematics in eager torch in the same dtype,
plus one rounding of the largest number involved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "heads_inside", "packed", "strided")


def make_inputs(
    *shapes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
    seed: int = 0,
) -> list[Tensor]:
    """Standard normal tensors of these shapes, in the last two dimensions and before laid out as asked.

    contiguous; heads_inside: (B, H, S, D) as a view of (B, S, H, D); packed: views of one buffer (B, S, all widths), as
    a fused projection gives; strided: the last stride is 2, and all others are larger than they need to be.
    """
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [_laid_out(t, layout) for t in values]


def _laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return t
    if layout == "heads_inside":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        B, H, S, D = t.shape
        buffer = torch.full((B, S, 3, H, D), torch.nan, dtype=t.dtype, device=t.device)
        view = buffer[:, :, 1].transpose(1, 2)
    elif layout == "strided":
        shape = [n + 1 for n in t.shape[:-1]] + [2 * t.shape[-1] + 1]
        buffer = torch.full(shape, torch.nan, dtype=t.dtype, device=t.device)
        view = buffer[(*(slice(0, n) for n in t.shape[:-1]), slice(1, None, 2))]
    else:
        raise ValueError(f"`layout` is {layout!r}; it must be one of {', '.join(LAYOUTS)}.")
    view.copy_(t)
    return view


def max_error(actual: Tensor, exact: Tensor) -> float:
    """The largest |actual - exact|; equal infinities are no error, any other difference in what is finite is inf."""
    actual, exact = actual.detach().double(), exact.detach().double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    error = torch.where(same, 0.0, (actual - exact).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return error.max().item() if error.numel() else 0.0


def assert_close(
    actual: Tensor, exact: Tensor, eager: Tensor, name: str = "result", scale: float = 0.0, factor: float = 2.0
) -> float:
    """Hold `actual` to `factor` × the error of `eager` (same dtype) against `exact` (float64), plus one rounding.

    Args:
        actual: what is tested.
        exact: the float64 result.
        eager: the same mathematics in eager torch, in the dtype of `actual`.
        name: what to call it in the message.
        scale: the largest number that rounding acts on, if that is larger than the largest of `exact`.

    Returns:
        The error of `actual` divided by that of `eager` (by one rounding where that is larger).

    Raises:
        AssertionError: with both errors and the bound, or the shapes or dtypes if those differ.
    """
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name} has dtype {actual.dtype}, expected {eager.dtype}"
    finite = exact[exact.isfinite()]
    largest = max(scale, finite.abs().max().item() if finite.numel() else 0.0)
    rounding = torch.finfo(actual.dtype).eps * largest
    ours, theirs = max_error(actual, exact), max_error(eager, exact)
    bound = factor * theirs + rounding
    assert ours <= bound, (
        f"{name} is {ours:.3g} from float64; {factor} × the error of eager torch ({theirs:.3g}) + one rounding "
        f"({rounding:.3g}) allow {bound:.3g}"
    )
    return ours / max(theirs, rounding) if ours > 0.0 else 0.0
