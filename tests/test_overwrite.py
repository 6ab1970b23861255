"""What may be written over: memory that tensors share is found out exactly, and in-place calls act on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn.errors import ArgumentError
from fastattn.functional._overwrite import may_share, overlaps_itself
from fastattn.testing import make_inputs


def places(t: Tensor) -> set[int]:
    """Which elements of its storage a float32 tensor has."""
    everything = torch.arange(t.untyped_storage().nbytes() // 4)
    return set(everything.as_strided(t.shape, t.stride(), t.storage_offset()).flatten().tolist())


@settings(max_examples=500, deadline=None, derandomize=True)
@given(data=st.data())
def test_shared_memory_is_found(data):
    """Exactly, for tensors of equal strides that do not overlap themselves."""
    buffer = torch.empty(300)
    dims = data.draw(st.integers(1, 3))
    strides = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), min_size=dims, max_size=dims))
    sizes = st.lists(st.integers(1, 4), min_size=dims, max_size=dims)
    a, b = (buffer.as_strided(data.draw(sizes), strides, data.draw(st.integers(0, 40))) for _ in range(2))
    for t in (a, b):
        assert overlaps_itself(t) or len(places(t)) == t.numel()
    assume(not overlaps_itself(a) and not overlaps_itself(b))
    assert may_share(a, b) == bool(places(a) & places(b))


def test_neighbours_in_one_projection_share_nothing():
    qkv = torch.empty(2, 10, 3, 4, 8)
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    assert not may_share(q, k)
    assert not may_share(q[:, :2], q[:, 2:])
    assert may_share(q, q)
    assert may_share(qkv[:, :4], qkv[:, 3:5])


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_operands_that_share_memory_with_what_is_written(backend, device):
    """Transposed, and shifted by a row: as if x had been copied before."""
    (buffer,) = make_inputs((40, 40), device=device)
    for parts in (lambda a: (a.T, a), lambda a: (a[:-1], a[1:]), lambda a: (a, a)):
        x, residual = (t.clone() for t in parts(buffer))
        expected = fastattn.dropout_add(x, residual, backend=backend)
        x, residual = parts(buffer.clone())
        assert fastattn.dropout_add(x, residual, inplace=True, backend=backend) is residual
        assert torch.equal(residual, expected)


def test_what_is_written_twice_is_refused(device):
    (qkv,) = make_inputs((2, 4, 6, 8), device=device)
    cos, sin = torch.ones(6, 4, device=device), torch.zeros(6, 4, device=device)
    for q, k in ((qkv, qkv), (qkv, qkv[:]), (qkv[:, :2], qkv[:, 1:3])):
        with pytest.raises(ArgumentError, match="rotary_embedding: `q` and `k` share memory"):
            fastattn.rotary_embedding((q, k), cos, sin, inplace=True)
    with pytest.raises(ArgumentError, match=r"dropout_add: `residual` has strides .* overlaps itself"):
        fastattn.dropout_add(qkv[0, 0, :5, :4], qkv.flatten().unfold(0, 4, 1)[:5], inplace=True)
