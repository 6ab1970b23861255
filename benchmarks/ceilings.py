"""What the machine can do at best, measured in the run whose results are held to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.timing import Effort, Run, measure
from benchmarks.workload import Workload, randn

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}  # several times any cache
MATRIX = {"cuda": 8192, "cpu": 1024}
EFFORT = Effort(seconds=1.0, fewest=5, most=50)


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second that a copy reads and writes, and operations a second of a square matrix product by dtype."""

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def floor(self, workload: Workload) -> float:
        """Seconds below which the workload cannot be, whoever computes it."""
        arithmetic = self.flops_per_s.get(workload.dtype_name)
        by_arithmetic = workload.flops / arithmetic if arithmetic else 0.0
        return max(by_arithmetic, workload.bytes / self.bytes_per_s)

    def as_dict(self) -> dict[str, float]:
        return {"bytes_per_s": self.bytes_per_s} | {
            f"flops_per_s_{dtype}": value for dtype, value in self.flops_per_s.items()
        }


def measure_ceilings(device: torch.device, dtypes: list[torch.dtype], effort: Effort = EFFORT) -> Ceilings:
    """A copy of more than any cache holds, and matrix products of random numbers: zeros would take less power."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Run] = {"copy": partial(target.copy_, source)}
    n = MATRIX[device.type]
    for dtype in dtypes:
        a, b = (randn(n, n, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
        out = torch.empty_like(a)
        calls[str(dtype)] = partial(torch.mm, a, b, out=out)
    timings = {name: measure({name: call}, device, effort)[name] for name, call in calls.items()}
    return Ceilings(
        2 * source.nbytes / timings["copy"].median,
        {str(d).removeprefix("torch."): 2 * n**3 / timings[str(d)].median for d in dtypes},
    )
