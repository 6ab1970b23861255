"""Runs a plan in a folder of its own by ninja: a copy of the sources, the objects, and the module linked from them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path

from . import ptxas, toolchain
from .errors import BuildFailed
from .plan import Plan

Progress = Callable[[int, int], None]  # steps done, steps to do
STATUS = re.compile(r"^\[(\d+)/(\d+)\] ")
FAILED = re.compile(r"^FAILED: (?:\[code=\d+\] )?(\S+)")
CHATTER = re.compile(r"ptxas info +:|    \d+ bytes stack frame|\d+ errors? detected in the compilation|\s*$")

# A log is kept for every object: ptxas reports registers and spills there, and says them only once.
RULES = """ninja_required_version = 1.5
rule compile
  command = $compiler -MD -MF $out.d -c $in -o $out > $out.log 2>&1
  description = $in
  depfile = $out.d
  deps = gcc
rule link
  command = $linker $in -o $out > $out.log 2>&1
  description = $out
"""


def jobs_available() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(plan: Plan, folder: Path, jobs: int | None = None, progress: Progress | None = None) -> Path:
    """Brings the folder up to date with the plan, compiling only what changed; returns the module's path in it.

    Nobody else may use the folder meanwhile.
    """
    if not any(unit.source.startswith("bindings_") for unit in plan.units):
        raise BuildFailed("csrc/bindings_cuda.cpp is missing: there would be no module")
    prepare(plan, folder)
    if failed := _ninja(folder, "module", jobs, progress):
        name, log = next(iter(failed.items()))
        raise BuildFailed(f"{name} does not compile:\n{log}")
    if broken := [f"{source}: {line}" for source, lines in broken_kernels(plan, folder).items() for line in lines]:
        raise BuildFailed("ptxas warns of what makes these kernels slow or wrong:\n" + "\n".join(broken))
    return folder / plan.filename


def run_kernels(plan: Plan, folder: Path, jobs: int | None = None, progress: Progress | None = None) -> dict[str, str]:
    """Compiles the kernels alone, those that compile although others do not; source -> what is wrong with it."""
    if not any(unit.is_kernel for unit in plan.units):
        return {}
    prepare(plan, folder)
    failed = _ninja(folder, "kernels", jobs, progress, keep_going=True)
    broken = broken_kernels(plan, folder, leave_out=failed)
    return failed | {source: "\n".join(lines) for source, lines in broken.items()}


def prepare(plan: Plan, folder: Path) -> None:
    sync_sources(plan, folder / "csrc")
    _write_if_changed(folder / "build.ninja", build_file(plan).encode())


def sync_sources(plan: Plan, folder: Path) -> None:
    """Makes the folder hold exactly the plan's sources. What is unchanged keeps its time, or ninja would rebuild it.

    A copy, because ninja goes by times: sources that were replaced by older ones would be taken for compiled.
    """
    for name, content in plan.sources.items():
        _write_if_changed(folder / name, content)
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in plan.sources:
            path.unlink()


def _write_if_changed(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def build_file(plan: Plan) -> str:
    """The text of build.ninja."""
    lines = [RULES]
    for unit in plan.units:
        command = _escape(shlex.join(unit.command))
        lines.append(f"build {unit.object}: compile csrc/{unit.source}\n  compiler = {command}")
    objects = " ".join(unit.object for unit in plan.units)
    kernels = " ".join(unit.object for unit in plan.units if unit.is_kernel)
    lines.append(f"build {plan.filename}: link {objects}\n  linker = {_escape(shlex.join(plan.link))}")
    lines.append(f"build module: phony {plan.filename}\nbuild kernels: phony {kernels}\n")
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def _ninja(
    folder: Path, target: str, jobs: int | None, progress: Progress | None, keep_going: bool = False
) -> dict[str, str]:
    """Runs ninja; source or module -> what the compiler said, of each step that failed."""
    # A make above would hand its own job server on, and --jobs would mean nothing.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    environment |= {"NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
    command = [toolchain.find_ninja(), "-C", str(folder), "-j", str(jobs or jobs_available())]
    command += [*(["-k", "0"] if keep_going else []), target]
    said, outputs = [], []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if found := STATUS.match(line):
                if progress is not None:
                    progress(int(found[1]), int(found[2]))
            elif found := FAILED.match(line):
                outputs.append(found[1])
    if process.returncode and not outputs:
        raise BuildFailed(f"ninja stopped: {''.join(said).strip()}")
    return {output.removeprefix("obj/").removesuffix(".o"): _said(folder / f"{output}.log") for output in outputs}


def _said(log: Path) -> str:
    """A compiler's log without what ptxas only informs of."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join(line for line in lines if not CHATTER.match(line))


def logs(plan: Plan, folder: Path) -> dict[str, str]:
    """Source -> what nvcc said when it was last compiled, of every kernel source that was."""
    paths = {unit.source: folder / f"{unit.object}.log" for unit in plan.units if unit.is_kernel}
    return {source: path.read_text(errors="replace") for source, path in paths.items() if path.is_file()}


def spilling(plan: Plan, folder: Path) -> list[str]:
    """A phrase for every kernel whose registers do not all fit: slower than it could be, and right."""
    found = [spill for log in logs(plan, folder).values() for spill in ptxas.spills(log)]
    names = ptxas.demangle([spill.kernel for spill in found])
    return [f"{name} spills {spill.stores} bytes on {spill.arch}" for name, spill in zip(names, found, strict=True)]


def broken_kernels(plan: Plan, folder: Path, leave_out: Collection[str] = ()) -> dict[str, list[str]]:
    """Source -> where ptxas gave up on what it says. Told at every build, until the source is changed."""
    found = {source: ptxas.broken(log) for source, log in logs(plan, folder).items() if source not in leave_out}
    return {source: lines for source, lines in found.items() if lines}
