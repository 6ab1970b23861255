"""linear_cross_entropy beside torch's linear + cross_entropy and linear_cross_entropy: time and peak memory.

    python benchmarks/losses.py --tokens 8192 --hidden 4096 --classes 131072

The contestants take turns, and the median of each is printed. Peak memory is what one step takes beyond the inputs,
gradients included: on a GPU by torch's allocator, on a CPU the tensors alive at once that torch's operations made. On a
CPU nothing of fastattn's kernels runs, but with TRITON_INTERPRET=1, whose time says nothing: it is torch against torch,
and the table says which backend did.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn

STORES = (Tensor, torch.UntypedStorage)
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


def storages(tree: Any) -> set[torch.UntypedStorage]:
    leaves = tree_leaves(tree)
    return {t.untyped_storage() if isinstance(t, Tensor) else t for t in leaves if isinstance(t, STORES)}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            out = func(*args, **(kwargs or {}))
        else:  # an operator written in Python: what it calls is counted too
            with self:
                out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        for storage in storages(out) - storages((args, kwargs)) - set(self.known):
            self.known.add(storage)
            weakref.finalize(storage, self.add, -storage.nbytes())
            self.add(storage.nbytes())
        return out

    def add(self, n: int) -> None:
        self.live += n
        self.peak = max(self.peak, self.live)


def seconds_of_step(loss: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> float:
    """One forward and backward."""
    hidden.grad = weight.grad = None
    synchronize = torch.cuda.synchronize if hidden.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    loss(hidden, weight, target).backward()
    synchronize()
    return time.perf_counter() - start


def peak_of_step(loss: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> int:
    """Bytes of one forward and backward."""
    hidden.grad = weight.grad = None
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(hidden, weight, target).backward()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as bytes_:
        loss(hidden, weight, target).backward()
    return bytes_.peak


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

    runs: dict[str, list[float]] = {name: [] for name in contestants()}
    for repeat in range(args.repeats + 2):
        for name, loss in contestants().items():
            seconds = seconds_of_step(loss, hidden, weight, target)
            if repeat > 1:
                runs[name].append(seconds)
    print(f"{args.tokens} tokens, {args.hidden} wide, {args.classes} classes, {dtype}, {device}: forward and backward")
    for name, loss in contestants().items():
        peak = peak_of_step(loss, hidden, weight, target) / 2**20
        print(f"  {name:<38} {statistics.median(runs[name]) * 1e3:9.2f} ms   {peak:9.1f} MiB")


if __name__ == "__main__":
    main()
