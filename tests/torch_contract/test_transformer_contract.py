"""What torch's tests of its Transformer modules ask for, and where this library chooses otherwise.

The choices are listed in docs/torch-contract.md.
"""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import torch
from module_parity import build
from torch import nn

import fastattn.nn as ours

pytestmark = pytest.mark.filterwarnings("ignore")


class Unchanged(ours.TransformerEncoderLayer):
    pass


class WithAnotherBlock(ours.TransformerEncoderLayer):
    def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * self.linear2(self.linear1(x))


@pytest.mark.parametrize("layer_class", [ours.TransformerEncoderLayer, Unchanged, WithAnotherBlock])
def test_scripted_subclass_computes_what_the_subclass_does(layer_class):
    torch.manual_seed(0)
    layer, x = layer_class(8, 2, 16, batch_first=True).eval(), torch.randn(3, 5, 8)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize("kind", ["Encoder", "Decoder", "Transformer"])
def test_scripting_a_stack_leaves_the_stack_alone(kind):
    torch.manual_seed(0)
    model = ours.Transformer(8, 2, 2, 2, 16, dropout=0.0)
    stack = {"Encoder": model.encoder, "Decoder": model.decoder, "Transformer": model}[kind]
    inputs = [torch.randn(5, 3, 8)] * (1 if kind == "Encoder" else 2)
    before = list(stack.modules())
    y = torch.jit.script(stack)(*inputs)
    assert all(a is b for a, b in zip(stack.modules(), before, strict=True))
    torch.testing.assert_close(y, stack(*inputs))


def test_an_encoder_calls_any_object_among_its_layers():
    """With the words that torch calls it by."""
    x, mask = torch.randn(1, 2, 4), torch.ones(2, 2).triu(1).bool()
    calls = []
    for library in (nn, ours):
        encoder = library.TransformerEncoder(library.TransformerEncoderLayer(4, 1, 4, batch_first=True), 2)
        encoder.layers[1] = mock = MagicMock(nn.Identity(), return_value=x)
        encoder(x, mask=mask)
        calls.append(mock.call_args.kwargs)
    assert calls[0].keys() == calls[1].keys()
    assert calls[0]["is_causal"] is calls[1]["is_causal"] is True
    assert torch.equal(calls[0]["src_mask"], calls[1]["src_mask"])


@pytest.mark.parametrize("training", [False, True])
def test_nested_batch_of_empty_sequences(training):
    layer = ours.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True).train(training)
    x = torch.nested.nested_tensor([torch.rand(3, 8), torch.rand(5, 8)])
    assert [tuple(row.shape) for row in layer(x).unbind()] == [(3, 8), (5, 8)]
    y = layer(torch.nested.nested_tensor([torch.rand(0, 8), torch.rand(0, 8)]))
    assert y.is_nested
    assert [tuple(row.shape) for row in y.unbind()] == [(0, 8), (0, 8)]


def test_a_sequence_of_padding_alone_is_no_nan():
    """torch's inference kernel returns NaN, its training path attention of 0; here it is 0 in both."""
    theirs, mine = build("TransformerEncoderLayer", 4, 2, 16, 0.0, batch_first=True)
    x, hidden = torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
    trained = theirs(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(mine(x, src_key_padding_mask=hidden), trained)
    theirs.eval(), mine.eval()
    with torch.no_grad():
        assert theirs(x, src_key_padding_mask=hidden).isnan().all()
        torch.testing.assert_close(mine(x, src_key_padding_mask=hidden), trained)


@pytest.mark.parametrize("nested", [False, True])
def test_evaluation_under_autocast_is_training_without_dropout(nested):
    """To a rounding of bfloat16: with a gradient and without one different kernels may run."""
    torch.manual_seed(0)
    layer = ours.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    encoder = ours.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    x, padding = torch.randn(2, 96, 64), torch.arange(96) >= torch.tensor([[96], [70]])

    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            evaluated = encoder.eval()(x, src_key_padding_mask=padding)
        trained = encoder.train()(x, src_key_padding_mask=padding)
    scale = 2.0**-8 * trained.abs().max()
    assert (evaluated - trained).abs().max() < scale
    assert evaluated.dtype == trained.dtype
