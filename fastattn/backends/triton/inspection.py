"""What the compiler makes of every Triton kernel, read from its output without a GPU.

A kernel module exports `inspect_cases(arch) -> list[KernelCase]`. Each case is compiled ahead of time and condensed
into a `Report`, which fastattn.inspection holds to the budget: no spills, shared memory within the card, and tensor
cores wherever half-precision matrices are multiplied.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import PTXASError

from fastattn.inspection.binary import count_opcodes, disassemble, opcodes, usages
from fastattn.inspection.report import CARDS, Report

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
        binary = triton.compile(source, target=GPUTarget(*CARDS[arch].target), options=options)
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
    if card.target[0] == "cuda":
        registers, stack, found = _read_cubin(binary)
    else:
        registers, stack, found = _read_amdgcn(binary.asm["amdgcn"])
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
        **count_opcodes(found),
    )


def _read_cubin(binary: triton.compiler.CompiledKernel) -> tuple[int, int, Counter[str]]:
    """Registers, stack bytes and opcodes, by the dumper and the disassembler that come with Triton."""
    cubin = next(path for name, path in binary.metadata_group.items() if name.endswith(".cubin"))
    found = usages(triton.knobs.nvidia.cuobjdump.path, cubin)
    if (usage := found.get(binary.metadata.name)) is None:
        raise RuntimeError(f"cuobjdump reports no resource usage for {binary.metadata.name}, but for {[*found]}.")
    # Disassembling takes as long as compiling a small kernel, so the text is kept beside the binary.
    cache = get_cache_manager(binary.hash)
    if (path := cache.get_file("disassembly.sass")) is None:
        sass = disassemble(triton.knobs.nvidia.nvdisasm.path, cubin)
        path = cache.put(sass, "disassembly.sass", binary=False)
    return usage.registers, usage.stack, opcodes(Path(path).read_text())


def _read_amdgcn(assembly: str) -> tuple[int, int, Counter[str]]:
    """The same from AMD assembly, whose last part describes the kernel in YAML."""
    code, _, description = assembly.partition(".amdgpu_metadata")
    registers = re.search(r"\.vgpr_count:\s+(\d+)", description)  # accumulation registers included
    stack = re.search(r"\.private_segment_fixed_size:\s+(\d+)", description)
    if registers is None or stack is None:
        raise RuntimeError("The AMD assembly does not describe its registers and private segment.")
    return int(registers[1]), int(stack[1]), Counter(re.findall(r"^\s+([a-z]+_\w+)", code, re.MULTILINE))


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
