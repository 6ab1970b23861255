"""The calculator of docs/scaling.md: its equations in closed form, and its limits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import run

from benchmarks import scaling
from benchmarks.results import Results, Row, read_json, write_json
from benchmarks.scaling import Layout, Model, Rates, predict
from fastattn.errors import ArgumentError

ROOT = Path(__file__).parent.parent
MODEL = Model(layers=4, d_model=1024, heads=16, kv_heads=4, V=32_000, S=4096)
RATES = Rates(products=600e12, attention_forward=500e12, attention_backward=400e12, memory=4e12, link=400e9)


def measured(provider: str, direction: str, tflops: float, D: int = 64, S: int = 4096, status="ok") -> Row:
    return Row(
        "attention", f"S{S}", direction, "bfloat16", f"D{D} causal", S, provider, status, flops=1e12,
        seconds=1 / tflops,
    )  # fmt: skip


def results(*rows: Row) -> Results:
    machine = {"device": {"name": "card", "type": "cuda"}, "versions": {"torch": "2", "triton": None}}
    return Results(
        machine, {"bytes_per_s": 4e12, "flops_per_s_bfloat16": 6e14}, [], "2026-01-01T00:00:00+00:00", [*rows]
    )


def test_parameters_are_those_of_the_model():
    d, kv = 1024, 4 * 64
    assert MODEL.layer_parameters == d * d + 2 * d * kv + d * d + 2 * 4 * d * d
    assert MODEL.parameters == 4 * MODEL.layer_parameters + 32_000 * d


def test_one_device_is_the_sum_of_its_parts():
    found = predict(MODEL, Layout(sequences=2), RATES)
    tokens = 2 * 4096
    attention = 4 * 4 * tokens * 4097 / 2 * 1024
    assert found.products == pytest.approx(6 * tokens * MODEL.parameters / 600e12)
    assert found.attention == pytest.approx(attention / 500e12 + 2.5 * attention / 400e12)
    assert (found.context_exchange, found.gradient_exchange) == (0, 0)
    assert found.seconds == pytest.approx(found.products + found.attention + found.memory_bound)
    assert found.parameters_bytes == 16 * MODEL.parameters


@pytest.mark.parametrize("method", scaling.METHODS)
@pytest.mark.parametrize("context", [2, 4])
def test_sharing_a_sequence_divides_arithmetic_and_activations(method, context):
    whole, shared = (predict(MODEL, Layout(8, c, method), RATES) for c in (1, context))
    assert shared.compute == pytest.approx(whole.compute / context)
    assert shared.activations_bytes == pytest.approx(whole.activations_bytes / context)


def test_exchanges_on_slow_links_are_the_bytes_over_the_bandwidth():
    """With arithmetic that takes no time nothing is hidden."""
    rates = replace(RATES, products=math.inf, attention_forward=math.inf, attention_backward=math.inf)
    tokens, c = 4096 / 4, 4
    kv, q = (2 * tokens * n * 64 * 2 * 4 for n in (4, 8))  # 16 heads of q are 2 · 8
    ring, ulysses = (predict(MODEL, Layout(4, 4, m), rates).context_exchange for m in scaling.METHODS)
    assert ring == pytest.approx((c - 1) * 4 * kv / 400e9)  # k, v; and k, v, dk, dv on the way back
    assert ulysses == pytest.approx(2 * (kv + 2 * q) * (c - 1) / c / 400e9)
    gradients = predict(MODEL, Layout(4, sharded=False), rates).gradient_exchange
    assert gradients == pytest.approx(2 * 3 / 4 * MODEL.parameters * 2 / 400e9)


def test_exchanges_hide_behind_enough_arithmetic():
    found = predict(MODEL, Layout(8, 4, "ring"), replace(RATES, link=1e15))
    assert (found.context_exchange, found.gradient_exchange) == (0, 0)
    assert predict(MODEL, Layout(8, 4, "ulysses"), replace(RATES, link=1e15)).context_exchange > 0


def test_more_gpus_hold_less_each_when_sharded():
    held = [predict(MODEL, Layout(n, sharded=True), RATES).parameters_bytes for n in (2, 8, 64)]
    assert held[0] > held[1] > held[2]
    assert predict(MODEL, Layout(8, sharded=False), RATES).parameters_bytes == 16 * MODEL.parameters


def test_rates_are_of_the_nearest_point_and_of_ours_where_it_is_right():
    rows = [
        measured("fastattn/triton", "forward", 400), measured("torch/cudnn", "forward", 600),
        measured("fastattn/triton", "forward", 100, S=512), measured("fastattn/triton", "forward", 700, D=128),
        measured("fastattn/triton", "backward", 300, status="wrong"), measured("torch/cudnn", "backward", 350),
    ]  # fmt: skip
    rates = Rates.of(results(*rows), MODEL, "bfloat16")
    assert rates.attention_forward == pytest.approx(400e12)
    assert rates.attention_backward == pytest.approx(350e12)
    assert (rates.products, rates.memory, rates.link) == (6e14, 4e12, math.inf)
    with pytest.raises(ArgumentError, match=r"`--dtype` is 'float16'; that run measured bfloat16"):
        Rates.of(results(*rows), MODEL, "float16")
    with pytest.raises(ArgumentError, match="these results have no causal attention forward in bfloat16"):
        Rates.of(results(), MODEL, "bfloat16")


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "results.json"
    step = Row("layer", "B4 S4096 d2048 H16", "step", "bfloat16", "d2048", 4096, "fastattn/nn", "ok", seconds=0.02)
    rows = [measured("fastattn/triton", d, t, 128) for d, t in (("forward", 500), ("backward", 400))]
    write_json(results(*rows, step), path)
    return path


def test_the_command_prints_every_layout(file, tmp_path):
    done = run("bench", "model", "--gpus", "8", "--results", str(file), "--json", str(tmp_path / "model.json"))
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "model.json").read_text())["layouts"]
    assert list(table) == [
        "replicated", "sharded", "sharded, ring of 2", "sharded, ring of 4", "sharded, ring of 8",
        "sharded, ulysses of 2", "sharded, ulysses of 4", "sharded, ulysses of 8",
    ]  # fmt: skip
    for name, entry in table.items():
        assert f"\n{name} " in done.stdout
        assert f"{entry['seconds'] * 1e3:.1f}" in done.stdout


def test_the_documented_points_are_those_of_the_stored_run():
    stored = read_json(ROOT / "benchmarks" / "results" / "cpu" / "results.json")
    page = (ROOT / "docs" / "scaling.md").read_text()
    found = scaling.check(stored)
    assert [row.family for row, _ in found] == ["layer", "train_step"]
    for row, predicted in found:
        assert row.seconds is not None
        ratio = predicted / row.seconds
        line = f"| {row.family} {row.name} | {predicted * 1e3:.2f} ms | {row.seconds * 1e3:.2f} ms | {ratio:.2f} |"
        assert line in page


def test_the_command_checks_itself_against_what_was_measured(file):
    done = run("bench", "model", "--results", str(file), "--check")
    assert done.returncode == 0, done.stderr
    model = Model(1, 2048, 16, 16, 0, 4096)
    predicted = predict(model, Layout(sequences=4), replace(RATES, link=math.inf)).seconds
    assert f"predicted {predicted * 1e3:.2f} ms, measured 20.00 ms, ratio {predicted / 0.02:.2f}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0"), "argument --gpus: must be at least 1, but is 0"),
        (("--heads", "24", "--kv-heads", "8"), "heads must divide d_model = 4096"),
        (("--link", "0"), "argument --link: must be positive and finite, but is 0"),
        (("--link", "nan"), "argument --link: must be positive and finite, but is nan"),
        (("--json", "/no/such/model.json"), "/no/such is no folder"),
    ],
)
def test_wrong_arguments_are_answered_by_a_sentence(file, arguments, message):
    done = run("bench", "model", "--results", str(file), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
