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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastattn.verification import Check, prepare, row_checks
from fastattn.verification.check import DTYPES, run


@dataclass
class Row:
    op: str
    dtype: str
    tensor: str
    torch_error: float
    fastattn_error: float
    ratio: float


def error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square difference, in roundings of the root mean square of `exact`."""
    size = exact.square().mean().sqrt() * torch.finfo(actual.dtype).eps
    return ((actual.double() - exact).square().mean().sqrt() / size).item()


def rows(check: Check, backend: str | None, device: torch.device) -> Iterator[Row]:
    """Of the result and of each gradient, in each dtype."""
    for dtype in DTYPES:
        case = prepare(check, dtype, device)
        ours = run(partial(check.ours, backend=backend), case.inputs, case.constants, case.dy)
        for tensor, value in case.exact.items():
            errors = error(case.theirs[tensor], value), error(ours[tensor], value)
            ratio = errors[1] / errors[0] if errors[0] else 1.0 if errors[1] == 0.0 else float("inf")
            yield Row(check.name, str(dtype).removeprefix("torch."), tensor, *errors, ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="of fastattn; default: what a call would take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    print(f"{'op':<32}{'dtype':<10}{'tensor':<10}{'torch':>9}{'fastattn':>10}{'ratio':>7}")
    for row in (row for check in row_checks() for row in rows(check, args.backend, device)):
        print(
            f"{row.op:<32}{row.dtype:<10}{row.tensor:<10}{row.torch_error:>9.3f}{row.fastattn_error:>10.3f}"
            f"{row.ratio:>7.2f}",
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
