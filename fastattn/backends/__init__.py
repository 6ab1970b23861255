"""The backends, in the order in which they are tried, and the account of why one was chosen.

A backend is a module with `NAME`, `COMPOSITE`, `available(device)` and `unsupported(spec, device)`; the last two return
None for yes, or the reason. A composite backend is differentiable torch code and is called as it is; a kernel backend
fills tensors, and `fastattn.ops` gives it its derivative.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from fastattn.backends import eager, reference, triton
from fastattn.errors import ArgumentError, ArgumentTypeError, UnsupportedError, kind
from fastattn.spec import Spec

_BACKENDS: dict[str, ModuleType] = {backend.NAME: backend for backend in (triton, eager, reference)}
ORDER: tuple[str, ...] = tuple(_BACKENDS)


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
    return backend.available(device) or backend.unsupported(spec, device)


def select(spec: Spec, device: torch.device, requested: str | None = None) -> ModuleType:
    """The backend that serves this call: the one asked for, or an error; else the first that supports it."""
    if requested is not None:
        backend = get(requested)
        if why := unsupported(requested, spec, device):
            raise UnsupportedError(f"{spec.op}: backend {requested!r} cannot compute this call: {why}.")
        return backend
    reasons = {}
    for name in ORDER:
        why = unsupported(name, spec, device)
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


def explain(spec: Spec, device: torch.device, requested: str | None = None) -> Explanation:
    """What `select` would do, and why; raises for an unknown name, never for want of support."""
    reasons: dict[str, str] = {}
    if requested is not None:
        get(requested)
    for name in ORDER:
        if requested is not None and name != requested:
            reasons[name] = f"backend={requested!r} was asked for"
            continue
        why = unsupported(name, spec, device)
        if why is None:
            return Explanation(spec, device, name, get(name).describe(spec, device), reasons)
        reasons[name] = why
    return Explanation(spec, device, None, "", reasons)
