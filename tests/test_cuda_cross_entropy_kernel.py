"""Cross-entropy of csrc/cuda, run by the emulator in every schedule, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
    address,
    column,
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

from fastattn.reference import cross_entropy as reference_cross_entropy
from fastattn.testing import assert_close, simulate_rounding

pytestmark = NEEDS_COMPILER


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
    gpu: Gpu = HOPPER

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
    case: Loss, logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str,
    inplace: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Loss and gradient in one pass, and the gradient again from the statistics, after a factor on each row's loss."""
    M, V = case.M, case.V
    none, mean = reduction == "none", reduction == "mean"
    losses = poisoned(logits, case.loss_dtype if none else F32, target.shape)
    row_max, row_sum = (poisoned(logits, F32, target.shape) for _ in range(2))
    divisor, partial = poisoned(logits, F32, (1,)), poisoned(logits, F32, (kernels().sum_partials(M),))
    dlogits, again = logits if inplace else poisoned(logits), poisoned(logits)
    given = logits.clone(memory_format=torch.preserve_format) if inplace else logits
    common: dict[str, Any] = {
        "target": (target.data_ptr(), target.dtype == torch.int64, *column(target.float())[2:]),  # type: ignore[index]
        "weight": vector(weight), "divisor": address(divisor) if mean else 0, "ignore_index": -100, "stream": 0,
        "label_smoothing": case.options.get("label_smoothing", 0.0), "z_loss": case.options.get("z_loss", 0.0),
        "softcap": case.options.get("softcap", 0.0), **sizes(logits),
    }  # fmt: skip
    if mean:
        kernels().count_classes(
            out=address(divisor), partial=address(partial), target=address(target), P=M, N=V, weight=vector(weight),
            target_64=target.dtype == torch.int64, ignore_index=-100, stream=0,
        )  # fmt: skip
    kernels().cross_entropy_forward(
        loss=column(losses), row_max=address(row_max), row_sum=address(row_sum), dlogits=rows(dlogits),
        logits=rows(logits), dloss=None, **common,
    )  # fmt: skip
    results = {"loss": losses, "dlogits": dlogits}
    if not none:
        results["loss"] = poisoned(logits, F32, ())
        kernels().sum_values(
            out=vector(results["loss"]), partial=address(partial), values=address(losses), P=M, stream=0,
            divisor=common["divisor"],
        )  # fmt: skip
    factor = torch.full(target.shape, 1.0)
    kernels().cross_entropy_backward(
        dlogits=rows(again), dloss=column(factor), logits=rows(given), row_max=column(row_max),
        row_sum=address(row_sum), **common,
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


def check_loss(case: Loss, reduction: str, schedule: str = "eager", bug: str = "None", inplace: bool = False) -> None:
    logits, target, weight = loss_tensors(case)
    arguments = (case, logits.clone(), target, weight, reduction)
    exact = loss_in_torch(*arguments, F64)
    rounded = simulate_rounding(lambda: loss_in_torch(*arguments, case.dtype))
    with emulating(case.gpu, schedule, bug):
        results = run_loss(case, logits, target, weight, reduction, inplace)
    for name, result in results.items():
        assert_close(result.reshape(exact[name].shape), exact[name], rounded[name], name)


@SCHEDULES
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_cross_entropy(case: Loss, schedule: str):
    reduction = {"eager": "mean", "tma_last": "sum"}.get(schedule, "none")
    check_loss(case, reduction, schedule)


@pytest.mark.parametrize("case", LONG_LOSSES, ids=str)
def test_cross_entropy_of_long_rows(case: Loss):
    check_loss(case, "mean", "random")


@pytest.mark.parametrize(
    "case",
    [case for case in LOSSES if case.name in ("V100", "V1100_bf16", "cluster", "chunks_read_again", "everything")],
    ids=str,
)
def test_cross_entropy_in_place(case: Loss):
    check_loss(case, "sum", "random", inplace=True)


def test_cross_entropy_of_many_rows():
    """More rows than one CTA adds up."""
    values, target = randn(20_000, dtype=F32), torch.zeros(20_000, dtype=torch.int64)
    target[::3], target[1] = -100, 7
    partial, out, count = poisoned(values, F32, (kernels().sum_partials(20_000),)), torch.zeros(1), torch.zeros(1)
    assert partial.numel() > 1
    with emulating(schedule="random"):
        kernels().count_classes(
            out=address(count), partial=address(partial), target=address(target), target_64=True, weight=None,
            ignore_index=-100, P=20_000, N=7, stream=0,
        )  # fmt: skip
        kernels().sum_values(
            out=vector(out),
            partial=address(partial),
            values=address(values),
            divisor=address(count),
            P=20_000,
            stream=0,
        )
    assert count.item() == target.eq(0).sum()
    rounded = simulate_rounding(lambda: values.sum() / count[0])
    assert_close(out[0], values.double().sum() / count[0], rounded, scale=values.abs().max().item())


def test_cross_entropy_of_edges():
    """-inf among the logits is a class of probability 0; what an ignored row holds is not read; a class that does not
    exist, or a row of -inf, NaN or inf is NaN, and its neighbours do not notice."""
    case = Loss("edges", 7, 40)
    logits, target, _ = loss_tensors(case)
    logits[1, 3], logits[2], logits[3], logits[4, 5], logits[5, 6] = -math.inf, math.nan, -math.inf, math.inf, math.nan
    target[1], target[2], target[6] = 4, -100, 40
    results = run_loss(case, logits, target, None, "none")
    exact = loss_in_torch(case, logits, target, None, "none", F64)
    rounded = simulate_rounding(lambda: loss_in_torch(case, logits, target, None, "none", F32))
    for name, result in results.items():
        assert_close(result, exact[name], rounded[name], name)
    loss = results["loss"]
    assert loss[2] == 0.0
    assert loss[6].isnan()
    assert loss[:2].isfinite().all()


def test_scale_rows():
    for dtype, layout in ((F32, "contiguous"), (BF16, "unaligned"), (F16, "padded")):
        x, factor = lay_out(randn(5, 101, dtype=dtype), layout), randn(5, dtype=F32, seed=1)
        factor[2] = 1.0
        out = poisoned(x)
        kernels().scale_rows(out=rows(out), x=rows(x), factor=column(factor), stream=0, **sizes(x))
        assert out.equal((x.float() * factor[:, None]).to(dtype))
        kernels().scale_rows(out=rows(x), x=rows(x), factor=column(factor), stream=0, **sizes(x))
        assert x.equal(out)


BUGS = {
    "OwnTotals": Loss("", 2, 4000, gpu=SMALL),
}


@SCHEDULES
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str, schedule: str):
    """By a finding of the emulator, or by a wrong result."""
    check_loss(BUGS[bug], "sum", schedule, "None")
    with pytest.raises((RuntimeError, AssertionError)):
        check_loss(BUGS[bug], "sum", schedule, bug)
