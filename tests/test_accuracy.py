"""The kernels are no less accurate than torch's operations of the same dtype: the table of benchmarks/accuracy.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "accuracy.py"
spec = importlib.util.spec_from_file_location("accuracy", BENCHMARK)
accuracy = importlib.util.module_from_spec(spec)
sys.modules["accuracy"] = accuracy  # where dataclasses look for it
spec.loader.exec_module(accuracy)


@pytest.mark.parametrize("op", accuracy.ops("triton", torch.device("cpu")))
def test_no_less_accurate_than_torch(op, device):
    """Plus a tenth of a rounding, for what is left to chance."""
    rows = list(accuracy.rows("triton", device, op))
    assert len(rows) >= 6
    assert [row for row in rows if row.fastattn_error > row.torch_error + 0.1] == []
