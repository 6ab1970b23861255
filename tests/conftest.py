"""Where the tests run: on the GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import unittest
import warnings
from pathlib import Path

import planted_native
import progress
import pytest
import sampling
import torch

GPU = torch.cuda.is_available()
if importlib.util.find_spec("expecttest") is None:  # torch's samples are defined beside tests that need it; ours do not
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
if not GPU:  # before fastattn is imported: triton.jit decides at decoration
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["FASTATTN_EMULATE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress", action="store_true", help="one line every few seconds instead of dots")
    parser.addoption("--sample", action="store_true", help="a third of each test's cases, and none marked thorough")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--progress") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(progress.Progress(config), "progress")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--sample"):
        items[:], left_out = sampling.sample(items)
        config.hook.pytest_deselected(items=left_out)
    if not GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


from fastattn import backends  # noqa: E402


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """Where the CUDA backend runs: a Hopper GPU, or the CPU, in the emulator."""
    if why := backends.get("cuda").available(device):
        pytest.skip(why)
    return device


@pytest.fixture(autouse=True)
def _interpreter_warnings():
    """The interpreter is numpy: it warns where a GPU computes inf and NaN, which some tests ask for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
        yield


@pytest.fixture
def threads():
    """Sets torch's number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Planted C++ sources, in place of the project's."""
    folder = planted_native.write_tree(tmp_path / "csrc", planted_native.FILES)
    monkeypatch.setattr("fastattn.native.plan.csrc", lambda: folder)
    return folder


@pytest.fixture
def native_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty cache of native modules, of the test's own; it does not exist yet."""
    from fastattn import native

    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    native.forget()
    yield tmp_path / "cache"
    native.forget()


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc that is there whatever the machine has."""
    monkeypatch.setenv("CUDA_HOME", str(planted_native.fake_toolkit(tmp_path / "toolkit")))
    return tmp_path / "toolkit"
