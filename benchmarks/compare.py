"""`bench compare`: what became slower between two runs, by more than their noise."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Key, Results, Row, read_json
from benchmarks.summary import geometric_mean
from fastattn.errors import ArgumentError

QUARTILES_APART = 1.349  # standard deviations between the quartiles of a normal distribution
ERROR_OF_MEDIAN = 1.2533  # standard errors of the mean
THRESHOLD = 0.1  # two runs of the same code, minutes apart on a shared machine, have differed by 6 % beside a control
CERTAIN = 4.0  # standard errors: by chance in one row of 30 000


@dataclass(frozen=True)
class Change:
    """One provider on one workload, before and after."""

    before: Row
    after: Row
    ratio: float | None  # of the time after to the time before; None where one of them was not timed
    noise: float  # standard error of the ratio, as a fraction
    verdict: str  # same, slower, faster, or the statuses of a row that is no longer, or now, timed

    @property
    def is_regression(self) -> bool:
        return self.before.ours and (self.verdict == "slower" or (self.before.status == "ok" != self.after.status))


def compare(
    before: Results, after: Results, *, threshold: float = THRESHOLD, relative_to: str = "peers"
) -> list[Change]:
    """The rows that both runs have.

    Args:
        before, after: two runs of the suite.
        threshold: the smallest change of a time that counts, as a fraction.
        relative_to: by whose time in the same run, on the same workload, each time is divided, so that what changed the
            whole machine between the runs cancels out. "peers": the peer whose own change is the median of the
            peers', for a row of ours; a workload without a peer is taken as it is. "nothing": by no time. Else a
            provider; rows without its time in both runs, and its own, are left out.

    Raises:
        ArgumentError: the runs have no row in common, or none with a time of `relative_to`.
    """
    rows = [{(row.key, row.provider): row for row in results.rows} for results in (before, after)]
    pairs = {key: (rows[0][key], rows[1][key]) for key in rows[0] if key in rows[1]}
    if not pairs:
        raise ArgumentError("the two files have no workload and provider in common.")
    if relative_to in ("peers", "nothing"):
        return [
            change(*pair, median_peer(pairs, key) if relative_to == "peers" and pair[0].ours else None, threshold)
            for key, pair in pairs.items()
        ]
    controlled = [
        change(*pair, pairs[workload, relative_to], threshold)
        for (workload, provider), pair in pairs.items()
        if provider != relative_to and timed(pairs.get((workload, relative_to)))
    ]
    if not controlled:
        raise ArgumentError(f"`--relative-to` is {relative_to!r}, which no workload of both files has a time of.")
    return controlled


def timed(pair: tuple[Row, Row] | None) -> bool:
    return pair is not None and all(row.seconds for row in pair)


def median_peer(pairs: dict[tuple[Key, str], tuple[Row, Row]], key: tuple[Key, str]) -> tuple[Row, Row] | None:
    """Of the peers of a workload, that whose change is in the middle, which no single peer's own change moves far."""
    peers = [pair for (workload, _), pair in pairs.items() if workload == key[0] and not pair[0].ours and timed(pair)]
    peers.sort(key=lambda pair: (pair[1].seconds or 0) / (pair[0].seconds or 1))
    return peers[len(peers) // 2] if peers else None


def change(before: Row, after: Row, controls: tuple[Row, Row] | None, threshold: float) -> Change:
    if not before.seconds or not after.seconds:
        verdict = "same" if before.status == after.status else f"{before.status} -> {after.status}"
        return Change(before, after, None, 0.0, verdict)
    ratio, noise = after.seconds / before.seconds, math.hypot(noise_of(before), noise_of(after))
    if controls is not None:
        assert controls[0].seconds
        assert controls[1].seconds
        ratio *= controls[0].seconds / controls[1].seconds
        noise = math.hypot(noise, *map(noise_of, controls))
    beyond = max(threshold, CERTAIN * noise)
    verdict = "slower" if ratio > 1 + beyond else "faster" if 1 / ratio > 1 + beyond else "same"
    return Change(before, after, ratio, noise, verdict)


def noise_of(row: Row) -> float:
    """The standard error of a row's median, as a fraction of it, from its quartiles."""
    if not row.seconds or row.fastest_quarter is None or row.slowest_quarter is None or row.samples < 1:
        return 0.0
    deviation = (row.slowest_quarter - row.fastest_quarter) / QUARTILES_APART
    return ERROR_OF_MEDIAN * deviation / math.sqrt(row.samples) / row.seconds


def vanished(before: Results, after: Results) -> list[Row]:
    """Rows of ours that only the first run has."""
    known = {(row.key, row.provider) for row in after.rows}
    return [row for row in before.rows if row.ours and (row.key, row.provider) not in known]


def differences(before: Results, after: Results) -> list[str]:
    """What else is not the same in the two runs."""
    found = [
        f"{name}: {a} and {b}"
        for name, a, b in (
            ("device", before.machine["device"]["name"], after.machine["device"]["name"]),
            ("threads", before.machine.get("threads"), after.machine.get("threads")),
            ("environment", *(results.machine.get("environment") for results in (before, after))),
        )
        if a != b
    ]
    versions = before.machine["versions"], after.machine["versions"]
    names = [name for name in versions[0] if name not in ("fastattn", "commit")]
    return found + [
        f"{n}: {versions[0][n]} and {versions[1].get(n)}" for n in names if versions[0][n] != versions[1].get(n)
    ]


def format_changes(changes: Sequence[Change], everything: bool = False) -> str:
    lines = [f"{'workload':<52}{'provider':<18}{'before µs':>12}{'after µs':>12}{'ratio':>8}{'noise':>7}  verdict"]
    for c in changes:
        if c.verdict == "same" and not everything:
            continue
        name = " ".join((c.before.family, c.before.name, c.before.dtype, c.before.direction))
        times = "".join(f"{row.seconds * 1e6:>12.1f}" if row.seconds else f"{'–':>12}" for row in (c.before, c.after))
        ratio = f"{c.ratio:>8.3f}{c.noise:>7.1%}" if c.ratio else f"{'':>15}"
        lines.append(
            f"{name:<52}{c.before.provider:<18}{times}{ratio}  {c.verdict}{', a regression' * c.is_regression}"
        )
    if len(lines) == 1:
        lines = ["no row changed by more than its noise"]
    by_family: dict[str, list[float]] = {}
    for c in changes:
        if c.before.ours and c.ratio:
            by_family.setdefault(c.before.family, []).append(c.ratio)
    for family, ratios in by_family.items():
        lines.append(f"{family}: {geometric_mean(ratios):.3f} of the time before, over {len(ratios)} rows of fastattn")
    return "\n".join(lines)


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, but is {text}")
    return value


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m fastattn bench compare", description="Two runs of the suite, row by row.")
    p.add_argument("before", type=Path, metavar="BEFORE.json")
    p.add_argument("after", type=Path, metavar="AFTER.json")
    p.add_argument("--threshold", type=fraction, default=THRESHOLD, help=f"smallest change that counts: {THRESHOLD}")
    p.add_argument(
        "--relative-to", metavar="PROVIDER", default="peers",
        help="divide each time by this provider's of the same run; default: by the middle one of the peers",
    )  # fmt: skip
    p.add_argument("--all", action="store_true", help="show the rows that did not change too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 1 if a row of fastattn is slower or no longer right, else 0."""
    args = parser().parse_args(argv)
    before, after = read_json(args.before), read_json(args.after)
    changes = compare(before, after, threshold=args.threshold, relative_to=args.relative_to)
    for difference in differences(before, after):
        print(f"not the same in both: {difference}")
    for row in vanished(before, after):
        print(f"only in {args.before}: {row.family} {row.name} {row.dtype} {row.direction}, {row.provider}")
    print(format_changes(changes, args.all))
    regressions = sum(c.is_regression for c in changes)
    print(f"{regressions} regressions in {len(changes)} rows")
    return 1 if regressions else 0
