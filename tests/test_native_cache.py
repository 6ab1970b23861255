"""The user's cache of native modules: whose it is, what processes do to it at once, and which module is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from planted_native import FILES, compiled, write_program, write_tree

from fastattn import native
from fastattn.native import cache, plan, workplace
from fastattn.native.errors import NativeMissing, UnsafeCache

ROOT = Path(__file__).parent.parent


def test_the_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, csrc: Path, toolkit: Path):
    folder = tmp_path / "a/b/cache"
    monkeypatch.setenv("FASTATTN_CACHE", str(folder))
    native.forget()
    assert "python -m fastattn build" in (native.why_not() or "")
    assert not folder.exists()  # looking creates nothing
    assert cache.private_root() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o720, 0o702, 0o777):
        folder.chmod(mode)
        with pytest.raises(UnsafeCache, match=rf"{folder} can be written to by others \(mode {mode:o}\).*chmod go-w"):
            cache.build(plan.emulator())
        native.forget()
        assert "can be written to by others" in (native.why_not() or "")
    folder.chmod(0o755)
    assert cache.private_root() == folder
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(UnsafeCache, match="belongs to user"):
        cache.private_root()
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "file"))
    for create in (False, True):
        with pytest.raises(UnsafeCache, match="is not a folder"):
            cache.private_root(create)
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "file/below"))
    assert cache.private_root(create=False) is None
    with pytest.raises(UnsafeCache, match=r"cannot be made: .*Name another in FASTATTN_CACHE"):
        cache.private_root()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("FASTATTN_CACHE", "/own")
    assert cache.location() == Path("/own")
    monkeypatch.delenv("FASTATTN_CACHE")
    assert cache.location() == Path("/caches/fastattn")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    assert cache.location() == Path("/home/someone/.cache/fastattn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.location() == Path("/home/someone/.cache/fastattn")


BUILD = """
import sys
from pathlib import Path
import native  # without fastattn, which would import torch first
from native import plan
plan.csrc = lambda: Path(sys.argv[1])
print(native.load_emulator().answer())
"""


def test_processes_that_build_at_once_do_not_disturb_one_another(csrc: Path, native_cache: Path, tmp_path: Path):
    """Three of the same sources, and two of others in the same workplace: each source is compiled once a version."""
    other = write_tree(tmp_path / "other", FILES | {"cuda/value.h": "#define VALUE 43\n"})
    log = tmp_path / "compiled"
    slow = write_program(tmp_path / "slow/g++", f'#!/bin/sh\necho "$@" >> {log}\nsleep 0.2\nexec g++ "$@"\n')
    environment = {
        **os.environ,
        "CXX": str(slow),
        "PYTHONPATH": str(ROOT / "fastattn"),
        "FASTATTN_CACHE": str(native_cache),
    }
    folders = [csrc, other, csrc, other, csrc]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 5, said
    assert [out.strip() for out, _ in said] == ["42" if folder == csrc else "43" for folder in folders]
    assert len(list((native_cache / "native").glob("emulator-*"))) == 2
    assert list((native_cache / "native").glob(".new-*")) == []
    sources = compiled([line for line in log.read_text().splitlines() if "--version" not in line])
    assert [sources.count(name) for name in ("answer.cu", "offset.cu", "bindings_cuda.cpp")] == [2, 1, 1]


def test_what_a_killed_process_leaves_is_replaced(csrc: Path, native_cache: Path):
    wanted = plan.emulator()
    built, _ = cache.build(wanted)
    (built.path.parent / cache.MANIFEST).unlink()
    assert native.built("emulator") == []
    assert cache.build(wanted) == (built, True)
    built.path.unlink()
    assert native.built("emulator") == []
    assert cache.build(wanted) == (built, True)
    (built.path.parent / cache.MANIFEST).write_text('{"target": ')
    assert cache.build(wanted) == (built, True)


def test_old_modules_are_forgotten(csrc: Path, native_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "KEPT", 2)
    for value in range(3):
        (csrc / "cuda/value.h").write_text(f"#define VALUE {value}\n")
        last, _ = cache.build(plan.emulator())
    kept = cache.published("emulator")
    assert len(kept) == 2
    assert kept[0] == last


# Finding and loading


def publish(wanted: plan.Plan) -> cache.Built:
    time.sleep(0.01)  # the newest goes first
    return cache.build(wanted)[0]


def test_the_module_that_fits_the_gpu_the_sources_and_python_is_loaded(csrc: Path, native_cache: Path, toolkit: Path):
    assert "it is not compiled for this machine" in (native.why_not() or "")
    with pytest.raises(NativeMissing, match="python -m fastattn build"):
        native.load()
    ampere, hopper = publish(plan.cuda(["sm_80"])), publish(plan.cuda(["sm_90a"]))
    native.forget()
    assert native.load().__file__ == str(hopper.path)
    assert native.load((9, 0)).__file__ == str(hopper.path)
    assert native.load((8, 6)).__file__ == str(ampere.path)
    assert native.load((9, 0)).__name__ != native.load((8, 6)).__name__  # by which pybind11 tells modules apart
    assert native.why_not((8, 6)) is None
    assert "compiled for sm_90a, not for this GPU" in (native.why_not((10, 0)) or "")
    assert "8.0 and newer, this GPU has 7.5" in (native.why_not((7, 5)) or "")
    publish(plan.cuda(["sm_80"]))  # was there; asked for last
    native.forget()
    assert native.load().__file__ == str(ampere.path)
    assert native.why_not() is None
    (csrc / "params.h").write_text(FILES["params.h"] + "\n")
    native.forget()
    assert "compiled from other sources" in (native.why_not() or "")


def test_a_module_beside_the_package_is_taken_while_its_sources_are_these(
    csrc, native_cache, toolkit, tmp_path, monkeypatch
):
    """As in a wheel, or in a checkout that was installed before its sources were changed."""
    wanted = plan.cuda(["sm_90a"])
    (tmp_path / "place").mkdir()
    (tmp_path / "package").mkdir()
    workplace.run(wanted, tmp_path / "place").rename(tmp_path / "package" / wanted.filename)
    manifest = tmp_path / "package/_cuda.json"
    manifest.write_text(json.dumps(wanted.manifest()))
    monkeypatch.setattr(native, "PACKAGE", tmp_path / "package")
    assert native.load((9, 0)).__file__ == str(tmp_path / "package" / wanted.filename)
    (csrc / "params.h").write_text(FILES["params.h"] + "\n")
    native.forget()
    assert "compiled from other sources" in (native.why_not() or "")
    built = publish(plan.cuda(["sm_90a"]))
    native.forget()
    assert native.load().__file__ == str(built.path)


def test_without_sources_there_is_no_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native_cache: Path):
    monkeypatch.setattr(plan, "PACKAGE", tmp_path / "package")
    assert "the C++ sources are missing" in (native.why_not() or "")
    assert "the C++ sources are missing" in (native.why_no_emulator() or "")
