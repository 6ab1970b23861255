"""One HTML file that a person can open: how fastattn stands, where a peer is ahead, plots, and every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from benchmarks.plots import NO_MATPLOTLIB, Plot, available
from benchmarks.results import Key, Results, Row
from benchmarks.summary import duels, standings

ASSETS = Path(__file__).parent / "report_assets"
COLUMNS = (
    "workload", "dtype", "direction", "provider", "time µs", "± %", "× best peer", "TFLOP/s", "GB/s", "% of roof",
    "error", "unfused", "peak MiB", "timing", "MHz", "W", "status",
)  # fmt: skip
TEXT = ("workload", "dtype", "direction", "provider", "timing", "status")


EXPLANATION = """A row has a time only if its result, and its gradients, are as close to float64 as they should be:
at most twice (a gradient: three times) as far off as the unfused operation in the same dtype, and a rounding more.
<em>error</em> and <em>unfused</em> are the largest distances, in roundings of the dtype. Contestants took turns; times
are medians, with half the distance of the quartiles beside them. <em>× best peer</em> is the time of the fastest right
peer over that of the row: above 1, the row is faster. The roof is the slower of moving every byte once and
computing every product, at the rates measured; data that stays in a cache can go above it."""


def write_report(results: Results, plots: Sequence[Plot] | None, path: Path) -> None:
    """`plots`: None as long as they are not drawn."""
    path.write_text("".join(document(results, plots)), encoding="utf-8")


def document(results: Results, plots: Sequence[Plot] | None) -> Iterator[str]:
    css, js = ((ASSETS / name).read_text() for name in ("report.css", "report.js"))
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>fastattn: {escape(results.title)}</title><style>{css}</style></head><body>\n"
    yield from headline(results)
    yield from table_of_standings(results)
    yield from behind(results)
    yield from gallery(plots)
    yield "<h2>Every row</h2><p><label>Show rows with "
    yield '<input type="search" id="filter" placeholder="attention bfloat16 triton"></label></p>\n'
    for family in dict.fromkeys(row.family for row in results.rows):
        yield from family_section(family, [row for row in results.rows if row.family == family], results.best_peers())
    yield f"<script>{js}</script></body></html>\n"


def headline(results: Results) -> Iterator[str]:
    versions = ", ".join(
        f"{escape(str(name))} {escape(str(v))}" for name, v in results.machine["versions"].items() if v
    )
    command = escape(" ".join(["python -m fastattn bench", *results.arguments]))
    ceilings = [f"copies {results.ceilings['bytes_per_s'] / 1e9:.0f} GB/s"] if "bytes_per_s" in results.ceilings else []
    for name, flops in results.ceilings.items():
        if name.startswith("flops_per_s_"):
            ceilings.append(f"multiplies {flops / 1e12:.3g} TFLOP/s in {escape(name.removeprefix('flops_per_s_'))}")
    threads = results.machine.get("threads")
    yield f"<h1>fastattn on {escape(str(results.machine['device']['name']))}</h1>"
    yield f'<p class="soft">{escape(results.started)} · <code>{command}</code><br>{versions}<br>'
    load = results.machine.get("load")
    yield f"{f'load {load:.1f} before the run · ' if load is not None else ''}"
    yield f"{f'{threads} threads · ' if threads else ''}measured in this run: {', '.join(ceilings)}</p>\n"
    yield f"<p>{EXPLANATION}</p>\n"


def table_of_standings(results: Results) -> Iterator[str]:
    yield "<h2>Against the fastest peer of each workload</h2>"
    found = standings(results)
    if not found:
        yield "<p>No workload was timed both for fastattn and for a peer.</p>"
        return
    heads = ("family", "speed-up", "ahead in", "workloads")
    rows = [
        ((s.family, s.family), (s.speedup, f"{s.speedup:.2f}×"), (s.won, str(s.won)), (s.count, str(s.count)))
        for s in found
    ]
    yield from sortable("standings", heads, ("family",), [("", row) for row in rows])
    yield '<p class="soft">Geometric means: time of the fastest right peer over that of our fastest right backend.</p>'


def behind(results: Results) -> Iterator[str]:
    lost = [(d, d.speedup) for d in duels(results) if d.speedup is not None and d.speedup < 1]
    yield f"<h2>Where a peer is ahead: {len(lost)} workloads</h2>"
    if not lost:
        return
    yield "<details><summary>Show them</summary>"
    rows = []
    for d, speedup in sorted(lost, key=lambda pair: pair[1]):
        assert d.ours is not None
        assert d.best_peer is not None
        texts = [d.key[0], d.key[1], d.key[3], d.key[2], d.best_peer.provider, d.ours.provider]
        rows.append(("", (*((t, t) for t in texts), (speedup, f"{speedup:.2f}×"))))
    heads = ("family", "workload", "dtype", "direction", "peer", "ours", "speed-up")
    yield from sortable("behind", heads, heads[:-1], rows)
    yield "</details>"


def gallery(plots: Sequence[Plot] | None) -> Iterator[str]:
    yield "<h2>Plots</h2>"
    if not plots:
        why = "No row has a time to plot." if plots is not None else "The run was stopped before they were drawn."
        yield f"<p>{why if available() else NO_MATPLOTLIB}</p>"
        return
    yield '<div class="plots">'
    for plot in plots:
        label = escape(plot.name.replace("_", " "))
        prefixed = unique_ids(plot.svg[plot.svg.index("<svg") :], plot.name)
        yield f'<figure role="img" aria-label="{label}">{prefixed}</figure>\n'
    yield "</div>"


def unique_ids(svg: str, name: str) -> str:
    """matplotlib numbers its ids from the beginning in every figure; one page must hold each once."""
    prefix = "".join(c if c.isalnum() else "-" for c in name)
    return (
        svg.replace('id="', f'id="{prefix}-')
        .replace('xlink:href="#', f'xlink:href="#{prefix}-')
        .replace("url(#", f"url(#{prefix}-")
    )


def family_section(family: str, rows: Sequence[Row], best: dict[Key, float]) -> Iterator[str]:
    yield f'<section data-family="{escape(family)}"><h2>{escape(family)}</h2>'
    present = [row for row in rows if row.status != "unavailable"]
    lines = [cells(row, best) for row in present]
    filled = [i for i, head in enumerate(COLUMNS) if head in TEXT or any(line[i][1] for line in lines)]
    yield from sortable(
        "rows",
        [COLUMNS[i] for i in filled],
        TEXT,
        [("ours" if row.ours else "", [line[i] for i in filled]) for row, line in zip(present, lines, strict=True)],
    )
    if absent := list(dict.fromkeys((row.provider, row.reason or "") for row in rows if row.status == "unavailable")):
        items = "".join(f"<li>{escape(provider)}: {escape(reason)}</li>" for provider, reason in absent)
        yield f"<details><summary>{len(absent)} providers are not on this machine</summary><ul>{items}</ul></details>"
    yield "</section>\n"


def cells(row: Row, best: dict[Key, float]) -> tuple[tuple[object, str], ...]:
    spread = None
    if row.seconds and row.fastest_quarter is not None and row.slowest_quarter is not None:
        spread = (row.slowest_quarter - row.fastest_quarter) / row.seconds * 50
    status = row.status if row.reason is None else f"{row.status}: {row.reason}"
    numbers = (
        (row.seconds and row.seconds * 1e6, "{:.1f}"),
        (spread, "{:.0f}"),
        ((row.seconds and row.key in best and best[row.key] / row.seconds) or None, "{:.2f}"),
        (row.tflops, "{:.3g}"),
        (row.gb_per_s, "{:.4g}"),
        (row.of_roofline and row.of_roofline * 100, "{:.0f}"),
        (row.error, "{:.2f}"),
        (row.eager_error, "{:.2f}"),
        (None if row.peak_bytes is None else row.peak_bytes / 2**20, "{:.1f}"),
    )
    shown = tuple((n, "" if n is None else form.format(n)) for n, form in numbers)
    conditions = tuple((n, "" if n is None else f"{n:.0f}") for n in (row.clock_mhz, row.power_w))
    texts = tuple((t, t) for t in (row.name, row.dtype, row.direction, row.provider))
    return (*texts, *shown, (row.timing or "", row.timing or ""), *conditions, (status, status))


def sortable(
    kind: str, heads: Sequence[str], text: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[object, str]]]]
) -> Iterator[str]:
    """A table whose headers sort it. A row: its class, and for each cell its value and what is shown."""
    yield f'<div class="scroll"><table class="{kind}"><thead><tr>'
    for head in heads:
        css = ' class="text"' if head in text else ""
        yield f'<th scope="col" aria-sort="none"{css}><button type="button">{escape(head)}</button></th>'
    yield "</tr></thead><tbody>\n"
    for css, row in rows:
        yield f'<tr class="{css}">' if css else "<tr>"
        for head, (value, shown) in zip(heads, row, strict=True):
            if head in text:
                yield f'<td class="text{" reason" if head == "status" else ""}">{escape(shown)}</td>'
            else:
                yield (
                    f"<td>{escape(shown)}</td>"
                    if value is None
                    else f'<td data-value="{value:.6g}">{escape(shown)}</td>'
                )
        yield "</tr>\n"
    yield "</tbody></table></div>"
