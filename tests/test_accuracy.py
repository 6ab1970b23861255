"""The kernels are no less accurate than torch's operations of the same dtype: the table of benchmarks/accuracy.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import accuracy
from fastattn.verification import row_checks

STORED = Path(accuracy.__file__).parent / "results" / "interpreter" / "accuracy.json"


@pytest.mark.parametrize("check", row_checks(), ids=lambda check: check.name)
def test_no_less_accurate_than_torch(check, device):
    """Plus a tenth of a rounding, for what is left to chance."""
    rows = list(accuracy.rows(check, "triton", device))
    assert len(rows) >= 6
    assert [row for row in rows if row.fastattn_error > row.torch_error + 0.1] == []


def test_the_stored_table_is_of_these_checks():
    stored = json.loads(STORED.read_text())["rows"]
    assert list(dict.fromkeys(row["op"] for row in stored)) == [check.name for check in row_checks()]
