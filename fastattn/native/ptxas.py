"""What ptxas said while it compiled kernels: warnings that break them, and registers that did not fit."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# C7508 setmaxnreg ignored, C7510 wgmma serialised, C7513 and C7514 registers touched in flight, C7519…: the kernel
# would run, slower than it reads or wrongly. ptxas calls some of them only information.
BROKEN = re.compile(r"^.*\(C75\d\d\).*$", re.MULTILINE)
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Spill:
    kernel: str  # mangled
    arch: str
    stores: int  # bytes per thread
    loads: int


def broken(log: str) -> list[str]:
    """The lines with a warning of the 7500s, each once."""
    return list(dict.fromkeys(line.strip() for line in BROKEN.findall(log)))


def spills(log: str) -> Iterator[Spill]:
    """Every kernel of a log of `ptxas -v` that keeps registers in memory."""
    kernel = arch = ""
    for line in log.splitlines():
        if found := ENTRY.search(line):
            kernel, arch = found[1], found[2]
        elif (found := SPILL.search(line)) and (found[2] != "0" or found[3] != "0"):
            yield Spill(kernel, arch, int(found[2]), int(found[3]))


def demangle(symbols: Iterable[str]) -> list[str]:
    """Short names of kernels: no namespace, no parameters. `attention_forward<Config<128, 1>>`."""
    symbols = list(symbols)
    if symbols and (tool := shutil.which("c++filt")):
        done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True)
        return [shorten(name) for name in done.stdout.splitlines()]
    return symbols


def shorten(name: str) -> str:
    """A demangled function without return type, namespaces, parameters, casts of template arguments."""
    name = re.sub(r"\((?:\w|::| )+\)(?=-?\d)", "", name)  # (int)128, (ns::Kind)1
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    depth = 0
    for i, c in enumerate(name):  # the first ( outside <…> opens the parameters
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    name = re.sub(r"\b\w+::", "", name).removeprefix("void ")
    return name.replace("> >", ">>").strip()
