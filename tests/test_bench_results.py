"""The files that a run leaves: JSON of a known form, CSV, and what is refused when they are read."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from results_example import example

from benchmarks.results import read_json, write_csv, write_json
from fastattn.errors import ArgumentError

SCHEMA = json.loads((Path(__file__).parent.parent / "benchmarks" / "schema.json").read_text())
STORED = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*/results.json"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())


@pytest.fixture
def written(tmp_path) -> Path:
    write_json(example(), tmp_path / "results.json")
    return tmp_path / "results.json"


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_what_is_written_is_of_the_schema_and_read_again(written):
    VALIDATOR.validate(json.loads(written.read_text()))
    assert read_json(written) == example()
    assert sorted(path.name for path in written.parent.iterdir()) == ["results.json"]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_stored_results_are_of_the_schema(path):
    VALIDATOR.validate(json.loads(path.read_text()))
    assert read_json(path).rows


DAMAGE = {
    "another version": lambda d: d.update(schema=2),
    "no machine": lambda d: d.pop("machine"),
    "no device name": lambda d: d["machine"]["device"].update(name=""),
    "no torch version": lambda d: d["machine"]["versions"].pop("torch"),
    "an unknown field": lambda d: d["rows"][0].update(speed=1),
    "no time of a right row": lambda d: d["rows"][0].update(seconds=None),
    "a time of a wrong row": lambda d: next(r for r in d["rows"] if r["status"] == "wrong").update(seconds=1.0),
    "a failure without a reason": lambda d: next(r for r in d["rows"] if r["status"] == "failed").update(reason=None),
    "an unknown status": lambda d: d["rows"][0].update(status="fine"),
    "a negative time": lambda d: d["rows"][0].update(seconds=-1.0),
    "a ceiling in words": lambda d: d["ceilings"].update(bytes_per_s="much"),
    "rows that are no list": lambda d: d.update(rows={}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_schema_refuses(written, damage):
    data = json.loads(written.read_text())
    DAMAGE[damage](data)
    assert not VALIDATOR.is_valid(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a benchmark result"),
        ("[]", "is not a benchmark result; `python -m fastattn bench --out DIR` writes them"),
        ('{"kind": "other"}', "is not a benchmark result"),
        ('{"kind": "fastattn-benchmark", "schema": 7}', "has version 7 of the results' form; this fastattn reads 1"),
    ],
)
def test_other_files_are_refused_by_a_sentence(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"x\.json") as caught:
        read_json(tmp_path / "x.json")
    assert message in str(caught.value)


UNREADABLE = {
    "no machine": (lambda d: d.pop("machine"), "missing 1 required positional argument: 'machine'"),
    "no rows": (lambda d: d.pop("rows"), "'rows'"),
    "no version": (lambda d: d.pop("schema"), "has version None of the results' form"),
    "no device name": (lambda d: d["machine"].update(device={}), "'name'"),
    "an unknown field": (lambda d: d["rows"][0].update(speed=1), "unexpected keyword argument 'speed'"),
    "no family": (lambda d: d["rows"][0].pop("family"), "missing 1 required positional argument: 'family'"),
    "an unknown status": (lambda d: d["rows"][0].update(status="fine"), "status is 'fine'"),
    "a time in words": (lambda d: d["rows"][0].update(seconds="fast"), "seconds is 'fast'"),
    "no time of a right row": (lambda d: d["rows"][0].update(seconds=None), "is ok with a time of None"),
    "a time of 0": (lambda d: d["rows"][0].update(seconds=0.0), "is ok with a time of 0.0"),
    "a time that is NaN": (lambda d: d["rows"][0].update(seconds=float("nan")), "it holds NaN"),
    "a time of a wrong row": (
        lambda d: next(r for r in d["rows"] if r["status"] == "wrong").update(seconds=1.0),
        "is wrong with a time of 1.0",
    ),
    "a row that is a number": (lambda d: d["rows"].append(3), "int"),
}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_damaged_files_are_refused_by_a_sentence(written, damage):
    spoil, message = UNREADABLE[damage]
    data = json.loads(written.read_text())
    spoil(data)
    written.write_text(json.dumps(data))
    with pytest.raises(ArgumentError, match=r"results\.json") as caught:
        read_json(written)
    assert message in str(caught.value)


def test_numbers_that_json_does_not_have_are_not_written(tmp_path):
    bad = example()
    bad.rows[0] = replace(bad.rows[0], error=float("inf"))
    write_json(example(), tmp_path / "r.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(bad, tmp_path / "r.json")
    assert read_json(tmp_path / "r.json") == example()  # the file before is whole


def test_csv_has_a_line_for_each_row_and_what_follows_from_it(tmp_path):
    write_csv(example(), tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(example().rows)
    for line, row in zip(lines, example().rows, strict=True):
        assert line["provider"] == row.provider
        assert line["reason"] == (row.reason or "")
        assert line["tflops"] == ("" if row.tflops is None else str(row.tflops))
        peers = [r.seconds for r in example().rows if r.key == row.key and r.seconds and not r.ours]
        assert line["to_best_peer"] == ("" if row.seconds is None else str(min(peers) / row.seconds))
        assert line["gb_per_s"] == ("" if row.gb_per_s is None else str(row.gb_per_s))


def test_rates_are_what_was_done_over_the_time():
    row = next(row for row in example().rows if row.status == "ok" and row.flops)
    assert row.seconds is not None
    assert row.tflops == row.flops / row.seconds / 1e12
    assert row.gb_per_s == row.bytes / row.seconds / 1e9
    assert row.of_roofline == row.floor / row.seconds
    assert replace(row, seconds=None).tflops is None
