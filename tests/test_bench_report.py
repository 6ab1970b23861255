"""The report as a file, and as a person sees it: opened in a browser."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from results_example import example

from benchmarks.plots import as_svg, figures, plots_of, write_plots
from benchmarks.report import write_report
from benchmarks.summary import duels, standings

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(example(), plots_of(example()), path)
    return path


class Page(HTMLParser):
    """Text of the cells of each table row, by the class of the table; and what a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.loads: list[str] = []
        self.ids: list[str] = []
        self._table = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.loads += [v for n, v in attrs if n in ("src", "href", "xlink:href") and v and not v.startswith("#")]
        self.ids += [given["id"]] if "id" in given else []
        if tag == "table":
            self._table = given["class"]
        elif tag == "tr":
            self.rows.setdefault(self._table, []).append([])
        elif tag == "td":
            self._in_cell = True
            self.rows[self._table][-1].append("")

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data):
        if self._in_cell:
            self.rows[self._table][-1][-1] += data


def test_every_row_is_there_and_told_as_it_is(report):
    page = Page(report.read_text())
    shown = [row for row in page.rows["rows"] if row]
    results = example()
    present = [row for row in results.rows if row.status != "unavailable"]
    by_family = {
        family: [r for r in present if r.family == family] for family in dict.fromkeys(r.family for r in present)
    }
    best = results.best_peers()
    for line, row in zip(shown, [r for rows in by_family.values() for r in rows], strict=True):
        assert line[:4] == [row.name, row.dtype, row.direction, row.provider]
        assert line[4] == ("" if row.seconds is None else f"{row.seconds * 1e6:.1f}")
        assert line[6] == (f"{best[row.key] / row.seconds:.2f}" if row.seconds else "")
        assert line[-1] == (row.status if row.reason is None else f"{row.status}: {row.reason}")
    assert escape("flash_attn/2: no <module>") in report.read_text()


def test_what_comes_from_outside_is_escaped(report):
    text = report.read_text()
    assert "<b>bold</b>" not in text
    assert escape("<b>bold</b>", quote=False) in text
    assert "Example &lt;card&gt;" in text
    assert "--vs a&lt;b" in text


def test_the_file_needs_nothing_else_and_ids_are_unique(report):
    page = Page(report.read_text())
    assert page.loads == []
    assert "filter" in page.ids
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', report.read_text()))
    assert used <= set(page.ids)


def test_standings_and_defeats_are_told(report):
    page = Page(report.read_text())
    told = {row[0]: row[1:] for row in page.rows["standings"] if row}
    for s in standings(example()):
        assert told[s.family] == [f"{s.speedup:.2f}×", str(s.won), str(s.count)]
    lost = [d for d in duels(example()) if d.speedup is not None and d.speedup < 1]
    assert lost
    assert len([row for row in page.rows["behind"] if row]) == len(lost)
    assert f"Where a peer is ahead: {len(lost)} workloads" in report.read_text()


def test_plots_are_the_same_each_time_and_show_every_provider():
    once, again = ({name: as_svg(figure) for name, figure in figures(example())} for _ in range(2))
    assert once == again
    assert set(once) == {
        "attention_forward", "attention_forward_memory", "attention_backward", "attention_backward_memory",
        "layer_norm_forward", "layer_norm_forward_memory", "roofline",
    }  # fmt: skip
    for provider in ("fastattn/triton", "fastattn/eager", "torch/cudnn", "torch/flash", "torch/flex"):
        assert provider in once["attention_forward"]
    assert "TFLOP/s" in once["attention_forward"]
    assert "GB/s" in once["layer_norm_forward"]
    assert "quack" not in once["layer_norm_forward"]  # it was wrong, and has no speed


@pytest.mark.parametrize(
    ("plots", "why"), [(None, "stopped before they were drawn"), ([], "No row has a time to plot")]
)
def test_a_report_without_plots_says_why(tmp_path, plots, why):
    write_report(example(), plots, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert why in text
    assert len([row for row in Page(text).rows["rows"] if row]) == sum(
        r.status != "unavailable" for r in example().rows
    )


def test_plots_are_pictures(tmp_path):
    write_plots(plots_of(example()), tmp_path)
    pictures = sorted(tmp_path.glob("*.png"))
    assert {p.stem for p in pictures} == {p.stem for p in tmp_path.glob("*.svg")}
    for path in pictures:
        with Image.open(path) as image:
            colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24)}
        assert (0xD6, 0x27, 0x28) in colors, path  # our line


@pytest.fixture
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield running
        running.close()


needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason="no chromium on PATH, or no playwright"
)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(report, browser, scheme):
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())

    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"), dtype=float)
    assert pixels.std() > 10  # not blank
    assert (pixels.mean() > 128) == (scheme == "light")

    table = page.locator("table.rows").first
    header = table.locator("th", has_text="time µs")

    def times() -> list[float]:
        texts = table.locator("tbody tr td:nth-child(5)").all_inner_texts()
        return [float(text) for text in texts if text]

    before = times()
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert times() == sorted(before) != before
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert times() == sorted(before, reverse=True)
    last = table.locator("tbody tr").last
    assert last.locator("td").nth(4).inner_text() == ""  # no time: last, whichever way
    name = table.locator("th", has_text="provider")
    name.locator("button").click()
    providers = table.locator("tbody tr td:nth-child(4)").all_inner_texts()
    assert providers == sorted(providers)
    assert header.get_attribute("aria-sort") == "none"

    everything = page.locator("table.rows tbody tr:visible").count()
    page.fill("#filter", "layer_norm compile")
    visible = page.locator("table.rows tbody tr:visible")
    assert visible.count() == 2 < everything
    assert all("torch/compile" in text for text in visible.all_inner_texts())
    page.fill("#filter", "")
    assert page.locator("table.rows tbody tr:visible").count() == everything

    assert troubles == []
    assert requests == [report.as_uri()]


@needs_browser
def test_in_a_narrow_window_only_tables_scroll(report, browser):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
