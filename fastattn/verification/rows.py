"""Checks of norms, softmax, losses, rotary embedding, gated activations and dropout_add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.verification.check import Check, Tensors

M, N, V, LONG = 96, 1000, 3000, 20_000
B, H, S, D = 2, 4, 32, 64
MATRIX = (M, N)
Shapes = dict[str, tuple[int, ...]]


def row_checks() -> Iterator[Check]:
    """Those of the table in docs/rows.md."""
    x: Shapes = {"x": MATRIX}
    pair: Shapes = {"gate": MATRIX, "up": MATRIX}
    affine: Shapes = {"weight": (N,), "bias": (N,)}
    yield Check("layer_norm", their_layer_norm, our_layer_norm, x | affine)
    yield Check(
        "layer_norm, long rows",
        lambda x: F.layer_norm(x, (LONG,)),
        lambda x, backend: fastattn.layer_norm(x, LONG, backend=backend),
        {"x": (64, LONG)},
    )
    yield Check("layer_norm of x + residual", their_layer_norm, our_layer_norm, x | {"residual": MATRIX} | affine)
    yield Check(
        "rms_norm",
        lambda x, weight: F.rms_norm(x, (N,), weight, 1e-6),
        lambda x, weight, backend: fastattn.rms_norm(x, N, weight, 1e-6, backend=backend),
        x | {"weight": (N,)},
    )
    yield Check("softmax", lambda x: torch.softmax(x, -1), fastattn.softmax, x)
    yield Check("log_softmax", lambda x: torch.log_softmax(x, -1), fastattn.log_softmax, x)
    yield Check(
        "softmax, scale and mask",
        lambda x, mask: torch.softmax((x * 0.125).masked_fill(~mask, -torch.inf), -1),
        lambda x, mask, backend: fastattn.softmax(x, scale=0.125, mask=mask, backend=backend),
        x,
        row_mask,
    )
    yield cross_entropy("cross_entropy")
    yield cross_entropy("cross_entropy, label smoothing", label_smoothing=0.1)
    yield Check(
        "linear_cross_entropy",
        lambda hidden, weight, target: F.cross_entropy(hidden @ weight.T, target),
        fastattn.linear_cross_entropy,
        {"hidden": (M, 64), "weight": (V, 64)},
        classes,
    )
    yield Check("rotary_embedding", rotate, fastattn.rotary_embedding, {"x": (B, H, S, D)}, tables)
    yield Check("swiglu", lambda gate, up: F.silu(gate) * up, fastattn.swiglu, pair)
    yield Check("geglu", lambda gate, up: F.gelu(gate) * up, fastattn.geglu, pair)
    yield Check(
        "geglu, tanh",
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        lambda gate, up, backend: fastattn.geglu(gate, up, approximate="tanh", backend=backend),
        pair,
    )


def more_row_checks() -> Iterator[Check]:
    square = {"x": (2, S, S)}
    yield Check(
        "softmax, causal",
        lambda x: torch.softmax(x.masked_fill(~torch.ones_like(x[0], dtype=torch.bool).tril(), -torch.inf), -1),
        lambda x, backend: fastattn.softmax(x, causal=True, backend=backend),
        square,
    )
    yield Check(
        "rms_norm of x + residual",
        lambda x, residual, weight: F.rms_norm(x + residual, (N,), weight, 1e-6),
        lambda x, residual, weight, backend: fastattn.rms_norm(x, N, weight, 1e-6, residual=residual, backend=backend)[
            0
        ],
        {"x": MATRIX, "residual": MATRIX, "weight": (N,)},
    )
    yield cross_entropy("cross_entropy, ignored rows", some_ignored)
    yield Check(
        "cross_entropy, z_loss",
        lambda logits, target: F.cross_entropy(logits, target) + 1e-2 * logits.logsumexp(-1).square().mean(),
        lambda logits, target, backend: fastattn.cross_entropy(logits, target, z_loss=1e-2, backend=backend),
        {"logits": (M, V)},
        classes,
    )
    yield Check(
        "dropout_add, p = 0",
        lambda x, residual: x + residual,
        lambda x, residual, backend: fastattn.dropout_add(x, residual, 0.0, backend=backend),
        {"x": MATRIX, "residual": MATRIX},
    )


def their_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    return F.layer_norm(x if residual is None else x + residual, (N,), weight, bias)


def our_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, backend: str, residual: Tensor | None = None) -> Tensor:
    if residual is None:
        return fastattn.layer_norm(x, N, weight, bias, backend=backend)
    return fastattn.layer_norm(x, N, weight, bias, residual=residual, backend=backend)[0]


def cross_entropy(name: str, targets: Callable[[torch.device], Tensors] | None = None, **options: Any) -> Check:
    return Check(
        name,
        lambda logits, target: F.cross_entropy(logits, target, **options),
        lambda logits, target, backend: fastattn.cross_entropy(logits, target, **options, backend=backend),
        {"logits": (M, V)},
        targets or classes,
    )


def classes(device: torch.device) -> Tensors:
    return {"target": torch.randint(V, (M,), generator=torch.Generator().manual_seed(7)).to(device)}


def some_ignored(device: torch.device) -> Tensors:
    target = classes(device)["target"]
    target[::5] = -100
    return {"target": target}


def row_mask(device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    torch.randint(V, (M,), generator=generator)  # the classes, which are drawn before
    return {"mask": (torch.rand(MATRIX, generator=generator) > 0.3).to(device)}


def tables(device: torch.device) -> Tensors:
    """cos and sin (S, D / 2), rounded to bfloat16 so that every dtype is given the same angles' table."""
    frequencies = 10_000.0 ** -torch.arange(0, 1, 2 / D, dtype=torch.float64)
    angles = torch.outer(torch.arange(S, dtype=torch.float64), frequencies)
    return {"cos": angles.cos().bfloat16().float().to(device), "sin": angles.sin().bfloat16().float().to(device)}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
