"""Attention with large, tied, infinite and tiny scores, on every backend: values and gradients against float64.

The scores themselves are exact: q and k hold whole numbers, the scale is a power of two, and what is added to them is
rounded once, to float32, before the oracle sees it. So nothing is left to allow for but the arithmetic of the softmax,
whose error is simulated from the same scores (`fastattn.testing`).
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
from fastattn.testing import assert_close, simulate_rounding

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LOWEST = torch.finfo(F32).min
B, H, D = 2, 2, 16


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
        return self.results(self.q.double(), self.k.double(), after - before, torch.float64)

    def rounded(self) -> dict[str, Tensor]:
        """The same from the scores themselves, every operation rounded to float32, and what is returned to the dtype.

        lse is of probabilities in the dtype, since kernels compute exponentials as coarsely as they store them.
        """
        _, after = self.scores()
        nothing = torch.zeros_like(self.q, dtype=F32), torch.zeros_like(self.k, dtype=F32)

        def formula() -> dict[str, Tensor]:
            found = self.results(*nothing, after.float(), F32)
            ds = found.pop("ds")
            k = self.k.float().repeat_interleave(H // self.k.shape[1], 1)
            dk = (ds.mT @ self.q.float()).unflatten(1, (self.k.shape[1], -1)).sum(2)
            found |= {"dq": ds @ k * self.scale, "dk": dk * self.scale}
            s = torch.cat([self.visible(after.float()), self.sink_column()], -1)
            top = s.amax(-1, keepdim=True)
            p = (s - torch.where(top.isfinite(), top, 0.0)).exp().to(self.q.dtype)
            lse = top[..., 0] + p.float().sum(-1).log()
            narrow = {name: t.to(self.q.dtype) for name, t in found.items() if name in ("o", "dq", "dk", "dv")}
            return found | narrow | {"lse": lse.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)}

        return simulate_rounding(formula)

    def visible(self, s: Tensor) -> Tensor:
        S_q, S_k = s.shape[-2:]
        hidden = torch.ones(S_q, S_k, dtype=torch.bool).triu(S_k - S_q + 1)
        return torch.where(hidden, -math.inf, s) if self.causal else s

    def sink_column(self) -> Tensor:
        sinks = self.features.get("sinks", torch.full((H,), -math.inf))
        return sinks[:, None, None].expand(B, H, self.q.shape[2], 1)

    def results(self, q: Tensor, k: Tensor, bias: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (q, k, self.v)]
        named = {"bias": bias.detach().requires_grad_()}
        if "sinks" in self.features:
            named["sinks"] = self.features["sinks"].to(dtype).detach().requires_grad_()
        spec = spec_of(*leaves, causal=self.causal, scale=self.scale, **named)
        o, lse = reference(*leaves, spec, compute_dtype=dtype, **named)
        grads = self.grads(o, lse, [*leaves, *named.values()])
        results = {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv", *(f"d{n}" for n in named)), grads, strict=True))
        ds = results.pop("dbias")
        if "bias" in self.features:
            results["dbias"] = ds.sum_to_size(self.features["bias"].shape)
        if "alibi_slopes" in self.features:
            results["dalibi_slopes"] = -(ds * self.distance()).sum((0, 2, 3))
        return results | {"ds": ds}

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
        """The largest number that each result is a sum of, times √n where n rounded numbers are added up.

        o is rounded to the inputs' type, and the gradient of a wider feature is a sum of products with it.
        """

        def most(t: Tensor) -> float:
            return t.abs().max().item()

        wider = torch.finfo(self.q.dtype).eps / torch.finfo(F32).eps
        n = wider * math.sqrt(self.q.shape[2] * self.k.shape[2])
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
    exact, rounded, actual = draw.exact(), draw.rounded(), draw.actual(backend)
    sizes = draw.sizes(exact)
    assert exact.keys() - {"ds"} == actual.keys()
    for name, t in actual.items():
        assert_close(t, exact[name], rounded[name], name, scale=sizes.get(name, 0.0))


KERNELS = pytest.mark.parametrize("backend", ["cpu", "triton", "eager", "reference"])
EVERYWHERE = [-1e4, -1e6, -1e9, LOWEST, 1e6, 3e38]


@KERNELS
@pytest.mark.parametrize("value", EVERYWHERE)
@pytest.mark.parametrize("where", ["bias", "sinks", "alibi_slopes"])
def test_one_large_number_everywhere(where: str, value: float, backend: str):
    """All keys are as good, or none beside the sink, or the one at no distance: as of scores of 0 and -inf."""
    S = 64
    q, k = (torch.zeros(1, 1, S, D) for _ in range(2))
    v, do = (torch.randn(1, 1, S, D, generator=torch.Generator().manual_seed(i)) for i in range(2))
    feature = {
        "bias": {"bias": torch.full((S, S), value)},
        "sinks": {"sinks": torch.tensor([value])},
        "alibi_slopes": {"alibi_slopes": torch.tensor([abs(value)])},
    }[where]
    all_to_sink = where == "sinks" and value > 0.0
    counts = torch.eye(S).bool() if where == "alibi_slopes" else torch.full((S, S), not all_to_sink)
    counts = torch.cat([counts, torch.full((S, 1), all_to_sink)], -1)  # the last column is the sink's
    scores = torch.where(counts, 0.0, -math.inf)  # beside the largest
    largest = value if where == "bias" else max(value, 0.0) if where == "sinks" else 0.0

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        s, leaf = scores.to(dtype), v.to(dtype).detach().requires_grad_()
        o = s.softmax(-1)[:, :S] @ leaf
        (dv,) = torch.autograd.grad(o, leaf, do.to(dtype))
        return {"o": o, "dv": dv, "lse": (s.logsumexp(-1) + largest)[None, None]}

    leaves = [t.requires_grad_() for t in (q, k, v)]
    o, lse = fastattn.attention(*leaves, return_lse=True, backend=backend, **feature)
    (dv,) = torch.autograd.grad(o, leaves[2], do)
    exact, rounded = formula(torch.float64), simulate_rounding(lambda: formula(F32))
    for name, t in (("o", o), ("dv", dv), ("lse", lse)):
        assert_close(t, exact[name], rounded[name], name)


@KERNELS
@pytest.mark.parametrize("value", EVERYWHERE)
def test_tangents_of_one_large_number_everywhere(value: float, backend: str):
    q, k = (torch.zeros(1, 1, 8, D) for _ in range(2))
    v, tangent = (torch.randn(1, 1, 8, D, generator=torch.Generator().manual_seed(i)) for i in range(2))
    bias = torch.full((8, 8), value)
    _, to = torch.func.jvp(lambda v: fastattn.attention(q, k, v, bias=bias, backend=backend), (v,), (tangent,))
    p = torch.zeros(8, 8)
    exact, rounded = p.double().softmax(-1) @ tangent.double(), simulate_rounding(lambda: p.softmax(-1) @ tangent)
    assert_close(to, exact, rounded, "to")


@KERNELS
@pytest.mark.parametrize("value", EVERYWHERE)
def test_halves_merged_by_their_lse(value: float, backend: str):
    """The gradient of o = Σ o_i exp(lse_i - lse), over two halves of the keys, passes through both lse."""
    q, k, v, do = (torch.randint(-2, 3, (1, 1, 32, D), generator=torch.Generator().manual_seed(i)) for i in range(4))

    def gradients(dtype: torch.dtype, value: float, backend: str) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (q * 0, k, v)]
        bias = torch.full((32, 16), value, dtype=dtype)
        halves = [
            fastattn.attention(leaves[0], k_i, v_i, bias=bias, return_lse=True, backend=backend)
            for k_i, v_i in zip(leaves[1].chunk(2, 2), leaves[2].chunk(2, 2), strict=True)
        ]
        weights = torch.stack([lse for _, lse in halves]).softmax(0)
        o = sum(o * w[..., None] for (o, _), w in zip(halves, weights, strict=True))
        return torch.autograd.grad(o, leaves, do.to(dtype))

    exact = gradients(torch.float64, 0.0, "reference")
    rounded = simulate_rounding(lambda: gradients(F32, 0.0, "reference"))
    largest = (do.abs().double() @ v.abs().double().mT).amax().item()  # what ds subtracts
    for name, *grads in zip(("dq", "dk", "dv"), gradients(F32, value, backend), exact, rounded, strict=True):
        assert_close(*grads, name, scale=largest)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask_value", [-1e9, LOWEST])
def test_a_sequence_of_padding_alone(mask_value: float, need_weights: bool):
    """nn.MultiheadAttention: beside such a mask float32 keeps nothing of the scores, whose derivative stays 1."""
    torch.manual_seed(0)
    module = fastattn.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(3, 50, 32)
    padding = torch.zeros(3, 50)
    padding[0] = mask_value
    padding[1, 20:] = mask_value
    hidden = (padding != 0.0)[:, None, None]
    hidden[0] = False

    def formula(dtype: torch.dtype) -> tuple[Tensor, ...]:
        in_weight, in_bias, out_weight, out_bias = leaves = [t.to(dtype).detach().requires_grad_() for t in parameters]
        q, k, v = (x.to(dtype) @ in_weight.mT + in_bias).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        s = q @ k.mT * 8**-0.5
        s = torch.cat([s[:1] - s[:1].detach(), s[1:]])
        p = s.masked_fill(hidden, -math.inf).softmax(-1)
        y = (p @ v).transpose(1, 2).flatten(-2) @ out_weight.mT + out_bias
        return torch.autograd.grad(y.square().sum(), leaves)

    parameters = list(module.parameters())
    y, _ = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    grads = torch.autograd.grad(y.square().sum(), parameters)
    names = [name for name, _ in module.named_parameters()]
    exact, rounded = formula(torch.float64), simulate_rounding(lambda: formula(F32))
    for name, *gradient in zip(names, grads, exact, rounded, strict=True):
        assert_close(*gradient, name)
