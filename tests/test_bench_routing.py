"""The benchmarks that routing on a CPU goes by, over a few small sizes."""

from __future__ import annotations

import pytest

from benchmarks import returned_weights, routing, timing
from fastattn.backends.cpu import module


def test_returned_weights(monkeypatch):
    for name, value in {"WIDTHS": (8,), "HEADS": (2,), "EFFORT": timing.Effort(0.0, 2, 2)}.items():
        monkeypatch.setattr(returned_weights, name, value)
    rows = list(returned_weights.rows((4, 5)))
    assert [(row["L"], row["mode"]) for row in rows] == [(L, m) for L in (4, 5) for m in ("eval", "train", "dropout")]
    assert all(row["fastattn_ms"] > 0.0 and row["torch_ms"] > 0.0 for row in rows)


@pytest.mark.skipif(module.why_not() is not None, reason="the native module is not built")
def test_short_sequences(monkeypatch):
    for name, value in {"SHORT_SHAPES": [(2, 1, 4, 4), (1, 1, 3, 9)], "ROUNDS": 1, "SECONDS": 1e-3}.items():
        monkeypatch.setattr(routing, name, value)
    rows = list(routing.short_rows())
    assert [row["shape"][:4] for row in rows] == [[2, 1, 4, 4]] * 4 + [[1, 1, 3, 9]] * 4
    assert [row["gradient"] for row in rows] == [False, True] * 4
    assert all(row["cpu_us"] > 0.0 and row["eager_us"] > 0.0 for row in rows)
