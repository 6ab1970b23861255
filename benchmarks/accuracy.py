"""How far each row operation is from float64, and how far torch's operation of the same dtype is, on the same inputs.

One row a tensor: the result and each gradient. The error is the root mean square of the difference to torch's operation
in float64, in units of a rounding of the tensor's root mean square: about 0.2 where each result is the nearest number.
The ratio is ours over torch's, 1 where both are 0.

    python benchmarks/accuracy.py                                      # what a call would run here
    TRITON_INTERPRET=1 python benchmarks/accuracy.py --backend triton  # the kernels, without a GPU
    python benchmarks/accuracy.py --json accuracy.json
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

Function = Callable[..., Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Row:
    op: str
    dtype: str
    tensor: str
    torch_error: float
    fastattn_error: float
    ratio: float


@dataclass(frozen=True)
class Op:
    """torch's way and ours to compute one thing, differentiable in the tensors of these shapes."""

    theirs: Function
    ours: Function
    shapes: Mapping[str, tuple[int, ...]]


M, N, V = 96, 1000, 3000
HEADS = (2, 4, 32, 64)  # B, H, S, D


def rotate(x: Tensor) -> Tensor:
    cos, sin = (t.to(x.dtype) for t in tables(x.device))
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (S, D / 2), rounded to bfloat16 so that every dtype is given the same angles' table."""
    S, D = HEADS[2:]
    angles = torch.outer(
        torch.arange(S, dtype=torch.float64), 10000.0 ** -torch.arange(0, 1, 2 / D, dtype=torch.float64)
    )
    return angles.cos().bfloat16().float().to(device), angles.sin().bfloat16().float().to(device)


def ops(backend: str | None, device: torch.device) -> dict[str, Op]:
    generator = torch.Generator().manual_seed(7)
    target = torch.randint(V, (M,), generator=generator).to(device)
    mask = (torch.rand(M, N, generator=generator) > 0.3).to(device)
    row, affine = {"x": (M, N)}, {"x": (M, N), "weight": (N,), "bias": (N,)}
    options: dict[str, Any] = {"backend": backend}
    return {
        "layer_norm": Op(
            lambda x, weight, bias: F.layer_norm(x, (N,), weight, bias),
            lambda x, weight, bias: fastattn.layer_norm(x, N, weight, bias, **options),
            affine,
        ),
        "layer_norm, long rows": Op(
            lambda x: F.layer_norm(x, (20_000,)),
            lambda x: fastattn.layer_norm(x, 20_000, **options),
            {"x": (64, 20_000)},
        ),
        "layer_norm of x + residual": Op(
            lambda x, residual, weight, bias: F.layer_norm(x + residual, (N,), weight, bias),
            lambda x, residual, weight, bias: fastattn.layer_norm(
                x, N, weight, bias, residual=residual, **options
            )[0],
            {"x": (M, N), "residual": (M, N), "weight": (N,), "bias": (N,)},
        ),
        "rms_norm": Op(
            lambda x, weight: F.rms_norm(x, (N,), weight, 1e-6),
            lambda x, weight: fastattn.rms_norm(x, N, weight, 1e-6, **options),
            {"x": (M, N), "weight": (N,)},
        ),
        "softmax": Op(lambda x: torch.softmax(x, -1), lambda x: fastattn.softmax(x, **options), row),
        "log_softmax": Op(lambda x: torch.log_softmax(x, -1), lambda x: fastattn.log_softmax(x, **options), row),
        "softmax, scale and mask": Op(
            lambda x: torch.softmax((x * 0.125).masked_fill(~mask, -torch.inf), -1),
            lambda x: fastattn.softmax(x, scale=0.125, mask=mask, **options),
            row,
        ),
        "cross_entropy": Op(
            lambda logits: F.cross_entropy(logits, target),
            lambda logits: fastattn.cross_entropy(logits, target, **options),
            {"logits": (M, V)},
        ),
        "cross_entropy, label smoothing": Op(
            lambda logits: F.cross_entropy(logits, target, label_smoothing=0.1),
            lambda logits: fastattn.cross_entropy(logits, target, label_smoothing=0.1, **options),
            {"logits": (M, V)},
        ),
        "linear_cross_entropy": Op(
            lambda hidden, weight: F.cross_entropy(hidden @ weight.T, target),
            lambda hidden, weight: fastattn.linear_cross_entropy(hidden, weight, target, **options),
            {"hidden": (M, 64), "weight": (V, 64)},
        ),
        "rotary_embedding": Op(
            rotate, lambda x: fastattn.rotary_embedding(x, *tables(x.device), **options), {"x": HEADS}
        ),
        "swiglu": Op(
            lambda gate, up: F.silu(gate) * up,
            lambda gate, up: fastattn.swiglu(gate, up, **options),
            {"gate": (M, N), "up": (M, N)},
        ),
        "geglu": Op(
            lambda gate, up: F.gelu(gate) * up,
            lambda gate, up: fastattn.geglu(gate, up, **options),
            {"gate": (M, N), "up": (M, N)},
        ),
        "geglu, tanh": Op(
            lambda gate, up: F.gelu(gate, approximate="tanh") * up,
            lambda gate, up: fastattn.geglu(gate, up, approximate="tanh", **options),
            {"gate": (M, N), "up": (M, N)},
        ),
    }  # fmt: skip


def run(function: Function, inputs: dict[str, Tensor], dy: Tensor | None) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = function(**leaves)
    dy = torch.ones_like(y) if dy is None or y.dim() == 0 else dy.to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square difference, in roundings of the root mean square of `exact`."""
    size = exact.square().mean().sqrt() * torch.finfo(actual.dtype).eps
    return ((actual.double() - exact).square().mean().sqrt() / size).item()


def rows(backend: str | None, device: torch.device, only: str | None = None) -> Iterator[Row]:
    for name, op in ops(backend, device).items():
        if only not in (None, name):
            continue
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(0)
            inputs = {
                argument: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
                for argument, shape in op.shapes.items()
            }
            dy = torch.randn(next(iter(op.shapes.values())), generator=generator, dtype=torch.float64).to(device, dtype)
            exact = run(op.theirs, {argument: t.double() for argument, t in inputs.items()}, dy)
            theirs, ours = run(op.theirs, inputs, dy), run(op.ours, inputs, dy)
            for tensor, value in exact.items():
                errors = error(theirs[tensor], value), error(ours[tensor], value)
                ratio = errors[1] / errors[0] if errors[0] else 1.0 if errors[1] == 0.0 else float("inf")
                yield Row(name, str(dtype).removeprefix("torch."), tensor, *errors, ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="of fastattn; default: what a call would take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    print(f"{'op':<32}{'dtype':<10}{'tensor':<10}{'torch':>9}{'fastattn':>10}{'ratio':>7}")
    for row in rows(args.backend, device):
        print(
            f"{row.op:<32}{row.dtype:<10}{row.tensor:<10}{row.torch_error:>9.3f}{row.fastattn_error:>10.3f}{row.ratio:>7.2f}",
            flush=True,
        )
        results.append(row)
    if args.json:
        facts = {
            "torch": torch.__version__,
            "device": str(device),
            "machine": platform.machine(),
            "backend": args.backend,
        }
        args.json.write_text(json.dumps({**facts, "rows": [asdict(row) for row in results]}, indent=1))


if __name__ == "__main__":
    main()
