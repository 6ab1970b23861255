"""What only a GPU shows: compiled kernels at sizes of real models, streams, graphs, and memory."""

from __future__ import annotations

from dataclasses import replace

import cases
import pytest
import torch
from parity import check, inputs_of, options_of, packed_of

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


LENGTHS = ((1000, 1000), (3, 3), (0, 0), (517, 517))
FEATURES = [
    cases.case("bias", bias=cases.Score("1HMN")),
    cases.case("bias_by_key", bias=cases.Score("B11N"), causal=True),
    cases.case("bias_heads_innermost", bias=cases.Score("1HMN", layout="heads_innermost")),
    cases.case("documents", mask=cases.Score("MN", fill="documents"), causal=True),
    cases.case("blocks", mask=cases.Score("1HMN", fill="blocks")),
    cases.case("alibi", alibi_slopes=cases.Score("BH", fill="slopes"), causal=True),
    cases.case("softcap_dropout", softcap=20.0, dropout_p=0.1),
    cases.case("sinks", sinks=cases.Score("H"), window=(200, 0)),
    cases.packed("varlen", LENGTHS, causal="bottom_right"),
    cases.packed(
        "varlen_everything", LENGTHS, causal="bottom_right", softcap=20.0, dropout_p=0.1, sinks=cases.Score("H"),
        bias=cases.Score("1HMN"), alibi_slopes=cases.Score("BH", fill="slopes"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features_at_many_tiles(case, D, dtype):
    packed = case.lengths is not None
    sizes = {} if packed else {"S_q": 777, "S_k": 777, "B": 2}
    case = replace(case, H=4, H_kv=2, D=D, dtype=dtype, **sizes)
    check("triton", *inputs_of(case, CUDA), *options_of(case, CUDA), packed_of(case, CUDA))


@pytest.mark.parametrize(("D", "D_v"), [(192, 128), (512, 512), (576, 512), (96, 40), (33, 65)])
def test_widths_at_many_tiles(D, D_v):
    case = cases.case("", 300, 300, H=4, H_kv=1, D=D, D_v=D_v, dtype=torch.bfloat16, causal=True)
    check("triton", *inputs_of(case, CUDA), case.options)


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


def test_replay_of_a_cuda_graph_drops_anew():
    q, k, v = make_inputs(*[(2, 4, 300, 64)] * 3, dtype=torch.float16, device=CUDA)
    fastattn.attention(q, k, v, dropout_p=0.5, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fastattn.attention(q, k, v, dropout_p=0.5, backend="triton")
    results = []
    for _ in range(2):
        graph.replay()
        results.append(captured.clone())
    assert not torch.equal(*results)


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
