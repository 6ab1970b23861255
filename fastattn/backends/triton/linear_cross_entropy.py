"""Cross entropy of hidden · weightᵀ + bias, chunk by chunk of rows, with the gradients of all three.

    x = hidden · weightᵀ + bias          (rows, V), into a buffer that every chunk uses again
    losses, x ← loss and dx of x         cross_entropy.py's kernel, in place
    dhidden = dx · weight,   dweight += dxᵀ · hidden,   dbias += Σ dx

The products are torch's. Where dweight and dbias are sums over several chunks they are accumulated in fp32.

Where the logits of the fewest rows exceed their budget, V is walked through in slices too, twice:

    m = max s,  l = Σ exp(s - m),  total = Σ q,  loss = -Σ q (s - m)       carried from slice to slice
    x of the slice again, x ← dx, and its share of the products           dhidden accumulated in fp32

Memory, besides inputs and results: the logits of a chunk, or of a slice of it, which are at most the larger of 64 MiB
and half of weight's bytes (or, if chunk_size is that large, 16 classes of each of its rows); 4 V · (E + 1) bytes for
fp32 sums, if hidden has 16 bits and takes more than one chunk; 4 (E + 3) bytes per row of a chunk if V is sliced;
a copy of the chunk's rows of hidden; 4 bytes per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.backends.row_layout import lines_along
from fastattn.backends.triton.blocks.constants import NEG_INF
from fastattn.backends.triton.blocks.cross_entropy import (
    class_in_slice,
    entry_of_class,
    load_class,
    load_q,
    load_scores,
    loss_beside,
    score_of_class,
    sum_beside,
    weight_of_class,
)
from fastattn.backends.triton.blocks.softmax import finite_max, online_sum
from fastattn.backends.triton.cross_entropy import (
    add_up,
    backward_kernel,
    config_of,
    fill_divisor,
    flags_of,
    launch_rows,
    launch_scale,
    options_of,
    over_classes,
    stride_of,
    tile_of,
)
from fastattn.backends.triton.cross_entropy import launch_backward as launch_slice_gradient
from fastattn.spec import CrossEntropySpec, LinearCrossEntropySpec

if TYPE_CHECKING:
    from fastattn.backends.triton.inspection import KernelCase

CHUNK_BYTES = 64 << 20
LEAST_ROWS, LEAST_CLASSES = 256, 16


def chunk_of(N: int, V: int, E: int, element_size: int, chunk_size: int | None) -> tuple[int, int]:
    """How many of N rows, and of V classes, of logits are held at once.

    A sum over many chunks reads and writes all of dweight for each, so that chunks grow with weight: in half of its
    bytes there is room for E / 2 rows. Slices of V cost one more product, and are for what is too large for one.
    """
    budget = max(CHUNK_BYTES, V * E * element_size // 2) // element_size
    rows = max(min(chunk_size or max(budget // max(V, 1), LEAST_ROWS), N), 1)
    if rows * V <= budget:
        return rows, V
    return rows, min(max(budget // rows // LEAST_CLASSES, 1) * LEAST_CLASSES, V)


@triton.jit(do_not_specialize=["ignore_index", "first_class"])
def _statistics_kernel(
    loss, row_max, row_sum, totals, x, target, weight,
    ignore_index, smoothing, z_loss, softcap, M, N, first_class, V,
    stride_xm, stride_xn, stride_tm, stride_tn, stride_w,
    PROBABILITIES: tl.constexpr, SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program adds N of V classes, from first_class on, to what is known of BLOCK_M rows.

    totals holds Σ q of the classes so far. Until the last slice loss holds -Σ q (s - row_max).
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    t, read, poison = load_class(target, m, stride_tm, M, V, ignore_index, PROBABILITIES)
    t = class_in_slice(t, first_class, N)
    w_t = weight_of_class(weight, t, stride_w)

    known = read & (first_class > 0)
    highest = tl.load(row_max + m, mask=known, other=NEG_INF)
    sums = tl.load(row_sum + m, mask=known, other=0.0)
    total = tl.load(totals + m, mask=known, other=0.0)
    row_loss = tl.load(loss + m, mask=known, other=0.0)
    for start in range(0, N, BLOCK_N):
        s = load_scores(x, m, start + n, stride_xm, stride_xn, N, read, softcap, SOFTCAP)
        before = finite_max(highest)
        highest, sums = online_sum(highest, sums, s)
        offset = finite_max(highest)
        row_loss += total * (offset - before)
        if PROBABILITIES or SMOOTHED:
            q = load_q(
                target, weight, m, start + n, t, w_t, stride_tm, stride_tn, stride_w, N, V, read, smoothing,
                PROBABILITIES, SMOOTHED,
            )  # fmt: skip
            row_loss += loss_beside(q, s - offset[:, None], start + n, t, N)
            total += sum_beside(q, start + n, t)
    if not PROBABILITIES:
        q_t = entry_of_class(w_t, V, smoothing, SMOOTHED)
        s_t = score_of_class(x, m, t, stride_xm, stride_xn, softcap, SOFTCAP)
        row_loss -= q_t * (s_t - finite_max(highest))
        total += q_t

    if first_class + N == V:
        log_sum = tl.log(sums)
        row_loss += total * log_sum + poison
        if Z_LOSS:
            lse = highest + log_sum
            row_loss += z_loss * lse * lse
        row_loss = tl.where(read, row_loss, 0.0)
    tl.debug_barrier()  # what is overwritten has been read by every thread
    tl.store(row_max + m, highest, mask=m < M)
    tl.store(row_sum + m, sums, mask=m < M)
    tl.store(totals + m, total, mask=m < M)
    tl.store(loss + m, row_loss, mask=m < M)


def launch_statistics(
    losses: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    spec: CrossEntropySpec,
    first_class: int,
    V: int,
) -> None:
    """Adds a slice of V classes to losses and (row_max, row_sum, totals), all (rows,), contiguous and fp32."""
    lines = lines_along(1, (logits, target if spec.probabilities else over_classes(target, logits, 1)))
    assert lines is not None  # of two dimensions
    (*_, stride_xm, stride_xn), (*_, stride_tm, stride_tn) = lines.steps
    grid, tile = tile_of(lines, logits.device)
    _statistics_kernel[grid](
        losses, *statistics, logits, target, weight,
        *options_of(spec), lines.M, lines.N, first_class, V,
        stride_xm, stride_xn, stride_tm, stride_tn, stride_of(weight), **flags_of(spec), **tile,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Logits:
    """x = h · weightᵀ + bias of the rows of a chunk, slice by slice of the classes, into one buffer."""

    weight: Tensor  # (V, E)
    bias: Tensor | None
    class_weight: Tensor | None
    divisor: Tensor | None
    spec: CrossEntropySpec
    slices: tuple[slice, ...]
    buffer: Tensor

    def of(self, h: Tensor, part: slice) -> Tensor:
        w = self.weight[part].t()
        x = self.buffer[: h.shape[0] * w.shape[1]].view(h.shape[0], w.shape[1])
        return torch.mm(h, w, out=x) if self.bias is None else torch.addmm(self.bias[part], h, w, out=x)

    def facts(self, target: Tensor, part: slice) -> tuple[Tensor, Tensor | None]:
        """Target and class weights of a slice."""
        weight = None if self.class_weight is None else self.class_weight[part]
        return target[:, part] if self.spec.probabilities else target, weight

    def gradients(
        self, losses: Tensor, h: Tensor, target: Tensor, dloss: Tensor | None, wanted: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        """Fills the losses (rows,); yields each slice with dx (rows, classes of the slice), if that is wanted."""
        if len(self.slices) == 1:
            (part,) = self.slices
            x = self.of(h, part)
            dx = x if wanted else None
            launch_rows(losses, None, None, self.divisor, dx, x, target, self.class_weight, self.spec, dloss)
            if dx is not None:
                yield part, dx
            return
        V = self.weight.shape[0]
        row_max, row_sum, totals = (torch.empty_like(losses) for _ in range(3))
        for part in self.slices:
            facts = self.facts(target, part)
            launch_statistics(
                losses, (row_max, row_sum, totals), self.of(h, part), *facts, self.spec, part.start, V
            )  # fmt: skip
        if not wanted:
            return
        dloss = losses.new_ones(()) if dloss is None else dloss
        for part in self.slices:
            x = self.of(h, part)
            launch_slice_gradient(
                x, dloss, x, *self.facts(target, part), row_max, row_sum, self.divisor, self.spec,
                totals, part.start, V,
            )  # fmt: skip
            yield part, x


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
    rows, classes = chunk_of(N, V, E, hidden.element_size(), spec.chunk_size)
    several = rows < N and hidden.element_size() < 4
    sums = tuple(None if g is None else torch.zeros_like(g, dtype=torch.float32) if several else g.zero_()
                 for g in (dweight, dbias))  # fmt: skip
    slices = tuple(slice(first, min(first + classes, V)) for first in range(0, max(V, 1), max(classes, 1)))
    buffer = hidden.new_empty(min(rows, N) * classes)
    logits = _Logits(weight, bias, class_weight, divisor, spec.loss, slices, buffer)
    wanted = any(g is not None for g in gradients)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        h, dh = hidden[chunk], None if dhidden is None else dhidden[chunk]
        if dweight is not None and not spec.loss.probabilities:
            # The dx of an ignored row is 0, and so should be its share of dweight, whatever hidden holds there.
            h = h.masked_fill((target[chunk].long() == spec.loss.ignore_index)[:, None], 0.0)
        if dh is not None and len(slices) > 1:
            dh = torch.zeros_like(dh, dtype=torch.float32)
        factor = None if dloss is None else dloss[chunk]
        for part, dx in logits.gradients(losses[chunk], h, target[chunk], factor, wanted):
            if dh is not None:
                _add_product(dh, dx, weight[part]) if len(slices) > 1 else torch.mm(dx, weight, out=dh)
            if sums[0] is not None:
                _add_product(sums[0][part], dx.t(), h)
            if sums[1] is not None:
                sums[1][part].add_(dx.sum(0, dtype=sums[1].dtype))
        if dhidden is not None and dh is not None and len(slices) > 1:
            dhidden[chunk].copy_(dh)
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


def inspect_cases(arch: str) -> list[KernelCase]:
    """The compilations that the ahead-of-time report shows: of slices that are longer than a tile."""
    from fastattn.backends.triton.row_cases import SHAPES, row_case

    cases = []
    for dtype, N in SHAPES:
        if N < 65536:
            continue
        config = config_of(N, 1 << 30, False, arch)
        statistics = dict.fromkeys(("loss", "row_max", "row_sum", "totals"), "*fp32")
        for feature, target, everything in (("plain", "i64", False), ("everything", "i64", True),
                                            ("probabilities", dtype, True)):  # fmt: skip
            pointers = statistics | {
                "dloss": "*fp32", "divisor": "*fp32", "x": f"*{dtype}", "dx": f"*{dtype}", "target": f"*{target}",
                "weight": "*fp32",
            }  # fmt: skip
            flags = {
                "PROBABILITIES": target == dtype, "SMOOTHED": everything, "Z_LOSS": everything, "SOFTCAP": everything,
                "stride_w": int(everything),
            } | ({} if everything else {"weight": None})  # fmt: skip
            for name, kernel in (("statistics", _statistics_kernel), ("gradient", backward_kernel)):
                case = f"linear_cross_entropy/{name}/{feature}/{dtype}/{N}"
                cases.append(row_case(case, kernel, config, pointers, **flags))
    return cases
