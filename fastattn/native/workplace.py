"""Runs a plan in a folder of its own by ninja: a copy of the sources, the objects, and the module linked from them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

from . import ptxas, toolchain
from .errors import BuildFailed
from .plan import Plan

Progress = Callable[[int, int], None]  # steps done, steps to do
STATUS = re.compile(r"^\[(\d+)/(\d+)\] ")

# A log is kept for every object: ptxas reports registers and spills there, and says them only once.
RULES = """ninja_required_version = 1.5
rule compile
  command = $compiler -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }
  description = $in
  depfile = $out.d
  deps = gcc
rule link
  command = $linker $in -o $out
  description = $out
"""


def jobs_available() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(plan: Plan, folder: Path, jobs: int | None = None, progress: Progress | None = None, link: bool = True) -> Path:
    """Brings the folder up to date with the plan, compiling only what changed; returns the module's path in it.

    Nobody else may use the folder meanwhile. With `link=False` only the kernels' objects are made.
    """
    if not any(unit.is_kernel or link for unit in plan.units):
        raise BuildFailed(f"There is nothing to compile for the target {plan.target!r}.")
    sync_sources(plan, folder / "csrc")
    _write_if_changed(folder / "build.ninja", build_file(plan).encode())
    _ninja(folder, "module" if link else "kernels", jobs or jobs_available(), progress)
    check_kernels(plan, folder)
    return folder / plan.filename


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


def _ninja(folder: Path, target: str, jobs: int, progress: Progress | None) -> None:
    # A make above would hand its own job server on, and --jobs would mean nothing.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    environment |= {"NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
    command = [toolchain.find_ninja(), "-C", str(folder), "-j", str(jobs), target]
    said: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := STATUS.match(line):
                if progress is not None:
                    progress(int(found[1]), int(found[2]))
            else:
                said.append(line)
    if process.returncode:
        raise BuildFailed(_failure(said))


def _failure(said: list[str]) -> str:
    """What ninja printed, without its own remarks and the long command."""
    text = "".join(said)
    found = re.search(r"^FAILED: (?:\[code=\d+\] )?(\S+).*\n.*\n", text, re.MULTILINE)
    if found is None:
        return f"ninja stopped: {text.strip()}"
    errors = re.sub(r"^(FAILED: .*\n.*|ninja: .*|ptxas info .*|\s+\d+ bytes .*)\n?", "", text, flags=re.MULTILINE)
    return f"{found[1].removeprefix('obj/').removesuffix('.o')} does not compile:\n{errors.strip()}"


def logs(plan: Plan, folder: Path) -> dict[str, str]:
    """Source -> what the compiler said, of every kernel source. Kept from the time it was compiled."""
    units = (unit for unit in plan.units if unit.is_kernel)
    return {unit.source: (folder / f"{unit.object}.log").read_text(errors="replace") for unit in units}


def check_kernels(plan: Plan, folder: Path) -> None:
    """Refuses a build in which ptxas gave up on what the source says. Again and again, until the source is changed."""
    broken = [f"{source}: {line}" for source, log in logs(plan, folder).items() for line in ptxas.broken(log)]
    if broken:
        raise BuildFailed("ptxas warns of what makes these kernels slow or wrong:\n" + "\n".join(broken))
