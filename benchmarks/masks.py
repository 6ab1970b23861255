"""What a bool mask costs, and what its empty tiles save: fused attention with a mask, without one, and torch's.

Two masks: documents packed into one sequence (each attends to itself, causally), and random blocks of which a given
part is kept. Everywhere it prints which part of the tiles each kernel visits, in part under the mask and as a whole
without it, with the tiles of the GPU that is there, or else of an H100. On a GPU it also times forward + backward:
every result is held to the reference before its time is printed; a time is a median over rounds that alternate between
the contestants, and a speed-up is the median of the ratios within a round.

    python benchmarks/masks.py                        # B 4, H 16, S 4096, D 64, bfloat16
    TRITON_INTERPRET=1 python benchmarks/masks.py     # on a CPU: the tiles alone, listed by the interpreted kernel
    python benchmarks/masks.py --documents 16 --kept 0.1 --json masks.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.backends.triton.configs import arch_of, backward_config, forward_config
from fastattn.backends.triton.mask_tiles import mask_tiles
from fastattn.spec import AttentionInputs, AttentionSpec
from fastattn.testing import max_error

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ARCH = arch_of(DEVICE) if GPU else "sm_90"
BLOCK = 128  # edge of a random block


@dataclass
class Tiles:
    mask: str
    visible: float  # part of the entries that may be attended to
    kernel: str
    partial: float  # part of the tiles that is visited under the mask
    whole: float  # part that is visited without it

    @property
    def bound(self) -> float:
        """The speed-up, if a visited tile cost what it costs without a mask, and the lists nothing."""
        return 1 / (self.partial + self.whole)


@dataclass
class Time:
    mask: str
    contestant: str
    ms: float
    speedup: float  # over fused attention without a mask


def document_mask(S: int, documents: int) -> Tensor:
    """(S, S): causal within documents of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randperm(S - 1, generator=generator)[: documents - 1].sort().values + 1
    document = torch.bucketize(torch.arange(S), ends, right=True).to(DEVICE)
    return (document[:, None] == document).tril()


def block_mask(S: int, kept: float) -> Tensor:
    """(S, S): blocks of BLOCK², each kept with this probability; those of the diagonal always."""
    n = -(-S // BLOCK)
    blocks = torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < kept
    blocks |= torch.eye(n, dtype=torch.bool)
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:S, :S].to(DEVICE)


def tiles(name: str, mask: Tensor, D: int, dtype: torch.dtype) -> list[Tiles]:
    """What the lists of each kernel hold."""
    S = mask.shape[-1]
    q = torch.empty(1, 1, S, D, dtype=dtype, device=DEVICE)
    x = AttentionInputs(q, q, q, mask=mask[None, None])
    spec = AttentionSpec(1, 1, D, D, dtype, D**-0.5, mask=True)
    backward = backward_config(ARCH, D, D, dtype)
    found = []
    for kernel, cfg in (("forward", forward_config(ARCH, D, D, dtype)), ("dq", backward.dq), ("dk, dv", backward.dkdv)):
        lists = mask_tiles(x, spec, cfg, by_key=kernel == "dk, dv")
        total = lists["TILES"].shape[0] * lists["n_across"]
        in_part, whole = (n / total for n in lists["TILES"][:, :2].sum(0).tolist())
        found.append(Tiles(name, mask.float().mean().item(), f"{kernel} {cfg.BLOCK_M}x{cfg.BLOCK_N}", in_part, whole))
    return found


def trained(function: Callable, inputs: list[Tensor], do: Tensor, **options: Tensor) -> Callable[[], Tensor]:
    """One forward and backward."""

    def run() -> Tensor:
        o = function(*inputs, **options)
        torch.autograd.grad(o, inputs, do)
        return o

    return run


def seconds(run: Callable[[], Tensor]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def check(o: Tensor, mask: Tensor | None, inputs: list[Tensor]) -> None:
    """No time is printed for a wrong result: one head, against float64."""
    q, k, v = (t[:1, :1].detach().double() for t in inputs)
    exact = fastattn.attention(q, k, v, mask=mask, backend="reference")
    if (error := max_error(o[:1, :1], exact)) > 4 * torch.finfo(o.dtype).eps:
        raise SystemExit(f"A result is {error:.2g} from float64.")


def times(name: str, mask: Tensor, B: int, H: int, D: int, dtype: torch.dtype, rounds: int) -> list[Time]:
    q, k, v, do = (torch.randn(B, H, mask.shape[-1], D, device=DEVICE, dtype=dtype) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    fused = partial(fastattn.attention, backend="triton")
    contestants = {
        "fastattn, no mask": (trained(fused, inputs, do), None),
        "fastattn, mask": (trained(fused, inputs, do, mask=mask), mask),
        "torch SDPA, mask": (trained(F.scaled_dot_product_attention, inputs, do, attn_mask=mask), mask),
    }
    for run, own in contestants.values():
        check(run(), own, inputs)
    rows = [[seconds(run) for run, _ in contestants.values()] for _ in range(rounds)]
    return [
        Time(name, contestant, 1e3 * median(row[i] for row in rows), median(row[0] / row[i] for row in rows))
        for i, contestant in enumerate(contestants)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--kept", type=float, default=0.25, help="part of the random blocks that is kept")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    a = parser.parse_args()
    masks = {
        f"{a.documents} documents, causal": document_mask(a.seqlen, a.documents),
        f"random blocks of {BLOCK}, {a.kept:.0%}": block_mask(a.seqlen, a.kept),
    }
    device = torch.cuda.get_device_name() if GPU else f"no GPU, tiles of {ARCH}"
    print(f"torch {torch.__version__}, {device}; B {a.batch}, H {a.heads}, S {a.seqlen}, D {a.head_dim}")
    report: dict[str, list] = {"tiles": [], "times": []}
    print(f"{'mask':<32}{'visible':>8}  {'kernel, tile':<16}{'in part':>8}{'whole':>8}{'at most':>9}")
    for name, mask in masks.items():
        for t in tiles(name, mask, a.head_dim, torch.bfloat16):
            print(f"{t.mask:<32}{t.visible:>8.1%}  {t.kernel:<16}{t.partial:>8.1%}{t.whole:>8.1%}{t.bound:>8.1f}x")
            report["tiles"].append(asdict(t))
    for name, mask in masks.items() if GPU else ():
        for row in times(name, mask, a.batch, a.heads, a.head_dim, torch.bfloat16, a.rounds):
            print(f"{row.mask:<32}{row.contestant:<20}{row.ms:>10.2f} ms{row.speedup:>8.2f}x")
            report["times"].append(asdict(row))
    if a.json:
        a.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
