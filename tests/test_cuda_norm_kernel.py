"""LayerNorm and RMSNorm of csrc/cuda, run by the emulator in every schedule, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cuda_rows import (
    AMPERE,
    BF16,
    DTYPES,
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
    address,
    emulating,
    kernels,
    lay_out,
    poisoned,
    randn,
    rows,
    sizes,
    vector,
)
from torch import Tensor
from torch.nn import functional

from fastattn.reference import norm as reference_norm
from fastattn.testing import assert_close, simulate_rounding

pytestmark = NEEDS_COMPILER


@dataclass(frozen=True)
class Norm:
    name: str
    M: int
    N: int
    rms: bool = False
    dtype: torch.dtype = F32
    parameters: torch.dtype | None = None  # dtype of weight and bias; None: x's
    weight: bool = True
    bias: bool = True
    residual: torch.dtype | None = None
    out: torch.dtype | None = None  # dtype of y; None: x's
    eps: float = 1e-5
    mean: float = 0.5
    weight_offset: float = 0.0
    layout: str = "contiguous"
    gpu: Gpu = HOPPER

    def __str__(self) -> str:
        return self.name


def both(name: str, M: int, N: int, **options: Any) -> list[Norm]:
    return [Norm(f"layer_norm_{name}", M, N, **options), Norm(f"rms_norm_{name}", M, N, rms=True, **options)]


NORMS = [
    *(case for N in (1, 7, 8, 64, 100, 1000) for case in both(f"N{N}", 5, N)),
    *(case for N in (1, 7, 8, 64, 100, 1000) for case in both(f"N{N}_bf16", 5, N, dtype=BF16)),
    *both("N1100_fp16", 2, 1100, dtype=F16),
    *both("cluster", 3, 4000, gpu=SMALL),
    *both("cluster_bf16", 2, 4001, dtype=BF16, residual=BF16, gpu=SMALL),
    *both("cluster_fp32_of_bf16", 2, 4008, dtype=BF16, residual=F32, gpu=SMALL),
    *both("cluster_and_chunks", 2, 9001, gpu=SMALL),
    *both("chunks", 3, 3001, gpu=SMALL_AMPERE),
    *both("chunks_read_again", 3, 3000, gpu=POOR_AMPERE),
    *both("chunks_bf16", 5, 5000, dtype=BF16, residual=F32, gpu=POOR_AMPERE),
    *both("many_rows", 70, 40),
    *both("many_rows_bf16", 150, 200, dtype=BF16),
    *both("no_parameters", 5, 40, weight=False, bias=False),
    Norm("no_bias", 5, 40, bias=False),
    Norm("no_weight", 5, 40, weight=False),
    *both("residual", 5, 96, residual=F32),
    *both("residual_bf16", 5, 96, dtype=BF16, residual=BF16),
    *both("residual_fp32_of_bf16", 5, 96, dtype=BF16, residual=F32),
    Norm("residual_fp32_of_fp16", 5, 96, dtype=F16, residual=F32),
    *both("parameters_fp32_of_bf16", 5, 96, dtype=BF16, parameters=F32),
    *both("autocast", 5, 96, dtype=BF16, parameters=F32, residual=F32, out=F32),
    Norm("autocast_fp16", 5, 96, dtype=F16, out=F32),
    Norm("large_mean", 5, 1000, mean=300.0),
    Norm("large_mean_cluster", 2, 4000, mean=300.0, gpu=SMALL),
    Norm("large_mean_chunks", 2, 4000, mean=300.0, gpu=SMALL_AMPERE),
    Norm("bf16_large_mean", 5, 96, dtype=BF16, mean=50.0),
    Norm("large_eps", 5, 40, eps=0.5),
    Norm("weight_offset", 5, 96, rms=True, bias=False, weight_offset=1.0, dtype=BF16),
    *(Norm(f"{layout}_{N}", 6, N, layout=layout) for layout in ("padded", "unaligned", "heads") for N in (64, 100)),
    *(Norm(f"{layout}_bf16", 6, 100, layout=layout, dtype=BF16, residual=F32) for layout in ("padded", "unaligned")),
]  # fmt: skip
LONG_NORMS = [
    *(Norm(f"N{N}_bf16", 2, N, rms=True, dtype=BF16) for N in (4096, 4097)),
    *both("N20000_cluster", 2, 20_000),
    Norm("N20000_cluster_bf16", 2, 20_000, dtype=BF16, residual=BF16),
    Norm("N20000_chunks", 2, 20_000, gpu=AMPERE),
]


def norm_tensors(case: Norm) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """-> (x, and weight, bias and residual where there are); dy; dh."""
    x = lay_out((randn(case.M, case.N) * 2 + case.mean).to(case.dtype), case.layout)
    tensors = {"x": x}
    for seed, (name, wanted) in enumerate((("weight", case.weight), ("bias", case.bias and not case.rms)), 1):
        if wanted:
            tensors[name] = randn(case.N, dtype=case.parameters or case.dtype, seed=seed)
    if case.residual is not None:
        tensors["residual"] = lay_out(randn(case.M, case.N, dtype=case.residual, seed=3), case.layout)
    dy = lay_out(randn(case.M, case.N, dtype=case.out or case.dtype, seed=4), case.layout)
    dh = lay_out(randn(case.M, case.N, dtype=case.residual or case.dtype, seed=5), case.layout)
    return tensors, dy, dh


def norm_in_torch(case: Norm, tensors: dict[str, Tensor], dy: Tensor, dh: Tensor, exact: bool) -> dict[str, Tensor]:
    """Outputs and gradients in float64, or in the dtypes of the case."""
    leaves = {name: (t.double() if exact else t).detach().clone().requires_grad_() for name, t in tensors.items()}
    x, weight, bias, residual = (leaves.get(name) for name in ("x", "weight", "bias", "residual"))
    h = reference_norm.add_residual(tensors["x"], tensors.get("residual"), None, 0.0, 1).to(F64 if exact else None)
    # h of the case's dtype in both, as what is normalised is its rounded value; its gradient is that of the sum.
    if residual is not None:
        h = h.detach().requires_grad_()
    else:
        h = x
    scale = None if weight is None else weight.to(h.dtype) + case.weight_offset
    shift = None if bias is None else bias.to(h.dtype)
    if case.rms:
        y = functional.rms_norm(h, (case.N,), scale, case.eps)
    else:
        y = functional.layer_norm(h, (case.N,), scale, shift, case.eps)
    y = y if exact else y.to(case.out or case.dtype)
    grads = torch.autograd.grad(y, [h, *(t for t in (weight, bias) if t is not None)], dy.to(y.dtype))
    results = {"y": y.detach()}
    results |= dict(zip((f"d{name}" for name in ("weight", "bias") if name in leaves), grads[1:], strict=True))
    if residual is not None:
        total = grads[0] + dh.to(grads[0].dtype)
        results |= {"h": h.detach(), "dresidual": total, "dx": total if exact else total.to(case.dtype)}
    else:
        results["dx"] = grads[0]
    results["stats"] = reference_norm.statistics(h.detach(), 1, case.eps, case.rms)
    if not exact:
        results["stats"] = results["stats"].float()
    return results


def run_norm(case: Norm, tensors: dict[str, Tensor], dy: Tensor, dh: Tensor) -> dict[str, Tensor]:
    x, weight, bias, residual = (tensors.get(name) for name in ("x", "weight", "bias", "residual"))
    assert x is not None
    M = case.M
    results = {"y": poisoned(x, case.out), "stats": poisoned(x, F32, (1 if case.rms else 2, M)), "dx": poisoned(x)}
    if residual is not None:
        results |= {"h": poisoned(residual), "dresidual": poisoned(residual)}
    results |= {f"d{name}": poisoned(tensors[name]) for name in ("weight", "bias") if name in tensors}
    h = results.get("h")
    common = {**sizes(x), "rms": case.rms, "weight_offset": case.weight_offset, "stream": 0}
    stats = address(results["stats"])
    kernels().norm_forward(
        y=rows(results["y"]), h=rows(h), stats=stats, x=rows(x), weight=vector(weight), bias=vector(bias),
        residual=rows(residual), eps=case.eps, **common,
    )  # fmt: skip
    base = x if h is None else h
    P = kernels().norm_backward_parts(M, case.N, DTYPES[x.dtype], DTYPES[base.dtype])
    parts = [poisoned(x, F32, (P, case.N)) if name in results else None for name in ("dweight", "dbias")]
    kernels().norm_backward(
        dx=rows(results["dx"]), dweight=vector(results.get("dweight")), dbias=vector(results.get("dbias")),
        dresidual=rows(results.get("dresidual")), dweight_parts=address(parts[0]), dbias_parts=address(parts[1]),
        dy=rows(dy), dh=None if residual is None else rows(dh), h=rows(base), weight=vector(weight), stats=stats,
        x_dtype=DTYPES[x.dtype], **common,
    )  # fmt: skip
    return results


@SCHEDULES
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm(case: Norm, schedule: str):
    check_norm(case, schedule)


@pytest.mark.parametrize("case", LONG_NORMS, ids=str)
def test_norm_of_long_rows(case: Norm):
    check_norm(case, "random")


def check_norm(case: Norm, schedule: str = "eager", bug: str = "None") -> None:
    tensors, dy, dh = norm_tensors(case)
    with emulating(case.gpu, schedule, bug):
        results = run_norm(case, tensors, dy, dh)
    exact = norm_in_torch(case, tensors, dy, dh, exact=True)
    rounded = simulate_rounding(lambda: norm_in_torch(case, tensors, dy, dh, exact=False))
    for name, result in results.items():
        assert_close(result.reshape(exact[name].shape), exact[name], rounded[name].to(result.dtype), name)


def test_norm_repeats_its_bits():
    case = Norm("many_rows", 70, 40)
    inputs = norm_tensors(case)
    with emulating(schedule="random"):
        first, second = (run_norm(case, *inputs) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("wanted", [("dx",), ("dweight",), ("dbias",), ("dresidual",), ("dx", "dbias")], ids="_".join)
def test_norm_gradients_apart(wanted: tuple[str, ...]):
    """Gradients that nobody asked for are not written, and change nothing about the others."""
    case = Norm("apart", 9, 40, residual=F32)
    tensors, dy, dh = norm_tensors(case)
    everything = run_norm(case, tensors, dy, dh)
    x, h = tensors["x"], everything["h"]
    outputs = {name: poisoned(everything[name]) for name in wanted}
    P = kernels().norm_backward_parts(9, 40, 0, 0)
    parts = {name: poisoned(x, F32, (P, 40)) for name in wanted if name in ("dweight", "dbias")}
    kernels().norm_backward(
        dx=rows(outputs.get("dx")), dweight=vector(outputs.get("dweight")), dbias=vector(outputs.get("dbias")),
        dresidual=rows(outputs.get("dresidual")), dweight_parts=address(parts.get("dweight")),
        dbias_parts=address(parts.get("dbias")), dy=rows(dy), dh=rows(dh), h=rows(h), weight=vector(tensors["weight"]),
        stats=address(everything["stats"]), x_dtype=0, rms=False, weight_offset=0.0, stream=0, **sizes(x),
    )  # fmt: skip
    assert all(outputs[name].equal(everything[name]) for name in wanted)


@pytest.mark.parametrize("rms", [False, True])
def test_norm_of_inf_and_nan(rms: bool):
    """A row that holds one is what torch makes of it; its neighbours do not notice."""
    case = Norm("edges", 5, 100, rms=rms, weight=False, bias=False)
    tensors, dy, dh = norm_tensors(case)
    tensors["x"][1, 3], tensors["x"][2, 99], tensors["x"][3] = math.inf, math.nan, 0.0
    y = run_norm(case, tensors, dy, dh)["y"]
    exact = norm_in_torch(case, tensors, dy, dh, exact=True)["y"]
    rounded = simulate_rounding(lambda: norm_in_torch(case, tensors, dy, dh, exact=False))["y"]
    assert_close(y, exact, rounded)


BUGS = {
    "NoBarrier": Norm("", 3, 1000, rms=True),
    "OneRound": Norm("", 12, 1000, rms=True, gpu=Gpu(sms=1)),
    "NoStartSync": Norm("", 2, 4000, rms=True, gpu=SMALL),
    "LastRowOnly": Norm("", 70, 40, rms=True, gpu=Gpu(sms=1)),
    "OneGroup": Norm("", 70, 40, rms=True),
    "NoFlushBarrier": Norm("", 70, 40, rms=True),
}


@SCHEDULES
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str, schedule: str):
    """By a finding of the emulator, or by a wrong result."""
    check_norm(BUGS[bug], schedule, "None")
    with pytest.raises((RuntimeError, AssertionError)):
        check_norm(BUGS[bug], schedule, bug)
