"""What a call costs before any arithmetic: µs per eager call on tiny CPU tensors, and the time `import fastattn` adds.

Each function of fastattn is timed against torch's in alternating rounds, so that both see the same machine; the figures
are medians over the rounds, and the ratio is the median of the ratios within a round.

    python -m fastattn bench overhead
    python -m fastattn bench overhead --rounds 200 --json overhead.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.cli import arguments

Call = Callable[[], object]


@dataclass
class Row:
    function: str
    mode: str
    torch_us: float
    fastattn_us: float
    ratio: float


def pairs() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    """name -> (torch's function, ours, the tensors both are given)."""
    heads = [torch.randn(1, 1, 4, 8) for _ in range(3)]  # q, k, v (B, H, S, D)
    x, weight, bias = torch.randn(4, 8), torch.randn(8), torch.randn(8)
    return {
        "attention": (
            F.scaled_dot_product_attention,
            fastattn.attention,
            heads,
        ),
        "attention, causal": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            lambda q, k, v: fastattn.attention(q, k, v, causal=True),
            heads,
        ),
        "scaled_dot_product_attention": (
            F.scaled_dot_product_attention,
            fastattn.scaled_dot_product_attention,
            heads,
        ),
        "layer_norm": (
            lambda x, weight, bias: F.layer_norm(x, (8,), weight, bias),
            lambda x, weight, bias: fastattn.layer_norm(x, (8,), weight, bias),
            [x, weight, bias],
        ),
        "softmax": (
            lambda x: F.softmax(x, -1),
            lambda x: fastattn.softmax(x, -1),
            [x],
        ),
    }


def modes(function: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Call]:
    """How a function is called: without a graph, building one, and through it and back."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    dy = torch.ones_like(function(*tensors))

    def forward_backward() -> object:
        return torch.autograd.grad(function(*leaves), leaves, dy)

    return {
        "no grad": lambda: function(*tensors),
        "grad": lambda: function(*leaves),
        "forward + backward": forward_backward,
    }


def microseconds(call: Call, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats * 1e6


def compare(theirs: Call, ours: Call, rounds: int, repeats: int) -> tuple[float, float, float]:
    """Medians over alternating rounds: µs of theirs, µs of ours, ours / theirs."""
    for call in (theirs, ours):
        microseconds(call, repeats)
    timings = [(microseconds(theirs, repeats), microseconds(ours, repeats)) for _ in range(rounds)]
    torch_us, fastattn_us = (median(column) for column in zip(*timings, strict=True))
    return torch_us, fastattn_us, median(ours_us / theirs_us for theirs_us, ours_us in timings)


def import_milliseconds(rounds: int) -> float:
    """Median time of `import fastattn` in a fresh interpreter that has already imported torch."""
    script = "import torch, time; t = time.perf_counter(); import fastattn; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        for _ in range(rounds)
    ]
    return median(float(run.stdout) for run in runs) * 1e3


def measure(rounds: int, repeats: int) -> list[Row]:
    rows = []
    for name, (theirs, ours, tensors) in pairs().items():
        our_modes = modes(ours, tensors)
        for mode, their_call in modes(theirs, tensors).items():
            rows.append(Row(name, mode, *compare(their_call, our_modes[mode], rounds, repeats)))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m fastattn bench overhead", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=arguments.positive, default=60, help="alternating rounds for each row")
    parser.add_argument("--repeats", type=arguments.positive, default=200, help="calls in a round")
    parser.add_argument("--json", type=arguments.new_file, metavar="FILE", help="also write the figures there")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    rows = measure(args.rounds, args.repeats)
    import_ms = import_milliseconds(min(args.rounds, 5))
    print(f"{'function':<30}{'mode':<20}{'torch µs':>10}{'fastattn µs':>13}{'ratio':>8}")
    for row in rows:
        print(f"{row.function:<30}{row.mode:<20}{row.torch_us:>10.2f}{row.fastattn_us:>13.2f}{row.ratio:>8.2f}")
    print(f"\nimport fastattn adds {import_ms:.0f} ms to import torch")
    if args.json:
        machine = {"processor": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
        figures = {"machine": machine, "import_ms": import_ms, "calls": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0
