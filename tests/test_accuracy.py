"""The kernels are no less accurate than torch's operations of the same dtype: the table of benchmarks/accuracy.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy
from fastattn.verification import Check, prepare, row_checks

STORED = Path(accuracy.__file__).parent / "results" / "interpreter" / "accuracy.json"


@pytest.mark.parametrize("check", row_checks(), ids=lambda check: check.name)
def test_no_less_accurate_than_torch(check, device):
    """Plus a tenth of a rounding, for what is left to chance; or than torch's formula with simulated roundings."""
    rows = list(accuracy.rows(check, "triton", device))
    assert len(rows) >= 6
    less = [row for row in rows if row.fastattn_error > row.torch_error + 0.1]
    assert [row for row in less if row.fastattn_error > simulated_error(check, row, device) + 0.1] == []


def simulated_error(check: Check, row: accuracy.Row, device: torch.device) -> float:
    case = prepare(check, getattr(torch, row.dtype), device)
    return max(accuracy.error(draw, case.exact[row.tensor]) for draw in case.simulated[row.tensor])


def test_the_stored_table_is_of_these_checks():
    stored = json.loads(STORED.read_text())["rows"]
    assert list(dict.fromkeys(row["op"] for row in stored)) == [check.name for check in row_checks()]
