"""Who computes a workload: fastattn's backends and its peers, one file each in `providers`."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.workload import Problem, Tensors, Workload
from fastattn.errors import ArgumentError

MOST_SCORES = 5 << 30  # bytes


def unchanged(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Call:
    """A computation that is ready to run: `function(**tensors)`.

    A provider that wants its tensors in another layout copies them here, once, and says in `canonical` how its result
    and its gradients are seen in the problem's: the copy is not timed, as it would not be needed in a model written
    for that provider.
    """

    function: Callable[..., Tensor]
    tensors: Tensors
    canonical: Callable[[Tensor], Tensor] = unchanged


Make = Callable[[Problem, Tensors], Call]


@dataclass(frozen=True)
class Provider:
    """One way to compute some problems.

    `ops` maps a problem's op to what makes a call of it. `available` and `limits` return None for yes, or the reason.
    `slow_to_make`: `--quick` leaves it out unless it is named.
    """

    name: str
    ops: Mapping[str, Callable]  # op -> Make
    available: Callable[[torch.device], str | None] = field(default=lambda device: None)
    limits: Callable[[Workload, torch.device], str | None] = field(default=lambda workload, device: None)
    slow_to_make: bool = False

    def make(self, workload: Workload, tensors: Tensors) -> Call:
        return self.ops[workload.problem.op](workload.problem, tensors)


def unfused_limits(workload: Workload, device: torch.device) -> str | None:
    """Of what holds all scores of attention at once, several times: it must leave room for the others."""
    scores = getattr(workload.problem, "scores", 0) * workload.dtype.itemsize
    if scores > MOST_SCORES:
        return f"it holds all scores at once, which are {scores / 2**30:.1f} GiB"
    return None


def no_compiler(device: torch.device) -> str | None:
    """`available` of what torch.compile makes."""
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler for CPUs, and there is none"
    return None


def importable(module: str) -> Callable[[torch.device], str | None]:
    """`available` of a peer that is a package."""

    def available(device: torch.device) -> str | None:
        try:
            importlib.import_module(module)
        except Exception as error:  # a peer may break in any way when it is imported, and is then not there
            return f"`import {module}` raises {type(error).__name__}: {first_line(error)}"
        return None

    return available


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or "no message"


def discover() -> list[Provider]:
    """The providers of every file in `providers`, in the order of the files' names, ours first."""
    found: list[Provider] = []
    for info in pkgutil.iter_modules(providers.__path__):
        found += importlib.import_module(f"{providers.__name__}.{info.name}").PROVIDERS
    return sorted(found, key=lambda provider: not provider.name.startswith("fastattn"))


def choose(wanted: Sequence[str], known: Sequence[Provider], quick: bool = False) -> list[Provider]:
    """Those called, or of a group (before the slash) called, as in `wanted`; all of them if it is empty."""
    for name in wanted:
        if not any(name in (p.name, p.name.split("/")[0]) for p in known):
            raise ArgumentError(f"`--vs` has {name!r}; the providers are {', '.join(p.name for p in known)}.")
    known = [p for p in known if p.name in wanted or not (quick and p.slow_to_make)]
    ours = [p for p in known if p.name.startswith("fastattn")]
    chosen = [p for p in known if p.name in wanted or p.name.split("/")[0] in wanted]
    return [*ours, *(p for p in chosen if p not in ours)] if wanted else list(known)
