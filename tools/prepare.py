"""Makes the virtual environment that the Makefile's targets run in, and says every few seconds what it is at.

    python3 tools/prepare.py .venv

Installs the versions of constraints.txt, the package itself in place, and compiles its kernels for CPU tensors. The
standard library alone: nothing is installed yet.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SILENCE = 10.0  # seconds after which a line says that the step goes on
TELLING = re.compile(r"\s*(Collecting|Downloading|Using cached|Building|Installing|Preparing|Getting|Successfully)\b")


def run(title: str, command: Sequence[str | Path], **environment: str) -> None:
    """Runs one step and ends the program with what it said if it fails."""
    start, said, latest = time.monotonic(), [], title
    print(f"{title} …", flush=True)
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(SILENCE):
            print(f"  {time.monotonic() - start:4.0f} s  {latest}", flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if TELLING.match(line) or "steps," in line:  # of pip, or of `fastattn build`
            latest = line.strip()[:100]
    ended.set()
    teller.join()
    if process.wait():
        sys.exit(f"{''.join(said[-40:])}\n{title}: failed with exit status {process.returncode}.")
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (whatever python3 is)
        python = f"{sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}"
        sys.exit(f"fastattn needs Python 3.11 or newer; {python}. Name another: make PYTHON=python3.12")
    folder = Path(sys.argv[1])
    print(f"Preparing {folder}: a few minutes the first time, most of it for torch and for compiling.", flush=True)
    try:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    except (subprocess.CalledProcessError, ImportError):
        sys.exit(f"{sys.executable} has no working venv module; Debian and Ubuntu ship it as python3-venv.")
    python = (folder / "bin/python").absolute()
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    pip += ["-c", "constraints.txt"]
    run("1/4  torch, a large download", [*pip, "torch"])
    run("2/4  build tools", [*pip, "setuptools>=77", "ninja>=1.11", "pybind11>=3.0"])
    # The kernels are not compiled here: pip would hide how far that is.
    editable = [*pip, "--no-build-isolation", "-e", ".[demo,dev]"]
    run("3/4  fastattn in place, and what tests and benchmarks use", editable, FASTATTN_BUILD="0")
    compile_kernels(python)


def compile_kernels(python: Path) -> None:
    """Compiles the kernels for CPU tensors; without a compiler everything runs on torch's operations."""
    try:
        run("4/4  kernels for CPU tensors", [python, "-m", "fastattn", "build", "--cpu"])
    except SystemExit as failure:
        print(failure, "fastattn runs without these kernels, on torch's own operations.", sep="\n", flush=True)


if __name__ == "__main__":
    main()
