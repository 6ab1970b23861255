"""MultiheadAttention: the whole contract of torch.nn's, against it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from module_parity import E, H, L, N, S, assert_as_accurate, assert_same, build, converted, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn.nn as ours
import fastattn.nn.weights as weights_of_attention
from fastattn.errors import ArgumentError
from fastattn.nn.attention import ContractError


@dataclass(frozen=True)
class Attention:
    """One way of building MultiheadAttention and one way of calling it."""

    name: str
    init: dict = field(default_factory=dict)
    inputs: str = "self"  # "self": one tensor; "memory": key is value; "distinct": three; "equal": three of one length
    attn_mask: str | None = None  # bool, float, trained, or causal; with a 3, one per batch element and head
    padding: str | None = None
    weights: str | None = "mean"  # None, "mean" or "heads"
    is_causal: bool = False
    batched: bool = True


ATTENTION = [
    Attention("self"),
    Attention("self_no_weights", weights=None),
    Attention("self_heads", weights="heads"),
    Attention("batch_first", {"batch_first": True}),
    Attention("batch_first_no_weights", {"batch_first": True}, weights=None),
    Attention("batch_first_heads", {"batch_first": True}, weights="heads"),
    Attention("no_bias", {"bias": False}),
    Attention("no_bias_memory", {"bias": False}, inputs="memory"),
    Attention("memory", inputs="memory"),
    Attention("memory_no_weights", inputs="memory", weights=None),
    Attention("distinct", inputs="distinct"),
    Attention("distinct_batch_first_no_weights", {"batch_first": True}, inputs="distinct", weights=None),
    Attention("kdim", {"kdim": 6}, inputs="distinct"),
    Attention("vdim", {"vdim": 3}, inputs="distinct", weights=None),
    Attention("kdim_vdim", {"kdim": 6, "vdim": 3, "batch_first": True}, inputs="distinct", weights="heads"),
    Attention("kdim_vdim_no_bias", {"kdim": 6, "vdim": 3, "bias": False}, inputs="distinct"),
    Attention("kdim_equal_vdim_memory", {"kdim": 6, "vdim": 6}, inputs="memory", padding="bool"),
    Attention("bias_kv", {"add_bias_kv": True}),
    Attention("bias_kv_no_bias_no_weights", {"add_bias_kv": True, "bias": False}, weights=None),
    Attention("bias_kv_kdim", {"add_bias_kv": True, "kdim": 6, "vdim": 3}, inputs="distinct"),
    Attention("bias_kv_masks", {"add_bias_kv": True}, attn_mask="bool", padding="bool"),
    Attention("bias_kv_float_masks", {"add_bias_kv": True}, attn_mask="float", padding="float", weights=None),
    Attention("bias_kv_hint", {"add_bias_kv": True}, attn_mask="causal", is_causal=True, weights=None),
    Attention("zero_attn", {"add_zero_attn": True}),
    Attention("zero_attn_masks_heads", {"add_zero_attn": True}, attn_mask="bool3", padding="bool", weights="heads"),
    Attention("bias_kv_zero_attn", {"add_bias_kv": True, "add_zero_attn": True}, inputs="memory", attn_mask="float"),
    Attention("bool_mask", attn_mask="bool"),
    Attention("bool_mask_no_weights", attn_mask="bool", weights=None),
    Attention("bool_mask_heads", attn_mask="bool", weights="heads"),
    Attention("bool_mask_memory", inputs="memory", attn_mask="bool"),
    Attention("bool_mask_3d", attn_mask="bool3"),
    Attention("bool_mask_3d_memory", {"batch_first": True}, inputs="memory", attn_mask="bool3", weights=None),
    Attention("float_mask", attn_mask="float"),
    Attention("float_mask_no_weights", attn_mask="float", weights=None),
    Attention("float_mask_3d", {"batch_first": True}, attn_mask="float3", inputs="memory"),
    Attention("trained_mask", attn_mask="trained"),
    Attention("trained_mask_no_weights", attn_mask="trained", weights=None),
    Attention("trained_mask_3d_heads", attn_mask="trained3", weights="heads"),
    Attention("padding", padding="bool"),
    Attention("padding_no_weights", {"batch_first": True}, padding="bool", weights=None),
    Attention("padding_heads_memory", inputs="memory", padding="bool", weights="heads"),
    Attention("float_padding", padding="float"),
    Attention("trained_padding_no_weights", padding="trained", weights=None),
    Attention("bool_masks", attn_mask="bool", padding="bool"),
    Attention("bool_masks_no_weights", attn_mask="bool", padding="bool", weights=None),
    Attention("bool_mask_3d_padding", {"batch_first": True}, attn_mask="bool3", padding="bool", inputs="memory"),
    Attention("float_masks", attn_mask="float", padding="float"),
    Attention("mixed_masks", attn_mask="float", padding="bool"),
    Attention("mixed_masks_other_way_no_weights", attn_mask="bool3", padding="float", weights=None),
    Attention("hint", attn_mask="causal", is_causal=True, weights=None),
    Attention("hint_float", {"batch_first": True}, attn_mask="causal_float", is_causal=True, weights=None),
    Attention("hint_memory", inputs="memory", attn_mask="causal", is_causal=True, weights=None),
    Attention("hint_weights", attn_mask="causal", is_causal=True),
    Attention("hint_padding", attn_mask="causal", padding="bool", is_causal=True, weights=None),
    Attention("wrong_hint_weights", attn_mask="bool", is_causal=True),
    Attention("wrong_hint_padding", attn_mask="bool", padding="bool", is_causal=True, weights=None),
    Attention("wrong_hint", inputs="equal", attn_mask="bool", is_causal=True, weights=None),
    Attention("unbatched", batched=False),
    Attention("unbatched_batch_first_no_weights", {"batch_first": True}, batched=False, weights=None),
    Attention("unbatched_memory_heads", batched=False, inputs="memory", weights="heads"),
    Attention("unbatched_masks", batched=False, attn_mask="bool3", padding="bool"),
    Attention("unbatched_float_masks", batched=False, inputs="memory", attn_mask="float", padding="float"),
    Attention("unbatched_bias_kv_zero_attn", {"add_bias_kv": True, "add_zero_attn": True}, batched=False),
    Attention("unbatched_hint", batched=False, attn_mask="causal", is_causal=True, weights=None),
]


@pytest.fixture(params=["torch", "all_heads", "head_by_head"])
def held(request, monkeypatch):
    """Averaged weights by torch, of all heads at once, or one head after the other: as of small, and of large ones."""
    if request.param != "torch":
        monkeypatch.setattr(weights_of_attention, "SMALL", 0)
    if request.param == "head_by_head":
        monkeypatch.setattr(weights_of_attention, "LARGE", 0)


def attention_call(case: Attention, width: int = E, heads: int = H) -> tuple[tuple[Tensor, ...], dict]:
    """(args, kwargs) of the case. No row is fully masked, where torch is NaN: every mask leaves key 0 visible."""
    generator = torch.Generator().manual_seed(2)
    batch_first = case.init.get("batch_first", False)
    n_keys = S if case.inputs in ("memory", "distinct") else L

    def tensor(length: int, width: int) -> Tensor:
        shape = (length, width) if not case.batched else (N, length, width) if batch_first else (length, N, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    kdim, vdim = case.init.get("kdim", width), case.init.get("vdim", width)
    query = tensor(L, width)
    if case.inputs == "self":
        key = value = query
    else:
        key = tensor(n_keys, kdim)
        value = key if case.inputs == "memory" else tensor(n_keys, vdim)

    def mask(kind: str | None, *shape: int) -> Tensor | None:
        if kind is None:
            return None
        if kind.startswith("causal"):
            hidden = torch.ones(shape, dtype=torch.bool).triu(1)
            return hidden if kind == "causal" else torch.zeros(shape).double().masked_fill(hidden, -torch.inf)
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        hidden = numbers > 0.3
        hidden[..., 0] = False
        if kind.startswith("bool"):
            return hidden
        return numbers.requires_grad_() if kind.startswith("trained") else numbers.masked_fill(hidden, -torch.inf)

    batch = N if case.batched else 1
    per_head = case.attn_mask is not None and case.attn_mask.endswith("3")
    return (query, key, value), {
        "attn_mask": mask(case.attn_mask, *((batch * heads,) if per_head else ()), L, n_keys),
        "key_padding_mask": mask(case.padding, *((N,) if case.batched else ()), n_keys),
        "need_weights": case.weights is not None,
        "average_attn_weights": case.weights == "mean",
        "is_causal": case.is_causal,
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_equals_torch(case, held):
    theirs, mine = build("MultiheadAttention", E, H, **case.init, dtype=torch.float64)
    args, kwargs = attention_call(case)
    assert_same(theirs, mine, args, kwargs)
    expected = theirs(*args, **kwargs)
    mine.eval()
    with torch.no_grad():
        torch.testing.assert_close(mine(*args, **kwargs), expected)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, E), (torch.float32, 16), (torch.bfloat16, 16)], ids=str)
def test_attention_is_as_accurate_as_torch(dtype, width, device):
    """Heads of 8 are the narrowest that kernels take, so that those of 4 show the way around them."""

    def pairs():
        for case in ATTENTION[::4]:
            theirs, mine = build("MultiheadAttention", width, H, **case.init)
            to = {"device": device, "dtype": dtype}
            yield theirs.to(**to), mine.to(**to), *converted(*attention_call(case, width), **to)

    assert_as_accurate(pairs())


@pytest.mark.parametrize("weights", ["mean", "heads"])
@pytest.mark.parametrize("attn_mask", [None, "bool", "trained3"])
def test_returned_weights_are_those_that_dropout_left(weights, attn_mask, held):
    case = Attention("dropout", {"batch_first": True}, "memory", attn_mask, weights=weights)
    theirs, mine = build("MultiheadAttention", E, 1, dropout=0.5, batch_first=True, dtype=torch.float64)
    args, kwargs = attention_call(case, heads=1)
    torch.manual_seed(3)
    expected = run(theirs, args, kwargs)
    torch.manual_seed(3)
    torch.testing.assert_close(run(mine, args, kwargs), expected)  # one head: one mask is drawn, as torch draws it
    dropped = expected[0][1].squeeze(1) == 0
    visible = ~(kwargs["attn_mask"] if attn_mask == "bool" else torch.zeros_like(dropped))
    assert 0 < (dropped & visible).sum() < visible.expand_as(dropped).sum()


def test_output_and_averaged_weights_share_one_dropout_mask(held):
    torch.manual_seed(0)
    mha = ours.MultiheadAttention(E, H, dropout=0.5, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        mha.in_proj_weight[2 * E :] = 0.0
        mha.in_proj_bias[2 * E :] = 1.0  # every value is 1, so that a head's output is the sum of its weights
        mha.out_proj.weight.copy_(torch.full((E, E), 1 / E))
    output, weights = mha(*[torch.randn(N, L, E, dtype=torch.float64)] * 3)
    torch.testing.assert_close(output, weights.sum(-1, keepdim=True).expand_as(output))
    assert not torch.allclose(output, torch.ones_like(output))


def test_dropout_is_drawn_afresh_in_training_and_absent_in_evaluation():
    torch.manual_seed(0)
    mha = ours.MultiheadAttention(E, H, dropout=0.5, batch_first=True, dtype=torch.float64)
    x = torch.randn(N, L, E, dtype=torch.float64)
    first, second = (mha(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    mha.eval()
    plain = copy.deepcopy(mha)
    plain.dropout = 0.0
    torch.testing.assert_close(mha(x, x, x, need_weights=False), plain.train()(x, x, x, need_weights=False))


@pytest.mark.parametrize("weights", [None, "mean", "heads"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_query_that_sees_nothing_attends_to_nothing(weights, kind):
    torch.manual_seed(0)
    mha = ours.MultiheadAttention(E, H, dtype=torch.float64)
    nn.init.normal_(mha.out_proj.bias)
    x = torch.randn(L, E, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(L, L, dtype=torch.bool)
    mask[2] = True
    if kind == "float":
        mask = torch.zeros(L, L, dtype=torch.float64).masked_fill(mask, -torch.inf)
    output, p = mha(x, x, x, attn_mask=mask, need_weights=weights is not None, average_attn_weights=weights == "mean")
    torch.testing.assert_close(output[2], mha.out_proj.bias, rtol=0, atol=0)
    loss = output.sum()
    if weights is not None:
        assert (p[..., 2, :] == 0).all()
        loss = loss + p.square().sum()
    for g in torch.autograd.grad(loss, [x, *mha.parameters()]):
        assert g.isfinite().all()


@pytest.mark.parametrize("weights", [None, "mean", "heads"])
@pytest.mark.parametrize(("queries", "keys"), [(0, S), (L, 0)])
def test_empty_sequences(weights, queries, keys):
    mha = ours.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    query, memory = torch.randn(N, queries, E).double(), torch.randn(N, keys, E).double()
    output, p = mha(query, memory, memory, need_weights=weights is not None, average_attn_weights=weights == "mean")
    torch.testing.assert_close(output, mha.out_proj.bias.expand(N, queries, E))
    expected = {None: None, "mean": (N, queries, keys), "heads": (N, H, queries, keys)}[weights]
    assert (None if p is None else p.shape) == expected


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("held", ["head_by_head"], indirect=True)
def test_large_averaged_weights_never_hold_all_heads(dtype, dropout, train, held):
    heads, length = 8, 48
    mha = ours.MultiheadAttention(heads, heads, dropout=dropout, batch_first=True, dtype=dtype)
    x = torch.randn(N, length, heads, dtype=dtype)
    one_head = N * length * length
    with LargestTensor() as largest, torch.set_grad_enabled(train):
        output, weights = mha.train(train)(x, x, x)
        if train:
            (output.sum() + weights.square().sum()).backward()
    assert largest.numel == one_head

    with LargestTensor() as largest:
        nn.MultiheadAttention(heads, heads, batch_first=True, dtype=dtype)(x, x, x)
    assert largest.numel == heads * one_head  # what this test measures, it can see


@pytest.mark.parametrize("held", ["head_by_head"], indirect=True)
def test_large_averaged_weights_keep_one_head_for_backward(held):
    heads, length = 8, 48
    mha = ours.MultiheadAttention(heads, heads, batch_first=True, dtype=torch.float64)
    x = torch.randn(N, length, heads, dtype=torch.float64)
    saved = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal saved
        saved += t.numel() if t.numel() >= N * length * length else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mha(x, x, x)
    assert saved <= N * length * length


X = torch.zeros(L, N, E)
# (arguments, keywords, what torch raises, our words); the same off and on the path that returns no weights.
BAD_CALLS = {
    "query_dims": ((X[None], X, X), {}, AssertionError, r"Expected `query` to be \(L, E\) or batched .* it is 4-D"),
    "key_dims": ((X, X[0], X), {}, AssertionError, "`key` and `value` to be 3-D but found 2-D and 3-D tensors resp"),
    "value_dims": ((X[0], X[0], X), {}, AssertionError, "`key` and `value` to be 2-D but found 2-D and 3-D tensors"),
    "query_width": ((X[..., 1:], X, X), {}, AssertionError, r"`query` to have width 8 but found shape \(5, 2, 7\)"),
    "key_width": ((X, X[..., 1:], X), {}, AssertionError, r"`key` to have width 8 but found shape \(5, 2, 7\)"),
    "value_length": ((X, X, X[1:]), {}, AssertionError, "`key` and `value` to agree in length"),
    "batch": ((X[:, 1:], X, X), {}, RuntimeError, "with `query` in batch size"),
    "mask_2d": ((X, X, X), {"attn_mask": torch.zeros(L, S)}, RuntimeError, r"`attn_mask` shape to be \(5, 5\)"),
    "mask_3d": (
        (X, X, X),
        {"attn_mask": torch.zeros(N, L, L)},
        RuntimeError,
        r"to be \(4, 5, 5\) but found \(2, 5, 5\)",
    ),
    "mask_dims": ((X, X, X), {"attn_mask": torch.zeros(L)}, AssertionError, "`None`, 2-D or 3-D but found 1-D tensor"),
    "mask_dtype": ((X, X, X), {"attn_mask": torch.zeros(L, L).long()}, AssertionError, "but found dtype torch.int64"),
    "padding": ((X, X, X), {"key_padding_mask": torch.zeros(L, N)}, AssertionError, r"shape to be \(2, 5\) but found"),
    "padding_dims": ((X, X, X), {"key_padding_mask": torch.zeros(L)}, AssertionError, "`None` or 2-D but found 1-D"),
    "padding_dtype": ((X, X, X), {"key_padding_mask": torch.zeros(N, L).byte()}, AssertionError, "torch.uint8"),
    "hint": ((X, X, X), {"is_causal": True}, RuntimeError, "attn_mask is needed"),
}


@pytest.mark.parametrize("path", ["weights", "no_weights", "eval"])
@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_refused_calls(args, kwargs, error, message, path):
    """In a sentence, as an error of fastattn's that is also of the type that torch raises."""
    kwargs = {**kwargs, "need_weights": path != "no_weights"}
    for module, words in zip(build("MultiheadAttention", E, H), (None, message), strict=True):
        with torch.set_grad_enabled(path != "eval"), pytest.raises(error, match=words) as info:
            module.train(path != "eval")(*args, **kwargs)
    assert isinstance(info.value, ArgumentError)


def test_parametrized_and_pruned_attention():
    theirs, mine = build("MultiheadAttention", E, H, dtype=torch.float64)
    for module in (theirs, mine):
        prune.l1_unstructured(module, "in_proj_weight", 0.5)
        parametrizations.weight_norm(module.out_proj)
    args, kwargs = attention_call(Attention("pruned"))
    assert_same(theirs, mine, args, kwargs)
    assert (mine.in_proj_weight == 0).sum() == 3 * E * E // 2


def test_pruned_output_projection_follows_its_parameter():
    """Pruning recomputes a weight in a hook of its module, so out_proj has to be called, not read."""
    _, mine = build("MultiheadAttention", E, H, dtype=torch.float64)
    prune.l1_unstructured(mine.out_proj, "weight", 0.5)
    (x, *_), _ = attention_call(Attention("pruned"))
    before = mine(x, x, x)[0]
    with torch.no_grad():
        mine.out_proj.weight_orig.mul_(2.0)
    torch.testing.assert_close(mine(x, x, x)[0] - mine.out_proj.bias, 2 * (before - mine.out_proj.bias))


@pytest.mark.parametrize("weights", [None, "mean", "heads"])
def test_torch_func_grad(weights):
    mha = ours.MultiheadAttention(E, H, dtype=torch.float64)
    (x, *_), kwargs = attention_call(Attention("func", weights=weights))

    def loss(parameters):
        outputs = torch.func.functional_call(mha, parameters, (x, x, x), kwargs)
        return sum(o.square().sum() for o in outputs if o is not None)

    parameters = {name: p.detach() for name, p in mha.named_parameters()}
    expected = torch.autograd.grad(loss(dict(mha.named_parameters())), list(mha.parameters()))
    torch.testing.assert_close(tuple(torch.func.grad(loss)(parameters).values()), expected)


@pytest.mark.parametrize("weights", [None, "mean", "heads"])
def test_vmap_over_an_ensemble(weights):
    members = [ours.MultiheadAttention(E, H, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)
    (x, *_), kwargs = attention_call(Attention("vmap", weights=weights))

    def call(parameters, buffers):
        outputs = torch.func.functional_call(members[0], (parameters, buffers), (x, x, x), kwargs)
        return outputs if weights else outputs[:1]

    for i, outputs in enumerate(zip(*torch.func.vmap(call)(parameters, buffers), strict=True)):
        torch.testing.assert_close(outputs, members[i](x, x, x, **kwargs)[: len(outputs)])


@pytest.mark.parametrize("weights", ["mean", "heads"])
def test_double_backward_of_the_weights(weights):
    mha = ours.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def probabilities(x, mask):
        return mha(x, x, x, attn_mask=mask, average_attn_weights=weights == "mean")[1]

    torch.autograd.gradcheck(probabilities, (x, mask))
    torch.autograd.gradgradcheck(probabilities, (x, mask))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("batch_first", [True, False])
def test_nested_batches(batch_first):
    torch.manual_seed(0)
    mha = ours.MultiheadAttention(E, H, batch_first=batch_first, dtype=torch.float64)
    rows = [torch.randn(n, E, dtype=torch.float64) for n in (3, L)]
    x = torch.nested.nested_tensor(rows)
    output, _ = mha(x, x, x, need_weights=False)
    for row, o in zip(rows, output.unbind(), strict=True):
        torch.testing.assert_close(o, mha(row, row, row)[0])
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for args, kwargs in (((x, x, x), {"attn_mask": torch.zeros(L, L)}), ((jagged, jagged, jagged), {})):
        with pytest.raises(ContractError, match="pass key_padding_mask instead"):
            mha(*args, **kwargs)
