"""A pytest plugin for `--sample`: a third of the cases of each test, so that every kind of test is still run.

`make test` samples; `make test-all`, which CI runs, does not. Of a test with n cases a third is kept, at least two.
Every backend, dtype and other value of a short parameter stays: all values of each parameter that has at most SHORT of
them. The choice goes by the names of the cases, so that it is the same on every machine. Tests marked `thorough` are
left out.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict

import pytest
import torch

SHORT = 8
PLAIN = (str, int, float, bool, type(None), torch.dtype)


def sample(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """-> (kept, left out), each in the order of `items`."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("thorough") is None:
            cases[item.nodeid.partition("[")[0]].append(item)
    kept = {item for same in cases.values() for item in sample_of_one(same)}
    return [item for item in items if item in kept], [item for item in items if item not in kept]


def sample_of_one(items: list[pytest.Item]) -> list[pytest.Item]:
    """The cases of one test that are kept."""
    if len(items) <= 2:
        return items
    values: dict[str, set] = defaultdict(set)
    for item in items:
        for name, value in parameters(item):
            values[name].add(value)
    short = {name for name, distinct in values.items() if len(distinct) <= SHORT}
    in_order = sorted(items, key=lambda item: hashlib.sha1(item.nodeid.encode()).digest())
    kept, seen = [], set()
    for item in in_order:
        new = {(name, value) for name, value in parameters(item) if name in short} - seen
        if new:
            kept.append(item)
            seen |= new
    wanted = max(2, -(-len(items) // 3))
    rest = [item for item in in_order if item not in kept]
    return kept + rest[: max(0, wanted - len(kept))]


def parameters(item: pytest.Item) -> list[tuple[str, object]]:
    """Name and value of each parameter; the place in its list where a value is no plain one."""
    if (spec := getattr(item, "callspec", None)) is None:
        return []
    return [
        (name, value if isinstance(value, PLAIN) else f"#{spec.indices[name]}") for name, value in spec.params.items()
    ]
