"""What tests of the row kernels share: the emulator and its switches, and tensors as the kernels take them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastattn import native

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SCHEDULES = pytest.mark.parametrize("schedule", ["eager", "tma_last", "wgmma_last", "random"])
DTYPES = {F32: 0, BF16: 1, F16: 2}

NEEDS_COMPILER = pytest.mark.skipif(native.why_no_emulator() is not None, reason=str(native.why_no_emulator()))


@functools.cache
def kernels() -> ModuleType:
    return native.load_emulator()


@dataclass(frozen=True)
class Gpu:
    """What the emulated GPU has; little of it makes few threads run through every path."""

    clusters: bool = True
    threads: int = 512  # of a CTA
    shared: int = 227 * 1024  # bytes of a CTA
    sms: int = 2


HOPPER = Gpu()
AMPERE = Gpu(clusters=False)
SMALL = Gpu(threads=64)  # a CTA holds 1024 elements of fp32, 2048 of 16 bits, half of them in a backward of norms
SMALL_ = Gpu()
SMALL_AMPERE = Gpu(clusters=False, threads=64)  # 768 bytes for reductions, and 4096 for each chunk that is kept
POOR_AMPERE = Gpu(clusters=False, threads=64, shared=768 + 4096)


@contextmanager
def emulating(gpu: Gpu = HOPPER, schedule: str = "eager", bug: str = "None") -> Iterator[None]:
    def set_to(gpu: Gpu, schedule: str, bug: str) -> None:
        kernels().emulator_mode(schedule, 1)
        kernels().emulator_sms(gpu.sms)
        kernels().emulator_clusters(gpu.clusters)
        kernels().emulator_row_limits(gpu.threads, gpu.shared)
        kernels().emulator_rows_bug(bug)

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
