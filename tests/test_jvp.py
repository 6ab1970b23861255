"""Forward mode of attention: the fused tangents of o and lse against those of the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import cases
import pytest
import torch
from parity import DIFFERENTIABLE, inputs_of, options_of, packed_of, spec_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.ops.attention import INPUTS
from fastattn.reference.attention import attention as reference
from fastattn.testing import assert_close, make_inputs, simulate_rounding

NAMES = [
    "one_query", "no_queries", "no_keys", "no_batch", "causal", "window_more_keys",
    "rows_that_see_nothing_last", "gqa_of_3", "width_24", "width_320", "mla_192x128", "causal_64_bf16",
    "full_fp16", "scale_negative", "dropout_all", "bias_N", "bias_fp32_with_fp16", "bias_minus_infinity",
    "mask_hides_everything", "mask_strided", "alibi_top_left_window", "softcap_alibi_causal",
    "softcap_negative_scale", "sinks_minus_infinity", "sinks_bf16", "sinks_mask", "value_wider_sinks_alibi",
    "dropout_causal_gqa", "softcap_dropout", "bias_dropout", "sinks_strided", "alibi_strided",
    "varlen_bias_by_head_causal", "varlen_alibi_by_batch", "varlen_sinks",
]  # fmt: skip
SMALLER = {
    "everything": {"B": 1, "S_q": 40, "S_k": 40},
    "varlen_everything": {"H": 2, "H_kv": 1, "B": 3, "S_q": 20, "S_k": 20, "lengths": ((20, 20), (0, 0), (17, 17))},
}
_ALL = {case.name: case for case in (*cases.TRITON, *cases.VARLEN)}
CASES = [*(_ALL[name] for name in NAMES), *(replace(_ALL[name], **sizes) for name, sizes in SMALLER.items())]


class Call:
    """One case: (o, lse) of q, k, v and its differentiable options, by position, as computed in three ways."""

    def __init__(self, case: cases.Case, device: torch.device):
        inputs, _, _ = inputs_of(case, device)
        self.options, features = options_of(case, device)
        self.packed = packed_of(case, device)
        self.names, self.primals = list(features), [*inputs, *features.values()]
        self.tangents = [_direction(t) for t in self.primals]
        self.seed = None
        if self.options.get("dropout_p"):
            torch.manual_seed(5)
            self.seed = torch.randint(2**63 - 1, (), device=device)

    def triton(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        call = {**self.options, **dict(zip(self.names, rest, strict=True)), "backend": "triton"}
        if self.packed:
            return self.packed.attention(q, k, v, **call)
        return fastattn.attention(q, k, v, return_lse=True, **call)

    def reference(self, *primals: Tensor, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        function = self.packed.reference if self.packed else reference
        tensors: dict[str, Tensor | None] = dict.fromkeys(DIFFERENTIABLE)
        tensors |= {"mask": self.options.get("mask"), **dict(zip(self.names, primals[3:], strict=True))}
        spec = spec_of(*primals[:3], **self.options)
        return function(*primals[:3], spec, seed=self.seed, compute_dtype=compute_dtype, **tensors)

    def in_float64(self, tangents: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """-> ((o, lse), their tangents)."""
        wide = (tuple(t.double() for t in ts) for ts in (self.primals, tangents))
        return jvp(lambda *x: self.reference(*x, compute_dtype=torch.float64), *wide)


def _direction(t: Tensor) -> Tensor:
    """A tangent of t, with values and strides of its own."""
    (tangent,) = make_inputs(t.shape, dtype=t.dtype, device=t.device, seed=7)
    return tangent.mT.contiguous().mT if t.dim() > 1 else tangent


def largest(*tensors: Tensor) -> float:
    return max((t[t.isfinite()].abs().max().item() for t in tensors if t.isfinite().any()), default=0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tangents(case: cases.Case, device: torch.device):
    call = Call(case, device)
    primals, tangents = tuple(call.primals), tuple(call.tangents)
    (o, _), exact = call.in_float64(tangents)
    rounded = simulate_rounding(
        lambda: jvp(lambda *x: call.reference(*x, compute_dtype=case.dtype), primals, tangents)[1]
    )
    _, actual = jvp(call.triton, primals, tangents)
    scale = largest(*exact, exact[1][..., None] * o)  # to subtracts tlse · o
    for name, *results in zip(("to", "tlse"), actual, exact, rounded, strict=True):
        assert_close(*results, name, scale=scale)


SOME = cases.case(
    "", 20, 34, H_kv=1, D_v=24, causal="bottom_right", bias=cases.Score("1HMN"), sinks=cases.Score("H"),
    alibi_slopes=cases.Score("H", fill="slopes"),
)  # fmt: skip


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 2), (1, 3, 5)], ids=str)
def test_tangents_of_some_inputs(given: tuple[int, ...], device: torch.device):
    """A tangent that is absent is that of zeros, and an o of which nothing varies has none."""
    call = Call(SOME, device)
    zero = [t if i in given else torch.zeros_like(t) for i, t in enumerate(call.tangents)]
    _, expected = jvp(call.triton, tuple(call.primals), tuple(zero))

    def of_given(*varied: Tensor) -> tuple[Tensor, Tensor]:
        values = dict(zip(given, varied, strict=True))
        return call.triton(*(values.get(i, t) for i, t in enumerate(call.primals)))

    varied, directions = (tuple(ts[i] for i in given) for ts in (call.primals, call.tangents))
    (o, lse), actual = jvp(of_given, varied, directions)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(o, call.triton(*call.primals)[0])
    assert torch.equal(lse, call.triton(*call.primals)[1])


def attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return fastattn.attention(q, k, v, backend="triton", **options)


def duals(function, primals, tangents):
    """The outputs' tangents by torch.autograd.forward_ad, each zeros where there is none."""
    with forward_ad.dual_level():
        outputs = function(*(forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)))
        return tuple(forward_ad.unpack_dual(t).tangent for t in outputs)


def test_dual_tensors(device):
    call = Call(SOME, device)
    primals, tangents = tuple(call.primals), tuple(call.tangents)
    _, expected = jvp(call.triton, primals, tangents)
    assert all(map(torch.equal, duals(call.triton, primals, tangents), expected))


def test_zero_tangents_without_memory(device):
    """PyTorch's own zeros, which no kernel can read."""
    q, k, v = make_inputs(*[(1, 2, 20, 16)] * 3, device=device)
    zero = torch._efficientzerotensor(q.shape, device=device)
    actual = duals(lambda *x: attention(*x, return_lse=True), (q, k, v), (zero, k, zero))
    _, expected = jvp(lambda k: attention(q, k, v, return_lse=True), (k,), (k,))
    torch.testing.assert_close(actual, expected)


TRANSFORMS = {
    "jacfwd": lambda f, x, t: jacfwd(f, (1, 2))(*x),
    "vmap_of_jvp": lambda f, x, t: vmap(lambda *t: jvp(f, x, t)[1])(*(torch.stack([u, -2 * u, u * u]) for u in t)),
    "vmap_of_jvp_over_inputs": lambda f, x, t: vmap(lambda *x: jvp(f, x, t)[1])(*(torch.stack([u, -u]) for u in x)),
    "grad_of_jvp": lambda f, x, t: grad(lambda *x: scalar(jvp(f, x[:3], x[3:])[1]), tuple(range(6)))(*x, *t),
    "jvp_of_jvp": lambda f, x, t: jvp(lambda *y: jvp(f, y[:3], y[3:])[1], (*x, *t), (*t, *x))[1],
    "jacrev_of_jvp": lambda f, x, t: jacrev(lambda *x: jvp(f, x, t)[1])(*x),
    "autograd_of_duals": lambda f, x, t: autograd_of_duals(f, x, t),
    "hessian": lambda f, x, t: hessian(lambda *x: scalar(f(*x)), 1)(*x),
}


def scalar(outputs: tuple[Tensor, ...]) -> Tensor:
    """A loss in which o and lse are not linear; an lse of -inf is left out."""
    return sum((torch.where(t.isfinite(), t, 0.0).sin() * torch.arange(t.numel()).view_as(t)).sum() for t in outputs)


def autograd_of_duals(function, primals, tangents):
    leaves = [t.detach().requires_grad_() for t in (*primals, *tangents)]
    return torch.autograd.grad(scalar(duals(function, leaves[:3], leaves[3:])), leaves)


@pytest.mark.parametrize("options", [{"causal": "bottom_right"}, {"softcap": 1.5, "window": (1, 1)}], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform: str, options: dict, device: torch.device):
    """The operator under transforms of its own, against the reference in float64; the first row sees no key."""
    x = make_inputs((1, 2, 3, 4), (1, 1, 2, 4), (1, 1, 2, 4), device=device)
    t = make_inputs(*(u.shape for u in x), device=device, seed=1)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):

        def function(q, k, v, backend=backend):
            return fastattn.attention(q, k, v, return_lse=True, backend=backend, **options)

        run = TRANSFORMS[transform]
        results.append(run(function, *(tuple(u.to(dtype) for u in us) for us in (x, t))))
    for actual, expected in zip(*map(tree_leaves, results), strict=True):
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-4, atol=1e-4)


HIDDEN = [  # (options, S_q, S_k, queries that see nothing, keys that nobody sees)
    ({"causal": "top_left"}, 20, 40, [], [20, 39]),
    ({"window": (0, 0), "causal": "top_left"}, 40, 20, [20, 39], []),
    ({"mask": torch.arange(20) % 13 != 7}, 20, 20, [], [7]),
]


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(("options", "S_q", "S_k", "queries", "keys"), HIDDEN, ids=("causal", "window", "mask"))
def test_hidden_entries_never_leak(options, S_q, S_k, queries, keys, value, device):
    """What no query sees may hold anything, and so may its tangent."""
    options = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in options.items()}
    results = []
    for garbage in (0.0, value):
        q, tq, k, v, tk, tv = make_inputs(*[(1, 2, S_q, 16)] * 2, *[(1, 2, S_k, 16)] * 4, device=device)
        for t in (q, tq):
            t[:, :, queries] = garbage
        for t in (k, v, tk, tv):
            t[:, :, keys] = garbage
        results.append(jvp(lambda *x: attention(*x, return_lse=True, **options), (q, k, v), (tq, tk, tv)))
    for clean, dirty in zip(*map(tree_leaves, results), strict=True):
        assert torch.equal(clean, dirty)
    assert all(t.isfinite().all() for t in results[1][1])


def test_visible_non_finite_entries_are_not_hidden(device):
    """In tiles masked in part too: of tv, as IEEE has it; of v, a tangent that is not known."""
    q, k, v, tq, tk, tv = make_inputs(*[(1, 1, 50, 16)] * 6, device=device)
    v[0, 0, 20, 4] = math.inf
    tv[0, 0, 9, 3], tv[0, 0, 33, 5], tv[0, 0, 40, 5] = math.nan, -math.inf, math.inf
    to = jvp(lambda *x: attention(*x, causal=True), (q, k, v), (tq, tk, tv))[1][0, 0]
    expected = torch.zeros(50, 16)
    expected[9:, 3], expected[20:, 4], expected[33:40, 5], expected[40:, 5] = math.nan, math.nan, -math.inf, math.nan
    assert torch.equal(to.isnan().cpu(), expected.isnan())
    assert torch.equal((to == -math.inf).cpu(), expected == -math.inf)
    assert not (to == math.inf).any()


class LargestTensor(TorchDispatchMode):
    """Watches what every operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_memory_is_linear(backend, device):
    """Only the reference holds an S × S matrix."""
    S = 96
    q, k, v = make_inputs(*[(1, 1, S, 16)] * 3, device=device)
    with LargestTensor() as watch:
        jvp(lambda *x: fastattn.attention(*x, causal=True, backend=backend), (q, k, v), (q, k, v))
    assert (watch.numel < S * S) == (backend == "triton")


def test_compiled_jvp_is_never_silently_wrong(device):
    """torch.compile does not look into torch.func.jvp of an operator: it says so, or the result is right."""
    q, k, v = make_inputs(*[(1, 1, 20, 16)] * 3, device=device)

    def tangent(q, k, v):
        return jvp(lambda *x: attention(*x, causal=True), (q, k, v), (k, v, q))[1]

    with pytest.raises((NotImplementedError, torch._dynamo.exc.TorchDynamoException)):
        torch.compile(tangent, fullgraph=True, backend="aot_eager")(q, k, v)


def test_opcheck(device):
    x = make_inputs(*[(1, 1, 20, 16)] * 3, device=device)
    o, lse = attention(*x, return_lse=True)
    inputs = (*x, *(None for _ in INPUTS[3:]), o, lse, torch.zeros_like(lse), *x, *[None] * 3)
    leaves = [t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in inputs]
    torch.library.opcheck(torch.ops.fastattn.attention_jvp.default, (*leaves, 0.25, 3, 0, False, None, 0.0, "triton"))
