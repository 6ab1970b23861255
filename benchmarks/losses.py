"""linear_cross_entropy beside torch's linear + cross_entropy and linear_cross_entropy: time and peak memory.

    python benchmarks/losses.py --tokens 8192 --hidden 4096 --classes 131072

The contestants take turns, and the median of each is printed. Peak memory, on a GPU, is what one step takes beyond the
inputs. On a CPU nothing of fastattn's kernels runs: it is torch against torch, and the table says which backend did.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def contestants() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "fastattn": fastattn.linear_cross_entropy,
        "torch linear + cross_entropy": lambda h, w, t: F.cross_entropy(F.linear(h, w), t),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch linear_cross_entropy, chunked"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)
    return found


def step(loss: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[float, int]:
    """Seconds and peak bytes of one forward and backward; bytes are 0 on a CPU."""
    gpu = hidden.is_cuda
    hidden.grad = weight.grad = None
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    loss(hidden, weight, target).backward()
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() - before if gpu else 0


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192 if gpu else 256)
    parser.add_argument("--hidden", type=int, default=4096 if gpu else 128)
    parser.add_argument("--classes", type=int, default=131_072 if gpu else 4096)
    parser.add_argument("--repeats", type=int, default=20 if gpu else 5)
    args = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(args.classes, args.hidden, device=device, dtype=dtype) * 0.02).requires_grad_()
    target = torch.randint(args.classes, (args.tokens,), device=device)
    print(fastattn.explain(fastattn.linear_cross_entropy, hidden, weight, target))

    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in contestants()}
    for repeat in range(args.repeats + 2):
        for name, loss in contestants().items():
            measured = step(loss, hidden, weight, target)
            if repeat > 1:
                runs[name].append(measured)
    print(f"{args.tokens} tokens, {args.hidden} wide, {args.classes} classes, {dtype}, {device}: forward and backward")
    for name, measured_runs in runs.items():
        seconds = statistics.median(s for s, _ in measured_runs)
        peak = f"{max(b for _, b in measured_runs) / 2**20:9.0f} MiB" if gpu else "not measured on a CPU"
        print(f"  {name:<38} {seconds * 1e3:9.2f} ms   {peak}")


if __name__ == "__main__":
    main()
