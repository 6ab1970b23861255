"""MultiheadAttention with its defaults, which return the weights: fastattn's module against torch's, size by size.

    python -m benchmarks.returned_weights [--lengths 16 64 256 1024] [--out FILE]

Self-attention of a batch of 2, by L, E and heads: in evaluation, in a training step, and in one with dropout. Both take
turns; a row gives the two medians. `fastattn.nn.weights.SMALL` and `LARGE` come from such a run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastattn
from benchmarks import machine, timing

N = 2
LENGTHS, WIDTHS, HEADS = (16, 64, 256, 1024), (64, 256, 1024), (4, 16)
MODES = {"eval": 0.0, "train": 0.0, "dropout": 0.1}  # dropout_p
EFFORT = timing.Effort(seconds=0.4, fewest=5, most=10_000)


def step_of(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    def step() -> None:
        with torch.set_grad_enabled(module.training):
            output, _ = module(x, x, x)
            if module.training:
                output.sum().backward()

    return step


def rows(lengths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for L, E, H in itertools.product(lengths, WIDTHS, HEADS):
        for mode, dropout_p in MODES.items():
            kinds = (fastattn.nn.MultiheadAttention, torch.nn.MultiheadAttention)
            ours, theirs = (kind(E, H, dropout=dropout_p, batch_first=True) for kind in kinds)
            theirs.load_state_dict(ours.state_dict())
            x = torch.randn(N, L, E, requires_grad=mode != "eval")
            modules = {"fastattn": ours.train(mode != "eval"), "torch": theirs.train(mode != "eval")}
            steps = {name: step_of(module, x) for name, module in modules.items()}
            times = timing.measure(steps, torch.device("cpu"), EFFORT)
            milliseconds = {f"{name}_ms": round(1e3 * t.median, 4) for name, t in times.items()}
            yield {"L": L, "E": E, "heads": H, "mode": mode, **milliseconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--out", type=Path, help="a JSON file to write too")
    options = parser.parse_args()
    found = []
    for row in rows(tuple(options.lengths)):
        found.append(row)
        print(
            f"L {row['L']:<5} E {row['E']:<5} heads {row['heads']:<3} {row['mode']:<8}"
            f"fastattn {row['fastattn_ms']:9.3f} ms  torch {row['torch_ms']:9.3f} ms  "
            f"{row['fastattn_ms'] / row['torch_ms']:.2f}",
            flush=True,
        )
    if options.out:
        machine.write_rows(found, options.out)


if __name__ == "__main__":
    main()
