"""One kernel's report, the card that it is for, and the budget that it is held to."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol


class Case(Protocol):
    """One compilation of one kernel, whatever it is written in."""

    @property
    def name(self) -> str: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def budget(self) -> str: ...  # "no_spills"; "occupancy": but for a few that buy a block; "listed": allowed
    @property
    def small_tiles(self) -> bool: ...  # fewer rows than the newest matrix instruction takes, so that any other will do


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case. Counts are of instructions in the program, not of those executed."""

    name: str
    arch: str
    registers: int = 0  # per thread; on AMD, vector and accumulation registers together
    stack: int = 0  # bytes of local memory per thread: registers that were spilled
    shared: int = 0  # bytes per block; of CUDA, those that are declared in the kernel
    tensor_memory: int = 0  # columns per block, of the 512 that a Blackwell multiprocessor has
    blocks: int = 0  # resident on one multiprocessor
    occupancy: float = 0.0  # their warps, as a part of those that the multiprocessor can hold
    half_dots: int = 0  # products of half-precision matrices in the source; of CUDA, 1 if its source has any
    tensor_core: dict[str, int] = field(default_factory=dict)  # opcode -> count, e.g. {"HGMMA": 16}
    exp2: int = 0  # MUFU.EX2, v_exp_f32
    loads: int = 0  # from global memory, asynchronous copies and TMA included
    wide_loads: int = 0  # those of at least 128 bits per thread, and TMA
    tma_loads: int = 0  # UTMALDG
    stores: int = 0
    wide_stores: int = 0
    matrix_stores: int = 0  # STSM
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
    target: tuple[str, int | str, int]  # backend, architecture and threads of a warp, as Triton names them
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
    "sm_80": Card("Ampere A100", ("cuda", 80, 32), 163 * KIB, 164 * KIB, KIB, 128, 64, 32, "HMMA"),
    "sm_90": Card("Hopper H100, H200", ("cuda", 90, 32), 227 * KIB, 228 * KIB, KIB, 128, 64, 32, "HGMMA"),
    "sm_100": Card("Blackwell B200", ("cuda", 100, 32), 227 * KIB, 228 * KIB, KIB, 128, 64, 32, "UTC*MMA"),
    "gfx942": Card("CDNA 3 MI300", ("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 0, 512, 32, 32, "v_mfma"),
}


def _round_up(x: int, multiple: int) -> int:
    return (x + multiple - 1) // multiple * multiple


def violations(report: Report, case: Case) -> list[str]:
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


def _buys_a_block(report: Report, case: Case) -> bool:
    """Whether no more than four registers were spilled, and fewer blocks would be resident had they been kept."""
    kept = report.registers + report.stack // 4
    return report.stack <= 16 and CARDS[report.arch].blocks(kept, case.num_warps, report.shared) < report.blocks
