"""What the documentation links to exists: each file, and each test or named case after a #."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import cases
import pytest

from benchmarks import figures
from benchmarks.results import read_json
from benchmarks.summary import standings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)")


@cache
def names_in(path: Path) -> frozenset[str]:
    """The functions and tables of a Python file, and the named cases of cases.py."""
    tree = ast.parse(path.read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    targets = (target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets)
    names |= {target.id for target in targets if isinstance(target, ast.Name)}
    if path == Path(cases.__file__):
        tables = [table for table in vars(cases).values() if isinstance(table, list)]
        names |= {case.name for table in tables for case in table}
    return frozenset(names)


def headings(path: Path) -> frozenset[str]:
    """The anchors that GitHub gives to the headings of a page."""
    lines = re.findall(r"^#+ +(.+)$", path.read_text(), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines)


def broken(page: Path, text: str) -> list[str]:
    """What a link of a page points at and is not there."""
    missing = []
    for target, name in LINK.findall(text):
        path = (page.parent / target).resolve() if target else page
        if not path.exists():
            missing.append(target)
        elif name and name not in (names_in(path) if path.suffix == ".py" else headings(path)):
            missing.append(f"{target}#{name}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path):
    assert broken(page, page.read_text()) == []


def test_the_tables_are_those_of_the_results():
    results = read_json(ROOT / "benchmarks" / "results" / "cpu" / "results.json")
    page = (ROOT / "docs" / "cpu.md").read_text()
    assert [table for table in figures.tables(results) if table not in page] == []
    assert figures.share_of_sdpa(results) in (ROOT / "README.md").read_text()
    avx2 = standings(read_json(ROOT / "benchmarks" / "results" / "cpu-avx2" / "results.json"))
    assert f"in {sum(s.won for s in avx2)} of {sum(s.count for s in avx2)} workloads" in page


@pytest.mark.parametrize(
    ("link", "is_broken"),
    [
        ("../tests/test_docs.py#test_links", False),
        ("../tests/test_docs.py#test_link", True),
        ("../tests/cases.py#bias_heads_innermost", False),
        ("../tests/cases.py#bias_heads_outermost", True),
        ("../tests/test_nothing.py", True),
        ("#features", False),
        ("#futures", True),
        ("https://example.org/anything#at-all", False),
    ],
)
def test_broken_link_is_found(link: str, is_broken: bool):
    assert bool(broken(ROOT / "docs" / "features.md", f"see [this]({link}).")) == is_broken


def test_every_cell_of_fastattn_is_proven_or_refused():
    """In the table of features a cell links to a test, or says that it is not there yet."""
    rows = [line.split(" | ") for line in (ROOT / "docs" / "features.md").read_text().splitlines() if line[:2] == "| "]
    cells = {row[0].strip("| "): row[1] for row in rows[1:]}
    assert len(cells) > 20
    assert [feature for feature, cell in cells.items() if "](../tests/" not in cell and "not yet" not in cell] == []
