"""The model of the Hopper attention kernel: what it reads in machine code, predicts, and would notice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from benchmarks import cuda_model as model
from fastattn.inspection import cuda

# A loop as nvdisasm prints it: both products, a softcap that is branched over, two exponentials between the waits.
LINES = """
.L_x_1:
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R152, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
{softcap}
.L_x_2:
        /*0050*/                   MUFU.EX2 R88, R88 ;
        /*0060*/                   MUFU.EX2 R89, R89 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
""".replace(
    "{softcap}", "\n".join("        /*0040*/                   MUFU.RCP R2, R2 ;" for _ in range(9))
).splitlines()
LOOP = model.Loop(128, 128, 128, 128, 168, 0, total=467, mma=16, exp=64, polynomial=0, early=64, opcodes=Counter())


def test_the_main_loop_is_what_usually_runs():
    path = model.main_loop(LINES)
    assert [x.split()[0] for x in path if "RCP" in x] == []
    assert model.count(path, "HGMMA") == 2
    assert path[-1].endswith("BRA `(.L_x_1)")
    assert len(path) == 8


def test_clocks_of_an_iteration():
    """128 × 128 scores of width 128 twice: 2 · 128³ products; 128² exponentials; 8 warps on 4 schedulers."""
    assert model.cycles(LOOP) == model.Cycles(mma=2048, exp=1024, issue=934)


def test_the_fit_goes_through_the_published_figures():
    a, b = model.fit()
    for D in model.FA3_TILES:
        x = model.fa3_cycles(D)
        assert model.PEAK / 1e12 / (a + b * x.pressure) == pytest.approx(model.PUBLISHED[D, False][-1], rel=0.05)


def test_predictions_stay_below_the_peak_and_fewer_instructions_help():
    for causal in (False, True):
        figures = [model.predict(LOOP, S, causal) for S in model.LENGTHS]
        assert all(0 < x < model.PEAK / 1e12 for x in figures)
        assert figures == sorted(figures), "longer sequences lose less at their ends"
        assert model.predict(replace(LOOP, total=400), 4096, causal) > model.predict(LOOP, 4096, causal)


def test_what_it_would_notice():
    assert model.problems([LOOP]) == []
    assert model.problems([replace(LOOP, stack=8)]) == ["D 128: 8 bytes are spilled"]
    assert model.problems([replace(LOOP, early=2)]) == ["D 128: 62 of 64 exponentials come after the wait for P·V"]


@pytest.mark.slow
@pytest.mark.skipif(cuda.why_not() is not None, reason="needs nvcc and nvdisasm")
def test_the_kernel_spills_nothing_and_overlaps(capsys):
    assert model.main(["--check"]) == 0
    assert "| 128, 128 | 128×128 | 168, 0 |" in capsys.readouterr().out
