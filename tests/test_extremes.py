"""Attention with large, tied, infinite and tiny scores, on every backend: values and gradients against float64.

The scores themselves are exact: q and k hold whole numbers, the scale is a power of two, and what is added to them is
rounded once, to float32, before the oracle sees it. So nothing is left to allow for but the arithmetic of the softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from parity import spec_of
from torch import Tensor

import fastattn
from fastattn.reference.attention import attention as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LOWEST = torch.finfo(F32).min
B, H, D = 2, 2, 16
ROUNDINGS = {F32: 3.0, BF16: 1.0, F16: 1.0}  # of the largest number involved
OF_LSE = {F32: 2.0**-21, F16: 2.0**-21, BF16: 1e-4}  # where exponentials are as coarse as p is stored


@dataclass
class Draw:
    """One call: tensors, options, and what float32 makes of its scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor
    features: dict[str, Tensor]
    causal: str | bool
    scale: float

    @classmethod
    def of(cls, seed: int, dtype: torch.dtype) -> Draw:
        g = torch.Generator().manual_seed(seed)

        def pick(*choices):
            return choices[int(torch.randint(len(choices), (), generator=g))]

        def whole(*shape):
            return torch.randint(-3, 4, shape, generator=g).float()

        S_q, S_k, H_kv = pick(1, 5, 33), pick(1, 7, 40), pick(1, 2)
        q, k = whole(B, H, S_q, D), whole(B, H_kv, S_k, D)
        if pick(True, False):  # tied maxima: every key comes twice
            k = k[:, :, torch.arange(S_k) // 2]
        if pick(True, False):  # large scores, all of them or in one row
            q[:, :, slice(None) if pick(True, False) else slice(1)] *= pick(2.0**7, 2.0**-9)
            k *= pick(2.0**7, 2.0**3)
        v, do = (torch.randn(*shape, generator=g) for shape in ((B, H_kv, S_k, D), (B, H, S_q, D)))
        dlse = torch.randn(B, H, S_q, generator=g) * pick(0.0, 1.0)
        features = {}
        if pick(True, True, False):
            shape = pick((B, H, S_q, S_k), (B, 1, 1, S_k), (1, H, S_q, 1), (1, 1, 1, 1))
            value = lambda: pick(-1e4, -1e6, -1e9, LOWEST, -math.inf, 1e4, 1e9, 3e38)  # noqa: E731
            bias = torch.full(shape, value()) if pick(True, False) else whole(*shape)
            rows = torch.rand(shape[:-1], generator=g) < 0.3
            bias[rows] = value()
            bias[torch.rand(shape, generator=g) < 0.2] = value()
            features["bias"] = bias
        if pick(True, False, False):
            features["alibi_slopes"] = 2.0 ** torch.tensor([pick(-3.0, 20.0, 100.0) for _ in range(H)])
        if pick(True, False, False):
            features["sinks"] = torch.tensor([pick(0.0, 1e4, -1e9, 1e9, 3e38, LOWEST) for _ in range(H)])
        scale = pick(0.25, 2.0**-10, 2.0**10 if dtype != F16 else 0.25)  # whose gradients float16 would not hold
        tensors = (t.to(dtype) for t in (q, k, v, do))
        return cls(*tensors, dlse, features, pick("bottom_right", False), scale)

    def scores(self) -> tuple[Tensor, Tensor]:
        """(q kᵀ · scale, the same with bias and slopes as float32 rounds it), in float64."""
        k = self.k.repeat_interleave(H // self.k.shape[1], 1)
        exact = self.q.double() @ k.double().mT * self.scale
        s = exact.float()
        assert (s.double() == exact).all(), "the scores are not exact"
        if "bias" in self.features:
            s = s + self.features["bias"]
        if "alibi_slopes" in self.features:
            s = s - self.features["alibi_slopes"][:, None, None] * self.distance().float()
        return exact, s.double()

    def distance(self) -> Tensor:
        S_q, S_k = self.q.shape[2], self.k.shape[2]
        return (torch.arange(S_q)[:, None] + S_k - S_q - torch.arange(S_k)).abs()

    def exact(self) -> dict[str, Tensor]:
        """All results in float64, with one full bias that makes the scores what they are in float32."""
        before, after = self.scores()
        leaves = [t.double().requires_grad_() for t in (self.q, self.k, self.v)]
        bias = (after - before).requires_grad_()
        named = {"bias": bias}
        if "sinks" in self.features:
            named["sinks"] = self.features["sinks"].double().requires_grad_()
        spec = spec_of(*leaves, causal=self.causal, scale=self.scale, **named)
        o, lse = reference(*leaves, spec, compute_dtype=torch.float64, **named)
        grads = self.grads(o, lse, [*leaves, *named.values()])
        results = {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv", *(f"d{n}" for n in named)), grads, strict=True))
        ds = results.pop("dbias")
        if "bias" in self.features:
            results["dbias"] = ds.sum_to_size(self.features["bias"].shape)
        if "alibi_slopes" in self.features:
            results["dalibi_slopes"] = -(ds * self.distance()).sum((0, 2, 3))
        return results

    def actual(self, backend: str) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in (self.q, self.k, self.v)]
        named = {name: t.detach().requires_grad_() for name, t in self.features.items()}
        call = {"causal": self.causal, "scale": self.scale, "backend": backend, **named}
        o, lse = fastattn.attention(*leaves, return_lse=True, **call)
        grads = self.grads(o, lse, [*leaves, *named.values()])
        return {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv", *(f"d{n}" for n in named)), grads, strict=True))

    def grads(self, o: Tensor, lse: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        dlse = torch.where(lse.isfinite(), self.dlse.to(lse.dtype), 0.0)
        return torch.autograd.grad((o, lse), wanted, (self.do.to(o.dtype), dlse))

    def sizes(self, exact: dict[str, Tensor]) -> dict[str, float]:
        """The largest number that each result is a sum of, times √n where n rounded numbers are added up."""

        def most(t: Tensor) -> float:
            return t.abs().max().item()

        n = math.sqrt(self.q.shape[2] * self.k.shape[2])
        ds = most(self.do.float()) * most(self.v.float()) * math.sqrt(D) + most(self.dlse)
        return {
            "o": most(self.v.float()),
            "dq": ds * most(self.k.float()) * self.scale,
            "dk": ds * most(self.q.float()) * self.scale * math.sqrt(H),
            "dv": most(self.do.float()) * math.sqrt(H * self.q.shape[2]),
            "dbias": ds * n,
            "dsinks": ds * n,
            "dalibi_slopes": ds * n * most(self.distance().float()),
        }


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", ["cpu", "triton", "eager", "reference"])
def test_any_scores(backend: str, dtype: torch.dtype, seed: int):
    draw = Draw.of(seed, dtype)
    exact, actual, sizes = draw.exact(), draw.actual(backend), draw.sizes(draw.exact())
    assert exact.keys() == actual.keys()
    torch.testing.assert_close(actual["lse"].double(), exact["lse"], rtol=2**-22, atol=OF_LSE[dtype])
    for name, size in sizes.items():
        if name in actual:
            error = (actual[name].double() - exact[name]).abs().max().item()
            allowed = ROUNDINGS[dtype] * torch.finfo(dtype).eps * max(size, exact[name].abs().max().item())
            assert error <= allowed, f"{name} is {error:.3g} from float64, {allowed:.3g} are allowed"


KERNELS = pytest.mark.parametrize("backend", ["cpu", "triton", "eager", "reference"])
EVERYWHERE = [-1e4, -1e6, -1e9, LOWEST, 1e6, 3e38]


@KERNELS
@pytest.mark.parametrize("value", EVERYWHERE)
@pytest.mark.parametrize("where", ["bias", "sinks", "alibi_slopes"])
def test_one_large_number_everywhere(where: str, value: float, backend: str):
    """All keys are as good: o is the mean of v, or half of it, or a quarter, or 0 where a sink takes everything."""
    S = 64
    q, k = (torch.zeros(1, 1, S, D) for _ in range(2))
    v, do = (torch.randn(1, 1, S, D, generator=torch.Generator().manual_seed(i)) for i in range(2))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    bias = torch.zeros(S, S) if where == "sinks" else torch.full((S, S), value)
    feature = {"bias": bias}
    if where == "sinks":
        feature["sinks"] = torch.tensor([value])
    if where == "alibi_slopes":  # the diagonal is the only key of its row that is at no distance
        feature = {"alibi_slopes": torch.tensor([abs(value)])}
    o, lse = fastattn.attention(*leaves, return_lse=True, backend=backend, **feature)
    (dv,) = torch.autograd.grad(o, leaves[2], do)
    share = float(where != "sinks" or value < 0.0)
    p = torch.eye(S) if where == "alibi_slopes" else torch.full((S, S), share / S)
    torch.testing.assert_close(o[0, 0], p @ v[0, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dv[0, 0], p.mT @ do[0, 0], rtol=1e-6, atol=1e-6)
    largest = {"bias": value, "sinks": max(value, 0.0), "alibi_slopes": 0.0}[where]
    log_sum = 0.0 if largest == value or where == "alibi_slopes" else math.log(S)
    expected = torch.full_like(lse, largest + (math.log(S) if where == "bias" else log_sum))
    torch.testing.assert_close(lse, expected, rtol=2**-22, atol=1e-6)


@KERNELS
@pytest.mark.parametrize("value", EVERYWHERE)
def test_tangents_of_one_large_number_everywhere(value: float, backend: str):
    q, k = (torch.zeros(1, 1, 8, D) for _ in range(2))
    v, tangent = (torch.randn(1, 1, 8, D, generator=torch.Generator().manual_seed(i)) for i in range(2))
    bias = torch.full((8, 8), value)
    _, to = torch.func.jvp(lambda v: fastattn.attention(q, k, v, bias=bias, backend=backend), (v,), (tangent,))
    torch.testing.assert_close(to, tangent.mean(2, keepdim=True).expand_as(to), rtol=1e-6, atol=1e-6)


@KERNELS
@pytest.mark.parametrize("value", EVERYWHERE)
def test_halves_merged_by_their_lse(value: float, backend: str):
    """The gradient of o = Σ o_i exp(lse_i - lse), over two halves of the keys, passes through both lse."""
    q, k, v, do = (torch.randint(-2, 3, (1, 1, 32, D), generator=torch.Generator().manual_seed(i)) for i in range(4))
    leaves = [t.float().requires_grad_() for t in (q * 0, k, v)]
    bias = torch.full((32, 16), value)

    def merged(q, k, v):
        halves = [
            fastattn.attention(q, k_i, v_i, bias=bias, return_lse=True, backend=backend)
            for k_i, v_i in zip(k.chunk(2, 2), v.chunk(2, 2), strict=True)
        ]
        weights = torch.stack([lse for _, lse in halves]).softmax(0)
        return sum(o * w[..., None] for (o, _), w in zip(halves, weights, strict=True))

    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact)
    for ours, theirs in zip(
        torch.autograd.grad(merged(*leaves), leaves, do.float()),
        torch.autograd.grad(expected, exact, do.double()),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask_value", [-1e9, LOWEST])
def test_a_sequence_of_padding_alone(mask_value: float):
    """The gradients of torch.nn's module, which are right where it returns weights: its composition of operations."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    ours = fastattn.nn.MultiheadAttention(32, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 50, 32)
    padding = torch.zeros(3, 50)
    padding[0] = mask_value
    padding[1, 20:] = mask_value

    def gradients(module: torch.nn.Module, need_weights: bool) -> list[Tensor]:
        y, _ = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        return list(torch.autograd.grad(y.square().sum(), list(module.parameters())))

    known = gradients(theirs, need_weights=True)
    for need_weights in (False, True):
        for grad, value in zip(gradients(ours, need_weights), known, strict=True):
            torch.testing.assert_close(grad, value, rtol=1e-4, atol=1e-4)
