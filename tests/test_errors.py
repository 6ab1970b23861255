"""What a wrong call gets: the exception it is due, in a sentence with the argument, what came and what is accepted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastattn
from fastattn.errors import ArgumentError, ArgumentIndexError, ArgumentTypeError, FastattnError, UnsupportedError

JARGON = ("None of", "NoneType", "Traceback", "Error", "unhashable", "aten::", " at 0x", "tensor(", "object")


@dataclass(frozen=True)
class T:
    """A tensor of ones, or of `values`, made when a test runs; `device` None is the one that the tests run on."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str | None = None
    layout: str = "strided"
    values: tuple[float, ...] | None = None

    def make(self, device: torch.device) -> Tensor:
        if self.values is not None:
            return torch.tensor(self.values, dtype=self.dtype, device=self.device or device).view(self.shape)
        t = torch.ones(self.shape, device=self.device or device).to(self.dtype)
        if self.layout == "nested":
            return torch.nested.nested_tensor(list(t.unbind()), layout=torch.jagged)
        return t.to_sparse() if self.layout == "sparse_coo" else t


@dataclass(frozen=True)
class Wrong:
    """A call, the exception it raises, and pieces of the message."""

    name: str
    fn: Callable
    args: tuple
    kwargs: dict[str, Any]
    says: tuple[str, ...]
    raises: type[FastattnError] = ArgumentError

    def __str__(self) -> str:
        return f"{self.fn.__name__}-{self.name}"

    def inputs(self, device: torch.device) -> tuple[tuple, dict[str, Any]]:
        return tree_map(lambda x: x.make(device) if isinstance(x, T) else x, (self.args, self.kwargs))


def bools(*shape: int) -> T:
    return T(shape, torch.bool)


def i32(*values: int, **fields: Any) -> T:
    return T((len(values),), torch.int32, values=values, **fields)


Q, K, V = T((2, 4, 5, 8)), T((2, 2, 5, 8)), T((2, 2, 5, 8))
Q_ROWS, K_ROWS, V_ROWS = T((7, 4, 8)), T((9, 2, 8)), T((9, 2, 8))
CU_Q, CU_K = i32(0, 3, 7), i32(0, 4, 9)
LONGER = {"k": T((2, 2, 7, 8)), "v": T((2, 2, 7, 8))}
THREE_HEADS = {"key": T((2, 3, 5, 8)), "value": T((2, 3, 5, 8))}
X = T((3, 5, 8))
F64 = torch.float64
X64 = T(X.shape, F64)


def attention(name: str, *says: str, q=Q, k=K, v=V, **options: Any) -> Wrong:
    return Wrong(name, fastattn.attention, (q, k, v), options, says)


def triton_attention(name: str, *says: str, **arguments: Any) -> Wrong:
    return attention(name, "attention: backend 'triton' cannot", *says, backend="triton", **arguments)


def varlen(
    name: str, *says: str, q=Q_ROWS, k=K_ROWS, v=V_ROWS, cu_q=CU_Q, cu_k=CU_K, max_q=4, max_k=5, **options: Any
) -> Wrong:
    return Wrong(name, fastattn.varlen_attention, (q, k, v, cu_q, cu_k, max_q, max_k), options, says)


def sdpa(name: str, *says: str, query=Q, key=Q, value=Q, **options: Any) -> Wrong:
    fn = fastattn.scaled_dot_product_attention
    return Wrong(name, fn, (query, key, value), options, ("scaled_dot_product_attention: ", *says))


def layer_norm(name: str, *says: str, x=X, shape=8, **options: Any) -> Wrong:
    return Wrong(name, fastattn.layer_norm, (x, shape), options, ("layer_norm: ", *says))


def rms_norm(name: str, *says: str, x=X, shape=8, **options: Any) -> Wrong:
    return Wrong(name, fastattn.rms_norm, (x, shape), options, ("rms_norm: ", *says))


def softmax(name: str, *says: str, x=X, fn=fastattn.softmax, **options: Any) -> Wrong:
    return Wrong(name, fn, (x,), options, (f"{fn.__name__}: ", *says))


def log_softmax(name: str, *says: str, **arguments: Any) -> Wrong:
    return softmax(name, *says, fn=fastattn.log_softmax, **arguments)


TENSOR, NUMBER = "a torch.Tensor", "a number"
FLOATS = "float16, bfloat16, float32, float64"
SCORES = "(B, H, S_q, S_k) = (2, 4, 5, 5)"
PAIR, SIDE = "a pair (left, right)", "it must be an int, or None for unbounded"
INTS = "an int or a list or tuple of ints"
ALIGNMENTS = 'False, True, "top_left" or "bottom_right"'
PACKED_SCORES = "(B, H, max_seqlen_q, max_seqlen_k) = (2, 4, 4, 5)"
LONGEST = "it must be an int, or an integer tensor of one element"
BOUNDS = "(B + 1,): where each of B sequences begins, and where the last ends"
HALVES = "it has float16, bfloat16 and float32"
WIDTHS = "in float32 it has tiles for 1 to "

ATTENTION_TYPES = [
    attention("q_list", "`q` is a list", TENSOR, q=[[1.0]]),
    attention("k_none", "`k` is None", TENSOR, k=None),
    attention("v_ndarray", "`v` is a ndarray", TENSOR, v=np.ones(3)),
    attention("q_int", "`q` has dtype int64", FLOATS, q=T(Q.shape, torch.int64)),
    attention("q_complex", "`q` has dtype complex64", FLOATS, q=T(Q.shape, torch.cfloat)),
    attention("q_bool", "`q` has dtype bool", FLOATS, q=bools(*Q.shape)),
    attention("q_fp8_e5m2", "`q` has dtype float8_e5m2", FLOATS, q=T(Q.shape, torch.float8_e5m2)),
    attention("mixed_k", "`k` has dtype float16", "`q` has float32", "equal", k=T(K.shape, torch.float16)),
    attention("mixed_v", "`v` has dtype float64", "`q` has float32", "equal", v=T(V.shape, F64)),
    attention("q_sparse", "`q` has layout sparse_coo", "strided", q=T(Q.shape, layout="sparse_coo")),
    attention("k_nested", "`k` has layout nested", "strided", k=T(K.shape, layout="nested")),
    attention("causal_int", "`causal` is an int", ALIGNMENTS, causal=1),
    attention("causal_none", "`causal` is None", ALIGNMENTS, causal=None),
    attention("causal_list", "`causal` is a list", ALIGNMENTS, causal=["top_left"]),
    attention("window_int", "`window` is an int", PAIR, window=4),
    attention("window_string", "`window` is a str", PAIR, window="ab"),
    attention("window_of_three", "`window` is a tuple of 3", PAIR, window=(1, 2, 3)),
    attention("window_bool", "right side of `window` is a bool", SIDE, window=(7, True)),
    attention("window_float", "left side of `window` is a float", SIDE, window=(2.0, 0)),
    attention("window_list", "left side of `window` is a list", SIDE, window=([1], 0)),
    attention("scale_tensor", "`scale` is a Tensor", f"{NUMBER} or None", scale=T(1)),
    attention("scale_string", "`scale` is a str", f"{NUMBER} or None", scale="0.5"),
    attention("scale_bool", "`scale` is a bool", f"{NUMBER} or None", scale=True),
    attention("scale_complex", "`scale` is a complex", f"{NUMBER} or None", scale=1j),
    attention("scale_ndarray", "`scale` is a ndarray", f"{NUMBER} or None", scale=np.ones(1)),
    attention("softcap_string", "`softcap` is a str", f"{NUMBER} or None", softcap="30"),
    attention("dropout_none", "`dropout_p` is None", NUMBER, dropout_p=None),
    attention("deterministic_int", "`deterministic` is an int", "True or False", deterministic=1),
    attention("bias_list", "`bias` is a list", f"{TENSOR} or None", bias=[0.0]),
    attention("bias_int", "`bias` has dtype int32", FLOATS, bias=T((5, 5), torch.int32)),
    attention("bias_bool", "`bias` has dtype bool", "floating", "a bool mask is `mask`", bias=bools(5, 5)),
    attention("mask_int", "`mask` has dtype int64", "bool, True where a row attends", mask=T((5, 5), torch.int64)),
    attention("mask_float", "`mask` has dtype float32", "bool, True where a row attends", "`bias`", mask=T((5, 5))),
    attention("mask_sparse", "`mask` has layout sparse_coo", "strided", mask=T((5, 5), layout="sparse_coo")),
    attention("alibi_float", "`alibi_slopes` is a float", f"{TENSOR} or None", alibi_slopes=0.5),
    attention("alibi_int", "`alibi_slopes` has dtype int64", FLOATS, alibi_slopes=T((4,), torch.int64)),
    attention("sinks_bool", "`sinks` has dtype bool", FLOATS, sinks=bools(4)),
]
ATTENTION_VALUES = [
    attention("q_rank", "`q` has shape (4, 5, 8)", "four dimensions (B, H, S_q, D)", q=T((4, 5, 8))),
    attention("k_rank", "`k` has shape (1, 2, 2, 5, 8)", "(B, H_kv, S_k, D)", k=T((1, 2, 2, 5, 8))),
    attention("v_rank", "`v` has shape (8,)", "four dimensions (B, H_kv, S_k, D_v)", v=T((8,))),
    attention("k_batch", "`k` has batch size 3", "`q` has 2", "equal", k=T((3, 2, 5, 8))),
    attention("v_batch", "`v` has batch size 1", "`q` has 2", "equal", v=T((1, 2, 5, 8))),
    attention("v_heads", "`v` has number of heads 4", "`k` has 2", "equal", v=T((2, 4, 5, 8))),
    attention("v_length", "`v` has sequence length 6", "`k` has 5", "equal", v=T((2, 2, 6, 8))),
    attention("k_width", "`k` has head dimension 16", "`q` has 8", "equal", k=T((2, 2, 5, 16))),
    attention("heads", "`q` has 4 heads and `k` has 3", "multiple of H_kv", k=T((2, 3, 5, 8)), v=T((2, 3, 5, 8))),
    attention("no_heads", "`q` has 4 heads and `k` has 0", "multiple of H_kv", k=T((2, 0, 5, 8)), v=T((2, 0, 5, 8))),
    attention("k_device", "`k` is on meta", "`q` on", "one device", k=T(K.shape, device="meta")),
    attention("v_device", "`v` is on meta", "`q` on", "one device", v=T(V.shape, device="meta")),
    attention("causal_lengths", "`causal=True` is ambiguous", "S_q = 5", '"top_left"', **LONGER, causal=True),
    attention("causal_name", "`causal` is 'upper_left'", ALIGNMENTS, causal="upper_left"),
    attention("window_negative", "left side of `window` is -1", "0 or more, or None", window=(-1, 0)),
    attention("window_negative_right", "right side of `window` is -2", "0 or more, or None", window=[None, -2]),
    attention("scale_nan", "`scale` is nan", "finite", scale=math.nan),
    attention("scale_inf", "`scale` is -inf", "finite", scale=-math.inf),
    attention("scale_huge", "`scale` is an int beyond float64", "finite", scale=10**400),
    attention("softcap_zero", "`softcap` is 0.0", "positive, or None", softcap=0.0),
    attention("softcap_negative", "`softcap` is -1/2", "positive, or None", softcap=Fraction(-1, 2)),
    attention("softcap_inf", "`softcap` is inf", "finite", softcap=math.inf),
    attention("dropout_negative", "`dropout_p` is -0.1", "between 0 and 1", dropout_p=-0.1),
    attention("dropout_above_one", "`dropout_p` is 1.5", "between 0 and 1", dropout_p=1.5),
    attention("dropout_nan", "`dropout_p` is nan", "finite", dropout_p=math.nan),
    attention("bias_shape", "`bias` has shape (5, 4)", SCORES, bias=T((5, 4))),
    attention("bias_heads", "`bias` has shape (2, 5, 5)", SCORES, bias=T((2, 5, 5))),
    attention("bias_device", "`bias` is on meta", "`q` on", "one device", bias=T((5, 5), device="meta")),
    attention("mask_shape", "`mask` has shape (3, 1, 5, 5)", SCORES, mask=bools(3, 1, 5, 5)),
    attention("mask_rank", "`mask` has shape (1, 2, 4, 5, 5)", SCORES, mask=bools(1, 2, 4, 5, 5)),
    attention("mask_device", "`mask` is on meta", "`q` on", "one device", mask=T((5, 5), torch.bool, "meta")),
    attention("alibi_shape", "`alibi_slopes` has shape (2,)", "(H,) = (4,) or (B, H) = (2, 4)", alibi_slopes=T((2,))),
    attention("alibi_device", "`alibi_slopes` is on meta", "one device", alibi_slopes=T((4,), device="meta")),
    attention("sinks_shape", "`sinks` has shape (2, 4)", "(H,) = (4,)", sinks=T((2, 4))),
    attention("sinks_device", "`sinks` is on meta", "`q` on", "one device", sinks=T((4,), device="meta")),
]
VARLEN_TYPES = [
    varlen("q_list", "varlen_attention: `q` is a list", TENSOR, q=[[[1.0]]]),
    varlen("v_none", "`v` is None", TENSOR, v=None),
    varlen("k_sparse", "`k` has layout sparse_coo", "strided", k=T(K_ROWS.shape, layout="sparse_coo")),
    varlen("q_nested", "`q` has layout nested", "strided", q=T(Q_ROWS.shape, layout="nested")),
    varlen("q_int", "`q` has dtype int64", FLOATS, q=T(Q_ROWS.shape, torch.int64)),
    varlen("mixed_k", "`k` has dtype float16", "`q` has float32", "equal", k=T(K_ROWS.shape, torch.float16)),
    varlen("cu_q_none", "`cu_seqlens_q` is None", TENSOR, cu_q=None),
    varlen("cu_k_list", "`cu_seqlens_k` is a list", TENSOR, cu_k=[0, 4, 9]),
    varlen("cu_q_int16", "`cu_seqlens_q` has dtype int16", "it must be int32", cu_q=replace(CU_Q, dtype=torch.int16)),
    varlen("cu_k_float", "`cu_seqlens_k` has dtype float32", "it must be int32", cu_k=replace(CU_K, dtype=torch.float)),
    varlen("used_q_list", "`seqused_q` is a list", f"{TENSOR} or None", seqused_q=[1, 2]),
    varlen("used_k_float", "`seqused_k` has dtype float32", "it must be int32 or int64", seqused_k=T((2,))),
    varlen("max_q_none", "`max_seqlen_q` is None", LONGEST, max_q=None),
    varlen("max_q_float", "`max_seqlen_q` is a float", LONGEST, max_q=4.0),
    varlen("max_k_bool", "`max_seqlen_k` is a bool", LONGEST, max_k=True),
    varlen("max_k_list", "`max_seqlen_k` is a list", LONGEST, max_k=[4, 5]),
    varlen("max_q_float_tensor", "`max_seqlen_q` is a tensor of dtype float32", LONGEST, max_q=T(())),
    varlen("max_k_bool_tensor", "`max_seqlen_k` is a tensor of dtype bool", LONGEST, max_k=bools(1)),
    varlen("max_k_complex_tensor", "a tensor of dtype complex128", LONGEST, max_k=T((), torch.cdouble)),
    varlen("causal_int", "`causal` is an int", ALIGNMENTS, causal=1),
    varlen("window_int", "`window` is an int", PAIR, window=4),
    varlen("bias_bool", "`bias` has dtype bool", "floating", "a bool mask is `mask`", bias=bools(4, 5)),
    varlen("bias_list", "`bias` is a list", f"{TENSOR} or None", bias=[0.0]),
    varlen("mask_float", "`mask` has dtype float32", "an additive mask is `bias`", mask=T((4, 5))),
    varlen("mask_uint8", "`mask` has dtype uint8", "it must be bool", mask=T((4, 5), torch.uint8)),
    varlen("alibi_int", "`alibi_slopes` has dtype int64", FLOATS, alibi_slopes=T((4,), torch.int64)),
    varlen("sinks_list", "`sinks` is a list", f"{TENSOR} or None", sinks=[1.0] * 4),
    varlen("scale_tensor", "`scale` is a Tensor", f"{NUMBER} or None", scale=T(1)),
    varlen("softcap_bool", "`softcap` is a bool", f"{NUMBER} or None", softcap=True),
    varlen("dropout_none", "`dropout_p` is None", NUMBER, dropout_p=None),
    varlen("deterministic_none", "`deterministic` is None", "True or False", deterministic=None),
]
VARLEN_VALUES = [
    varlen("q_rank", "`q` has shape (1, 4, 7, 8)", "three dimensions (T_q, H, D)", q=T((1, 4, 7, 8))),
    varlen("k_rank", "`k` has shape (9, 8)", "three dimensions (T_k, H_kv, D)", k=T((9, 8))),
    varlen("v_rank", "`v` has shape (1, 9, 2, 8)", "three dimensions (T_k, H_kv, D_v)", v=T((1, 9, 2, 8))),
    varlen("v_length", "`v` has sequence length 8", "`k` has 9", "equal", v=T((8, 2, 8))),
    varlen("v_heads", "`v` has number of heads 4", "`k` has 2", "equal", v=T((9, 4, 8))),
    varlen("k_width", "`k` has head dimension 16", "`q` has 8", "equal", k=T((9, 2, 16))),
    varlen("heads", "`q` has 4 heads and `k` has 3", "multiple of H_kv", k=T((9, 3, 8)), v=T((9, 3, 8))),
    varlen("k_device", "`k` is on meta", "`q` on", "one device", k=T(K_ROWS.shape, device="meta")),
    varlen("cu_q_rank", "`cu_seqlens_q` has shape (1, 3)", BOUNDS, cu_q=replace(CU_Q, shape=(1, 3))),
    varlen("cu_k_scalar", "`cu_seqlens_k` has shape ()", BOUNDS, cu_k=T((), torch.int32)),
    varlen("cu_q_empty", "`cu_seqlens_q` has shape (0,)", BOUNDS, cu_q=i32()),
    varlen("cu_q_device", "`cu_seqlens_q` is on meta", "`q` on", "one device", cu_q=T((3,), torch.int32, "meta")),
    varlen("cu_k_device", "`cu_seqlens_k` is on meta", "`q` on", "one device", cu_k=T((3,), torch.int32, "meta")),
    varlen("cu_sizes", "`cu_seqlens_k` has 4 entries", "`cu_seqlens_q` has 3", "one more than", cu_k=i32(0, 4, 6, 9)),
    varlen("max_q_negative", "`max_seqlen_q` is -1", "0 or more", max_q=-1),
    varlen("max_k_of_each", "`max_seqlen_k` is a tensor of shape (2,)", LONGEST, max_k=i32(4, 5)),
    varlen("causal_sides", "`causal=True` is ambiguous unless `cu_seqlens_k` is the same", '"top_left"', causal=True),
    varlen("used_q_shape", "`seqused_q` has shape (3,)", "(B,) = (2,)", seqused_q=i32(1, 2, 3)),
    varlen("used_k_device", "`seqused_k` is on meta", "one device", seqused_k=T((2,), torch.int32, "meta")),
    varlen("causal_name", "`causal` is 'lower_right'", ALIGNMENTS, causal="lower_right"),
    varlen("window_flash_attn", "left side of `window` is -1", "None for unbounded", window=(-1, -1)),
    varlen("window_empty", "left side of `window` is -3", "0 or more", window=(-3, 2)),
    varlen("scale_nan", "`scale` is nan", "finite", scale=math.nan),
    varlen("softcap_zero", "`softcap` is 0", "positive, or None", softcap=0),
    varlen("dropout_above_one", "`dropout_p` is 1.01", "between 0 and 1", dropout_p=1.01),
    varlen("bias_of_rows", "`bias` has shape (7, 9)", PACKED_SCORES, bias=T((7, 9))),
    varlen("bias_batch", "`bias` has shape (3, 1, 4, 5)", PACKED_SCORES, bias=T((3, 1, 4, 5))),
    varlen("bias_rank", "`bias` has shape (1, 2, 4, 4, 5)", PACKED_SCORES, bias=T((1, 2, 4, 4, 5))),
    varlen("bias_device", "`bias` is on meta", "`q` on", "one device", bias=T((4, 5), device="meta")),
    varlen("mask_heads", "`mask` has shape (2, 2, 4, 5)", PACKED_SCORES, mask=bools(2, 2, 4, 5)),
    varlen("mask_empty", "`mask` has shape (0, 5)", PACKED_SCORES, mask=bools(0, 5)),
    varlen("alibi_kv_heads", "`alibi_slopes` has shape (2,)", "(H,) = (4,) or (B, H) = (2, 4)", alibi_slopes=T((2,))),
    varlen("alibi_batch", "`alibi_slopes` has shape (1, 4)", "(B, H) = (2, 4)", alibi_slopes=T((1, 4))),
    varlen("sinks_shape", "`sinks` has shape (2, 4)", "(H,) = (4,)", sinks=T((2, 4))),
]
# What is read of a tensor that lies on a CPU, and of no other.
VARLEN_LENGTHS = [
    varlen("start", "`cu_seqlens_q` runs from 1 to 7", "rise from 0 to at most T_q = 7", cu_q=i32(1, 3, 7)),
    varlen("lengths", "`cu_seqlens_k` runs from 4 to 5", "rise from 0 to at most T_k = 9", cu_k=i32(4, 5, 5)),
    varlen("falling", "a shortest sequence of -2", "rise from 0 to at most T_q = 7", cu_q=i32(0, 5, 3), max_q=5),
    varlen("beyond_q", "`cu_seqlens_q` runs from 0 to 8", "at most T_q = 7", cu_q=i32(0, 3, 8), max_q=5),
    varlen("beyond_k", "`cu_seqlens_k` runs from 0 to 10", "at most T_k = 9", cu_k=i32(0, 5, 10)),
    varlen("max_q", "`max_seqlen_q` is 3 and `cu_seqlens_q` has a sequence of 4", "or more", max_q=3),
    varlen("max_k", "`max_seqlen_k` is 0 and `cu_seqlens_k` has a sequence of 5", "or more", max_k=0),
    varlen("max_q_tensor", "`max_seqlen_q` is 1 and `cu_seqlens_q` has a sequence of 4", max_q=T((1,), torch.int64)),
    varlen("bias_max_tensor", "`bias` has shape (4, 4)", PACKED_SCORES, bias=T((4, 4)), max_k=i32(5)),
    varlen("used_q_above", "`seqused_q` is 5 for sequence 0, which has 3 rows", "between 0 and", seqused_q=i32(5, 3)),
    varlen("used_k_below", "`seqused_k` is -1 for sequence 1, which has 5 rows", seqused_k=i32(4, -1)),
]
SDPA_TYPES = [
    sdpa("query_list", "`query` is a list", TENSOR, query=[1.0]),
    sdpa("value_none", "`value` is None", TENSOR, value=None),
    sdpa("value_dtype", "`value` has dtype float64", "`query` has float32", "equal", value=T(Q.shape, F64)),
    sdpa("key_sparse", "`key` has layout sparse_coo", "strided", key=T(Q.shape, layout="sparse_coo")),
    sdpa("mask_list", "`attn_mask` is a list", f"{TENSOR} or None", attn_mask=[True]),
    sdpa("mask_int", "`attn_mask` has dtype int64", f"bool, {FLOATS}", attn_mask=T((5, 5), torch.int64)),
    sdpa("is_causal_int", "`is_causal` is an int", "True or False", is_causal=1),
    sdpa("enable_gqa_string", "`enable_gqa` is a str", "True or False", enable_gqa="yes"),
    sdpa("scale_string", "`scale` is a str", f"{NUMBER} or None", scale="auto"),
]
SDPA_VALUES = [
    sdpa("query_rank", "`query` has shape (8,)", "at least two dimensions", query=T((8,))),
    sdpa("heads", "`query` has 4 heads and `key` has 2", "enable_gqa=True", key=K, value=V),
    sdpa("gqa_heads", "`query` has 4 heads and `key` has 3", "multiple", **THREE_HEADS, enable_gqa=True),
    sdpa("batches", "`query`, `key` and `value` do not broadcast", "(3, 4, 5, 8)", key=T((3, 4, 5, 8))),
    sdpa("key_width", "`key` has head dimension 16", "`query` has 8", "equal", key=T((2, 4, 5, 16))),
    sdpa("value_length", "`value` has sequence length 6", "`key` has 5", "equal", value=T((2, 4, 6, 8))),
    sdpa("key_device", "`key` is on meta", "`query` on", "one device", key=T(Q.shape, device="meta")),
    sdpa("mask_shape", "`attn_mask` has shape (5, 4)", "(2, 4, 5, 5)", attn_mask=bools(5, 4)),
    sdpa("bias_shape", "`attn_mask` has shape (3, 5, 5)", "(2, 4, 5, 5)", attn_mask=T((3, 5, 5))),
    sdpa("mask_shape_3d", "`attn_mask` has shape (5, 4)", "(3, 5, 5)", query=X, key=X, value=X, attn_mask=bools(5, 4)),
    sdpa("dropout", "`dropout_p` is 2", "between 0 and 1", dropout_p=2),
]
LAYER_NORM_TYPES = [
    layer_norm("x_none", "`x` is None", TENSOR, x=None),
    layer_norm("x_int", "`x` has dtype int64", FLOATS, x=T((3, 8), torch.int64)),
    layer_norm("x_sparse", "`x` has layout sparse_coo", "strided", x=T((3, 8), layout="sparse_coo")),
    layer_norm("shape_none", "`normalized_shape` is None", INTS, shape=None),
    layer_norm("shape_float", "`normalized_shape` is a float", INTS, shape=8.0),
    layer_norm("shape_of_floats", "`normalized_shape` holds a float", INTS, shape=(5.0, 8)),
    layer_norm("shape_of_lists", "`normalized_shape` holds a list", INTS, shape=[[8]]),
    layer_norm("shape_tensor", "`normalized_shape` is a Tensor", INTS, shape=T((1,))),
    layer_norm("weight_list", "`weight` is a list", f"{TENSOR} or None", weight=[1.0]),
    layer_norm("weight_int", "`weight` has dtype int64", FLOATS, weight=T((8,), torch.int64)),
    layer_norm("bias_string", "`bias` is a str", f"{TENSOR} or None", bias="zeros"),
    layer_norm("eps_none", "`eps` is None", NUMBER, eps=None),
    layer_norm("eps_list", "`eps` is a list", NUMBER, eps=[1e-5]),
    layer_norm("residual_list", "`residual` is a list", f"{TENSOR} or None", residual=[1.0]),
    layer_norm("residual_int", "`residual` has dtype int64", FLOATS, residual=T(X.shape, torch.int64)),
    layer_norm("dropout_tensor", "`dropout_p` is a Tensor", NUMBER, dropout_p=T((2,))),
    layer_norm("memory_efficient_int", "`memory_efficient` is an int", "True or False", memory_efficient=1),
    rms_norm("x_none", "`x` is None", TENSOR, x=None),
    rms_norm("weight_list", "`weight` is a list", f"{TENSOR} or None", weight=[1.0]),
    rms_norm("eps_list", "`eps` is a list", NUMBER, eps=[1e-5]),
    rms_norm("weight_offset_none", "`weight_offset` is None", NUMBER, weight_offset=None),
]
LAYER_NORM_VALUES = [
    layer_norm("shape_size", "`normalized_shape` is (5,)", "shape (3, 5, 8)", "last dimensions", shape=5),
    layer_norm("shape_order", "`normalized_shape` is (8, 5)", "shape (3, 5, 8)", "last dimensions", shape=[8, 5]),
    layer_norm("shape_too_long", "`normalized_shape` is (2, 3, 5, 8)", "last dimensions", shape=(2, 3, 5, 8)),
    layer_norm("shape_empty", "`normalized_shape` is ()", "at least one", shape=()),
    layer_norm("shape_scalar_x", "`x` has shape ()", "last dimensions", x=T(()), shape=1),
    layer_norm("weight_shape", "`weight` has shape (5,)", "normalized_shape = (8,)", weight=T((5,))),
    layer_norm("weight_device", "`weight` is on meta", "`x` on", "one device", weight=T((8,), device="meta")),
    layer_norm("bias_shape", "`bias` has shape (1, 8)", "normalized_shape = (8,)", bias=T((1, 8))),
    layer_norm("eps_negative", "`eps` is -1e-05", "0 or more", eps=-1e-5),
    layer_norm("eps_nan", "`eps` is nan", "finite", eps=math.nan),
    layer_norm("residual_shape", "`residual` has shape (3, 5, 1)", "the shape of x = (3, 5, 8)", residual=T((3, 5, 1))),
    layer_norm("residual_device", "`residual` is on meta", "one device", residual=T(X.shape, device="meta")),
    layer_norm("dropout_range", "`dropout_p` is 1.5", "between 0 and 1", residual=X, dropout_p=1.5),
    layer_norm("dropout_alone", "`dropout_p` is 0.1", "without a residual", dropout_p=0.1),
    rms_norm("shape_size", "`normalized_shape` is (5,)", "shape (3, 5, 8)", "last dimensions", shape=5),
    rms_norm("eps_negative", "`eps` is -1e-05", "0 or more", eps=-1e-5),
    rms_norm("weight_offset_alone", "`weight_offset` is 1.0", "without a weight", weight_offset=1.0),
]
SOFTMAX_TYPES = [
    softmax("x_list", "`x` is a list", TENSOR, x=[1.0, 2.0]),
    softmax("x_complex", "`x` has dtype complex64", FLOATS, x=T((3, 8), torch.cfloat)),
    softmax("x_sparse", "`x` has layout sparse_coo", "strided", x=T((3, 8), layout="sparse_coo")),
    softmax("dim_none", "`dim` is None", "an int", dim=None),
    softmax("inplace_int", "`inplace` is an int", "True or False", inplace=1),
    softmax("dim_float", "`dim` is a float", "an int", dim=1.0),
    softmax("dim_bool", "`dim` is a bool", "an int", dim=True),
    softmax("dim_tuple", "`dim` is a tuple", "an int", dim=(0, 1)),
    softmax("dim_list", "`dim` is a list", "an int", dim=[0]),
    softmax("scale_none", "`scale` is None", NUMBER, scale=None),
    softmax("mask_list", "`mask` is a list", f"{TENSOR} or None", mask=[True]),
    softmax("mask_float", "`mask` has dtype float32", "bool", mask=X),
    log_softmax("x_int", "`x` has dtype int64", FLOATS, x=T((3, 8), torch.int64)),
    log_softmax("mask_int", "`mask` has dtype int64", "bool", mask=T(X.shape, torch.int64)),
]
SOFTMAX_VALUES = [
    replace(softmax("dim_above", "`dim` is 3", "between -3 and 2", dim=3), raises=ArgumentIndexError),
    replace(softmax("dim_below", "`dim` is -4", "between -3 and 2", dim=-4), raises=ArgumentIndexError),
    replace(softmax("dim_scalar_x", "`dim` is 1", "between -1 and 0", x=T(()), dim=1), raises=ArgumentIndexError),
    softmax("scale_nan", "`scale` is nan", "finite", scale=math.nan),
    softmax("causal_dim", "`causal` needs x (…, S_q, S_k) and dim=-1", "`dim` is -2", dim=1, causal=True),
    softmax("causal_rank", "`causal` needs x (…, S_q, S_k)", "x has shape (8,)", x=T((8,)), causal=True),
    softmax("causal_lengths", "`causal=True` is ambiguous", "S_q = 5", "S_k = 8", '"top_left"', causal=True),
    softmax("causal_name", "`causal` is 'lower'", ALIGNMENTS, causal="lower"),
    softmax("mask_shape", "`mask` has shape (5, 5)", "the shape of x = (3, 5, 8)", mask=bools(5, 5)),
    softmax("mask_rank", "`mask` has shape (1, 3, 5, 8)", "the shape of x = (3, 5, 8)", mask=bools(1, 3, 5, 8)),
    softmax("mask_device", "`mask` is on meta", "`x` on", "one device", mask=T(X.shape, torch.bool, "meta")),
    replace(log_softmax("dim_above", "`dim` is 5", "between -3 and 2", dim=5), raises=ArgumentIndexError),
    log_softmax("causal_dim", "`causal` needs x (…, S_q, S_k) and dim=-1", "`dim` is -3", dim=0, causal="top_left"),
]
BACKEND_NAMES = [
    Wrong(f"backend_{name}", fn, args, {"backend": value}, (f"`backend` is {given}", "triton, cpu, eager"), raises)
    for fn, args in (
        (fastattn.attention, (Q, K, V)),
        (fastattn.varlen_attention, (Q_ROWS, K_ROWS, V_ROWS, CU_Q, CU_K, 4, 5)),
        (fastattn.layer_norm, (X, 8)),
        (fastattn.rms_norm, (X, 8)),
        (fastattn.softmax, (X,)),
        (fastattn.log_softmax, (X,)),
    )
    for name, value, given, raises in (
        ("unknown", "cudnn", "'cudnn'", ArgumentError),
        ("int", 1, "an int", ArgumentTypeError),
        ("list", ["triton"], "a list", ArgumentTypeError),
    )
]
UNSUPPORTED = [
    triton_attention("float64", "dtype float64", HALVES, **{x: T(Q.shape, F64) for x in "qkv"}),
    triton_attention("width_577", "head dimension of q and k is 577", WIDTHS, q=T((2, 4, 5, 577)), k=T((2, 2, 5, 577))),
    triton_attention("value_width", "head dimension of v is 600", WIDTHS, v=T((2, 2, 5, 600))),
    triton_attention("meta", "device 'meta'", **{x: T(K.shape, device="meta") for x in "qkv"}),
    varlen("float64", "backend 'triton' cannot", HALVES, **{x: T((9, 2, 8), F64) for x in "qkv"}, backend="triton"),
    varlen("value_width", "backend 'triton' cannot", "head dimension of v is 584", v=T((9, 2, 584)), backend="triton"),
    layer_norm("float64", "backend 'triton' cannot", "dtype float64", x=T(X.shape, F64), backend="triton"),
    layer_norm("weight_float64", "'triton' cannot", "weight of dtype float64", weight=T((8,), F64), backend="triton"),
    layer_norm("residual_float64", "'triton' cannot", "residual of dtype float64", residual=X64, backend="triton"),
    rms_norm("float64", "backend 'triton' cannot", "dtype float64", x=X64, backend="triton"),
    softmax("float64", "backend 'triton' cannot", "dtype float64", x=T((3, 8), F64), backend="triton"),
]
EXPLAIN = [
    Wrong(name, fastattn.explain, (fn,), {}, (f"explain: `fn` is {given}", "one of attention, "), ArgumentTypeError)
    for name, fn, given in (
        ("none", None, "None"),
        ("string", "attention", "a str"),
        ("list", [fastattn.attention], "a list"),
        ("tensor", X, "a Tensor"),
        ("other_function", torch.softmax, "softmax"),
    )
]


def raising(error: type[FastattnError], rows: list[Wrong]) -> list[Wrong]:
    return [row if issubclass(row.raises, IndexError) else replace(row, raises=error) for row in rows]


CALLS = [
    *raising(ArgumentTypeError, [*ATTENTION_TYPES, *VARLEN_TYPES, *SDPA_TYPES, *LAYER_NORM_TYPES, *SOFTMAX_TYPES]),
    *raising(ArgumentError, [*ATTENTION_VALUES, *VARLEN_VALUES, *SDPA_VALUES, *LAYER_NORM_VALUES, *SOFTMAX_VALUES]),
    *raising(UnsupportedError, UNSUPPORTED),
    *BACKEND_NAMES,
]
OF_TRITON = [wrong for wrong in CALLS if wrong.kwargs.get("backend") == "triton"]


def state(inputs: Any) -> list[tuple[int, Tensor | None]]:
    """What a write to a tensor would change: its version, and its values where it holds any."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    return [
        (t._version, None if t.is_meta or t.is_nested else t.to_dense().clone() if t.is_sparse else t.clone())
        for t in tensors
    ]


@pytest.mark.parametrize("wrong", [*CALLS, *EXPLAIN], ids=str)
def test_wrong_call_raises_one_sentence(wrong: Wrong, device: torch.device):
    check_sentence(wrong, device)


@pytest.mark.parametrize("wrong", raising(ArgumentError, VARLEN_LENGTHS), ids=str)
def test_wrong_length_on_a_cpu_raises_one_sentence(wrong: Wrong):
    check_sentence(wrong, torch.device("cpu"))


def check_sentence(wrong: Wrong, device: torch.device) -> None:
    args, kwargs = wrong.inputs(device)
    before = state((args, kwargs))
    with pytest.raises(FastattnError) as caught:
        wrong.fn(*args, **kwargs)
    message = str(caught.value)

    assert type(caught.value) is wrong.raises, message
    for piece in wrong.says:
        assert piece in message
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 300
    assert not re.search(r"[.!?] +[A-Z]", message), "more than one sentence"
    for word in JARGON:
        assert word not in message
    for (version, value), (version_before, value_before) in zip(state((args, kwargs)), before, strict=True):
        assert version == version_before
        assert value is None or torch.equal(value, value_before)


@pytest.mark.parametrize("wrong", [wrong for wrong in CALLS if wrong not in OF_TRITON], ids=str)
def test_explain_raises_what_the_call_raises(wrong: Wrong, device: torch.device):
    args, kwargs = wrong.inputs(device)
    with pytest.raises(wrong.raises) as of_call:
        wrong.fn(*args, **kwargs)
    with pytest.raises(wrong.raises) as of_explain:
        fastattn.explain(wrong.fn, *args, **kwargs)
    assert str(of_explain.value) == str(of_call.value)


@pytest.mark.parametrize("wrong", OF_TRITON, ids=str)
def test_explain_gives_the_reason_that_the_call_gives(wrong: Wrong, device: torch.device):
    args, kwargs = wrong.inputs(device)
    with pytest.raises(UnsupportedError) as caught:
        wrong.fn(*args, **kwargs)
    explanation = fastattn.explain(wrong.fn, *args, **kwargs)
    assert explanation.backend is None
    assert str(caught.value).endswith(f": {explanation.reasons['triton']}.")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"window": (1, 1)}, attention("window_bool", "`window` is a bool", window=(1, True))),
        ({"window": (1, 1)}, attention("window_float", "`window` is a float", window=(1.0, 1))),
        ({"dropout_p": 0.0}, attention("dropout_bool", "`dropout_p` is a bool", dropout_p=False)),
        ({"causal": True}, attention("causal_float", "`causal` is a float", causal=1.0)),
        ({}, layer_norm("shape_of_floats", "`normalized_shape` holds a float", shape=(8.0,))),
        ({"dim": 1}, softmax("dim_bool", "`dim` is a bool", dim=True)),
    ],
    ids=str,
)
def test_remembered_call_is_not_mistaken_for_an_equal_one_of_another_type(right, wrong: Wrong, device: torch.device):
    args, kwargs = wrong.inputs(device)
    right_args = (*args[:1], 8) if wrong.fn in (fastattn.layer_norm, fastattn.rms_norm) else args
    wrong.fn(*right_args, **right)
    with pytest.raises(ArgumentTypeError, match=re.escape(wrong.says[-1])):
        wrong.fn(*args, **kwargs)


def test_names_are_unique():
    names = [str(wrong) for wrong in [*CALLS, *VARLEN_LENGTHS]]
    assert len(names) == len(set(names)) >= 50


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ArgumentError, ValueError),
        (ArgumentError, RuntimeError),
        (ArgumentTypeError, TypeError),
        (ArgumentIndexError, IndexError),
        (UnsupportedError, NotImplementedError),
    ],
)
def test_errors_are_the_builtin_ones_too(error, builtin):
    assert issubclass(error, FastattnError)
    assert issubclass(error, builtin)
