"""`inspect`: compiles every kernel ahead of time, for cards that need not be there, and shows the result."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from fastattn.cli.progress import Progress
from fastattn.errors import ArgumentError
from fastattn.inspection import cuda
from fastattn.inspection.report import CARDS, Case, Report, violations
from fastattn.native import toolchain
from fastattn.native.errors import BuildFailed, UnknownArch, UnsafeCache

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("inspect", help="registers, spills, shared memory and instructions of every kernel")
    parser.add_argument("--arch", nargs="+", choices=(*ARCHS, "all"), default=["all"], help="default: all")
    parser.add_argument("--kind", choices=("triton", "cuda"), help="only Triton's kernels, or those that nvcc compiles")
    parser.add_argument("--filter", default="", metavar="SUBSTR", help="only kernels whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports to this file too")
    parser.add_argument("--check", action="store_true", help="list what is over budget; exit with status 1 if any is")
    parser.add_argument("--module", nargs="+", help="take these modules' inspect_cases(arch) instead of all kernels")
    parser.add_argument("--workers", type=int, help="compiler processes; default: one per core, at most 4")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Result:
    case: Case
    report: Report
    violations: list[str]


def run(args: argparse.Namespace) -> int:
    archs = [arch for arch in ARCHS if arch in args.arch or "all" in args.arch]
    versions: dict[str, str] = {}
    names: list[str] = []
    results: list[Result] = []
    if args.kind != "cuda":
        import triton

        if triton.knobs.runtime.interpret:
            # Under the interpreter a kernel is a Python function, with nothing to compile.
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            return subprocess.run([sys.executable, "-m", "fastattn", *args.argv], env=environment).returncode
        versions["triton"] = triton.__version__
        inspect_triton(args, archs, names, results)
    if args.kind == "cuda" or (args.kind is None and not args.module):
        if why := cuda.why_not():
            print(f"CUDA kernels are left out: {why}", file=sys.stderr)
            if args.kind == "cuda":
                return 1
        else:
            versions["nvcc"] = toolchain.find_nvcc().short_version()
            try:
                inspect_cuda(args, archs, names, results)
            except (BuildFailed, UnknownArch, UnsafeCache) as error:
                print(f"CUDA kernels cannot be inspected: {error}", file=sys.stderr)
                return 1
    if not names:
        raise ArgumentError(f"`--arch` is {' '.join(archs)}; CUDA kernels are for {' and '.join(cuda.TARGETS)}.")
    if not results:
        listed = ", ".join(dict.fromkeys(names))
        raise ArgumentError(f"`--filter` is {args.filter!r}; no kernel's name contains it. They are: {listed}.")

    for arch in archs:
        if chosen := [result for result in results if result.report.arch == arch]:
            print(f"{arch} ({CARDS[arch].title})\n{table(chosen)}\n")
    if args.json:
        args.json.write_text(json.dumps({**versions, "reports": [*map(as_json, results)]}, indent=1))
    broken = [f"{r.report.arch} {r.case.name}: {phrase}" for r in results for phrase in r.violations]
    if args.check:
        print("\n".join(broken) or f"{len(results)} reports, all within budget", file=sys.stderr)
    return 1 if args.check and broken else 0


def inspect_triton(args: argparse.Namespace, archs: list[str], names: list[str], results: list[Result]) -> None:
    from fastattn.backends.triton import inspection

    modules = args.module or inspection.MODULES
    names += [case.name for arch in archs for case in inspection.collect_cases(arch, modules)]
    total = sum(args.filter in name for name in names)
    with Progress("triton kernels") as progress:
        for case, report in inspection.inspect(archs, args.filter, modules, args.workers):
            results.append(Result(case, report, violations(report, case)))
            progress(len(results), total)


def inspect_cuda(args: argparse.Namespace, archs: list[str], names: list[str], results: list[Result]) -> None:
    for arch in archs:
        if arch in cuda.TARGETS:
            with Progress(f"cuda kernels for {arch}") as progress:
                for case, report in cuda.inspect(arch, jobs=args.workers, progress=progress):
                    names.append(case.name)
                    if args.filter in case.name:
                        results.append(Result(case, report, violations(report, case)))


def as_json(result: Result) -> dict[str, object]:
    return {**asdict(result.report), "budget": result.case.budget, "violations": result.violations}


COLUMNS = (
    *("kernel", "registers", "stack", "shared KiB", "tmem", "blocks/SM", "warps", "tensor core", "exp2"),
    *("128-bit loads", "TMA loads", "stores", "STSM", "instructions", "budget"),
)
LEFT_ALIGNED = ("kernel", "tensor core", "budget")


def table(results: list[Result]) -> str:
    """One aligned line for each result. A column that is empty for all of them is left out."""
    rows = [row(result) for result in results]
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in LEFT_ALIGNED else cell.rjust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def row(result: Result) -> dict[str, str]:
    """The cells of one line, by column."""
    r = result.report
    verdict = "; ".join(result.violations)
    if r.error:
        return {"kernel": r.name, "budget": verdict}
    cells = {
        "kernel": r.name,
        "registers": str(r.registers),
        "stack": str(r.stack),
        "shared KiB": f"{r.shared / 1024:.1f}",
        "blocks/SM": str(r.blocks),
        "warps": f"{r.occupancy:.0%}",
        "128-bit loads": f"{r.wide_loads}/{r.loads}",
        "stores": f"{r.wide_stores}/{r.stores}",
        "instructions": str(r.instructions),
        "budget": verdict or ("listed" if result.case.budget == "listed" else "ok"),
    }
    if r.tensor_memory:
        cells["tmem"] = str(r.tensor_memory)
    if r.tensor_core:
        cells["tensor core"] = " ".join(f"{count} {opcode}" for opcode, count in r.tensor_core.items())
    for column, count in (("exp2", r.exp2), ("TMA loads", r.tma_loads), ("STSM", r.matrix_stores)):
        if count:
            cells[column] = str(count)
    return cells
