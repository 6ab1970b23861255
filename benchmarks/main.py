"""`python -m fastattn bench`: what to run, and what becomes of it."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch

from benchmarks import families, machine
from benchmarks.ceilings import measure_ceilings
from benchmarks.provider import Provider, choose, discover
from benchmarks.results import Results, Row, write_csv, write_json
from benchmarks.runner import Runner
from benchmarks.summary import standings
from benchmarks.timing import Effort
from benchmarks.workload import Workload
from fastattn.cli import arguments
from fastattn.errors import ArgumentError

INTERRUPTED = 130  # as of what ends by SIGINT
THOROUGH = {"cuda": Effort(seconds=1.0, fewest=10, most=200), "cpu": Effort(seconds=3.0, fewest=7, most=60)}
QUICK = {"cuda": Effort(seconds=0.3, fewest=10, most=50), "cpu": Effort(seconds=0.4, fewest=5, most=20)}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m fastattn bench",
        description="Times fastattn beside every peer that is installed, on workloads whose result each gets right.",
        epilog="Also: bench list, bench compare A.json B.json, bench overhead, bench model --gpus N; each has --help.",
    )
    p.add_argument("family", nargs="*", help="families of workloads (bench list names them); default: all")
    p.add_argument("--vs", nargs="+", default=[], metavar="PROVIDER", help="only these peers, beside fastattn")
    p.add_argument("--quick", action="store_true", help="a few workloads of each family, and fewer rounds")
    p.add_argument("--out", type=Path, metavar="DIR", help="results.json, results.csv, report.html and plots")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--threads", type=arguments.positive, metavar="N", help="threads of torch on a CPU; default: torch's"
    )
    p.add_argument("--seconds", type=arguments.seconds, metavar="S", help="no workload is begun after so many seconds")
    p.add_argument("--no-plots", action="store_true", help="leave out the plots' files; the report has them anyway")
    return p


def run(argv: Sequence[str]) -> int:
    """Exit status: 0; 1 if fastattn was wrong or failed anywhere; 2 for a wrong argument; 130 if interrupted."""
    args = parser().parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("`--device` is cuda, and torch sees no GPU; see `bench list --device cuda`.")
    device = torch.device(args.device)
    known = families.workloads(device, args.quick)
    chosen = families.select(known, args.family)
    providers = choose(args.vs, discover(), args.quick)
    if args.out:
        make_folder(args.out)
    results, interrupted = measure_all(device, chosen, providers, args, argv)
    print_standings(results)
    if args.out:
        write_everything(results, args.out, plots=not args.no_plots)
    if interrupted:
        return INTERRUPTED
    return 1 if any(row.ours and row.status in ("wrong", "failed") for row in results.rows) else 0


def make_folder(path: Path) -> None:
    """
    Raises:
        ArgumentError: it cannot be made, or nothing can be written there; better said before a run than after it.
    """
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"`--out` is {path}, which is a file; it must be a folder, or not be there yet.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ArgumentError(f"`--out` is {path}, where nothing can be written: {error.strerror}.") from None


def measure_all(
    device: torch.device,
    workloads: Sequence[Workload],
    providers: Sequence[Provider],
    args: argparse.Namespace,
    argv: Sequence[str],
) -> tuple[Results, bool]:
    """-> (results, whether they were interrupted)."""
    effort = (QUICK if args.quick else THOROUGH)[device.type]
    dtypes = list(dict.fromkeys(workload.dtype for workload in workloads))
    ceilings = measure_ceilings(device, dtypes)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    results = Results(machine.describe(device), ceilings.as_dict(), list(argv), started)
    print(f"{results.title}, {results.machine['threads']} threads; {describe(results.ceilings)}")
    if (load := results.machine["load"]) and device.type == "cpu" and load > results.machine["device"]["cores"] / 2:
        print(f"Others keep this machine busy: {load:.1f} processes on {results.machine['device']['cores']} cores.")
    began = time.monotonic()
    with machine.Monitor(device) as monitor, progress(len(workloads)) as bar:
        runner = Runner(device, providers, ceilings, effort, monitor)
        for name, why in runner.unavailable.items():
            bar.write(f"{name}: not here: {why}")
        try:
            for done, rows in enumerate(runner.run(workloads), start=1):
                bar.write(table(rows))
                results.rows += rows
                if args.out:
                    write_json(results, args.out / "results.json")
                bar.update()
                if args.seconds is not None and time.monotonic() - began > args.seconds and done < len(workloads):
                    bar.write(f"{len(workloads) - done} workloads left out: {args.seconds:.0f} s are over")
                    break
        except KeyboardInterrupt:
            bar.write("interrupted: what has been measured is kept")
            return results, True
    return results, False


class Lines:
    """Prints what a progress bar would print above itself, on a machine without tqdm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, text: str) -> None:
        print(text, flush=True)

    def update(self) -> None:
        pass


def progress(total: int) -> Any:
    if importlib.util.find_spec("tqdm") is None:
        return Lines()
    from tqdm import tqdm

    return tqdm(total=total, unit="workload", file=sys.stderr, disable=not sys.stderr.isatty())


def describe(ceilings: dict[str, float]) -> str:
    parts = [f"copies {ceilings['bytes_per_s'] / 1e9:.0f} GB/s"]
    for name, value in ceilings.items():
        if name.startswith("flops_per_s_"):
            parts.append(f"multiplies {value / 1e12:.3g} TFLOP/s in {name.removeprefix('flops_per_s_')}")
    return ", ".join(parts)


def table(rows: Sequence[Row]) -> str:
    """The rows of one workload, the fastest first; who is not here is not repeated."""
    first = rows[0]
    lines = [f"\n{first.family}: {first.name}, {first.dtype}, {first.direction}"]
    best = min((row.seconds for row in rows if row.seconds and not row.ours), default=None)
    for row in sorted(rows, key=lambda row: row.seconds or float("inf")):
        if row.status == "ok":
            lines.append(f"  {row.provider:<18}{figures(row, best)}")
        elif row.status in ("wrong", "failed"):
            lines.append(f"  {row.provider:<18}{row.status.upper()}: {row.reason}")
    return "\n".join(lines)


def figures(row: Row, best: float | None) -> str:
    """`best`: seconds of the fastest right peer."""
    assert row.seconds
    spread = ((row.slowest_quarter or 0) - (row.fastest_quarter or 0)) / row.seconds / 2
    rate = f"{row.tflops:9.3g} TFLOP/s" if row.tflops else f"{row.gb_per_s or 0:9.4g} GB/s   "
    roof = f"{row.of_roofline:6.0%} of the roof" if row.of_roofline else ""
    ratio = f"{best / row.seconds:7.2f}x the best peer" if best else ""
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:9.1f} MiB"
    return (
        f"{row.seconds * 1e6:12.1f} µs ±{spread:4.0%}{ratio}{rate}{roof}"
        f"   error {row.error:6.2f} ({row.eager_error:.2f} unfused){peak}"
    )


def print_standings(results: Results) -> None:
    print("\nOurs against the fastest peer of each workload, geometric means:")
    for standing in standings(results):
        print(
            f"  {standing.family:<28}{standing.speedup:6.2f}x   ahead in {standing.won} of {standing.count} workloads"
        )


def write_everything(results: Results, folder: Path, plots: bool) -> None:
    from benchmarks.plots import NO_MATPLOTLIB, available, plots_of, write_plots
    from benchmarks.report import write_report

    write_json(results, folder / "results.json")
    write_csv(results, folder / "results.csv")
    write_report(results, None, folder / "report.html")  # drawing takes time, which a run that is stopped may not have
    drawn = plots_of(results)
    write_report(results, drawn, folder / "report.html")
    if plots:
        write_plots(drawn, folder / "plots")
    if not available():
        print(NO_MATPLOTLIB)
    print(f"\n{folder / 'report.html'}")


def list_everything(argv: Sequence[str]) -> int:
    """`bench list`: families with their workloads, and providers, here or not."""
    p = argparse.ArgumentParser("python -m fastattn bench list", description="Names families and providers.")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(p.parse_args(argv).device)
    counts: dict[str, list[Workload]] = {}
    for workload in families.workloads(device):
        counts.setdefault(workload.family, []).append(workload)
    for family, members in counts.items():
        print(f"{family:<28}{len(members):>4} workloads, {sum(w.quick for w in members)} of them in --quick")
    print()
    for provider in discover():
        print(f"{provider.name:<28}{provider.available(device) or 'available'}")
    return 0
