"""Time, memory, clock and power: how they are measured."""

from __future__ import annotations

import os
import time
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from benchmarks import memory, timing
from benchmarks.machine import Monitor
from benchmarks.timing import Effort

CPU = torch.device("cpu")
BRIEF = Effort(seconds=0.0, fewest=2, most=3)


def test_contestants_take_turns_and_are_all_measured_alike(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(timing, "cpu_timer", lambda call: lambda: (order.append(call()), 1.0)[1])
    found = timing.measure({n: lambda n=n: n for n in "abc"}, CPU, Effort(seconds=0.0, fewest=4, most=9))
    assert "".join(order) == "abccbaabccba"
    assert {name: t.samples for name, t in found.items()} == {"a": 4, "b": 4, "c": 4}
    order.clear()
    timing.measure({"a": lambda: "a"}, CPU, Effort(seconds=60.0, fewest=4, most=9))
    assert len(order) == 9


@pytest.mark.parametrize(
    ("seconds", "capturable", "method"),
    [((3e-4, 5e-5), True, "graph"), ((3e-4, 5e-5), False, "events"), ((3e-4, 2e-4), True, "events")],
    ids=["launch-bound", "launch-bound, not to be captured", "long"],
)
def test_on_a_gpu_graphs_are_for_launch_bound_calls_and_for_all_or_none(monkeypatch, seconds, capturable, method):
    def graph_timer(call):
        if not capturable and call == "b":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: 1e-6

    monkeypatch.setattr(timing, "l2_flush", lambda device: None)
    monkeypatch.setattr(timing, "event_timer", lambda call, flush: lambda: dict(zip("ab", seconds, strict=True))[call])
    monkeypatch.setattr(timing, "graph_timer", graph_timer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = timing.measure({"a": "a", "b": "b"}, torch.device("cuda"), BRIEF)
    assert {t.method for t in found.values()} == {method}
    expected = (1e-6, 1e-6) if method == "graph" else seconds
    assert tuple(t.median for t in found.values()) == expected


def test_times_are_medians_of_what_a_call_takes():
    values = [3.0, 1.0, 2.0, 100.0, 4.0]
    found = timing.summarize(values, "clock")
    assert found.median == median(values)
    assert (found.fastest_quarter, found.slowest_quarter) == (2.0, 4.0)
    slept = timing.measure({"sleep": lambda: time.sleep(0.003)}, CPU, BRIEF)["sleep"]
    assert 0.003 <= slept.median < 0.05


def test_peak_memory_is_that_of_the_allocator():
    def call():
        a = torch.empty(1 << 20)  # 4 MiB
        b = a + 1  # 8
        del a
        c = b + 1  # 8
        return c[:1].clone()

    assert 0 <= memory.peak_bytes(call, CPU) - (8 << 20) < 1024  # and scalars


def test_clock_and_power_are_read_while_a_row_is_timed(tmp_path, monkeypatch):
    """By a stand-in of nvidia-smi, which first reports a value that this card does not have."""
    script = tmp_path / "nvidia-smi"
    lines = "echo '[N/A], 300.0'; echo '1980, 650.5'; echo '1965, 690.5'; echo '1410, 700.0'"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n{lines}\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0a1b"))
    began = time.monotonic()
    with Monitor(torch.device("cuda", 0)) as monitor:
        while len(monitor.samples) < 3:
            assert time.monotonic() - began < 30
            time.sleep(0.01)
        assert monitor.since(began) == (1965, 690.5)
        assert monitor.since(time.monotonic()) == (None, None)
    assert monitor.process is not None
    assert monitor.process.poll() is not None
    given = (tmp_path / "arguments").read_text()
    assert "--id=GPU-0a1b --query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits --loop-ms=200" in given
    assert Monitor(CPU).since(began) == (None, None)
