"""`bench compare` catches a slowdown, and nothing that is only noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from results_example import example, row
from test_cli import run

from benchmarks import compare as module
from benchmarks.compare import compare, noise_of
from benchmarks.results import Results, Row, write_json
from benchmarks.timing import summarize
from fastattn.errors import ArgumentError

SEEDS = range(300)


def measured(rng, seconds: float, provider="fastattn/triton", samples=30, spread=0.08) -> Row:
    """A row from drawn samples: mostly a normal spread, now and then something in the way."""
    values = seconds * (1 + spread * rng.standard_normal(samples))
    values[rng.random(samples) < 0.05] *= 2
    timing = summarize([float(v) for v in values], "clock")
    return replace(
        row(provider=provider, seconds=timing.median), fastest_quarter=timing.fastest_quarter,
        slowest_quarter=timing.slowest_quarter, samples=samples,
    )  # fmt: skip


def results(*rows: Row) -> Results:
    return replace(example(), rows=list(rows))


def verdicts(before: Results, after: Results, **options) -> list[str]:
    return [change.verdict for change in compare(before, after, **options)]


@pytest.mark.parametrize("samples", [9, 30, 100])
@pytest.mark.parametrize("spread", [0.01, 0.08])
def test_noise_is_not_a_slowdown(samples, spread):
    alarms = 0
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        before, after = (results(measured(rng, 1e-3, samples=samples, spread=spread)) for _ in range(2))
        alarms += verdicts(before, after) != ["same"]
    assert alarms <= len(SEEDS) // 100


@pytest.mark.parametrize("factor", [1.2, 1 / 1.2])
def test_twenty_percent_are_caught(factor):
    caught = 0
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        before, after = results(measured(rng, 1e-3)), results(measured(rng, 1e-3 * factor))
        caught += verdicts(before, after) == ["slower" if factor > 1 else "faster"]
    assert caught >= 0.98 * len(SEEDS)


@pytest.mark.parametrize("factor", [1.0, 1.2])
@pytest.mark.parametrize("peers", [1, 3])
def test_beside_peers_too_which_have_noise_of_their_own(peers, factor):
    """With the samples of a thorough run."""
    slower = 0
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        before, after = (
            results(measured(rng, s, samples=60), *(measured(rng, 2e-3, f"p{i}", samples=60) for i in range(peers)))
            for s in (1e-3, 1e-3 * factor)
        )
        slower += verdicts(before, after)[0] == "slower"
    assert slower >= 0.98 * len(SEEDS) if factor > 1 else slower <= len(SEEDS) // 100


def test_a_drift_of_the_whole_machine_cancels_out_beside_a_control():
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        before = results(measured(rng, 1e-3), measured(rng, 2e-3, "torch/flash"))
        after = results(measured(rng, 1.3e-3), measured(rng, 2.6e-3, "torch/flash"))
        alone = verdicts(before, after, relative_to="nothing")
        found.append((alone, verdicts(before, after)[0], verdicts(before, after, relative_to="torch/flash")))
    assert sum(alone == ["slower", "slower"] for alone, _, _ in found) >= 0.98 * len(SEEDS)
    assert sum(ours == "same" for _, ours, _ in found) >= 0.99 * len(SEEDS)
    assert sum(beside == ["same"] for *_, beside in found) >= 0.99 * len(SEEDS)


def test_one_peer_that_changed_is_no_control():
    """A new version of it, say: the middle one counts."""
    peers = {"a": (1.0, 1.0), "b": (2.0, 2.02), "c": (3.0, 1.5)}
    before = results(row(seconds=1.0), *(row(seconds=t[0], provider=p) for p, t in peers.items()))
    after = results(row(seconds=1.2), *(row(seconds=t[1], provider=p) for p, t in peers.items()))
    found = {c.before.provider: c for c in compare(before, after)}
    assert found["fastattn/triton"].ratio == pytest.approx(1.2)
    assert found["fastattn/triton"].is_regression
    assert found["c"].verdict == "faster"
    assert not found["c"].is_regression


def test_beside_a_control_a_slowdown_of_ours_alone_is_caught():
    before = results(row(seconds=1e-3), row(seconds=2e-3, provider="torch/flash"))
    after = results(row(seconds=1.56e-3), row(seconds=2.6e-3, provider="torch/flash"))
    (change,) = compare(before, after, relative_to="torch/flash")
    assert change.ratio == pytest.approx(1.2)
    assert change.is_regression


def test_the_threshold_is_the_least_that_counts():
    before, after = results(row(seconds=1e-3, samples=10_000)), results(row(seconds=1.04e-3, samples=10_000))
    assert verdicts(before, after) == ["same"]
    assert verdicts(before, after, threshold=0.03) == ["slower"]


def test_the_noise_is_the_standard_error_of_the_median():
    medians = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        medians.append(np.median(1 + 0.1 * rng.standard_normal(100)))
    quartiles = {"fastest_quarter": 1 - 0.06745, "slowest_quarter": 1 + 0.06745, "samples": 100}
    assert noise_of(row(seconds=1.0, **quartiles)) == pytest.approx(np.std(medians), rel=0.15)


@pytest.mark.parametrize(
    ("before", "after", "verdict", "regression"),
    [
        (row(), row(status="wrong", reason="r"), "ok -> wrong", True),
        (row(), row(status="failed", reason="r"), "ok -> failed", True),
        (row(status="wrong", reason="r"), row(), "wrong -> ok", False),
        (row(status="failed", reason="r"), row(status="failed", reason="s"), "same", False),
        (row(provider="torch/flex"), row(provider="torch/flex", status="failed", reason="r"), "ok -> failed", False),
        (row(provider="torch/flex"), row(provider="torch/flex", seconds=1.0), "slower", False),
    ],
)
def test_what_counts_as_a_regression(before, after, verdict, regression):
    (change,) = compare(results(before), results(after))
    assert (change.verdict, change.is_regression) == (verdict, regression)


def test_runs_without_anything_in_common_are_refused():
    with pytest.raises(ArgumentError, match="no workload and provider in common"):
        compare(results(row(name="a")), results(row(name="b")))
    with pytest.raises(ArgumentError, match="`--relative-to` is 'nobody'"):
        compare(example(), example(), relative_to="nobody")


def test_the_command_fails_on_a_planted_slowdown_and_not_on_the_same_again(tmp_path):
    before, after = example(), example()
    i = next(i for i, r in enumerate(after.rows) if r.family == "layer_norm" and r.ours)
    slow = after.rows[i]
    assert slow.seconds is not None
    after.rows[i] = replace(slow, seconds=1.2 * slow.seconds)
    after.machine["versions"] = {**after.machine["versions"], "torch": "9.9"}
    for name, r in (("a", before), ("b", after)):
        write_json(r, tmp_path / f"{name}.json")
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    same = run("bench", "compare", a, a)
    assert same.returncode == 0, same.stderr
    assert "no row changed by more than its noise" in same.stdout
    assert same.stdout.endswith(f"0 regressions in {len(before.rows)} rows\n")
    done = run("bench", "compare", a, b)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if "slower" in line]
    assert line.split()[:3] == ["layer_norm", slow.name, "bfloat16"]
    assert line.endswith("slower, a regression")
    assert "1.200" in line
    assert "not the same in both: torch: 2.13.0 and 9.9" in done.stdout
    assert run("bench", "compare", a, b, "--threshold", "0.5").returncode == 0


def test_rows_that_are_gone_are_said(tmp_path, capsys):
    whole, less = example(), example()
    gone = less.rows.pop(0)
    for name, r in (("a", whole), ("b", less)):
        write_json(r, tmp_path / f"{name}.json")
    assert module.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    shown = capsys.readouterr().out
    assert f"{gone.family} {gone.name} {gone.dtype} {gone.direction}, {gone.provider}" in shown.splitlines()[0]
