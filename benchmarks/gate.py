"""Correctness before speed: no provider is timed on a workload whose result it gets wrong.

Result and gradients are held to float64 twice, in roundings of the workload's dtype: the largest error, beside the
largest number, which shows what is wrong in one place; and the root mean square, beside that of the numbers, which is
steadier and shows what is slightly wrong everywhere. In either, a provider may be as far off as flash-attention's own
tests allow: twice the error of the unfused operation in the same dtype for a result, three times the largest of any
gradient for a gradient; and a rounding more. The unfused operation may be right by luck, on one machine and not on
another: what it refuses is held to its simulated errors too, which are the same everywhere and take longer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.provider import Call
from benchmarks.workload import Problem, Tensors, Workload, randn
from fastattn.testing import max_error, simulate_rounding

RESULT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
ROOT_MEAN_SQUARE_OF_A_ROUNDING = 0.5  # at most: a half, if every number is as far from its neighbours as can be


@dataclass(frozen=True)
class Errors:
    """In roundings: the largest, and the root mean square."""

    largest: float
    rms: float

    @classmethod
    def of(cls, actual: Tensor, exact: Tensor, dtype: torch.dtype) -> Errors:
        if exact.numel() == 0:
            return cls(0.0, 0.0)
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(torch.float64).tiny
        largest, rms = exact.abs().max().item(), exact.square().mean().sqrt().item()
        error = (actual.detach().double() - exact).square().mean().sqrt().item()
        return cls(max_error(actual, exact) / (eps * largest + tiny), error / (eps * rms + tiny))

    def or_larger(self, other: Errors) -> Errors:
        return Errors(max(self.largest, other.largest), max(self.rms, other.rms))


@dataclass(frozen=True)
class Truth:
    """What a workload is held to: float64's values, and how far the unfused operation is from them."""

    workload: Workload
    exact: dict[str, Tensor]  # y, and the gradient of each differentiable input by its name
    eager: dict[str, Errors]
    simulate: Callable[[], dict[str, Errors]]  # the largest of several draws

    @functools.cached_property
    def with_simulated(self) -> Truth:
        """The same with the larger of torch's and the simulated errors."""
        return dataclasses.replace(
            self, eager={name: self.eager[name].or_larger(errors) for name, errors in self.simulate().items()}
        )

    def allowed(self, name: str) -> Errors:
        if name == "y":
            factor, errors = RESULT_FACTOR, [self.eager["y"]]
        else:
            factor, errors = GRADIENT_FACTOR, [e for other, e in self.eager.items() if other != "y"]
        return Errors(
            factor * max(e.largest for e in errors) + 1.0,
            factor * max(e.rms for e in errors) + ROOT_MEAN_SQUARE_OF_A_ROUNDING,
        )

    def eager_error(self) -> float:
        """The largest of result and gradients."""
        return max(errors.largest for errors in self.eager.values())


@dataclass(frozen=True)
class Verdict:
    error: float  # the largest of result and gradients, in roundings
    wrong: str | None  # what is further away than it may be


def truth_of(workload: Workload, inputs: Tensors, dy: Tensor | None) -> Truth:
    """Computes it twice: in float64, and in the workload's dtype."""
    parts = [
        (unfused(problem), {name: cut(name, t) for name, t in inputs.items()}, None if dy is None else cut("y", dy))
        for problem, cut in workload.problem.parts()
    ]

    def computed(convert: Callable[[Tensors], Tensors]) -> dict[str, Tensor]:
        return joined([results(workload, Call(function, convert(own)), own_dy) for function, own, own_dy in parts])

    whole = computed(as_float64)

    def simulate() -> dict[str, Errors]:
        drawn = simulate_rounding(lambda: computed(dict))
        return {
            name: functools.reduce(Errors.or_larger, (Errors.of(t, whole[name], workload.dtype) for t in draws))
            for name, draws in drawn.items()
        }

    errors = {name: Errors.of(t, whole[name], workload.dtype) for name, t in computed(dict).items()}
    return Truth(workload, whole, errors, simulate)


def unfused(problem: Problem) -> Callable[..., Tensor]:
    return lambda **given: problem.compute(given)


def joined(heads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(heads) == 1:
        return heads[0]
    return {name: torch.cat([head[name] for head in heads], 1) for name in heads[0]}


def check(truth: Truth, call: Call, dy: Tensor | None) -> Verdict:
    """Runs a call once and holds what it returns to the truth."""
    found = results(truth.workload, call, dy)
    verdict = hold(truth, found)
    return hold(truth.with_simulated, found) if verdict.wrong else verdict


def hold(truth: Truth, found: dict[str, Tensor]) -> Verdict:
    worst, wrong = 0.0, []
    for name, exact in truth.exact.items():
        actual = found[name]
        if actual.shape != exact.shape:
            wrong.append(f"{label(name)} has shape {tuple(actual.shape)}, not {tuple(exact.shape)}")
            worst = float("inf")
            continue
        errors, allowed = Errors.of(actual, exact, truth.workload.dtype), truth.allowed(name)
        worst = max(worst, errors.largest)
        if not errors.largest <= allowed.largest:
            wrong.append(f"{label(name)} is up to {errors.largest:.3g} roundings off, allowed {allowed.largest:.3g}")
        elif not errors.rms <= allowed.rms:
            wrong.append(f"{label(name)} is {errors.rms:.3g} roundings off on average, allowed {allowed.rms:.3g}")
    return Verdict(worst, "; ".join(wrong) or None)


def label(name: str) -> str:
    return "the result" if name == "y" else f"d{name}"


def results(workload: Workload, call: Call, dy: Tensor | None) -> dict[str, Tensor]:
    """The result, and with a direction other than forward the gradients, in the problem's layout."""
    if workload.direction == "forward":
        with torch.no_grad():
            return {"y": call.canonical(call.function(**call.tensors))}
    leaves = leaves_of(workload, call.tensors)
    y = call.function(**{**call.tensors, **leaves})
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent(y, dy, call))
    gradients = {name: call.canonical(g) for name, g in zip(leaves, grads, strict=True)}
    return {"y": call.canonical(y.detach()), **gradients}


def leaves_of(workload: Workload, tensors: Tensors) -> dict[str, Tensor]:
    names = [name for name in workload.problem.differentiable if name in tensors]
    return {name: tensors[name].detach().requires_grad_() for name in names}


def cotangent(y: Tensor, dy: Tensor | None, call: Call) -> Tensor | None:
    """dy, given in the problem's layout, in that of y."""
    if dy is None or y.dim() == 0:
        return None
    laid_out = torch.empty_like(y, requires_grad=False)
    call.canonical(laid_out).copy_(dy)
    return laid_out


def gradient_of_result(workload: Workload, inputs: Tensors) -> Tensor | None:
    """Random dy of the result's shape; None where only the result is asked for, or it is one number."""
    if workload.direction == "forward":
        return None
    shape = workload.problem.result_shape()
    if shape == ():
        return None
    device = next(iter(inputs.values())).device
    return randn(*shape, dtype=workload.dtype, device=device, seed=99)


def as_float64(tensors: Tensors) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
