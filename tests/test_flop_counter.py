"""torch.utils.flop_counter counts the matrix products of this library's kernels as it counts torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.testing import make_inputs

B, H, S, D = 2, 3, 40, 16


def counted(call, *tensors, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        result = call(*tensors)
        if backward:
            result.sum().backward()
    return counter.get_total_flops()


def leaves(*shapes):
    return [t.requires_grad_() for t in make_inputs(*shapes)]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_attention_counts_as_torch_counts_it(backend, device):
    """Products that a causal mask leaves out are counted, as torch counts them."""
    q, k, v = leaves(*[(B, H, S, D)] * 3)
    with sdpa_kernel(SDPBackend.MATH):
        torchs = counted(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    q, k, v = (t.detach().to(device).requires_grad_() for t in (q, k, v))
    forward = counted(lambda *x: fastattn.attention(*x, backend=backend), q, k, v, backward=False)
    assert forward == torchs // 3  # the backward of unfused attention keeps p: two products for each one
    assert forward == 2 * B * H * S * S * 2 * D
    assert counted(lambda *x: fastattn.attention(*x, causal=True, backend=backend), q, k, v) == forward * 7 // 2


def test_packed_sequences_count_their_own_lengths():
    q, k, v = leaves(*[(12, H, D)] * 3)
    cu = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    forward = counted(lambda *x: fastattn.varlen_attention(*x, cu, cu, 7, 7, backend="triton"), q, k, v, backward=False)
    assert forward == 2 * H * (3 * 3 + 7 * 7) * 2 * D
    with torch.device("meta"):
        shapes = [torch.empty(12, H, D) for _ in range(3)]
        without_lengths = cu.to("meta")
    forward = counted(
        lambda *x: torch.ops.fastattn.attention(
            *(t.transpose(0, 1)[None] for t in x), None, None, None, None, None, without_lengths, without_lengths,
            None, None, 1.0, None, None, False, None, 0.0, "triton",
        )[0],
        *shapes,
        backward=False,
    )  # fmt: skip
    assert forward == 2 * H * (12 * 12 // 3) * 2 * D


def test_tangents_count():
    q, k, v = make_inputs(*[(B, H, S, D)] * 3)
    with FlopCounterMode(display=False) as counter:
        torch.func.jvp(lambda q: fastattn.attention(q, k, v, backend="triton"), (q,), (q,))
    assert counter.get_total_flops() == 2 * B * H * S * S * 7 * D


def test_linear_cross_entropy_counts():
    N, E, V = 10, 16, 24
    hidden, weight = leaves((N, E), (V, E))
    target = torch.arange(N)

    def loss(reduction):
        return lambda *x: fastattn.linear_cross_entropy(*x, target, reduction=reduction, backend="triton")

    product = 2 * N * E * V
    with torch.no_grad():
        assert counted(loss("mean"), hidden, weight, backward=False) == product
    assert counted(loss("mean"), hidden, weight) == 3 * product  # all in the forward
    assert counted(loss("none"), hidden, weight) == 4 * product  # the backward computes the logits again
    assert counted(loss("mean"), hidden, weight.detach()) == 2 * product


def test_a_module_is_shown_with_its_work():
    layer = fastattn.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 256, 32)
    with FlopCounterMode(display=False) as counter:
        layer(x, x, x, need_weights=False)
    by_module = counter.get_flop_counts()["MultiheadAttention"]
    assert by_module[torch.ops.fastattn.attention] == 2 * 2 * 256 * 256 * 64


def test_users_own_formula_is_left():
    q, k, v = make_inputs(*[(B, H, S, D)] * 3)
    mine = {torch.ops.fastattn.attention: lambda *shapes, out_shape=None, **options: 17}
    with FlopCounterMode(display=False, custom_mapping=mine) as counter:
        fastattn.attention(q, k, v, backend="triton")
    assert counter.get_total_flops() == 17


def test_counter_is_not_loaded_for_its_formulas():
    code = """
import sys, torch, fastattn
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    q = torch.empty(1, 1, 8, 8)
    fastattn.attention(q, q, q)
assert "torch.utils.flop_counter" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
