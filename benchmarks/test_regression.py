"""A small set for pytest-benchmark, to be run before and after a change: `pytest benchmarks --benchmark-only`.

Each is what a call of fastattn would run on this machine, and is checked before it is timed.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import gate, runner
from benchmarks.families import workloads
from benchmarks.provider import Provider, discover
from benchmarks.workload import Workload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = ("attention", "layer_norm", "rms_norm", "softmax causal", "cross_entropy", "linear_cross_entropy", "layer")


def first_of_ours(workload: Workload) -> Provider:
    ours = [provider for provider in discover() if provider.name.startswith("fastattn")]
    return next(p for p in ours if workload.problem.op in p.ops and not p.available(DEVICE))


def chosen() -> list[Workload]:
    """The first quick workload of each family and direction."""
    found = {(w.family, w.direction): w for w in reversed(workloads(DEVICE, quick=True)) if w.family in FAMILIES}
    return list(reversed(found.values()))


@pytest.mark.parametrize("workload", chosen(), ids=str)
def test_speed(benchmark, workload: Workload) -> None:
    inputs = workload.problem.inputs(workload.dtype, DEVICE)
    dy = gate.gradient_of_result(workload, inputs)
    call = first_of_ours(workload).make(workload, inputs)
    assert gate.check(gate.truth_of(workload, inputs, dy), call, dy).wrong is None
    run, _ = runner.runs(workload, call, dy)
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None

    def timed() -> None:
        run()
        wait()

    benchmark(timed)
