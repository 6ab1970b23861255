"""The tables and figures of docs/cpu.md and of the README's last lines, from the results of a run.

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


Trio = tuple[Row, Row, Row]  # fastattn's kernels, the fastest SDPA, the unfused operations


def attention_rows(results: Results) -> Iterator[Trio]:
    for (family, *_), rows in results.by_workload().items():
        if family != "attention":
            continue
        ours, sdpa, unfused = (fastest([row for row in rows if who(row)]) for who in (_ours, _sdpa, _unfused))
        if ours and sdpa and unfused:
            yield ours, sdpa, unfused


def ratio(row: Row, to: Row) -> float:
    assert row.seconds
    assert to.seconds
    return row.seconds / to.seconds


def attention(results: Results) -> str:
    """The range over lengths and head dimensions of the time of SDPA, and of the unfused operations, over ours."""
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for ours, sdpa, unfused in attention_rows(results):
        group = ours.dtype, "causal" if ours.name.endswith("causal") else "full", ours.direction
        groups.setdefault(group, []).append((ratio(sdpa, ours), ratio(unfused, ours)))
    lines = [(*group, *map(_range, zip(*ratios, strict=True))) for group, ratios in sorted(groups.items())]
    return table(("dtype", "mask", "direction", "SDPA's time over ours", "unfused over ours"), *lines)


def share_of_sdpa(results: Results) -> str:
    shares = [ratio(ours, sdpa) for ours, sdpa, _ in attention_rows(results)]
    return f"{min(shares):.2f} to {max(shares):.2f} of the time"


def rates(results: Results) -> str:
    """What a long forward without a mask computes, beside the large products that torch was measured at."""
    rows = []
    for dtype in ("bfloat16", "float32"):
        found = [
            [row.flops / row.seconds for row in (ours, sdpa) if row.seconds]
            for ours, sdpa, _ in attention_rows(results)
            if ours.dtype == dtype and ours.direction == "forward" and ours.size >= 512 and ours.name[-6:] != "causal"
        ]
        product = results.ceilings[f"flops_per_s_{dtype}"]
        ranges = (f"{min(each) / 1e9:.0f}–{max(each) / 1e9:.0f}" for each in zip(*found, strict=True))
        rows.append((dtype, *ranges, f"{product / 1e9:.0f}"))
    return table(("GFLOP/s in", "attention", "SDPA", "torch's large matrix products"), *rows)


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
    yield rates(results)


if __name__ == "__main__":
    print(*tables(read_json(Path(sys.argv[1]))), sep="\n\n")
