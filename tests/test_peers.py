"""What users of other attention libraries have run into, each held down by a test that names the report.

FA = Dao-AILab/flash-attention, PT = pytorch/pytorch, LK = linkedin/Liger-Kernel, HF = huggingface/transformers.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, Case, Score, case, packed
from parity import check, inputs_of, options_of, packed_of, spec_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.backends.triton import attention_bwd, attention_fwd
from fastattn.backends.triton.configs import BackwardConfig, TileConfig
from fastattn.backends.triton.mask_tiles import mask_tiles
from fastattn.spec import AttentionInputs
from fastattn.testing import LAYOUTS, assert_close, make_inputs, simulate_rounding

EVERY_FEATURE = [
    case("plain", 33, 20, B=2, H=1),
    case("causal_gqa", 33, 33, B=2, H=2, H_kv=1, causal=True),
    case("window", 33, 33, B=2, H=1, window=(11, 3)),
    case("bias", 33, 20, B=2, H=1, bias=Score("BHMN")),
    case("bias_of_heads", 33, 20, B=2, H=1, bias=Score("1HMN")),
    case("mask", 33, 20, B=2, H=1, mask=Score("B1MN", fill="random_bool")),
    case("alibi", 33, 20, B=2, H=1, alibi_slopes=Score("H", fill="slopes"), causal="bottom_right"),
    case("softcap", 33, 20, B=2, H=1, softcap=2.0),
    case("sinks", 33, 20, B=2, H=1, sinks=Score("H")),
    case("dropout", 33, 20, B=2, H=1, dropout_p=0.3),
    case("wide", 9, 17, B=2, H=1, D=320, D_v=272, causal="bottom_right"),
    case(
        "everything", 17, 20, B=2, H=2, H_kv=1, D=24, D_v=40, causal="bottom_right", window=(30, None), softcap=2.0,
        dropout_p=0.2, bias=Score("1HMN"), mask=Score("B1MN", fill="random_bool"), sinks=Score("H"),
        alibi_slopes=Score("BH", fill="slopes"),
    ),
    packed("varlen", ((9, 9), (1, 1), (20, 20)), H=1, causal="bottom_right"),
    packed(
        "varlen_everything", ((9, 17), (0, 5), (18, 7)), H=2, H_kv=1, window=(30, 4), softcap=2.0, dropout_p=0.2,
        bias=Score("1HMN"), mask=Score("B1MN", fill="random_bool"), sinks=Score("H"),
        alibi_slopes=Score("BH", fill="slopes"),
    ),
]  # fmt: skip
NAMED = {case.name: case for case in EVERY_FEATURE}
SMALL = replace(NAMED["everything"], S_q=9, S_k=11)
FEATURE = pytest.mark.parametrize("case", EVERY_FEATURE, ids=str)
KERNELS = pytest.mark.parametrize("backend", ["triton", "eager"])


def call(
    case: Case, device: torch.device, backend: str = "triton"
) -> tuple[Callable, dict[str, Tensor], Tensor, Tensor]:
    """-> (a function of the case's tensors by name that returns (o, lse), those tensors, do, dlse)."""
    (q, k, v), do, dlse = inputs_of(case, device)
    options, _ = options_of(case, device)
    tensors = {"q": q, "k": k, "v": v, **{name: t for name, t in options.items() if isinstance(t, Tensor)}}
    values = {name: value for name, value in options.items() if name not in tensors}
    sequences = packed_of(case, device)

    def attend(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        if sequences is None:
            return fastattn.attention(**tensors, **values, return_lse=True, backend=backend)
        return sequences.attention(**tensors, **values, backend=backend)

    return attend, tensors, do, dlse


def wants_grad(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}


def results(attend: Callable, tensors: dict[str, Tensor], do: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    """o, lse and the gradient of every floating tensor; a loss on an lse of -inf has none."""
    leaves = wants_grad(tensors)
    o, lse = attend(**leaves)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad((o, lse), wanted.values(), (do, torch.where(lse.isfinite(), dlse, 0.0)))
    return {"o": o, "lse": lse, **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, t in actual.items():
        assert torch.equal(t.isnan(), expected[name].isnan()), name
        assert torch.equal(t.nan_to_num(), expected[name].nan_to_num()), name


# Bias


@pytest.mark.parametrize("axes", ["BHMN", "1HMN", "B11N", "BHM1"])
@KERNELS
def test_bias_is_the_only_input_that_needs_a_gradient(backend: str, axes: str, device):
    """PT#148476: the logsumexp was not kept, and the backward read through a null pointer."""
    (q, k, v), do, _ = inputs_of(case("", 17, 20, B=2, H=2, H_kv=1), device)
    bias = Score(axes).tensor(case("", 17, 20, B=2, H=2), device)

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        leaf = bias.to(dtype).requires_grad_()
        o = fastattn.attention(*(t.to(dtype) for t in (q, k, v)), bias=leaf, backend=backend)
        return torch.autograd.grad(o, leaf, do.to(dtype))[0]

    exact = gradient("reference", torch.float64)
    rounded = simulate_rounding(lambda: gradient("reference", F32))
    largest = (do.double() @ v.double().repeat_interleave(2, 1).mT).abs().max().item()
    assert_close(gradient(backend, F32), exact, rounded, "dbias", scale=largest)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "alibi_slopes", "sinks"])
def test_each_input_alone_gets_its_gradient(name: str, device):
    """PT#148476, LK#507: one input that needs a gradient makes the output need one, and gets the bits it would get."""
    attend, tensors, do, dlse = call(SMALL, device)
    expected = results(attend, tensors, do, dlse)[f"d{name}"]
    leaf = tensors[name].requires_grad_()
    o, lse = attend(**tensors)
    assert o.requires_grad
    assert lse.requires_grad
    (actual,) = torch.autograd.grad((o, lse), leaf, (do, torch.where(lse.isfinite(), dlse, 0.0)))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_bias_with_heads_innermost(dtype, device):
    """FA#342, FA#1219, FA#17: the bias of a pair representation is a view of (B, S_q, S_k, H), and is trained."""
    inputs = case("", 40, 50, H=2, H_kv=1, dtype=dtype, bias=Score("BHMN", layout="heads_innermost"))
    assert options_of(inputs, device)[0]["bias"].stride(1) == 1
    check("triton", *inputs_of(inputs, device), *options_of(inputs, device))


def test_gradient_of_an_attn_mask(device):
    """FA#17, PT#188302: torch's function, whose floating attn_mask alone is trained."""
    q, k, v, mask = make_inputs((2, 4, 17, 16), *[(2, 4, 20, 16)] * 2, (4, 1, 20), dtype=torch.float64, device=device)
    leaves = [mask.clone().requires_grad_() for _ in range(2)]
    functions = (fastattn.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention)
    for function, leaf in zip(functions, leaves, strict=True):
        function(q, k, v, leaf).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


# The gradient through lse


@FEATURE
def test_gradient_of_lse_is_not_dropped(case: Case, device):
    """FA#1817, FA#1137, FA#889: a z-loss reads lse alone, and its gradient came back as 0."""
    inputs, do, dlse = inputs_of(case, device)
    check("triton", inputs, torch.zeros_like(do), dlse, *options_of(case, device), packed_of(case, device))


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_z_loss(backend: str, device):
    """FA#1817: on a score that is known: one key, lse = q · k, so that dq = k and dk = q."""
    q, k, v = (t.requires_grad_() for t in make_inputs(*[(1, 1, 1, 16)] * 3, device=device))
    _, lse = fastattn.attention(q, k, v, scale=1.0, return_lse=True, backend=backend)
    dq, dk = torch.autograd.grad(lse.sum(), (q, k))
    torch.testing.assert_close(dq, k.detach())
    torch.testing.assert_close(dk, q.detach())


# Masks, rows that see nothing, and what hidden entries hold


@pytest.mark.parametrize("axes", ["B1MN", "1HMN"])
def test_any_bool_mask(axes: str, device):
    """FA#840, FA#1179: any mask, without a pattern to declare."""
    inputs = case("", 33, 20, B=2, H=2, H_kv=1, mask=Score(axes, fill="random_bool"))
    check("triton", *inputs_of(inputs, device), *options_of(inputs, device))


def no_keys_for_some(name: str, **options: Any) -> tuple[Case, Callable[[Tensor], Tensor]]:
    """A case, and which rows of its lse (B, H, S_q) see nothing."""
    return {
        "causal": (case(name, 50, 20, causal="bottom_right", **options), lambda lse: lse[:, :, :30]),
        "window": (case(name, 60, 20, window=(4, 0), causal="top_left", **options), lambda lse: lse[:, :, 24:]),
        "mask": (case(name, 40, 50, mask=Score("MN", fill="nothing"), **options), lambda lse: lse),
        "varlen": (packed(name, ((7, 9), (20, 0), (5, 5)), H=2, **options), lambda lse: lse[:, :, 7:27]),
        "left_over": (packed(name, ((7, 9), (20, 20)), H=2, left_over=13, **options), lambda lse: lse[:, :, 27:]),
    }[name]


@pytest.mark.parametrize("name", ["causal", "window", "mask", "varlen", "left_over"])
@KERNELS
def test_row_that_sees_nothing(backend: str, name: str, device):
    """PT#103963, PT#178251: o = 0, lse = -inf and gradients 0, where others give NaN or the mean of v."""
    unseeing, rows = no_keys_for_some(name)
    attend, tensors, do, dlse = call(unseeing, device, backend)
    actual = results(attend, tensors, do, dlse)
    assert rows(actual["lse"]).numel()
    assert (rows(actual["lse"]) == -math.inf).all()
    assert (rows(actual["o"]) == 0).all()
    assert (rows(actual["dq"]) == 0).all()
    assert all(t.isfinite().all() for name, t in actual.items() if name != "lse")


@pytest.mark.parametrize("name", ["causal", "window", "mask", "varlen"])
@KERNELS
def test_row_that_sees_its_sink_alone(backend: str, name: str, device):
    """FA#1895, PT#103963: o = 0 and lse = sink; the whole gradient of lse is the sink's."""
    unseeing, rows = no_keys_for_some(name, sinks=Score("H"))
    attend, tensors, _, _ = call(unseeing, device, backend)
    o, lse = attend(**tensors)
    assert (rows(o) == 0).all()
    sink = tensors["sinks"][:, None].expand_as(rows(lse))
    torch.testing.assert_close(rows(lse), sink, rtol=4 * torch.finfo(F32).eps, atol=0.0)
    check(backend, *inputs_of(unseeing, device), *options_of(unseeing, device), packed_of(unseeing, device))


def holes(S_q: int, S_k: int, queries: list[int], keys: list[int], device: torch.device) -> Tensor:
    """A mask that hides these rows and columns and half of the rest."""
    mask = Score("MN", fill="random_bool").tensor(case("", S_q, S_k), device)
    mask[queries], mask[:, keys] = False, False
    return mask


BEHIND = {  # name -> (S_q, S_k, options, queries that see nothing, keys that nobody sees)
    "window": (40, 20, {"window": (3, 0)}, [0, 16], []),
    "mask": (20, 33, {"mask": holes}, [0, 5, 19], [0, 16, 32]),
    "mask_causal": (33, 33, {"mask": holes, "causal": True}, [1, 5, 31], [0, 16, 25]),
}


@pytest.mark.parametrize("garbage", [math.nan, -math.inf], ids=str)
@pytest.mark.parametrize("name", BEHIND)
@KERNELS
def test_nothing_leaks_from_behind_a_mask(backend: str, name: str, garbage: float, device):
    """PT#103963: 0 · NaN is NaN; what nobody sees gives the bits that zeros give, with every gradient."""
    S_q, S_k, options, queries, keys = BEHIND[name]
    if "mask" in options:
        options = {**options, "mask": holes(S_q, S_k, queries, keys, device)}

    def attend(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.attention(**tensors, **options, return_lse=True, backend=backend)

    found = []
    for value in (0.0, garbage):
        (q, do), (k, v) = (make_inputs((1, 1, S, 16), (1, 1, S, 16), device=device, seed=S) for S in (S_q, S_k))
        (dlse,) = make_inputs((1, 1, S_q), device=device)
        q[:, :, queries], k[:, :, keys], v[:, :, keys] = value, value, value
        found.append(results(attend, {"q": q, "k": k, "v": v}, do, dlse))
    assert all(t.isfinite().all() for name, t in found[0].items() if name != "lse")
    assert_same_bits(found[1], found[0])


@KERNELS
def test_nothing_leaks_from_a_masked_bias(backend: str, device):
    """PT#103963: a NaN of the bias, behind the mask."""
    found = []
    for garbage in (0.0, math.nan):
        hidden = case("", 33, 20, H=1, bias=Score("1HMN"), mask=Score("MN", fill="random_bool"), causal="bottom_right")
        attend, tensors, do, dlse = call(hidden, device, backend)
        tensors["bias"].masked_fill_(~tensors["mask"], garbage)
        found.append(results(attend, tensors, do, dlse))
    assert_same_bits(found[1], found[0])


@KERNELS
def test_nothing_leaks_between_packed_sequences(backend: str, device):
    """PT#103963: a NaN in one sequence, in a sequence without queries, or after the last one, stays there."""
    inputs = packed("", ((17, 20), (0, 9), (20, 20), (7, 13)), H=1, causal="bottom_right", left_over=5)
    found = []
    for garbage in (0.0, math.nan):
        attend, tensors, do, dlse = call(inputs, device, backend)
        for name, hidden in (("q", slice(44, None)), ("k", slice(20, 29)), ("v", slice(20, 29))):
            tensors[name][:, :, hidden] = garbage
        found.append(results(attend, tensors, do, dlse))
    assert_same_bits(found[1], found[0])
    attend, tensors, do, dlse = call(inputs, device, backend)
    clean = results(attend, tensors, do, dlse)
    for name in ("q", "k", "v"):
        tensors[name][:, :, 0] = math.nan  # of the first sequence
    dirty = results(attend, tensors, do, dlse)
    for name in ("o", "lse", "dq"):
        assert torch.equal(dirty[name][:, :, 17:], clean[name][:, :, 17:]), name
    for name in ("dk", "dv"):
        assert torch.equal(dirty[name][:, :, 20:], clean[name][:, :, 20:]), name


# cuDNN's known failures


@pytest.mark.parametrize(
    "options",
    [{"mask": Score("MN", fill="random_bool")}, {"bias": Score("11MN")}, {"causal": True}],
    ids=["mask", "bias", "causal"],
)
@pytest.mark.parametrize(
    ("S", "dtype"), [(64, F16), (64, F32), pytest.param(192, F16, marks=pytest.mark.slow)], ids=str
)
def test_low_lse_at_a_length_of_64_modulo_128(options: dict[str, Any], S: int, dtype, device):
    """PT#196678: dq was NaN for L % 128 == 64 with a mask and LSE < -88.7, where exp(-lse) overflows."""
    inputs = case("", S, S, H=1, dtype=dtype, **options)
    (q, k, v), do, dlse = inputs_of(inputs, device)
    q, k = q.abs() + 5.0, -k.abs() - 5.0
    lse = fastattn.attention(q, k, v, **options_of(inputs, device)[0], return_lse=True, backend="triton")[1]
    assert lse[lse.isfinite()].max() < -88.7
    check("triton", [q, k, v], do, dlse, *options_of(inputs, device))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@KERNELS
def test_fp32_additive_mask_with_half_inputs(backend: str, dtype, device):
    """PT PR 191612: nn.Transformer's causal mask is fp32 whatever the module's dtype; its bits were read as halves."""
    inputs, do, dlse = inputs_of(case("", 40, 40, H=1, dtype=dtype), device)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(40, device=device)
    assert mask.dtype == torch.float32
    check(backend, inputs, do, dlse, {"bias": mask}, {"bias": mask})


def test_decoding_with_few_key_heads_and_padding_on_the_left(device):
    """PT#193893: cuDNN's answers drifted in batched generation with H_kv < 8; step by step equals the whole pass."""
    B, S, prompt = 2, 22, 20
    (q, k, v), _, _ = inputs_of(case("", S, S, B=B, H=4, H_kv=2, dtype=BF16, D=32), device)
    starts = torch.tensor([0, 11], device=device)
    padding = torch.arange(S, device=device) >= starts[:, None]  # (B, S)
    tensors = (q, k, v)

    def whole(dtype: torch.dtype) -> Tensor:
        mask = padding[:, None, None, :]
        return fastattn.attention(*(t.to(dtype) for t in tensors), causal=True, mask=mask, backend="reference")

    exact, rounded = whole(torch.float64), simulate_rounding(lambda: whole(BF16))
    for n in range(prompt, S):
        step = fastattn.attention(
            q[:, :, n : n + 1], k[:, :, : n + 1], v[:, :, : n + 1], causal="bottom_right",
            mask=padding[:, None, None, : n + 1], backend="triton",
        )  # fmt: skip
        assert_close(step, exact[:, :, n : n + 1], rounded[..., n : n + 1, :], f"step {n}")


# Alignment of the diagonal


@pytest.mark.parametrize(("S_q", "S_k"), [(17, 40), (40, 17)])
@KERNELS
def test_alignment_of_the_causal_diagonal(backend: str, S_q: int, S_k: int, device):
    """PT#108108, PT#144858: torch aligns top-left, FlashAttention bottom-right; here each has its name."""
    q, k, v = make_inputs((1, 1, S_q, 16), *[(1, 1, S_k, 16)] * 2, device=device)
    corner = torch.ones(S_q, S_k, dtype=torch.bool, device=device)
    for alignment, mask in (("top_left", corner.tril()), ("bottom_right", corner.tril(S_k - S_q))):
        expected = fastattn.attention(q, k, v, mask=mask, backend="reference")
        actual = fastattn.attention(q, k, v, causal=alignment, backend=backend)
        torch.testing.assert_close(actual, expected)
    with pytest.raises(fastattn.errors.ArgumentError, match="ambiguous"):
        fastattn.attention(q, k, v, causal=True, backend=backend)
    o = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(o, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_one_query_of_a_cache_sees_every_key(device):
    """PT#144858: aligned top-left, the one query of a decoding step would see the first key alone."""
    q, k, v = make_inputs((1, 2, 1, 16), *[(1, 2, 33, 16)] * 2, device=device)
    o = fastattn.attention(q, k, v, causal="bottom_right", backend="triton")
    assert torch.equal(o, fastattn.attention(q, k, v, backend="triton"))


# Sinks


@KERNELS
def test_sinks_in_training(backend: str, device):
    """FA#1895, FA#2752: trained as one more column of the logits, written out here without this library."""
    (q, k, v), do, _ = inputs_of(case("", 17, 20, H=2, H_kv=1), device)
    sinks = Score("H").tensor(case("", H=2), device)

    def softmax_with_column(q, k, v, sinks):
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        logits = q @ k.mT * 16**-0.5
        column = sinks[:, None, None].expand(1, 2, 17, 1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ v

    def tested(q, k, v, sinks):
        return fastattn.attention(q, k, v, sinks=sinks, backend=backend)

    def run(function, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v, sinks)]
        o = function(*leaves)
        return o, *torch.autograd.grad(o, leaves, do.to(dtype))

    exact = run(softmax_with_column, torch.float64)
    rounded = simulate_rounding(lambda: run(softmax_with_column, F32))
    largest = max(t.abs().max().item() for t in exact)
    for name, *results in zip(("o", "dq", "dk", "dv", "dsinks"), run(tested, F32), exact, rounded, strict=True):
        assert_close(*results, name, scale=largest)


# Repeatability


@FEATURE
def test_two_runs_have_the_same_bits(case: Case, device):
    """FA#2244: no atomics; every sum of the backward has one order."""
    attend, tensors, do, dlse = call(case, device)
    assert_same_bits(results(attend, tensors, do, dlse), results(attend, tensors, do, dlse))


@pytest.mark.parametrize("case", [case for case in EVERY_FEATURE if case.lengths is None], ids=str)
def test_a_batch_of_one_has_the_same_bits(case: Case, device):
    """FA#1897: an element's result does not depend on what it is batched with (dropout is keyed by its place)."""
    b = slice(0, 1) if case.options.get("dropout_p") else slice(1, 2)
    attend, tensors, do, dlse = call(case, device)
    whole = results(attend, tensors, do, dlse)

    def alone(name: str, t: Tensor) -> Tensor:
        per_batch = name not in ("sinks", "alibi_slopes") or t.dim() == 2
        return t[b] if per_batch and t.shape[0] == case.B else t

    one = results(attend, {name: alone(name, t) for name, t in tensors.items()}, do[b], dlse[b])
    for name, t in tensors.items():
        if alone(name, t) is t:  # its gradient is summed over the batch
            one.pop(f"d{name}", None)
    assert_same_bits(one, {name: t[b] for name, t in whole.items()})


@pytest.mark.parametrize("options", [{"causal": "bottom_right"}, {"window": (9, 2), "softcap": 2.0}], ids=str)
def test_a_packed_sequence_alone_has_the_same_bits(options, device):
    """FA#1897: nor on the sequences before and after it."""
    lengths = ((20, 31), (33, 40), (7, 5))
    attend, tensors, do, dlse = call(packed("", lengths, H=1, **options), device)
    whole = results(attend, tensors, do, dlse)
    attend, _, _, _ = call(packed("", lengths[1:2], H=1, **options), device)
    rows, keys = slice(20, 53), slice(31, 71)
    places = {"q": rows, "k": keys, "v": keys}
    one = results(attend, {n: t[:, :, places[n]] for n, t in tensors.items()}, do[:, :, rows], dlse[:, :, rows])
    assert_same_bits(one, {n: t[:, :, places.get(n[-1], rows)] for n, t in whole.items()})


# Precision and size


@pytest.mark.parametrize(("D", "dtype"), [(288, F16), (512, F32)], ids=str)
def test_head_dimension_beyond_256(D: int, dtype, device):
    """FA#801, FA#2456 and, in fp32, FA#13, FA#882: with gradients."""
    wide = case("", 20, 33, H=1, D=D, dtype=dtype, causal="bottom_right", dropout_p=0.1)
    check("triton", *inputs_of(wide, device), *options_of(wide, device))


def far_apart(t: Tensor, dim: int, stride: int) -> Tensor:
    """The same values with `stride` elements between neighbours in `dim`: reserved memory, not touched in between."""
    shape, strides = list(t.shape), list(t.contiguous().stride())
    strides[dim] = stride
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    far = torch.empty(last + 1, dtype=t.dtype, device=t.device).as_strided(shape, strides)
    return far.copy_(t)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("name", ["q", "bias", "mask"])
def test_offsets_beyond_32_bits(name: str, dim: int, device):
    """FA#767, PT#162588: element offsets pass 2^31, in the inputs and in what acts on the scores."""
    features = {"bias": Score("BHMN", dtype=F16), "mask": Score("BHMN", fill="random_bool")}
    chosen = {name: features[name]} if name in features else {}
    sizes = {"B": 2, "H": 1} if dim == 0 else {"B": 1, "H": 2} if dim == 1 else {"B": 1, "H": 1}
    attend, tensors, do, dlse = call(case("", 2, 2, dtype=F16, **sizes, **chosen), device)
    places = ("q", "k", "v") if name == "q" else (name,)
    far = {name: far_apart(t, dim, 2**31 + 8) if name in places else t for name, t in tensors.items()}
    assert_same_bits(results(attend, far, do, dlse), results(attend, tensors, do, dlse))


def fenced(t: Tensor, at_end: bool) -> Tensor:
    """The same values, after and before a page that may not be read: one entry beyond them ends the process."""
    size = t.numel() * t.element_size()
    pages = max(1, math.ceil(size / mmap.PAGESIZE))
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    offset = (pages + 1) * mmap.PAGESIZE - size if at_end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=t.dtype, offset=offset, count=t.numel()).view(t.shape).copy_(t)
    first = copy.data_ptr() - offset
    for fence in (first, first + (pages + 1) * mmap.PAGESIZE):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, 0) == 0
    return copy


def run_fenced() -> None:
    """What the next test runs in a process of its own."""
    for name in ("bias", "everything", "varlen_everything"):
        for at_end in (True, False):
            print(name, "at the end" if at_end else "at the start", flush=True)
            attend, tensors, do, dlse = call(NAMED[name], torch.device("cpu"))
            given = {name: fenced(t, at_end) for name, t in tensors.items()}
            results(attend, given, fenced(do, at_end), fenced(dlse, at_end))
    print("done")


@pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux", reason="it fences memory of the CPU, by mprotect"
)
def test_nothing_is_read_beyond_an_input():
    """PT#193728: a value longer than the key made the kernel read past the end of the key's memory."""
    done = subprocess.run(
        [sys.executable, "-c", "import test_peers; test_peers.run_fenced()"],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    steps = done.stdout.splitlines()
    assert steps[-1:] == ["done"], f"ended by {done.returncode} in {steps}: {done.stderr[-2000:]}"


# Tiles that a mask hides


def test_hidden_tiles_are_visited_by_none(device):
    """FA#840, FA#1179: of a mask of blocks, the kernels visit the tiles that it shows, and mask those shown in part."""
    (q, k, v), _, _ = inputs_of(case("", 64, 64, H=1), device)
    mask = torch.zeros(64, 64, dtype=torch.bool, device=device)
    mask[:32, 16:32] = True  # as a whole
    mask[:32, 48:50] = True  # in part
    mask[40, 5] = True
    spec = spec_of(q, k, v, mask=mask)
    inputs = AttentionInputs(q, k, v, mask=mask[None, None])
    n_across = 4
    tiles = mask_tiles(inputs, spec, TileConfig(32, 16, num_warps=4, num_stages=1))["TILES"]
    n_partial, n_whole = tiles[:, 0].tolist(), tiles[:, 1].tolist()
    assert (n_partial, n_whole) == ([1, 1], [1, 0])
    assert tiles[:, 2].tolist() == [3, 0]
    assert tiles[0, 2 + n_across - 1].item() == 1


# What is given stays as it was given


@pytest.mark.parametrize("case", [NAMED[n] for n in ("plain", "mask", "everything", "varlen_everything")], ids=str)
def test_inputs_are_not_written_to(case: Case, device):
    """LK#272, LK#343: neither forward nor backward may write to an input, a mask or an incoming gradient."""
    attend, tensors, do, dlse = call(case, device)
    given = {**tensors, "do": do, "dlse": dlse}
    before = {name: (t._version, t.clone()) for name, t in given.items()}
    results(attend, tensors, do, dlse)
    for name, t in given.items():
        version, value = before[name]
        assert t._version == version, name
        assert torch.equal(t, value), name


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask", "alibi_slopes", "sinks", "o"])
def test_saved_tensor_changed_in_place(name: str, device):
    """LK#272: what the backward reads and the caller changed meanwhile is torch's error, never a wrong gradient."""
    attend, tensors, _, _ = call(SMALL, device)
    leaves = {name: t * 1.0 if t.is_floating_point() else t.clone() for name, t in wants_grad(tensors).items()}
    o, _ = attend(**leaves)
    with torch.no_grad():
        {**leaves, "o": o}[name].logical_not_() if name == "mask" else {**leaves, "o": o}[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize("side", ["q", "k"])
def test_cu_seqlens_changed_in_place(side: str, device):
    """LK#272: the bounds of packed sequences are read by the backward too."""
    q, k, v = (t.requires_grad_() for t in make_inputs(*[(20, 2, 16)] * 3, device=device))
    bounds = {side: torch.tensor([0, 13, 20], dtype=torch.int32, device=device) for side in "qk"}
    o = fastattn.varlen_attention(q, k, v, bounds["q"], bounds["k"], 13, 13, backend="triton")
    bounds[side][1] = 7
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


# Nothing to attend to, and nothing that attends


EMPTY = [
    case("no_batch", 5, 7, B=0),
    case("no_queries", 0, 7, B=2),
    case("no_keys", 7, 0, B=2),
    case("neither", 0, 0, B=2),
    case("no_keys_with_everything", 7, 0, B=2, softcap=2.0, dropout_p=0.2, causal="bottom_right", window=(3, None),
         bias=Score("1HMN"), mask=Score("B1MN", fill="random_bool"), alibi_slopes=Score("BH")),
    case("no_queries_with_bias_by_key", 0, 7, B=2, bias=Score("B11N"), sinks=Score("H")),
    packed("no_sequences", ()),
    packed("only_empty_sequences", ((0, 0), (0, 0)), sinks=Score("H")),
    packed("empty_among_others", ((0, 5), (7, 0), (0, 0), (3, 4)), mask=Score("11MN", fill="random_bool")),
    packed("one_row_and_none", ((0, 0), (1, 3), (0, 0), (1, 5)), causal="bottom_right"),
]  # fmt: skip


@pytest.mark.parametrize("case", EMPTY, ids=str)
@KERNELS
def test_empty(backend: str, case: Case, device):
    """PT#174939 (crash), PT PR 147010, FA#2568 (sequences of length 0), FA#1537 (with max_seqlen_q = 1)."""
    attend, tensors, do, dlse = call(case, device, backend)
    actual = results(attend, tensors, do, dlse)
    expected = results(call(case, device, "reference")[0], tensors, do, dlse)
    for name, t in actual.items():
        torch.testing.assert_close(t, expected[name], rtol=1e-5, atol=1e-5, msg=name)


# Compilation


def compiled_lengths(longest: Callable[[tuple[int, ...]], Any], device: torch.device, **options: Any) -> list[int]:
    """How many graphs there are after each call of a compiled varlen_attention on ever other sequences."""
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]

    def function(q, k, v, cu_seqlens, longest):
        return fastattn.varlen_attention(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True, backend="triton", **options
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    counts = []
    for lengths in ((13, 7), (9, 2), (5, 19)):
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        leaves = [t.requires_grad_() for t in make_inputs(*[(sum(lengths), 1, 16)] * 3, device=device)]
        o = compiled(*leaves, cu_seqlens, longest(lengths))
        expected = function(*leaves, cu_seqlens, longest(lengths))
        assert torch.equal(o, expected)
        grads = [torch.autograd.grad(t.square().sum(), leaves) for t in (o, expected)]
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
        counts.append(stats["unique_graphs"] - before)
    return counts


@pytest.mark.parametrize(
    "longest", [max, lambda lengths: torch.tensor(max(lengths))], ids=["max_seqlen_int", "max_seqlen_tensor"]
)
def test_no_recompilation_when_lengths_change(longest: Callable, device):
    """HF#41803, FA#2635, FA#2571: after the second call, which shows that sizes vary, nothing is compiled again."""
    counts = compiled_lengths(longest, device)
    assert counts[0] == 1
    assert counts[1] <= 2
    assert counts[1:] == counts[1:2] * 2


def test_no_recompilation_when_max_seqlen_alone_changes(device):
    """HF#41803: with T fixed and max_seqlen a tensor, not even the second call compiles."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(q, cu_seqlens, longest):
        return fastattn.varlen_attention(q, q, q, cu_seqlens, cu_seqlens, longest, longest, backend="triton")

    (q,) = make_inputs((40, 1, 16), device=device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((33, 7), (20, 20), (1, 39)):
            cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
            function(q, cu_seqlens, torch.tensor(max(lengths)))


def test_compiled_dropout_is_that_of_its_own_forward(device):
    """PT#190717: a backward that draws anew drops other entries than the forward did. Here p = o and dv = pᵀ."""
    q = torch.zeros(1, 2, 32, 16, device=device)
    v = torch.eye(32, device=device).expand(1, 2, 32, 32).contiguous().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    def function(q, v):
        return fastattn.attention(q, q, v, dropout_p=0.5, backend="triton")

    o = function(q, v)
    (dv,) = torch.autograd.grad(o, v, torch.eye(32, device=device).expand(1, 2, 32, 32))
    assert 0.4 < (o > 0).float().mean().item() < 0.6
    assert torch.equal(dv, o.mT)


# Dropout


def test_dropout_follows_the_seed(device):
    """FA#1377: torch.manual_seed repeats it; without a new seed, the next call drops other entries."""
    q, k, v = make_inputs(*[(1, 1, 20, 16)] * 3, device=device)
    found = []
    for seed in (5, None, 5):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(fastattn.attention(q, k, v, dropout_p=0.3, backend="triton"))
    assert torch.equal(found[2], found[0])
    assert not torch.equal(found[1], found[0])


@pytest.mark.parametrize("name", ["dropout", "varlen_everything"])
@KERNELS
def test_dropout_is_the_same_in_every_backend(backend: str, name: str, device):
    """FA#1377: the same entries are dropped, forward and backward, so that results differ by rounding alone."""
    check(backend, *inputs_of(NAMED[name], device), *options_of(NAMED[name], device), packed_of(NAMED[name], device))


TILES = [(16, 16), (64, 16), (16, 64)]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_dropout_does_not_depend_on_the_tiles(tile: tuple[int, int], monkeypatch, device):
    """FA#1377: entries are dropped by their row and column, not by their place in a tile. Here p = o and dv = pᵀ."""
    q = torch.zeros(1, 1, 40, 16, device=device)
    v = torch.eye(50, device=device).expand(1, 1, 50, 50).contiguous()
    k = torch.zeros(1, 1, 50, 16, device=device)
    do = torch.eye(40, 50, device=device).expand(1, 1, 40, 50)

    def kept() -> tuple[Tensor, Tensor]:
        leaf = v.clone().requires_grad_()
        torch.manual_seed(5)
        o = fastattn.attention(q, k, leaf, dropout_p=0.4, backend="triton")
        return o > 0, torch.autograd.grad(o, leaf, do)[0] > 0

    expected = kept()
    cfg = TileConfig(*tile, num_warps=4, num_stages=1)
    every = BackwardConfig(**{field.name: cfg for field in fields(BackwardConfig)})
    monkeypatch.setattr(attention_fwd, "forward_config", lambda *args: cfg)
    monkeypatch.setattr(attention_bwd, "backward_config", lambda *args: every)
    actual = kept()
    assert 0.5 < expected[0].float().mean().item() < 0.7
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(expected[1][..., :40, :40], expected[0][..., :40, :40].mT)


@pytest.mark.parametrize("options", [{}, {"causal": True, "H": 2, "H_kv": 1}, {"bias": Score("1HMN")}], ids=str)
@KERNELS
def test_softcap_together_with_dropout(backend: str, options, device):
    """FA#1377: FlashAttention-2 refuses the pair."""
    pair = case("", 33, 33, **{"H": 1, **options}, softcap=1.5, dropout_p=0.25)
    check(backend, *inputs_of(pair, device), *options_of(pair, device))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_recomputation_repeats_the_dropout(use_reentrant: bool, device):
    """PT#190717: the forward that activation checkpointing runs again draws the seed of the first."""
    (q, k, v), do, _ = inputs_of(case("", 9, 20, H=1), device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, dropout_p=0.3, backend="triton")

    def recomputed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attend, q, k, v, use_reentrant=use_reentrant)

    found = []
    for function in (attend, recomputed):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        torch.manual_seed(5)
        o = function(*leaves)
        torch.rand(3)  # the generator moves on before the backward
        o.backward(do)
        found.append([o, *(t.grad for t in leaves)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# Inputs that share memory


@pytest.mark.parametrize("which", ["k_is_v", "q_is_k", "all"])
def test_one_tensor_in_several_places(which: str, device):
    """FA#1219: as in attention over a shared latent; its gradient is the sum of those of its places."""
    (x, y, _), do, _ = inputs_of(case("", 40, 40, H=1), device)

    def gradients(backend: str, dtype: torch.dtype) -> list[Tensor]:
        a, b = (t.to(dtype).requires_grad_() for t in (x, y))
        q, k, v = {"k_is_v": (b, a, a), "q_is_k": (a, a, b), "all": (a, a, a)}[which]
        o = fastattn.attention(q, k, v, causal=True, backend=backend)
        leaves = (a,) if which == "all" else (a, b)
        return [o, *torch.autograd.grad(o, leaves, do.to(dtype))]

    exact = gradients("reference", torch.float64)
    rounded = simulate_rounding(lambda: gradients("reference", F32))
    largest = (do.double() @ x.double().mT).abs().max().item()
    for results in zip(gradients("triton", F32), exact, rounded, strict=True):
        assert_close(*results, scale=largest)


def expanded(S_q: int, S_k: int, device: torch.device) -> dict[str, Tensor]:
    """q over the batch, k over heads, v over both, bias over rows: all of stride 0."""
    q, k, v, bias = make_inputs((1, 2, S_q, 16), (2, 1, S_k, 16), (1, 1, S_k, 16), (1, 2, 1, S_k), device=device)
    return {
        "q": q.expand(2, 2, S_q, 16), "k": k.expand(2, 2, S_k, 16), "v": v.expand(2, 2, S_k, 16),
        "bias": bias.expand(2, 2, S_q, S_k),
    }  # fmt: skip


@pytest.mark.parametrize("S_k", [32, 33])
def test_expanded_inputs(S_k: int, device):
    """PT#191937: k and v of stride 0 gave wrong results where S_k % 32 == 1; gradients have the expanded shape."""
    tensors = expanded(20, S_k, device)
    assert all(0 in t.stride() for t in tensors.values())
    do, dlse = (torch.ones((), device=device).expand(shape) for shape in ((2, 2, 20, 16), (2, 2, 20)))

    def attend(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.attention(**tensors, causal="bottom_right", return_lse=True, backend="triton")

    compact = {name: t.contiguous() for name, t in tensors.items()}
    assert_same_bits(results(attend, tensors, do, dlse), results(attend, compact, do.contiguous(), dlse.contiguous()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_that_lies_otherwise_than_the_output(layout: str, device):
    """PT#133671: a backward that took do to lie as o does."""
    (q, k, v), do, _ = inputs_of(case("", 33, 20, layout="heads_inside"), device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    (other,) = make_inputs(do.shape, device=device, layout=layout)
    other.copy_(do)
    o = fastattn.attention(*leaves, backend="triton")
    actual, expected = (torch.autograd.grad(o, leaves, grad, retain_graph=True) for grad in (other, do.contiguous()))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


# Derivatives of derivatives


@pytest.mark.parametrize("name", ["everything", "varlen_everything"])
def test_double_backward_is_not_silently_wrong(name: str, device):
    """PT#116350: the gradient of a gradient penalty, which FlashAttention leaves out without a word."""
    found = []
    for backend, dtype in (("reference", torch.float64), ("triton", F32)):
        attend, tensors, do, _ = call(NAMED[name], device, backend)
        leaves = {n: t.to(dtype) if t.is_floating_point() else t for n, t in wants_grad(tensors).items()}
        wanted = [t for t in leaves.values() if t.requires_grad]
        o, _ = attend(**leaves)
        grads = torch.autograd.grad(o, wanted, do.to(dtype), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads[:3]), wanted, materialize_grads=True))
    for exact, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
