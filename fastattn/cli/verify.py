"""`verify`: each operation on each backend and device that is there, against float64, beside torch's own error."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

import torch

from fastattn import backends
from fastattn.cli import arguments
from fastattn.cli.info import devices, versions
from fastattn.errors import ArgumentError

if TYPE_CHECKING:
    from fastattn.verification import Check, Report

Item = TypeVar("Item")
DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("verify", help="check every operation on this machine against float64")
    parser.add_argument("--backend", nargs="+", choices=backends.ORDER, default=list(backends.ORDER))
    parser.add_argument("--device", nargs="+", choices=[str(device) for device, _ in devices()], help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--op", default="", metavar="SUBSTR", help="only checks whose name contains this")
    parser.add_argument("--details", action="store_true", help="a line for each result and gradient, and each refusal")
    parser.add_argument("--json", type=arguments.new_file, metavar="FILE", help="write every error to this file too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 1 if anything is wrong or failed."""
    from fastattn.verification import checks

    chosen = [check for check in checks() if args.op in check.name]
    if not chosen:
        names = ", ".join(check.name for check in checks())
        raise ArgumentError(f"`--op` is {args.op!r}; no check's name contains it. They are: {names}.")
    began = time.perf_counter()
    print("  ".join(f"{name} {version}" for name, version in versions()))
    reports: list[Report] = []
    for device, description in devices():
        if args.device and str(device) not in args.device:
            continue
        print(f"\n{device}: {description}")
        present = []
        for name in args.backend:
            if why := backends.get(name).available(device):
                print(f"  {name}: not available: {why}")
            else:
                present.append(name)
        if present:
            print(heading())
        for report in examined(chosen, [getattr(torch, name) for name in args.dtype], device, present):
            reports.append(report)
            if lines := told(report, args.details):
                print("\n".join(lines), flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    print(f"\n{verdict(reports, time.perf_counter() - began)}")
    return 1 if any(report.status in ("wrong", "failed") for report in reports) else 0


def examined(
    checks: Sequence[Check], dtypes: Sequence[torch.dtype], device: torch.device, names: Sequence[str]
) -> Iterator[Report]:
    """Those of torch's operations first, then the kernels."""
    from fastattn.verification import examine, prepare

    composite = [name for name in names if backends.get(name).COMPOSITE]
    kernels = [name for name in names if name not in composite]
    cases = []
    with one_thread():
        for check, dtype in progress([(check, dtype) for check in checks for dtype in dtypes]):
            cases.append(prepare(check, dtype, device))
            yield from examine(cases[-1], composite)
    for case in progress(cases if kernels else []):
        yield from examine(case, kernels)


@contextmanager
def one_thread() -> Iterator[None]:
    """Of torch: on a busy machine several would wait for each other, ten times as long as so small tensors take one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # not for each call: torch starts threads anew
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress(items: Sequence[Item]) -> Iterator[Item]:
    for done, item in enumerate(items, start=1):
        yield item
        if sys.stderr.isatty():
            print(f"\r{done}/{len(items)} ", end="" if done < len(items) else "\r", file=sys.stderr, flush=True)


def heading() -> str:
    return f"  {'check':<34}{'dtype':<10}{'backend':<11}{'worst':<9}{'error':>8}{'torch':>8}   in roundings"


def told(report: Report, details: bool) -> list[str]:
    """A line, or with `details` one for each tensor; a refusal is only counted without."""
    start = f"  {report.check:<34}{report.dtype:<10}{report.backend:<11}"
    if report.status == "refused":
        return [f"{start}refused: {report.trouble}"] if details else []
    if report.status == "failed":
        return [f"{start}FAILED: {report.trouble}"]
    assert report.worst is not None
    findings = report.findings if details else [report.worst]
    return [
        f"{start}{f.tensor:<9}{f.error:>8.2f}{f.torch_error:>8.2f}"
        + ("   ok" if f.right else f"   WRONG: at most {f.allowed:.2f} is allowed")
        for f in findings
    ]


def verdict(reports: Sequence[Report], seconds: float) -> str:
    counts = Counter(report.status for report in reports)
    ran = len(reports) - counts["refused"]
    names = len({(report.device, report.backend) for report in reports if report.status != "refused"})
    refused = f"; {counts['refused']} refused by name" if counts["refused"] else ""
    if counts["wrong"] or counts["failed"]:
        outcome = f"{counts['wrong']} wrong and {counts['failed']} failed"
    elif ran:
        outcome = "none further from float64 than twice torch's own or the simulated error and a rounding: ok"
    else:
        outcome = "nothing could run"
    return f"{ran} checks on {names} backends, {outcome}{refused}; {seconds:.1f} s"
