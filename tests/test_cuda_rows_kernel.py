"""Which configurations the row kernels of csrc/cuda choose, and what they refuse."""

from __future__ import annotations

import pytest
import test_cuda_cross_entropy_kernel
import test_cuda_norm_kernel
import test_cuda_softmax_kernel
import torch
from cuda_rows import BF16, F16, F32, NEEDS_COMPILER, kernels, randn, rows, sizes, vector
from test_cuda_cross_entropy_kernel import Loss, run_loss
from test_cuda_softmax_kernel import Soft, soft_arguments

pytestmark = NEEDS_COMPILER


def test_every_bug_is_planted():
    planted = {**test_cuda_norm_kernel.BUGS, **test_cuda_softmax_kernel.BUGS, **test_cuda_cross_entropy_kernel.BUGS}
    assert sorted(planted) == sorted(kernels().emulator_rows_bugs())


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize(("pack", "elements", "kept"), [(8, 32, 64), (4, 16, 64), (8, 16, 0), (4, 16, 0)])
def test_configurations_are_legal(pack: int, elements: int, kept: int, clusters: bool):
    shared = 227 * 1024 if clusters else 99 * 1024
    lengths = [*range(1, 300), *(n + d for k in range(8, 31) for n in (1 << k, 3 << (k - 1)) for d in (-1, 0, 1))]
    for N in lengths:
        for shifted in (False, True):
            config = kernels().row_config(N, pack, elements, kept, shifted, clusters, shared)
            assert config["illegal"] == "", (N, config)
    one_chunk = kernels().row_config(131_072, 8, 32, 64, False, True, shared)
    assert one_chunk["cluster"] == 8
    assert one_chunk["chunks"] == 1
    assert kernels().row_config(4096, 8, 32, 64, False, True, shared) == {
        "threads": 128, "threads_per_row": 128, "cluster": 1, "chunks": 1, "kept": 0, "shared_bytes": 768,
        "illegal": "",
    }  # fmt: skip


def test_refusals_name_the_argument():
    x = randn(2, 8, dtype=F32)
    call = {"y": rows(x), "x": rows(x), **soft_arguments(x, None, Soft("", (2, 8)), False)}
    with pytest.raises(ValueError, match="M and N are 0 and 8"):
        kernels().softmax_forward(**{**call, "M": 0})
    with pytest.raises(ValueError, match="R1 and R2"):
        kernels().softmax_forward(**{**call, "R2": 3})
    with pytest.raises(ValueError, match="dtype is 7"):
        kernels().softmax_forward(**{**call, "x": (x.data_ptr(), 7, 0, 0, 8)})
    with pytest.raises(ValueError, match="label_smoothing"):
        run_loss(Loss("", 2, 8, options={"label_smoothing": 0.1}), x, torch.tensor([1, 2]), torch.ones(8), "sum")


def test_refusals_of_dtypes():
    half, single, other = (randn(2, 8, dtype=dtype) for dtype in (BF16, F32, F16))
    with pytest.raises(ValueError, match="softmax: its output is float32; it must be bfloat16"):
        kernels().softmax_forward(y=rows(single), x=rows(half), **soft_arguments(half, None, Soft("", (2, 8)), False))
    norm = {"h": None, "stats": single.data_ptr(), "rms": True, "eps": 1e-5, "weight_offset": 0.0, "stream": 0}
    norm |= {"y": rows(half), "x": rows(half), "weight": None, "bias": None, "residual": None, **sizes(half)}
    for name, wrong in (("weight", vector(other[0])), ("bias", vector(other[0])), ("residual", rows(other))):
        with pytest.raises(ValueError, match=f"norm: {name} is float16; it must be bfloat16 or float32"):
            kernels().norm_forward(**{**norm, name: wrong})
    with pytest.raises(ValueError, match="cross_entropy: weight is float16"):
        run_loss(Loss("", 2, 8, BF16), half, torch.tensor([1, 2]), other[0], "sum")
