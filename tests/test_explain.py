"""explain() tells the truth: the backend, spec and reasons that it gives are those of the call itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import fastattn
from fastattn import backends
from fastattn.errors import UnsupportedError
from fastattn.spec import (
    AttentionSpec,
    CrossEntropySpec,
    ElementwiseSpec,
    LinearCrossEntropySpec,
    NormSpec,
    SoftmaxSpec,
)

F64 = torch.float64
SPECS = (AttentionSpec, NormSpec, SoftmaxSpec, ElementwiseSpec, CrossEntropySpec, LinearCrossEntropySpec)
ELEMENTWISE = {
    "triton": ("gated_forward", "dropout_add_forward", "rotary_embedding"),
    "composite": ("gated", "dropout_add", "rotary_embedding"),
}
LOSSES = {
    "triton": ("cross_entropy_forward", "linear_cross_entropy_forward"),
    "composite": ("cross_entropy", "linear_cross_entropy"),
}
# Whether the kernels for CPU tensors are compiled, and tested here.
CPU = not torch.cuda.is_available() and backends.get("cpu").available(torch.device("cpu")) is None
FUSED = ("attention_forward", "norm_forward", "softmax_forward", *ELEMENTWISE["triton"], *LOSSES["triton"])
ENTRIES = {  # what a call enters a backend by
    "triton": FUSED,
    **({"cpu": FUSED} if CPU else {}),
    "eager": ("attention", "norm", "softmax", *ELEMENTWISE["composite"], *LOSSES["composite"]),
    "reference": ("attention", "norm", "softmax", *ELEMENTWISE["composite"], *LOSSES["composite"]),
}


@dataclass(frozen=True)
class Call:
    """A public function with the shapes of its tensor arguments; `backend` is the first that serves it, and why."""

    name: str
    fn: Callable
    shapes: tuple[tuple[int, ...], ...]
    backend: str = "triton"
    why_not_triton: str = ""
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.fn.__name__}-{self.name}"

    def arguments(self, device: torch.device) -> tuple[tuple, dict[str, Any]]:
        args = (torch.ones(shape, dtype=self.dtype, device=device) for shape in self.shapes)
        tensors = {name: torch.ones(shape, dtype=t, device=device) for name, (shape, t) in self.tensors.items()}
        others: tuple = ()
        if self.fn in (fastattn.layer_norm, fastattn.rms_norm):
            others = (8,)
        elif self.fn is fastattn.varlen_attention:
            others = *(torch.tensor(cu, dtype=torch.int32, device=device) for cu in ([0, 3, 7], [0, 4, 9])), 4, 5
        elif self.fn in (fastattn.cross_entropy, fastattn.linear_cross_entropy):
            others = (torch.ones(3, dtype=torch.int64, device=device),)
        return (*args, *others), {**tensors, **self.options}


def elsewhere(dtype: torch.dtype) -> str:
    """Who computes an attention that Triton refuses."""
    return "cpu" if CPU and dtype != F64 else "eager"


def attention(name: str, why: str = "", D: int = 8, D_v: int = 8, dtype=torch.float32, tensors=(), **options) -> Call:
    shapes = ((2, 4, 5, D), (2, 2, 5, D), (2, 2, 5, D_v))
    backend = elsewhere(dtype) if why else "triton"
    return Call(name, fastattn.attention, shapes, backend, why, dtype, options, dict(tensors))


def varlen(name: str, why: str = "", D: int = 8, dtype=torch.float32, tensors=(), **options) -> Call:
    backend = elsewhere(dtype) if why else "triton"
    shapes = ((7, 4, D), (9, 2, D), (9, 2, D))
    return Call(name, fastattn.varlen_attention, shapes, backend, why, dtype, options, dict(tensors))


def sdpa(name: str, why: str = "", shape=(2, 4, 5, 8), tensors=(), **options) -> Call:
    fn = fastattn.scaled_dot_product_attention
    backend = elsewhere(torch.float32) if why else "triton"
    return Call(name, fn, (shape,) * 3, backend, why, options=options, tensors=dict(tensors))


def rows(fn: Callable, name: str, why: str = "", dtype=torch.float32, tensors=(), **options) -> Call:
    return Call(name, fn, ((3, 8, 8),), "eager" if why else "triton", why, dtype, options, dict(tensors))


def pair(fn: Callable, name: str, why: str = "", dtype=torch.float32) -> Call:
    return Call(name, fn, ((3, 8), (3, 8)), "eager" if why else "triton", why, dtype)


def loss(fn: Callable, name: str, why: str = "", dtype=torch.float32, tensors=(), **options) -> Call:
    shapes = ((3, 8),) if fn is fastattn.cross_entropy else ((3, 8), (5, 8))
    return Call(name, fn, shapes, "eager" if why else "triton", why, dtype, options, dict(tensors))


BOOLS, FLOATS = ((5, 5), torch.bool), ((5, 5), torch.float32)
PER_HEAD = ((4,), torch.float32)
CALLS = [
    attention("plain"),
    attention("causal_dropout", causal=True, dropout_p=0.5),
    attention("window", window=(2, None)),
    attention("lse", return_lse=True),
    attention("deterministic", deterministic=True),
    attention("float64", "dtype float64", dtype=F64),
    attention("width", "head dimension of q and k is 577", D=577, causal=True),
    attention("value_width", "head dimension of v is 600", D_v=600, causal=True),
    attention("odd_widths", D=13, D_v=1),
    attention("softcap", softcap=2.0),
    attention("bias", tensors={"bias": FLOATS}),
    attention("mask", tensors={"mask": BOOLS}),
    attention("alibi", tensors={"alibi_slopes": PER_HEAD}),
    attention("sinks", tensors={"sinks": PER_HEAD}),
    attention("float64_bias", tensors={"bias": ((5, 5), F64)}),
    varlen("plain"),
    varlen("causal_mask_dropout", causal="bottom_right", dropout_p=0.5, tensors={"mask": ((4, 5), torch.bool)}),
    varlen("softcap_alibi", softcap=2.0, window=(2, None), tensors={"alibi_slopes": ((2, 4), torch.float32)}),
    varlen("float64", "dtype float64", dtype=F64),
    varlen("width", "head dimension of q and k is 577", D=577),
    sdpa("plain"),
    sdpa("causal", is_causal=True),
    sdpa("three_dimensions", shape=(4, 5, 8)),
    sdpa("mask", tensors={"attn_mask": BOOLS}),
    sdpa("bias", tensors={"attn_mask": FLOATS}),
    sdpa("width", "head dimension of q and k is 577", shape=(2, 4, 5, 577), is_causal=True),
    rows(fastattn.layer_norm, "plain"),
    rows(fastattn.layer_norm, "affine", tensors={"weight": ((8,), torch.float16), "bias": ((8,), torch.float32)}),
    rows(fastattn.layer_norm, "float64", "dtype float64", dtype=F64),
    rows(fastattn.layer_norm, "float64_weight", "weight of dtype float64", tensors={"weight": ((8,), F64)}),
    rows(fastattn.layer_norm, "residual", tensors={"residual": ((3, 8, 8), torch.float16)}, dropout_p=0.5),
    rows(fastattn.layer_norm, "float64_residual", "residual of dtype float64", tensors={"residual": ((3, 8, 8), F64)}),
    rows(fastattn.rms_norm, "plain"),
    rows(fastattn.rms_norm, "offset", tensors={"weight": ((8,), torch.float16)}, weight_offset=1.0),
    rows(fastattn.rms_norm, "float64", "dtype float64", dtype=F64),
    rows(fastattn.softmax, "plain"),
    rows(fastattn.softmax, "causal_scale", causal=True, scale=0.5),
    rows(fastattn.softmax, "mask", tensors={"mask": ((8,), torch.bool)}),
    rows(fastattn.softmax, "float64", "dtype float64", dtype=F64, dim=0),
    rows(fastattn.log_softmax, "plain", dim=1),
    rows(fastattn.log_softmax, "float64", "dtype float64", dtype=F64),
    *(pair(fn, "plain") for fn in (fastattn.swiglu, fastattn.geglu, fastattn.dropout_add)),
    *(pair(fn, "float64", "dtype float64", F64) for fn in (fastattn.swiglu, fastattn.geglu, fastattn.dropout_add)),
    Call("plain", fastattn.rotary_embedding, ((1, 2, 5, 8), (5, 4), (5, 4))),
    Call("float64", fastattn.rotary_embedding, ((1, 2, 5, 8), (5, 4), (5, 4)), "eager", "dtype float64", F64),
    *(loss(fn, "plain") for fn in (fastattn.cross_entropy, fastattn.linear_cross_entropy)),
    *(loss(fn, "float64", "dtype float64", F64) for fn in (fastattn.cross_entropy, fastattn.linear_cross_entropy)),
    loss(fastattn.cross_entropy, "options", reduction="sum", label_smoothing=0.1, z_loss=0.1, softcap=2.0),
    loss(fastattn.cross_entropy, "weight", tensors={"weight": ((8,), torch.float16)}, ignore_index=2),
    loss(fastattn.linear_cross_entropy, "options", reduction="none", chunk_size=2, z_loss=0.1, softcap=2.0),
    loss(fastattn.linear_cross_entropy, "bias", tensors={"bias": ((5,), torch.float32)}),
    loss(fastattn.linear_cross_entropy, "class_weight", tensors={"class_weight": ((5,), torch.float16)}),
]
WITH_CHOICE = [call for call in CALLS if call.fn is not fastattn.scaled_dot_product_attention]
ASKED_FOR = [
    (call, name)
    for call in WITH_CHOICE
    for name in ENTRIES
    if name not in ("triton", "cpu") or call.backend == "triton"
]


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """(backend, spec) of each entry into a backend, in order."""
    log: list[tuple[str, Any]] = []

    def watch(name: str, entry: Callable) -> Callable:
        def watched(*args, **kwargs):
            log.extend((name, a) for a in args if isinstance(a, SPECS))
            return entry(*args, **kwargs)

        return watched

    for name, entries in ENTRIES.items():
        module = backends.get(name)
        for entry in entries:
            monkeypatch.setattr(module, entry, watch(name, getattr(module, entry)))
    return log


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_names_the_backend_that_runs(call: Call, entered, device: torch.device):
    args, kwargs = call.arguments(device)
    explanation = fastattn.explain(call.fn, *args, **kwargs)
    assert entered == []
    call.fn(*args, **kwargs)
    assert entered[0] == (explanation.backend, explanation.spec)
    assert explanation.backend == call.backend
    assert explanation.device == args[0].device
    assert explanation.config


@pytest.mark.parametrize(("call", "name"), ASKED_FOR, ids=str)
def test_names_the_backend_that_was_asked_for(call: Call, name: str, entered, device: torch.device):
    args, kwargs = call.arguments(device)
    explanation = fastattn.explain(call.fn, *args, **kwargs, backend=name)
    call.fn(*args, **kwargs, backend=name)
    assert entered[0] == (name, explanation.spec)
    assert explanation.backend == name
    before = backends.ORDER[: backends.ORDER.index(name)]
    assert explanation.reasons == dict.fromkeys(before, f"backend={name!r} was asked for")


@pytest.mark.parametrize("call", [call for call in CALLS if call.backend != "triton"], ids=str)
def test_says_why_triton_was_passed_over(call: Call, device: torch.device):
    args, kwargs = call.arguments(device)
    explanation = fastattn.explain(call.fn, *args, **kwargs)
    assert list(explanation.reasons) == list(backends.ORDER[: backends.ORDER.index(call.backend)])
    assert call.why_not_triton in explanation.reasons["triton"]


@pytest.mark.parametrize("call", [call for call in WITH_CHOICE if call.backend != "triton"], ids=str)
def test_what_is_asked_for_in_vain_is_served_by_none(call: Call, entered, device: torch.device):
    args, kwargs = call.arguments(device)
    explanation = fastattn.explain(call.fn, *args, **kwargs, backend="triton")
    assert explanation.backend is None
    assert explanation.config == ""
    assert list(explanation.reasons) == list(backends.ORDER)
    assert call.why_not_triton in explanation.reasons["triton"]
    with pytest.raises(UnsupportedError, match=call.why_not_triton):
        call.fn(*args, **kwargs, backend="triton")
    assert entered == []


def test_autocast_decides_the_dtype(entered, device: torch.device):
    q = torch.ones(1, 2, 5, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        explanation = fastattn.explain(fastattn.attention, q, q, q)
        fastattn.attention(q, q, q)
    assert explanation.spec.dtype == torch.bfloat16
    assert entered[0] == (explanation.backend, explanation.spec)


def test_draws_no_random_number(device: torch.device):
    q = torch.ones(1, 2, 5, 8, device=device)
    state = torch.get_rng_state()
    fastattn.explain(fastattn.attention, q, q, q, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "torch_runs"),
    [
        ({}, True),
        ({"causal": True}, True),
        ({"window": (1, 2)}, True),
        ({"softcap": 2.0}, False),
        ({"dropout_p": 0.5}, False),
        ({"alibi_slopes": torch.ones(2, dtype=F64)}, False),
        ({"sinks": torch.ones(2, dtype=F64)}, False),
        ({"bias": torch.ones(5, 5, dtype=F64)}, True),
        ({"mask": torch.ones(5, 5, dtype=torch.bool)}, True),
        ({"bias": torch.ones(5, 5, dtype=F64), "causal": True}, False),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_config_of_eager_says_whether_torch_serves(options, torch_runs: bool, monkeypatch: pytest.MonkeyPatch):
    eager, calls = backends.get("eager"), []
    fused = eager._sdpa
    monkeypatch.setattr(eager, "_sdpa", lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs))
    q = torch.ones(1, 2, 5, 8, dtype=F64)
    fastattn.attention(q, q, q, backend="eager", **options)
    config = fastattn.explain(fastattn.attention, q, q, q, backend="eager", **options).config
    assert bool(calls) == torch_runs == config.startswith("torch scaled_dot_product_attention")


@pytest.mark.parametrize(
    ("options", "table"),
    [
        (
            {},
            """
attention on cpu: eager
  cuda       passed over: it is not built
  triton     passed over: dtype float64 (it has float16, bfloat16 and float32)
  cpu        passed over: it is not built either
  eager      runs: torch scaled_dot_product_attention where lse is not wanted, else reference operations
  reference  not reached""",
        ),
        (
            {"backend": "reference"},
            """
attention on cpu: reference
  cuda       passed over: backend='reference' was asked for
  triton     passed over: backend='reference' was asked for
  cpu        passed over: backend='reference' was asked for
  eager      passed over: backend='reference' was asked for
  reference  runs: plain torch operations, unfused""",
        ),
        (
            {"backend": "triton"},
            """
attention on cpu: no backend
  cuda       passed over: backend='triton' was asked for
  triton     passed over: dtype float64 (it has float16, bfloat16 and float32)
  cpu        passed over: backend='triton' was asked for
  eager      passed over: backend='triton' was asked for
  reference  passed over: backend='triton' was asked for""",
        ),
    ],
    ids=["chosen", "asked_for", "asked_for_in_vain"],
)
def test_prints_as_a_table(options, table: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends.get("triton"), "available", lambda device: None)  # on this CPU, whatever the machine
    monkeypatch.setattr(backends.get("cuda"), "available", lambda device: "it is not built")
    monkeypatch.setattr(backends.get("cpu"), "available", lambda device: "it is not built either")
    q = torch.ones(1, 2, 5, 8, dtype=F64)
    assert str(fastattn.explain(fastattn.attention, q, q, q, **options)) == table.strip()


def test_says_why_a_device_is_not_served():
    q = torch.ones(1, 2, 5, 8, device="meta")
    explanation = fastattn.explain(fastattn.attention, q, q, q)
    assert explanation.backend == "eager"
    assert "device 'meta'" in explanation.reasons["triton"]
    assert fastattn.attention(q, q, q).is_meta
