"""What the Hopper attention kernel should do, from its machine code: `python -m benchmarks.cuda_model [--check]`.

It compiles csrc/cuda/sm90/attention_forward.cu for sm_90a (no GPU is needed), reads the unmasked main loop, and prints
registers and instructions per iteration, then a prediction beside the published figures of FlashAttention-3. Nothing of
it is measured. docs/cuda-attention.md explains the model.
"""

from __future__ import annotations

import argparse
import heapq
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastattn.inspection.binary import disassemble, find_tool, usages
from fastattn.native import plan, toolchain

SOURCE = "cuda/sm90/attention_forward.cu"
SMS = 132
FMA_PER_CLOCK = 2048  # of one SM's tensor cores, 16-bit
EXP_PER_CLOCK = 16  # of one SM's special function units
SCHEDULERS = 4  # warp instructions a clock and SM
PEAK = 790e12  # FLOP/s of a matrix product, measured on an H200 (performance.md); it stands for the clock under load
CLOCK = PEAK / (SMS * 2 * FMA_PER_CLOCK)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS, WIDTH = 16384, 2048  # B·S and H·D of the published figures

# FlashAttention-3, forward, H100 SXM, fp16, TFLOP/s at LENGTHS (performance.md).
PUBLISHED = {
    (64, False): (333, 392, 460, 476, 496, 497),
    (64, True): (197, 265, 371, 420, 460, 473),
    (128, False): (467, 565, 625, 638, 646, 648),
    (128, True): (292, 423, 521, 579, 602, 616),
    (256, False): (482, 639, 707, 736, 746, 756),
    (256, True): (286, 427, 537, 612, 628, 642),
}
FA3_TILES = {64: (192, 192), 128: (128, 176), 256: (128, 80)}  # BLOCK_M, BLOCK_N of its full forward


@dataclass(frozen=True)
class Loop:
    """The unmasked main loop of one kernel, as it runs: what is skipped there is left out."""

    D: int
    D_v: int
    BLOCK_M: int
    BLOCK_N: int
    registers: int  # at launch; setmaxnreg moves them to the consumers later
    stack: int  # bytes that were spilled
    total: int  # instructions of one warp
    mma: int
    exp: int  # on the special function unit
    polynomial: int  # exponentials by polynomial
    early: int  # exponentials between the two waits for the tensor cores
    opcodes: Counter[str]


def compile_kernels(folder: Path) -> Path:
    nvcc, csrc = toolchain.find_nvcc(), plan.csrc()
    cubin = folder / "attention_forward.cubin"
    include = [f"-I{csrc / 'cuda'}", f"-I{csrc}"]
    generate = "-gencode=arch=compute_90a,code=sm_90a"
    command = [str(nvcc.path), "-std=c++17", "-O3", *include, generate, "-cubin", "-o", str(cubin), str(csrc / SOURCE)]
    subprocess.run(command, check=True)
    return cubin


def functions(disassembly: str) -> dict[str, list[str]]:
    """Mangled name -> its lines."""
    _, *parts = re.split(r"^\.text\.(\S+):$", disassembly, flags=re.MULTILINE)
    return {name: code.splitlines() for name, code in zip(parts[::2], parts[1::2], strict=True)}


def read_code(lines: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """-> (instructions, label -> index of the next instruction)."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    return code, labels


def target(instruction: str, labels: dict[str, int]) -> int | None:
    """Where a branch goes."""
    found = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
    return labels[found[1]] if found else None


def count(code: Sequence[str], pattern: str) -> int:
    return sum(re.search(pattern, x) is not None for x in code)


def rarely_run(block: Sequence[str]) -> bool:
    """A softcap or a negative scale; the rescaling of O; what only clusters do."""
    rescales = count(block, r"^FMUL") >= 16 and count(block, r"^FMUL") == len(block) - count(block, r"^BRA")
    return count(block, r"MUFU\.RCP") > 8 or rescales or (len(block) < 16 and count(block, r"ARRIVE.*\.RED") > 0)


def usual_path(code: Sequence[str], labels: dict[str, int], start: int, end: int) -> list[str]:
    path, i = [], start
    while i <= end:
        path.append(code[i])
        to = target(code[i], labels)
        forward = to is not None and i < to <= end
        if forward and to is not None and (rarely_run(code[i + 1 : to]) or not code[i].startswith("@")):
            i = to
        else:
            i += 1
    return path


def main_loop(lines: Sequence[str]) -> list[str]:
    """The shortest innermost loop with both products: that without a mask."""
    code, labels = read_code(lines)
    ends = ((to, i) for i, x in enumerate(code) if (to := target(x, labels)) is not None and to <= i)
    loops = [(a, b) for a, b in ends if count(code[a:b], r"HGMMA") > 1]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    both = [(a, b) for a, b in inner if 0 < count(code[a:b], r"HGMMA.*tnspB") < count(code[a:b], r"HGMMA")]
    return usual_path(code, labels, *min(both, key=lambda loop: loop[1] - loop[0]))


def read_loops(cubin: Path) -> list[Loop]:
    nvcc = toolchain.find_nvcc()
    cuobjdump, nvdisasm = (find_tool(name, [nvcc.path.resolve().parent]) for name in ("cuobjdump", "nvdisasm"))
    if cuobjdump is None or nvdisasm is None:
        raise SystemExit("cuobjdump and nvdisasm are missing: they come with the CUDA toolkit and with Triton.")
    usage = usages(cuobjdump, cubin)
    loops = []
    for name, lines in functions(disassemble(nvdisasm, cubin)).items():
        if "bf16" not in name:
            continue
        path = main_loop(lines)
        scores = [x for x in path if "HGMMA" in x and "tnspB" not in x]
        shape = re.compile(r"HGMMA\.64x(\d+)x16")
        BLOCK_N, D_v = (int(shape.findall(x)[0]) for x in (scores[0], next(x for x in path if "tnspB" in x)))
        waits = [i for i, x in enumerate(path) if "DEPBAR" in x]
        registers = usage[name].registers
        loops.append(
            Loop(
                D=16 * len(scores),
                D_v=D_v,
                BLOCK_M={168: 128, 128: 192, 255: 64}[registers],
                BLOCK_N=BLOCK_N,
                registers=registers,
                stack=usage[name].stack,
                total=len(path),
                mma=count(path, r"HGMMA"),
                exp=count(path, r"^MUFU\.EX2"),
                polynomial=count(path, r"FMNMX\.NAN"),
                early=count(path[waits[0] : waits[1]], r"^MUFU\.EX2|FMNMX\.NAN"),
                opcodes=Counter(x.split()[0].split(".")[0] for x in path if not x.startswith("@")),
            )
        )
    return sorted(loops, key=lambda x: (x.D, x.D_v, x.BLOCK_M))


@dataclass(frozen=True)
class Cycles:
    """Of one iteration of all consumers of a CTA."""

    mma: float
    exp: float
    issue: float

    @property
    def pressure(self) -> float:
        """How long the softmax keeps the other units busy, in units of the matrix products."""
        return (self.exp + self.issue) / self.mma


def cycles(x: Loop) -> Cycles:
    warps = x.BLOCK_M / 16
    return Cycles(
        mma=x.BLOCK_M * x.BLOCK_N * (x.D + x.D_v) / FMA_PER_CLOCK,
        exp=warps * 32 * x.exp / EXP_PER_CLOCK,
        issue=warps * x.total / SCHEDULERS,
    )


def fa3_cycles(D: int) -> Cycles:
    """The same for FlashAttention-3, whose instructions are estimated: 4.5 an element, O rescaled, 100 others."""
    M, N = FA3_TILES[D]
    total = 4.5 * N / 2 + D / 2 + 100
    return Cycles(M * N * 2 * D / FMA_PER_CLOCK, M * N / EXP_PER_CLOCK, M / 16 * total / SCHEDULERS)


def fit() -> tuple[float, float]:
    """(a, b) of time = mma · (a + b · pressure), by least squares over FA3's longest full sequences."""
    points = [(fa3_cycles(D).pressure, PEAK / 1e12 / PUBLISHED[D, False][-1]) for D in FA3_TILES]
    n, sx, sy = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    b = (n * sum(x * y for x, y in points) - sx * sy) / (n * sum(x * x for x, _ in points) - sx * sx)
    return (sy - b * sx) / n, b


def iteration(x: Cycles, masked: float = 0.0) -> float:
    """Clocks of an iteration; `masked` more instructions are issued where there is a mask."""
    a, b = fit()
    return max(x.mma * (a + b * (x.pressure + masked / x.mma)), x.mma, x.exp, x.issue + masked)


def predict(x: Loop, S: int, causal: bool) -> float:
    """TFLOP/s: tiles dealt out to SMs, the longest first; before and after its loop a tile runs without overlap."""
    c = cycles(x)
    one = iteration(c)
    masked = iteration(c, x.BLOCK_M / 16 / SCHEDULERS * x.BLOCK_N)
    alone = (c.mma + c.exp + c.issue) / (
        x.BLOCK_M / 64
    ) + 600  # a warpgroup's first S, its softmax, last P·V, and stores
    blocks = math.ceil(S / x.BLOCK_M)
    tiles = []
    for m in range(blocks):
        keys = min(S, (m + 1) * x.BLOCK_M) if causal else S
        partial = math.ceil(x.BLOCK_M / x.BLOCK_N) if causal else int(S % x.BLOCK_N > 0)
        n = math.ceil(keys / x.BLOCK_N)
        tiles.append((n - min(n, partial)) * one + min(n, partial) * masked + alone)
    tiles = sorted(tiles * (TOKENS // S * (WIDTH // x.D)), reverse=True)
    sms = [0.0] * SMS
    for tile in tiles:
        heapq.heapreplace(sms, sms[0] + tile)
    flop = 2 * TOKENS * S * (x.D + x.D_v) * (WIDTH // x.D) / (2 if causal else 1)
    return flop / (max(sms) / CLOCK) / 1e12


def print_loops(loops: Sequence[Loop]) -> None:
    print("| D, D_v | tile | registers, spilled | instructions | MMA | exp, polynomial, in time | MMA : exp : issue |")
    print("|---|---|---|---|---|---|---|")
    for x in loops:
        c = cycles(x)
        print(
            f"| {x.D}, {x.D_v} | {x.BLOCK_M}×{x.BLOCK_N} | {x.registers}, {x.stack} | {x.total} | {x.mma} "
            f"| {x.exp}, {x.polynomial}, {x.early} | {c.mma:.0f} : {c.exp:.0f} : {c.issue:.0f} |"
        )


def print_predictions(loops: Sequence[Loop]) -> None:
    a, b = fit()
    print(f"\nTFLOP/s, predicted / FA3 published; clocks = MMA · ({a:.2f} + {b:.2f} · (exp + issue) / MMA)\n")
    print("| | " + " | ".join(str(S) for S in LENGTHS) + " |")
    print("|---" * (len(LENGTHS) + 1) + "|")
    for x in loops:
        if x.D_v != x.D:
            continue
        tile = f", {x.BLOCK_M}×{x.BLOCK_N}" if x.D == 64 else ""
        for causal in (False, True):
            published = PUBLISHED.get((x.D, causal), (None,) * len(LENGTHS))
            cells = [f"{predict(x, S, causal):.0f} / {p or '–'}" for S, p in zip(LENGTHS, published, strict=True)]
            print(f"| D{x.D} {'causal' if causal else 'full'}{tile} | " + " | ".join(cells) + " |")


def problems(loops: Sequence[Loop]) -> list[str]:
    """What must not be: spills, or exponentials that ptxas moved behind the product they should run beside."""
    found = [f"D {x.D}: {x.stack} bytes are spilled" for x in loops if x.stack]
    for x in loops:
        late = x.BLOCK_N // 2 - x.early
        if late > x.BLOCK_N // 8:
            found.append(f"D {x.D}: {late} of {x.BLOCK_N // 2} exponentials come after the wait for P·V")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_model", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where registers are spilled or nothing overlaps")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        loops = read_loops(compile_kernels(Path(folder)))
    print_loops(loops)
    print_predictions(loops)
    wrong = problems(loops)
    for problem in wrong:
        print(problem, file=sys.stderr)
    return int(bool(wrong) and options.check)


if __name__ == "__main__":
    sys.exit(main())
