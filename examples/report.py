"""What the demo shows: a table, a plot of the losses, and files with the numbers."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

UNTIMED = 10  # first steps, which the speed leaves out: memory is allocated and kernels are compiled there
LAST = 20  # steps that the final loss is averaged over


@dataclass
class Run:
    """What one training run leaves."""

    library: str
    parameters: int
    tokens_per_step: int
    losses: list[float] = field(default_factory=list)  # nats a token, one a step
    seconds: list[float] = field(default_factory=list)
    validation_loss: float = math.nan
    peak_bytes: int = 0
    sample: str = ""
    backends: dict[str, str] = field(default_factory=dict)  # op -> what serves it
    explanations: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def final_loss(self) -> float:
        return fmean(self.losses[-LAST:])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / median(self.seconds[UNTIMED:] or self.seconds)


def differences(runs: list[Run]) -> list[float]:
    """How far the losses of two runs are apart, step by step."""
    return [abs(a - b) for a, b in zip(*(run.losses for run in runs), strict=False)]


def format_report(runs: list[Run]) -> str:
    last = runs[-1]
    parts = [format_table(table_of(runs))]
    if len(runs) == 2:
        parts.append(f"largest loss difference over all steps: {max(differences(runs)):.2g}")
    if last.explanations:
        parts.append("\n".join(["Why these backends:", *last.explanations]))
    sample = "\n".join(f"    {line}" for line in last.sample.splitlines())
    parts.append(f"A sample from the {last.library} model, prompt included:\n\n{sample}")
    return "\n\n".join(parts)


def table_of(runs: list[Run]) -> list[list[str]]:
    """Rows of a name and a value for each run."""
    return [
        ["", *(run.library for run in runs)],
        ["parameters", *(f"{run.parameters:,}" for run in runs)],
        ["steps", *(f"{len(run.losses)}" for run in runs)],
        ["training loss, first step", *(f"{run.losses[0]:.4f}" for run in runs)],
        [f"training loss, last {LAST} steps", *(f"{run.final_loss:.4f}" for run in runs)],
        ["validation loss", *(f"{run.validation_loss:.4f}" for run in runs)],
        ["tokens/s, median", *(f"{run.tokens_per_second:,.0f}" for run in runs)],
        ["peak memory, MiB", *(f"{run.peak_bytes / 2**20:,.0f}" for run in runs)],
        *([f"{op} runs on", *(run.backends.get(op, "torch") for run in runs)] for op in runs[-1].backends),
    ]


def format_table(rows: list[list[str]]) -> str:
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "  ".join([name.ljust(first), *(value.rjust(width) for value, width in zip(values, others, strict=True))])
        for name, *values in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(runs: list[Run], path: Path) -> None:
    """Both loss curves, and below them how far apart they are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    for run, style in zip(runs, ({"color": "0.7", "linewidth": 4}, {"color": "tab:red", "linewidth": 1}), strict=False):
        top.plot(range(1, len(run.losses) + 1), run.losses, label=run.library, **style)
    top.set_ylabel("training loss, nats a token")
    top.legend()
    if len(runs) == 2 and any(differences(runs)):
        bottom.plot(range(1, len(differences(runs)) + 1), differences(runs), ".", color="0.3", markersize=3)
        bottom.set_yscale("log", nonpositive="mask")  # steps that agree in every bit leave a gap
    bottom.set_ylabel("|difference|")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_files(runs: list[Run], settings: dict[str, object], out: Path) -> None:
    """losses.png, losses.csv and summary.json."""
    out.mkdir(parents=True, exist_ok=True)
    plot(runs, out / "losses.png")
    with (out / "losses.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(run.library for run in runs)])
        for step, losses in enumerate(zip(*(run.losses for run in runs), strict=False), start=1):
            writer.writerow([step, *losses])
    summary = {
        "settings": settings,
        "largest_loss_difference": max(differences(runs)) if len(runs) == 2 else None,
        "runs": [
            {
                "library": run.library,
                "parameters": run.parameters,
                "steps": len(run.losses),
                "final_loss": run.final_loss,
                "validation_loss": run.validation_loss,
                "tokens_per_second": run.tokens_per_second,
                "peak_bytes": run.peak_bytes,
                "backends": run.backends,
            }
            for run in runs
        ],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
