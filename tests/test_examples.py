"""What a newcomer runs first: the demo and the README's code."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from corpus import WORD, Tokenizer
from PIL import Image

from fastattn import backends

ROOT = Path(__file__).parent.parent
TINY = [
    "--steps",
    "6",
    "--d-model",
    "32",
    "--layers",
    "1",
    "--heads",
    "2",
    "--seq",
    "16",
    "--batch",
    "2",
    "--vocabulary",
    "260",
]


def run(*arguments: str) -> str:
    """Standard output of Python run as a newcomer would, that is without kernels in an interpreter or emulator."""
    simulators = ("TRITON_INTERPRET", "FASTATTN_EMULATE")
    environment = {name: value for name, value in os.environ.items() if name not in simulators}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def byte_pair_code(word: str, merges: list[tuple[int, int]]) -> list[int]:
    """The definition: each merge in turn, from left to right."""
    ids = list(word.encode("latin-1"))
    for new, pair in enumerate(merges, start=256):
        merged: list[int] = []
        for token in ids:
            if merged and (merged[-1], token) == pair:
                merged[-1] = new
            else:
                merged.append(token)
        ids = merged
    return ids


def test_tokenizer_follows_its_definition():
    text = (ROOT / "examples/corpus.py").read_text() + "\naaaaaaa aaaa =======\n"
    tokenizer = Tokenizer.train(text, 500)
    assert tokenizer.merges[0] == (32, 32)  # two spaces: the most frequent pair in any Python source
    assert len(tokenizer.vocabulary) == 500
    ids = tokenizer.encode(text).tolist()
    assert ids == [token for word in WORD.findall(text) for token in byte_pair_code(word, tokenizer.merges)]
    assert len(ids) < len(text) / 2
    assert tokenizer.decode(ids) == text


def test_demo_trains_and_compares(tmp_path):
    stdout = run("examples/train_lm.py", *TINY, "--device", "cpu", "--out", str(tmp_path))
    check_table(stdout)
    check_numbers(tmp_path)
    check_plot(tmp_path / "losses.png")


def check_table(stdout: str) -> None:
    rows = {line[:30].strip(): line.split()[-2:] for line in stdout.splitlines() if line.strip()}
    assert rows["steps"] == ["6", "6"]
    for name in ("training loss, first step", "training loss, last 20 steps", "validation loss"):
        # The same parameters and batches; near log(vocabulary) = 5.6 while so little trained.
        theirs, ours = map(float, rows[name])
        assert math.isclose(theirs, ours, abs_tol=1e-3)
        assert 5.0 < ours < 6.5
    compiled = backends.get("cpu").available(torch.device("cpu")) is None
    assert rows["attention runs on"] == ["torch", "cpu" if compiled else "eager"]
    assert "passed over" in stdout


def check_numbers(out: Path) -> None:
    with (out / "losses.csv").open() as file:
        header, *steps = csv.reader(file)
    assert header == ["step", "torch.nn", "fastattn.nn"]
    assert [int(step) for step, *_ in steps] == [1, 2, 3, 4, 5, 6]
    differences = [abs(float(theirs) - float(ours)) for _, theirs, ours in steps]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["largest_loss_difference"] == max(differences) < 1e-3
    assert all(entry["peak_bytes"] > 2**20 and entry["tokens_per_second"] > 0 for entry in summary["runs"])


def check_plot(path: Path) -> None:
    with Image.open(path) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24)}
        assert min(image.size) > 500
    assert {(179, 179, 179), (214, 39, 40)} <= colors  # torch.nn's grey and fastattn.nn's red


def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert run("-c", blocks[0]).startswith("attention on ")


def test_overhead_benchmark_measures_every_function(tmp_path):
    stdout = run(
        *("-m", "fastattn", "bench", "overhead", "--rounds", "1", "--repeats", "2"),
        *("--json", str(tmp_path / "overhead.json")),
    )
    figures = json.loads((tmp_path / "overhead.json").read_text())
    functions = {"attention", "attention, causal", "scaled_dot_product_attention", "layer_norm", "softmax"}
    modes = {"no grad", "grad", "forward + backward"}
    assert {(row["function"], row["mode"]) for row in figures["calls"]} == {(f, m) for f in functions for m in modes}
    assert all(row["torch_us"] > 0 and row["fastattn_us"] > 0 for row in figures["calls"])
    assert f"import fastattn adds {figures['import_ms']:.0f} ms" in stdout
