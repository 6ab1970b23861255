"""What a run was made on: device, versions, threads; and the GPU's clock and power while it ran."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch

import fastattn
from fastattn import backends
from fastattn.backends.cpu.module import load

PEERS = (
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "liger-kernel",
    "quack-kernels",
    "transformer-engine",
)


# What decides how threads wait, and whether memory that was freed is kept for the next call
ENVIRONMENT = ("OMP_WAIT_POLICY", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions of everything that has a part in the figures, and threads."""
    return {
        "device": describe_gpu(device) if device.type == "cuda" else describe_cpu(),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "load": os.getloadavg()[0]
        if hasattr(os, "getloadavg")
        else None,  # processes that ran or waited, before the run
        "platform": platform.platform(),
        "versions": versions(),
    }


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write what a benchmark of CPU tensors measured, and where."""
    report = {"machine": describe(torch.device("cpu")), "rows": rows}
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "fastattn": fastattn.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if torch.cuda.is_available() else None,
    }
    return found | {name: version for name in PEERS if (version := version_of(name))}


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout the suite runs from, with a + if it has changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_gpu(device: torch.device) -> dict[str, Any]:
    card = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "driver": query("driver_version"),
        "power_limit_w": query("power.limit"),
        "max_clock_mhz": query("clocks.max.sm"),
    }


def query(field: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def describe_cpu() -> dict[str, Any]:
    return {
        "type": "cpu",
        "name": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels(),
    }


def kernels() -> str | None:
    """The instruction set that fastattn's kernels use."""
    cpu = backends.get("cpu")
    return None if cpu.available(torch.device("cpu")) else load().isa()


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Monitor:
    """SM clock (MHz) and power (W) of a GPU, sampled all the while by nvidia-smi; without it, nothing.

    Only read: no setting of the card is touched.
    """

    PERIOD_MS = 200

    def __init__(self, device: torch.device) -> None:
        self.samples: deque[tuple[float, float, float]] = deque(maxlen=10_000)  # time, MHz, W
        self.process: subprocess.Popen[str] | None = None
        if device.type == "cuda" and torch.version.cuda and shutil.which("nvidia-smi"):
            self.process = subprocess.Popen(
                [
                    "nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}",
                    "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits",
                    f"--loop-ms={self.PERIOD_MS}",
                ],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                clock, power = map(float, line.split(","))
            except ValueError:  # a value that this card does not report
                continue
            self.samples.append((time.monotonic(), clock, power))

    def since(self, began: float) -> tuple[float | None, float | None]:
        """Medians since `began`, by time.monotonic(); None without a sample."""
        recent = [sample for sample in list(self.samples) if sample[0] >= began]
        if not recent:
            return None, None
        return median(clock for _, clock, _ in recent), median(power for *_, power in recent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
