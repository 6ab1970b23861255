"""What the compiler makes of every Triton kernel, read from its output without a GPU.

A kernel module exports `inspect_cases(arch) -> list[KernelCase]`. Each case is compiled ahead of time and condensed
into a `Report`; `violations` holds the report to the budget: no spills, shared memory within the card, and tensor
cores wherever half-precision matrices are multiplied.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import PTXASError

MODULES = tuple(
    f"fastattn.backends.triton.{name}"
    for name in (
        "attention_fwd",
        "attention_bwd",
        "attention_jvp",
        "norm",
        "softmax",
        "cross_entropy",
        "linear_cross_entropy",
        "gated",
        "rotary",
        "dropout_add",
    )
)


@dataclass(frozen=True)
class KernelCase:
    """One compilation of one kernel: everything that its launcher would decide."""

    name: str  # unique within its module, e.g. "attention_fwd/bf16/D128/causal"
    kernel: triton.JITFunction
    signature: dict[str, str]  # argument -> "*bf16", "*fp32", "i32", "i64", "fp32", "i1"
    constexprs: dict[str, object]  # constexpr arguments, and plain ones known at compile time: a stride of 1, a None
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = ()  # arguments: pointers by their address, integers by their value
    budget: str = "no_spills"  # or "occupancy": but for a few that buy a resident block; "listed": reported and allowed
    small_tiles: bool = False  # of fewer rows than the newest matrix instruction takes, so that any other will do

    def __post_init__(self) -> None:
        if self.budget not in ("no_spills", "occupancy", "listed"):
            raise ValueError(f"budget is {self.budget!r}; it is 'no_spills', 'occupancy' or 'listed'.")


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case. Counts are of instructions in the program, not of those executed."""

    name: str
    arch: str
    registers: int = 0  # per thread; on AMD, vector and accumulation registers together
    stack: int = 0  # bytes of local memory per thread: registers that were spilled
    shared: int = 0  # bytes per block
    tensor_memory: int = 0  # columns per block, of the 512 that a Blackwell multiprocessor has
    blocks: int = 0  # resident on one multiprocessor
    occupancy: float = 0.0  # their warps, as a part of those that the multiprocessor can hold
    half_dots: int = 0  # products of half-precision matrices in the source
    tensor_core: dict[str, int] = field(default_factory=dict)  # opcode -> count, e.g. {"HGMMA": 16}
    exp2: int = 0  # MUFU.EX2, v_exp_f32
    loads: int = 0  # from global memory, asynchronous copies and TMA included
    wide_loads: int = 0  # those of at least 128 bits per thread, and TMA
    stores: int = 0
    wide_stores: int = 0
    instructions: int = 0
    error: str = ""  # why it does not compile; everything else is 0 then


@dataclass(frozen=True)
class Card:
    """What one multiprocessor (on AMD: compute unit) holds, and what one block may take of it.

    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" and the shared-memory
    paragraphs of the tuning guides for Ampere, Hopper and Blackwell; AMD CDNA 3 ISA reference, chapter 3, and LLVM's
    AMDGPUBaseInfo.cpp for the granules.
    """

    title: str
    target: GPUTarget
    shared_per_block: int  # bytes that one block may ask for, opting in
    shared_per_sm: int
    shared_reserved: int  # bytes that the system adds to each block's
    shared_granule: int
    max_warps: int
    max_blocks: int
    tensor_core: str  # opcode that a half-precision product must become, as a glob

    # The register file is the same in all of them: four partitions, each with 512 registers of 32 bits per lane, of
    # which a warp takes a multiple of 8 (NVIDIA's documents say 65536 per multiprocessor and 256 per warp).
    PARTITIONS = 4
    REGISTERS = 512
    REGISTER_GRANULE = 8
    TENSOR_MEMORY = 512

    def blocks(self, registers: int, num_warps: int, shared: int, tensor_memory: int = 0) -> int:
        """Blocks of num_warps warps that are resident at once: the scarcest resource decides."""
        warps = min(
            self.max_warps, self.PARTITIONS * (self.REGISTERS // _round_up(max(registers, 1), self.REGISTER_GRANULE))
        )
        limits = [self.max_blocks, warps // num_warps]
        if taken := _round_up(shared + self.shared_reserved, self.shared_granule):
            limits.append(self.shared_per_sm // taken)
        if tensor_memory:
            limits.append(self.TENSOR_MEMORY // tensor_memory)
        return min(limits)


KIB = 1024
CARDS = {
    "sm_80": Card("Ampere A100", GPUTarget("cuda", 80, 32), 163 * KIB, 164 * KIB, KIB, 128, 64, 32, "HMMA"),
    "sm_90": Card("Hopper H100, H200", GPUTarget("cuda", 90, 32), 227 * KIB, 228 * KIB, KIB, 128, 64, 32, "HGMMA"),
    "sm_100": Card("Blackwell B200", GPUTarget("cuda", 100, 32), 227 * KIB, 228 * KIB, KIB, 128, 64, 32, "UTC*MMA"),
    "gfx942": Card("CDNA 3 MI300", GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 0, 512, 32, 32, "v_mfma"),
}


def _round_up(x: int, multiple: int) -> int:
    return (x + multiple - 1) // multiple * multiple


@functools.cache
def cases_of(module: str, arch: str) -> dict[str, KernelCase]:
    """The cases that a module exports for an architecture, by name."""
    cases = importlib.import_module(module).inspect_cases(arch)
    by_name = {case.name: case for case in cases}
    if len(by_name) < len(cases):
        repeated = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
        raise ValueError(f"{module}.inspect_cases({arch!r}) uses the same name twice: {', '.join(repeated)}.")
    return by_name


def collect_cases(arch: str, modules: Sequence[str] = MODULES) -> list[KernelCase]:
    """Every case of every kernel module for an architecture."""
    return [case for module in modules for case in cases_of(module, arch).values()]


def compile_case(case: KernelCase, arch: str) -> Report:
    """Compiles a case for an architecture and reads the result; both come from Triton's cache if they are there.

    A case that does not compile gives a report that says so, because the others are wanted all the same.
    """
    names = case.kernel.arg_names
    missing = [name for name in names if name not in case.signature and name not in case.constexprs]
    unknown = [name for name in (*case.signature, *case.constexprs, *case.divisible_by_16) if name not in names]
    if missing or unknown:
        raise ValueError(f"Case {case.name} lacks the arguments {missing} of its kernel, which has no {unknown}.")
    # A jitted call would build the same three: types in the order of the arguments, values, alignments.
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
    source = ASTSource(case.kernel, signature, case.constexprs, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    _settle_cache_key(case.kernel)
    try:
        binary = triton.compile(source, target=CARDS[arch].target, options=options)
    except (CompilationError, PTXASError, RuntimeError) as error:  # RuntimeError: a pass of the compiler failed
        return Report(case.name, arch, error=f"{type(error).__name__}: {error}".strip())
    return _report(case.name, arch, binary)


def _settle_cache_key(kernel: triton.JITFunction, callers: tuple[triton.JITFunction, ...] = ()) -> None:
    """Hashes the functions that a kernel calls, then the kernel.

    Triton 3.6 and 3.7 put the constants of a called function into its caller's key only if the called one was hashed
    earlier. Left alone, a key would depend on which kernels the process met before, and the cache would miss.
    """
    callers = (*callers, kernel)
    for name in kernel.fn.__code__.co_names:  # attributes too: `tl.dot` in a function that is itself called `dot`
        called = kernel.fn.__globals__.get(name)
        if isinstance(called, triton.JITFunction) and not any(called is caller for caller in callers):
            _settle_cache_key(called, callers)
    hash(kernel)  # computes the key and keeps it


def _report(name: str, arch: str, binary: triton.compiler.CompiledKernel) -> Report:
    card, metadata = CARDS[arch], binary.metadata
    if card.target.backend == "cuda":
        registers, stack, opcodes = _read_cubin(binary)
    else:
        registers, stack, opcodes = _read_amdgcn(binary.asm["amdgcn"])
    tensor_memory = getattr(metadata, "tmem_size", 0) or 0
    blocks = card.blocks(registers, metadata.num_warps, metadata.shared, tensor_memory)
    return Report(
        name,
        arch,
        registers=registers,
        stack=stack,
        shared=metadata.shared,
        tensor_memory=tensor_memory,
        blocks=blocks,
        occupancy=blocks * metadata.num_warps / card.max_warps,
        half_dots=len(re.findall(r"\btt\.dot\b.*: tensor<(?:\d+x)+b?f16>", binary.asm["ttir"])),
        **count_opcodes(opcodes),
    )


def _read_cubin(binary: triton.compiler.CompiledKernel) -> tuple[int, int, Counter[str]]:
    """Registers, stack bytes and opcodes, by the dumper and the disassembler that come with Triton."""
    cubin = next(path for name, path in binary.metadata_group.items() if name.endswith(".cubin"))
    usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    # Disassembling takes as long as compiling a small kernel, so the text is kept beside the binary.
    cache = get_cache_manager(binary.hash)
    if (path := cache.get_file("disassembly.sass")) is None:
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", cubin)
        path = cache.put(sass, "disassembly.sass", binary=False)
    found = re.search(rf"Function {re.escape(binary.metadata.name)}:\s+REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resource usage for {binary.metadata.name}: {usage!r}")
    # "        /*0a30*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;"
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", Path(path).read_text(), re.MULTILINE)
    return int(found[1]), int(found[2]), Counter(opcodes)


def _read_amdgcn(assembly: str) -> tuple[int, int, Counter[str]]:
    """The same from AMD assembly, whose last part describes the kernel in YAML."""
    code, _, description = assembly.partition(".amdgpu_metadata")
    registers = re.search(r"\.vgpr_count:\s+(\d+)", description)  # accumulation registers included
    stack = re.search(r"\.private_segment_fixed_size:\s+(\d+)", description)
    if registers is None or stack is None:
        raise RuntimeError("The AMD assembly does not describe its registers and private segment.")
    opcodes = re.findall(r"^\s+([a-z]+_\w+)", code, re.MULTILINE)
    return int(registers[1]), int(stack[1]), Counter(opcodes)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# NVIDIA: LDG.E.128, LDGSTS.E.BYPASS.128 (asynchronous copy to shared memory), UTMALDG.2D (TMA).
# AMD: global_load_dwordx4, buffer_load_dwordx4, global_load_lds_dwordx4.
_LOAD = re.compile(r"LDG\.|LDGSTS\.|UTMALDG|(global|buffer|flat)_load_")
_STORE = re.compile(r"STG\.|UTMASTG|(global|buffer|flat)_store_")
_WIDE = re.compile(r"UTMA|.*\.(128|256)\b|.*_dwordx4")
_TENSOR_CORE = re.compile(r"[A-Z]+MMA\b|v_mfma")
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
        "stores": count(_STORE),
        "wide_stores": count(_STORE, _WIDE),
        "instructions": opcodes.total() - opcodes["NOP"] - opcodes["s_nop"],
    }


def violations(report: Report, case: KernelCase) -> list[str]:
    """Where a report breaks its case's budget, each as a phrase of one line; empty when it is kept."""
    if report.error:
        lines = report.error.splitlines()  # kind and place of the error, a piece of the source, the reason
        return [f"does not compile: {' '.join(dict.fromkeys((lines[0], lines[-1])))}"]
    card, broken = CARDS[report.arch], []
    if report.stack and case.budget != "listed" and not (case.budget == "occupancy" and _buys_a_block(report, case)):
        broken.append(f"spills {report.stack} bytes")
    if report.shared > card.shared_per_block:
        broken.append(f"takes {report.shared} bytes of shared memory, a block has {card.shared_per_block}")
    if report.tensor_memory > card.TENSOR_MEMORY:  # the compiler then puts a trap in place of the whole kernel
        broken.append(f"takes {report.tensor_memory} columns of tensor memory, of {card.TENSOR_MEMORY}")
    wanted = "*" if case.small_tiles else card.tensor_core
    if report.half_dots and not any(fnmatchcase(opcode, wanted) for opcode in report.tensor_core):
        broken.append(f"multiplies half-precision matrices without {card.tensor_core}")
    return broken


def _buys_a_block(report: Report, case: KernelCase) -> bool:
    """Whether no more than four registers were spilled, and fewer blocks would be resident had they been kept."""
    kept = report.registers + report.stack // 4
    return report.stack <= 16 and CARDS[report.arch].blocks(kept, case.num_warps, report.shared) < report.blocks


def inspect(
    archs: Sequence[str], match: str = "", modules: Sequence[str] = MODULES, workers: int | None = None
) -> Iterator[tuple[KernelCase, Report]]:
    """Compiles every case whose name contains `match`, in parallel processes, and yields each with its report in order.

    A kernel cannot be sent to another process, so a worker is told the module and the name, and finds it again.
    """
    keys = [
        (module, arch, name) for arch in archs for module in modules for name in cases_of(module, arch) if match in name
    ]
    workers = min(workers or min(os.cpu_count() or 1, 4), len(keys))
    if workers <= 1:
        yield from zip(map(_case_at, keys), map(_compile_at, keys), strict=True)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(map(_case_at, keys), pool.map(_compile_at, keys), strict=True)


def _case_at(key: tuple[str, str, str]) -> KernelCase:
    module, arch, name = key
    return cases_of(module, arch)[name]


def _compile_at(key: tuple[str, str, str]) -> Report:
    return compile_case(_case_at(key), key[1])
