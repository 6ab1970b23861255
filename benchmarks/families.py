"""The workloads, by family. On a GPU the sizes at which papers and peers report; on a CPU what two cores can do.

`quick` is the part that `--quick` runs: a row or two a family on a GPU, and all of it within three minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product

import torch

from benchmarks.problems.attention import AttentionProblem, VarlenProblem
from benchmarks.problems.models import LayerProblem, TrainStepProblem
from benchmarks.problems.rows import (
    CrossEntropyProblem,
    GatedProblem,
    LinearCrossEntropyProblem,
    NormProblem,
    RotaryProblem,
    SoftmaxProblem,
)
from benchmarks.workload import Direction, Problem, Workload
from fastattn.errors import ArgumentError

BF16, F32 = torch.bfloat16, torch.float32
BOTH: tuple[Direction, ...] = ("forward", "backward")
TOKENS, WIDTH = 16_384, 2048  # B · S and H · D of the attention grid

# Tokens in every 25th file of Python 3.11's standard library, under the demo's byte-pair code, cut at 4096: text as it
# comes, many short pieces and a few long ones.
FILE_LENGTHS = (
    2396, 462, 4096, 4096, 3324, 4096, 4096, 4096, 4096, 2706, 4096, 321, 1340, 266, 1218, 2724, 4096, 3673, 4096,
    107, 581, 628, 4096, 2537, 12,
)  # fmt: skip


def dtypes(gpu: bool) -> tuple[torch.dtype, ...]:
    return (BF16,) if gpu else (F32, BF16)


def attention_grid(gpu: bool) -> Iterator[Workload]:
    if gpu:
        grid = product((64, 128, 256), (512, 1024, 2048, 4096, 8192, 16_384), (False, True))
        for D, S, causal in grid:
            problem = AttentionProblem(TOKENS // S, WIDTH // D, S, S, D, causal)
            yield from attention("attention", problem, BF16, quick=D == 128 and S in (1024, 8192))
        return
    for dtype, (D, S), causal in product((F32, BF16), ((64, 128), (64, 512), (64, 2048), (128, 1024)), (False, True)):
        quick = D == 64 and S == 512
        yield from attention("attention", AttentionProblem(1, 8, S, S, D, causal), dtype, quick=quick)


def attention_features(gpu: bool) -> Iterator[Workload]:
    B, H, S, D = (4, 16, 4096, 128) if gpu else (1, 4, 512, 64)
    document = S // 8
    window = S // 8
    for name, options in {
        "gqa": {"H_kv": H // 4, "causal": True},
        "window": {"window": window, "causal": True},
        "documents": {"documents": (3 * document, document, 4 * document), "causal": True},
        "softcap": {"softcap": 30.0, "causal": True},
        "bias": {"bias": True},
    }.items():
        problem = AttentionProblem(B, H, S, S, D, **options)  # type: ignore[arg-type]
        for dtype in dtypes(gpu):
            quick = gpu or (dtype == F32 and name in ("gqa", "window"))
            yield from attention(name, problem, dtype, quick=quick)


def attention(family: str, problem: AttentionProblem, dtype: torch.dtype, quick: bool) -> Iterator[Workload]:
    heads = f"{problem.H}" if problem.heads_kv == problem.H else f"{problem.H}/{problem.heads_kv}"
    causal = " causal" if problem.causal else ""
    name = f"B{problem.B} H{heads} S{problem.S_k} D{problem.D}{causal}"
    for direction in BOTH:
        yield Workload(family, name, problem, dtype, direction, f"D{problem.D}{causal}", problem.S_k, quick)


def varlen(gpu: bool) -> Iterator[Workload]:
    lengths, H, D = (FILE_LENGTHS, 16, 128) if gpu else (tuple(n // 16 + 1 for n in FILE_LENGTHS), 4, 64)
    for causal in (False, True):
        problem = VarlenProblem(lengths, H, D, causal)
        name = f"{len(lengths)} files T{problem.tokens} H{H} D{D}{' causal' if causal else ''}"
        for direction in BOTH:
            for dtype in dtypes(gpu):
                quick = gpu or (causal and dtype == F32)
                yield Workload("varlen", name, problem, dtype, direction, name, problem.tokens, quick)


def decode(gpu: bool) -> Iterator[Workload]:
    H, D = (32, 128) if gpu else (8, 64)
    shapes = (
        [(1, 8, 1024), (1, 8, 8192), (8, 8, 8192), (32, 8, 4096), (64, 8, 8192)]
        if gpu
        else [(1, 2, 1024), (1, 2, 8192), (4, 2, 1024), (4, 8, 1024)]
    )
    for B, H_kv, S_k in shapes:
        problem = AttentionProblem(B, H, 1, S_k, D, True, H_kv)
        name = f"B{B} H{H}/{H_kv} S{S_k} D{D}"
        for dtype in dtypes(gpu):
            quick = S_k == 8192 if gpu else (B, H_kv, dtype) == (4, 2, F32)
            yield Workload("decode", name, problem, dtype, "forward", f"B{B}", S_k, quick)


def norms(gpu: bool) -> Iterator[Workload]:
    shapes = (
        ((16_384, 1024), (4096, 2048), (16_384, 4096), (8192, 8192), (4096, 16_384))
        if gpu
        else ((2048, 256), (2048, 1024), (512, 4096))
    )
    for kind, residual, (rows, N) in product(("layer_norm", "rms_norm"), (False, True), shapes):
        problem = NormProblem(kind, rows, N, residual)
        family = f"{kind} + residual" if residual else kind
        yield from rows_of(
            family, problem, rows, N, gpu, quick=N in (1024, 4096) if gpu else N == 1024 and not residual
        )


def softmaxes(gpu: bool) -> Iterator[Workload]:
    for N in (1024, 4096, 16_384, 65_536) if gpu else (512, 4096):
        rows = (1 << 26) // N if gpu else (1 << 20) // N
        yield from rows_of("softmax", SoftmaxProblem(rows, N), rows, N, gpu, quick=N == 4096)
    for N in (1024, 4096) if gpu else (256,):
        rows = (1 << 26) // N if gpu else 16 * N
        yield from rows_of("softmax causal", SoftmaxProblem(rows, N, True, 0.125), rows, N, gpu, quick=N in (4096, 256))
        yield from rows_of("softmax masked", SoftmaxProblem(rows, N, False, 0.125, True), rows, N, gpu, quick=False)


def rows_of(family: str, problem: Problem, rows: int, N: int, gpu: bool, quick: bool) -> Iterator[Workload]:
    for dtype, direction in product(dtypes(gpu), BOTH):
        in_quick = quick and (gpu or dtype == F32)  # on a CPU most of its time goes into compiling the peers
        yield Workload(family, f"{rows}x{N}", problem, dtype, direction, family, N, in_quick)


def losses(gpu: bool) -> Iterator[Workload]:
    shapes = ((4096, 32_000), (8192, 50_304), (8192, 128_256)) if gpu else ((256, 4096), (256, 32_000))
    for rows, V in shapes:
        problem = CrossEntropyProblem(rows, V)
        directions: tuple[Direction, ...] = ("forward", "step")
        for dtype, direction in product(dtypes(gpu), directions):
            quick = V == 32_000 and (gpu or dtype == F32)
            yield Workload("cross_entropy", f"{rows}x{V}", problem, dtype, direction, "cross_entropy", V, quick)
    shapes3 = ((8192, 4096, 32_000), (8192, 4096, 128_256)) if gpu else ((256, 128, 8192),)
    for tokens, E, V in shapes3:
        linear = LinearCrossEntropyProblem(tokens, E, V)
        yield Workload(
            "linear_cross_entropy", f"{tokens}x{E}x{V}", linear, BF16 if gpu else F32, "step", f"E{E}", V,
            V in (32_000, 8192),
        )  # fmt: skip


def elementwise(gpu: bool) -> Iterator[Workload]:
    B, H, D = (4, 32, 128) if gpu else (1, 8, 64)
    for S in (1024, 4096) if gpu else (1024,):
        rotary = RotaryProblem(B, H, S, D)
        yield from rows_of("rotary_embedding", rotary, B * H * S, D, gpu, quick=S == 1024)
    rows, widths = (8192, (4096, 14_336)) if gpu else (1024, (1024,))
    for kind, N in product(("swiglu", "geglu"), widths):
        quick = N == 4096 if gpu else kind == "swiglu"
        yield from rows_of(kind, GatedProblem(kind, rows, N), rows, N, gpu, quick)


def models(gpu: bool) -> Iterator[Workload]:
    for S in (1024, 4096) if gpu else (128,):
        layer = LayerProblem(TOKENS // S, S, WIDTH, 16) if gpu else LayerProblem(4, S, 256, 4)
        name = f"B{layer.B} S{S} d{layer.d_model} H{layer.heads}"
        yield Workload("layer", name, layer, BF16 if gpu else F32, "step", f"d{layer.d_model}", S, S in (1024, 128))
    step = TrainStepProblem(8, 1024, 768, 12, 12, 50_304) if gpu else TrainStepProblem(2, 128, 128, 4, 2, 2048)
    name = f"{'GPT-2' if gpu else 'small GPT'} B{step.B} S{step.S}"
    yield Workload("train_step", name, step, BF16 if gpu else F32, "step", "train_step", step.S, True)


GROUPS: tuple[Callable[[bool], Iterable[Workload]], ...] = (
    attention_grid, attention_features, varlen, decode, norms, softmaxes, losses, elementwise, models,
)  # fmt: skip


def workloads(device: torch.device, quick: bool = False) -> list[Workload]:
    """Every workload of a kind of device, in the order in which they are run: those of `quick` first."""
    found = [workload for group in GROUPS for workload in group(device.type == "cuda")]
    return [w for w in found if w.quick] + ([] if quick else [w for w in found if not w.quick])


def select(known: list[Workload], families: list[str]) -> list[Workload]:
    """Those of the families named; all of them if none is."""
    names = list(dict.fromkeys(workload.family for workload in known))
    for family in families:
        if family not in names:
            raise ArgumentError(f"`family` is {family!r}; the families are {', '.join(map(repr, names))}.")
    return [workload for workload in known if not families or workload.family in families]
