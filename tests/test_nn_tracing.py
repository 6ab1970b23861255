"""The modules under torch.fx, torch.jit.script and over nested tensors, as those of torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastattn
import fastattn.nn as ours
from fastattn.errors import UnsupportedError

ROWS = {
    "LayerNorm": (16,),
    "RMSNorm": (16,),
    "Softmax": (-1,),
    "LogSoftmax": (-1,),
}
LAYERS = {
    **ROWS,
    "MultiheadAttention": (16, 2),
    "TransformerEncoderLayer": (16, 2, 32, 0.0),
    "TransformerDecoderLayer": (16, 2, 32, 0.0),
}


def pair(name: str, *args) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    mine, theirs = getattr(ours, name)(*args), getattr(nn, name)(*args)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def inputs_of(name: str) -> list[torch.Tensor]:
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))
    return [x] * {"MultiheadAttention": 3, "TransformerDecoderLayer": 2}.get(name, 1)


RECORDED = {
    "cross_entropy": ours.CrossEntropyLoss(),
    "linear_cross_entropy": ours.LinearCrossEntropyLoss(16, 7),
    "swiglu": ours.SwiGLU(),
    "geglu": ours.GEGLU(),
}


@pytest.mark.parametrize("name", RECORDED)
def test_symbolic_trace_records_our_functions(name):
    module = RECORDED[name]
    x, target = torch.randn(5, 16), torch.arange(5)
    inputs = (x, target) if "entropy" in name else (x, x.cos())
    graph = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(graph(*inputs), module(*inputs))
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert getattr(fastattn, name) in called


@pytest.mark.parametrize("name", ROWS)
def test_symbolic_trace(name):
    mine, theirs = pair(name, *ROWS[name])
    (x,) = inputs_of(name)
    model = nn.Sequential(nn.Linear(16, 16), mine)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(mine)(x), theirs(x))
    (called,) = (node for node in graph.graph.nodes if node.op == "call_function")
    assert called.target.__module__.startswith("fastattn.functional")


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_script(name, training, tmp_path):
    """TorchScript compiles torch's operations in place of ours; what it compiles can be saved, and ours stays ours."""
    mine, theirs = pair(name, *LAYERS[name])
    mine.train(training), theirs.train(training)
    x = inputs_of(name)
    scripted = torch.jit.script(mine)
    scripted.save(tmp_path / "module.pt")
    for call in (scripted, torch.jit.load(tmp_path / "module.pt")):
        for a, b in zip(_flat(call(*x)), _flat(theirs(*x)), strict=True):
            torch.testing.assert_close(a, b)
    untouched, _ = pair(name, *LAYERS[name])
    assert [type(module) for module in mine.modules()] == [type(module) for module in untouched.modules()]
    if list(mine.parameters()):
        assert scripted.state_dict().keys() == mine.state_dict().keys()


def _flat(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    "module",
    [ours.RMSNorm(16, weight_offset=1.0), ours.CrossEntropyLoss(z_loss=0.1), ours.CrossEntropyLoss(softcap=5.0)],
)
def test_script_refuses_what_torch_does_not_have(module):
    with pytest.raises(UnsupportedError, match=r"which has no (weight_offset|z_loss|softcap)"):
        torch.jit.script(module)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("name", ROWS)
def test_nested(name, layout):
    mine, theirs = pair(name, *ROWS[name])
    x = torch.nested.nested_tensor([torch.randn(n, 16) for n in (3, 5)], layout=layout)
    try:
        expected = theirs(x)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        with pytest.raises(type(error)):
            mine(x)
        return
    for a, b in zip(mine(x).unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b)


def test_nested_rms_norm_adds_its_offset():
    norm = ours.RMSNorm(16, weight_offset=1.0)
    x = torch.nested.nested_tensor([torch.randn(n, 16) for n in (3, 5)], layout=torch.jagged)
    for y, rows in zip(norm(x).unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(y, norm(rows))


def test_a_traced_graph_has_nothing_that_the_older_onnx_exporter_lacks():
    mine, _ = pair("MultiheadAttention", 16, 2)
    graph = torch.jit.trace(mine, tuple(inputs_of("MultiheadAttention")), check_trace=False).inlined_graph
    assert "aten::matmul" in str(graph)
    assert "aten::mT" not in str(graph)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_profile_names_our_functions(backend):
    q = torch.randn(1, 1, 20, 16, requires_grad=True)
    with torch.profiler.profile() as profiled:
        fastattn.layer_norm(fastattn.attention(q, q, q, backend=backend), 16, backend=backend).sum().backward()
    names = {event.key for event in profiled.key_averages()}
    for name in ("AttentionFunction", "LayerNormFunction"):
        assert {name, f"{name}Backward"} <= names
