"""Installing: what goes into a wheel, and that nothing is compiled where there is nothing to compile for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from planted_native import FILES, calls, compiled, write_tree

from fastattn.inspection import cuda

ROOT = Path(__file__).parent.parent
LEAVE_OUT = shutil.ignore_patterns("__pycache__", "*.so", "_cuda.json", "_cpu.json", "csrc")


def project(folder: Path) -> Path:
    """A copy of what a source distribution holds, but for csrc."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / "fastattn", folder / "fastattn", ignore=LEAVE_OUT)
    return folder


def build_wheel(source: Path, **environment: str) -> tuple[Path, list[str]]:
    """The wheel that pip builds, and the lines that fastattn's setup.py printed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", ".", "--no-build-isolation", "--no-deps", "-w", "wheels"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    shutil.rmtree(source / "wheels", ignore_errors=True)
    done = subprocess.run(
        command, cwd=source, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = (source / "wheels").glob("*.whl")
    return path, [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("fastattn:")]


LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
from fastattn import native
module = native.load((9, 0))
assert module.__file__.startswith(sys.argv[1]), module.__file__
cpu = native.load_cpu()
assert cpu.__file__.startswith(sys.argv[1]), cpu.__file__
print(module.answer(), cpu.value(), native.why_no_emulator())
"""


def test_a_wheel_holds_the_module_and_the_sources(tmp_path: Path, toolkit: Path):
    source = project(tmp_path / "project")
    write_tree(source / "csrc", FILES | {"emulator/ptx/language.h": "", "emulator/tests/test.cpp": "#error a test\n"})
    path, said = build_wheel(source, FASTATTN_CUDA_ARCHS="90a")
    assert "py3-none-any" not in path.name
    cpu, cuda = sorted(said)
    assert cuda == "fastattn: compiled the CUDA kernels for sm_90a with nvcc 13.0.88"
    assert cpu.startswith("fastattn: compiled the CPU kernels for baseline")
    names = zipfile.ZipFile(path).namelist()
    for start in ("fastattn/_cuda.", "fastattn/_cpu."):
        assert [name for name in names if name.startswith(start) and name.endswith(".so")]
    assert sorted(name.removeprefix("fastattn/csrc/") for name in names if "csrc" in name) == [
        "bindings_cpu.cpp",
        "bindings_cuda.cpp",
        "cpu/kernel.cpp",
        "cpu/kernel.h",
        "cuda/answer.cu",
        "cuda/launch.h",
        "cuda/offset.cu",
        "cuda/sm90/attention.cu",
        "cuda/value.h",
        "emulator/ptx/language.h",
        "params.h",
    ]
    site = tmp_path / "site"
    zipfile.ZipFile(path).extractall(site)
    environment = {**os.environ, "FASTATTN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", LOAD, str(site)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "42 7 None\n", done.stderr


def test_without_a_gpu_or_a_named_architecture_no_cuda_is_compiled(tmp_path: Path, toolkit: Path):
    source = project(tmp_path / "project")
    write_tree(source / "csrc", FILES)
    nothing = {"PATH": os.pathsep.join(f for f in os.environ["PATH"].split(os.pathsep) if not has_gpu_tool(f))}
    path, said = build_wheel(source, FASTATTN_CUDA_ARCHS="", **nothing)
    assert "_cuda" not in "".join(name for name in zipfile.ZipFile(path).namelist() if "csrc" not in name)
    assert (
        "fastattn: CUDA kernels are not compiled: there is no NVIDIA GPU here, and FASTATTN_CUDA_ARCHS names none"
        in said
    )
    assert compiled(calls(toolkit)) == []


def test_without_a_compiler_the_wheel_is_for_every_platform(tmp_path: Path, toolkit: Path):
    source = project(tmp_path / "project")
    write_tree(source / "csrc", FILES)
    path, said = build_wheel(source, FASTATTN_CUDA_ARCHS="", CXX="no-such-compiler")
    assert path.name.endswith("py3-none-any.whl")
    assert any(
        line.startswith("fastattn: CPU kernels are not compiled: ") and "no-such-compiler" in line for line in said
    )


def has_gpu_tool(folder: str) -> bool:
    return (Path(folder) / "nvidia-smi").exists()


def test_a_build_that_fails_is_told_and_skipped_unless_it_is_required(tmp_path: Path, toolkit: Path):
    source = project(tmp_path / "project")
    write_tree(source / "csrc", FILES | {"cuda/offset.cu": "int offset() { return nonsense; }\n"})
    path, said = build_wheel(source, FASTATTN_CUDA_ARCHS="80")
    assert any(
        line.startswith("fastattn: installed without CUDA kernels, which do not compile: cuda/offset.cu")
        for line in said
    )
    assert not [name for name in zipfile.ZipFile(path).namelist() if "_cuda" in name and "csrc" not in name]
    with pytest.raises(AssertionError, match=r"FASTATTN_BUILD is 1: cuda/offset\.cu does not compile"):
        build_wheel(source, FASTATTN_CUDA_ARCHS="80", FASTATTN_BUILD="1")


@pytest.mark.slow
@pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))
def test_a_wheel_of_the_real_kernels(tmp_path: Path):
    source = project(tmp_path / "project")
    shutil.copytree(ROOT / "csrc", source / "csrc")
    path, said = build_wheel(source, FASTATTN_CUDA_ARCHS="90a", FASTATTN_BUILD="1")
    assert any(line.startswith("fastattn: compiled the CUDA kernels for sm_90a") for line in said)
    site = tmp_path / "site"
    zipfile.ZipFile(path).extractall(site)
    script = LOAD.replace("module.answer(), cpu.value()", "module.__name__, cpu.isa() != ''")
    command = [sys.executable, "-c", script, str(site)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "fastattn._cuda True None\n", done.stderr
