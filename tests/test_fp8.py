"""8-bit inputs: a forward, with a scale for each head, held to float64 as bfloat16 would be."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from parity import options_of, packed_of, spec_of
from torch import Tensor

import fastattn
from fastattn.backends import unsupported
from fastattn.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from fastattn.reference.attention import attention as reference
from fastattn.testing import assert_close, make_inputs, simulate_rounding

FP8 = torch.float8_e4m3fn
CASES = [
    cases.case("full", 40, 50, B=2, H=4, H_kv=2, D=40, D_v=24),
    cases.case("causal", 50, 50, D=64, causal=True),
    cases.case("window", 50, 50, window=(11, 3)),
    cases.case("negative_scale", 30, 30, scale=-0.5),
    cases.case("mla", 20, 30, D=192, D_v=128),
    cases.case("bias", 40, 50, B=2, bias=cases.Score("1HMN")),
    cases.case("mask", 40, 50, B=2, mask=cases.Score("B1MN", fill="blocks")),
    cases.case("alibi_softcap", 40, 40, softcap=2.0, alibi_slopes=cases.Score("H", fill="slopes")),
    cases.case("sinks_dropout", 40, 40, sinks=cases.Score("H"), dropout_p=0.3),
    cases.case("no_keys", 5, 0, sinks=cases.Score("H")),
    cases.case("strided", 30, 30, H=4, H_kv=1, layout="heads_inside"),
]


def inputs_of(case: cases.Case, device: torch.device) -> tuple[list[Tensor], dict[str, Tensor]]:
    """-> (q, k, v; their scales)."""
    shapes = [(case.B, case.H, case.S_q, case.D)]
    shapes += [(case.B, case.kv_heads, case.S_k, width) for width in (case.D, case.D_v or case.D)]
    inputs = [t.to(FP8) for t in make_inputs(*shapes, device=device, layout=case.layout)]
    scales = make_inputs((case.H,), (case.B, case.kv_heads), (case.kv_heads,), device=device, seed=3)
    names = ("q_scale", "k_scale", "v_scale")
    return inputs, {name: t.abs() + 0.2 for name, t in zip(names, scales, strict=True)}


def meant(inputs: list[Tensor], scales: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What the 8-bit numbers stand for."""
    pairs = zip(inputs, scales.values(), strict=True)
    return [(t.double() * scale.double()[..., None, None]).to(dtype) for t, scale in pairs]


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: cases.Case, backend: str, device: torch.device):
    inputs, scales = inputs_of(case, device)
    options, features = options_of(case, device)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (), device=device)

    def oracle(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors = meant(inputs, scales, dtype)
        spec = spec_of(*tensors, **options)
        return reference(*tensors, spec, seed=seed, compute_dtype=dtype, mask=options.get("mask"), **features)

    torch.manual_seed(5)
    o, lse = fastattn.attention(*inputs, return_lse=True, backend=backend, **options, **scales)
    exact, rounded = oracle(torch.float64), simulate_rounding(lambda: oracle(torch.bfloat16))
    assert o.dtype == torch.bfloat16
    assert_close(o, exact[0], rounded[0], "o")
    assert_close(lse, exact[1], rounded[1], "lse")


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_packed(backend, device):
    case = cases.packed("varlen", H=4, H_kv=2, causal="bottom_right", left_over=5)
    cu = packed_of(case, device)
    T_q, T_k = int(cu.cu_seqlens_q[-1]) + 5, int(cu.cu_seqlens_k[-1])
    inputs = [t.to(FP8) for t in make_inputs((1, 4, T_q, 16), *[(1, 2, T_k, 16)] * 2, device=device)]
    scales = {
        name: t.abs() + 0.2
        for name, t in zip(
            ("q_scale", "k_scale", "v_scale"), make_inputs((5, 4), (5, 2), (5, 2), device=device, seed=1), strict=True
        )
    }
    o, lse = cu.attention(*inputs, causal="bottom_right", backend=backend, **scales)
    for b in range(5):
        rows = slice(int(cu.cu_seqlens_q[b]), int(cu.cu_seqlens_q[b + 1]))
        keys = slice(int(cu.cu_seqlens_k[b]), int(cu.cu_seqlens_k[b + 1]))
        alone = [t[:, :, s] for t, s in zip(inputs, (rows, keys, keys), strict=True)]
        own = {name: scale[b] for name, scale in scales.items()}

        def oracle(dtype: torch.dtype, alone=alone, own=own) -> tuple[Tensor, Tensor]:
            tensors = meant(alone, own, dtype)
            return reference(*tensors, spec_of(*tensors, causal="bottom_right"), compute_dtype=dtype)

        exact, rounded = oracle(torch.float64), simulate_rounding(lambda: oracle(torch.bfloat16))
        assert_close(o[:, :, rows], exact[0], rounded[0], f"o of sequence {b}")
        assert_close(lse[:, :, rows], exact[1], rounded[1], f"lse of sequence {b}")
    assert (o[:, :, T_q - 5 :] == 0).all()


def test_hidden_nan_never_leaks(device):
    (q, k, v), scales = inputs_of(cases.case("", 40, 40, causal=True), device)
    expected = fastattn.attention(q, k, v, causal=True, backend="triton", **scales)
    nan = torch.tensor(torch.nan, device=device).to(FP8)
    for t in (k, v):
        t.view(torch.uint8)[:, :, 30:] = nan.view(torch.uint8)
    o = fastattn.attention(q, k, v, causal=True, backend="triton", **scales)
    assert torch.equal(o[:, :, :30], expected[:, :, :30])
    assert o[:, :, 30:].isnan().all()


def test_autocast_leaves_8_bit_inputs_alone(device):
    inputs, scales = inputs_of(CASES[0], device)
    expected = fastattn.attention(*inputs, backend="triton", **scales)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(fastattn.attention(*inputs, backend="triton", **scales), expected)


def test_compile_without_graph_breaks(device):
    torch.compiler.reset()
    inputs, scales = inputs_of(CASES[1], device)

    def call(q, k, v):
        return fastattn.attention(q, k, v, causal=True, backend="triton", **scales)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs))


SIZES = "(H,) = (2,) or (B, H) = (1, 2)"
WRONG: list[tuple[str, dict[str, Any], type, str]] = [
    ("shape", {"q_scale": torch.ones(3)}, ArgumentError, SIZES),
    ("dtype", {"q_scale": torch.ones(2, dtype=torch.float64)}, ArgumentTypeError, "`q_scale` has dtype float64"),
    ("number", {"k_scale": 2.0}, ArgumentTypeError, "`k_scale` is a float"),
    ("gradient", {"bias": torch.ones(4, 4, requires_grad=True)}, UnsupportedError, "forward only"),
]


@pytest.mark.parametrize(("name", "options", "error", "says"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_calls(name, options, error, says, device):
    q = torch.ones(1, 2, 4, 16, device=device).to(FP8)
    options = {key: t.to(device) if isinstance(t, Tensor) else t for key, t in options.items()}
    with pytest.raises(error) as caught:
        fastattn.attention(q, q, q, **options)
    assert says in str(caught.value)


def test_scales_of_other_inputs_are_refused(device):
    q = torch.ones(1, 2, 4, 16, device=device)
    with pytest.raises(ArgumentError, match="only float8_e4m3fn inputs have scales"):
        fastattn.attention(q, q, q, v_scale=torch.ones(2, device=device))


def test_derivatives_are_refused_by_name(device):
    q = torch.ones(1, 2, 4, 16, device=device).to(FP8)
    bias = torch.ones(4, 4, device=device)
    with pytest.raises((UnsupportedError, NotImplementedError)):
        torch.func.jvp(lambda b: fastattn.attention(q, q, q, bias=b, backend="triton"), (bias,), (bias,))
    with pytest.raises((UnsupportedError, NotImplementedError)):
        torch.func.grad(lambda b: fastattn.attention(q, q, q, bias=b, backend="triton").sum())(bias)


@pytest.mark.parametrize(
    ("capability", "runs"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)]
)
def test_needs_an_8_bit_matrix_unit(capability, runs, monkeypatch):
    from fastattn.backends import triton

    monkeypatch.setattr(triton, "INTERPRET", False)
    monkeypatch.setattr(triton, "available", lambda device: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    q = torch.empty(1, 2, 4, 64, dtype=FP8)
    why = unsupported("triton", spec_of(q, q, q), torch.device("cuda"))
    assert why is None if runs else "8.9 or newer" in why
