"""The benchmark of MultiheadAttention that returns weights."""

from __future__ import annotations

from benchmarks import returned_weights


def test_rows(monkeypatch):
    for name, value in {"WIDTHS": (8,), "HEADS": (2,), "SECONDS": 0.0, "FEWEST": 2}.items():
        monkeypatch.setattr(returned_weights, name, value)
    rows = list(returned_weights.rows((4, 5)))
    assert [(row["L"], row["mode"]) for row in rows] == [(L, m) for L in (4, 5) for m in ("eval", "train", "dropout")]
    assert all(row["fastattn_ms"] > 0.0 and row["torch_ms"] > 0.0 for row in rows)
