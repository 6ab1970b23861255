"""`tune`: times the attention kernels under other tiles on the card that is there, and writes the winners as a diff."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fastattn
from fastattn.cli import arguments
from fastattn.errors import UnsupportedError

if TYPE_CHECKING:
    from fastattn.backends.triton.configs import TileConfig
    from fastattn.backends.triton.tuning import Found

TOKENS, WIDTH, LENGTH = 16_384, 2048, 4096  # B · S, H · D and S of what is timed
SMALL = 300  # queries and keys of what is checked
KERNELS = ("forward", "dq", "dkdv")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("tune", help="find faster tiles for the attention kernels on this GPU")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS), help="default: all")
    parser.add_argument("--head-dim", type=int, nargs="+", choices=(64, 128, 256), default=[64, 128, 256])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--seconds", type=arguments.seconds, default=600.0, help="about as long as it may take; default: 600"
    )
    parser.add_argument(
        "--out", type=arguments.new_file, metavar="FILE", help="write the diff there instead of to the terminal"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """
    Raises:
        UnsupportedError: there is no GPU, or its kernels are interpreted.
    """
    from fastattn import backends

    if not torch.cuda.is_available():
        raise UnsupportedError("tune: torch sees no GPU, and tiles are chosen by the time they take on one.")
    device = torch.device("cuda", torch.cuda.current_device())
    if why := backends.get("triton").available(device):
        raise UnsupportedError(f"tune: the kernels cannot run on {device}: {why}.")
    from fastattn.backends.triton import configs, tuning

    arch, dtype = configs.arch_of(device), getattr(torch, args.dtype)
    if arch == "interpret":
        raise UnsupportedError("tune: TRITON_INTERPRET=1 is set; the time of interpreted kernels says nothing.")
    ends = time.monotonic() + args.seconds
    pairs = [(kernel, D) for D in args.head_dim for kernel in args.kernel]
    found = []
    for left, (kernel, D) in zip(range(len(pairs), 0, -1), pairs, strict=True):
        own_end = time.monotonic() + (ends - time.monotonic()) / left  # what others did not need is there for the rest
        width = min(key for key in configs.table(arch, kernel) if key >= D)
        timed = measure(kernel, D, width, arch, dtype, device)
        result = tuning.search(kernel, width, arch, timed, partial(is_past, own_end))
        report(result, configs.row_of(arch) != arch and arch)
        found.append(result)
        if args.out:
            args.out.write_text(tuning.diff(arch, found))
    if not args.out:
        print(tuning.diff(arch, found) or "The tiles of the table are as fast as any that was tried.")
    return 0


def is_past(end: float) -> bool:
    return time.monotonic() > end


def report(found: Found, unlike: str | bool) -> None:
    best = f"{found.best.config} is {found.gain:.1%} faster" if found.gain else "nothing is faster"
    note = f" (timed on {unlike}, whose row others share)" if unlike and found.gain else ""
    print(f"{found.kernel} {found.width}: {found.before.config}; of {len(found.tried)} tiles {best}{note}", flush=True)


def measure(
    kernel: str, D: int, width: int, arch: str, dtype: torch.dtype, device: torch.device
) -> Callable[[TileConfig], float]:
    """Seconds of forward or backward, causal and full, under a tile: the geometric mean; inf where it is wrong."""
    from triton.testing import do_bench

    from fastattn.backends.triton.tuning import tile_in_table

    small = [call(kernel, 1, 2, SMALL, D, causal, dtype, device) for causal in (False, True)]
    expected = [[t.clone() for t in run()] for run in small]
    large = [call(kernel, TOKENS // LENGTH, WIDTH // D, LENGTH, D, causal, dtype, device) for causal in (False, True)]

    def seconds(cfg: TileConfig) -> float:
        with tile_in_table(arch, kernel, width, cfg):
            try:
                if not all(agree(run(), right, dtype) for run, right in zip(small, expected, strict=True)):
                    print(f"{kernel} {width}: {cfg} computes something else", file=sys.stderr)
                    return math.inf
                times = [do_bench(run, warmup=10, rep=60, return_mode="median") * 1e-3 for run in large]
            except Exception as error:  # a tile that does not compile or does not fit is a tile not taken
                print(f"{kernel} {width}: {cfg}: {type(error).__name__}", file=sys.stderr)
                return math.inf
        return math.sqrt(times[0] * times[1])

    return seconds


def agree(found: tuple[Tensor, ...], right: list[Tensor], dtype: torch.dtype) -> bool:
    """To a few roundings of the largest: two orders of one sum."""
    eps = torch.finfo(dtype).eps
    return all((a - b).abs().max() <= 4 * eps * b.abs().max() for a, b in zip(found, right, strict=True))


def call(
    kernel: str, B: int, H: int, S: int, D: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    """Attention forward, or its gradients, as a call without arguments."""
    q, k, v = (torch.randn(B, H, S, D, dtype=dtype, device=device, requires_grad=kernel != "forward") for _ in range(3))
    if kernel == "forward":
        return lambda: (fastattn.attention(q, k, v, causal=causal, backend="triton"),)
    o = fastattn.attention(q, k, v, causal=causal, backend="triton")
    do = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
