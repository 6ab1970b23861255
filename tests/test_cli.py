"""The command line, each command as a user would start it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn import backends
from fastattn.cli import main

TESTS = Path(__file__).parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m fastattn *arguments`, under additional environment variables; CUDA kernels are not emulated."""
    command = [sys.executable, "-m", "fastattn", *arguments]
    return subprocess.run(
        command,
        cwd=TESTS.parent,
        env={**os.environ, "FASTATTN_EMULATE": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_info_shows_versions_devices_and_backends() -> None:
    done = run("info", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["torch", torch.__version__]
    assert lines[3].split() == ["python", platform.python_version()]
    cpu = lines[next(i for i, line in enumerate(lines) if line.startswith("cpu: ")) + 1 :][: len(backends.ORDER)]
    assert [line.split()[0] for line in cpu] == list(backends.ORDER)
    cuda, triton, native, *others = (line.split(maxsplit=1)[1] for line in cpu)
    assert cuda.startswith("not available: its kernels are for NVIDIA GPUs")
    assert triton.startswith("not available: Triton compiles for GPUs")
    assert native == "available" or native.startswith("not available: it ")
    assert others == ["available"] * len(others)


def test_info_shows_native_modules_or_how_to_get_them(tmp_path: Path) -> None:
    done = run("info", FASTATTN_CACHE=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    _, _, modules = done.stdout.partition("\nnative modules\n")
    cpu, cuda, emulator = (line.split(maxsplit=1) for line in modules.splitlines())
    assert cpu[0] == "cpu"
    assert "compiled for " in cpu[1] or "python -m fastattn build" in cpu[1]
    assert cuda[0] == "cuda"
    assert "python -m fastattn build" in cuda[1]
    assert emulator[0] == "emulator"
    assert "FASTATTN_EMULATE=1" in emulator[1]
    assert not (tmp_path / "none").exists()


def test_info_follows_the_interpreter() -> None:
    lines = run("info", TRITON_INTERPRET="1").stdout.splitlines()
    assert "  triton     available" in lines


def test_explain_says_what_runs_and_why_not_the_others() -> None:
    done = run("explain", "attention", "--device", "cpu", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    title, cuda, triton, native, eager, reference = done.stdout.splitlines()
    compiled = backends.get("cpu").available(torch.device("cpu")) is None
    assert title == f"attention on cpu: {'cpu' if compiled else 'eager'}"
    assert native.startswith("  cpu        " + ("runs: " if compiled else "passed over: it "))
    assert cuda.startswith("  cuda       passed over: its kernels are for NVIDIA GPUs")
    assert triton.startswith("  triton     passed over: Triton compiles for GPUs")
    assert eager.startswith("  eager      " + ("not reached" if compiled else "runs: "))
    assert reference == "  reference  not reached"


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        ("attention", "torch scaled_dot_product_attention"),
        ("attention --shape 1 4 33 16 --kv-heads 2 --keys 47 --softcap 30", "has no softcap"),
        ("attention --causal bottom_right --keys 2000 --window 5 -1 --dtype float32", "where q, k and v are seen"),
        ("varlen_attention", "one sequence after the other"),
        ("varlen_attention --lengths 5 0 33 --keys 7 9 40 --kv-heads 2 --causal bottom_right", "one sequence after"),
        ("varlen_attention --heads 4 --head-dim 20 --causal --window 9 0 --softcap 30", "has no softcap"),
        ("layer_norm --shape 3 5 64", "torch layer_norm"),
        ("softmax --shape 2 8 8 --dim 1 --dtype float64", "torch softmax"),
        ("softmax --shape 2 8 8 --causal", "softmax has no mask"),
        ("rotary_embedding --shape 1 2 5 8", "torch has no such fused function"),
        ("swiglu --shape 3 8", "torch has no such fused function"),
        ("geglu --shape 3 8", "torch has no such fused function"),
        ("dropout_add --shape 3 8", "torch has no such fused function"),
        ("cross_entropy", "torch cross_entropy"),
        ("cross_entropy --shape 7", "torch cross_entropy"),
        ("cross_entropy --shape 2 7 3 --softcap 30", "torch's cross_entropy has no z_loss"),
        ("linear_cross_entropy --shape 2 3 8 --classes 9", "torch cross_entropy"),
        ("linear_cross_entropy --shape 3 8 --z-loss 1e-4", "torch's cross_entropy has no z_loss"),
    ],
)
def test_explain_passes_its_options_on(arguments: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments.split(), "--device", "cpu", "--backend", "eager"]) == 0
    title, cuda, triton, native, eager, _ = capsys.readouterr().out.splitlines()
    assert title == f"{arguments.split()[0]} on cpu: eager"
    assert cuda == "  cuda       passed over: backend='eager' was asked for"
    assert triton == "  triton     passed over: backend='eager' was asked for"
    assert native == "  cpu        passed over: backend='eager' was asked for"
    assert eager.startswith("  eager      runs: ")
    assert how in eager


def test_inspect_leaves_the_interpreter_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "reports.json"
    arguments = ("inspect", "--module", "planted_kernels", "--arch", "sm_80", "--filter", "exp2/aligned")
    done = run(*arguments, "--json", str(path), "--check", TRITON_INTERPRET="1", PYTHONPATH=str(TESTS))
    assert done.returncode == 0, done.stderr
    title, header, row = done.stdout.strip().splitlines()
    assert title.startswith("sm_80")
    assert header.split()[:3] == ["kernel", "registers", "stack"]
    (report,) = json.loads(path.read_text())["reports"]
    assert row.split()[:3] == ["exp2/aligned", str(report["registers"]), "0"]
    assert row.split()[-1] == "ok"
    assert "1 reports, all within budget" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("inform", "invalid choice: 'inform'"),
        ("explain", "the following arguments are required: FUNCTION"),
        ("explain attention --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("explain attention --backend fastest", "argument --backend: invalid choice: 'fastest'"),
        ("explain attention --device cpu --shape 2 8 16", "argument --shape: expected 4 arguments"),
        ("explain attention --device cpu --causal --keys 7", "causal=True` is ambiguous"),
        ("explain varlen_attention --device cpu --causal --keys 7 9 4", "causal=True` is ambiguous"),
        ("explain varlen_attention --device cpu --keys 7", "`cu_seqlens_k` has 2 entries and `cu_seqlens_q` has 4"),
        ("explain softmax --device cpu --dim 5", "`dim` is 5"),
        ("explain cross_entropy --device cpu --shape 3 5 --softcap -1", "`softcap` is -1.0"),
        ("explain linear_cross_entropy --device cpu --z-loss -1", "`z_loss` is -1.0"),
        ("inspect --arch sm_75", "argument --arch: invalid choice: 'sm_75'"),
        ("inspect --kind cpp", "argument --kind: invalid choice: 'cpp'"),
        ("build --arch sm_75", "`--arch`: '75' is no architecture known here; accepted are sm_80, sm_86,"),
        ("build --arch 90a --jobs 0", "`--jobs` is 0; it must be at least 1."),
    ],
)
def test_a_wrong_argument_is_a_sentence(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_argument_ends_with_status_2_and_no_traceback() -> None:
    done = run("inspect", "--module", "planted_kernels", "--filter", "nothing", PYTHONPATH=str(TESTS))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: `--filter` is 'nothing'; no kernel's name contains it. They are: exp2/aligned" in done.stderr
    assert "Traceback" not in done.stderr
