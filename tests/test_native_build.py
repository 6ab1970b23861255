"""The build engine: what it compiles and when, what it refuses, and what it leaves in the user's cache."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from planted_native import FILES, calls, compiled, fake_toolkit, write_program, write_tree

from fastattn import native
from fastattn.native import archs, cache, installation, plan, ptxas, toolchain, workplace
from fastattn.native.errors import BuildFailed, NativeMissing, ToolMissing, UnknownArch

ROOT = Path(__file__).parent.parent


def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    monkeypatch.setattr(toolchain, "SYSTEM_NVCC", Path("/nowhere/bin/nvcc"))
    monkeypatch.setattr(toolchain, "_wheel_nvccs", lambda: iter(()))


# Architectures


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("80;90a", ("sm_80", "sm_90a")),
        ("sm_90a", ("sm_90a",)),
        ("9.0a, 8.0 12.0", ("sm_80", "sm_90a", "sm_120")),
        ("90a;80;90a;sm_80", ("sm_80", "sm_90a")),
        ("100a 90", ("sm_90", "sm_100a")),
    ],
)
def test_architectures_are_read_in_every_spelling(text: str, names: tuple[str, ...]):
    assert archs.parse(text) == names


@pytest.mark.parametrize("text", ["75", "sm_90b", "hopper", "80a", "80;90a;12", "compute_90", "", " ; "])
def test_an_unknown_architecture_is_refused_with_the_list(text: str):
    with pytest.raises(UnknownArch, match=r"accepted are sm_80, .*sm_90a, .*sm_121a, also written as in 80;90a"):
        archs.parse(text)


@pytest.mark.parametrize(
    ("names", "capability", "runs"),
    [
        (("sm_80",), (8, 0), True),
        (("sm_80",), (8, 9), True),  # same major, later minor
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),  # an `a` is for that card alone
        (("sm_100",), (10, 3), True),
        (("sm_80", "sm_120"), (12, 1), True),
        (("sm_12",), (12, 0), False),
        ((), (9, 0), False),
    ],
)
def test_which_gpu_runs_code_for_which_architecture(names: tuple[str, ...], capability: tuple[int, int], runs: bool):
    assert archs.covers(names, capability) is runs


def test_what_is_compiled_for_a_gpu_runs_on_it():
    cards = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (12, 4)]
    names = {capability: archs.of_capability(capability) for capability in cards}
    assert all(archs.covers([name], capability) for capability, name in names.items())
    assert names[9, 0] == archs.HOPPER
    assert names[12, 4] == "sm_121"
    with pytest.raises(UnknownArch, match=r"7\.5"):
        archs.of_capability((7, 5))


@pytest.mark.parametrize(
    ("says", "names"),
    [
        ("echo 9.0; echo 8.6; echo 9.0", ("sm_86", "sm_90a")),
        ("echo 7.5; echo 8.0", ("sm_80",)),
        ("echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9", ()),
        ("echo '[N/A]'", ()),
    ],
)
def test_the_gpus_present_are_those_that_nvidia_smi_names(says, names, tmp_path, monkeypatch):
    write_program(tmp_path / "nvidia-smi", f"#!/bin/sh\n{says}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert archs.present() == names


# The tools


def test_nvcc_is_found_in_cuda_home_on_path_and_in_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    no_nvcc(monkeypatch)
    with pytest.raises(ToolMissing, match=r"nvcc, .*missing.*'cuda-toolkit\[nvcc,cudart\]"):
        toolchain.find_nvcc()
    monkeypatch.undo()
    no_nvcc(monkeypatch)

    wheel = fake_toolkit(tmp_path / "site/nvidia/cu13")
    write_tree(wheel, {"lib/libcudart_static.a": ""})
    monkeypatch.setattr(toolchain, "_wheel_nvccs", lambda: iter([wheel / "bin/nvcc"]))
    assert toolchain.find_nvcc() == toolchain.Nvcc(wheel / "bin/nvcc", (wheel / "lib",))

    on_path = fake_toolkit(tmp_path / "on_path")
    monkeypatch.setenv("PATH", f"{on_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert toolchain.find_nvcc() == toolchain.Nvcc(on_path / "bin/nvcc")

    home = fake_toolkit(tmp_path / "home")
    monkeypatch.setenv("CUDA_PATH", str(home))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    found = toolchain.find_nvcc()
    assert found.path == home / "bin/nvcc"
    assert found.short_version() == "13.0.88"
    assert {"sm_80", "sm_90", "sm_90a", "sm_100a"} <= found.architectures()
    assert "sm_80a" not in found.architectures()


def test_the_wheels_are_looked_for_where_python_imports_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nvcc = fake_toolkit(tmp_path / "nvidia/cu13") / "bin/nvcc"
    monkeypatch.syspath_prepend(str(tmp_path))
    assert next(toolchain._wheel_nvccs()) == nvcc


def test_a_missing_tool_is_a_sentence(monkeypatch: pytest.MonkeyPatch, csrc: Path, native_cache: Path):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(ToolMissing, match="CXX is 'no-such-compiler -O1', and there is no such program"):
        toolchain.find_gxx()
    assert "no-such-compiler" in (native.why_no_emulator() or "")
    with pytest.raises(NativeMissing, match="no-such-compiler"):
        native.load_emulator()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolMissing, match=r"CXX is not set, and g\+\+, c\+\+ and clang\+\+ are not on PATH"):
        toolchain.find_gxx()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(ToolMissing, match="pip install ninja"):
        toolchain.find_ninja()
    with pytest.raises(ToolMissing, match="pip install pybind11"):
        toolchain.find_pybind11()
    with pytest.raises(ToolMissing, match=r"Python\.h is missing in /nowhere"):
        toolchain.python_include()


# What is compiled


def test_the_emulator_is_built_on_first_use_and_taken_from_the_cache_then(csrc: Path, native_cache: Path):
    assert native.why_no_emulator() is None
    assert not native_cache.exists()
    module = native.load_emulator()
    assert (module.answer(), module.sm90) == (42, 1)
    assert module.file == "csrc/bindings_cuda.cpp"  # diagnostics name sources as the project does
    assert native.load_emulator() is module
    (built,) = native.built("emulator")
    assert str(built.path) == module.__file__
    again, is_new = cache.build(plan.emulator())
    assert (again, is_new) == (built, False)


def test_only_what_changed_is_compiled(csrc: Path, native_cache: Path, toolkit: Path):
    def build() -> tuple[bool, list[str]]:
        before = len(calls(toolkit))
        _, is_new = cache.build(plan.cuda(["sm_90a"]))
        return is_new, compiled(calls(toolkit)[before:])

    everything = ["answer.cu", "attention.cu", "bindings_cuda.cpp", "offset.cu"]
    assert build() == (True, everything)
    assert build() == (False, [])
    (csrc / "cuda/offset.cu").write_text(FILES["cuda/offset.cu"].replace("0", "1"))
    assert build() == (True, ["offset.cu"])
    (csrc / "cuda/value.h").write_text("#define VALUE 7\n")
    assert build() == (True, ["answer.cu"])
    assert native.load().answer() == 8
    # An older file in place of a newer: its time says that nothing changed.
    (csrc / "cuda/value.h").write_text("#define VALUE 8\n")
    os.utime(csrc / "cuda/value.h", (0, 0))
    assert build() == (True, ["answer.cu"])
    (csrc / "cuda/other.h").write_text("")
    assert build() == (True, [])  # another digest, the same objects
    (csrc / "cuda/other.h").unlink()
    (csrc / "cuda/value.h").write_text("#define VALUE 7\n")
    assert build() == (False, [])  # published before
    # Another place with the same sources has nothing to compile either.
    copy = {path.relative_to(csrc).as_posix(): path.read_text() for path in csrc.rglob("*") if path.is_file()}
    assert plan.cuda(["sm_90a"], write_tree(csrc.parent / "elsewhere", copy)).key == plan.cuda(["sm_90a"]).key


def test_kernels_for_hopper_are_compiled_for_sm_90a_alone(csrc: Path, native_cache: Path, toolkit: Path):
    cases = {"sm_80 sm_90a": (["attention.cu"], 1), "sm_80": ([], 0), "sm_90": ([], 0)}
    for names, (hopper, sm90) in cases.items():
        wanted = plan.cuda(names.split())
        codes = {unit.source: [word for word in unit.command if "gencode" in word] for unit in wanted.units}
        assert len(codes["cuda/answer.cu"]) == len(names.split())
        assert [Path(source).name for source in codes if "sm90" in source] == hopper
        assert all(c == ["-gencode=arch=compute_90a,code=sm_90a"] for s, c in codes.items() if "sm90" in s)
        assert native._load(cache.build(wanted)[0].path).sm90 == sm90


def test_what_this_nvcc_cannot_compile_for_is_refused(csrc: Path, toolkit: Path):
    with pytest.raises(UnknownArch, match=r"nvcc 13\.0\.88 cannot compile for sm_120; it can for sm_80, sm_86, sm_90,"):
        plan.cuda(["sm_120"])


def test_everything_that_decides_the_result_is_in_its_key(csrc: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = plan.cuda(["sm_90a"])
    others = [
        plan.cuda(["sm_80"]),
        plan.cuda(["sm_80", "sm_90a"]),
        replace(wanted, abi="cpython-399"),
        replace(wanted, compilers=("another version",)),
        replace(wanted, units=tuple(replace(unit, command=(*unit.command, "-g")) for unit in wanted.units)),
        replace(wanted, link=(*wanted.link, "-lm")),
        replace(wanted, sources=wanted.sources | {"params.h": b"other"}),
        replace(wanted, sources=wanted.sources | {"new.h": b""}),
        plan.emulator(),
    ]
    assert len({wanted.key, *(other.key for other in others)}) == 1 + len(others)
    monkeypatch.setattr(toolchain, "pybind11_version", lambda: "another")
    assert plan.cuda(["sm_90a"]).key != wanted.key


def test_an_error_is_the_compilers_and_leaves_nothing(csrc: Path, native_cache: Path):
    cache.build(plan.emulator())
    before = native.built("emulator")
    (csrc / "cuda/offset.cu").write_text("int offset() { return nonsense; }\n")
    with pytest.raises(BuildFailed, match=r"cuda/offset\.cu does not compile:\n(.*\n)*.*nonsense"):
        cache.build(plan.emulator())
    assert cache.published("emulator") == before
    native.forget()
    with pytest.raises(NativeMissing, match="nonsense"):
        native.load_emulator()
    (csrc / "cuda/offset.cu").write_text("int other() { return 0; }\n")  # links, having no need to, and does not load
    native.forget()
    with pytest.raises(NativeMissing, match="offset"):
        native.load_emulator()
    (csrc / "bindings_cuda.cpp").unlink()
    with pytest.raises(BuildFailed, match=r"csrc/bindings_cuda\.cpp is missing"):
        cache.build(plan.emulator())


def test_progress_counts_every_step(csrc: Path, native_cache: Path):
    seen: list[tuple[int, int]] = []
    cache.build(plan.emulator(), jobs=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]  # four sources and the link


# What ptxas says

C7508 = "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum requirement"


def test_a_warning_of_the_7500s_fails_every_build_until_the_source_changes(csrc, native_cache, toolkit, monkeypatch):
    monkeypatch.setenv("FAKE_PTXAS", C7508)
    for _ in range(2):  # the second time, ninja has nothing to do
        with pytest.raises(BuildFailed, match=r"cuda/answer\.cu: ptxas info : \(C7508\) .*setmaxnreg"):
            cache.build(plan.cuda(["sm_90a"]))
    assert cache.published("cuda") == []
    with cache.own_workplace(wanted := plan.cuda(["sm_90a"], bindings=False)) as folder:
        assert workplace.run_kernels(wanted, folder) == {"cuda/answer.cu": C7508}
    monkeypatch.delenv("FAKE_PTXAS")
    (csrc / "cuda/answer.cu").write_text(FILES["cuda/answer.cu"] + "\n")
    assert cache.build(plan.cuda(["sm_90a"]))[1]


LOG = """\
ptxas info    : Compiling entry function '_ZN1a5spillENS_1PE' for 'sm_80'
ptxas info    : Function properties for _ZN1a5spillENS_1PE
    1048 bytes stack frame, 1332 bytes spill stores, 1300 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1048 bytes cumulative stack size, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN1a4fineENS_1PE' for 'sm_90a'
ptxas info    : Function properties for _ZN1a4fineENS_1PE
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_spills_are_read_from_the_log():
    assert list(ptxas.spills(LOG)) == [ptxas.Spill("_ZN1a5spillENS_1PE", "sm_80", 1332, 1300)]
    assert ptxas.broken(LOG) == []
    assert ptxas.broken(f"{LOG}{C7508}\nptxas warning : (C7510) x\nptxas info : (C8000) y\n{C7508}\n") == [
        C7508,
        "ptxas warning : (C7510) x",
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("scale", "scale"),
        ("void sm90::forward<sm90::Config<128, (int)64>, (ns::Kind)1>(sm90::Params)", "forward<Config<128, 64>, 1>"),
        ("void (anonymous namespace)::sum<float, (bool)1>(float*, int (*)(int))", "sum<float, 1>"),
        ("rows::norm<rows::Rows<4> >(rows::Params)", "norm<Rows<4>>"),
        ("void f<-(3)>(int)", "f<-(3)>"),
    ],
)
def test_kernel_names_are_short(name: str, short: str):
    assert ptxas.shorten(name) == short


# The package


def test_the_engine_needs_python_alone():
    """setup.py loads it by its path, where neither fastattn nor torch can be imported."""
    for path in (ROOT / "fastattn/native").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1
                names = [] if node.level else [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names, path.name


@pytest.mark.parametrize(
    ("environment", "gpus", "decision"),
    [
        ({}, (), "there is no NVIDIA GPU here, and FASTATTN_CUDA_ARCHS names none"),
        ({}, ("sm_90a",), ("sm_90a",)),
        ({"FASTATTN_CUDA_ARCHS": "80;90a"}, (), ("sm_80", "sm_90a")),
        ({"FASTATTN_CUDA_ARCHS": "80"}, ("sm_90a",), ("sm_80",)),
        ({"FASTATTN_CUDA_ARCHS": "80", "FASTATTN_BUILD": "0"}, ("sm_90a",), "FASTATTN_BUILD is 0"),
        ({"FASTATTN_CUDA_ARCHS": " ", "FASTATTN_BUILD": ""}, (), "there is no NVIDIA GPU here"),
    ],
)
def test_what_an_installation_compiles(environment, gpus, decision, monkeypatch, csrc, toolkit):
    monkeypatch.setattr(archs, "present", lambda: gpus)
    found, cpu = installation.decide(environment).values()
    assert not found.required
    assert cpu.compiles == (environment.get("FASTATTN_BUILD") != "0")
    if isinstance(decision, str):
        assert (found.compiles, found.archs, found.reason[: len(decision)]) == (False, (), decision)
    else:
        assert (found.compiles, found.archs, found.reason) == (True, decision, "")
    if environment.get("FASTATTN_BUILD") != "0":
        again = installation.decide(environment | {"FASTATTN_BUILD": "1"})
        assert again == {name: replace(one, required=True) for name, one in (("cuda", found), ("cpu", cpu))}


def test_an_installation_without_nvcc_compiles_no_cuda(monkeypatch: pytest.MonkeyPatch, csrc: Path):
    no_nvcc(monkeypatch)
    found = installation.decide({"FASTATTN_CUDA_ARCHS": "90a"})
    assert not found["cuda"].compiles
    assert found["cuda"].reason.startswith("nvcc, NVIDIA's compiler, is missing")
    assert found["cpu"].compiles


def test_an_installation_without_a_compiler_compiles_nothing(monkeypatch: pytest.MonkeyPatch, csrc: Path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = installation.decide({"FASTATTN_CUDA_ARCHS": "90a"})
    assert not any(decision.compiles for decision in found.values())
    assert "no-such-compiler" in found["cpu"].reason


def test_cpu_kernels_are_compiled_for_each_instruction_set(monkeypatch: pytest.MonkeyPatch, csrc: Path, tmp_path: Path):
    monkeypatch.setattr(plan.platform, "machine", lambda: "x86_64")
    units = plan.cpu(csrc).units
    kernels = [(unit.variant, unit.command) for unit in units if unit.source == "cpu/kernel.cpp"]
    assert [isa for isa, _ in kernels] == ["baseline", "avx2", "avx512", "avx512_bf16"]
    assert all(f"-DFASTATTN_ISA={isa}" in command for isa, command in kernels)
    assert [unit.variant for unit in units if unit.source != "cpu/kernel.cpp"] == [""]
    assert len({unit.object for unit in units}) == len(units)
    monkeypatch.setattr(plan.platform, "machine", lambda: "aarch64")
    assert [unit.variant for unit in plan.cpu(csrc).units] == ["", "baseline"]


def test_the_cpu_module_loads_and_says_what_is_missing(csrc: Path, native_cache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "PACKAGE", csrc)  # without the module that installing this checkout may have left
    native.forget()
    assert native.why_no_cpu() == (
        "it is not compiled for this machine; `python -m fastattn build` compiles it, given a C++ compiler"
    )
    with pytest.raises(NativeMissing, match="not compiled for this machine"):
        native.load_cpu()
    cache.build(plan.cpu())
    native.forget()
    assert native.load_cpu().value() == 7
    (csrc / "cpu/kernel.h").write_text("// changed")
    native.forget()
    assert "compiled from other sources" in str(native.why_no_cpu())


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"FASTATTN_BUILD": "yes"}, "FASTATTN_BUILD is 'yes'; it must be 0 .* 1 .* or unset"),
        ({"FASTATTN_CUDA_ARCHS": "75"}, "FASTATTN_CUDA_ARCHS: '75' is no architecture known here; accepted are sm_80,"),
    ],
)
def test_an_installation_asked_for_nonsense_is_a_sentence(environment: dict[str, str], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        installation.decide(environment)
