"""The backends, in the order in which they are tried, and the account of why one was chosen.

A backend is a module with `NAME`, `COMPOSITE`, `available(device)` and `unsupported(spec, device)`; the last two return
None for yes, or the reason. A composite backend is differentiable torch code and is called as it is; a kernel backend
fills tensors, and `fastattn.ops` gives it its derivative. One that has no kernel for a derivative leaves that entry
out, and the next kernel backend that has it computes it from the same saved tensors. A backend may have
`only_on_request(spec, device, work)`: why it is not taken unless it is named; `work` is None where it is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from fastattn.backends import cpu, cuda, eager, reference, triton
from fastattn.errors import ArgumentError, ArgumentTypeError, UnsupportedError, kind
from fastattn.spec import (
    AttentionSpec,
    CrossEntropySpec,
    LinearCrossEntropySpec,
    NormSpec,
    SoftmaxSpec,
    Spec,
    Work,
)
from fastattn.tracing import compiled_under_a_derivative

_BACKENDS: dict[str, ModuleType] = {backend.NAME: backend for backend in (cuda, triton, cpu, eager, reference)}
ORDER: tuple[str, ...] = tuple(_BACKENDS)
# Entries that a backend may leave out, the backward first.
_DERIVATIVES: dict[type, tuple[str, ...]] = {AttentionSpec: ("attention_backward", "attention_tangents")}
# Numbers that a kernel is given. It has them in float32, and their reciprocals.
_NUMBERS: dict[type, tuple[str, ...]] = {
    AttentionSpec: ("scale", "softcap"),
    NormSpec: ("eps", "weight_offset"),
    SoftmaxSpec: ("scale",),
    CrossEntropySpec: ("label_smoothing", "z_loss", "softcap"),
}


def get(name: str) -> ModuleType:
    """The backend called `name`."""
    if not isinstance(name, str):
        raise ArgumentTypeError(f"`backend` is {kind(name)}; it must be None or one of {', '.join(ORDER)}.")
    if name not in ORDER:
        raise ArgumentError(f"`backend` is {name!r}; it must be None or one of {', '.join(ORDER)}.")
    return _BACKENDS[name]


def has_kernels(device: torch.device) -> bool:
    """Whether fused kernels run there. Elsewhere keyed dropout costs many operations, and torch's own is the faster."""
    return any(not backend.COMPOSITE and backend.available(device) is None for backend in _BACKENDS.values())


def unsupported(name: str, spec: Spec, device: torch.device) -> str | None:
    """Why backend `name` cannot compute `spec` on `device`; None when it can."""
    backend = get(name)
    why = backend.available(device) or backend.unsupported(spec, device)
    if why is None and not backend.COMPOSITE:
        if compiled_under_a_derivative():
            return "a compiler traces torch.func's derivatives, which it takes of torch operations alone"
        why = _beyond_float32(spec.loss if isinstance(spec, LinearCrossEntropySpec) else spec)
        for entry in _DERIVATIVES.get(type(spec), ()):
            reasons = _find(entry, name, spec, device)[1]
            if reasons:
                return f"it has no {entry}, and no other backend here has: {reasons}"
    return why


def _beyond_float32(spec: Spec) -> str | None:
    """Why a kernel's arithmetic loses one of the spec's numbers."""
    for argument in _NUMBERS.get(type(spec), ()):
        value = getattr(spec, argument)
        if value and not 1e-37 < abs(value) < 1e38:
            return f"{argument} of {value} (its arithmetic is in float32)"
    return None


def serving(entry: str, name: str, spec: Spec, device: torch.device) -> ModuleType:
    """The backend that computes a derivative of what backend `name` computed: it, or the next that has the kernel."""
    backend, reasons = _find(entry, name, spec, device)
    if backend is None:
        raise UnsupportedError(f"{spec.op}: no backend has {entry} for this call: {reasons}.")
    return backend


def _find(entry: str, name: str, spec: Spec, device: torch.device) -> tuple[ModuleType | None, str]:
    """The backend for `serving`, or None and why not each."""
    reasons = []
    for other in (name, *ORDER):
        backend = _BACKENDS[other]
        if hasattr(backend, entry):
            why = None if other == name else backend.available(device) or backend.unsupported(spec, device)
            if why is None:
                return backend, ""
            reasons.append(f"{other}: {why}")
    return None, "; ".join(reasons)


def _passed_over(name: str, spec: Spec, device: torch.device, work: Work | None) -> str | None:
    """Why backend `name` does not serve a call that names none."""
    if why := unsupported(name, spec, device):
        return why
    only_on_request = getattr(get(name), "only_on_request", None)
    return only_on_request(spec, device, work) if only_on_request else None


def select(spec: Spec, device: torch.device, requested: str | None = None, work: Work | None = None) -> ModuleType:
    """The backend that serves this call: the one asked for, or an error; else the first that supports it."""
    if requested is not None:
        backend = get(requested)
        if why := unsupported(requested, spec, device):
            raise UnsupportedError(f"{spec.op}: backend {requested!r} cannot compute this call: {why}.")
        return backend
    reasons = {}
    for name in ORDER:
        why = _passed_over(name, spec, device, work)
        if why is None:
            return get(name)
        reasons[name] = why
    raise UnsupportedError(
        f"{spec.op}: no backend computes this call: {'; '.join(f'{n}: {w}' for n, w in reasons.items())}."
    )


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, with which configuration, and why each one before it was passed over."""

    spec: Spec
    device: torch.device
    backend: str | None
    config: str
    reasons: dict[str, str]  # backend -> why it does not serve this call; in the order tried

    def __str__(self) -> str:
        lines = [f"{self.spec.op} on {self.device}: {self.backend or 'no backend'}"]
        for name in ORDER:
            if name == self.backend:
                lines.append(f"  {name:<10} runs: {self.config}")
            elif name in self.reasons:
                lines.append(f"  {name:<10} passed over: {self.reasons[name]}")
            else:
                lines.append(f"  {name:<10} not reached")
        return "\n".join(lines)


def explain(spec: Spec, device: torch.device, requested: str | None = None, work: Work | None = None) -> Explanation:
    """What `select` would do, and why; raises for an unknown name, never for want of support."""
    reasons: dict[str, str] = {}
    if requested is not None:
        get(requested)
    for name in ORDER:
        if requested is not None and name != requested:
            reasons[name] = f"backend={requested!r} was asked for"
            continue
        why = _passed_over(name, spec, device, work) if requested is None else unsupported(name, spec, device)
        if why is None:
            return Explanation(spec, device, name, _describe(name, spec, device), reasons)
        reasons[name] = why
    return Explanation(spec, device, None, "", reasons)


def _describe(name: str, spec: Spec, device: torch.device) -> str:
    text = get(name).describe(spec, device)
    if get(name).COMPOSITE or type(spec) not in _DERIVATIVES:
        return text
    other = serving(_DERIVATIVES[type(spec)][0], name, spec, device).NAME
    return text if other == name else f"{text}; backward by {other}"
