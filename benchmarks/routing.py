"""Whether small calls on CPU tensors go where they are done sooner: the kernels' time against torch's, size by size.

    python -m benchmarks.routing [--compiled | --short] [--out FILE]

Each operation of `fastattn.backends.cpu.routing.SMALL` is timed by both backends, in turns, at sizes around its limit,
forward and with a backward; with `--compiled` each of `SMALL_COMPILED`, alone, in compiled code; with `--short`
attention over sequences around `SHORT` and `FEW_QUERIES`. A limit is right if at most a few calls on its two sides are
slower than they could be.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fastattn
from benchmarks import machine
from fastattn.backends.cpu.routing import SMALL, SMALL_COMPILED

DTYPES = (torch.float32, torch.bfloat16)
SPAN = (0.25, 0.5, 1.0, 2.0, 4.0)  # sizes, in limits
SMALLEST = 4096  # where there is no limit, sizes about this one
SHORT_SHAPES = [
    *((8192 // S, 4, S, S) for S in (4, 7, 8, 9, 12, 16, 24, 25, 32)),  # B, H, S_q, S_k
    *((64, 4, S_q, 500) for S_q in (1, 8, 12, 13, 16)),
    *((4, 4, 4096, S_k) for S_k in (3, 8)),
]
ROUNDS, SECONDS = 15, 0.004


def calls(
    op: str, amount: int, dtype: torch.dtype, gradient: bool, compiled: bool
) -> tuple[Callable[[str], Callable[[], Any]], str | None]:
    """(backend -> a call of `amount` elements, or multiply-adds of q kᵀ; a step where a gradient is wanted), and the
    backend that eager mode takes."""
    N = 256
    x = torch.randn(max(amount // N, 1), N, dtype=dtype, requires_grad=gradient)
    if op == "attention":
        S = max(round((amount / (4 * 32)) ** 0.5), 1)
        inputs = [torch.randn(1, 4, S, 32, dtype=dtype, requires_grad=gradient) for _ in range(3)]
        arguments: list[Any] = list(inputs)
    elif op == "layer_norm":
        weight, bias = (torch.randn(N, dtype=dtype, requires_grad=gradient) for _ in range(2))
        inputs, arguments = [x, weight, bias], [x, N, weight, bias]
    elif op == "rms_norm":
        weight = torch.randn(N, dtype=dtype, requires_grad=gradient)
        inputs, arguments = [x, weight], [x, N, weight]
    elif op == "cross_entropy":
        inputs, arguments = [x], [x, torch.randint(N, (x.shape[0],))]
    elif op == "softmax":
        inputs, arguments = [x], [x]
    else:
        inputs = [x, torch.randn_like(x, requires_grad=gradient)]
        arguments = list(inputs)
    function = getattr(fastattn, op)

    def by(backend: str) -> Callable[[], Any]:
        run = torch.compile(function, dynamic=False) if compiled else function

        def forward() -> Any:
            return run(*arguments, backend=backend)

        dy = forward().detach()
        return (lambda: torch.autograd.grad(forward(), inputs, dy)) if gradient else forward

    return by, None if compiled else fastattn.explain(function, *arguments).backend


def seconds(functions: list[Callable[[], Any]]) -> list[float]:
    """The median time of each, taking turns."""
    counts = []
    for function in functions:
        function()
        begin, n = time.perf_counter(), 0
        while time.perf_counter() - begin < SECONDS:
            function()
            n += 1
        counts.append(n)
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, n, found in zip(functions, counts, times, strict=True):
            begin = time.perf_counter()
            for _ in range(n):
                function()
            found.append((time.perf_counter() - begin) / n)
    return [median(found) for found in times]


def rows(compiled: bool) -> Iterator[dict[str, Any]]:
    for op, limits in (SMALL_COMPILED if compiled else SMALL).items():
        for dtype in DTYPES:
            for gradient in (False, True):
                limit = limits.of(dtype, gradient)
                for factor in SPAN:
                    torch._dynamo.reset()
                    amount = int((limit or SMALLEST) * factor)
                    by, chosen = calls(op, amount, dtype, gradient, compiled)
                    cpu, eager = seconds([by("cpu"), by("eager")])
                    yield {
                        "op": op,
                        "dtype": str(dtype).removeprefix("torch."),
                        "gradient": gradient,
                        "compiled": compiled,
                        "limit": limit,
                        "amount": amount,
                        "cpu_us": round(1e6 * cpu, 2),
                        "eager_us": round(1e6 * eager, 2),
                        "chosen": chosen or ("eager" if amount <= limit else "cpu"),
                    }


def short_rows() -> Iterator[dict[str, Any]]:
    """Attention of many short sequences, or of few queries."""
    for (B, H, S_q, S_k), dtype, gradient in itertools.product(SHORT_SHAPES, DTYPES, (False, True)):
        q = torch.randn(B, H, S_q, 64, dtype=dtype, requires_grad=gradient)
        k, v = (torch.randn(B, H, S_k, 64, dtype=dtype, requires_grad=gradient) for _ in range(2))
        do = torch.randn_like(q)

        def run(backend: str, inputs: tuple = (q, k, v), do: torch.Tensor = do) -> Any:
            o = fastattn.attention(*inputs, backend=backend)
            return torch.autograd.grad(o, inputs, do) if o.requires_grad else o

        cpu, eager = seconds([partial(run, "cpu"), partial(run, "eager")])
        yield {
            "op": "attention",
            "shape": [B, H, S_q, S_k, 64],
            "dtype": str(dtype).removeprefix("torch."),
            "gradient": gradient,
            "amount": B * H * S_q * S_k * 64,
            "cpu_us": round(1e6 * cpu, 2),
            "eager_us": round(1e6 * eager, 2),
            "chosen": fastattn.explain(fastattn.attention, q, k, v).backend,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file to write too")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--compiled", action="store_true", help="under torch.compile")
    which.add_argument("--short", action="store_true", help="short sequences and few queries")
    options = parser.parse_args()
    found = []
    for row in short_rows() if options.short else rows(options.compiled):
        found.append(row)
        ratio = row["eager_us"] / row["cpu_us"]
        best = "cpu" if ratio > 1.0 else "eager"
        loss = max(ratio, 1 / ratio) if best != row["chosen"] else 1.0
        kind = "step" if row["gradient"] else "forward"
        size = str(row.get("shape", row["amount"]))
        print(
            f"{row['op']:<14}{row['dtype']:<9} {kind:<8}{size:>9}  cpu {row['cpu_us']:8.1f} µs  "
            f"eager {row['eager_us']:8.1f} µs  {row['chosen']:<6}" + (f"{loss:.2f}x slower" if loss > 1.1 else ""),
            flush=True,
        )
    if options.out:
        machine.write_rows(found, options.out)


if __name__ == "__main__":
    main()
