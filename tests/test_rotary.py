"""rotary_embedding of every backend against float64, values and gradients, in place and under transforms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from parity import ONCE, Contexts
from torch import Tensor
from torch.func import jvp, vmap

import fastattn
from fastattn.errors import ArgumentError, ArgumentTypeError, FastattnError, UnsupportedError
from fastattn.testing import assert_close, make_inputs, simulate_rounding

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BACKENDS = pytest.mark.parametrize("backend", ["triton", "eager"])
S_MAX = 40


@dataclass(frozen=True)
class Case:
    name: str
    q: tuple[int, ...] = (2, 5, 20, 16)
    k: tuple[int, ...] | None = (2, 2, 20, 16)
    R: int = 16
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    positions: str = ""  # "", shared, own, chosen (a table for each token), packed
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("half_split"),
    Case("interleaved", options={"interleaved": True}),
    Case("alone", k=None),
    Case("heads_inside", layout="heads_inside"),
    Case("strided_interleaved", layout="strided", options={"interleaved": True}),
    Case("partial", R=6),
    Case("partial_interleaved", R=10, layout="heads_inside", options={"interleaved": True}),
    Case("one_pair", R=2),
    Case("odd_width", (2, 3, 9, 7), None, R=6),
    Case("several_programs", (1, 6, 40, 64), (1, 1, 40, 64), R=64),
    Case("one_token", (3, 4, 1, 16), (3, 4, 1, 16)),
    Case("no_tokens", (2, 4, 0, 16), (2, 4, 0, 16)),
    Case("no_heads", (2, 0, 5, 16), (2, 4, 5, 16)),
    Case("shared_positions", positions="shared"),
    Case("own_positions", positions="own", options={"interleaved": True}),
    Case("chosen", positions="chosen"),
    Case("packed", (23, 5, 16), (23, 2, 16), R=12, positions="packed"),
    Case("packed_alone_interleaved", (23, 5, 16), None, positions="packed", options={"interleaved": True}),
    Case("packed_positions", (23, 5, 16), (23, 2, 16), positions="shared"),
    *(Case(f"{n}", dtype=d, layout="heads_inside", R=8) for d, n in ((F16, "fp16"), (BF16, "bf16"))),
]


def inputs_of(case: Case, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, dict[str, Any]]:
    """x as one or two tensors, dy of each, cos, sin and the keywords."""
    shapes = [case.q] if case.k is None else [case.q, case.k]
    layout = case.layout if len(case.q) == 4 else "contiguous"
    tensors = make_inputs(*shapes, *shapes, dtype=case.dtype, device=device, layout=layout)
    B, S = (1, case.q[0]) if len(case.q) == 3 else (case.q[0], case.q[2])
    generator = torch.Generator().manual_seed(1)
    angles = torch.rand(S_MAX, case.R // 2, generator=generator).to(device) * 6
    options = dict(case.options)
    if case.positions == "shared":
        options["position_ids"] = torch.randint(0, S_MAX, (S,), generator=generator, dtype=torch.int32).to(device)
    elif case.positions == "own":
        options["position_ids"] = torch.randint(0, S_MAX, (B, S), generator=generator).to(device)
    elif case.positions == "chosen":
        angles = torch.rand(B, S, case.R // 2, generator=generator).to(device) * 6
    elif case.positions == "packed":
        options["cu_seqlens"] = torch.tensor([0, 4, 4, S - 5, S - 3], dtype=torch.int32, device=device)
    return tensors[: len(shapes)], tensors[len(shapes) :], angles.cos(), angles.sin(), options


def plain(x: Tensor, cos: Tensor, sin: Tensor, interleaved=False, position_ids=None, cu_seqlens=None) -> Tensor:
    """In eager torch and x's dtype, sequence by sequence, without any function of ours."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            plain(x[a:b], cos, sin, interleaved, torch.arange(b - a, device=x.device)) for a, b in pairwise(bounds)
        ]
        return torch.cat([*parts, x[bounds[-1] :]])
    tokens = x.shape[0] if x.dim() == 3 else x.shape[2]
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    elif cos.dim() == 2:
        cos, sin = cos[:tokens], sin[:tokens]
    cos, sin = (t.to(x.dtype).unsqueeze(-2 if x.dim() == 3 else -3) for t in (cos, sin))
    half = cos.shape[-1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    x1, x2 = x[..., first], x[..., second]
    y = x.clone()
    y[..., first] = x1 * cos - x2 * sin
    y[..., second] = x2 * cos + x1 * sin
    return y


def run(function, xs: list[Tensor], dys: list[Tensor], dtype) -> dict[str, Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in xs]
    ys = function(leaves)
    grads = torch.autograd.grad(ys, leaves, [t.to(dtype) for t in dys])
    return {f"{name}{i}": t for name, ts in (("y", ys), ("dx", grads)) for i, t in enumerate(ts)}


def check(case: Case, backend: str, device: torch.device, under: Contexts = ONCE) -> None:
    xs, dys, cos, sin, options = inputs_of(case, device)

    def ours(leaves):
        x = leaves[0] if len(leaves) == 1 else tuple(leaves)
        y = fastattn.rotary_embedding(x, cos, sin, backend=backend, **options)
        return [y] if isinstance(y, Tensor) else list(y)

    def eager(leaves):
        return [plain(t, cos, sin, **options) for t in leaves]

    exact = run(
        lambda leaves: [plain(t, cos.double(), sin.double(), **options) for t in leaves], xs, dys, torch.float64
    )
    rounded = simulate_rounding(lambda: run(eager, xs, dys, case.dtype))
    for context in under:
        with context:
            for key, t in run(ours, xs, dys, case.dtype).items():
                assert_close(t, exact[key], rounded[key], key)


@BACKENDS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotary(case: Case, backend: str, device: torch.device):
    check(case, backend, device)


def test_any_call(device: torch.device):
    @st.composite
    def cases(draw) -> Case:
        S, D = draw(st.integers(0, S_MAX)), draw(st.integers(2, 24))
        packed = draw(st.booleans()) and S >= 9
        heads = draw(st.integers(0, 6)), draw(st.one_of(st.none(), st.integers(0, 3)))
        B = draw(st.integers(1, 3))
        q, k = (None if H is None else (S, H, D) if packed else (B, H, S, D) for H in heads)
        return Case(
            "drawn",
            q,
            k,
            R=2 * draw(st.integers(1, D // 2)),
            dtype=draw(st.sampled_from([F32, F16, BF16])),
            layout=draw(st.sampled_from(["contiguous", "heads_inside", "strided"])),
            positions=draw(st.sampled_from(["packed", "shared"] if packed else ["", "shared", "own", "chosen"])),
            options={"interleaved": draw(st.booleans())},
        )

    @seed(0)
    @settings(max_examples=50, database=None, deadline=None)
    @given(cases())
    def draw(case):
        check(case, "triton", device)

    draw()


@BACKENDS
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[16]], ids=str)
def test_in_place(case, backend, device):
    xs, dys, cos, sin, options = inputs_of(case, device)
    expected = run(lambda x: fastattn.rotary_embedding(tuple(x), cos, sin, backend=backend, **options), xs, dys, F32)

    def over(leaves):
        x = tuple(t * 1 for t in leaves)
        versions = [t._version for t in x]
        y = fastattn.rotary_embedding(x, cos, sin, inplace=True, backend=backend, **options)
        assert [t.data_ptr() for t in y] == [t.data_ptr() for t in x]
        assert all(t._version > version for t, version in zip(x, versions, strict=True))
        return y

    for key, t in run(over, xs, dys, F32).items():
        assert torch.equal(t, expected[key]), key


def _numbers(*shape: int) -> Tensor:
    return torch.arange(1.0, math.prod(shape) + 1).sin().reshape(shape)


# (B, H, S, D) or packed (T, H, D), as models hold them
IN_PLACE = {
    "contiguous": lambda: _numbers(2, 3, 5, 8),
    "heads_inside": lambda: _numbers(2, 5, 3, 8).transpose(1, 2),
    "sequence_first": lambda: _numbers(5, 2, 3, 8).permute(1, 2, 0, 3),
    "slice_of_qkv": lambda: _numbers(2, 5, 3, 3, 8)[:, :, 1].transpose(1, 2),
    "part_of_the_width": lambda: _numbers(2, 3, 5, 12)[..., 2:10],
    "strided_width": lambda: _numbers(2, 3, 5, 16)[..., ::2],
    "width_outermost": lambda: _numbers(8, 2, 3, 5).permute(1, 2, 3, 0),
    "every_other_token": lambda: _numbers(2, 3, 10, 8)[:, :, ::2],
    "every_other_head": lambda: _numbers(2, 6, 5, 8)[:, ::2],
    "unaligned": lambda: _numbers(2 * 3 * 5 * 8 + 1)[1:].reshape(2, 3, 5, 8),
    "one_token": lambda: _numbers(2, 3, 1, 8),
    "one_head": lambda: _numbers(2, 1, 5, 8),
    "packed": lambda: _numbers(5, 3, 8),
    "packed_heads_outermost": lambda: _numbers(3, 5, 8).transpose(0, 1),
    "packed_slice_of_qkv": lambda: _numbers(5, 3, 3, 8)[:, 1],
}


@pytest.mark.parametrize("backend", ["triton", "cpu", "eager"])
@pytest.mark.parametrize("width", [4, 2], ids=["whole", "partial"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", IN_PLACE)
def test_in_place_returns_the_tensor_itself(layout, interleaved, width, backend, device):
    """In every layout, and leaves alone what lies between its numbers."""
    if why := fastattn.backends.get(backend).available(device):
        pytest.skip(why)
    x = IN_PLACE[layout]().to(device)
    owner = x if x._base is None else x._base
    before, inside = owner.clone(), torch.zeros(owner.shape, dtype=torch.bool, device=device)
    inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    angles = _numbers(5, width).to(device)
    packed = {"cu_seqlens": torch.tensor([0, 2, 5], device=device)} if x.dim() == 3 else {}
    call = partial(fastattn.rotary_embedding, cos=angles.cos(), sin=angles.sin(), interleaved=interleaved, **packed)
    expected = call(x.clone(), backend="reference")
    y = call(x, backend=backend, inplace=True)
    assert y is x
    torch.testing.assert_close(x, expected)
    assert torch.equal(owner[~inside], before[~inside])


def test_positions_outside_of_the_table_are_nan(device):
    """As a GPU has them: on a CPU they are refused, so that here the check is passed by."""
    from fastattn.ops.rotary import rotary
    from fastattn.spec import RotarySpec

    (x,) = make_inputs((1, 2, 4, 6), device=device)
    cos, sin = torch.ones(5, 2, device=device), torch.zeros(5, 2, device=device)
    ids = torch.tensor([0, -1, 5, 4], device=device)
    spec = RotarySpec(F32, ((1, 2, 4, 6),), (False,))
    y, _ = rotary((x, None, cos, sin, ids, None), spec, "triton")
    outside = torch.tensor([False, True, True, False], device=device)
    assert y[:, :, outside, :4].isnan().all()
    assert torch.equal(y[:, :, ~outside], x[:, :, ~outside])
    assert torch.equal(y[..., 4:], x[..., 4:])


def test_derivatives_vmap_and_compile(device):
    q, k = make_inputs((2, 3, 6, 8), (2, 1, 6, 8), device=device)
    angles = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).to(device)

    def function(q, k):
        return torch.cat(fastattn.rotary_embedding((q, k), angles.cos(), angles.sin(), backend="triton"), 1)

    expected = function(q, k)
    value, tangent = jvp(function, (q, k), (2 * q, 2 * k))
    assert torch.equal(value, expected)
    torch.testing.assert_close(tangent, 2 * expected)
    mapped = vmap(function, in_dims=(0, None))(torch.stack([q, -q]), k)
    torch.testing.assert_close(mapped[1, :, :3], -expected[:, :3])
    leaves = [q.requires_grad_(), k.requires_grad_()]
    dy = torch.ones_like(expected, requires_grad=True)
    grads = torch.autograd.grad(function(*leaves), leaves, dy, create_graph=True)
    (again,) = torch.autograd.grad(sum(g.square().sum() for g in grads), dy)
    torch.testing.assert_close(again, 2 * dy)  # a rotation keeps lengths
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, expected)
    pairs = [torch.autograd.grad(t.square().sum() + t[:, 0].sum(), leaves) for t in (compiled, function(*leaves))]
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
    only_k = torch.autograd.grad(function(*leaves)[:, 3:].sum(), leaves)
    assert (only_k[0] == 0).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved, device):
    q, k = (t.requires_grad_() for t in make_inputs((2, 3, 6, 8), (2, 1, 6, 8), device=device))
    cos, sin = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0)).to(device)
    sizes = [2, 3, 6, 8], [2, 1, 6, 8], [False, False]
    args = (q, k, cos, sin, None, None, F32, *sizes, interleaved, "triton")
    torch.library.opcheck(torch.ops.fastattn.rotary.default, args)


def test_offsets_pass_2_to_the_31(device):
    stride = 2**30 if device.type == "cpu" else 2**29 + 16
    far = torch.empty(stride * 4 + 64, dtype=F16, device=device).as_strided((1, 5, 2, 16), (0, stride, 16, 1))
    (near,) = make_inputs((1, 5, 2, 16), dtype=F16, device=device)
    far.copy_(near)
    cos, sin = torch.rand(2, 2, 8, generator=torch.Generator().manual_seed(0)).to(device)
    results = [fastattn.rotary_embedding(t, cos, sin, backend="triton") for t in (far, near)]
    assert torch.equal(*results)


def test_module_grows_and_counts_from_offset(device):
    rotate = fastattn.nn.RotaryEmbedding(8, 4, device=device)
    q, k = make_inputs((2, 3, 10, 12), (2, 1, 10, 12), device=device)
    whole = rotate(q, k)
    assert rotate.max_positions >= 10
    assert not rotate.state_dict()
    tail = rotate(q[:, :, 6:], k[:, :, 6:], offset=6)
    ids = rotate(q[:, :, 6:], position_ids=torch.arange(6, 10, device=device))
    assert torch.equal(tail[0], whole[0][:, :, 6:])
    assert torch.equal(tail[1], whole[1][:, :, 6:])
    assert torch.equal(ids, tail[0])
    angle = torch.outer(torch.arange(10.0), 10000.0 ** (-torch.arange(0, 8, 2) / 8)).to(device)
    torch.testing.assert_close(whole[0], plain(q, angle.cos(), angle.sin()))
    assert rotate.to(BF16).cos.dtype == F32


Q, K, COS = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 5, 8), torch.ones(6, 4)
ROWS, CU = torch.ones(7, 4, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
LEAF = torch.ones(2, 4, 5, 8, requires_grad=True)


def wrong(says: str, x=Q, cos=COS, sin=COS, error: type[FastattnError] = ArgumentError, **options):
    return pytest.param((x, cos, sin), options, error, says, id=says)


@pytest.mark.parametrize(
    ("args", "options", "error", "says"),
    [
        wrong("`x` is a list of 1", [Q]),
        wrong("`x` is None", None, error=ArgumentTypeError),
        wrong("`k` is None", (Q, None), error=ArgumentTypeError),
        wrong("`x` has dtype int64", Q.long(), error=ArgumentTypeError),
        wrong("`x` has shape (5, 8)", Q[0, 0]),
        wrong("it needs `cu_seqlens` or `position_ids`", ROWS),
        wrong("with `cu_seqlens` it must be packed", cu_seqlens=CU),
        wrong("give one of them", ROWS, cu_seqlens=CU, position_ids=torch.arange(7)),
        wrong("may differ in the number of heads only", (Q, K[:, :, :4])),
        wrong("`k` has dtype float16", (Q, K.half()), error=ArgumentTypeError),
        wrong("`sin` has shape (6, 2)", sin=COS[:, :2]),
        wrong("`cos` has dtype int64", cos=COS.long(), error=ArgumentTypeError),
        wrong("`cos` has 5 columns", cos=torch.ones(6, 5), sin=torch.ones(6, 5)),
        wrong("`cos` has 4 rows", cos=COS[:4], sin=COS[:4]),
        wrong("it must be (B, S, R/2) = (2, 5, 4)", cos=COS[None], sin=COS[None]),
        wrong("`position_ids` has dtype float32", position_ids=torch.ones(5), error=ArgumentTypeError),
        wrong("`position_ids` has shape (4,)", position_ids=torch.arange(4)),
        wrong("`position_ids` runs from 2 to 6", position_ids=torch.arange(2, 7)),
        wrong("`cu_seqlens` runs from 0 to 9", ROWS, cu_seqlens=CU + CU // 3),
        wrong("`cu_seqlens` has a sequence of 4", ROWS, COS[:3], COS[:3], cu_seqlens=CU),
        wrong("`cos` requires a gradient", cos=COS.clone().requires_grad_(), error=UnsupportedError),
        wrong("leaf that requires a gradient", LEAF, inplace=True),
        wrong("overlaps itself", Q[:1].expand(2, 4, 5, 8), inplace=True),
        wrong("`q` and `k` share memory", (Q, Q), inplace=True),
        wrong("`interleaved` is an int", interleaved=1, error=ArgumentTypeError),
        wrong("dtype float64", Q.double(), backend="triton", error=UnsupportedError),
    ],
)
def test_wrong_call_raises_one_sentence(args, options, error, says):
    with pytest.raises(error) as caught:
        fastattn.rotary_embedding(*args, **options)
    assert says in str(caught.value)


def test_table_made_in_evaluation_serves_in_training(device):
    rotate = fastattn.nn.RotaryEmbedding(8, 4).to(device)
    (q,) = make_inputs((1, 2, 10, 8), device=device)
    with torch.inference_mode():
        expected = rotate(q)
    y = rotate(q.requires_grad_())
    assert torch.equal(y, expected)
    y.sum().backward()
    assert q.grad.abs().max() > 0


def test_bounds_in_int64(device):
    (x,) = make_inputs((10, 2, 16), device=device)
    cos, sin = make_inputs((7, 8), (7, 8), seed=1, device=device)
    bounds = torch.tensor([0, 3, 10], device=device)
    ours, expected = (fastattn.rotary_embedding(x, cos, sin, cu_seqlens=t) for t in (bounds, bounds.int()))
    assert torch.equal(ours, expected)
