"""The row kernels of csrc/cuda, run by the emulator in every schedule, against float64; and mistakes planted in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastattn import native
from fastattn.reference import cross_entropy as reference_cross_entropy
from fastattn.reference import norm as reference_norm
from fastattn.reference import softmax as reference_softmax
from fastattn.testing import assert_close

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SCHEDULES = pytest.mark.parametrize("schedule", ["eager", "tma_last", "wgmma_last", "random"])
DTYPES = {F32: 0, BF16: 1, F16: 2}

pytestmark = pytest.mark.skipif(native.why_no_emulator() is not None, reason=str(native.why_no_emulator()))


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return native.load_emulator()


@dataclass(frozen=True)
class Gpu:
    """What the emulated GPU has; little of it makes few threads run through every path."""

    clusters: bool = True
    threads: int = 512  # of a CTA
    shared: int = 227 * 1024  # bytes of a CTA
    sms: int = 2


AMPERE = Gpu(clusters=False)
SMALL = Gpu(threads=64)  # a CTA holds 1024 elements of fp32, 2048 of 16 bits, half of them in a backward of norms
SMALL_AMPERE = Gpu(clusters=False, threads=64)  # 768 bytes for reductions, and 4096 for each chunk that is kept
POOR_AMPERE = Gpu(clusters=False, threads=64, shared=768 + 4096)


@contextmanager
def emulating(kernels: ModuleType, gpu: Gpu = Gpu(), schedule: str = "eager", bug: str = "None") -> Iterator[None]:
    def set_to(gpu: Gpu, schedule: str, bug: str) -> None:
        kernels.emulator_mode(schedule, 1)
        kernels.emulator_sms(gpu.sms)
        kernels.emulator_clusters(gpu.clusters)
        kernels.emulator_row_limits(gpu.threads, gpu.shared)
        kernels.emulator_rows_bug(bug)

    set_to(gpu, schedule, bug)
    try:
        yield
    finally:
        set_to(Gpu(sms=4), "eager", "None")


def rows(t: Tensor | None) -> tuple[int, ...] | None:
    """(R0, R1, R2, N), or (M, N), as the kernels take it: address, dtype, steps."""
    if t is None:
        return None
    steps = t.stride()[:-1]
    return (t.data_ptr(), DTYPES[t.dtype], *(0,) * (3 - len(steps)), *steps)


def column(t: Tensor | None) -> tuple[int, ...] | None:
    """One number per row."""
    return None if t is None else rows(t.unsqueeze(-1))


def vector(t: Tensor | None) -> tuple[int, int] | None:
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype])


def sizes(t: Tensor) -> dict[str, int]:
    """M, N, R1 and R2 of a tensor of rows."""
    *outer, N = t.shape
    R1, R2 = ([1, 1, *outer])[-2:]
    return {"M": math.prod(outer), "N": N, "R1": R1, "R2": R2}


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def poisoned(t: Tensor, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Tensor:
    """An output that is NaN as long as nothing is written, laid out as t if it has its shape."""
    if shape is not None:
        return torch.full(tuple(shape), math.nan, dtype=dtype or t.dtype)
    return torch.full_like(t, math.nan, dtype=dtype, memory_format=torch.preserve_format)


def randn(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """contiguous; padded: rows further apart, but aligned; unaligned: rows that begin between 16-byte boundaries;
    heads: (M, N) as (2, M / 2, N), the outer dimensions exchanged in memory."""
    if layout == "contiguous":
        return t
    M, N = t.shape
    if layout == "heads":
        return t.view(2, M // 2, N).transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "padded":
        return torch.cat([t, torch.full((M, 24 - N % 8), math.nan, dtype=t.dtype)], 1)[:, :N]
    buffer = torch.full((M, N + 4), math.nan, dtype=t.dtype)
    buffer[:, 1 : N + 1] = t
    return buffer[:, 1 : N + 1]


# --------------------------------------------------------------------------------------------------------------- norms


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
    gpu: Gpu = Gpu()

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
    """Outputs and gradients in float64, or by eager torch in the dtypes of the case."""
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


def run_norm(kernels: ModuleType, case: Norm, tensors: dict[str, Tensor], dy: Tensor, dh: Tensor) -> dict[str, Tensor]:
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
    kernels.norm_forward(
        y=rows(results["y"]), h=rows(h), stats=stats, x=rows(x), weight=vector(weight), bias=vector(bias),
        residual=rows(residual), eps=case.eps, **common,
    )  # fmt: skip
    base = x if h is None else h
    P = kernels.norm_backward_parts(M, case.N, DTYPES[x.dtype], DTYPES[base.dtype])
    parts = [poisoned(x, F32, (P, case.N)) if name in results else None for name in ("dweight", "dbias")]
    kernels.norm_backward(
        dx=rows(results["dx"]), dweight=vector(results.get("dweight")), dbias=vector(results.get("dbias")),
        dresidual=rows(results.get("dresidual")), dweight_parts=address(parts[0]), dbias_parts=address(parts[1]),
        dy=rows(dy), dh=None if residual is None else rows(dh), h=rows(base), weight=vector(weight), stats=stats,
        x_dtype=DTYPES[x.dtype], **common,
    )  # fmt: skip
    return results


@SCHEDULES
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm(case: Norm, schedule: str, kernels: ModuleType):
    check_norm(kernels, case, schedule)


@pytest.mark.parametrize("case", LONG_NORMS, ids=str)
def test_norm_of_long_rows(case: Norm, kernels: ModuleType):
    check_norm(kernels, case, "random")


def check_norm(kernels: ModuleType, case: Norm, schedule: str = "eager", bug: str = "None") -> None:
    tensors, dy, dh = norm_tensors(case)
    with emulating(kernels, case.gpu, schedule, bug):
        results = run_norm(kernels, case, tensors, dy, dh)
    exact = norm_in_torch(case, tensors, dy, dh, exact=True)
    eager = norm_in_torch(case, tensors, dy, dh, exact=False)
    for name, result in results.items():
        assert_close(result.reshape(exact[name].shape), exact[name], eager[name].to(result.dtype), name)


def test_norm_repeats_its_bits(kernels: ModuleType):
    case = Norm("many_rows", 70, 40)
    inputs = norm_tensors(case)
    with emulating(kernels, schedule="random"):
        first, second = (run_norm(kernels, case, *inputs) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("wanted", [("dx",), ("dweight",), ("dbias",), ("dresidual",), ("dx", "dbias")], ids="_".join)
def test_norm_gradients_apart(wanted: tuple[str, ...], kernels: ModuleType):
    """Gradients that nobody asked for are not written, and change nothing about the others."""
    case = Norm("apart", 9, 40, residual=F32)
    tensors, dy, dh = norm_tensors(case)
    everything = run_norm(kernels, case, tensors, dy, dh)
    x, h = tensors["x"], everything["h"]
    outputs = {name: poisoned(everything[name]) for name in wanted}
    P = kernels.norm_backward_parts(9, 40, 0, 0)
    parts = {name: poisoned(x, F32, (P, 40)) for name in wanted if name in ("dweight", "dbias")}
    kernels.norm_backward(
        dx=rows(outputs.get("dx")), dweight=vector(outputs.get("dweight")), dbias=vector(outputs.get("dbias")),
        dresidual=rows(outputs.get("dresidual")), dweight_parts=address(parts.get("dweight")),
        dbias_parts=address(parts.get("dbias")), dy=rows(dy), dh=rows(dh), h=rows(h), weight=vector(tensors["weight"]),
        stats=address(everything["stats"]), x_dtype=0, rms=False, weight_offset=0.0, stream=0, **sizes(x),
    )  # fmt: skip
    assert all(outputs[name].equal(everything[name]) for name in wanted)


@pytest.mark.parametrize("rms", [False, True])
def test_norm_of_inf_and_nan(rms: bool, kernels: ModuleType):
    """A row that holds one is what torch makes of it; its neighbours do not notice."""
    case = Norm("edges", 5, 100, rms=rms, weight=False, bias=False)
    tensors, dy, dh = norm_tensors(case)
    tensors["x"][1, 3], tensors["x"][2, 99], tensors["x"][3] = math.inf, math.nan, 0.0
    y = run_norm(kernels, case, tensors, dy, dh)["y"]
    exact, eager = (norm_in_torch(case, tensors, dy, dh, exact)["y"] for exact in (True, False))
    assert_close(y, exact, eager)


# ------------------------------------------------------------------------------------------------------------- softmax


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
    gpu: Gpu = Gpu()

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


def check_softmax(kernels: ModuleType, case: Soft, log: bool, schedule: str = "eager", bug: str = "None") -> None:
    x, dy, mask = soft_tensors(case)
    y, dx = poisoned(x), poisoned(x)
    arguments = soft_arguments(x, mask, case, log)
    with emulating(kernels, case.gpu, schedule, bug):
        kernels.softmax_forward(y=rows(y), x=rows(x), **arguments)
        kernels.softmax_backward(dx=rows(dx), dy=rows(dy), y=rows(y), **arguments)
    options: dict[str, Any] = {"scale": case.scale, "causal": case.causal, "top_left": case.top_left, "log": log}
    exact, eager = (reference_softmax.softmax(x.to(dtype), -1, mask=mask, **options) for dtype in (F64, case.dtype))
    assert_close(y, exact, eager, "y")
    # The gradient is one of y as it was rounded: that y, in float64, is what both are given.
    exact, eager = (
        reference_softmax.softmax_gradient(dy.to(dtype), y.to(dtype), mask, -1, **options)
        for dtype in (F64, case.dtype)
    )
    assert_close(dx, exact, eager, "dx")


@SCHEDULES
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("case", SOFTS, ids=str)
def test_softmax(case: Soft, log: bool, schedule: str, kernels: ModuleType):
    check_softmax(kernels, case, log, schedule)


@pytest.mark.parametrize("case", LONG_SOFTS, ids=str)
def test_softmax_of_long_rows(case: Soft, kernels: ModuleType):
    check_softmax(kernels, case, case.dtype == BF16, "random")


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("N", [9, 300])
def test_softmax_of_inf_and_nan(N: int, log: bool, kernels: ModuleType):
    """As torch: a row of -inf is NaN, and so is one with inf or NaN; -inf beside others counts for nothing."""
    x = randn(6, N, dtype=F32)
    x[1, 3], x[2, N - 1], x[3, : N - 1], x[4], x[5, 0] = math.inf, math.nan, -math.inf, -math.inf, -math.inf
    y = poisoned(x)
    kernels.softmax_forward(y=rows(y), x=rows(x), **soft_arguments(x, None, Soft("edges", x.shape), log))
    exact, eager = ((torch.log_softmax if log else torch.softmax)(x.to(dtype), -1) for dtype in (F64, F32))
    assert_close(y, exact, eager)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax_of_hidden_entries(log: bool, kernels: ModuleType):
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
    kernels.softmax_forward(y=rows(y), x=rows(x), **arguments)
    exact, eager = (reference_softmax.softmax(x.to(dtype), -1, mask=mask, log=log) for dtype in (F64, F32))
    assert_close(y, exact, eager)
    kernels.softmax_backward(dx=rows(dx), dy=rows(dy), y=rows(y), **arguments)
    assert dx[~mask].eq(0.0).all() and dx[0].isfinite().all() and dx[2][mask[2]].isnan().all()


def test_softmax_in_place(kernels: ModuleType):
    for case in (
        Soft("short", (5, 100)),
        Soft("long", (3, 3000), gpu=SMALL),
        Soft("chunks", (3, 3000), gpu=POOR_AMPERE),
    ):
        x, *_ = soft_tensors(case)
        y, arguments = poisoned(x), soft_arguments(x, None, case, False)
        with emulating(kernels, case.gpu):
            kernels.softmax_forward(y=rows(y), x=rows(x), **arguments)
            kernels.softmax_forward(y=rows(x), x=rows(x), **arguments)
        assert x.equal(y), case.name


# ------------------------------------------------------------------------------------------------------- cross-entropy


@dataclass(frozen=True)
class Loss:
    name: str
    M: int
    V: int
    dtype: torch.dtype = F32
    weight: torch.dtype | None = None  # its dtype, if there is one
    ignored: int = 0  # how many of the rows
    loss_dtype: torch.dtype = F32  # of losses that are not reduced
    target_dtype: torch.dtype = torch.int64
    size: float = 1.0  # of the logits
    layout: str = "contiguous"
    options: dict[str, float] = field(default_factory=dict)  # label_smoothing, z_loss, softcap
    gpu: Gpu = Gpu()

    def __str__(self) -> str:
        return self.name


EXTRAS = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 2.0}
LOSSES = [
    *(Loss(f"V{V}", 3, V) for V in (1, 7, 8, 64, 100, 1000)),
    *(
        Loss(f"V{V}_{name}", 5, V, dtype, ignored=1)
        for V in (50, 1100)
        for dtype, name in ((BF16, "bf16"), (F16, "fp16"))
    ),
    Loss("many_rows", 130, 20, ignored=40, target_dtype=torch.int32),
    Loss("all_ignored", 4, 40, ignored=4),
    Loss("weight", 9, 40, weight=F32, ignored=2),
    Loss("weight_bf16", 9, 40, BF16, weight=BF16, ignored=2, loss_dtype=BF16),
    Loss("weight_fp32_of_fp16", 9, 40, F16, weight=F32, loss_dtype=F16),
    Loss("smoothing", 9, 40, ignored=2, options={"label_smoothing": 0.2}),
    Loss("z_loss", 9, 40, ignored=2, options={"z_loss": 0.1}),
    Loss("softcap", 9, 40, ignored=2, options={"softcap": 1.5}),
    Loss("everything", 9, 40, ignored=2, options=EXTRAS),
    Loss("everything_bf16", 9, 60, BF16, options=EXTRAS),
    Loss("large_logits", 5, 100, size=1e4),
    Loss("large_logits_smoothing", 5, 100, size=1e3, options={"label_smoothing": 0.1}),
    Loss("cluster", 3, 4000, ignored=1, gpu=SMALL),
    Loss("cluster_bf16", 2, 5001, BF16, gpu=SMALL),
    Loss("cluster_everything", 2, 4000, options=EXTRAS, gpu=SMALL),
    Loss("cluster_and_chunks", 2, 9001, gpu=SMALL),
    Loss("chunks", 3, 3001, gpu=SMALL_AMPERE),
    Loss("chunks_read_again", 3, 4000, ignored=1, options=EXTRAS, gpu=POOR_AMPERE),
    *(Loss(f"{layout}_{V}", 6, V, layout=layout) for layout in ("padded", "unaligned", "heads") for V in (64, 101)),
    Loss("unaligned_bf16", 6, 101, BF16, layout="unaligned"),
    Loss("unaligned_cluster", 2, 3003, layout="unaligned", gpu=SMALL),
]
LONG_LOSSES = [
    Loss("V4096_bf16", 2, 4096, BF16),
    Loss("V20000_cluster", 2, 20_000, ignored=1),
    Loss("V20000_cluster_bf16", 2, 20_000, BF16),
    Loss("V20000_chunks", 2, 20_000, gpu=AMPERE),
    Loss("V50257_bf16", 2, 50_257, BF16),
]


def loss_tensors(case: Loss) -> tuple[Tensor, Tensor, Tensor | None]:
    logits = lay_out(randn(case.M, case.V, dtype=case.dtype) * case.size, case.layout)
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, case.V, (case.M,), generator=generator, dtype=case.target_dtype)
    target[: case.ignored] = -100
    weight = None if case.weight is None else (torch.rand(case.V, generator=generator) + 0.5).to(case.weight)
    return logits, target.view(logits.shape[:-1]), weight


def run_loss(
    kernels: ModuleType, case: Loss, logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str,
    inplace: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Loss and gradient in one pass, and the gradient again from the statistics, after a factor on each row's loss."""
    M, V = case.M, case.V
    none, mean = reduction == "none", reduction == "mean"
    losses = poisoned(logits, case.loss_dtype if none else F32, target.shape)
    row_max, log_sum = (poisoned(logits, F32, target.shape) for _ in range(2))
    divisor, partial = poisoned(logits, F32, (1,)), poisoned(logits, F32, (kernels.sum_partials(M),))
    dlogits, again = logits if inplace else poisoned(logits), poisoned(logits)
    given = logits.clone(memory_format=torch.preserve_format) if inplace else logits
    common: dict[str, Any] = {
        "target": (target.data_ptr(), target.dtype == torch.int64, *column(target.float())[2:]),  # type: ignore[index]
        "weight": vector(weight), "divisor": address(divisor) if mean else 0, "ignore_index": -100, "stream": 0,
        "label_smoothing": case.options.get("label_smoothing", 0.0), "z_loss": case.options.get("z_loss", 0.0),
        "softcap": case.options.get("softcap", 0.0), **sizes(logits),
    }  # fmt: skip
    if mean:
        kernels.count_classes(
            out=address(divisor), partial=address(partial), target=address(target), P=M, N=V, weight=vector(weight),
            target_64=target.dtype == torch.int64, ignore_index=-100, stream=0,
        )  # fmt: skip
    kernels.cross_entropy_forward(
        loss=column(losses), row_max=address(row_max), log_sum=address(log_sum), dlogits=rows(dlogits),
        logits=rows(logits), dloss=None, **common,
    )  # fmt: skip
    results = {"loss": losses, "dlogits": dlogits}
    if not none:
        results["loss"] = poisoned(logits, F32, ())
        kernels.sum_values(
            out=vector(results["loss"]), partial=address(partial), values=address(losses), P=M, stream=0,
            divisor=common["divisor"],
        )  # fmt: skip
    factor = torch.full(target.shape, 1.0)
    kernels.cross_entropy_backward(
        dlogits=rows(again), dloss=column(factor), logits=rows(given), row_max=column(row_max),
        log_sum=address(log_sum), **common,
    )  # fmt: skip
    return results | {"dlogits again": again}


def loss_in_torch(
    case: Loss, logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    leaf = logits.to(dtype).detach().requires_grad_()
    x, w = leaf.view(-1, case.V) if leaf.is_contiguous() else leaf.reshape(-1, case.V), weight
    loss = reference_cross_entropy.cross_entropy(
        x, target.reshape(-1), w if w is None or dtype != F64 else w.double(), reduction=reduction,
        loss_dtype=None if dtype == F64 else case.loss_dtype if reduction == "none" else F32, **case.options,
    )  # fmt: skip
    gradient = torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0]
    return {"loss": loss.detach(), "dlogits": gradient, "dlogits again": gradient}


def check_loss(
    kernels: ModuleType, case: Loss, reduction: str, schedule: str = "eager", bug: str = "None", inplace: bool = False
) -> None:
    logits, target, weight = loss_tensors(case)
    exact, eager = (loss_in_torch(case, logits, target, weight, reduction, dtype) for dtype in (F64, case.dtype))
    with emulating(kernels, case.gpu, schedule, bug):
        results = run_loss(kernels, case, logits, target, weight, reduction, inplace)
    for name, result in results.items():
        assert_close(result.reshape(exact[name].shape), exact[name], eager[name], name)


@SCHEDULES
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_cross_entropy(case: Loss, schedule: str, kernels: ModuleType):
    reduction = {"eager": "mean", "tma_last": "sum"}.get(schedule, "none")
    check_loss(kernels, case, reduction, schedule)


@pytest.mark.parametrize("case", LONG_LOSSES, ids=str)
def test_cross_entropy_of_long_rows(case: Loss, kernels: ModuleType):
    check_loss(kernels, case, "mean", "random")


@pytest.mark.parametrize(
    "case", [case for case in LOSSES if case.name in ("V100", "V1100_bf16", "cluster", "chunks_read_again", "everything")],
    ids=str,
)  # fmt: skip
def test_cross_entropy_in_place(case: Loss, kernels: ModuleType):
    check_loss(kernels, case, "sum", "random", inplace=True)


def test_cross_entropy_of_many_rows(kernels: ModuleType):
    """More rows than one CTA adds up."""
    values, target = randn(20_000, dtype=F32), torch.zeros(20_000, dtype=torch.int64)
    target[::3], target[1] = -100, 7
    partial, out, count = poisoned(values, F32, (kernels.sum_partials(20_000),)), torch.zeros(1), torch.zeros(1)
    assert partial.numel() > 1
    with emulating(kernels, schedule="random"):
        kernels.count_classes(
            out=address(count), partial=address(partial), target=address(target), target_64=True, weight=None,
            ignore_index=-100, P=20_000, N=7, stream=0,
        )  # fmt: skip
        kernels.sum_values(
            out=vector(out),
            partial=address(partial),
            values=address(values),
            divisor=address(count),
            P=20_000,
            stream=0,
        )
    assert count.item() == target.eq(0).sum()
    assert_close(out[0], values.double().sum() / count[0], values.sum() / count[0], scale=values.abs().max().item())


def test_cross_entropy_of_edges(kernels: ModuleType):
    """-inf among the logits is a class of probability 0; what an ignored row holds is not read; a class that does not
    exist, or a row of -inf, NaN or inf is NaN, and its neighbours do not notice."""
    case = Loss("edges", 7, 40)
    logits, target, _ = loss_tensors(case)
    logits[1, 3], logits[2], logits[3], logits[4, 5], logits[5, 6] = -math.inf, math.nan, -math.inf, math.inf, math.nan
    target[1], target[2], target[6] = 4, -100, 40
    results = run_loss(kernels, case, logits, target, None, "none")
    exact, eager = (loss_in_torch(case, logits, target, None, "none", dtype) for dtype in (F64, F32))
    for name, result in results.items():
        assert_close(result, exact[name], eager[name], name)
    assert results["loss"][2] == 0.0 and results["loss"][6].isnan() and results["loss"][:2].isfinite().all()


def test_scale_rows(kernels: ModuleType):
    for dtype, layout in ((F32, "contiguous"), (BF16, "unaligned"), (F16, "padded")):
        x, factor = lay_out(randn(5, 101, dtype=dtype), layout), randn(5, dtype=F32, seed=1)
        factor[2] = 1.0
        out = poisoned(x)
        kernels.scale_rows(out=rows(out), x=rows(x), factor=column(factor), stream=0, **sizes(x))
        assert out.equal((x.float() * factor[:, None]).to(dtype))
        kernels.scale_rows(out=rows(x), x=rows(x), factor=column(factor), stream=0, **sizes(x))
        assert x.equal(out)


# ---------------------------------------------------------------------------------- planted mistakes, and configurations

BUGS = {
    "NoBarrier": Norm("", 3, 1000, rms=True),
    "OneRound": Norm("", 12, 1000, rms=True, gpu=Gpu(sms=1)),
    "WarpOnly": Soft("", (2, 1000)),
    "NoClusterSync": Soft("", (2, 4000), gpu=SMALL),
    "NoStartSync": Norm("", 2, 4000, rms=True, gpu=SMALL),
    "OwnTotals": Loss("", 2, 4000, gpu=SMALL),
    "LastRowOnly": Norm("", 70, 40, rms=True, gpu=Gpu(sms=1)),
    "OneGroup": Norm("", 70, 40, rms=True),
    "NoFlushBarrier": Norm("", 70, 40, rms=True),
    "SharedKeep": Soft("", (2, 4000), gpu=SMALL_AMPERE),
}


def check(kernels: ModuleType, case: Norm | Soft | Loss, schedule: str, bug: str) -> None:
    if isinstance(case, Norm):
        check_norm(kernels, case, schedule, bug)
    elif isinstance(case, Soft):
        check_softmax(kernels, case, False, schedule, bug)
    else:
        check_loss(kernels, case, "sum", schedule, bug)


@SCHEDULES
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str, schedule: str, kernels: ModuleType):
    """By a finding of the emulator, or by a wrong result."""
    check(kernels, BUGS[bug], schedule, "None")
    with pytest.raises((RuntimeError, AssertionError)):
        check(kernels, BUGS[bug], schedule, bug)


def test_every_bug_is_planted(kernels: ModuleType):
    assert sorted(BUGS) == sorted(kernels.emulator_rows_bugs())


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("pack, elements, kept", [(8, 32, 64), (4, 16, 64), (8, 16, 0), (4, 16, 0)])
def test_configurations_are_legal(pack: int, elements: int, kept: int, clusters: bool, kernels: ModuleType):
    shared = 227 * 1024 if clusters else 99 * 1024
    lengths = [*range(1, 300), *(n + d for k in range(8, 31) for n in (1 << k, 3 << (k - 1)) for d in (-1, 0, 1))]
    for N in lengths:
        for shifted in (False, True):
            config = kernels.row_config(N, pack, elements, kept, shifted, clusters, shared)
            assert config["illegal"] == "", (N, config)
    one_chunk = kernels.row_config(131_072, 8, 32, 64, False, True, shared)
    assert one_chunk["cluster"] == 8 and one_chunk["chunks"] == 1
    assert kernels.row_config(4096, 8, 32, 64, False, True, shared) == {
        "threads": 128, "threads_per_row": 128, "cluster": 1, "chunks": 1, "kept": 0, "shared_bytes": 768, "illegal": "",
    }  # fmt: skip


def test_refusals_name_the_argument(kernels: ModuleType):
    x = randn(2, 8, dtype=F32)
    call = {"y": rows(x), "x": rows(x), **soft_arguments(x, None, Soft("", (2, 8)), False)}
    with pytest.raises(ValueError, match="M and N are 0 and 8"):
        kernels.softmax_forward(**{**call, "M": 0})
    with pytest.raises(ValueError, match="R1 and R2"):
        kernels.softmax_forward(**{**call, "R2": 3})
    with pytest.raises(ValueError, match="dtype is 7"):
        kernels.softmax_forward(**{**call, "x": (x.data_ptr(), 7, 0, 0, 8)})
    with pytest.raises(ValueError, match="label_smoothing"):
        run_loss(
            kernels, Loss("", 2, 8, options={"label_smoothing": 0.1}), x, torch.tensor([1, 2]), torch.ones(8), "sum"
        )
