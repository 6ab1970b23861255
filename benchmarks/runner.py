"""One workload after another: inputs, truth, each provider checked, those that are right timed in turns."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import gate, memory
from benchmarks.ceilings import Ceilings
from benchmarks.machine import Monitor
from benchmarks.provider import Call, Provider, first_line
from benchmarks.results import Row, Status
from benchmarks.timing import Effort, Run, Timing, measure, own_stream
from benchmarks.workload import Workload
from fastattn.errors import UnsupportedError


@dataclass(frozen=True)
class Contestant:
    """A provider that is right on a workload, ready to be timed."""

    provider: Provider
    verdict: gate.Verdict
    run: Run
    peak_bytes: int


@dataclass
class Runner:
    device: torch.device
    providers: Sequence[Provider]
    ceilings: Ceilings
    effort: Effort
    monitor: Monitor | None = None
    unavailable: dict[str, str] = field(default_factory=dict)  # provider -> why

    def __post_init__(self) -> None:
        for provider in self.providers:
            if why := provider.available(self.device):
                self.unavailable[provider.name] = why

    def run(self, workloads: Iterable[Workload]) -> Iterator[list[Row]]:
        """The rows of one workload after another, one for each provider."""
        for workload in workloads:
            with own_stream(self.device):
                rows = self.rows(workload)
            yield rows
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def rows(self, workload: Workload) -> list[Row]:
        """One for each provider that has the operation; one that fails in a way of its own says so in its row."""
        inputs = workload.problem.inputs(workload.dtype, self.device)
        dy = gate.gradient_of_result(workload, inputs)
        able = [provider for provider in self.providers if workload.problem.op in provider.ops]
        try:
            truth = gate.truth_of(workload, inputs, dy)
        except torch.OutOfMemoryError:
            why = "the same in float64, which it would be held to, does not fit into memory"
            return [self.row(workload, provider, "failed", why) for provider in able]
        entered = [self.enter(provider, workload, inputs, dy, truth) for provider in able]
        contestants = [entry for entry in entered if isinstance(entry, Contestant)]
        began = time.monotonic()
        timings = measure({c.provider.name: c.run for c in contestants}, self.device, self.effort)
        clock, power = self.monitor.since(began) if self.monitor else (None, None)
        rows = []
        for entry in entered:
            if isinstance(entry, Contestant):
                row = self.timed_row(workload, truth, entry, timings[entry.provider.name])
                row.clock_mhz, row.power_w = clock, power
                rows.append(row)
            else:
                rows.append(entry)
        return rows

    def enter(
        self, provider: Provider, workload: Workload, inputs: dict[str, Tensor], dy: Tensor | None, truth: gate.Truth
    ) -> Contestant | Row:
        """Builds the call and checks it; a Row says why there is nothing to time."""
        if why := self.unavailable.get(provider.name):
            return self.row(workload, provider, "unavailable", why)
        if why := provider.limits(workload, self.device):
            return self.row(workload, provider, "unsupported", why)
        try:
            call = provider.make(workload, inputs)
            verdict = gate.check(truth, call, dy)
            if verdict.wrong:
                row = self.row(workload, provider, "wrong", verdict.wrong)
                row.error = verdict.error if math.isfinite(verdict.error) else None  # NaN, or another shape
                row.eager_error = truth.eager_error()
                return row
            run, whole = runs(workload, call, dy)
            return Contestant(provider, verdict, run, memory.peak_bytes(whole, self.device))
        except UnsupportedError as error:
            return self.row(workload, provider, "unsupported", first_line(error))
        except Exception as error:  # a peer may break in any way; that is a result too
            return self.row(workload, provider, "failed", f"{type(error).__name__}: {first_line(error)}")

    def row(self, workload: Workload, provider: Provider, status: Status, reason: str | None = None) -> Row:
        return Row(
            workload.family, workload.name, workload.direction, workload.dtype_name, workload.series, workload.size,
            provider.name, status, reason, workload.flops, workload.bytes, floor=self.ceilings.floor(workload),
        )  # fmt: skip

    def timed_row(self, workload: Workload, truth: gate.Truth, contestant: Contestant, timing: Timing) -> Row:
        row = self.row(workload, contestant.provider, "ok")
        row.error, row.eager_error = contestant.verdict.error, truth.eager_error()
        row.seconds, row.samples, row.timing = timing.median, timing.samples, timing.method
        row.fastest_quarter, row.slowest_quarter = timing.fastest_quarter, timing.slowest_quarter
        row.peak_bytes = contestant.peak_bytes
        return row


def runs(workload: Workload, call: Call, dy: Tensor | None) -> tuple[Run, Run]:
    """-> (what is timed, what peak memory is taken of: with a backward, its forward too)."""
    if workload.direction == "forward":
        forward = without_gradients(call)
        return forward, forward
    leaves = gate.leaves_of(workload, call.tensors)
    tensors = {**call.tensors, **leaves}
    wanted = list(leaves.values())

    def step() -> object:
        y = call.function(**tensors)
        return torch.autograd.grad(y, wanted, gate.cotangent(y, dy, call))

    if workload.direction == "step":
        return step, step
    y = call.function(**tensors)
    cotangent = gate.cotangent(y, dy, call)
    return lambda: torch.autograd.grad(y, wanted, cotangent, retain_graph=True), step


def without_gradients(call: Call) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return call.function(**call.tensors)

    return forward
