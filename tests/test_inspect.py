"""The budget of every Triton kernel on every card, and the detector that holds them to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fastattn.backends.triton.inspection import KernelCase
from fastattn.cli.inspect import ARCHS
from fastattn.inspection.binary import count_opcodes
from fastattn.inspection.report import CARDS, KIB, Report, violations

TESTS = Path(__file__).parent


def inspect(
    reports: Path, arch: str, *options: str, **environment: str
) -> tuple[dict[str, dict], subprocess.CompletedProcess[str]]:
    """The reports of one card by name, and the process that made them.

    One test takes all of a card's reports, so that no two test workers compile the same kernels.
    """
    command = [sys.executable, "-m", "fastattn", "inspect", "--kind", "triton", "--check", "--arch", arch]
    command += ["--json", str(reports), *options]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "PYTHONPATH": str(TESTS), **environment}
    process = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode in (0, 1), process.stderr
    return {report["name"]: report for report in json.loads(reports.read_text())["reports"]}, process


PLANTED = ("--module", "planted_kernels", "--workers", "1")


# Kernels that wait for memory move rows in 128-bit pieces; (loads, stores) that may be narrower: statistics of at most
# two rows, a seed.
NARROW = {
    "softmax/forward/plain": (0, 0),
    "softmax/backward/plain": (0, 0),
    "layer_norm/forward": (0, 2),
    "layer_norm/dx": (4, 0),
    "layer_norm/residual/dx": (2, 0),
    "rms_norm/forward": (0, 1),
    "rms_norm/dx": (2, 0),
    "gated/": (0, 0),
    "rotary/half_split": (0, 0),
    "rotary/interleaved": (0, 0),
    "dropout_add/": (1, 0),
}


@pytest.mark.parametrize(
    ("arch", "kernels"),
    [
        ("sm_80", "causal/D128"),
        ("sm_90", "causal/D128"),
        ("sm_100", "causal/D128"),
        ("gfx942", "causal/D128"),
        pytest.param("sm_80", "D128", marks=pytest.mark.thorough),
        pytest.param("sm_90", "all", marks=pytest.mark.thorough),
        pytest.param("sm_80", "all", marks=pytest.mark.slow),
        pytest.param("sm_100", "all", marks=pytest.mark.slow),
        pytest.param("gfx942", "all", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_keeps_its_budget(arch: str, kernels: str, tmp_path: Path) -> None:
    reports, process = inspect(tmp_path / "reports.json", arch, "--filter", "" if kernels == "all" else kernels)
    assert {name: report["violations"] for name, report in reports.items() if report["violations"]} == {}
    assert process.returncode == 0
    # Attention multiplies half-precision matrices: were none found, the budget would demand no tensor cores.
    dots = {name: report for name, report in reports.items() if report["half_dots"]}
    assert any("fwd" in name for name in dots)
    assert any("bwd" in name for name in dots)
    if (arch, kernels) == ("sm_90", "all"):
        for kind, (loads, stores) in NARROW.items():
            of_kind = [report for name, report in reports.items() if name.startswith(kind)]
            assert len(of_kind) >= 4, kind
            for report in of_kind:
                assert report["loads"] - report["wide_loads"] <= loads < report["loads"], report["name"]
                assert report["stores"] - report["wide_stores"] <= stores < report["stores"], report["name"]


SPILL, SHARED, BROKEN, NO_TENSOR_CORE = "spills", "of shared memory", "does not compile", "without"
FLAWS = {"dot/spill": SPILL, "dot/shared": SHARED, "broken": BROKEN}
FLAWS_BY_ARCH = {
    "sm_80": FLAWS,
    "sm_90": FLAWS | {"dot/small_tile": NO_TENSOR_CORE},
    # Triton 3.6 refuses to compile the last, later ones trap.
    "sm_100": FLAWS | {"dot/small_tile": NO_TENSOR_CORE, "dot/tensor_memory": ""},
    "gfx942": FLAWS,
}
DOT_OPCODE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


@pytest.mark.parametrize("arch", ARCHS)
def test_planted_flaws_are_found_and_instructions_counted(arch: str, tmp_path: Path) -> None:
    reports, process = inspect(tmp_path / "reports.json", arch, *PLANTED)
    found = {name: report["violations"] for name, report in reports.items() if report["violations"]}
    assert found.keys() == FLAWS_BY_ARCH[arch].keys()
    for name, phrase in FLAWS_BY_ARCH[arch].items():
        assert phrase in found[name][0]
        assert f"{arch} {name}: {found[name][0]}" in process.stderr
    assert process.returncode == 1

    assert reports["dot/spill_listed"]["stack"] == reports["dot/spill"]["stack"] > 0
    assert reports["dot/good"]["stack"] == 0
    assert reports["dot/good"]["half_dots"] == 1
    assert reports["dot/good"]["tensor_core"].keys() == {DOT_OPCODE[arch]}
    assert reports["dot/ieee"]["half_dots"] == 0
    if arch != "gfx942":  # whose matrix cores multiply fp32 exactly
        assert reports["dot/ieee"]["tensor_core"] == {}

    # 1024 elements of 32 bits: 8 in each of 128 threads on NVIDIA, 4 in each of 256 on AMD.
    elements = 4 if arch == "gfx942" else 8
    for name, accesses, wide in (("exp2/aligned", elements // 4, elements // 4), ("exp2/unaligned", elements, 0)):
        report = reports[name]
        assert report["exp2"] == elements
        assert (report["loads"], report["wide_loads"]) == (accesses, wide)
        assert (report["stores"], report["wide_stores"]) == (accesses, wide)
    if "tma_copy" in reports:
        assert [reports["tma_copy"][key] for key in ("loads", "wide_loads", "stores", "wide_stores")] == [1, 1, 1, 1]


def test_the_cache_serves_a_kernel_whatever_was_compiled_before_it(tmp_path: Path) -> None:
    reports, cache = tmp_path / "reports.json", tmp_path / "cache"
    inspect(reports, "sm_80", *PLANTED, "--filter", "scale/", TRITON_CACHE_DIR=str(cache))
    entries = {path.name for path in cache.iterdir()}
    assert len(entries) == 2
    inspect(reports, "sm_80", *PLANTED, "--filter", "scale/add", TRITON_CACHE_DIR=str(cache))
    assert {path.name for path in cache.iterdir()} == entries


def test_a_few_spills_are_allowed_where_they_buy_a_resident_block() -> None:
    case = KernelCase("row", None, {}, {}, num_warps=8, num_stages=1, budget="occupancy")
    for registers, stack, blocks, allowed in (
        (64, 8, 4, True),  # 66 registers would leave room for 3 blocks
        (56, 8, 4, False),  # 58 would still be 4
        (64, 24, 4, False),  # too many, whatever they buy
    ):
        report = Report("row", "sm_80", registers=registers, stack=stack, blocks=blocks)
        assert violations(report, case) == ([] if allowed else [f"spills {stack} bytes"])
        assert violations(report, replace(case, budget="no_spills")) == [f"spills {stack} bytes"]


def test_opcodes_are_counted_by_what_they_do() -> None:
    opcodes = {"LDG.E.LTC128B.64": 1, "LDG.E.128.CONSTANT": 2, "LDGSTS.E.BYPASS.LTC128B.128": 4, "LDGDEPBAR": 8}
    opcodes |= {"STG.E.U16": 1, "STG.E.ENL2.256": 2, "STS.128": 4, "UTMASTG.2D": 8, "STL.128": 16, "LDL.LU.64": 32}
    opcodes |= {"UTMALDG.4D.MULTICAST": 5, "STSM.16.MT88.4": 6}
    opcodes |= {"HMMA.16816.F32.BF16": 3, "HMMA.1688.F32.TF32": 2, "HGMMA.64x128x16.F32.BF16": 7, "IMAD": 9, "NOP": 99}
    assert count_opcodes(Counter(opcodes)) == {
        "tensor_core": {"HMMA": 5, "HGMMA": 7},
        "exp2": 0,
        "loads": 12,
        "wide_loads": 11,
        "tma_loads": 5,
        "stores": 11,
        "wide_stores": 10,
        "matrix_stores": 6,
        "instructions": 110,
    }
    opcodes = {"buffer_load_dwordx4": 1, "global_load_dword": 2, "global_load_lds_dwordx4": 4, "s_load_dwordx8": 8}
    opcodes |= {"ds_read_b128": 1, "global_store_short": 2, "buffer_store_dwordx4": 4, "scratch_store_dwordx4": 8}
    opcodes |= {"v_exp_f32_e32": 3, "v_mfma_f32_32x32x8_bf16": 5, "s_nop": 99}
    assert count_opcodes(Counter(opcodes)) == {
        "tensor_core": {"v_mfma": 5},
        "exp2": 3,
        "loads": 7,
        "wide_loads": 5,
        "tma_loads": 0,
        "stores": 6,
        "wide_stores": 4,
        "matrix_stores": 0,
        "instructions": 38,
    }


@pytest.mark.parametrize(
    ("arch", "registers", "num_warps", "shared", "tensor_memory", "blocks"),
    [
        # Registers per warp, rounded up to 8 per lane, divide the 512 per lane of each of the four partitions.
        ("sm_90", 168, 4, 0, 0, 3),  # 512 // 168 = 3 warps a partition, 12 in all
        ("sm_90", 128, 4, 0, 0, 4),
        ("sm_90", 129, 4, 0, 0, 3),  # rounded up to 136
        ("sm_90", 255, 8, 0, 0, 1),
        ("sm_90", 32, 4, 0, 0, 16),  # 64 warps
        ("sm_90", 16, 1, 0, 0, 32),  # 32 blocks
        # Each block takes 1 KiB more than it asks for, in steps of 128 bytes.
        ("sm_90", 32, 4, 113 * KIB, 0, 2),
        ("sm_90", 32, 4, 113 * KIB + 1, 0, 1),
        ("sm_90", 32, 4, 227 * KIB, 0, 1),
        ("sm_90", 32, 4, 228 * KIB, 0, 0),
        ("sm_80", 32, 4, 81 * KIB, 0, 2),
        ("sm_80", 32, 4, 82 * KIB, 0, 1),
        ("sm_80", 32, 4, 163 * KIB, 0, 1),
        ("sm_100", 64, 4, 16 * KIB, 128, 4),  # 512 columns of tensor memory
        ("sm_100", 64, 4, 16 * KIB, 512, 1),
        ("sm_100", 64, 4, 16 * KIB, 1024, 0),
        # gfx942: 8 waves a SIMD, 64 KiB of LDS.
        ("gfx942", 128, 4, 0, 0, 4),
        ("gfx942", 16, 4, 0, 0, 8),
        ("gfx942", 512, 4, 0, 0, 1),
        ("gfx942", 16, 1, 0, 0, 32),
        ("gfx942", 64, 4, 20 * KIB, 0, 3),
        ("gfx942", 64, 4, 64 * KIB, 0, 1),
    ],
)
def test_blocks_resident_at_once(arch, registers, num_warps, shared, tensor_memory, blocks) -> None:
    assert CARDS[arch].blocks(registers, num_warps, shared, tensor_memory) == blocks


def test_command_line_names_every_card() -> None:
    assert tuple(CARDS) == ARCHS
