"""Each feature of attention under torch.compile, export, checkpointing, autocast and saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastattn
from fastattn.testing import make_inputs

B, H, H_KV, S, D = 2, 4, 2, 21, 16
CU_SEQLENS = (0, 9, 9, 20)


def leaves(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"q": (B, H, S, D), "k": (B, H_KV, S, D), "v": (B, H_KV, S, D)}
    extras = {"bias": (1, H, S, S), "alibi_slopes": (H,), "sinks": (H,)}
    inputs = make_inputs(*shapes.values(), dtype=dtype, device=device)
    inputs += make_inputs(*extras.values(), device=device, seed=1)
    return {name: t.requires_grad_() for name, t in zip((*shapes, *extras), inputs, strict=True)}


def mask(device: torch.device) -> Tensor:
    i = torch.arange(S, device=device)
    return (i[:, None] // 7 == i // 7).expand(B, 1, S, S)


def dense(*features: str, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(q, k, v, **tensors):
        given = {name: tensors[name] for name in features if name in tensors}
        given |= {"mask": mask(q.device)} if "mask" in features else {}
        return fastattn.attention(q, k, v, return_lse=True, backend="triton", **options, **given)

    return call


def packed(*features: str, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(q, k, v, **tensors):
        rows = (t[0].transpose(0, 1) for t in (q, k, v))
        given = {name: tensors[name][:, :, :11, :11] if name == "bias" else tensors[name] for name in features}
        cu = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=q.device)
        return fastattn.varlen_attention(*rows, cu, cu, 11, 11, return_lse=True, backend="triton", **options, **given)

    return call


FEATURES: dict[str, Callable] = {
    "plain": dense(),
    "causal": dense(causal=True),
    "window": dense(window=(5, 2)),
    "bias": dense("bias"),
    "mask": dense("mask"),
    "alibi": dense("alibi_slopes", causal=True),
    "softcap": dense(softcap=1.5),
    "sinks": dense("sinks"),
    "dropout": dense(dropout_p=0.3),
    "varlen": packed(causal=True),
    "varlen_everything": packed("bias", "alibi_slopes", "sinks", softcap=2.0, causal=True),
    "everything": dense("bias", "mask", "alibi_slopes", "sinks", softcap=2.0, dropout_p=0.2, causal=True),
}
EVERY_FEATURE = pytest.mark.parametrize("feature", FEATURES)


def loss_of(o: Tensor, lse: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, o.shape[-1], device=o.device)
    return (o.float() * weight).sum() + torch.where(lse.isfinite(), lse, 0.0).sum()


def outputs_and_gradients(function: Callable, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    o, lse = function(**inputs)
    grads = torch.autograd.grad(loss_of(o, lse), inputs.values(), allow_unused=True)
    named = {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True) if grad is not None}
    return {"o": o, "lse": lse, **named}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, t in actual.items():
        assert torch.equal(t, expected[name]), name


@EVERY_FEATURE
def test_compile_without_graph_breaks(feature, device):
    torch.compiler.reset()
    inputs = leaves(device)
    compiled = torch.compile(FEATURES[feature], fullgraph=True, backend="aot_eager")
    actual, expected = (outputs_and_gradients(f, inputs) for f in (compiled, FEATURES[feature]))
    if "dropout" not in feature and feature != "everything":
        assert_same(actual, expected)
    else:  # the seed is drawn elsewhere, so only what is drawn from it differs
        assert actual["o"].shape == expected["o"].shape
        assert actual.keys() == expected.keys()
        again = outputs_and_gradients(compiled, inputs)
        assert_same(actual, again)


@pytest.mark.parametrize("feature", ["everything", "varlen_everything"])
def test_export_keeps_one_operator(feature, device):
    class Module(torch.nn.Module):
        def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
            return FEATURES[feature](**inputs)

    inputs = {name: t.detach() for name, t in leaves(device).items()}
    program = torch.export.export(Module(), (), inputs)
    called = [str(node.target) for node in program.graph.nodes if "fastattn" in str(node.target)]
    assert called == ["fastattn.attention.default"]
    torch.manual_seed(3)
    expected = FEATURES[feature](**inputs)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(**inputs), expected, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("feature", ["everything", "varlen_everything", "dropout"])
def test_activation_checkpointing(feature, use_reentrant, device):
    """The recomputation draws the same seed."""

    def checkpointed(**inputs):
        names, tensors = tuple(inputs), tuple(inputs.values())
        run = lambda *t: FEATURES[feature](**dict(zip(names, t, strict=True)))  # noqa: E731
        return checkpoint(run, *tensors, use_reentrant=use_reentrant)

    inputs = leaves(device)
    expected = outputs_and_gradients(FEATURES[feature], inputs)
    torch.manual_seed(3)
    o, lse = checkpointed(**inputs)
    for t in inputs.values():
        t.grad = None
    loss_of(o, lse).backward()
    grads = {f"d{name}": t.grad for name, t in inputs.items() if t.grad is not None}
    assert_same({"o": o, "lse": lse, **grads}, expected)


def test_selective_checkpointing_saves_what_it_must(device):
    """MUST_SAVE on the operator: it runs once; without, once more in the backward."""
    inputs = leaves(device)
    forward_op = torch.ops.fastattn.attention.default

    def runs(policy: CheckpointPolicy) -> int:
        counted = 0

        class Counting(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal counted
                counted += function is forward_op
                return function(*args, **(kwargs or {}))

        def decide(context, op, *args, **kwargs):
            return policy if op is forward_op else CheckpointPolicy.PREFER_RECOMPUTE

        with Counting():
            o, lse = checkpoint(
                lambda q, k, v: dense(causal=True)(q, k, v),
                *(inputs[name] for name in "qkv"),
                use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(decide),
            )
            loss_of(o, lse).backward()
        return counted

    assert runs(CheckpointPolicy.MUST_RECOMPUTE) == 2
    assert runs(CheckpointPolicy.MUST_SAVE) == 1


@EVERY_FEATURE
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_autocast(feature, dtype, device):
    """q, k and v are cast as torch casts them for its own function; what acts on the scores stays in float32."""
    inputs = leaves(device)
    with torch.autocast(device.type, dtype=dtype):
        actual = outputs_and_gradients(FEATURES[feature], inputs)
    assert actual["o"].dtype == dtype
    assert actual["dq"].dtype == torch.float32
    half = {name: t.detach().to(dtype) if name in "qkv" else t.detach() for name, t in inputs.items()}
    expected = outputs_and_gradients(FEATURES[feature], {name: t.requires_grad_() for name, t in half.items()})
    assert_same(actual, {name: t.to(actual[name].dtype) for name, t in expected.items()})


def test_saved_tensor_hooks_see_every_saved_tensor(device):
    packed_shapes = []

    def pack(t: Tensor) -> Tensor:
        packed_shapes.append(tuple(t.shape))
        return t.clone()

    inputs = leaves(device)
    expected = outputs_and_gradients(FEATURES["everything"], inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        actual = outputs_and_gradients(FEATURES["everything"], inputs)
    assert_same(actual, expected)
    assert {(B, H, S, D), (B, H_KV, S, D), (1, H, S, S), (H,), (B, H, S)} <= set(packed_shapes)


@pytest.mark.parametrize("changed", ["q", "k", "v", "bias", "alibi_slopes", "sinks", "o"])
def test_saved_tensors_changed_in_place_are_noticed(changed, device):
    inputs = leaves(device)
    o, lse = FEATURES["everything"](**{name: t * 1 for name, t in inputs.items()})
    copies = {name: t * 1 for name, t in inputs.items()}
    o, lse = FEATURES["everything"](**copies)
    loss = loss_of(o * 2, lse)
    with torch.no_grad():
        (o if changed == "o" else copies[changed]).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fixed", ["q", "kv", "qkv"])
def test_inputs_that_need_no_gradient(fixed, device):
    inputs = leaves(device)
    expected = outputs_and_gradients(FEATURES["everything"], inputs)
    torch.manual_seed(3)
    partly = {name: t.detach() if name in fixed else t for name, t in inputs.items()}
    wanted = [name for name in partly if name not in fixed]
    grads = torch.autograd.grad(loss_of(*FEATURES["everything"](**partly)), [partly[name] for name in wanted])
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, expected[f"d{name}"]), name
