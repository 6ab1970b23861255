"""The emulator of csrc/emulator: its layouts and primitives, mistakes planted in small kernels, and no false alarm."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "csrc/emulator"
TESTS = EMULATOR / "tests"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-Wno-psabi", "-Icsrc/emulator", "-Icsrc/cuda", "-Icsrc"]
PROGRAMS = ("layouts", "primitives", "asynchronous", "planted")
OF_KERNELS = {"attention_variants.cpp"}  # runs the project's kernels: not part of the emulator itself
SCHEDULES = ("eager", "tma_last", "wgmma_last", "random")

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="the emulator needs a C++ compiler")


def compile_programs(folder: Path) -> None:
    core = [s for s in EMULATOR.glob("*.cpp") if s.name not in OF_KERNELS]
    sources = [*core, *(TESTS / f"{program}.cpp" for program in PROGRAMS)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        optimize = (
            "-O1" if source.stem in PROGRAMS else "-O2"
        )  # the kernels here are small: compiling is what takes time
        subprocess.run(
            [CXX, *FLAGS, optimize, "-c", str(source.relative_to(ROOT)), "-o", str(target)], cwd=ROOT, check=True
        )
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(sources, key=lambda s: -s.stat().st_size)))
    shared = [str(o) for o in objects if o.stem not in PROGRAMS]
    for program in PROGRAMS:
        subprocess.run([CXX, str(folder / f"{program}.o"), *shared, "-o", str(folder / program)], check=True)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """run(program, *arguments) -> what it printed; compiled once, by whichever of pytest's workers comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulator"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            compile_programs(folder)
            (folder / "done").touch()

    def run_program(program: str, *arguments: str) -> str:
        done = subprocess.run([folder / program, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run_program


def names(program: str) -> list[str]:
    return re.findall(r"^TEST\((\w+)\)", (TESTS / f"{program}.cpp").read_text(), re.M)


@pytest.mark.parametrize("name", names("layouts"))
def test_layout(run: Callable[..., str], name: str):
    run("layouts", name)


@pytest.mark.parametrize("name", names("primitives"))
def test_primitive(run: Callable[..., str], name: str):
    run("primitives", name)


@pytest.mark.parametrize("name", names("asynchronous"))
def test_asynchronous_work(run: Callable[..., str], name: str):
    run("asynchronous", name)


# What finds each mistake: a finding of this kind, at a line with this text. None: only the numbers are wrong.
RACE_RAW, RACE_WAR, RACE_WAW = "race: read after write", "race: write after read", "race: write after write"
IN_FLIGHT, TOO_EARLY = "race: TMA load in flight", "CTA may exit too early"
PLANTED: dict[str, tuple[str, str] | None] = {
    "pipeline.NoFullWait": (RACE_RAW, "wgmma_ss"),
    "pipeline.NoEmptyWait": ("mbarrier: too many arrivals", "mbarrier_arrive_expect_tx"),
    "pipeline.WrongParity": ("deadlock", "mbarrier_wait(ring.full()"),
    "pipeline.NoWgmmaWait": (RACE_WAR, "tma_load"),
    "pipeline.EarlyRelease": (RACE_WAR, "tma_load"),
    "pipeline.NoWgmmaFence": ("missing wgmma_fence", "wgmma_ss"),
    "pipeline.TouchAccumulator": ("accumulator touched in flight", "wgmma_wait<0>(o, p, s)"),
    "pipeline.RepackInFlight": ("A registers changed in flight", "wgmma_rs"),
    "pipeline.UnpinnedAccumulator": ("wgmma_wait does not pin", "wgmma_wait<1>()"),
    "pipeline.WrongSbo": None,
    "pipeline.WrongLbo": None,
    "pipeline.WrongMajor": ("shared memory out of range", "wgmma_rs"),
    "pipeline.WrongSwizzle": None,
    "pipeline.ExpectTooSmall": ("deadlock", "mbarrier_wait(ring.full()"),
    "pipeline.ExpectTooLarge": ("deadlock", "mbarrier_wait(ring.full()"),
    "pipeline.TooManyArrivals": ("deadlock", "mbarrier_wait(q_full"),
    "pipeline.NoProxyFence": ("missing proxy fence", "tma_store"),
    "pipeline.NoEpilogueBarrier": (RACE_RAW, "tma_store"),
    "pipeline.NoStoreWait": (RACE_WAR, "stmatrix_x4"),
    "pipeline.NoStoreCommit": ("store never committed", "tma_store"),
    "pipeline.NoInitSync": ("race: mbarrier initialisation", "mbarrier_wait(q_full"),
    "pipeline.NoInitFence": ("missing mbarrier init fence", "tma_load"),
    "pipeline.LoadNeverWaitedFor": (TOO_EARLY, "tma_load"),
    "pull.NoSync": (RACE_RAW, "ld_shared_cluster"),
    "pull.NoLastSync": ("CTA has exited", "ld_shared_cluster"),
    "push.NoFirstSync": ("CTA may not have started", "st_shared_cluster"),
    "push.NoSync": (RACE_RAW, "ld_shared"),
    "push.NoRemoteArrival": ("deadlock", "mbarrier_wait_cluster"),
    "push.WrongRank": (RACE_WAW, "st_shared_cluster"),
    "multicast.NoFirstSync": ("CTA may not have started", "tma_load_multicast"),
    "multicast.NoLastSync": (TOO_EARLY, "mbarrier_arrive_cluster"),
    "multicast.NoPeerArrival": ("deadlock", "mbarrier_wait(empty"),
    "multicast.NoPeerCount": (RACE_WAW, "tma_load_multicast"),
    "multicast.WrongMask": ("deadlock", "mbarrier_wait(full"),
    "multicast.ExpectHalf": ("expect_tx too small", "tma_load_multicast"),
    "row_sum.NoFirstSync": (RACE_RAW, "ld_shared"),
    "row_sum.NoSecondSync": (RACE_WAR, "st_shared"),
    "row_sum.ReadsUnwritten": ("uninitialised shared memory", "ld_shared"),
    "row_sum.OutOfRange": ("shared memory out of range", "st_shared"),
    "row_sum.Misaligned": ("misaligned shared address", "st_shared"),
    "row_sum.DivergentShuffle": ("divergent warp", "shuffle_xor"),
    "row_sum.BarrierCount": ("named barrier: counts differ", "barrier_sync"),
    "transpose.NoWarpSync": (RACE_RAW, "ld_shared"),
    "accumulate.NoProxyFence": ("missing proxy fence", "bulk_reduce_add"),
    "accumulate.NoBarrier": (RACE_RAW, "bulk_reduce_add"),
    "accumulate.NoStoreWait": (RACE_WAR, "st_shared"),
}
CORRECT = ("pipeline", "pull", "push", "multicast", "row_sum", "transpose", "accumulate")


def cases_in_source() -> set[str]:
    text = (TESTS / "planted.cpp").read_text()
    plain = {f"{kernel}.{bug}" for kernel, bug in re.findall(r"^ +CASE\((\w+), \w+, (\w+)\)", text, re.M)}
    return plain | {f"pipeline.{bug}" for bug in re.findall(r"^ +PIPELINE\((\w+)\)", text, re.M)}


def test_every_planted_case_is_tested():
    assert cases_in_source() == {*PLANTED, *(f"{kernel}.None" for kernel in CORRECT)}


@functools.cache
def outcomes(run: Callable[..., str], name: str) -> list[tuple[str, list[tuple[str, str]], bool]]:
    """-> (schedule, [(kind, the source line it names)], whether the result is right) of each run."""
    results = []
    for line in run("planted", "run", name).splitlines():
        schedule, findings, result = line.split("\t")
        found = []
        for finding in filter(None, findings.split("; ")):
            kind, where = finding.rsplit("@", 1)
            file, number = where.split(":")
            found.append((kind, (TESTS / file).read_text().splitlines()[int(number) - 1]))
        results.append((schedule, found, result == "right"))
    assert {schedule for schedule, _, _ in results} == set(SCHEDULES)
    return results


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistake(run: Callable[..., str], name: str):
    expected = PLANTED[name]
    results = outcomes(run, name)
    if expected is None:
        assert not any(found or right for _, found, right in results)
        return
    assert all(found for _, found, _ in results), "a schedule that finds nothing"
    kind, text = expected
    assert any(kind == k and text in line for _, found, _ in results for k, line in found), results


@pytest.mark.parametrize("kernel", CORRECT)
def test_no_false_alarm(run: Callable[..., str], kernel: str):
    assert all(right and not found for _, found, right in outcomes(run, f"{kernel}.None"))
    run("planted", "seeds", "220", f"{kernel}.None")


def table_row(name: str, results: list[tuple[str, list[tuple[str, str]], bool]]) -> str:
    """F: this schedule reports something; R: the result is wrong."""
    expected = PLANTED[name]
    cells = ["the numbers" if expected is None else f"{expected[0]}, at `{expected[1].split('(')[0]}`"]
    for schedule in SCHEDULES:
        found = any(found for s, found, _ in results if s == schedule)
        wrong = any(not right for s, _, right in results if s == schedule)
        cells.append(("F" if found else "") + ("R" if wrong else ""))
    return f"| `{name}` | {' | '.join(cells)} |"


def test_documented_table(run: Callable[..., str]):
    """docs/emulator.md says of each mistake what each schedule notices."""
    documented = [s for s in (ROOT / "docs/emulator.md").read_text().splitlines() if re.match(r"\| `\w+\.\w+`", s)]
    assert documented == [table_row(name, outcomes(run, name)) for name in PLANTED]


# ---- the twins


def device_names(text: str) -> set[str]:
    text = re.sub(r"namespace detail \{.*?\n\}  // namespace detail", "", text, flags=re.S)
    names = set(re.findall(r"__forceinline__ [\w:<>, ]+?[ &*](\w+)\(", text))
    names |= set(re.findall(r"^inline [\w:<>, ]+ (\w+)\(", text, re.M))
    names |= set(re.findall(r"^FASTATTN_(?:GLOBAL|APPROX)\w+\((\w+), \"", text, re.M))
    return names - {"NAME"}


def emulated_names(text: str) -> set[str]:
    text = re.sub(r"namespace detail \{.*?\n\}  // namespace detail", "", text, flags=re.S)
    result = "void|bool|float|uint32_t|T|fp16|bf16"
    names = set(re.findall(rf"^ *(?:template <[^\n]*> )?(?:inline )?(?:{result}) (\w+)\(", text, re.M))
    names |= set(re.findall(r"^using emulator::(make_\w+);", text, re.M))
    return names


@pytest.mark.parametrize("header", sorted(p.name for p in (EMULATOR / "ptx").glob("*.h") if p.name != "language.h"))
def test_twins_declare_the_same_functions(header: str):
    device = device_names((ROOT / "csrc/cuda/ptx" / header).read_text())
    assert device
    assert emulated_names((EMULATOR / "ptx" / header).read_text()) == device


def test_headers_with_instructions_have_twins():
    twins = {p.name for p in (EMULATOR / "ptx").glob("*.h")}
    of_device = {p.name for p in (ROOT / "csrc/cuda/ptx").glob("*.h") if "asm" in p.read_text()}
    assert of_device - {"wgmma_shapes.h"} <= twins
