"""A call that torch refuses is refused here with an exception that the same `except` clause catches.

`error_inputs_func` and `module_error_inputs_func` are the wrong calls that torch's own test-suite makes; `CALLS` are
further ones. Messages are this library's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fastattn
import fastattn.nn as ours
from fastattn.errors import FastattnError

FUNCTIONS = {
    "softmax": fastattn.softmax,
    "log_softmax": fastattn.log_softmax,
    "nn.functional.layer_norm": fastattn.layer_norm,
    "nn.functional.rms_norm": fastattn.rms_norm,
    "nn.functional.cross_entropy": fastattn.cross_entropy,
    "nn.functional.linear_cross_entropy": fastattn.linear_cross_entropy,
    "nn.functional.scaled_dot_product_attention": fastattn.scaled_dot_product_attention,
}
# What torch's function calls an argument, and ours.
RENAMED = {"nn.functional.linear_cross_entropy": {"linear_bias": "bias", "weight": "class_weight"}}


def wrong_functions() -> Iterator[Any]:
    """(name, torch's function, sample, error) of each error input that torch has for a function of ours."""
    for op in op_db:
        if op.name in FUNCTIONS and op.error_inputs_func is not None:
            for i, wrong in enumerate(op.error_inputs("cpu")):
                yield pytest.param(op.name, op, wrong, id=f"{op.name}-{op.variant_test_name}-{i}")


@pytest.mark.parametrize(("name", "op", "wrong"), list(wrong_functions()))
def test_functions(name, op, wrong):
    sample = wrong.sample_input
    with pytest.raises(wrong.error_type):
        op(sample.input, *sample.args, **sample.kwargs)
    renamed, known = RENAMED.get(name, {}), inspect.signature(FUNCTIONS[name]).parameters
    kwargs = {renamed.get(key, key): value for key, value in sample.kwargs.items()}
    kwargs = {key: value for key, value in kwargs.items() if key in known}  # torch chooses its chunks by other names
    with pytest.raises(wrong.error_type) as info:
        FUNCTIONS[name](sample.input, *sample.args, **kwargs)
    assert isinstance(info.value, FastattnError)


def wrong_modules() -> Iterator[Any]:
    """(torch's class, error input) of each module of ours."""
    for info in module_db:
        if info.module_error_inputs_func is None or not hasattr(ours, info.module_cls.__name__):
            continue
        wrongs = info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
        for i, wrong in enumerate(wrongs):
            yield pytest.param(info.module_cls, wrong, id=f"{info.module_cls.__name__}-{i}")


@pytest.mark.parametrize(("module_class", "wrong"), list(wrong_modules()))
def test_modules(module_class, wrong):
    construction, forward = wrong.module_error_input.constructor_input, wrong.module_error_input.forward_input

    def call(library):
        return library(*construction.args, **construction.kwargs)(*forward.args, **forward.kwargs)

    with pytest.raises(wrong.error_type):
        call(module_class)
    with pytest.raises(wrong.error_type) as info:
        call(getattr(ours, module_class.__name__))
    assert isinstance(info.value, FastattnError)


def test_torch_has_error_inputs():
    """Else the tests above would test nothing."""
    assert {name for param in wrong_functions() for name in param.values[:1]} >= {"nn.functional.rms_norm"}
    assert {param.values[0] for param in wrong_modules()} >= {nn.CrossEntropyLoss}


Q, X, T = torch.zeros(2, 3, 4, 8), torch.zeros(3, 5), torch.arange(3)
INTEGERS = Q.long()
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    # (torch.nn.functional or this package, torch.nn or fastattn.nn) -> what is refused
    "sdpa_1d": lambda f, _: f.scaled_dot_product_attention(X[0], X[0], X[0]),
    "sdpa_key_dtype": lambda f, _: f.scaled_dot_product_attention(Q, Q.double(), Q),
    "sdpa_value_dtype": lambda f, _: f.scaled_dot_product_attention(Q, Q, Q.half()),
    "sdpa_integers": lambda f, _: f.scaled_dot_product_attention(INTEGERS, INTEGERS, INTEGERS),
    "sdpa_head_dim": lambda f, _: f.scaled_dot_product_attention(Q, Q[..., :5], Q),
    "sdpa_mask_shape": lambda f, _: f.scaled_dot_product_attention(Q, Q, Q, torch.zeros(3, 3)),
    "sdpa_mask_integers": lambda f, _: f.scaled_dot_product_attention(Q, Q, Q, torch.zeros(4, 4).long()),
    "sdpa_heads": lambda f, _: f.scaled_dot_product_attention(torch.zeros(2, 4, 4, 8), Q[:, :2], Q[:, :2]),
    "sdpa_gqa": lambda f, _: f.scaled_dot_product_attention(Q, Q[:, :2], Q[:, :2], enable_gqa=True),
    "sdpa_biases": lambda f, _: f.scaled_dot_product_attention(Q, Q, Q, causal_lower_right(4, 4), is_causal=True),
    "sdpa_dropout": lambda f, _: f.scaled_dot_product_attention(Q, Q, Q, None, 1.5),
    "softmax_dim": lambda f, _: f.softmax(X, 2),
    "log_softmax_dim": lambda f, _: f.log_softmax(X, -3),
    "layer_norm_shape": lambda f, _: f.layer_norm(X, (4,)),
    "layer_norm_nothing": lambda f, _: f.layer_norm(X, ()),
    "layer_norm_weight": lambda f, _: f.layer_norm(X, (5,), X[0, :3]),
    "layer_norm_bias": lambda f, _: f.layer_norm(X, (5,), None, X[0, :3]),
    "rms_norm_weight": lambda f, _: f.rms_norm(X, (5,), X[0, :3]),
    "cross_entropy_class": lambda f, _: f.cross_entropy(X, T + 3),
    "cross_entropy_negative_class": lambda f, _: f.cross_entropy(X, T - 1),
    "cross_entropy_rows": lambda f, _: f.cross_entropy(X, torch.arange(4)),
    "cross_entropy_reduction": lambda f, _: f.cross_entropy(X, T, reduction="product"),
    "cross_entropy_smoothing": lambda f, _: f.cross_entropy(X, torch.arange(4), label_smoothing=1.2),
    "cross_entropy_integers": lambda f, _: f.cross_entropy(X.long(), T),
    "attention_heads": lambda _, nn: nn.MultiheadAttention(8, 3),
    "attention_size": lambda _, nn: nn.MultiheadAttention(0, 1),
    "encoder_activation": lambda _, nn: nn.TransformerEncoderLayer(8, 2, activation="tanh"),
    "encoder_width": lambda _, nn: nn.TransformerEncoderLayer(8, 2)(torch.zeros(3, 2, 7)),
    "encoder_mask": lambda _, nn: nn.TransformerEncoderLayer(8, 2)(torch.zeros(3, 2, 8), torch.zeros(2, 2)),
    "encoder_mask_dtype": lambda _, nn: nn.TransformerEncoderLayer(8, 2)(torch.zeros(3, 2, 8), torch.ones(3, 3).long()),
    "encoder_hint": lambda _, nn: nn.TransformerEncoderLayer(8, 2)(torch.zeros(3, 2, 8), is_causal=True),
    "transformer_batch": lambda _, nn: transformer(nn)(torch.zeros(3, 2, 8), torch.zeros(3, 1, 8)),
    "transformer_width": lambda _, nn: transformer(nn)(torch.zeros(3, 2, 8), torch.zeros(3, 2, 7)),
    "nested_nothing": lambda _, nn: nn.TransformerEncoderLayer(8, 2, batch_first=True)(torch.nested.nested_tensor([])),
}  # fmt: skip


def transformer(nn: Any) -> Any:
    return nn.Transformer(8, 2, 1, 1, 8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_further_calls(name):
    call = CALLS[name]
    with pytest.raises(Exception) as theirs:
        call(F, nn)
    # A missing kernel is a NotImplementedError of torch's, and as such a RuntimeError.
    caught_as = RuntimeError if isinstance(theirs.value, RuntimeError) else type(theirs.value)
    with pytest.raises(caught_as):
        call(fastattn, ours)
