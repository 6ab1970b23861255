"""How a backend is chosen, and who computes a derivative that the chosen one leaves out."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from parity import spec_of

import fastattn
from fastattn import backends
from fastattn.errors import UnsupportedError

CPU = torch.device("cpu")


class Forward(ModuleType):
    """A kernel backend with the forward of attention and nothing else: that of Triton, or a refusal."""

    NAME = "forward"
    COMPOSITE = False

    def __init__(self, why: str | None = None, only_on_request: str | None = None):
        super().__init__("forward")
        self.why = why
        self.calls: list[str] = []
        if only_on_request:
            self.only_on_request = lambda spec, device, work: only_on_request

    def available(self, device):
        return None

    def unsupported(self, spec, device):
        return self.why

    def describe(self, spec, device):
        return "a forward"

    def attention_forward(self, o, lse, lse_low, x, spec):
        self.calls.append("forward")
        backends.get("triton").attention_forward(o, lse, lse_low, x, spec)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch):
    def register(backend: ModuleType) -> ModuleType:
        table = {backend.NAME: backend, **backends._BACKENDS}
        monkeypatch.setattr(backends, "_BACKENDS", table)
        monkeypatch.setattr(backends, "ORDER", tuple(table))
        return backend

    return register


def qkv(device: torch.device) -> list[torch.Tensor]:
    # A width of its own, so that no plan that another test left behind serves the call.
    return [torch.randn(1, 2, 9, 11, device=device, requires_grad=True) for _ in range(3)]


def test_the_next_backend_computes_a_derivative_that_is_left_out(registered, device: torch.device):
    q, k, v = qkv(device)
    expected = torch.autograd.grad(fastattn.attention(q, k, v, causal=True, backend="triton").sum(), (q, k, v))
    backend = registered(Forward())
    o = fastattn.attention(q, k, v, causal=True, backend="forward")
    found = torch.autograd.grad(o.sum(), (q, k, v))
    assert backend.calls == ["forward"]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_forward_mode_is_served_too(registered, device: torch.device):
    q, k, v = (t.detach() for t in qkv(device))
    registered(Forward())

    def call(backend):
        return torch.func.jvp(lambda q: fastattn.attention(q, k, v, backend=backend), (q,), (v,))[1]

    assert torch.equal(call("forward"), call("triton"))


def test_without_one_for_the_derivative_the_call_is_refused(registered, monkeypatch, device: torch.device):
    registered(Forward())
    monkeypatch.setattr(backends.get("triton"), "available", lambda device: "it is out of order")
    monkeypatch.setattr(backends.get("cpu"), "available", lambda device: "it is too")
    why = backends.unsupported("forward", spec_of(*qkv(device)), device)
    assert why == (
        "it has no attention_backward, and no other backend here has: triton: it is out of order; cpu: it is too"
    )
    with pytest.raises(UnsupportedError, match="no backend has attention_backward for this call: triton: it is out"):
        backends.serving("attention_backward", "forward", spec_of(*qkv(device)), device)


def test_one_that_wants_to_be_asked_is_passed_over(registered, device: torch.device):
    spec = spec_of(*qkv(device))
    backend = registered(Forward(only_on_request="it is new here"))
    assert backends.select(spec, device).NAME == "triton"
    assert backends.select(spec, device, "forward") is backend
    assert backends.explain(spec, device).reasons["forward"] == "it is new here"
    assert backends.explain(spec, device, "forward").backend == "forward"


def test_its_refusal_comes_before_that(registered, device: torch.device):
    spec = spec_of(*qkv(device))
    registered(Forward(why="it is full", only_on_request="it is new here"))
    assert backends.explain(spec, device).reasons["forward"] == "it is full"
    with pytest.raises(UnsupportedError, match="it is full"):
        backends.select(spec, device, "forward")


@pytest.mark.parametrize("name", [name for name in backends.ORDER if not backends.get(name).COMPOSITE])
def test_a_number_that_float32_loses_is_no_kernels(name, monkeypatch):
    monkeypatch.setattr(backends.get(name), "available", lambda device: None)
    x, target = torch.zeros(2, 3), torch.tensor([0, 2])

    def why_not(**options) -> str | None:
        explanation = fastattn.explain(fastattn.cross_entropy, x, target, **options)
        return backends.unsupported(name, explanation.spec, x.device)

    assert why_not(softcap=30.0) is None
    for option in ("softcap", "z_loss"):
        for value in (1e-40, 1e-60, 1e300):
            assert why_not(**{option: value}) == f"{option} of {value} (its arithmetic is in float32)"
