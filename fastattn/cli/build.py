"""`build`: compiles the kernels for the CPU and the card at hand, ahead of the first call, into the user's caches."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from fastattn import native
from fastattn.cli.progress import Progress
from fastattn.errors import ArgumentError
from fastattn.inspection.report import CARDS
from fastattn.native import archs, cache, plan, workplace
from fastattn.native.errors import BuildFailed, ToolMissing, UnknownArch, UnsafeCache


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "build", help="compile the kernels for this CPU, and for the card that is here or those named"
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="NAME",
        help="for these cards alone; default: FASTATTN_CUDA_ARCHS, else what is here",
    )
    parser.add_argument("--list-archs", action="store_true", help="show what --arch accepts, and compile nothing")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at once; default: one per core")
    parser.add_argument("--cpu", action="store_true", help="compile the kernels for CPU tensors, and nothing else")
    parser.add_argument(
        "--emulator", action="store_true", help="compile the CUDA kernels for the emulator, nothing else"
    )
    parser.add_argument("--no-triton", action="store_true", help="leave Triton's kernels to the first call of each")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.list_archs:
        for name, cards in archs.ACCEPTED.items():
            print(f"{name:<8} {cards}")
        return 0
    if args.jobs is not None and args.jobs < 1:
        raise ArgumentError(f"`--jobs` is {args.jobs}; it must be at least 1.")
    chosen = () if args.emulator or args.cpu else choose(args.arch)
    with_triton = bool(chosen) and not args.no_triton
    if with_triton and interprets():  # a kernel is a Python function there, with nothing to compile
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", "fastattn", *args.argv], env=environment).returncode
    try:
        if not (args.emulator or args.arch):
            build(plan.cpu(), args.jobs)
        if args.emulator:
            build(plan.emulator(), args.jobs)
        if chosen:
            build(plan.cuda(chosen), args.jobs)
    except UnknownArch as error:
        raise ArgumentError(str(error)) from error
    except (ToolMissing, BuildFailed, UnsafeCache) as error:
        print(error, file=sys.stderr)
        return 1
    if not (chosen or args.cpu or args.emulator):
        print("nvidia-smi sees no GPU here; `--arch sm_90a` compiles the CUDA kernels for a card that is elsewhere.")
    return build_triton(chosen, args.jobs) if with_triton else 0


def interprets() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def choose(asked: list[str] | None) -> tuple[str, ...]:
    """The architectures to compile for: those named, those of the environment, or those of the cards here, if any."""
    source, text = "--arch", " ".join(asked or ())
    if not text:
        source, text = "FASTATTN_CUDA_ARCHS", os.environ.get("FASTATTN_CUDA_ARCHS", "")
    if text.strip():
        try:
            return archs.parse(text)
        except UnknownArch as error:
            raise ArgumentError(f"`{source}`: {error}") from error
    return archs.present()


def build(wanted: plan.Plan, jobs: int | None) -> None:
    """Compiles what changed, and says where the module is."""
    start = time.perf_counter()
    fitting = [module for module in native.built(wanted.target) if set(wanted.archs) <= set(module.archs)]
    if fitting:
        built, is_new = fitting[0], False
    else:
        with Progress(f"{wanted.target} kernels") as progress:
            built, is_new = cache.build(wanted, jobs, progress)
    native.forget()
    what = f"{wanted.target} kernels for {', '.join(built.archs)}" if built.archs else f"{wanted.target} kernels"
    how = f"compiled by {built.compiler} in {time.perf_counter() - start:.1f} s" if is_new else "were there already"
    print(f"{what}: {how}\n  {built.path}")
    if is_new and built.target == "cuda":
        with cache.own_workplace(wanted) as folder:
            for phrase in workplace.spilling(wanted, folder):
                print(f"  {phrase}")


def build_triton(chosen: tuple[str, ...], jobs: int | None) -> int:
    """Compiles Triton's kernels, which puts them into Triton's own cache."""
    names = dict.fromkeys(arch.rstrip("a") for arch in chosen)
    known = [name for name in names if name in CARDS]
    if others := [name for name in names if name not in CARDS]:
        print(f"Triton kernels for {', '.join(others)} are compiled when they are first called.")
    if not known:
        return 0
    from fastattn.backends.triton import inspection

    start = time.perf_counter()
    total = sum(len(inspection.collect_cases(arch)) for arch in known)
    failed = []
    with Progress("triton kernels") as progress:
        for done, (case, report) in enumerate(inspection.inspect(known, workers=jobs), start=1):
            progress(done, total)
            if report.error:
                failed.append(f"{report.arch} {case.name}: {report.error.splitlines()[-1]}")
    print(f"triton kernels for {', '.join(known)}: {total - len(failed)} in {time.perf_counter() - start:.1f} s")
    print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
    return 1 if failed else 0
