"""The keyed generator of dropout: its published answers, its statistics, and that position alone decides."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn.reference.dropout import dropout_keep, philox

PHILOX = """
7  00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
7  ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
7  243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""  # rounds, counter, key, result: the known answers of Random123 for philox4x32


@pytest.mark.parametrize("line", PHILOX.strip().splitlines())
def test_philox_known_answers(line: str):
    rounds, *words = line.split()
    *counter, k0, k1 = (int(word, 16) for word in words[:6])
    key = k0 | k1 << 32
    seed = torch.tensor(key - 2**64 if key >= 2**63 else key)
    result = philox(seed, *map(torch.tensor, counter), rounds=int(rounds))
    assert [f"{word.item():08x}" for word in result] == words[6:]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_rate(dropout_p: float, seed: int):
    """Of all entries, and of each head, row and column, within five standard deviations."""
    keep = dropout_keep(torch.tensor(seed), dropout_p, 2, 4, 64, 64).double()
    for dims in ((0, 1, 2, 3), (2, 3), (0, 1, 3), (0, 1, 2)):
        n = math.prod(keep.shape[d] for d in dims)
        deviation = (keep.mean(dims) - (1 - dropout_p)).abs().max().item()
        assert deviation < 5 * math.sqrt(dropout_p * (1 - dropout_p) / n)


def test_dropout_is_keyed_by_position():
    seed = torch.tensor(7)
    keep = dropout_keep(seed, 0.5, 3, 4, 20, 30)
    assert torch.equal(dropout_keep(seed, 0.5, 2, 3, 11, 17), keep[:2, :3, :11, :17])
    assert torch.equal(dropout_keep(seed, 0.5, 1, 4, 20, 30, first_b=2), keep[2:])
    for other in (keep.roll(1, dim) for dim in range(4)):
        assert 0.4 < (keep == other).double().mean() < 0.6
    assert 0.4 < (keep == dropout_keep(seed + 2**32, 0.5, 3, 4, 20, 30)).double().mean() < 0.6


@pytest.mark.parametrize(("b", "h", "i", "j"), [(0, 0, 0, 0), (2, 1, 0, 3), (1, 3, 6, 2)])
def test_entry_is_kept_from_its_word_on(b: int, h: int, i: int, j: int):
    """Its word is the first of seven rounds on the counter (j, i, h, b)."""
    seed = torch.tensor(-(2**62) + 12345)
    word = philox(seed, *map(torch.tensor, (j, i, h, b)), rounds=7)[0].item()
    for threshold, kept in ((word, True), (word + 1, False)):
        assert dropout_keep(seed, threshold / 2**32, 3, 4, 7, 5)[b, h, i, j] == kept
