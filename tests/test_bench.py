"""The measuring half of the benchmark suite: workloads, the gate, timing, and a run from the command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from results_example import example
from test_cli import run

from benchmarks import families, gate
from benchmarks.ceilings import Ceilings
from benchmarks.problems.attention import AttentionProblem, VarlenProblem
from benchmarks.problems.rows import CrossEntropyProblem, NormProblem, SoftmaxProblem
from benchmarks.provider import Call, Provider, choose, discover
from benchmarks.results import Results, Row, read_json
from benchmarks.runner import Runner
from benchmarks.summary import standings
from benchmarks.timing import Effort
from benchmarks.workload import Workload
from fastattn import backends
from fastattn.errors import ArgumentError, UnsupportedError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
BRIEF = Effort(seconds=0.0, fewest=2, most=3)


def workload(problem, direction="forward", dtype=F32) -> Workload:
    return Workload("family", "name", problem, dtype, direction, "series", 1)


ATTENTION = AttentionProblem(2, 4, 40, 40, 16, causal=True, H_kv=2)
PROBLEMS = {
    "attention": ATTENTION,
    "window": AttentionProblem(1, 2, 20, 30, 16, causal=True, window=5),
    "softcap and bias": AttentionProblem(1, 2, 20, 30, 16, softcap=2.0, bias=True),
    "documents": AttentionProblem(1, 2, 30, 30, 16, documents=(7, 3, 20)),
    "varlen": VarlenProblem((5, 1, 12), 2, 16, causal=True),
    "norm": NormProblem("rms_norm", 30, 24, residual=True),
    "softmax": SoftmaxProblem(32, 16, causal=True, scale=0.5),
    "cross_entropy": CrossEntropyProblem(20, 50),
}


def provider(function=None, name="planted", canonical=None, **fields) -> Provider:
    """Computes every problem of the tests by its own equation, and then `function` of that."""

    def make(problem, tensors) -> Call:
        def call(**given):
            y = problem.compute(given)
            return y if function is None else function(y)

        return Call(call, tensors) if canonical is None else Call(call, tensors, canonical)

    return Provider(name, {problem.op: make for problem in PROBLEMS.values()}, **fields)


def rows(*providers: Provider, problem=ATTENTION, direction="forward", dtype=F32) -> list[Row]:
    runner = Runner(CPU, providers, Ceilings(1e10, {"float32": 1e11}), BRIEF)
    return runner.rows(workload(problem, direction, dtype))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.05


def one_entry_off(y):
    y = y.clone()
    y.view(-1)[-1] += 0.05
    return y


def nan_at_the_end(y):
    return torch.cat((y.reshape(-1)[:-1], y.new_full((1,), math.nan))).view(y.shape)


WRONG = {
    "two percent too large": (lambda y: y * 1.02, "the result is"),
    "one entry off": (one_entry_off, "the result is up to"),
    "the first head of zeros": (lambda y: torch.cat((0 * y[:, :1], y[:, 1:]), 1), "the result is up to"),
    "NaN": (nan_at_the_end, "the result is up to inf"),
    "another shape": (lambda y: y[..., :-1], "the result has shape (2, 4, 40, 15), not (2, 4, 40, 16)"),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("planted", WRONG)
def test_a_wrong_kernel_is_refused_a_speed_figure(planted, dtype):
    function, reason = WRONG[planted]
    wrong, right = rows(provider(function), provider(name="right"), dtype=dtype)
    assert (wrong.status, wrong.seconds, wrong.tflops) == ("wrong", None, None)
    assert wrong.reason is not None
    assert wrong.reason.startswith(reason)
    assert right.status == "ok"
    assert right.seconds is not None
    assert right.seconds > 0


def test_a_wrong_gradient_is_refused_a_speed_figure():
    wrong, right = rows(provider(WrongGradient.apply), provider(name="right"), direction="backward")
    assert (wrong.status, wrong.seconds) == ("wrong", None)
    assert wrong.reason is not None
    assert all(f"d{name} is" in wrong.reason for name in "qkv")
    assert right.status == "ok"
    assert rows(provider(WrongGradient.apply))[0].status == "ok"  # it is asked for no gradient


def test_torch_right_by_luck_refuses_nobody():
    """Where the unfused operation has no error at all, the simulated errors decide: a right call is not refused."""
    asked = workload(PROBLEMS["attention"], "backward")
    inputs = asked.problem.inputs(F32, CPU)
    dy = gate.gradient_of_result(asked, inputs)
    truth = gate.truth_of(asked, inputs, dy)
    lucky = dataclasses.replace(truth, eager=dict.fromkeys(truth.eager, gate.Errors(0.0, 0.0)))
    right, wrong = provider(), provider(WrongGradient.apply)
    right, wrong = (p.ops["attention"](asked.problem, inputs) for p in (right, wrong))
    assert gate.hold(dataclasses.replace(lucky, simulate=lambda: lucky.eager), gate.results(asked, right, dy)).wrong
    assert gate.check(lucky, right, dy).wrong is None
    assert gate.check(lucky, wrong, dy).wrong is not None


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("direction", ["forward", "backward", "step"])
def test_the_right_one_is_timed_and_its_error_shown(name, direction):
    (row,) = rows(provider(), problem=PROBLEMS[name], direction=direction)
    assert row.status == "ok", row.reason
    assert row.seconds is not None
    assert row.fastest_quarter <= row.seconds <= row.slowest_quarter
    assert row.samples == BRIEF.fewest
    assert row.timing == "clock"
    assert row.peak_bytes is not None
    assert row.peak_bytes > 0
    assert row.error is not None
    assert row.eager_error is not None
    assert row.error <= 2 * row.eager_error + 1


def test_another_layout_is_seen_through():
    """A provider of (B, S, H, D) tensors: result and gradients are compared in the problem's layout."""

    def make(problem, tensors) -> Call:
        def call(q, k, v):
            return problem.compute({n: t.transpose(1, 2) for n, t in zip("qkv", (q, k, v), strict=True)}).transpose(
                1, 2
            )

        return Call(call, {n: t.transpose(1, 2).contiguous() for n, t in tensors.items()}, lambda t: t.transpose(1, 2))

    for direction in ("forward", "backward"):
        (row,) = rows(Provider("transposed", {"attention": make}), direction=direction)
        assert row.status == "ok", row.reason


def test_who_cannot_run_says_why_and_the_others_go_on():
    def fail(problem, tensors):
        raise RuntimeError("CUDA error: <misaligned>\nmore")

    def refuse(problem, tensors):
        raise UnsupportedError("attention: no head dimension 16.")

    found = rows(
        provider(name="absent", available=lambda device: "not installed"),
        provider(name="limited", limits=lambda workload, device: "not so many heads"),
        Provider("other", {}),
        Provider("failing", {"attention": fail}),
        Provider("refusing", {"attention": refuse}),
        provider(name="right"),
    )
    assert [(row.provider, row.status, row.reason) for row in found] == [
        ("absent", "unavailable", "not installed"),
        ("limited", "unsupported", "not so many heads"),
        ("failing", "failed", "RuntimeError: CUDA error: <misaligned>"),
        ("refusing", "unsupported", "attention: no head dimension 16."),
        ("right", "ok", None),
    ]
    assert [row.seconds is None for row in found] == [True] * 4 + [False]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_truth_is_the_whole_of_the_result_and_of_each_gradient(name):
    """Computed head by head, and put together."""
    asked = workload(PROBLEMS[name], "step", torch.float64)
    inputs = asked.problem.inputs(torch.float64, CPU)
    dy = gate.gradient_of_result(asked, inputs)
    truth = gate.truth_of(asked, inputs, dy)
    whole = gate.results(asked, Call(gate.unfused(asked.problem), inputs), dy)
    assert tuple(whole["y"].shape) == asked.problem.result_shape()
    torch.testing.assert_close(truth.exact, whole)


@pytest.mark.parametrize(
    "problem",
    [
        AttentionProblem(1, 1, 17, 17, 16),
        AttentionProblem(1, 1, 17, 17, 16, causal=True),
        AttentionProblem(1, 1, 7, 17, 16, causal=True),
        AttentionProblem(1, 1, 17, 7, 16, causal=True),
        AttentionProblem(1, 1, 17, 23, 16, causal=True, window=4),
        AttentionProblem(1, 1, 23, 17, 16, causal=True, window=0),
        AttentionProblem(1, 1, 20, 20, 16, causal=True, documents=(3, 17)),
        AttentionProblem(1, 1, 20, 20, 16, documents=(3, 1, 16)),
    ],
    ids=str,
)
def test_operations_counted_are_those_of_the_scores_that_are_seen(problem):
    seen = problem.visible(CPU)
    mask = problem.inputs(F32, CPU).get("mask")
    seen = torch.ones(problem.S_q, problem.S_k, dtype=torch.bool) if seen is None else seen
    seen = seen if mask is None else seen & mask[0, 0]
    assert problem.pairs == seen.sum()
    assert problem.flops("forward") == 4 * seen.sum() * 16
    assert problem.flops("step") == 3.5 * problem.flops("forward")


def test_varlen_counts_its_sequences():
    lengths = (5, 0, 12)
    whole = VarlenProblem(lengths, 2, 16, causal=True)
    assert whole.flops("forward") == 2 * 4 * 16 * sum(n * (n + 1) // 2 for n in lengths)
    assert whole.bounds == [0, 5, 5, 17]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workloads_are_told_apart_and_each_is_ours_to_run(device):
    known = families.workloads(torch.device(device))
    assert len({(w.family, w.name, w.direction, w.dtype_name) for w in known}) == len(known)
    ours = [p for p in discover() if p.name.startswith("fastattn")]
    others = [p for p in discover() if not p.name.startswith("fastattn")]
    for w in known:
        for group in (ours, others):
            assert any(w.problem.op in p.ops for p in group), w
        assert w.bytes > 0
    quick = families.workloads(torch.device(device), quick=True)
    assert 0 < len(quick) < len(known)
    assert {w.family for w in quick} <= {w.family for w in known}


def test_the_attention_grid_is_the_standard_one():
    grid = [w for w in families.workloads(torch.device("cuda")) if w.family == "attention"]
    assert len(grid) == 3 * 6 * 2 * 2
    for w in grid:
        p = w.problem
        assert isinstance(p, AttentionProblem)
        assert (p.B * p.S_q, p.H * p.D) == (16_384, 2048)


def test_what_holds_all_scores_leaves_room_for_the_others():
    long = workload(AttentionProblem(1, 32, 16_384, 16_384, 64), dtype=BF16)
    refused = {p.name for p in discover() if "attention" in p.ops and "all scores" in (p.limits(long, CPU) or "")}
    assert refused == {"torch/eager", "torch/compile", "torch/math"}


def test_a_truth_that_does_not_fit_fails_its_workload_alone(monkeypatch):
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gate, "truth_of", no_memory)
    (row,) = rows(provider())
    assert (row.status, row.seconds) == ("failed", None)
    assert row.reason is not None
    assert "float64" in row.reason


def test_unknown_families_and_providers_are_named_with_the_known_ones():
    known = families.workloads(CPU)
    with pytest.raises(ArgumentError, match=r"`family` is 'norms'; the families are 'attention', .*'train_step'"):
        families.select(known, ["norms"])
    with pytest.raises(ArgumentError, match=r"`--vs` has 'fa9'; the providers are fastattn/cuda, fastattn/triton, .*"):
        choose(["fa9"], discover())
    assert {p.name for p in choose(["torch/flex"], discover()) if not p.name.startswith("fastattn")} == {"torch/flex"}
    assert len(choose(["torch"], discover())) > len(choose(["torch/flex"], discover()))


def test_the_regression_set_runs_under_pytest_benchmark():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-k", "softmax"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of ours
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    assert "test_speed[softmax causal 4096x256 float32 forward]" in done.stdout


def test_the_roof_is_the_slower_of_copies_and_products():
    ceilings = Ceilings(1e9, {"float32": 1e12})
    long, short = AttentionProblem(1, 8, 4096, 4096, 64), AttentionProblem(1, 8, 1, 4096, 64)
    assert ceilings.floor(workload(long)) == workload(long).flops / 1e12
    assert ceilings.floor(workload(short)) == workload(short).bytes / 1e9
    assert ceilings.floor(workload(long, dtype=BF16)) == workload(long, dtype=BF16).bytes / 1e9  # no ceiling measured


def test_standings_are_against_the_fastest_peer_that_is_right():
    def row(provider, seconds, status="ok", name="w"):
        return Row("f", name, "forward", "float32", "s", 1, provider, status, seconds=seconds)

    rows_ = [
        row("fastattn/triton", 1.0), row("fastattn/eager", 5.0), row("a", 2.0), row("b", 0.5, "wrong"),
        row("fastattn/triton", 4.0, name="v"), row("a", 2.0, name="v"), row("fastattn/triton", 1.0, name="alone"),
    ]  # fmt: skip
    (ours,) = standings(Results({}, {}, [], "", rows_))
    assert (ours.count, ours.won) == (2, 1)
    assert ours.speedup == pytest.approx(1.0)


def test_a_run_leaves_what_it_promises(tmp_path):
    done = run("bench", "softmax causal", "--quick", "--vs", "torch/eager", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = read_json(tmp_path / "results.json")
    ours = {p.name for p in discover() if p.name.startswith("fastattn")}
    assert {row.provider for row in results.rows} == {*ours, "torch/eager"} - {"fastattn/nn", "fastattn/nn compiled"}
    timed = [row for row in results.rows if row.status == "ok"]
    kernels = {"fastattn/cpu"} if backends.get("cpu").available(CPU) is None else set()
    assert {row.provider for row in timed} == {*kernels, "fastattn/eager", "torch/eager"}
    for row in timed:
        assert row.seconds is not None
        assert f"{row.seconds * 1e6:.1f} µs" in done.stdout
        assert row.floor is not None
        assert row.gb_per_s == pytest.approx(row.bytes / row.seconds / 1e9)
    assert results.machine["threads"] > 0
    assert results.ceilings["bytes_per_s"] > 1e8
    assert (tmp_path / "results.csv").read_text().count("\n") == len(results.rows) + 1
    assert "<table" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "plots").glob("*.png"))
    assert "softmax causal" in done.stdout.split("geometric means:")[1]


def test_a_bare_machine_needs_neither_tqdm_nor_matplotlib(tmp_path, monkeypatch, capsys):
    from benchmarks import main

    find_spec = importlib.util.find_spec
    absent = ("tqdm", "matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else find_spec(name, *a))
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    arguments = [
        "softmax",
        "--quick",
        "--seconds",
        "0",
        "--vs",
        "torch/eager",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert main.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "softmax: 256x4096, float32, forward" in shown
    assert "no plots, as matplotlib is not installed" in shown
    assert "no plots, as matplotlib is not installed" in (tmp_path / "report.html").read_text()
    assert len(read_json(tmp_path / "results.json").by_workload()) == 1


def test_a_run_that_is_cut_short_keeps_what_it_has(tmp_path):
    done = run(
        "bench", "softmax", "--quick", "--vs", "torch/eager", "--seconds", "0", "--no-plots", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert len(read_json(tmp_path / "results.json").by_workload()) == 1
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "norms"), "`family` is 'norms'; the families are 'attention'"),
        (("bench", "--vs", "nobody"), "`--vs` has 'nobody'; the providers are"),
        (("bench", "compare", "no.json", "none.json"), "no.json"),
        (("bench", "--threads", "0"), "must be at least 1, but is 0"),
        (("bench", "--seconds", "nan"), "argument --seconds: must be at least 0, but is nan"),
        (("bench", "--out", __file__), "which is a file; it must be a folder"),
        (("bench", "--out", "/proc/no"), "`--out` is /proc/no, where nothing can be written: "),
        (("bench", "overhead", "--rounds", "0"), "argument --rounds: must be at least 1, but is 0"),
        (("bench", "overhead", "--json", "/no/such/file"), "/no/such/file cannot be written: /no/such is no folder"),
        (("verify", "--json", str(ROOT)), "cannot be written: it is a folder"),
        pytest.param(
            ("bench", "--device", "cuda"),
            "`--device` is cuda, and torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_arguments_are_answered_by_a_sentence(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_list_names_families_and_providers():
    done = run("bench", "list")
    assert done.returncode == 0, done.stderr
    for family in dict.fromkeys(w.family for w in families.workloads(CPU)):
        assert f"\n{family} " in f"\n{done.stdout}"
    for p in discover():
        assert p.name in done.stdout


def test_the_tables_are_there_before_the_plots_are_drawn(tmp_path, monkeypatch):
    from benchmarks import main, plots

    def killed(results):
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "plots_of", killed)
    with pytest.raises(KeyboardInterrupt):
        main.write_everything(example(), tmp_path, plots=True)
    assert read_json(tmp_path / "results.json") == example()
    assert (tmp_path / "results.csv").exists()
    assert "stopped before they were drawn" in (tmp_path / "report.html").read_text()


def test_json_is_whole_after_every_workload(tmp_path, monkeypatch, capsys):
    """An interruption in between leaves a file that can be read, and a report of it."""
    from benchmarks import main

    seen = []
    write = main.write_json

    def interrupted(results, path):
        write(results, path)
        seen.append(len(json.loads(path.read_text())["rows"]))
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(main, "write_json", interrupted)
    arguments = ["softmax", "--quick", "--vs", "torch/eager", "--no-plots", "--out", str(tmp_path), "--device", "cpu"]
    assert main.run(arguments) == 130
    assert len(seen) == 3  # and once at the end
    assert (tmp_path / "results.csv").read_text().count("\n") == seen[-1] + 1
    assert "<table" in (tmp_path / "report.html").read_text()
    assert "interrupted" in capsys.readouterr().out
    assert all(b > a for a, b in pairwise(seen[:2]))
    assert len(read_json(tmp_path / "results.json").rows) == seen[-1]
