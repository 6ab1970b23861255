"""Softmax of csrc/cuda, run by the emulator in every schedule, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cuda_rows import (
    AMPERE,
    BF16,
    F16,
    F32,
    F64,
    HOPPER,
    NEEDS_COMPILER,
    POOR_AMPERE,
    SCHEDULES,
    SMALL,
    SMALL_AMPERE,
    Gpu,
    emulating,
    kernels,
    lay_out,
    poisoned,
    randn,
    rows,
    sizes,
)
from torch import Tensor

from fastattn.reference import softmax as reference_softmax
from fastattn.testing import assert_close, simulate_rounding

pytestmark = NEEDS_COMPILER


@dataclass(frozen=True)
class Soft:
    name: str
    shape: tuple[int, ...]  # (R0, R1, R2, N), or fewer
    dtype: torch.dtype = F32
    mask: tuple[int, ...] = ()  # its shape, if there is one
    scale: float = 1.0
    causal: bool = False
    top_left: bool = False
    layout: str = "contiguous"
    size: float = 1.0  # of x
    gpu: Gpu = HOPPER

    def __str__(self) -> str:
        return self.name


SOFTS = [
    *(Soft(f"N{N}", (3, N)) for N in (1, 7, 8, 64, 100, 1000)),
    *(Soft(f"N{N}_{name}", (5, N), dtype) for N in (7, 100, 1100) for dtype, name in ((BF16, "bf16"), (F16, "fp16"))),
    Soft("cluster", (2, 4000), gpu=SMALL),
    Soft("cluster_bf16", (2, 5001), BF16, gpu=SMALL),
    Soft("cluster_and_chunks", (1, 9001), gpu=SMALL),
    Soft("chunks", (3, 3001), gpu=SMALL_AMPERE),
    Soft("chunks_read_again", (2, 4000), mask=(4000,), gpu=POOR_AMPERE),
    Soft("chunks_causal", (6, 2500), causal=True, gpu=POOR_AMPERE),
    Soft("many_rows", (130, 20)),
    Soft("scale", (5, 40), scale=-0.3),
    Soft("large_logits", (5, 100), size=1e4),
    Soft("large_logits_cluster", (2, 4000), size=1e4, gpu=SMALL),
    Soft("mask", (2, 3, 10, 16), mask=(2, 3, 10, 16)),
    Soft("mask_bf16", (2, 3, 10, 16), BF16, mask=(2, 3, 10, 16)),
    Soft("mask_of_keys", (2, 3, 10, 12), mask=(2, 1, 1, 12)),
    Soft("mask_of_rows", (2, 3, 10, 12), mask=(10, 1)),
    Soft("mask_of_heads", (2, 3, 10, 12), mask=(3, 1, 12)),
    Soft("causal", (2, 3, 12, 12), causal=True),
    Soft("causal_bottom_right", (2, 20, 12), causal=True),  # rows that see nothing
    Soft("causal_top_left", (2, 12, 20), causal=True, top_left=True),
    Soft("causal_mask_scale_bf16", (2, 30, 40), BF16, mask=(30, 40), causal=True, scale=0.5),
    *(Soft(f"{layout}_{N}", (6, N), layout=layout) for layout in ("padded", "unaligned", "heads") for N in (64, 101)),
    Soft("unaligned_bf16", (6, 101), BF16, layout="unaligned"),
    Soft("unaligned_cluster", (2, 3003), layout="unaligned", gpu=SMALL),
    Soft("unaligned_mask_causal", (12, 101), BF16, layout="unaligned", mask=(12, 101), causal=True),
]
LONG_SOFTS = [
    Soft("N4096_bf16", (2, 4096), BF16),
    Soft("N20000_cluster", (2, 20_000)),
    Soft("N20000_cluster_bf16", (2, 20_000), BF16),
    Soft("N20000_chunks", (2, 20_000), gpu=AMPERE),
]


def soft_tensors(case: Soft) -> tuple[Tensor, Tensor, Tensor | None]:
    x, dy = (randn(*case.shape, dtype=case.dtype, seed=seed) for seed in (0, 1))
    if case.layout != "contiguous":
        x, dy = lay_out(x, case.layout), lay_out(dy, case.layout)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(case.mask, generator=generator) > 0.4 if case.mask else None
    return x.mul_(case.size), dy, mask


def soft_arguments(x: Tensor, mask: Tensor | None, case: Soft, log: bool) -> dict[str, Any]:
    seen = None
    if mask is not None:
        mask = mask.expand(x.shape)
        seen = (mask.data_ptr(), *(0,) * (4 - mask.dim()), *mask.stride())
    *_, M, N = (1, *x.shape)
    return {
        "mask": seen, "scale": case.scale, "log": log, "causal": case.causal, "stream": 0,
        "diagonal": 0 if case.top_left else N - M, **sizes(x),
    }  # fmt: skip


def check_softmax(case: Soft, log: bool, schedule: str = "eager", bug: str = "None") -> None:
    x, dy, mask = soft_tensors(case)
    y, dx = poisoned(x), poisoned(x)
    arguments = soft_arguments(x, mask, case, log)
    with emulating(case.gpu, schedule, bug):
        kernels().softmax_forward(y=rows(y), x=rows(x), **arguments)
        kernels().softmax_backward(dx=rows(dx), dy=rows(dy), y=rows(y), **arguments)
    options: dict[str, Any] = {"scale": case.scale, "causal": case.causal, "top_left": case.top_left, "log": log}

    def forward(dtype: torch.dtype) -> Tensor:
        return reference_softmax.softmax(x.to(dtype), -1, mask=mask, **options)

    def backward(dtype: torch.dtype) -> Tensor:
        return reference_softmax.softmax_gradient(dy.to(dtype), y.to(dtype), mask, -1, **options)

    assert_close(y, forward(F64), simulate_rounding(lambda: forward(case.dtype)), "y")
    # The gradient is one of y as it was rounded: that y, in float64, is what both are given.
    assert_close(dx, backward(F64), simulate_rounding(lambda: backward(case.dtype)), "dx")


@SCHEDULES
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("case", SOFTS, ids=str)
def test_softmax(case: Soft, log: bool, schedule: str):
    check_softmax(case, log, schedule)


@pytest.mark.parametrize("case", LONG_SOFTS, ids=str)
def test_softmax_of_long_rows(case: Soft):
    check_softmax(case, case.dtype == BF16, "random")


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("N", [9, 300])
def test_softmax_of_inf_and_nan(N: int, log: bool):
    """As torch: a row of -inf is NaN, and so is one with inf or NaN; -inf beside others counts for nothing."""
    x = randn(6, N, dtype=F32)
    x[1, 3], x[2, N - 1], x[3, : N - 1], x[4], x[5, 0] = math.inf, math.nan, -math.inf, -math.inf, -math.inf
    y = poisoned(x)
    kernels().softmax_forward(y=rows(y), x=rows(x), **soft_arguments(x, None, Soft("edges", x.shape), log))
    function = torch.log_softmax if log else torch.softmax
    assert_close(y, function(x.double(), -1), simulate_rounding(lambda: function(x, -1)))


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax_of_hidden_entries(log: bool):
    """What is hidden may be NaN; a row that sees nothing is 0, or -inf; one that sees only -inf is NaN there."""
    x = randn(4, 20, dtype=F32)
    mask = torch.rand(4, 20, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[1], mask[2, 5] = False, True
    x[2][mask[2]] = -math.inf
    x[~mask] = math.nan
    case = Soft("hidden", (4, 20), mask=(4, 20))
    y, dx, dy = poisoned(x), poisoned(x), randn(4, 20, dtype=F32, seed=1)
    dy[~mask] = math.nan
    arguments = soft_arguments(x, mask, case, log)
    kernels().softmax_forward(y=rows(y), x=rows(x), **arguments)
    exact = reference_softmax.softmax(x.double(), -1, mask=mask, log=log)
    rounded = simulate_rounding(lambda: reference_softmax.softmax(x, -1, mask=mask, log=log))
    assert_close(y, exact, rounded)
    kernels().softmax_backward(dx=rows(dx), dy=rows(dy), y=rows(y), **arguments)
    assert dx[~mask].eq(0.0).all()
    assert dx[0].isfinite().all()
    assert dx[2][mask[2]].isnan().all()


def test_softmax_in_place():
    for case in (
        Soft("short", (5, 100)),
        Soft("long", (3, 3000), gpu=SMALL),
        Soft("chunks", (3, 3000), gpu=POOR_AMPERE),
    ):
        x, *_ = soft_tensors(case)
        y, arguments = poisoned(x), soft_arguments(x, None, case, False)
        with emulating(case.gpu):
            kernels().softmax_forward(y=rows(y), x=rows(x), **arguments)
            kernels().softmax_forward(y=rows(x), x=rows(x), **arguments)
        assert x.equal(y), case.name


BUGS = {
    "WarpOnly": Soft("", (2, 1000)),
    "NoClusterSync": Soft("", (2, 4000), gpu=SMALL),
    "SharedKeep": Soft("", (2, 4000), gpu=SMALL_AMPERE),
}


@SCHEDULES
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str, schedule: str):
    """By a finding of the emulator, or by a wrong result."""
    check_softmax(BUGS[bug], False, schedule, "None")
    with pytest.raises((RuntimeError, AssertionError)):
        check_softmax(BUGS[bug], False, schedule, bug)
