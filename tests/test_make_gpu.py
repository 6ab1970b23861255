"""`make gpu`, with commands that need no GPU in the place of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Step

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable


def script(code: str, name: str = "step", share: float = 1.0, log: str = "tests.log", **fields) -> Step:
    return Step(name, (PYTHON, "-c", code), share, log, **fields)


def run(monkeypatch, tmp_path: Path, steps: list[Step], *arguments: str) -> tuple[int, dict, Path]:
    monkeypatch.setattr(gpu, "steps", lambda out: steps)
    out = tmp_path / "out"
    status = gpu.main(["--out", str(out), *arguments])
    return status, json.loads((out / "summary.json").read_text()), out


def test_every_step_is_told_and_a_failure_is_the_exit_status(monkeypatch, tmp_path):
    steps = [
        script("print('one')", "first"),
        script("print('two'); raise SystemExit(3)", "second"),
        script("", "third", needs="no such tool"),
        script(
            "import os; print(os.environ['MARK'], os.environ['PYTHONPATH'])", "fourth", environment=(("MARK", "x"),)
        ),
    ]
    status, summary, out = run(monkeypatch, tmp_path, steps)
    assert status == 1
    assert [(s["name"], s["status"], s["note"]) for s in summary["steps"]] == [
        ("first", "ok", ""),
        ("second", "failed", "exit status 3"),
        ("third", "skipped", "no such tool"),
        ("fourth", "ok", ""),
    ]
    lines = (out / "tests.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("$ ")] == ["one", "two", f"x {ROOT}"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # nothing else is left behind


def test_a_step_that_takes_too_long_is_stopped_with_what_it_started(monkeypatch, tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, time; print('begun', flush=True)\n"
        f"subprocess.Popen(['sh', '-c', 'sleep 4; touch {child}'])\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    status, summary, out = run(monkeypatch, tmp_path, [script(code, share=0.5), script("", "next")], "--budget", "4")
    assert time.monotonic() - began < 15
    assert status == 0
    assert [s["status"] for s in summary["steps"]] == ["timeout", "ok"]
    assert "begun" in (out / "tests.log").read_text()
    time.sleep(max(0.0, 5 - (time.monotonic() - began)))
    assert not child.exists()


def test_a_step_that_is_stopped_may_say_what_it_has_found(monkeypatch, tmp_path):
    code = (
        "import time\n"
        "try:\n    print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('one failed, two passed', flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    began = time.monotonic()
    _, summary, out = run(monkeypatch, tmp_path, [script(code)], "--budget", "5")
    assert time.monotonic() - began < 15
    assert [s["status"] for s in summary["steps"]] == ["timeout"]
    assert (out / "tests.log").read_text().splitlines()[-2:] == ["begun", "one failed, two passed"]


def test_half_a_file_is_not_kept(monkeypatch, tmp_path):
    code = (
        f"import pathlib; [pathlib.Path({str(tmp_path / 'out')!r}, n).touch() for n in ('results.tmp', 'results.json')]"
    )
    *_, out = run(monkeypatch, tmp_path, [script(code)])
    assert sorted(p.name for p in out.iterdir()) == ["results.json", "summary.json", "tests.log"]


def test_tests_that_cannot_be_imported_do_not_stop_the_others(tmp_path):
    """A bare machine may have pytest, and not all that some tests need."""
    (tmp_path / "test_needs.py").write_text("import no_such_package")
    (tmp_path / "test_runs.py").write_text("def test_it(): pass")
    *command, _ = gpu.pytest_command()
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout
    assert done.returncode != 0


def test_seconds_are_handed_to_commands_that_take_them(monkeypatch, tmp_path):
    step = Step("bench", (PYTHON, "-c", "import sys; print(sys.argv[1])", "{seconds}"), 0.5, "tests.log")
    _, _, out = run(monkeypatch, tmp_path, [step], "--budget", "100")
    assert 40 <= int((out / "tests.log").read_text().splitlines()[-1]) <= 45


def test_long_logs_are_shortened_in_the_middle(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LOG_BYTES", 1000)
    _, _, out = run(monkeypatch, tmp_path, [script("print('a' * 5000 + 'the end')")])
    text = (out / "tests.log").read_text()
    assert len(text) < 1100
    assert text.startswith("$ ")
    assert text.endswith("the end\n")
    assert "bytes left out" in text


def test_only_the_steps_asked_for_run(monkeypatch, tmp_path, capsys):
    steps = [script("", "tests"), script("", "sanitizer memcheck"), script("", "bench")]
    _, summary, _ = run(monkeypatch, tmp_path, steps, "--steps", "sanitizer")
    assert [s["name"] for s in summary["steps"]] == ["sanitizer memcheck"]
    assert gpu.main(["--out", str(tmp_path / "other"), "--steps", "nothing"]) == 2
    assert "the steps are tests, sanitizer, bench" in capsys.readouterr().err


def test_no_more_than_eight_files_come_out(tmp_path):
    known = {step.log for step in gpu.steps(tmp_path)} - {"bench.log"}
    assert len(known | {"summary.json", "results.json", "results.csv", "report.html", "tune.diff"}) <= 8


def test_make_runs_it_from_the_tree_with_any_python():
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "gpu", "PYTHON=python9", "TIME_BUDGET=60"]
    shown = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    assert shown.split() == f"PYTHONPATH={ROOT} python9 -m benchmarks.gpu --out out/gpu --budget 60".split()


@pytest.mark.parametrize("name", ["environment", "verify", "bench", "tune"])
def test_the_commands_exist(name, tmp_path):
    """Each takes the arguments that it is given: `--help` after them is answered, which a wrong one is not."""
    (step,) = (s for s in gpu.steps(tmp_path) if s.name == name)
    command = [part.format(seconds=1) if "{" in part else part for part in step.command]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
