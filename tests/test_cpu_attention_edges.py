"""Attention on CPU tensors at the edges of float32 and of 32-bit counting, on every instruction set."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import backends
from fastattn.backends.cpu import module
from fastattn.errors import UnsupportedError

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
pytestmark = pytest.mark.skipif(module.why_not() is not None, reason="the native module is not built")
ISAS = () if module.why_not() else tuple(module.load().available_isas())
EVERY_ISA = pytest.mark.parametrize("isa", ISAS, indirect=True)


@pytest.fixture
def isa(request):
    module.load().set_isa(request.param)
    yield request.param
    module.load().set_isa("")


def gradients(q, k, v, do, backend, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    o = fastattn.attention(*leaves, backend=backend, **options)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


@EVERY_ISA
@pytest.mark.parametrize("size", [1e3, 2e4], ids=str)
@pytest.mark.parametrize("S_q", [1, 100])
@pytest.mark.parametrize("feature", ["none", "softcap", "bias"])
def test_of_huge_scores_the_largest_has_all_the_weight(feature, S_q, size, isa):
    """Scores of 1e6 to 1e9, of which float32 knows a few digits: each row is one-hot, and its gradient goes there."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, n, 64) * size for n in (S_q, 100))
    v, do = torch.rand(1, 1, 100, 8), torch.randn(1, 1, S_q, 8)
    features = {"none": {}, "softcap": {"softcap": 1e12}, "bias": {"bias": torch.randn(1, 1, S_q, 100) * size}}
    options = features[feature]
    o, dq, dk, dv = gradients(q, k, v, do, "cpu", **options)
    scores = (q.double() @ k.double().mT) / 8 + options.get("bias", 0.0)
    largest = scores.argmax(-1)[0, 0]
    settled = (o[0, 0] == v[0, 0, largest]).all(-1)  # of two that round to the same, either may be the largest
    assert settled.float().mean() > 0.97
    torch.testing.assert_close(dv.sum(2), do.sum(2))
    expected = torch.zeros(100, 8).index_add(0, largest, do[0, 0])
    others = torch.ones(100, dtype=torch.bool).index_fill(0, largest[~settled], False)
    torch.testing.assert_close(dv[0, 0, others], expected[others])
    assert dq.isfinite().all()
    assert dk.isfinite().all()


@EVERY_ISA
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_gradient_of_a_one_hot_row_is_exact(dtype, isa):
    k = torch.zeros(1, 1, 70, 16, dtype=dtype)
    k[..., 7, :] = 200.0
    q, v, do = torch.full((1, 1, 5, 16), 170.3, dtype=dtype), torch.randn(1, 1, 70, 8).to(dtype), torch.ones(1, 1, 5, 8)
    o, _, _, dv = gradients(q, k, v, do.to(dtype), "cpu")
    assert torch.equal(o, v[:, :, 7:8].expand_as(o))
    assert torch.equal(dv[:, :, 7], torch.full((1, 1, 8), 5.0, dtype=dtype))


@EVERY_ISA
@pytest.mark.parametrize("S_q", [5, 16])
def test_an_infinite_key_against_which_no_query_stands_adds_nothing(S_q, isa):
    """-inf in k hides it from positive queries; lanes without a query make 0 · inf of it."""
    torch.manual_seed(0)
    q, k, v = torch.rand(1, 1, S_q, 8) + 0.1, torch.randn(1, 1, S_q, 8), torch.randn(1, 1, S_q, 8)
    k[0, 0, 2, 0] = -math.inf
    bias = torch.zeros(1, 1, 1, S_q, requires_grad=True)
    leaves = [k.requires_grad_(), v.requires_grad_(), bias]
    for found in torch.autograd.grad(fastattn.attention(q, k, v, bias=bias, backend="cpu").sum(), leaves):
        assert found.isfinite().all()


@EVERY_ISA
@pytest.mark.parametrize("S_q", [1, 20])
def test_under_an_infinite_sink_a_row_without_keys_is_zero(S_q, isa):
    q, mask = torch.randn(1, 1, S_q, 8), torch.zeros(S_q, S_q, dtype=torch.bool)
    o = fastattn.attention(q, q, q, mask=mask, sinks=torch.tensor([math.inf]), backend="cpu")
    assert torch.equal(o, torch.zeros_like(o))


@pytest.mark.parametrize("bounds", [[0, 20], [1, 10], [0, 7, 3, 10], [0, -1, 10]], ids=str)
def test_packed_sequences_out_of_bounds_are_refused_where_nothing_else_looks(bounds):
    q, cu_seqlens = torch.randn(10, 2, 16), torch.tensor(bounds, dtype=torch.int32)
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="must begin with 0"):
        fastattn.varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 20, 20, backend="cpu")


def test_a_sequence_longer_than_its_bias_is_refused_where_nothing_else_looks():
    q, cu_seqlens = torch.randn(10, 2, 16), torch.tensor([0, 2, 10], dtype=torch.int32)
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="up to 4 of them"):
        fastattn.varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 4, 4, bias=torch.zeros(4, 4), backend="cpu")


@pytest.mark.parametrize("S_k", [2**28 + 1, 2**31 + 3, 2**32 + 3], ids=str)
def test_more_rows_than_are_counted_are_refused(S_k):
    q, k = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1).expand(1, 1, S_k, 1)
    with pytest.raises(UnsupportedError, match="count 268435456"):
        fastattn.attention(q, k, k, return_lse=True, backend="cpu")


def test_rows_of_heads_that_share_keys_count_together():
    q, k = torch.zeros(1, 1, 1, 1).expand(1, 4, 2**26 + 1, 1), torch.zeros(1, 1, 1, 1)
    with pytest.raises(UnsupportedError, match="`q` has 67108865 rows; the kernels for CPU tensors count 67108864"):
        fastattn.attention(q, k, k, backend="cpu")


@pytest.mark.parametrize("window", [(10, None), (10, 2**40), (10, 2**62)], ids=str)
def test_a_window_wider_than_32_bits(window):
    q, k = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1).expand(1, 1, 2**28, 1)
    _, lse = fastattn.attention(q, k, k, window=window, return_lse=True, backend="cpu")
    torch.testing.assert_close(lse.item(), math.log(11))


@pytest.mark.parametrize("options", [{"scale": 1e300}, {"softcap": 1e300}, {"softcap": 1e-60}], ids=str)
def test_options_out_of_float32_are_not_rounded_away(options):
    q = torch.randn(1, 1, 4, 8)
    explanation = fastattn.explain(fastattn.attention, q, q, q, **options)
    assert "its arithmetic is in float32" in (backends.unsupported("cpu", explanation.spec, q.device) or "")


def test_the_gradient_of_many_short_sequences_takes_time_in_proportion():
    def seconds(B: int) -> float:
        q = torch.randn(2 * B, 8, 8, requires_grad=True)
        cu_seqlens = torch.arange(0, 2 * B + 1, 2, dtype=torch.int32)
        o = fastattn.varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 2, 2, backend="cpu")
        begin = time.process_time()
        torch.autograd.grad(o, q, o.detach(), retain_graph=True)
        return time.process_time() - begin

    few, many = (min(seconds(B) for _ in range(3)) for B in (2500, 20_000))
    assert many < 24 * few  # 8 times as many; squared, 64 times


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_tangent_of_a_row_with_one_key_is_zero(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 4).to(dtype) for n in (130, 1, 1))
    slopes = torch.tensor([0.7])

    def call(slopes):
        return fastattn.attention(q, k, v, alibi_slopes=slopes, return_lse=True, backend="cpu")

    (_, _), (to, tlse) = torch.func.jvp(call, (slopes,), (torch.ones(1),))
    assert torch.equal(to, torch.zeros_like(to))
    distance = torch.arange(129, -1, -1).float()
    torch.testing.assert_close(tlse[0, 0], -distance)
