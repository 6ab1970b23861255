"""The CPU kernels where programs call them: in workers, forked children and threads, without gradients, compiled."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cpu_isas import NEEDS_MODULE
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastattn
from fastattn.testing import make_inputs

pytestmark = NEEDS_MODULE

TARGET = torch.arange(200) % 300
HEADS, ROWS = (1, 4, 150, 32), (200, 300)  # work for several threads
OPERATORS = {  # name -> (function, shapes of its inputs, shape of its result)
    "attention": (lambda q, k, v: fastattn.attention(q, k, v, causal=True, backend="cpu"), [HEADS] * 3, HEADS),
    "rms_norm": (lambda x, weight: fastattn.rms_norm(x, 300, weight, backend="cpu"), [ROWS, (300,)], ROWS),
    "softmax": (lambda x: fastattn.softmax(x, backend="cpu"), [ROWS], ROWS),
    "cross_entropy": (lambda x: fastattn.cross_entropy(x, TARGET, reduction="none", backend="cpu"), [ROWS], (200,)),
    "swiglu": (lambda gate, up: fastattn.swiglu(gate, up, backend="cpu"), [ROWS] * 2, ROWS),
}
Call = tuple[Callable[..., Tensor], list[Tensor], Tensor]


def calls() -> list[Call]:
    """Each operator, its inputs, and a gradient of its result."""
    return [
        (function, [t.requires_grad_() for t in make_inputs(*inputs)], make_inputs(result, seed=1)[0])
        for function, inputs, result in OPERATORS.values()
    ]


def results(calls: Sequence[Call]) -> list[Tensor]:
    """Of every call the result, and the gradients of its inputs."""
    found = []
    for function, inputs, dy in calls:
        y = function(*inputs)
        found += [y.detach(), *torch.autograd.grad(y, inputs, dy)]
    return found


def equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """By numpy: torch compares large tensors with threads, for which it would wait for ever in a forked child."""
    return all(np.array_equal(a.detach(), b.detach()) for a, b in zip(actual, expected, strict=True))


class Results(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> list[Tensor]:
        return results(calls())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_workers_of_a_loader(method, threads):
    """After threads of the parent have run: a forked worker has none of them, and must not wait for them."""
    threads(2)
    expected = results(calls())
    loader = DataLoader(Results(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=100)
    found = list(loader)
    assert len(found) == 3
    assert all(equal(each, expected) for each in found)


def _forked(connection, given: list[Call], expected: list[Tensor]) -> None:
    connection.send(equal(results(given), expected))


def test_in_a_forked_child(threads):
    """Where, unlike in a loader's worker, torch still counts two threads."""
    threads(2)
    given = calls()
    expected = results(given)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_forked, args=(there, given, expected), daemon=True)
    child.start()
    assert here.poll(60), "the child hangs"
    assert here.recv()
    child.join(60)


def test_in_threads_at_once(threads):
    """Each thread of Python opens teams of its own, and takes its scratch memory from what all of them share."""
    threads(2)
    expected = results(calls())
    with ThreadPoolExecutor(4) as pool:
        assert all(equal(found, expected) for found in pool.map(results, [calls() for _ in range(12)]))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", OPERATORS)
def test_without_gradients(name, mode):
    function, shapes, _ = OPERATORS[name]
    inputs = make_inputs(*shapes)
    with mode():
        found = function(*inputs)
    assert torch.equal(found, function(*(t.requires_grad_() for t in inputs)))
    assert not found.requires_grad


def model(x: Tensor, projection: Tensor, gain: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """A block of a Transformer, and its loss: x (B, S, 32), target (B, S)."""
    h = fastattn.rms_norm(x, 32, gain, backend="cpu")
    q, k, v = (h @ projection).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)  # (B, 2, S, 16) each
    o = fastattn.attention(q, k, v, causal=True, backend="cpu")
    y = fastattn.layer_norm(x + o.transpose(1, 2).flatten(2), 32, backend="cpu")
    return fastattn.cross_entropy((y @ head).flatten(0, 1), target.flatten(), backend="cpu")


def test_in_a_compiled_model_of_any_length():
    """One graph for every length, with the bits of the eager call."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = [t.requires_grad_() for t in make_inputs((32, 96), (32,), (32, 50))]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for S in (7, 40, 33):
            (x,) = make_inputs((2, S, 32), seed=S)
            target = torch.arange(2 * S).view(2, S) % 50
            torch._dynamo.mark_dynamic(x, 1)
            torch._dynamo.mark_dynamic(target, 1)
            leaves = [x.requires_grad_(), *parameters]
            losses = [function(*leaves, target) for function in (compiled, model)]
            found, expected = ((loss.detach(), *torch.autograd.grad(loss, leaves)) for loss in losses)
            assert equal(found, expected)
