"""Everything that a machine with a GPU can tell, in one command and one folder: `make gpu`.

Needs no installation and no network: it runs from the tree with whatever Python, torch and Triton are there. The folder
holds at most eight files, and what is in it is complete up to the moment at which the time was over.

    environment.txt   versions, devices, driver, backends
    summary.json      each step: its command, outcome and seconds
    tests.log         pytest's output, shortened in the middle
    sanitizer.log     compute-sanitizer's
    results.json, results.csv, report.html   the benchmark
    tune.diff         faster tiles, as a change to the tables
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FASTATTN = (sys.executable, "-m", "fastattn")
LOG_BYTES = 1 << 20  # of each log, half from its beginning and half from its end
WORKERS = 8
GRACE = 60.0  # seconds in which a step whose time is over may write what it has


@dataclass(frozen=True)
class Step:
    """One command. `share`: of the time that is left when it starts, what it may take at most."""

    name: str
    command: tuple[str, ...]
    share: float
    log: str | None = None  # file in the folder; several steps may append to one
    needs: str | None = None  # why it cannot run here
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Outcome:
    name: str
    command: str
    status: str  # ok, failed, timeout, or skipped
    seconds: float
    note: str = ""


def steps(out: Path) -> list[Step]:
    """In the order of what is most needed if time is short."""
    timed = ("--seconds", "{seconds}", "--out")
    return [
        Step("environment", (*FASTATTN, "info"), 0.1, "environment.txt"),
        Step("driver", ("nvidia-smi",), 0.05, "environment.txt", missing("nvidia-smi")),
        Step("build", (*FASTATTN, "build", "--no-triton"), 0.3, "environment.txt"),
        Step("verify", (*FASTATTN, "verify"), 0.2, "tests.log"),
        Step("tests", pytest_command(), 0.5, "tests.log", None if has("pytest") else "pytest is not installed"),
        *(sanitizer(tool) for tool in ("memcheck", "racecheck")),
        Step("bench", (*FASTATTN, "bench", "--no-plots", *timed, str(out)), 0.75, "bench.log"),
        Step("tune", (*FASTATTN, "tune", *timed, str(out / "tune.diff")), 1.0, "bench.log"),
    ]


def sanitizer(tool: str) -> Step:
    """Of the kernels on small tensors, each of which is an allocation of its own, so that its ends are known."""
    verify = (*FASTATTN, "verify", "--backend", "cuda", "triton")
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *verify)
    separate = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Step(f"sanitizer {tool}", command, 0.15, "sanitizer.log", missing("compute-sanitizer"), separate)


def pytest_command() -> tuple[str, ...]:
    parallel = ("-n", str(min(WORKERS, os.cpu_count() or 1))) if has("xdist") else ()
    go_on = "--continue-on-collection-errors"  # of tests for which a package is missing
    return (sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", go_on, *parallel, "tests")


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def missing(program: str) -> str | None:
    return None if shutil.which(program) else f"{program} is not on PATH"


def run_step(step: Step, left: float, logs: Path) -> Outcome:
    """Runs a command for no longer than its share of the time that is left, and kills what it started if it is over."""
    seconds = step.share * left
    command = [part.format(seconds=int(0.9 * seconds)) if "{" in part else part for part in step.command]
    if step.needs:
        return Outcome(step.name, " ".join(command), "skipped", 0.0, step.needs)
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **dict(step.environment)}
    with (logs / (step.log or f"{step.name}.log")).open("ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "ok" if process.wait(seconds) == 0 else "failed"
            note = "" if status == "ok" else f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            stop(process, min(GRACE, 0.1 * seconds))
            status, note = "timeout", f"stopped after {seconds:.0f} s"
    return Outcome(step.name, " ".join(command), status, time.monotonic() - began, note)


def stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """As Ctrl-C would, so that pytest and the benchmark say what they have found; then without asking."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def shorten(text: bytes) -> bytes:
    """The beginning and the end of a log that is too long to keep."""
    if len(text) <= LOG_BYTES:
        return text
    half = LOG_BYTES // 2
    return text[:half] + f"\n[… {len(text) - LOG_BYTES} bytes left out …]\n".encode() + text[-half:]


def keep(logs: Path, out: Path, outcomes: Sequence[Outcome]) -> None:
    """What has been found so far, in the folder; the benchmark and the tuner write theirs by themselves."""
    for half in out.glob("*.tmp"):  # of a file that was being written when its step was stopped
        half.unlink()
    for log in logs.iterdir():
        if log.name != "bench.log":  # its figures are in results.json
            (out / log.name).write_bytes(shorten(log.read_bytes()))
    failed = next((o for o in outcomes if o.name in ("bench", "tune") and o.status == "failed"), None)
    summary: dict[str, object] = {"steps": [asdict(outcome) for outcome in outcomes]}
    if failed is not None:
        summary["bench_log_ends"] = (logs / "bench.log").read_bytes()[-4000:].decode(errors="replace")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("make gpu", description=__doc__.split("\n\n")[0])
    p.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder, emptied first")
    p.add_argument("--budget", type=float, default=3600.0, metavar="SECONDS", help="for everything; default: an hour")
    p.add_argument("--steps", nargs="+", metavar="STEP", help="only these; default: all that can run here")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if a step failed; one that ran out of time or could not run here is said, and is no failure."""
    args = parser().parse_args(argv)
    out, logs = args.out.resolve(), args.out.resolve().parent / f".{args.out.name}-logs"
    for folder in (out, logs):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    # A shell's background job ignores it, and so would all that it starts: see `stop`.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ends = time.monotonic() + args.budget
    planned = [step for step in steps(out) if args.steps is None or step.name.split()[0] in args.steps]
    if not planned:
        names = ", ".join(dict.fromkeys(step.name.split()[0] for step in steps(out)))
        print(f"`--steps` is {' '.join(args.steps)}; the steps are {names}.", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    for step in planned:
        print(f"{step.name} …", flush=True)
        outcome = run_step(step, max(ends - time.monotonic(), 1.0), logs)
        outcomes.append(outcome)
        print(f"{step.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.note}", flush=True)
        keep(logs, out, outcomes)
    shutil.rmtree(logs)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
