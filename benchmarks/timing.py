"""Time, measured so that contestants see the same machine: they take turns, and medians are kept.

On a GPU a sample is the time between two events around one call, behind a write that empties the L2 cache. Where a call
is so short that launching it is most of that, it is captured in a CUDA graph, several times over, and the replay is
timed; there the inputs stay in the cache, for every contestant alike. On a CPU a sample is wall time, and the caches
are as the call before has left them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Run = Callable[[], object]

LAUNCH_BOUND = 100e-6  # seconds: below, eager launches would be a part of what is measured
GRAPH_CALLS = 20
L2_TIMES = 4
CPU_SAMPLE = 2e-3  # seconds: shorter calls are repeated until a sample takes that long


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    fastest_quarter: float
    slowest_quarter: float
    samples: int
    method: str


@dataclass(frozen=True)
class Effort:
    """How long one workload is measured."""

    seconds: float  # for all contestants together, once each has had its fewest rounds
    fewest: int
    most: int


def measure(calls: Mapping[str, Run], device: torch.device, effort: Effort) -> dict[str, Timing]:
    """The calls in alternating order, round after round; each is warmed up before."""
    if device.type == "cuda":
        timers, method = gpu_timers(calls, device)
    else:
        timers, method = {name: cpu_timer(call) for name, call in calls.items()}, "clock"
    samples: dict[str, list[float]] = {name: [] for name in timers}
    began = time.perf_counter()
    for round_ in rounds(timers, effort, began):
        for name in round_:
            samples[name].append(timers[name]())
    return {name: summarize(values, method) for name, values in samples.items()}


def rounds(timers: Mapping[str, Callable], effort: Effort, began: float) -> Iterator[list[str]]:
    """Forth and back: who follows whom changes from round to round."""
    names = list(timers)
    for i in itertools.count():
        if i >= effort.most or (i >= effort.fewest and time.perf_counter() - began > effort.seconds):
            return
        yield names if i % 2 == 0 else names[::-1]


def summarize(values: list[float], method: str) -> Timing:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return Timing(median(values), low, high, len(values), method)


def cpu_timer(call: Run) -> Callable[[], float]:
    seconds = wall(call, 1)
    repeats = max(1, round(CPU_SAMPLE / max(min(seconds, wall(call, 1)), 1e-7)))
    return lambda: wall(call, repeats)


def wall(call: Run, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def gpu_timers(calls: Mapping[str, Run], device: torch.device) -> tuple[dict[str, Callable[[], float]], str]:
    """Events; or a graph for each, if one call is launch-bound and all can be captured."""
    flush = l2_flush(device)
    timers = {name: event_timer(call, flush) for name, call in calls.items()}
    for timer in timers.values():
        timer()
    if min(median(timer() for _ in range(3)) for timer in timers.values()) < LAUNCH_BOUND:
        try:
            return {name: graph_timer(call) for name, call in calls.items()}, "graph"
        except RuntimeError:  # one of them synchronises or allocates outside of torch: then all are timed by events
            torch.cuda.synchronize(device)
    return timers, "events"


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """A stream that can be captured, which the default one cannot."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def l2_flush(device: torch.device) -> Run:
    size = torch.cuda.get_device_properties(device).L2_cache_size or 64 << 20
    buffer = torch.empty(L2_TIMES * size, dtype=torch.uint8, device=device)
    return buffer.zero_


def event_timer(call: Run, flush: Run) -> Callable[[], float]:
    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return sample


def graph_timer(call: Run) -> Callable[[], float]:
    """On the current stream, since a backward runs on that of its forward: `own_stream` has to be around both."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(GRAPH_CALLS):
            call()

    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / GRAPH_CALLS

    return sample
