"""Runs the tests as other machines would: instruction sets, numbers of threads, other random inputs.

    make test-machines                                  # the whole suite under each: hours
    make test-machines TEST_ARGS="--sample -k softmax"  # a part of it; all arguments go to pytest

Under each instruction set both this library's kernels and torch's operations are held to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass

# name -> what holds fastattn, torch, oneDNN and MKL to it
INSTRUCTION_SETS = {
    "baseline": ("baseline", "default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "avx512", "AVX512_CORE", "AVX512"),
}
VARIABLES = ("FASTATTN_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


@dataclass(frozen=True)
class Machine:
    isa: str
    threads: int
    seed: int

    def __str__(self) -> str:
        return f"{self.isa}, threads {self.threads}, seed {self.seed}"

    def environment(self) -> dict[str, str]:
        held = dict(zip(VARIABLES, INSTRUCTION_SETS[self.isa], strict=True))
        return {**os.environ, **held, "OMP_NUM_THREADS": str(self.threads), "FASTATTN_TEST_SEED": str(self.seed)}


def machines() -> list[Machine]:
    """Each instruction set of this CPU with one, two and four threads, each with random inputs of its own."""
    from fastattn.backends.cpu import module

    there = set(INSTRUCTION_SETS) if module.why_not() else set(module.load().available_isas())
    kinds = [(isa, threads) for isa in INSTRUCTION_SETS if isa in there for threads in (1, 2, 4)]
    return [Machine(isa, threads, seed) for seed, (isa, threads) in enumerate(kinds, start=1)]


def main() -> int:
    results = {}
    for machine in machines():
        print(f"\n== {machine}", flush=True)
        workers = str(max(1, (os.cpu_count() or 1) // machine.threads))
        command = [sys.executable, "-m", "pytest", "-q", "--progress", "-m", "not slow", "-n", workers, *sys.argv[1:]]
        start = time.monotonic()
        status = subprocess.run(command, env=machine.environment()).returncode
        results[machine] = f"{'passed' if status == 0 else f'exit status {status}'} in {time.monotonic() - start:.0f} s"
    print(*(f"{machine}: {result}" for machine, result in results.items()), sep="\n")
    return 0 if all(result.startswith("passed") for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
