"""What tests of a kernel need: inputs, and a tolerance that comes from the dtype instead of from the author.

A result may be at most twice as far from the float64 result as the same formula with every operation rounded to the
dtype, plus one rounding of the largest number involved. The rounding is simulated (`simulate_rounding`), so the
tolerance is the same on every machine and does not depend on the luck of one computation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastattn.simulated_rounding import SimulatedRounding

ENOUGH = 32  # numbers whose root mean square, and whose largest error, is not left to chance
MANY = 10_000  # numbers that take long to compute often
LAYOUTS = ("contiguous", "heads_inside", "packed", "strided")


def make_inputs(
    *shapes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
    seed: int = 0,
) -> list[Tensor]:
    """Standard normal tensors of these shapes, in the last two dimensions and before laid out as asked.

    FASTATTN_TEST_SEED in the environment is added to `seed`: the same tests on other numbers.

    contiguous; heads_inside: (B, H, S, D) as a view of (B, S, H, D); packed: views of one buffer (B, S, all widths), as
    a fused projection gives; strided: the last stride is 2, and all others are larger than they need to be.
    """
    generator = torch.Generator().manual_seed(seed + int(os.environ.get("FASTATTN_TEST_SEED", "0")))
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
    """Return the largest |actual - exact|: 0 for equal infinities, inf where only one of them is finite."""
    errors = _errors(actual, exact)
    return errors.max().item() if errors.numel() else 0.0


def rms_error(actual: Tensor, exact: Tensor) -> float:
    """Return the root mean square of actual - exact, or inf if one of them is not finite."""
    return _root_mean_square(_errors(actual, exact))


def _errors(actual: Tensor, exact: Tensor) -> Tensor:
    actual, exact = actual.detach().double(), exact.detach().double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    return torch.where(same, 0.0, (actual - exact).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def simulate_rounding(function: Callable[[], Any], draws: int | None = None) -> Any:
    """Return what `function` returns, with `draws` roundings of each tensor stacked in a new first dimension.

    By default there are 2 draws, and 8 where a tensor has few numbers and all together are not many: the largest error
    of few numbers is left to chance.

    Every operation of torch that `function` calls, a backward pass too, is computed in float64 and rounded to the dtype
    that it returns, up or down at random (`fastattn.simulated_rounding`). The numbers are the same on every machine.

    Example:
        >>> x = torch.randn(4, 8)
        >>> simulate_rounding(lambda: x.softmax(-1)).shape
        torch.Size([2, 4, 8])
    """
    results: list[Any] = []
    while len(results) < (draws or _draws(results)):
        with SimulatedRounding(draw=len(results)):
            results.append(function())
    return tree_map(lambda *same: torch.stack(same) if isinstance(same[0], Tensor) else same[0], *results)


def _draws(results: Sequence[Any]) -> int:
    sizes = [t.numel() for t in tree_leaves(results[:1]) if isinstance(t, Tensor) and t.numel()]
    return 8 if min(sizes, default=ENOUGH) < ENOUGH and sum(sizes) < MANY else 2


def assert_close(
    actual: Tensor, exact: Tensor, rounded: Tensor, name: str = "result", scale: float = 0.0, factor: float = 2.0
) -> float:
    """Hold `actual` to `factor` × the error of `rounded` against `exact` (float64), plus one rounding.

    Both the largest error and the root mean square are held. One wrong entry shows in the first, an error that is small
    and everywhere in the second.

    Args:
        actual: what is tested.
        exact: the float64 result.
        rounded: the same formula in the dtype of `actual`; from `simulate_rounding`, with the draws in front.
        name: what to call it in the message.
        scale: the largest number that rounding acts on, if that is larger than the largest of `exact`.
        factor: how many times the error of `rounded` is allowed.

    Returns:
        The error of `actual` divided by that of `rounded` (by one rounding where that is larger).

    Raises:
        AssertionError: with both errors and the bound, or the shapes or dtypes if those differ.
    """
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == rounded.dtype, f"{name} has dtype {actual.dtype}, expected {rounded.dtype}"
    draws = [rounded] if rounded.dim() == exact.dim() else list(rounded)
    finite = exact[exact.isfinite()]
    eps = torch.finfo(actual.dtype).eps
    largest = max(scale, finite.abs().max().item() if finite.numel() else 0.0)
    ours, theirs = max_error(actual, exact), max(max_error(draw, exact) for draw in draws)
    _hold(f"{name} is", ours, theirs, eps * largest, factor)
    if ours > 0.0 and exact.numel() >= ENOUGH:
        typical = max(scale, _root_mean_square(finite))
        rms = max(rms_error(draw, exact) for draw in draws)
        _hold(f"the root mean square of {name} is", rms_error(actual, exact), rms, eps / 2 * typical, factor)
    return ours / max(theirs, eps * largest) if ours > 0.0 else 0.0


def _hold(what: str, ours: float, theirs: float, rounding: float, factor: float) -> None:
    bound = factor * theirs + rounding
    assert ours <= bound, (
        f"{what} {ours:.3g} from float64; {factor} × the error of the formula in this dtype ({theirs:.3g}) + one "
        f"rounding ({rounding:.3g}) allow {bound:.3g}"
    )


def _root_mean_square(t: Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0
