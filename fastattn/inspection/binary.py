"""What is in an NVIDIA binary, by the toolkit's own dumper and disassembler, and what its opcodes do."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Usage:
    """What one function of a binary takes."""

    registers: int  # per thread
    stack: int  # bytes of local memory per thread: registers that were spilled
    shared: int  # bytes per block that are known when it is compiled


def find_tool(name: str, folders: Sequence[Path] = ()) -> str | None:
    """cuobjdump or nvdisasm: in one of the folders, on PATH, or in Triton's package, which need not be imported."""
    places = [str(folder) for folder in folders]
    spec = importlib.util.find_spec("triton")
    package = [str(Path(spec.origin).parent / "backends/nvidia/bin")] if spec is not None and spec.origin else []
    paths = [*places, None, *package]
    return next((found for path in paths if (found := shutil.which(name, path=path)) is not None), None)


def usages(cuobjdump: str, binary: str | Path) -> dict[str, Usage]:
    """Mangled name -> what it takes, of every function."""
    text = _run(cuobjdump, "--dump-resource-usage", str(binary))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {name: Usage(*map(int, numbers)) for name, *numbers in found}


def disassemble(nvdisasm: str, cubin: str | Path) -> str:
    return _run(nvdisasm, "--print-code", "--no-dataflow", str(cubin))


# "        /*0a30*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_FUNCTION = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)


def opcodes(disassembly: str) -> Counter[str]:
    """How often each opcode occurs."""
    return Counter(_INSTRUCTION.findall(disassembly))


def opcodes_by_function(disassembly: str) -> dict[str, Counter[str]]:
    """Mangled name -> its opcodes."""
    _, *parts = _FUNCTION.split(disassembly)
    return {name: opcodes(code) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def max_threads(cuobjdump: str, cubin: str | Path) -> dict[str, int]:
    """Mangled name -> the threads of a block, of every kernel with __launch_bounds__."""
    text = _run(cuobjdump, "--dump-elf", str(cubin))
    _, *parts = re.split(r"^\.nv\.info\.(\S+)$", text, flags=re.MULTILINE)
    found = {}
    for name, attributes in zip(parts[::2], parts[1::2], strict=True):
        if size := re.search(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", attributes):
            x, y, z = (int(number, 16) for number in size.groups())
            found[name] = x * y * z
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# NVIDIA: LDG.E.128, LDGSTS.E.BYPASS.128 (asynchronous copy to shared memory), UTMALDG.2D (TMA).
# AMD: global_load_dwordx4, buffer_load_dwordx4, global_load_lds_dwordx4.
_LOAD = re.compile(r"LDG\.|LDGSTS\.|UTMALDG|(global|buffer|flat)_load_")
_STORE = re.compile(r"STG\.|UTMASTG|(global|buffer|flat)_store_")
_WIDE = re.compile(r"UTMA|.*\.(128|256)\b|.*_dwordx4")
_TENSOR_CORE = re.compile(r"[A-Z]+MMA\b|v_mfma")
_TMA_LOAD = re.compile(r"UTMALDG")
_MATRIX_STORE = re.compile(r"STSM\b")
_EXP2 = re.compile(r"MUFU\.EX2|v_exp_f32")


def count_opcodes(opcodes: Counter[str]) -> dict[str, Any]:
    """The counts of a report, from how often each opcode occurs."""

    def count(*patterns: re.Pattern[str]) -> int:
        return sum(n for opcode, n in opcodes.items() if all(pattern.match(opcode) for pattern in patterns))

    tensor_core: Counter[str] = Counter()
    for opcode, n in opcodes.items():
        if found := _TENSOR_CORE.match(opcode):
            tensor_core[found[0]] += n
    return {
        "tensor_core": dict(tensor_core),
        "exp2": count(_EXP2),
        "loads": count(_LOAD),
        "wide_loads": count(_LOAD, _WIDE),
        "tma_loads": count(_TMA_LOAD),
        "stores": count(_STORE),
        "wide_stores": count(_STORE, _WIDE),
        "matrix_stores": count(_MATRIX_STORE),
        "instructions": opcodes.total() - opcodes["NOP"] - opcodes["s_nop"],
    }
