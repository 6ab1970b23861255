"""What nvcc makes of the kernels in csrc/cuda, on a machine that need have no GPU."""

from __future__ import annotations

import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastattn.inspection.binary import (
    Usage,
    count_opcodes,
    disassemble,
    find_tool,
    max_threads,
    opcodes_by_function,
    usages,
)
from fastattn.inspection.report import CARDS, Report
from fastattn.native import cache, plan, ptxas, toolchain, workplace
from fastattn.native.errors import BuildFailed, ToolMissing

# card -> what its kernels are compiled for: on Hopper, with the instructions that no later card has.
TARGETS = {"sm_80": "sm_80", "sm_90": "sm_90a"}


@dataclass(frozen=True)
class CudaCase:
    """One kernel of a compiled source."""

    name: str  # cuda/attention/attention_forward<…>: source and kernel
    num_warps: int
    budget: str = "no_spills"
    small_tiles: bool = False


def why_not() -> str | None:
    """Why nothing can be inspected: no sources, no nvcc, or no disassembler. None if it can."""
    try:
        plan.csrc()
        nvcc = toolchain.find_nvcc()
        toolchain.find_ninja()
    except (BuildFailed, ToolMissing) as error:
        return str(error)
    missing = [name for name in ("cuobjdump", "nvdisasm") if _tool(name, nvcc) is None]
    if missing:
        return f"{' and '.join(missing)} of the CUDA toolkit, or of Triton, are missing."
    return None


def _tool(name: str, nvcc: toolchain.Nvcc) -> str | None:
    return find_tool(name, [nvcc.path.resolve().parent])


def inspect(
    arch: str, folder: Path | None = None, jobs: int | None = None, progress: workplace.Progress | None = None
) -> Iterator[tuple[CudaCase, Report]]:
    """Compiles every kernel for a card, where its source changed, and yields each with its report.

    `folder` is another csrc. A source that does not compile, or that ptxas warns of, gives one report that says so.
    """
    wanted = plan.cuda((TARGETS[arch],), folder, bindings=False)
    with cache.own_workplace(wanted) as place:
        failed = workplace.run_kernels(wanted, place, jobs, progress)
        for unit in wanted.units:
            prefix = f"cuda/{Path(unit.source).stem}"
            if unit.source in failed:
                said = failed[unit.source].splitlines()
                errors = [line for line in said if "error" in line or "(C75" in line]
                yield CudaCase(prefix, 1), Report(prefix, arch, error="\n".join(errors or said))
            else:
                yield from _read(prefix, arch, place / unit.object)


def _read(prefix: str, arch: str, binary: Path) -> Iterator[tuple[CudaCase, Report]]:
    """The kernels of one object file, by name."""
    nvcc = toolchain.find_nvcc()
    cuobjdump, nvdisasm = _tool("cuobjdump", nvcc), _tool("nvdisasm", nvcc)
    assert cuobjdump is not None
    assert nvdisasm is not None
    with tempfile.TemporaryDirectory() as scratch:
        for cubin in extract(cuobjdump, binary, Path(scratch)):
            found = usages(cuobjdump, cubin)
            names = dict(zip(found, ptxas.demangle(found), strict=True))
            threads = max_threads(cuobjdump, cubin)
            code = opcodes_by_function(disassemble(nvdisasm, cubin))
            for symbol, usage in sorted(found.items(), key=lambda item: names[item[0]]):
                case = CudaCase(f"{prefix}/{names[symbol]}", num_warps=threads.get(symbol, 32) // 32)
                yield case, _report(case, arch, usage, code.get(symbol, Counter()))


def extract(cuobjdump: str, binary: Path, folder: Path) -> list[Path]:
    """The device code in an object file, as files in a folder."""
    subprocess.run([cuobjdump, "--extract-elf", "all", str(binary)], cwd=folder, check=True, capture_output=True)
    return sorted(folder.glob("*.cubin"))


def _report(case: CudaCase, arch: str, usage: Usage, opcodes: Counter[str]) -> Report:
    """Shared memory that only the launcher knows of is not in the binary: with it, fewer blocks may be resident."""
    card = CARDS[arch]
    # From Hopper on, what the system adds to each block is reported with it.
    shared = max(usage.shared - card.shared_reserved, 0) if arch == "sm_90" else usage.shared
    blocks = card.blocks(usage.registers, case.num_warps, shared)
    return Report(
        case.name,
        arch,
        registers=usage.registers,
        stack=usage.stack,
        shared=shared,
        blocks=blocks,
        occupancy=blocks * case.num_warps / card.max_warps,
        half_dots=int("attention" in case.name.rpartition("/")[2].partition("<")[0]),
        **count_opcodes(opcodes),
    )
