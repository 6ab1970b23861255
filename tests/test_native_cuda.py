"""What needs nvcc, though no GPU: real kernels compiled, inspected, and launched where there is nothing to run them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from planted_native import BINDINGS, write_tree

from fastattn import native
from fastattn.cli import main
from fastattn.inspection import cuda
from fastattn.inspection.cuda import CudaCase
from fastattn.inspection.report import Report, violations
from fastattn.native import plan, toolchain

ROOT = Path(__file__).parent.parent
WHY_NOT = cuda.why_not()
needs_nvcc = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

CLEAN = """
#include <ptx/language.h>
namespace clean {
struct Params { float* y; const float4* x; };  // (n,), (n,)
template <class T, int FACTOR>
__global__ void __launch_bounds__(96) scale_kernel(const __grid_constant__ Params p) {
  __shared__ float s[128];
  const float4 v = p.x[threadIdx.x];
  s[threadIdx.x] = exp2f(v.x + v.y + v.z + v.w) * FACTOR;
  __syncthreads();
  p.y[threadIdx.x] = s[threadIdx.x ^ 1];
}
template __global__ void scale_kernel<float, 3>(const __grid_constant__ Params);
}  // namespace clean
"""
SPILL = """
#include <ptx/language.h>
struct Params { float* y; const float4* x; };
__global__ void __launch_bounds__(1024, 2) spill_kernel(const __grid_constant__ Params p) {
  float4 v[40];
  for (int i = 0; i < 40; i++) v[i] = p.x[threadIdx.x + 1024 * i];
  __syncthreads();
  for (int i = 0; i < 40; i++) p.y[threadIdx.x * i] = v[i].x * v[39 - i].y + v[i].z * v[39 - i].w;
  __syncthreads();
  for (int i = 0; i < 40; i++) p.y[threadIdx.x * i] = v[i].x * v[39 - i].z + v[i].w * v[39 - i].x;
}
"""
BROKEN = "#include <ptx/language.h>\n__global__ void broken_kernel() { nonsense; }\n"
NO_HGMMA = """
#include <ptx/language.h>
struct Params { float* y; };
namespace { __global__ void attention_kernel(const __grid_constant__ Params p) { p.y[0] = 1.0f; } }
namespace { __global__ void combine_kernel(const __grid_constant__ Params p) { p.y[0] = 2.0f; } }
void attention(Params p) { attention_kernel<<<1, 1>>>(p); combine_kernel<<<1, 1>>>(p); }
"""
# An accumulator that is read while the tensor cores may still write to it.
IN_FLIGHT = """
#include <ptx/language.h>
struct Params { float* y; unsigned long long a, b; int n; };
__global__ void __launch_bounds__(128) in_flight_kernel(const __grid_constant__ Params p) {
  float d[4] = {0, 0, 0, 0};
  asm volatile("wgmma.fence.sync.aligned;");
  for (int i = 0; i < p.n; i++) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(p.a), "l"(p.b));
    d[0] += 1.0f;
  }
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;");
  p.y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""
LANGUAGE = "#pragma once\n#include <cuda_runtime.h>\n"
PLANTED = {
    "cuda/launch.h": "",
    "cuda/ptx/language.h": LANGUAGE,
    "cuda/clean.cu": CLEAN,
    "cuda/spill.cu": SPILL,
    "cuda/broken.cu": BROKEN,
    "cuda/sm90/attention.cu": NO_HGMMA,
    "cuda/sm90/in_flight.cu": IN_FLIGHT,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory):
    """A cache that the tests of this file share, so that each planted kernel is compiled once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTATTN_CACHE", str(folder))
        folder.chmod(0o700)
        yield folder


@needs_nvcc
@pytest.mark.parametrize("arch", cuda.TARGETS)
def test_planted_flaws_are_found_and_instructions_counted(arch, root, tmp_path, monkeypatch, capsys):
    csrc = write_tree(tmp_path / "csrc", PLANTED)
    monkeypatch.setattr(plan, "csrc", lambda: csrc)
    path = tmp_path / "reports.json"
    command = ["inspect", "--kind", "cuda", "--check", "--json", str(path), "--arch", arch]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith(arch)
    written = json.loads(path.read_text())
    assert written["nvcc"] == toolchain.find_nvcc().short_version()
    reports = {report["name"]: report for report in written["reports"]}
    flaws = {"cuda/broken": "does not compile: csrc/cuda/broken.cu(2): error:", "cuda/spill/spill_kernel": "spills"}
    if arch == "sm_90":
        flaws["cuda/attention/attention_kernel"] = "multiplies half-precision matrices without HGMMA"
        flaws["cuda/in_flight"] = "does not compile: ptxas"
        assert "C75" in reports["cuda/in_flight"]["error"]
    assert {name for name, report in reports.items() if report["violations"]} == flaws.keys()
    for name, phrase in flaws.items():
        assert reports[name]["violations"][0].startswith(phrase)
        assert f"{arch} {name}: {phrase}" in err
    assert ("cuda/attention/combine_kernel" in reports) == (arch == "sm_90")

    clean = reports["cuda/clean/scale_kernel<float, 3>"]
    assert (clean["stack"], clean["shared"], clean["exp2"]) == (0, 512, 1)
    assert (clean["loads"], clean["wide_loads"], clean["stores"], clean["wide_stores"]) == (1, 1, 1, 0)
    assert clean["blocks"] == 21  # 64 warps of the multiprocessor, by three
    assert 0 < clean["registers"] < 32
    assert reports["cuda/spill/spill_kernel"]["stack"] > 0

    assert main([*command[:4], *command[6:], "--filter", "scale_kernel"]) == 0
    out, err = capsys.readouterr()
    assert "1 reports, all within budget" in err
    with pytest.raises(SystemExit):
        main([*command, "--filter", "nothing"])
    assert "no kernel's name contains it. They are: cuda/broken, cuda/clean/scale_kernel" in capsys.readouterr().err


def test_without_nvcc_the_cuda_kernels_are_left_out_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "why_not", lambda: "nvcc is missing.")
    assert main(["inspect", "--kind", "cuda"]) == 1
    assert capsys.readouterr() == ("", "CUDA kernels are left out: nvcc is missing.\n")


def test_inspect_says_what_it_cannot_compile_for(csrc, native_cache, toolkit, monkeypatch, capsys):
    nvcc = toolkit / "bin/nvcc"
    nvcc.write_text(nvcc.read_text().replace("sm_90", "sm_89"))
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    assert main(["inspect", "--kind", "cuda", "--arch", "sm_90"]) == 1
    assert "CUDA kernels cannot be inspected: nvcc 13.0.88 cannot compile for sm_90a" in capsys.readouterr().err


def test_build_without_nvcc_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(toolchain, "SYSTEM_NVCC", Path("/nowhere/cuda/bin/nvcc"))
    monkeypatch.setattr(toolchain, "_wheel_nvccs", lambda: iter(()))
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert main(["build", "--arch", "sm_90a", "--no-triton"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "nvcc, NVIDIA's compiler, is missing" in err
    assert "pip install 'cuda-toolkit[nvcc,cudart]" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("error", "status"), [("", 0), ("CompilationError: at 1:2\n\nno such thing", 1)])
def test_build_compiles_tritons_kernels_for_the_same_cards(
    error, status, csrc, native_cache, toolkit, monkeypatch, capsys
):
    from fastattn.backends.triton import inspection
    from fastattn.cli import build

    def inspect(archs: list[str], workers: int) -> list[tuple[CudaCase, Report]]:
        assert (archs, workers) == (["sm_80", "sm_90"], 3)
        return [(case, Report(case.name, "sm_90", error=error)) for case in cases]

    cases = [CudaCase("attention_fwd/x", 4), CudaCase("softmax/x", 4)]
    monkeypatch.setattr(build, "interprets", lambda: False)
    monkeypatch.setattr(inspection, "collect_cases", lambda arch: cases[:1])
    monkeypatch.setattr(inspection, "inspect", inspect)
    assert main(["build", "--arch", "90a", "86", "80", "--jobs", "3"]) == status
    out, err = capsys.readouterr()
    module, _, others, summary = out.splitlines()
    assert module.startswith("cuda kernels for sm_80, sm_86, sm_90a: compiled by nvcc 13.0.88 in ")
    assert others == "Triton kernels for sm_86 are compiled when they are first called."
    assert summary.startswith(f"triton kernels for sm_80, sm_90: {0 if error else 2} in ")
    assert ("sm_90 softmax/x: no such thing" in err) == bool(error)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", cuda.TARGETS)
def test_every_cuda_kernel_keeps_its_budget(arch: str):
    results = list(cuda.inspect(arch))
    assert {case.name: violations(report, case) for case, report in results if violations(report, case)} == {}
    kinds = {case.name.split("/")[1] for case, _ in results}
    assert {"layer_norm", "softmax", "cross_entropy"} <= kinds
    attention = [report for case, report in results if "attention" in case.name]
    assert (len(attention) > 0) == (arch == "sm_90")
    for report in attention:
        assert report.half_dots
        assert report.tensor_core["HGMMA"] > 0
        assert min(report.tma_loads, report.matrix_stores, report.exp2) > 0


LAUNCH = """
#include <launch.h>
#include <params.h>
struct Params { int* y; };
__global__ void answer_kernel(const __grid_constant__ Params p) { *p.y = 42; }
int answer() {
  launch(answer_kernel, LaunchShape{dim3(1), 32, 0}, cudaStream_t(nullptr), Params{nullptr});
  return 42;
}
"""


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that would run it")
def test_build_compiles_a_module_that_imports_with_no_driver_and_refuses_to_launch(root, tmp_path, monkeypatch, capsys):
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc/cuda", csrc / "cuda", ignore=shutil.ignore_patterns("*.cu"))
    params = "int answer();\ninline int offset() { return 0; }\n"
    write_tree(csrc, {"bindings_cuda.cpp": BINDINGS, "params.h": params, "cuda/answer.cu": LAUNCH})
    monkeypatch.setattr(plan, "csrc", lambda: csrc)
    native.forget()
    assert main(["build", "--arch", "8.0", "--no-triton"]) == 0
    out, _ = capsys.readouterr()
    first, path = out.splitlines()
    assert first.startswith("cuda kernels for sm_80: compiled by nvcc")
    module = native.load((8, 0))
    assert module.__file__ == path.strip()
    assert path.strip().startswith(str(root))
    with pytest.raises(RuntimeError, match=r"cannot launch a kernel of 32 threads.*(driver|device)"):
        module.answer()
    needed = subprocess.run(["ldd", path.strip()], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed  # nor libcudart
    assert main(["build", "--arch", "8.0", "--no-triton"]) == 0
    assert capsys.readouterr().out.startswith("cuda kernels for sm_80: were there already")
    native.forget()
