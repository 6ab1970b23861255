"""The tables of docs/cpu.md, from the results of a run.

python -m benchmarks.figures benchmarks/results/cpu/results.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.results import Results, Row, read_json
from benchmarks.summary import fastest, standings

SDPA = ("torch/flash", "torch/efficient", "torch/cudnn", "torch/math")


def table(*rows: tuple[str, ...]) -> str:
    head, *others = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others])


def by_family(results: Results) -> str:
    rows = [(s.family, f"{s.won} of {s.count}", f"{s.speedup:.2f}×") for s in standings(results)]
    return table(("family", "ahead in", "geometric mean"), *rows)


def attention(results: Results) -> str:
    """The range over lengths and head dimensions of the time of SDPA, and of the unfused operations, over ours."""
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for (family, name, direction, dtype), rows in results.by_workload().items():
        if family != "attention":
            continue
        found = [fastest([row for row in rows if who(row)]) for who in (_ours, _sdpa, _unfused)]
        ours, sdpa, unfused = (row.seconds if row else None for row in found)
        if ours and sdpa and unfused:
            group = dtype, "causal" if name.endswith("causal") else "full", direction
            groups.setdefault(group, []).append((sdpa / ours, unfused / ours))
    lines = [(*group, *map(_range, zip(*ratios, strict=True))) for group, ratios in sorted(groups.items())]
    return table(("dtype", "mask", "direction", "SDPA's time over ours", "unfused over ours"), *lines)


def _ours(row: Row) -> bool:
    return row.provider == "fastattn/cpu"


def _sdpa(row: Row) -> bool:
    return row.provider in SDPA


def _unfused(row: Row) -> bool:
    return row.provider == "torch/eager"


def _range(ratios: tuple[float, ...]) -> str:
    return f"{min(ratios):.1f}–{max(ratios):.1f}×"


def tables(results: Results) -> Iterator[str]:
    yield by_family(results)
    yield attention(results)


if __name__ == "__main__":
    print(*tables(read_json(Path(sys.argv[1]))), sep="\n\n")
