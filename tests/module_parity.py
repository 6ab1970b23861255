"""A module of ours against torch.nn's: built from one seed, called alike, compared in every output and gradient."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastattn.nn as ours

N, L, S, E, H, FF = 2, 5, 7, 8, 2, 12

BOOL_CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
FLOAT_CAUSAL = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
SOME_BOOL = torch.eye(L, dtype=torch.bool).roll(1, 0)
SOME_FLOAT = torch.linspace(-1, 1, L * L, dtype=torch.float64).view(L, L)
CROSS = torch.arange(L * S).view(L, S) % 3 == 1
PAD = torch.tensor([[False] * L, [False] * (L - 2) + [True] * 2])
MEMORY_PAD = torch.tensor([[False] * S, [False] * (S - 3) + [True] * 3])


def build(name: str, *args, seed: int = 0, **kwargs) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours, from one seed, with biases and norms moved off 0 and 1."""
    pair = []
    for library in (nn, ours):
        torch.manual_seed(seed)
        module = getattr(library, name)(*args, **kwargs)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        pair.append(module)
    return pair[0], pair[1]


def stack(library, kind: str, depth: int = 2, batch_first: bool = True, norm_first: bool = False) -> nn.Module:
    """An encoder or a decoder of one library, ending in its norm, without dropout."""
    layer = getattr(library, f"Transformer{kind}Layer")
    layer = layer(E, H, FF, dropout=0.0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64)
    return getattr(library, f"Transformer{kind}")(layer, depth, library.LayerNorm(E, dtype=torch.float64))


def sequences(batch_first: bool, *lengths: int, batched: bool = True) -> tuple[Tensor, ...]:
    """Random inputs of width E in float64, one per length."""
    generator = torch.Generator().manual_seed(4)
    result = []
    for length in lengths:
        x = torch.randn(N, length, E, generator=generator, dtype=torch.float64)
        x = x[0] if not batched else x if batch_first else x.transpose(0, 1).contiguous()
        result.append(x.requires_grad_())
    return tuple(result)


def run(module: nn.Module, args, kwargs) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of a random linear function of them with respect to every input and parameter."""
    inputs = enumerate(tree_leaves((args, kwargs)))
    leaves = {f"input {i}": t for i, t in inputs if isinstance(t, Tensor) and t.requires_grad}
    leaves |= {name.removeprefix("_orig_mod."): p for name, p in module.named_parameters()}
    outputs = [o for o in tree_leaves(module(*args, **kwargs)) if isinstance(o, Tensor)]
    if not leaves:
        return outputs, {}
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return outputs, {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def assert_same(theirs: nn.Module, mine: nn.Module, args, kwargs) -> None:
    """Equal outputs and gradients, to the default tolerance of the dtype."""
    their_outputs, their_grads = run(theirs, args, kwargs)
    my_outputs, my_grads = run(mine, args, kwargs)
    torch.testing.assert_close(my_outputs, their_outputs)
    assert my_grads.keys() == their_grads.keys()
    torch.testing.assert_close(my_grads, their_grads)


def assert_same_in_training_and_evaluation(theirs: nn.Module, mine: nn.Module, args, kwargs) -> None:
    """The truth is torch's training mode without dropout: over padding, its inference kernels give something else."""
    assert_same(theirs, mine, args, kwargs)
    expected = theirs(*args, **kwargs)
    with torch.no_grad():
        torch.testing.assert_close(mine.eval()(*args, **kwargs), expected)


def assert_as_accurate(cases: Iterable[tuple[nn.Module, nn.Module, Sequence, dict]]) -> None:
    """Taken over all cases (torch's module, ours, args, kwargs), the outputs and gradients of ours are at most twice as
    far from torch's float64 results as torch's own in the same dtype, give or take one rounding."""
    ours_squared = theirs_squared = roundings_squared = 0.0
    for theirs, mine, args, kwargs in cases:
        exact_args, exact_kwargs = converted(args, kwargs, dtype=torch.float64)
        exact = _by_name(*run(copy.deepcopy(theirs).double(), exact_args, exact_kwargs))
        reference, result = _by_name(*run(theirs, args, kwargs)), _by_name(*run(mine, args, kwargs))
        assert exact.keys() == reference.keys() == result.keys()
        for name, truth in exact.items():
            assert result[name].dtype == reference[name].dtype, name
            ours_squared += (result[name] - truth).square().sum().item()
            theirs_squared += (reference[name] - truth).square().sum().item()
            rounding = torch.finfo(reference[name].dtype).eps / 2 * truth
            roundings_squared += rounding.square().sum().item()
    error, allowed = ours_squared**0.5, 2 * theirs_squared**0.5 + roundings_squared**0.5
    assert allowed > 0
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def converted(args: Sequence, kwargs: dict, **to) -> tuple[list, dict]:
    """Arguments of a call on another device or in another dtype: new leaves, and one for a tensor given twice."""
    done: dict[int, Tensor] = {}

    def convert(x):
        if not isinstance(x, Tensor):
            return x
        if id(x) not in done:
            done[id(x)] = x.detach().to(**to) if x.is_floating_point() else x.to(to.get("device", x.device))
        return done[id(x)].requires_grad_(x.requires_grad)

    return [convert(x) for x in args], {name: convert(x) for name, x in kwargs.items()}


def _by_name(outputs: list[Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"output {i}": o for i, o in enumerate(outputs)} | {f"gradient of {name}": g for name, g in grads.items()}


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_meta(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("meta").to_empty(device="cpu")
