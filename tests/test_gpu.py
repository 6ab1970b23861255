"""What only a GPU shows: compiled kernels at sizes of real models, streams, graphs, and memory."""

from __future__ import annotations

import cases
import pytest
import torch
from test_attention import check, inputs_of

import fastattn
from fastattn.testing import make_inputs

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (200, 0)}], ids=str)
def test_attention_of_many_tiles(dtype, D, options):
    """o, lse and every gradient at 1000 queries of 8 heads over 2, with every tile of the configuration full or cut."""
    case = cases.case("", 1000, 1000, H=8, H_kv=2, D=D, dtype=dtype)
    check("triton", *inputs_of(case, CUDA), options)


def test_a_stream_of_the_callers_own():
    q, k, v = make_inputs(*[(2, 4, 300, 64)] * 3, dtype=torch.float16, device=CUDA)
    expected = fastattn.attention(q, k, v, causal=True, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = fastattn.attention(q, k, v, causal=True, backend="triton")
    stream.synchronize()
    assert torch.equal(actual, expected)


def test_replay_of_a_cuda_graph_reads_new_inputs():
    q, k, v = make_inputs(*[(2, 4, 300, 64)] * 3, dtype=torch.float16, device=CUDA)
    fastattn.attention(q, k, v, causal=True, backend="triton")  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fastattn.attention(q, k, v, causal=True, backend="triton")
    q.copy_(q.flip(2))
    graph.replay()
    assert torch.equal(captured, fastattn.attention(q, k, v, causal=True, backend="triton"))


def test_memory_grows_with_the_length_and_not_its_square():
    peaks = []
    for S in (4096, 8192):
        q, k, v = (t.requires_grad_() for t in make_inputs(*[(1, 4, S, 64)] * 3, dtype=torch.float16, device=CUDA))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fastattn.attention(q, k, v, causal=True, backend="triton").sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.5 * peaks[0]


def test_triton_is_the_first_choice():
    q, k, v = make_inputs(*[(1, 2, 64, 64)] * 3, dtype=torch.float16, device=CUDA)
    assert fastattn.explain(fastattn.attention, q, k, v, causal=True).backend == "triton"
    assert fastattn.explain(fastattn.layer_norm, q, 64).backend == "triton"
    assert fastattn.explain(fastattn.softmax, q).backend == "triton"
