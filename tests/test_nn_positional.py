"""Sinusoidal and learned positional encodings."""

from __future__ import annotations

import itertools

import pytest
import torch
from module_parity import E, N, through_meta, through_pickle
from torch import nn

import fastattn.nn as ours
from fastattn.errors import ArgumentError


@pytest.mark.parametrize("d_model", [1, 6, 7])
def test_sinusoids_are_those_of_the_paper(d_model):
    encode = ours.SinusoidalPositionalEncoding(d_model, max_len=50)
    table = encode(torch.zeros(50, d_model, dtype=torch.float64))
    for t, column in itertools.product((0, 1, 49), range(d_model)):
        angle = torch.tensor(t / 10000 ** (column // 2 * 2 / d_model), dtype=torch.float64)
        expected = angle.cos() if column % 2 else angle.sin()
        torch.testing.assert_close(table[t, column], expected, rtol=1e-7, atol=1e-7)


POSITIONAL = {
    "sinusoidal": lambda **kwargs: ours.SinusoidalPositionalEncoding(E, 32, **kwargs),
    "learned": lambda **kwargs: ours.LearnedPositionalEncoding(32, E, **kwargs),
}
positional = pytest.mark.parametrize("make", POSITIONAL.values(), ids=POSITIONAL)


@positional
def test_positions_of_every_layout(make):
    torch.manual_seed(0)
    encode, seq_first = make(), make(batch_first=False)
    seq_first.load_state_dict(encode.state_dict())
    x = torch.randn(N, 10, E)
    y = encode(x)
    assert not torch.allclose(y, x)
    torch.testing.assert_close(seq_first(x.transpose(0, 1)), y.transpose(0, 1))
    torch.testing.assert_close(torch.stack([encode(row) for row in x]), y)
    torch.testing.assert_close(torch.stack([seq_first(row) for row in x]), y)


@positional
def test_decoding_step_by_step_gives_the_same_positions(make):
    encode = make()
    x = torch.randn(N, 32, E)
    steps = [encode(x[:, t : t + 1], offset=t) for t in range(32)]
    torch.testing.assert_close(torch.cat(steps, dim=1), encode(x), rtol=0, atol=0)


@positional
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_positions_keep_the_dtype_of_the_input(make, dtype):
    assert make()(torch.zeros(N, 4, E, dtype=dtype)).dtype == dtype


@positional
def test_positional_dropout(make):
    torch.manual_seed(0)
    encode = make(dropout=0.5)
    x = torch.ones(N, 32, E)
    y = encode(x)
    assert 0.3 < (y == 0).float().mean() < 0.7
    plain = encode.eval()(x)
    torch.testing.assert_close(y, torch.where(y == 0, 0.0, 2 * plain))


@positional
@pytest.mark.parametrize(
    ("x", "offset", "message"),
    [
        (torch.zeros(N, 33, E), 0, r"needs positions 0 to 32, but the table holds 0 to 31 \(max_len=32\)"),
        (torch.zeros(N, 4, E), 30, "x of 4 positions at offset 30"),
        (torch.zeros(N, 4, E), -1, "offset -1"),
        (torch.zeros(N, 4, E + 1), 0, r"x must be .* \(…, S, 8\)"),
        (torch.zeros(E), 0, "2 or 3 dimensions"),
        (torch.zeros(N, 4, E, dtype=torch.long), 0, "floating-point"),
    ],
    ids=["too_long", "too_far", "negative", "width", "dims", "dtype"],
)
def test_positional_refusals(make, x, offset, message):
    with pytest.raises(ArgumentError, match=message):
        make()(x, offset=offset)


def test_positional_tables_have_rows_and_columns():
    with pytest.raises(ArgumentError, match="max_len must be at least 1, but is 0"):
        ours.SinusoidalPositionalEncoding(E, max_len=0)
    with pytest.raises(ArgumentError, match="d_model must be at least 1, but is -1"):
        ours.LearnedPositionalEncoding(4, -1)


@pytest.mark.parametrize(
    "copied", [lambda m: m.half().float(), lambda m: m.to(torch.bfloat16), through_meta, through_pickle]
)
def test_sinusoidal_table_is_never_stored_and_never_rounded(copied):
    encode = ours.SinusoidalPositionalEncoding(E, 32)
    expected = encode.table.clone()
    assert not encode.state_dict()
    torch.testing.assert_close(copied(encode).table, expected, rtol=0, atol=0)


def test_sinusoidal_table_on_the_meta_device():
    with torch.device("meta"):
        encode = ours.SinusoidalPositionalEncoding(E, 32)
    assert encode.table.is_meta
    torch.testing.assert_close(encode.to_empty(device="cpu").table, ours.SinusoidalPositionalEncoding(E, 32).table)


def test_learned_positions_load_an_embedding():
    embedding = nn.Embedding(32, E)
    encode = ours.LearnedPositionalEncoding(32, E)
    encode.load_state_dict(embedding.state_dict())
    torch.testing.assert_close(encode(torch.zeros(N, 4, E), offset=3), embedding(torch.arange(3, 7)).expand(N, 4, E))
    torch.manual_seed(0)
    assert ours.LearnedPositionalEncoding(500, 64).weight.std().item() == pytest.approx(0.02, rel=0.05)
