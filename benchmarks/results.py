"""What a run leaves: machine, ceilings and one row for each workload and provider, as JSON and as CSV.

The form of the JSON is `schema.json`; `SCHEMA` is its version, raised whenever a reader of the old form would be wrong.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fastattn.errors import ArgumentError

SCHEMA = 1
Made = TypeVar("Made")
Key = tuple[str, str, str, str]  # of a workload: family, name, direction, dtype
Status = Literal["ok", "wrong", "unsupported", "unavailable", "failed"]


@dataclass
class Row:
    """One provider on one workload. Times in seconds, sizes in bytes; what was not measured is None."""

    family: str  # of the workload, as `name`, `direction` and `dtype`, which together are its key
    name: str
    direction: str  # forward, backward, or step: both
    dtype: str
    series: str  # rows of one series and provider make one curve over `size`
    size: int
    provider: str
    status: Status
    reason: str | None = None  # of any status but ok
    flops: float = 0.0
    bytes: float = 0.0
    error: float | None = None  # largest distance from float64, in roundings of the largest number
    eager_error: float | None = None  # of the unfused operation in the same dtype
    seconds: float | None = None  # median
    fastest_quarter: float | None = None  # 25 % of the samples are below
    slowest_quarter: float | None = None  # 25 % of the samples are above
    samples: int = 0
    timing: str | None = None  # events, graph or clock
    peak_bytes: int | None = None  # beyond the inputs
    floor: float | None = None  # seconds that the measured ceilings allow at best
    clock_mhz: float | None = None
    power_w: float | None = None

    @property
    def key(self) -> Key:
        return self.family, self.name, self.direction, self.dtype

    @property
    def ours(self) -> bool:
        return self.provider.split("/")[0] == "fastattn"

    @property
    def tflops(self) -> float | None:
        return self.flops / self.seconds / 1e12 if self.seconds and self.flops else None

    @property
    def gb_per_s(self) -> float | None:
        return self.bytes / self.seconds / 1e9 if self.seconds and self.bytes else None

    @property
    def of_roofline(self) -> float | None:
        """The fraction of what the ceilings allow."""
        return self.floor / self.seconds if self.seconds and self.floor else None


@dataclass
class Results:
    machine: dict[str, Any]  # `machine.describe`
    ceilings: dict[str, float]  # `ceilings.measure`: bytes_per_s, flops_per_s by dtype
    arguments: list[str]
    started: str  # ISO 8601, UTC
    rows: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.machine['device']['name']}, torch {self.machine['versions']['torch']}"

    def by_workload(self) -> dict[Key, list[Row]]:
        grouped: dict[Key, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.key, []).append(row)
        return grouped

    def best_peers(self) -> dict[Key, float]:
        """Seconds of the fastest right peer of each workload that has one."""
        best: dict[Key, float] = {}
        for row in self.rows:
            if row.seconds and not row.ours:
                best[row.key] = min(row.seconds, best.get(row.key, row.seconds))
        return best


def write_json(results: Results, path: Path) -> None:
    """Replaces the file at once, so that a run that is cut short leaves a whole one."""
    text = json.dumps({"schema": SCHEMA, "kind": "fastattn-benchmark", **asdict(results)}, indent=1, allow_nan=False)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Results:
    """
    Raises:
        ArgumentError: the file is no benchmark result, or one of another version.
    """
    try:
        data = json.loads(path.read_text(), parse_constant=not_a_number)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be read as a benchmark result: {error}") from None
    if not isinstance(data, dict) or data.pop("kind", None) != "fastattn-benchmark":
        raise ArgumentError(f"{path} is not a benchmark result; `python -m fastattn bench --out DIR` writes them.")
    if (version := data.pop("schema", None)) != SCHEMA:
        raise ArgumentError(f"{path} has version {version} of the results' form; this fastattn reads {SCHEMA}.")
    try:
        results = made(Results, {**data, "rows": [made(Row, row) for row in data["rows"]]})
        check(results)
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"{path} is not of the form in benchmarks/schema.json: {error}.") from None
    return results


def not_a_number(name: str) -> None:
    raise ValueError(f"it holds {name}")


def made(kind: type[Made], given: dict[str, Any]) -> Made:
    """
    Raises:
        TypeError: a field is missing, unknown, or of another type.
    """
    hints = get_type_hints(kind)
    if odd := [name for name in given if name in hints and not is_of(given[name], hints[name])]:
        raise TypeError(f"{odd[0]} is {given[odd[0]]!r}")
    return kind(**given)


def is_of(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(is_of(value, part) for part in get_args(hint))
    return isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)


def check(results: Results) -> None:
    """What everything that reads results relies on, beyond the types."""
    name, versions = results.machine["device"]["name"], results.machine["versions"]
    if not isinstance(name, str) or not isinstance(versions["torch"], str):
        raise TypeError("the machine has no name, or no version of torch")
    for row in results.rows:
        if (row.status == "ok") != bool(row.seconds):
            raise ValueError(f"{row.family} {row.name} of {row.provider} is {row.status} with a time of {row.seconds}")


def write_csv(results: Results, path: Path) -> None:
    """Each row, what follows from it, and the time of the best peer over its own."""
    best = results.best_peers()
    names = [f.name for f in fields(Row)]
    derived = ("tflops", "gb_per_s", "of_roofline")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *derived, "to_best_peer"])
        for row in results.rows:
            ratio = best[row.key] / row.seconds if row.seconds and row.key in best else None
            writer.writerow([*(getattr(row, name) for name in (*names, *derived)), ratio])
