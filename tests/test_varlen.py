"""Packed sequences: each against the reference, which runs one sequence at a time."""

from __future__ import annotations

import cases
import pytest
import torch
from parity import check, inputs_of, options_of, packed_of
from torch.profiler import ProfilerActivity, profile

import fastattn
from fastattn.testing import assert_close, make_inputs, simulate_rounding


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("case", cases.VARLEN, ids=str)
def test_varlen(case: cases.Case, backend: str, device: torch.device):
    check(backend, *inputs_of(case, device), *options_of(case, device), packed_of(case, device))


def cu(*lengths: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def test_one_sequence_is_attention(device):
    """To the bit: packing changes where rows lie and nothing else."""
    q, k, v = make_inputs(*[(1, 2, 50, 16)] * 3, device=device)
    rows = cu(50, device=device)
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    for options in ({"causal": True}, {"window": (9, 4)}, {"dropout_p": 0.3}):
        torch.manual_seed(0)
        expected = fastattn.attention(q, k, v, backend="triton", **options)
        torch.manual_seed(0)
        o = fastattn.varlen_attention(*packed, rows, rows, 50, 50, backend="triton", **options)
        assert torch.equal(o.transpose(0, 1)[None], expected)


def test_a_sequence_does_not_depend_on_its_neighbours(device):
    q, k, v = make_inputs(*[(70, 2, 16)] * 3, device=device)
    rows = cu(20, 37, 13, device=device)
    whole, lse = fastattn.varlen_attention(
        q, k, v, rows, rows, 37, 37, causal=True, window=(11, None), return_lse=True, backend="triton"
    )
    alone = cu(37, device=device)
    o, own_lse = fastattn.varlen_attention(
        *(t[20:57] for t in (q, k, v)), alone, alone, 37, 37, causal=True, window=(11, None), return_lse=True,
        backend="triton",
    )  # fmt: skip
    assert torch.equal(whole[20:57], o)
    assert torch.equal(lse[:, 20:57], own_lse)


USED = {
    "full": {},
    "bottom_right": {"causal": "bottom_right"},
    "top_left": {"causal": "top_left", "window": (4, None)},
    "features": {
        "softcap": 3.0,
        "sinks": torch.tensor([0.5, -1.0, 0.0, 2.0]),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]),
    },
    "dropout": {"dropout_p": 0.4},
}


@pytest.mark.parametrize("backend", ["triton", "cpu", "eager", "reference"])
@pytest.mark.parametrize(
    ("sides", "name"), [("q", "bottom_right"), ("k", "bottom_right"), *(("qk", name) for name in USED)]
)
def test_unused_rows_between_sequences(sides, name, backend, device):
    """To the bit what the used rows alone give, whatever the others hold; gradients too."""
    if why := fastattn.backends.get(backend).available(device):
        pytest.skip(why)
    options = {key: t.to(device) if torch.is_tensor(t) else t for key, t in USED[name].items()}
    lengths = {"q": [5, 0, 9, 4], "k": [7, 3, 9, 6]}
    used = {"q": [3, 0, 9, 0], "k": [7, 0, 2, 5]}
    kept, whole, seqused, where = {}, {}, {}, {}
    for side in "qk":
        starts = torch.tensor([0, *lengths[side]]).cumsum(0).tolist()
        count = used[side] if side in sides else lengths[side]
        where[side] = [row for start, n in zip(starts, count, strict=False) for row in range(start, start + n)]
        kept[side], whole[side] = cu(*count, device=device), cu(*lengths[side], device=device)
        if side in sides:
            seqused[f"seqused_{side}"] = torch.tensor(count, device=device)
    q, k, v, do = make_inputs((20, 4, 16), (27, 2, 16), (27, 2, 16), (20, 4, 16), device=device)

    def run(q, k, v, do, dlse, bounds, **seqused):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        torch.manual_seed(0)
        o, lse = fastattn.varlen_attention(
            *leaves, bounds["q"], bounds["k"], 9, 9, return_lse=True, backend=backend, **seqused, **options
        )
        return o, lse, *torch.autograd.grad((o, lse), leaves, (do, dlse))

    rows, keys = where["q"], where["k"]
    (dlse,) = make_inputs((4, 20), device=device)
    expected = run(q[rows], k[keys], v[keys], do[rows], dlse[:, rows], kept)
    with torch.no_grad():
        for t, its in ((q, rows), (k, keys), (v, keys)):
            t[[i for i in range(len(t)) if i not in its]] = torch.nan
    o, lse, dq, dk, dv = run(q, k, v, do, dlse, whole, **seqused)
    placed = ((o, rows, 0), (lse.T, rows, -torch.inf), (dq, rows, 0), (dk, keys, 0), (dv, keys, 0))
    for (found, its, elsewhere), right in zip(placed, expected, strict=True):
        assert torch.equal(found[its], right.T if right is expected[1] else right)
        assert (found[[i for i in range(len(found)) if i not in its]] == elsewhere).all()


def test_unused_rows_of_sequences_that_are_the_same(device):
    """causal=True needs no word about alignment where both sides have one seqused; under a compiler too."""
    q, k, v = make_inputs(*[(30, 2, 16)] * 3, device=device)
    bounds, used = cu(10, 20, device=device), torch.tensor([4, 15], device=device, dtype=torch.int32)

    def call(q, k, v):
        return fastattn.varlen_attention(
            q, k, v, bounds, bounds, 20, 20, seqused_q=used, seqused_k=used, causal=True, backend="triton"
        )

    o = call(q, k, v)
    alone = cu(15, device=device)
    right = fastattn.varlen_attention(
        *(t[10:25] for t in (q, k, v)), alone, alone, 15, 15, causal=True, backend="triton"
    )
    assert torch.equal(o[10:25], right)
    assert not o[25:].any()
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v), o)
    with pytest.raises(fastattn.errors.ArgumentError, match="is ambiguous unless `seqused_k` is the same tensor"):
        fastattn.varlen_attention(q, k, v, bounds, bounds, 20, 20, seqused_k=used, causal=True)


def test_garbage_after_the_last_sequence_never_leaks(device):
    q, k, v = (t.requires_grad_() for t in make_inputs(*[(50, 2, 16)] * 3, device=device))
    rows = cu(13, 20, device=device)
    with torch.no_grad():
        for t in (q, k, v):
            t[33:] = torch.nan
    o, lse = fastattn.varlen_attention(q, k, v, rows, rows, 20, 20, causal=True, return_lse=True, backend="triton")
    assert (o[33:] == 0).all()
    assert (lse[:, 33:] == -torch.inf).all()
    grads = torch.autograd.grad(o[:33].square().sum() + lse[:, :33].sum(), (q, k, v))
    for grad in grads:
        assert grad.isfinite().all()
        assert (grad[33:] == 0).all()


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("T", [0, 5])
def test_no_sequences(backend, T, device):
    q, k, v = (t.requires_grad_() for t in make_inputs(*[(T, 2, 16)] * 3, device=device))
    rows = cu(device=device)
    o, lse = fastattn.varlen_attention(q, k, v, rows, rows, 0, 0, return_lse=True, backend=backend)
    assert torch.equal(o, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((2, T), -torch.inf, device=device))
    for grad in torch.autograd.grad(o.sum(), (q, k, v)):
        assert torch.equal(grad, torch.zeros_like(q))


def test_max_seqlen_may_be_a_tensor_or_too_large(device):
    q, k, v = make_inputs(*[(33, 2, 16)] * 3, device=device)
    rows = cu(13, 20, device=device)
    expected = fastattn.varlen_attention(q, k, v, rows, rows, 20, 20, backend="triton")
    for longest in (torch.tensor(20), torch.tensor([20], device=device), 33, 4096):
        assert torch.equal(fastattn.varlen_attention(q, k, v, rows, rows, longest, longest, backend="triton"), expected)
        actual = fastattn.varlen_attention(q, k, v, rows, rows, longest, longest, backend="eager")
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_bias_sized_by_a_larger_max_seqlen(device):
    """Entries beyond the longest sequence get a gradient of 0."""
    q, k, v = make_inputs(*[(33, 2, 16)] * 3, device=device)
    (bias,) = make_inputs((2, 40, 40), device=device)
    rows = cu(13, 20, device=device)
    results = []
    for backend in ("triton", "eager"):
        leaf = bias.clone().requires_grad_()
        o = fastattn.varlen_attention(q, k, v, rows, rows, 40, 40, bias=leaf, backend=backend)
        results.append((o, *torch.autograd.grad(o.square().sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert (results[0][1][:, 20:] == 0).all()
    assert (results[0][1][:, :, 20:] == 0).all()


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_bound_costs_no_memory(backend):
    """Tensors are as large as the sequences make them, however large a maximum the caller gives."""
    cu_seqlens = torch.tensor([0, 200, 230, 320], dtype=torch.int32)
    (x,) = make_inputs((320, 2, 16))

    def run(longest):
        return fastattn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, longest, longest, backend=backend)

    torch.testing.assert_close(run(8192), run(200))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(8192)
    largest = max(event.self_cpu_memory_usage for event in profiled.events())
    assert 0 < largest <= 4 * 3 * 2 * 200 * 201  # bytes of float32: sequences × heads × queries × keys and a column


@pytest.mark.parametrize("causal", [False, "bottom_right"])
@pytest.mark.parametrize("gradient", [False, True])
def test_each_sequence_by_torch(causal, gradient):
    """eager takes long sequences one after the other: rows left over, empty ones, other lengths of queries and keys."""
    cu_q, cu_k = (torch.tensor(t, dtype=torch.int32) for t in ([0, 130, 130, 200], [0, 150, 190, 190]))
    q, k, v = make_inputs((210, 4, 16), (190, 2, 16), (190, 2, 16))
    (do,) = make_inputs((210, 4, 16), seed=1)

    def results(backend, dtype):
        leaves = [t.to(dtype).detach().requires_grad_(gradient) for t in (q, k, v)]
        call = {"causal": causal, "backend": backend}
        both = fastattn.varlen_attention(*leaves, cu_q, cu_k, 200, 200, return_lse=True, **call)
        alone = fastattn.varlen_attention(*leaves, cu_q, cu_k, 200, 200, **call)
        return [*both, alone, *(torch.autograd.grad(alone, leaves, do.to(dtype)) if gradient else ())]

    rounded = simulate_rounding(lambda: results("reference", torch.float32))
    found = results("eager", torch.float32), results("reference", torch.float64), rounded
    for name, *tensors in zip(("o", "lse", "o alone", "dq", "dk", "dv"), *found, strict=False):
        assert_close(*tensors, name)


def test_bounds_in_int64():
    """As torch's cumulative sums of lengths come; one tensor for both sides stays one."""
    (x,) = make_inputs((10, 2, 16))
    bounds = torch.tensor([0, 3, 10])
    expected = fastattn.varlen_attention(x, x, x, bounds.int(), bounds.int(), 7, 7, causal="bottom_right")
    ours = fastattn.varlen_attention(x, x, x, bounds, bounds, 7, 7, causal=True)
    assert torch.equal(ours, expected)
