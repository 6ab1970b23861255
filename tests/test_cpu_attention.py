"""Attention of the CPU backend on every instruction set that this machine has, held to float64 like every backend."""

from __future__ import annotations

import math
import platform
import time

import cases
import pytest
import torch
from cpu_isas import EVERY_ISA, NEEDS_MODULE
from hypothesis import Phase, given, seed, settings
from parity import check, inputs_of, options_of, packed_of, run
from test_attention import HIDDEN
from test_jvp import CASES, Call, largest
from test_property import SETTINGS, calls
from torch.func import jvp

import fastattn
from fastattn.backends.cpu import module
from fastattn.testing import assert_close, make_inputs, simulate_rounding

CPU = torch.device("cpu")
pytestmark = NEEDS_MODULE


@pytest.fixture(params=EVERY_ISA, ids=str)
def isa(request):
    with request.param:
        yield request.param


@pytest.mark.parametrize("case", [*cases.TRITON, *cases.VARLEN], ids=str)
def test_named_cases(case: cases.Case):
    check("cpu", *inputs_of(case, CPU), *options_of(case, CPU), packed_of(case, CPU), EVERY_ISA)


LONG = [  # many blocks of keys, tiles of queries, groups of both
    cases.case("decode", 1, 3000, B=2, H=4, H_kv=2, D=64),
    cases.case("decode_bf16_window", 1, 3000, H=8, H_kv=1, D=128, dtype=cases.BF16, window=(2100, 0)),
    cases.case("few_queries_odd", 3, 1301, H=6, H_kv=3, D=33, D_v=41, dtype=cases.F16, causal="bottom_right"),
    cases.case("few_queries_mask", 2, 1500, H=2, mask=cases.Score("BHMN", fill="random_bool"), sinks=cases.Score("H")),
    cases.case("sixteen_queries", 16, 1100, H=2, D=64, dtype=cases.BF16, causal="bottom_right"),
    cases.case("long_causal", 700, 700, H=1, D=64, dtype=cases.BF16, causal=True),
    cases.case(
        "long_window_gqa", 600, 900, H=4, H_kv=2, D=32, window=(300, 20), alibi_slopes=cases.Score("H", "slopes")
    ),
    cases.case("few_keys_many_queries", 1500, 70, H=2, H_kv=1, D=24),
    cases.case("bias_of_all", 300, 300, B=2, H=2, bias=cases.Score("11MN"), causal=True),
    cases.case("bias_by_key", 300, 300, B=2, H=2, bias=cases.Score("1H1N"), softcap=3.0),
    cases.packed("varlen_long", ((600, 700), (1, 900), (130, 0), (0, 65)), H=2, D=32, causal="bottom_right"),
]


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long(case: cases.Case):
    check("cpu", *inputs_of(case, CPU), *options_of(case, CPU), packed_of(case, CPU), EVERY_ISA)


@pytest.mark.parametrize("part", range(2))
def test_any_call(part: int):
    @seed(100 + part)
    @settings(max_examples=50, database=None, phases=[Phase.generate], **SETTINGS)
    @given(calls())
    def draw(case):
        check("cpu", *inputs_of(case, CPU), *options_of(case, CPU), packed_of(case, CPU), EVERY_ISA)

    draw()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("options", "S_q", "S_k", "queries", "keys"), HIDDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_entries_never_leak(options, S_q, S_k, queries, keys, dtype, value, isa):
    """What no query sees may hold anything: every result is that of zeros there, to the bit."""
    results = []
    for garbage in (0.0, value):
        (q, do), (k, v) = (make_inputs(*[(1, 2, S, 16)] * 2, dtype=dtype, seed=S) for S in (S_q, S_k))
        q[:, :, queries], k[:, :, keys], v[:, :, keys] = garbage, garbage, garbage
        leaves = [t.requires_grad_() for t in (q, k, v)]
        o, lse = fastattn.attention(*leaves, return_lse=True, backend="cpu", **options)
        results.append((o, lse, *torch.autograd.grad(o, leaves, do)))
    for name, clean, dirty in zip(("o", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert torch.equal(clean, dirty), name


@pytest.mark.parametrize("S_q", [50, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_visible_non_finite_values_are_not_hidden(S_q, dtype, isa):
    """In tiles masked in part: inf, -inf and NaN in v reach exactly the rows and columns that IEEE sends them to."""
    q, k, v = make_inputs((1, 1, S_q, 16), *[(1, 1, 50, 16)] * 2, dtype=dtype)
    v[0, 0, 9, 3], v[0, 0, 20, 4], v[0, 0, 30, 5], v[0, 0, 33, 4] = math.nan, math.inf, -math.inf, -math.inf
    o = fastattn.attention(q, k, v, causal="top_left", backend="cpu")[0, 0].float()
    if S_q == 3:
        assert o.isfinite().all()
        o = fastattn.attention(q, k, v, causal="bottom_right", backend="cpu")[0, 0].float()
        assert o[:, 3:6].tolist() == [[pytest.approx(math.nan, nan_ok=True)] * 2 + [-math.inf]] * 3
        return
    expected = torch.zeros(50, 16)
    expected[9:, 3], expected[20:, 4], expected[30:, 5], expected[33:, 4] = math.nan, math.inf, -math.inf, math.nan
    for matches in (torch.isnan, lambda t: t == math.inf, lambda t: t == -math.inf):
        assert torch.equal(matches(o), matches(expected))


def test_visible_non_finite_gradients_are_not_hidden(isa):
    """NaN in a row of do reaches dv of the keys that this row sees, and of no others."""
    q, k, v, do = make_inputs(*[(1, 1, 50, 16)] * 4)
    do[0, 0, 20, 3] = math.nan
    leaf = v.requires_grad_()
    (dv,) = torch.autograd.grad(fastattn.attention(q, k, leaf, causal=True, backend="cpu"), leaf, do)
    expected = torch.zeros(50, 16, dtype=torch.bool)
    expected[:21, 3] = True
    assert torch.equal(dv[0, 0].isnan(), expected)


AGREE = [
    cases.case("one_long_head", 900, 900, H=1, D=40, causal=True, dropout_p=0.1),
    cases.case("many_heads", 70, 130, B=3, H=4, H_kv=2, D=16, dtype=cases.BF16),
    cases.case("decode", 1, 5000, H=4, H_kv=1, D=64, dtype=cases.F16),
    cases.case("everything", 200, 260, B=2, H=4, H_kv=2, bias=cases.Score("11MN"), sinks=cases.Score("H"),
               alibi_slopes=cases.Score("H", "slopes"), window=(90, None)),
]  # fmt: skip


@pytest.mark.parametrize("case", AGREE, ids=str)
def test_every_number_of_threads_gives_the_same_bits(case, threads, isa):
    inputs, do, dlse = inputs_of(case, CPU)
    options, features = options_of(case, CPU)

    def call(*leaves, **features):
        torch.manual_seed(3)
        return fastattn.attention(*leaves, return_lse=True, backend="cpu", **{**options, **features})

    results = []
    for n in (1, 2, 4, 2):
        threads(n)
        results.append(run(call, inputs, do, dlse, case.dtype, features))
    for other in results[1:]:
        for name, t in results[0].items():
            assert torch.equal(t, other[name]), name


@pytest.mark.parametrize("S_q", [1, 600])
def test_one_sequence_keeps_several_threads_busy(S_q, threads):
    """By the time that other threads than the caller's spent computing."""
    q, k, v = make_inputs((1, 1, S_q, 64), *[(1, 1, 40_000, 64)] * 2)
    threads(2)
    fastattn.attention(q, k, v, backend="cpu")
    process, caller = time.process_time(), time.thread_time()
    for _ in range(20 if S_q == 1 else 2):
        fastattn.attention(q, k, v, backend="cpu")
    process, caller = time.process_time() - process, time.thread_time() - caller
    assert process - caller > 0.25 * process


def _errors(function, inputs, do, exact):
    leaves = [t.detach().requires_grad_() for t in inputs]
    o = function(*leaves)
    results = (o, *torch.autograd.grad(o, leaves, do))
    return [(t.double() - e).square().mean().sqrt().item() for t, e in zip(results, exact, strict=True)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 128, 64), (1, 2, 512, 128), (1, 1, 2000, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_accurate_than_torch(shape, dtype, causal):
    """The root of the mean square error of o and each gradient, against that of scaled_dot_product_attention.

    x86-64's baseline has no fused multiply-add, which torch uses here: each term is rounded twice.
    """
    *inputs, do = make_inputs(*[shape] * 4, dtype=dtype)
    wide = [t.double().requires_grad_() for t in inputs]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    o = sdpa(*wide, is_causal=causal)
    exact = [t.detach() for t in (o, *torch.autograd.grad(o, wide, do.double()))]
    try:
        theirs = _errors(lambda *x: sdpa(*x, is_causal=causal), inputs, do, exact)
    except RuntimeError as error:  # held to an older instruction set than this CPU's, torch's kernel has a gap
        if "pack_vnni2" not in str(error):
            raise
        pytest.skip(str(error))
    for isa in EVERY_ISA:
        roundings = math.sqrt(2.0) if isa.name == "baseline" and platform.machine() == "x86_64" else 1.0
        with isa:
            ours = _errors(lambda *x: fastattn.attention(*x, causal=causal, backend="cpu"), inputs, do, exact)
            for name, error, allowed in zip(("o", "dq", "dk", "dv"), ours, theirs, strict=True):
                assert error <= 1.2 * roundings * allowed, name


def test_dropout_is_that_of_the_reference(isa):
    """Keyed by the seed and the entry: the same probabilities are dropped."""
    q, v = torch.zeros(2, 3, 70, 16), torch.eye(70).expand(2, 3, 70, 70)
    torch.manual_seed(5)
    dropped = fastattn.attention(q, q, v, dropout_p=0.3, backend="cpu") == 0.0
    torch.manual_seed(5)
    expected = fastattn.attention(q, q, v, dropout_p=0.3, backend="reference") == 0.0
    assert torch.equal(dropped, expected)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="'mmx'; it must be one of baseline"):
        module.load().set_isa("mmx")


def test_empty_calls(isa):
    for shape_q, shape_k in (((0, 2, 5, 8), (0, 2, 5, 8)), ((1, 2, 0, 8), (1, 2, 5, 8)), ((1, 2, 5, 8), (1, 2, 0, 8))):
        q, k, v = (t.requires_grad_() for t in make_inputs(shape_q, shape_k, shape_k))
        o, lse = fastattn.attention(q, k, v, return_lse=True, backend="cpu")
        assert (o == 0).all()
        assert (lse == -math.inf).all()
        assert all((g == 0).all() for g in torch.autograd.grad(o.sum(), (q, k, v)))


def test_float64_bias(isa):
    q, k, v = make_inputs(*[(1, 2, 40, 16)] * 3)
    bias = torch.randn(2, 40, 40, dtype=torch.float64)
    o = fastattn.attention(q, k, v, bias=bias, backend="cpu")
    expected = fastattn.attention(q, k, v, bias=bias, backend="reference")
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("case", [*CASES, cases.case("many_rows", 300, 200, window=(90, 20))], ids=str)
def test_tangents(case: cases.Case):
    call = Call(case, CPU)
    primals, tangents = tuple(call.primals), tuple(call.tangents)
    (o, _), exact = call.in_float64(tangents)
    rounded = simulate_rounding(
        lambda: jvp(lambda *x: call.reference(*x, compute_dtype=case.dtype), primals, tangents)[1]
    )

    def tested(q, k, v, *rest):
        torch.manual_seed(5)
        options = {**call.options, **dict(zip(call.names, rest, strict=True)), "backend": "cpu"}
        if call.packed:
            return call.packed.attention(q, k, v, **options)
        return fastattn.attention(q, k, v, return_lse=True, **options)

    _, actual = jvp(tested, primals, tangents)
    scale = largest(*exact, exact[1][..., None] * o)  # to subtracts tlse · o
    for name, *results in zip(("to", "tlse"), actual, exact, rounded, strict=True):
        assert_close(*results, name, scale=scale)


def test_tangents_of_hidden_entries_never_leak():
    results = []
    for garbage in (0.0, math.nan):
        inputs = make_inputs((1, 2, 20, 16), *[(1, 2, 50, 16)] * 2)
        inputs[1][:, :, 30:], inputs[2][:, :, 30:] = garbage, garbage
        function = lambda *x: fastattn.attention(*x, causal="top_left", backend="cpu")  # noqa: E731
        results.append(jvp(function, tuple(inputs), tuple(torch.ones_like(t) for t in inputs))[1])
    assert torch.equal(*results)
