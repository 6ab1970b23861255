"""The tuner: its walk, with a planted time, and the diff it leaves."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import run

from fastattn.backends.triton import configs, tuning
from fastattn.backends.triton.configs import TileConfig

ARCH = "sm_90"
SOURCE = Path(configs.__file__)


def never() -> bool:
    return False


def distance_to(target: TileConfig):
    """A planted time: one millisecond, and a tenth more for every doubling that a tile is away from `target`."""

    def measure(cfg: TileConfig) -> float:
        steps = sum(
            abs(math.log2(getattr(cfg, name) / getattr(target, name))) for name in ("BLOCK_M", "BLOCK_N", "num_warps")
        )
        return 1e-3 * (1 + 0.1 * steps + 0.1 * abs(cfg.num_stages - target.num_stages))

    return measure


@pytest.mark.parametrize("kernel", tuning.KERNELS)
@pytest.mark.parametrize("target", [TileConfig(64, 32, 4, 2), TileConfig(128, 64, 4, 1), TileConfig(64, 128, 8, 2)])
def test_the_walk_finds_a_planted_winner(kernel, target):
    found = tuning.search(kernel, 64, ARCH, distance_to(target), never)
    assert found.best.config == target
    assert found.before.config == configs.table(ARCH, kernel)[64]
    assert found.gain == pytest.approx(1 - 1e-3 / distance_to(target)(found.before.config))
    assert len({step.config for step in found.tried}) == len(found.tried)


def test_only_legal_tiles_are_timed():
    def measure(cfg):
        assert configs.illegal("forward", cfg, ARCH, 256, 256, 2) is None
        return 1.0 / (cfg.BLOCK_M * cfg.BLOCK_N * cfg.num_stages)  # the larger the better: up to what fits

    found = tuning.search("forward", 256, ARCH, measure, never)
    best = found.best.config
    assert best.BLOCK_M * best.BLOCK_N >= found.before.config.BLOCK_M * found.before.config.BLOCK_N


def test_a_gain_within_noise_is_none():
    start = configs.table(ARCH, "forward")[128]
    found = tuning.search("forward", 128, ARCH, lambda cfg: 1.0 if cfg == start else 0.99, never)
    assert found.gain == 0
    assert tuning.diff(ARCH, [found]) == ""


def test_a_tile_that_cannot_run_is_not_taken():
    start = configs.table(ARCH, "dq")[128]
    found = tuning.search("dq", 128, ARCH, lambda cfg: 1.0 if cfg == start else math.inf, never)
    assert found.best.config == start


def test_the_walk_ends_when_the_time_is_over():
    calls = []
    tuning.search("forward", 64, ARCH, lambda cfg: calls.append(cfg) or 1.0 / len(calls), lambda: len(calls) >= 5)
    assert len(calls) == 5


def test_the_table_is_what_it_was_after_a_trial():
    before = configs.forward_config(ARCH, 64, 64, torch.bfloat16)
    other = TileConfig(64, 32, 4, 2)
    assert before != other

    def fails_in_a_trial() -> None:
        with tuning.tile_in_table(ARCH, "forward", 64, other):
            assert configs.forward_config(ARCH, 64, 64, torch.bfloat16) == other
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails_in_a_trial()
    assert configs.forward_config(ARCH, 64, 64, torch.bfloat16) == before


def test_the_diff_applies_and_holds_the_winners(tmp_path, monkeypatch):
    targets = {"forward": TileConfig(64, 32, 4, 2), "dq": TileConfig(64, 64, 4, 1), "dkdv": TileConfig(64, 64, 8, 1)}
    found = [tuning.search(k, 128, ARCH, distance_to(target), never) for k, target in targets.items()]
    change = tuning.diff(ARCH, found)
    assert change.count("\n-") == 3
    assert change.count("\n+    ") == 3
    copy = tmp_path / "fastattn" / "backends" / "triton"
    copy.mkdir(parents=True)
    (copy / "configs.py").write_text(SOURCE.read_text())
    (tmp_path / "tune.diff").write_text(change)
    subprocess.run(["git", "apply", "tune.diff"], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("tuned_configs", copy / "configs.py")
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tuned_configs", loaded)  # where dataclasses look annotations up
    spec.loader.exec_module(loaded)
    for kernel, target in targets.items():
        tuned = loaded.table(ARCH, kernel)
        assert str(tuned[128]) == str(target)
        untouched = {key: str(cfg) for key, cfg in configs.table(ARCH, kernel).items() if key != 128}
        assert {key: str(cfg) for key, cfg in tuned.items() if key != 128} == untouched


def test_a_card_without_a_row_of_its_own_changes_the_one_it_takes():
    found = tuning.search("forward", 64, "sm_86", distance_to(TileConfig(64, 32, 4, 2)), never)
    source = tuning.updated_source(SOURCE.read_text(), "sm_86", [found])
    ampere = source[source.index('"sm_80": {\n') : source.index('"sm_90": {\n')]
    assert "64: TileConfig(64, 32, 4, 2)," in ampere


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_says_so():
    done = run("tune")
    assert done.returncode == 2
    assert "tune: torch sees no GPU" in done.stderr


@pytest.mark.gpu
def test_tune_on_a_gpu_leaves_a_diff_that_applies(tmp_path):
    done = run("tune", "--kernel", "forward", "--head-dim", "64", "--seconds", "20", "--out", str(tmp_path / "t.diff"))
    assert done.returncode == 0, done.stderr
    assert "forward 64: " in done.stdout
    if change := (tmp_path / "t.diff").read_text():
        subprocess.run(["git", "apply", "--check"], input=change, text=True, cwd=SOURCE.parents[3], check=True)
