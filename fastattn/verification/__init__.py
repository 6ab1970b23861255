"""Every operation beside torch's, on small inputs: how far each is from float64. `python -m fastattn verify` shows it.

A `Check` computes one thing in two ways: ours, and torch's, as a program without this library would write it. Torch's
in float64 is the truth.
"""

from __future__ import annotations

from fastattn.verification.attention import attention_checks
from fastattn.verification.check import Case, Check, Finding, Report, examine, prepare
from fastattn.verification.rows import more_row_checks, row_checks

__all__ = ["Case", "Check", "Finding", "Report", "checks", "examine", "prepare", "row_checks"]


def checks() -> list[Check]:
    return [*attention_checks(), *row_checks(), *more_row_checks()]
