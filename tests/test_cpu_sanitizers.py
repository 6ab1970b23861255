"""The tests of the CPU kernels, on kernels that were compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cpu_isas import EVERY_ISA, NEEDS_MODULE, Isa

from fastattn.native import cache, plan, workplace

ROOT = Path(__file__).parent.parent
FILES = [str(ROOT / "tests" / name) for name in ("test_cpu_attention.py", "test_cpu_rows.py")]
SANITIZE = ("-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# AddressSanitizer finds null pointers too, and without these two the kernels compile in two thirds of the time.
QUICKLY = ("-O0", "-fno-sanitize=null,pointer-overflow")
LEFT_OUT = "busy or accurate or tangents"  # what measures, and what is torch's operations
LARGE = "looped or million or V20001 or test_any or long_ or logits_are_never_held"
SOME_LARGE = "rms_norm_N20000_looped or mask_looped-softmax or everything_looped-none"
pytestmark = [
    NEEDS_MODULE,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


def sanitized(isa: str, flags: tuple[str, ...]) -> plan.Plan:
    """The module for one instruction set; its bindings without sanitizers, which take their time."""
    everything = plan.cpu()
    units = []
    for unit in everything.units:
        if unit.variant in ("", isa):
            is_kernel = unit.variant == isa or unit.source == "cpu/dispatch.cpp"
            own = (*SANITIZE, *flags) if is_kernel else ("-O0",)
            units.append(replace(unit, command=(*unit.command, f"-DFASTATTN_ONLY_ISA={isa}", *own)))
    return replace(everything, units=tuple(units), link=(*everything.link, *SANITIZE), archs=(isa,))


def run(isa: str, flags: tuple[str, ...], chosen: str) -> None:
    """The tests named by pytest's expression `chosen`, in a process of their own."""
    libraries = (
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    )
    module_plan = sanitized(isa, flags)
    with cache.own_workplace(module_plan) as folder:
        environment = {
            **os.environ,
            "FASTATTN_CPU_MODULE": str(workplace.run(module_plan, folder)),
            "FASTATTN_CPU_ISA": isa,
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
            "OMP_NUM_THREADS": "2",
        }
        command = [sys.executable, "-m", "pytest", "-v", "-s", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
        done = subprocess.run(
            [*command, *FILES, "-k", chosen], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[:6000]


@pytest.mark.thorough
def test_no_kernel_leaves_its_memory():
    """AVX2: of AVX-512, masked loads and stores are instructions that AddressSanitizer does not look into."""
    names = [isa.name for isa in EVERY_ISA]
    run("avx2" if "avx2" in names else names[0], QUICKLY, f"not ({LEFT_OUT} or {LARGE}) or {SOME_LARGE}")


@pytest.mark.slow
@pytest.mark.parametrize("isa", EVERY_ISA, ids=str)
def test_no_kernel_leaves_its_memory_whatever_the_size(isa: Isa):
    run(isa.name, ("-O1",), f"not ({LEFT_OUT})")
