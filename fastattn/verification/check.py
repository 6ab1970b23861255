"""What a check is, and how a backend is held to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.errors import UnsupportedError
from fastattn.testing import max_error, simulate_rounding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """Two functions of the named floating-point inputs and of `constants`, which have no gradient; ours takes backend=.

    `hidden`: of some inputs, a part that the result must not depend on: ours finds NaN there, and gradients of 0 are
    due.
    """

    name: str
    theirs: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    constants: Callable[[torch.device], Tensors] = field(default=lambda device: {})
    hidden: Mapping[str, tuple[slice, ...]] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensors, torch.Generator]:
        """The same random numbers for every dtype, and the generator for those that follow."""
        generator = torch.Generator().manual_seed(0)
        return {name: randn(shape, generator, dtype, device) for name, shape in self.shapes.items()}, generator


def randn(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(device, dtype)


@dataclass(frozen=True)
class Finding:
    """One tensor of a check, in roundings of the dtype beside the largest number."""

    tensor: str
    error: float  # the largest
    torch_error: float  # of torch's operation in the same dtype
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class Report:
    """One check of one backend in one dtype; `trouble` says why there is no finding."""

    check: str
    dtype: str
    device: str
    backend: str
    status: str  # ok, wrong, refused, or failed
    findings: tuple[Finding, ...] = ()
    trouble: str = ""

    @property
    def worst(self) -> Finding | None:
        """The one that is nearest to what is allowed, or furthest beyond it."""
        return max(self.findings, key=lambda finding: finding.error / finding.allowed, default=None)


def run(function: Callable[..., Tensor], inputs: Tensors, constants: Tensors, dy: Tensor | None) -> Tensors:
    """The result y and the gradient of each input; dy is 1 if it is None."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = function(**leaves, **constants)
    dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def in_float64(tensors: Tensors) -> Tensors:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


@dataclass(frozen=True)
class Case:
    """A check in one dtype on one device: what a backend is given, and what it is held to."""

    check: Check
    dtype: torch.dtype
    device: torch.device
    inputs: Tensors
    constants: Tensors
    dy: Tensor | None
    exact: Tensors  # the result and each gradient, by torch in float64
    theirs: Tensors  # by torch in the dtype

    @functools.cached_property
    def simulated(self) -> Tensors:
        """Draws of what torch's operations give when each rounds to the dtype."""
        return simulate_rounding(lambda: run(self.check.theirs, self.inputs, self.constants, self.dy))


def prepare(check: Check, dtype: torch.dtype, device: torch.device) -> Case:
    inputs, generator = check.inputs(dtype, device)
    constants = check.constants(device)
    with torch.no_grad():
        shape = check.theirs(**inputs, **constants).shape
    dy = randn(shape, generator, dtype, device) if shape else None
    exact = run(check.theirs, in_float64(inputs), in_float64(constants), dy)
    return Case(check, dtype, device, inputs, constants, dy, exact, run(check.theirs, inputs, constants, dy))


def examine(case: Case, backends: Sequence[str]) -> Iterator[Report]:
    """One report for each backend."""
    spoilt = {name: t.clone() for name, t in case.inputs.items()}
    for name, where in case.check.hidden.items():
        spoilt[name][where] = torch.nan
    for backend in backends:
        about = case.check.name, str(case.dtype).removeprefix("torch."), str(case.device), backend
        try:
            found = run(case.check.ours, spoilt, {**case.constants, "backend": backend}, case.dy)  # type: ignore[dict-item]
        except UnsupportedError as error:
            yield Report(*about, "refused", trouble=str(error))
        except Exception as error:  # whatever a kernel does on a machine we have not seen, the rest is still examined
            yield Report(*about, "failed", trouble=f"{type(error).__name__}: {error}")
        else:
            findings = compared(found, case)
            yield Report(*about, "ok" if all(finding.right for finding in findings) else "wrong", findings)


def compared(found: Tensors, case: Case) -> tuple[Finding, ...]:
    """Hold each tensor to twice torch's error and a rounding.

    torch's error may be small by luck, on one machine and not on another. What it refuses is held to the simulated
    errors too (`fastattn.testing.simulate_rounding`), which are the same everywhere; they take longer.
    """
    findings = _held(found, case, {name: (t,) for name, t in case.theirs.items()})
    if all(finding.right for finding in findings):
        return findings
    return _held(found, case, {name: (t, *case.simulated[name]) for name, t in case.theirs.items()})


def _held(found: Tensors, case: Case, computed: Mapping[str, Sequence[Tensor]]) -> tuple[Finding, ...]:
    """Findings by what torch computed, which may be several tensors.

    A gradient may have twice the error of torch's worst gradient: over a few numbers an error may be next to none by
    chance. Where torch overflows, one rounding is allowed: that is no excuse.
    """
    exact = case.exact
    errors = {name: [roundings(t, exact[name]) for t in ts] for name, ts in computed.items()}
    finite = {name: max((e for e in own if math.isfinite(e)), default=0.0) for name, own in errors.items()}
    worst = max(error for name, error in finite.items() if name != "y")
    return tuple(
        Finding(
            name,
            roundings(found[name], exact[name]) if found[name].dtype == case.theirs[name].dtype else float("inf"),
            errors[name][0],
            2.0 * (finite[name] if name == "y" else worst) + 1.0,
        )
        for name in exact
    )


def roundings(t: Tensor, exact: Tensor) -> float:
    if t.shape != exact.shape:
        return float("inf")
    numbers = torch.finfo(t.dtype)
    return max_error(t, exact) / (numbers.eps * max(exact.abs().max().item(), numbers.tiny))
