"""What the rows of a run say together: against the best peer of each workload, and by family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.results import Key, Results, Row


@dataclass(frozen=True)
class Duel:
    """Our fastest right row of a workload and the fastest right one of a peer; either may be missing."""

    key: Key
    ours: Row | None
    best_peer: Row | None

    @property
    def speedup(self) -> float | None:
        """Time of the peer over ours: above 1, we are faster."""
        if self.ours is None or self.best_peer is None or not self.ours.seconds or not self.best_peer.seconds:
            return None
        return self.best_peer.seconds / self.ours.seconds


def fastest(rows: Sequence[Row]) -> Row | None:
    timed = [row for row in rows if row.status == "ok" and row.seconds]
    return min(timed, key=lambda row: row.seconds or math.inf) if timed else None


def duels(results: Results) -> list[Duel]:
    return [
        Duel(key, fastest([row for row in rows if row.ours]), fastest([row for row in rows if not row.ours]))
        for key, rows in results.by_workload().items()
    ]


@dataclass(frozen=True)
class Standing:
    """One family: how many duels, how many won, and the geometric mean of the speed-ups."""

    family: str
    count: int
    won: int
    speedup: float


def standings(results: Results) -> list[Standing]:
    by_family: dict[str, list[float]] = {}
    for duel in duels(results):
        if duel.speedup is not None:
            by_family.setdefault(duel.key[0], []).append(duel.speedup)
    return [
        Standing(family, len(ratios), sum(ratio >= 1 for ratio in ratios), geometric_mean(ratios))
        for family, ratios in by_family.items()
    ]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(fmean(map(math.log, values)))
