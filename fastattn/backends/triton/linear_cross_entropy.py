"""Cross entropy of hidden · weightᵀ + bias, chunk by chunk of rows, with the gradients of all three.

    x = hidden · weightᵀ + bias          (rows, V), into a buffer that every chunk uses again
    losses, x ← loss and dx of x         cross_entropy.py's kernel, in place
    dhidden = dx · weight,   dweight += dxᵀ · hidden,   dbias += Σ dx

The products are torch's. Where dweight and dbias are sums over several chunks they are accumulated in fp32.

Memory, besides inputs and results: one chunk of logits, which is at most the larger of 64 MiB and half of weight's
bytes, and at least 256 rows; 4 V · (E + 1) bytes for fp32 sums, if hidden has 16 bits and takes more than one chunk;
4 bytes per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.triton.cross_entropy import add_up, fill_divisor, launch_rows, launch_scale
from fastattn.spec import LinearCrossEntropySpec

CHUNK_BYTES = 64 << 20
LEAST_ROWS = 256


def rows_of_chunk(N: int, V: int, E: int, element_size: int) -> int:
    """How many of N rows of logits are held at once. A sum over many chunks reads and writes all of dweight for each,
    so that chunks grow with weight: in half of its bytes there is room for E / 2 rows."""
    budget = max(CHUNK_BYTES, V * E * element_size // 2)
    rows = max(budget // max(V * element_size, 1), LEAST_ROWS)
    return max(min(rows, N), 1)


def launch(
    losses: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    dloss: Tensor | None,
    spec: LinearCrossEntropySpec,
) -> None:
    """Row losses (N,) fp32, and the gradients of hidden, weight and bias, those that there are.

    hidden (N, E), weight (V, E); target (N,) or (N, V); dloss (N,) fp32 is a factor on what comes of each row.
    """
    N, (V, E) = hidden.shape[0], weight.shape
    dhidden, dweight, dbias = gradients
    rows = spec.chunk_size or rows_of_chunk(N, V, E, hidden.element_size())
    several = rows < N and hidden.element_size() < 4
    sums = tuple(None if g is None else torch.zeros_like(g, dtype=torch.float32) if several else g.zero_()
                 for g in (dweight, dbias))  # fmt: skip
    buffer = hidden.new_empty(min(rows, N), V)
    wanted = any(g is not None for g in gradients)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        h, x = hidden[chunk], buffer[: min(rows, N - start)]
        torch.mm(h, weight.t(), out=x) if bias is None else torch.addmm(bias, h, weight.t(), out=x)
        launch_rows(
            losses[chunk], None, None, divisor, x if wanted else None, x, target[chunk], class_weight, spec.loss,
            None if dloss is None else dloss[chunk],
        )  # fmt: skip
        if dhidden is not None:
            torch.mm(x, weight, out=dhidden[chunk])
        if sums[0] is not None:
            _add_product(sums[0], x.t(), h)
        if sums[1] is not None:
            sums[1].add_(x.sum(0, dtype=sums[1].dtype))
    for gradient, total in zip((dweight, dbias), sums, strict=True):
        if gradient is not None and total is not None and total is not gradient:
            gradient.copy_(total)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, in the precision of total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def launch_forward(
    loss: Tensor, divisor: Tensor | None, gradients, hidden, weight, target, bias, class_weight, spec
) -> None:
    """Fills loss, divisor (1,), and gradients unless they are None."""
    if spec.loss.divides:
        divisor = hidden.new_empty(1, dtype=torch.float32) if divisor is None else divisor
        fill_divisor(divisor, target, class_weight, weight.shape[0], spec.loss)
    else:
        divisor = None
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    launch(losses, gradients, hidden, weight, target, bias, class_weight, divisor, None, spec)
    loss.copy_(losses) if spec.loss.reduction == "none" else add_up(loss, losses, divisor)


def launch_backward(gradients, dloss, hidden, weight, target, bias, class_weight, divisor, spec) -> None:
    """The gradients from the inputs: logits and losses are computed again."""
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    dloss = dloss.float().expand(losses.shape).contiguous()
    divisor = divisor if spec.loss.divides else None
    launch(losses, gradients, hidden, weight, target, bias, class_weight, divisor, dloss, spec)


def launch_scaling(outs, factor: Tensor, gradients) -> None:
    """outs = factor · gradients, those that there are."""
    for out, gradient in zip(outs, gradients, strict=True):
        if out is not None:
            launch_scale(out, gradient, factor, out.dim() - 1)
