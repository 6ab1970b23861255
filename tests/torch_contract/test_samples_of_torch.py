"""torch's own samples of its modules and functions, run through ours.

`module_db` and `op_db` are what torch's test-suite walks: constructor arguments, inputs and keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from module_parity import assert_as_accurate, assert_same
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fastattn.functional
import fastattn.nn as ours
from fastattn.errors import ArgumentError

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]

MODULES = (
    nn.LayerNorm,
    nn.LogSoftmax,
    nn.MultiheadAttention,
    nn.RMSNorm,
    nn.Softmax,
    nn.Transformer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
)


def our_encoder_layer(layer: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    """The samples of TransformerEncoder bring a layer of torch's; this is the same one of ours."""
    mine = ours.TransformerEncoderLayer(
        layer.self_attn.embed_dim,
        layer.self_attn.num_heads,
        layer.linear1.out_features,
        layer.dropout.p,
        layer.activation,
        layer.norm1.eps,
        layer.self_attn.batch_first,
        layer.norm_first,
        layer.linear1.bias is not None,
        dtype=layer.linear1.weight.dtype,
    )
    mine.load_state_dict(layer.state_dict())
    return mine


def module_pairs(module_class: type[nn.Module], dtype: torch.dtype, device: str = "cpu") -> Iterator:
    """For each sample (torch's module, ours with the same state, args, kwargs)."""
    (info,) = (info for info in module_db if info.module_cls is module_class)
    torch.manual_seed(0)
    for sample in info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=True):
        args, kwargs = list(sample.constructor_input.args), sample.constructor_input.kwargs
        theirs = module_class(*args, **kwargs).to(device, dtype)
        if args and isinstance(args[0], nn.TransformerEncoderLayer):
            args[0] = our_encoder_layer(args[0])
        mine = getattr(ours, module_class.__name__)(*args, **kwargs).to(device, dtype)
        mine.load_state_dict(theirs.state_dict())
        yield theirs, mine, sample.forward_input.args, sample.forward_input.kwargs


def some(samples: Iterable, step: int) -> list:
    """All samples, or every step-th where there are many: in float32 the kernels run in an interpreter."""
    samples = list(samples)
    return samples[::step] if len(samples) > 10 else samples


module_classes = pytest.mark.parametrize("module_class", MODULES, ids=lambda c: c.__name__)


@module_classes
def test_module_samples(module_class):
    pairs = 0
    for pair in module_pairs(module_class, torch.float64):
        assert_same(*pair)
        pairs += 1
    assert pairs > 0


@module_classes
def test_module_samples_in_float32(module_class, device):
    assert_as_accurate(some(module_pairs(module_class, torch.float32, str(device)), 7))


class Function(nn.Module):
    """A function as a module without parameters, for the comparisons of modules."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.forward = function


def op_samples(name: str, variant: str, dtype: torch.dtype, device: str = "cpu") -> Iterator:
    (op,) = (op for op in op_db if op.name == name and op.variant_test_name == variant)
    torch.manual_seed(0)
    return op.sample_inputs(device, dtype, requires_grad=True)


FUNCTIONS = {
    "softmax": (torch.softmax, fastattn.functional.softmax),
    "log_softmax": (torch.log_softmax, fastattn.functional.log_softmax),
    "nn.functional.layer_norm": (F.layer_norm, fastattn.functional.layer_norm),
    "nn.functional.rms_norm": (F.rms_norm, fastattn.functional.rms_norm),
    "nn.functional.scaled_dot_product_attention": (
        F.scaled_dot_product_attention,
        fastattn.functional.scaled_dot_product_attention,
    ),
}

# (name in op_db, variant, what marks the sample) -> (what ours raises, its message): refused by design.
REFUSED = {
    ("nn.functional.layer_norm", "", "negative eps"): (ArgumentError, "`eps` is -0.5; it must be 0 or more"),
    ("nn.functional.rms_norm", "", "negative eps"): (ArgumentError, "`eps` is -0.5; it must be 0 or more"),
}


def mark_of(sample) -> str | None:
    """What may set a sample apart: a value that ours refuses."""
    return "negative eps" if (sample.kwargs.get("eps") or 0) < 0 else None


def function_pairs(name: str, dtype: torch.dtype, device: str = "cpu") -> Iterator:
    """For each sample that is accepted and leaves nothing to chance (torch's function, ours, args, kwargs)."""
    torchs, mine = FUNCTIONS[name]
    for sample in op_samples(name, "", dtype, device):
        if (name, "", mark_of(sample)) not in REFUSED and sample.kwargs.get("dropout_p", 0.0) == 0.0:
            yield Function(torchs), Function(mine), (sample.input, *sample.args), sample.kwargs


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_samples(name):
    pairs = 0
    for pair in function_pairs(name, torch.float64):
        assert_same(*pair)
        pairs += 1
    assert pairs > 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_samples_in_float32(name, device):
    assert_as_accurate(some(function_pairs(name, torch.float32, str(device)), 3))


@pytest.mark.parametrize(("name", "variant", "mark"), REFUSED)
def test_refused_samples(name, variant, mark):
    error, message = REFUSED[name, variant, mark]
    samples = [sample for sample in op_samples(name, variant, torch.float64) if mark_of(sample) == mark]
    assert samples
    for sample in samples:
        with pytest.raises(error, match=message):
            FUNCTIONS[name][1](sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_samples_with_dropout(dtype, device):
    """Ours draws other numbers than torch, but what it leaves is torch's weights without dropout, scaled."""
    samples = op_samples("nn.functional.scaled_dot_product_attention", "", dtype, str(device))
    samples = some((s for s in samples if s.kwargs["dropout_p"]), 5)
    assert len(samples) >= 3
    for sample in samples:
        q, (k, v) = sample.input, sample.args
        p = sample.kwargs["dropout_p"]
        identity = torch.eye(k.shape[-2], dtype=dtype, device=device)  # as values: o is then the weights themselves
        identity = identity.expand(*v.shape[:-1], -1)
        kwargs = {**sample.kwargs, "dropout_p": 0.0}
        weights = F.scaled_dot_product_attention(q, k, identity, **kwargs)
        dropped = fastattn.functional.scaled_dot_product_attention(q, k, identity, **kwargs | {"dropout_p": p})
        kept = dropped != 0
        torch.testing.assert_close(dropped, torch.where(kept, weights / (1 - p), 0.0))
        visible = weights > 0
        assert 0.2 < kept[visible].float().mean() < 0.8
        with_values = fastattn.functional.scaled_dot_product_attention(q, k, v, **sample.kwargs)
        assert with_values.shape == (*weights.shape[:-1], v.shape[-1])


def test_signature_of_scaled_dot_product_attention():
    """torch's is built in and has none to read, so that it is called with each of our parameters in turn."""
    parameters = inspect.signature(fastattn.functional.scaled_dot_product_attention).parameters
    tensors = dict.fromkeys(list(parameters)[:3], torch.zeros(1, 1, 2, 4))
    call = partial(F.scaled_dot_product_attention, **tensors)
    for name, parameter in list(parameters.items())[3:]:
        call(**{name: parameter.default})
    assert len(parameters) == 8
