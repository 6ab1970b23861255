"""Plots of a run: speed and memory against size, and the roofline."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import Results, Row
from benchmarks.summary import duels

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ours in one strong colour; peers in Okabe and Ito's, which are told apart whatever the eye.
OURS = "#d62728"
PEERS = ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7", "#7f7f7f", "#000000", "#b8a400")
MARKERS = "osD^v<>PX*"
COLUMNS = 3
NO_MATPLOTLIB = "There are no plots, as matplotlib is not installed."
METADATA = {"svg": {"Date": None}, "png": {"Software": None}}


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """(file name without suffix, figure): for each family and direction speed and memory; then the roofline."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        if row.status == "ok":
            groups.setdefault((row.family, row.direction), []).append(row)
    styles = styles_of(results)
    for (family, direction), rows in groups.items():
        name = f"{family} {direction}".replace("+", "and").replace(" ", "_")
        flops = all(row.flops for row in rows)
        speed: Callable[[Row], float | None] = (lambda r: r.tflops) if flops else (lambda r: r.gb_per_s)
        title = f"{family}, {direction}: {results.title}"
        yield name, curves(rows, styles, speed, "TFLOP/s" if flops else "GB/s", title)
        yield f"{name}_memory", curves(rows, styles, mebibytes, "peak memory beyond the inputs, MiB", title, log=True)
    if any(row.of_roofline for row in results.rows):
        yield "roofline", roofline(results)


def mebibytes(row: Row) -> float | None:
    return row.peak_bytes / 2**20 if row.peak_bytes else None


def styles_of(results: Results) -> dict[str, dict[str, object]]:
    """How each provider is drawn, in all plots of a run."""
    names = list(dict.fromkeys(row.provider for row in results.rows))
    peers = [name for name in names if not name.startswith("fastattn")]
    ours = [name for name in names if name.startswith("fastattn")]
    styles: dict[str, dict[str, object]] = {
        name: {"color": OURS, "marker": MARKERS[i], "linewidth": 2.2, "linestyle": ("-", "--", ":")[i % 3], "zorder": 3}
        for i, name in enumerate(ours)
    }
    for i, name in enumerate(peers):
        styles[name] = {
            "color": PEERS[i % len(PEERS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linewidth": 1.2,
            "alpha": 0.9,
        }
    return styles


def curves(
    rows: list[Row],
    styles: dict[str, dict[str, object]],
    value: Callable[[Row], float | None],
    unit: str,
    title: str,
    log: bool = False,
) -> Figure:
    """One panel for each series and dtype, one line a provider."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.series, row.dtype) for row in rows))
    columns = 2 if len(panels) == 4 else min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.6 + 3.6 * columns, 1.1 + 2.7 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for panel, (series, dtype) in zip(axes.flat, panels, strict=False):
        panel_rows = [row for row in rows if (row.series, row.dtype) == (series, dtype)]
        draw(panel, panel_rows, styles, value, log)
        panel.set_title(f"{series}, {dtype}", fontsize=9)
    for panel in axes.flat[len(panels) :]:
        panel.remove()
    figure.supxlabel("size (sequence length, row length, or tokens)", fontsize=9)
    figure.supylabel(unit, fontsize=9)
    figure.suptitle(title, fontsize=10)
    providers = list(dict.fromkeys(row.provider for row in rows))
    handles: dict[str, Artist] = {}
    for panel in axes.flat:
        drawn, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(map(str, labels), drawn, strict=True))
    shown = [name for name in providers if name in handles]
    figure.legend([handles[n] for n in shown], shown, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def draw(
    panel: Axes, rows: list[Row], styles: dict[str, dict[str, object]], value: Callable[[Row], float | None], log: bool
) -> None:
    for provider in dict.fromkeys(row.provider for row in rows):
        points = sorted((r.size, v) for r in rows if r.provider == provider and (v := value(r)) is not None)
        if points:
            panel.plot(*zip(*points, strict=True), label=provider, markersize=4, **styles[provider])  # type: ignore[arg-type]
    sizes = sorted({row.size for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [short(size) for size in sizes], fontsize=7, minor=False)
    panel.set_xticks([], minor=True)
    panel.tick_params(axis="y", labelsize=7)
    if log:
        panel.set_yscale("log")
        from matplotlib.ticker import NullFormatter

        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}" if spans_less_than_a_decade(rows, value) else NullFormatter())
        panel.tick_params(axis="y", which="minor", labelsize=6)
    else:
        panel.set_ylim(bottom=0)
    panel.grid(True, linewidth=0.4, alpha=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def spans_less_than_a_decade(rows: list[Row], value: Callable[[Row], float | None]) -> bool:
    values = [v for row in rows if (v := value(row))]
    return bool(values) and max(values) < 10 * min(values)


def short(size: int) -> str:
    return f"{size // 1024}k" if size >= 1024 and size % 1024 == 0 else str(size)


def roofline(results: Results) -> Figure:
    """Operations a second against operations a byte: ours and the best peer of each workload, under the ceilings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    panel = figure.subplots()
    found = [d for d in duels(results) if any(r and r.flops and r.bytes for r in (d.ours, d.best_peer))]
    for label, color, marker, which in (
        ("fastest peer", "#0072b2", "s", lambda d: d.best_peer),
        ("fastattn", OURS, "o", lambda d: d.ours),
    ):
        rows = [row for d in found if (row := which(d)) is not None and row.tflops]
        panel.scatter(
            [r.flops / r.bytes for r in rows], [r.tflops for r in rows], s=22, c=color, marker=marker, label=label,
            linewidths=0,
        )  # fmt: skip
    intensities = [r.flops / r.bytes for d in found for r in (d.ours, d.best_peer) if r] or [1.0, 100.0]
    xs = [2**e for e in range(math.floor(math.log2(min(intensities))) - 1, math.ceil(math.log2(max(intensities))) + 2)]
    for i, (name, flops) in enumerate(results.ceilings.items()):
        if name.startswith("flops_per_s_"):
            roof = [min(flops, x * results.ceilings["bytes_per_s"]) / 1e12 for x in xs]
            dtype = name.removeprefix("flops_per_s_")
            panel.plot(
                xs, roof, color="#444444", linestyle=("-", "--", ":")[i % 3], linewidth=1, label=f"roof, {dtype}"
            )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("operations per byte that has to move", fontsize=9)
    panel.set_ylabel("TFLOP/s", fontsize=9)
    panel.set_title(f"Roofline: {results.title}", fontsize=10)
    panel.grid(True, linewidth=0.4, alpha=0.5)
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def as_svg(figure: Figure) -> str:
    """The same for the same figure."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastattn", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata=METADATA["svg"], transparent=True)
    return file.getvalue()


@dataclass(frozen=True)
class Plot:
    """One figure, drawn: what takes the time of a report is done once, for the page and for the files."""

    name: str
    figure: Figure
    svg: str


def plots_of(results: Results) -> list[Plot]:
    """None without matplotlib."""
    found = []
    for name, figure in figures(results) if available() else ():
        svg = as_svg(figure)
        figure.set_layout_engine("none")  # which has its places now
        found.append(Plot(name, figure, svg))
    return found


def write_plots(plots: Sequence[Plot], folder: Path) -> None:
    """A PNG and an SVG of each figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        (folder / f"{plot.name}.svg").write_text(plot.svg)
        plot.figure.savefig(folder / f"{plot.name}.png", dpi=110, metadata=METADATA["png"])
