"""Peers that are not installed: their layouts and conventions, on stand-ins of their signatures, which use torch.

Signatures: flash-attention 2, 3 and 4 (flash_attn_func and its varlen form), Liger's transformers.functional, quack,
xformers.ops, transformer_engine.pytorch. What only the packages can show, their kernels, is not shown here.
"""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gate
from benchmarks.families import workloads
from benchmarks.problems.attention import AttentionProblem, VarlenProblem
from benchmarks.problems.rows import (
    CrossEntropyProblem,
    GatedProblem,
    LinearCrossEntropyProblem,
    NormProblem,
    SoftmaxProblem,
)
from benchmarks.provider import discover
from benchmarks.workload import Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ATTENTION = {
    "full": AttentionProblem(2, 4, 24, 24, 16),
    "causal": AttentionProblem(2, 4, 24, 24, 16, causal=True),
    "causal, more keys": AttentionProblem(2, 4, 9, 24, 16, causal=True),
    "grouped heads": AttentionProblem(2, 4, 24, 24, 16, causal=True, H_kv=2),
    "window": AttentionProblem(2, 4, 24, 24, 16, causal=True, window=5),
    "left window": AttentionProblem(2, 4, 24, 24, 16, window=5),
    "softcap": AttentionProblem(2, 4, 24, 24, 16, causal=True, softcap=2.0),
    "bias": AttentionProblem(2, 4, 24, 24, 16, bias=True),
    "documents": AttentionProblem(1, 4, 24, 24, 16, documents=(5, 19)),
    "packed": VarlenProblem((5, 12, 1), 2, 16),
    "packed, causal": VarlenProblem((5, 12, 1), 2, 16, causal=True),
}
ROWS = {
    "layer_norm": NormProblem("layer_norm", 20, 24),
    "rms_norm": NormProblem("rms_norm", 20, 24),
    "rms_norm + residual": NormProblem("rms_norm", 20, 24, residual=True),
    "softmax": SoftmaxProblem(20, 24),
    "softmax causal": SoftmaxProblem(48, 24, causal=True),
    "cross_entropy": CrossEntropyProblem(20, 30),
    "linear_cross_entropy": LinearCrossEntropyProblem(20, 16, 30),
    "swiglu": GatedProblem("swiglu", 20, 24),
    "geglu": GatedProblem("geglu", 20, 24),
}
PROBLEMS = ATTENTION | ROWS
FLASH = {"full", "causal", "causal, more keys", "grouped heads", "window", "left window", "softcap"}
FLASH |= {"packed", "packed, causal"}
COMPUTES = {  # provider -> what it must compute; everything else of its ops it must refuse
    "flash_attn/2": FLASH,
    "flash_attn/3": FLASH,
    "flash_attn/4": FLASH,
    "torch/varlen": {"packed", "packed, causal"},
    "xformers": {"full", "causal", "causal, more keys", "bias", "packed", "packed, causal"},
    "transformer_engine": FLASH - {"softcap", "packed", "packed, causal"} | {"layer_norm", "rms_norm"},
    "liger": {"layer_norm", "rms_norm", "softmax", "cross_entropy", "linear_cross_entropy", "swiglu"},
    "quack": {"rms_norm", "rms_norm + residual", "softmax", "cross_entropy"},
}


# ---- stand-ins


def attend(q, k, v, scale, causal, window=(-1, -1), softcap=0.0, bias=None):
    """flash-attention's definition, over (B, S, H, D): bottom-right, a window on both sides, -1 or None for none."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = q @ k.transpose(-2, -1) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    i, j = (torch.arange(n) for n in s.shape[-2:])
    diagonal = i[:, None] + s.shape[-1] - s.shape[-2]
    left, right = window
    right = 0 if causal else right
    seen = torch.ones(s.shape[-2:], dtype=torch.bool)
    if left is not None and left >= 0:
        seen = seen & (j >= diagonal - left)
    if right is not None and right >= 0:
        seen = seen & (j <= diagonal + right)
    return (s.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def packed(q, k, v, cu_seqlens, scale, causal):
    bounds = cu_seqlens.tolist()
    parts = [attend(*(t[None, a:b] for t in (q, k, v)), scale, causal)[0] for a, b in pairwise(bounds)]
    return torch.cat(parts)


def flash_2():
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert window_size[0] is not None
        return attend(q, k, v, softmax_scale, causal, window_size, softcap)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):  # fmt: skip
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        return packed(q, k, v, cu_seqlens_q, softmax_scale, causal)

    return {"flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}}


def flash_3():
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return attend(q, k, v, softmax_scale, causal, window_size, softcap)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, **rest,
    ):  # fmt: skip
        return packed(q, k, v, cu_seqlens_q, softmax_scale, causal)

    given = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    return {"flash_attn_interface": given}


def flash_4():
    """It returns the LSE too, and has None where the others have -1."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, **rest
    ):
        assert -1 not in window_size
        return attend(q, k, v, softmax_scale, causal, window_size, softcap), torch.empty(0)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, **rest,
    ):  # fmt: skip
        return packed(q, k, v, cu_seqlens_q, softmax_scale, causal), torch.empty(0)

    return {
        "flash_attn": {},
        "flash_attn.cute": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
    }


def torch_varlen():
    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        **rest,
    ):
        assert max_q == max_k == cu_seq_q.diff().max()
        assert window_size in ((-1, -1), (-1, 0))
        return packed(query, key, value, cu_seq_q, scale, window_size == (-1, 0))

    return {"torch.nn.attention.varlen": {"varlen_attn": varlen_attn}}


def xformers():
    class LowerTriangularFromBottomRightMask:
        pass

    class BlockDiagonalMask:
        def __init__(self, lengths, causal=False):
            self.lengths, self.causal = lengths, causal

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None):
            return cls(q_seqlen)

        def make_causal(self):
            return BlockDiagonalMask(self.lengths, True)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        if isinstance(attn_bias, BlockDiagonalMask):
            cu_seqlens = torch.tensor([0, *torch.tensor(attn_bias.lengths).cumsum(0)])
            return packed(query[0], key[0], value[0], cu_seqlens, scale, attn_bias.causal)[None]
        if isinstance(attn_bias, torch.Tensor):
            assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])  # no broadcast
            return attend(query, key, value, scale, False, bias=attn_bias)
        return attend(query, key, value, scale, attn_bias is not None)

    masks = {m.__name__: m for m in (LowerTriangularFromBottomRightMask, BlockDiagonalMask)}
    return {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": masks,
    }


def transformer_engine():
    class DotProductAttention(torch.nn.Module):
        def __init__(
            self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.1, qkv_format="sbhd",
            attn_mask_type="causal", window_size=None, softmax_scale=None,
        ):  # fmt: skip
            super().__init__()
            assert qkv_format == "bshd"
            assert attention_dropout == 0.0
            self.causal, self.window = attn_mask_type == "causal_bottom_right", window_size or (-1, -1)
            self.scale = softmax_scale

        def forward(self, q, k, v):
            return attend(q, k, v, self.scale, self.causal, self.window).flatten(2)

    class LayerNorm(torch.nn.LayerNorm):
        def __init__(self, normalized_shape, eps=1e-5, device=None, dtype=None):
            super().__init__(normalized_shape, eps, device=device, dtype=dtype)

    class RMSNorm(torch.nn.RMSNorm):
        def __init__(self, normalized_shape, eps=1e-5, device=None, dtype=None):
            super().__init__(normalized_shape, eps, device=device, dtype=dtype)

    given = {"DotProductAttention": DotProductAttention, "LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
    return {"transformer_engine": {}, "transformer_engine.pytorch": given}


class OverwritingCrossEntropy(torch.autograd.Function):
    """As Liger's: the gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx, logits, target):
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            loss = F.cross_entropy(leaf, target)
        logits.detach().copy_(torch.autograd.grad(loss, leaf)[0])
        ctx.save_for_backward(logits.detach())
        return loss.detach()

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0] * dy, None


def liger():
    def liger_cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, **rest):  # noqa: A002
        return OverwritingCrossEntropy.apply(input, target)

    def liger_fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None, **rest):  # noqa: A002
        return F.cross_entropy(input @ weight.T, target)

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert not in_place
        return F.rms_norm(X, (X.shape[-1],), W, eps)

    def liger_layer_norm(X, W, B, eps):
        return F.layer_norm(X, (X.shape[-1],), W, B, eps)

    def liger_softmax(x):
        return torch.softmax(x, -1)

    def liger_swiglu(a, b):
        return F.silu(a) * b

    functions = [f for name, f in locals().items() if name.startswith("liger_")]
    return {
        "liger_kernel": {},
        "liger_kernel.transformers": {},
        "liger_kernel.transformers.functional": {f.__name__: f for f in functions},
    }


def quack():
    def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False):
        h = x if residual is None else x + residual
        y = F.rms_norm(h, (x.shape[-1],), weight, eps)
        return (y, h) if prenorm else y

    def cross_entropy(x, target, ignore_index=-100, reduction="mean", inplace_backward=False):
        return F.cross_entropy(x, target, ignore_index=ignore_index, reduction=reduction)

    return {
        "quack": {},
        "quack.rmsnorm": {"rmsnorm": rmsnorm},
        "quack.softmax": {"softmax": lambda x: torch.softmax(x, -1)},
        "quack.cross_entropy": {"cross_entropy": cross_entropy},
    }


STAND_INS = {
    "flash_attn/2": flash_2, "flash_attn/3": flash_3, "flash_attn/4": flash_4, "torch/varlen": torch_varlen,
    "xformers": xformers, "transformer_engine": transformer_engine, "liger": liger, "quack": quack,
}  # fmt: skip


@pytest.fixture
def install(monkeypatch):
    """Puts the stand-in of a provider where `import` finds it, on what looks like a Hopper card."""

    def put(name: str):
        for module_name, names in STAND_INS[name]().items():
            module = types.ModuleType(module_name)
            module.__path__ = []
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, module_name, module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        (provider,) = (p for p in discover() if p.name == name)
        return provider

    return put


def pairs(computed: bool) -> list:
    found = []
    by_name = {p.name: p for p in discover()}
    for name, can in COMPUTES.items():
        for key, problem in PROBLEMS.items():
            if problem.op in by_name[name].ops and (key in can) == computed:
                found.append(pytest.param(name, key, id=f"{name}-{key}"))
    return found


def workload(problem, direction, dtype=torch.bfloat16) -> Workload:
    return Workload("f", "n", problem, dtype, direction, "s", 1)


@pytest.mark.parametrize(("name", "key"), pairs(True))
def test_what_is_handed_over_is_what_the_problem_says(install, name, key):
    """Twice, as a benchmark runs it again and again: what a peer writes over must not matter."""
    provider, problem = install(name), PROBLEMS[key]
    assert provider.available(CUDA) is None
    directions = ("forward", "step") if problem.op.endswith("cross_entropy") else ("forward", "backward")
    for direction in directions:
        asked = workload(problem, direction)
        assert provider.limits(asked, CUDA) is None
        asked = replace(asked, dtype=torch.float32)
        inputs = problem.inputs(torch.float32, CPU)
        dy = gate.gradient_of_result(asked, inputs)
        truth = gate.truth_of(asked, inputs, dy)
        call = provider.make(asked, inputs)
        for _ in range(2):
            assert gate.check(truth, call, dy).wrong is None
    assert all(torch.equal(t, inputs[n]) for n, t in problem.inputs(torch.float32, CPU).items())  # left as they were


@pytest.mark.parametrize(("name", "key"), pairs(False))
def test_what_a_peer_does_not_compute_is_refused_by_a_sentence(install, name, key):
    why = install(name).limits(workload(PROBLEMS[key], "backward"), CUDA)
    assert why is not None
    assert len(why.split()) > 3


@pytest.mark.parametrize("name", STAND_INS)
def test_a_stand_in_that_is_wrong_is_found(install, monkeypatch, name):
    """Three percent off: the checks above can fail."""
    provider = install(name)
    key = next(key for key in PROBLEMS if key in COMPUTES[name])
    asked = replace(workload(PROBLEMS[key], "forward"), dtype=torch.float32)
    inputs = asked.problem.inputs(torch.float32, CPU)
    call = provider.make(asked, inputs)
    function = call.function
    wrong = replace(call, function=lambda **given: 1.03 * function(**given))
    truth = gate.truth_of(asked, inputs, None)
    assert gate.check(truth, call, None).wrong is None
    assert gate.check(truth, wrong, None).wrong is not None


@pytest.mark.parametrize("name", STAND_INS)
def test_who_is_not_installed_says_so(name, monkeypatch):
    for module in STAND_INS[name]():
        monkeypatch.setitem(sys.modules, module, None)
    (provider,) = (p for p in discover() if p.name == name)
    why = provider.available(CPU)
    assert why is not None
    assert why.startswith("`import ")


@pytest.mark.parametrize("name", STAND_INS)
def test_nothing_is_for_cpus(install, name):
    provider = install(name)
    for w in workloads(CPU):
        if w.problem.op in provider.ops:
            assert provider.limits(w, CPU) is not None


@pytest.mark.parametrize("key", ["packed", "packed, causal"])
def test_flex_sees_packed_sequences_apart(key):
    (provider,) = (p for p in discover() if p.name == "torch/flex")
    asked = replace(workload(PROBLEMS[key], "forward"), dtype=torch.float32)
    inputs = asked.problem.inputs(torch.float32, CPU)
    assert provider.limits(asked, CPU) is None
    truth = gate.truth_of(asked, inputs, None)
    call = provider.make(asked, inputs)
    assert gate.check(truth, call, None).wrong is None
    alone = provider.make(replace(asked, problem=replace(asked.problem, lengths=(18,))), inputs)
    assert gate.check(truth, alone, None).wrong is not None


def test_names_are_unique():
    names = [p.name for p in discover()]
    assert len(set(names)) == len(names)
    assert set(STAND_INS) <= set(names)


def test_a_compiler_is_asked_for_all_that_a_program_needs(monkeypatch):
    """It would not write the sum of a residual that nobody reads."""
    functions = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: functions.append(function) or function)
    problem = NormProblem("rms_norm", 4, 8, residual=True)
    inputs = problem.inputs(torch.float32, CPU)
    (provider,) = (p for p in discover() if p.name == "torch/compile")
    call = provider.ops["rms_norm"](problem, inputs)
    y, h = functions[0](**inputs)
    assert torch.equal(call.function(**inputs), y)
    assert torch.equal(h, inputs["x"] + inputs["residual"])
