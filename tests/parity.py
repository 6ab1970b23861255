"""One call of attention against the reference: o, lse and every gradient, held to float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import cases
import torch
from torch import Tensor

import fastattn
from fastattn import _arguments
from fastattn.reference.attention import attention as reference
from fastattn.reference.attention import varlen_attention as varlen_reference
from fastattn.testing import assert_close, make_inputs, simulate_rounding

DIFFERENTIABLE = ("bias", "alibi_slopes", "sinks")

# What a check runs its backend under, one after the other, against one reference; each may be entered many times.
Contexts = Iterable[AbstractContextManager]
ONCE: Contexts = (nullcontext(),)


@dataclass(frozen=True)
class Packed:
    """How sequences lie in q, k and v, which here are (1, H, T, D); rows of q may be left over at the end."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int | Tensor
    max_seqlen_k: int | Tensor

    def reference(self, q: Tensor, k: Tensor, v: Tensor, spec: Any, **call: Any) -> tuple[Tensor, Tensor]:
        rows = (t[0].transpose(0, 1) for t in (q, k, v))
        o, lse = varlen_reference(*rows, self.cu_seqlens_q, self.cu_seqlens_k, spec, **call)
        left_over = q.shape[2] - o.shape[0]
        o = torch.cat([o, o.new_zeros(left_over, *o.shape[1:])])
        lse = torch.cat([lse, lse.new_full((lse.shape[0], left_over), -torch.inf)], 1)
        return o.transpose(0, 1)[None], lse[None]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
        rows = (t[0].transpose(0, 1) for t in (q, k, v))
        where = (self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k)
        o, lse = fastattn.varlen_attention(*rows, *where, return_lse=True, **call)
        return o.transpose(0, 1)[None], lse[None]


def on_backends(named: Sequence[Any], **able: Callable[[Any], bool]) -> list[tuple[Any, str]]:
    """(case, backend) for each backend that has all of an operation; for those that have a part of it, that part."""
    everywhere: dict[str, Callable[[Any], bool]] = dict.fromkeys(("triton", "eager"), lambda case: True)
    return [(case, name) for name, has in (everywhere | able).items() for case in named if has(case)]


def spec_of(q: Tensor, k: Tensor, v: Tensor, **options: Any):
    names = ("causal", "window", "scale", "softcap", "dropout_p", "deterministic")
    defaults = {"causal": False, "dropout_p": 0.0, "deterministic": False}
    present = tuple(options.get(name) is not None for name in ("bias", "mask", "alibi_slopes", "sinks", "cu_seqlens_q"))
    of = [tuple(getattr(t, attribute) for t in (q, k, v)) for attribute in ("shape", "dtype", "device")]
    return _arguments.attention_spec("attention", *of, *({**defaults, **options}.get(name) for name in names), present)


def inputs_of(case: cases.Case, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
    """-> ([q, k, v], do, dlse); of packed sequences, (1, H, T, D)."""
    D_v = case.D_v or case.D
    B, S_q, S_k = case.B, case.S_q, case.S_k
    if case.lengths is not None:
        B, S_q, S_k = 1, case.left_over + sum(n for n, _ in case.lengths), sum(n for _, n in case.lengths)
    q = (B, case.H, S_q, case.D)
    kv = [(B, case.kv_heads, S_k, width) for width in (case.D, D_v)]
    q, k, v, do = make_inputs(q, *kv, (*q[:3], D_v), dtype=case.dtype, device=device, layout=case.layout)
    (dlse,) = make_inputs(q.shape[:3], device=device, seed=1)
    return [q, k, v], do, dlse


def packed_of(case: cases.Case, device: torch.device) -> Packed | None:
    if case.lengths is None:
        return None
    cu = (
        torch.tensor([0, *itertools.accumulate(n[side] for n in case.lengths)], dtype=torch.int32, device=device)
        for side in (0, 1)
    )
    return Packed(*cu, case.S_q, case.S_k)


def options_of(case: cases.Case, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """-> (options, those of them that are differentiable tensors)."""
    options = {
        name: value.tensor(case, device) if isinstance(value, cases.Score) else value
        for name, value in case.options.items()
    }
    return options, {name: options[name] for name in DIFFERENTIABLE if name in options}


def run(
    function, inputs: list[Tensor], do: Tensor, dlse: Tensor | None, dtype: torch.dtype, features=None
) -> dict[str, Tensor]:
    """o, lse, and the gradients of <o, do> + <lse, dlse>, with everything in `dtype`; features too in float64."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in inputs]
    features = {
        name: (t.double() if dtype == torch.float64 else t).detach().requires_grad_()
        for name, t in (features or {}).items()
    }
    o, lse = function(*leaves, **features)
    wanted = (*leaves, *features.values())
    if dlse is None:
        grads = torch.autograd.grad(o, wanted, do.to(dtype))
    else:
        finite = torch.where(lse.isfinite(), dlse.to(lse.dtype), 0.0)  # a loss on lse = -inf has no finite gradient
        grads = torch.autograd.grad((o, lse), wanted, (do.to(dtype), finite))
    names = ("o", "lse", "dq", "dk", "dv", *(f"d{name}" for name in features))
    return dict(zip(names, (o, lse, *grads), strict=True))


def gradient_scale(exact: dict[str, Tensor], v: Tensor, do: Tensor) -> float:
    """The largest number that gradients are rounded at: ds = p (dp - delta) subtracts sums, dp = Σ do · v, that are
    rounded as they grow."""
    v = v.repeat_interleave(do.shape[1] // v.shape[1], dim=1)
    tensors = [exact["dq"], exact["dk"], exact["dv"], do.double().abs() @ v.double().abs().mT]
    return max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)


def check(
    backend: str,
    inputs: list[Tensor],
    do: Tensor,
    dlse: Tensor | None,
    options: dict[str, Any],
    features: dict[str, Tensor] | None = None,
    packed: Packed | None = None,
    under: Contexts = ONCE,
) -> None:
    """One call against the reference in float64 and in the inputs' own dtype; `features` are among the options."""
    dtype, device = inputs[0].dtype, inputs[0].device
    seed = None
    if options.get("dropout_p"):
        torch.manual_seed(5)
        seed = torch.randint(2**63 - 1, (), device=device)

    def oracle(compute_dtype: torch.dtype) -> Callable:
        def call(*leaves, **features):
            tensors = {"bias": None, "mask": options.get("mask"), "alibi_slopes": None, "sinks": None, **features}
            function = packed.reference if packed else reference
            return function(*leaves, spec_of(*leaves, **options), seed=seed, compute_dtype=compute_dtype, **tensors)

        return call

    def tested(*leaves, **features):
        torch.manual_seed(5)
        call = {**options, **features, "backend": backend}
        if packed:
            return packed.attention(*leaves, **call)
        o = fastattn.attention(*leaves, return_lse=dlse is not None, **call)
        return (o, None) if dlse is None else o

    exact = run(oracle(torch.float64), inputs, do, dlse, torch.float64, features)
    rounded = simulate_rounding(lambda: run(oracle(dtype), inputs, do, dlse, dtype, features))
    scale = gradient_scale(exact, inputs[2], do)

    def largest(name: str, t: Tensor) -> float:
        if not name.startswith("d"):
            return 1.0
        # o is rounded to the inputs' type, and a gradient of a wider feature is a sum of products with it
        size = scale * max(1.0, torch.finfo(dtype).eps / torch.finfo(t.dtype).eps)
        if name[1:] in DIFFERENTIABLE:  # a sum over n rows of rounded numbers is about √n roundings off
            shape = ((1,) * 4 + t.shape)[-4:-1] if name == "dbias" else t.shape
            size *= math.sqrt(max(1.0, do.shape[:3].numel() / max(1, math.prod(shape))))
        if name == "dalibi_slopes":  # Σ ds · distance
            size *= max(do.shape[2], inputs[1].shape[2])
        return size

    for context in under:
        with context:
            for name, t in run(tested, inputs, do, dlse, dtype, features).items():
                if t is not None:
                    assert_close(t, exact[name], rounded[name], name, scale=largest(name, t))
