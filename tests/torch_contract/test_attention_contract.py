"""What torch's tests of scaled_dot_product_attention ask for, and where this library chooses otherwise.

The choices are listed in docs/torch-contract.md.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastattn
from fastattn.testing import make_inputs

ZERO_SIZED = [
    ((0, 4, 10, 64), 32), ((2, 4, 0, 64), 32), ((2, 4, 10, 0), 32), ((0, 0, 0, 0), 32), ((2, 0, 5, 8), 8),
    ((2, 3, 5, 8), 0), ((2, 0, 5, 0), 0),
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["full", "causal"])
@pytest.mark.parametrize("backend", [None, "triton", "cpu", "eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_zero_sized(dtype, backend, options, device):
    """Scores of no width are 0, so that o is the mean of the visible values; gradients have their inputs' shapes."""
    if backend and (dtype == torch.float64 and backend in ("triton", "cpu")):
        pytest.skip("its kernels have no float64")
    if backend and (why := fastattn.backends.get(backend).available(device)):
        pytest.skip(why)
    for shape, D_v in ZERO_SIZED:
        if backend == "triton" and D_v == 0:
            continue  # refused by name: it has no tile for it
        results = []
        for ours in (False, True):
            q, k = (torch.ones(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
            v = torch.linspace(-1.0, 1.0, shape[2], dtype=dtype, device=device)[:, None].expand(*shape[:3], D_v)
            v = v.clone().requires_grad_()
            if ours and backend:
                o = fastattn.attention(q, k, v, causal="top_left" if options else False, backend=backend)
            else:
                o = (fastattn if ours else F).scaled_dot_product_attention(q, k, v, **options)
            results.append((o, *torch.autograd.grad(o.sum(), (q, k, v))))
        torch.testing.assert_close(results[1], results[0])


def test_no_width_has_a_scale_where_one_is_given(device):
    q, v = torch.zeros(1, 1, 3, 0, device=device), torch.arange(3.0, device=device)[None, None, :, None]
    for backend in ("triton", "reference"):
        o, lse = fastattn.attention(q, q, v, scale=0.5, return_lse=True, backend=backend)
        torch.testing.assert_close(o, torch.ones_like(o))
        torch.testing.assert_close(lse, torch.full_like(lse, 3.0).log())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("S_k", [5, 9, 3])
@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
def test_causal_biases(variant, S_k, compiled):
    """Both variants of torch.nn.attention.bias, values and gradients, also in compiled code."""
    inputs = [t.requires_grad_() for t in make_inputs((2, 3, 5, 8), (2, 3, S_k, 8), (2, 3, S_k, 8))]
    bias = variant(5, S_k)
    function = fastattn.scaled_dot_product_attention
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for o in (function(*inputs, attn_mask=bias), F.scaled_dot_product_attention(*inputs, bias._materialize())):
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
    visible = bias._materialize().any(-1)  # a row that sees nothing is 0 here, and in torch's mask path too
    assert not results[0][0][:, :, ~visible].any()
    torch.testing.assert_close(*results)


def test_a_mask_and_is_causal_both_hold():
    """torch's CPU function computes that too, for four dimensions without dropout; its other paths refuse it."""
    q, k, v = make_inputs(*[(2, 3, 5, 8)] * 3)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    mask |= torch.eye(5, dtype=torch.bool)
    both = mask.tril()
    o = fastattn.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, both))
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, mask, is_causal=True))
    rows = (t[0] for t in (q, k, v))
    torch.testing.assert_close(fastattn.scaled_dot_product_attention(*rows, mask, is_causal=True), o[0])
