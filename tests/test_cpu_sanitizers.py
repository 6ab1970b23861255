"""The attention kernels of csrc/cpu under AddressSanitizer and UndefinedBehaviorSanitizer, over the named cases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastattn.backends.cpu import module

ROOT = Path(__file__).parent.parent
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
FLAGS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
KERNELS = [  # compiled for an instruction set
    *("gemm", "pack", "attention_tile", "attention_gradient_tile"),
    *("attention_forward", "attention_backward", "attention_bias_gradient"),
]
OTHERS = ["dispatch", "attention_plan", "bindings_attention"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
COMMON = ["-std=c++17", "-fopenmp", "-fPIC", "-ffp-contract=off", "-w", f"-I{ROOT / 'csrc'}"]
RUN = """
import cases, torch
from parity import check, inputs_of, options_of, packed_of
import fastattn.backends as backends
from fastattn.backends import cpu
backends._BACKENDS.setdefault("cpu", cpu)
backends.ORDER = tuple(backends._BACKENDS)
device = torch.device("cpu")
for case in [*cases.TRITON, *cases.VARLEN, cases.case("decode", 1, 1100, H=4, H_kv=1, D=40, D_v=24),
             cases.case("long", 300, 300, D=33, D_v=35, window=(100, 3), dtype=cases.BF16)]:
    check("cpu", *inputs_of(case, device), *options_of(case, device), packed_of(case, device))
print("every case", cpu.describe(None, device))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(module.why_not() is not None, reason=str(module.why_not())),
]


def _build(folder: Path, isa: str) -> Path:
    """The module for one instruction set; what is no kernel is compiled without sanitizers, which take their time."""
    pybind = subprocess.check_output([sys.executable, "-m", "pybind11", "--includes"], text=True).split()
    without_rows = folder / "without_rows.cpp"
    without_rows.write_text("#include <pybind11/pybind11.h>\nvoid bind_cpu_rows(pybind11::module_&) {}\n")
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in (*KERNELS, *OTHERS)]
    commands = []
    for source in (*sources, ROOT / "csrc" / "bindings_cpu.cpp", without_rows):
        kernel = source.stem in KERNELS
        own = ["-O1", "-g1", *SANITIZE, *FLAGS[isa], f"-DFASTATTN_ISA={isa}"] if kernel else ["-O0", *pybind]
        defined = [f"-DFASTATTN_ONLY_ISA={isa}"]
        commands.append(["g++", *COMMON, *own, *defined, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands):
            assert done.returncode == 0, done.stderr
    built = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = [command[-1] for command in commands]
    subprocess.run(["g++", "-shared", "-fopenmp", *SANITIZE, *objects, "-o", str(built)], check=True)
    return built


def test_no_case_leaves_its_memory(tmp_path):
    isa = module.load().available_isas()[-1]
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "FASTATTN_CPU_MODULE": str(_build(tmp_path, isa)),
        "FASTATTN_CPU_ISA": isa,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert f"every case {isa}" in done.stdout
