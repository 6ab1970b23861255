"""What the ahead-of-time report compiles of a row kernel: a contiguous matrix, as its launcher would run it."""

from __future__ import annotations

import triton

from fastattn.backends.triton.inspection import KernelCase
from fastattn.backends.triton.row_configs import RowConfig

# (dtype, N): rows of one tile in every kernel up to 8192
SHAPES = tuple((dtype, N) for dtype in ("bf16", "fp32") for N in (1024, 4096, 8192, 65536))
_FLOATS = ("eps", "scale", "smoothing", "z_loss", "softcap")
_UNKNOWN = ("M", "R1", "P", "shift", "ignore_index", "first_class")  # integers of which nothing is assumed


def row_case(
    name: str, kernel: triton.JITFunction, config: RowConfig, pointers: dict[str, str], **constexprs: object
) -> KernelCase:
    """Steps along a row are 1; its length, other steps and pointers are multiples of 16.

    `pointers` has the type of each pointer argument, and may have more. The budget lets ptxas spill what it spills by
    itself to fit one more block on a multiprocessor: these kernels wait for memory.
    """
    names = kernel.arg_names
    constexprs |= {"BLOCK_N": config.BLOCK_N}
    constexprs |= {rows: config.rows_per_program for rows in ("BLOCK_M", "BLOCK_P") if rows in names}
    constexprs |= {step: 1 for step in names if step.startswith("stride_") and step.endswith("n")}
    pointers = {name: pointers[name] for name in names if name in pointers.keys() - constexprs}
    scalars = {
        name: "fp32" if name in _FLOATS else "i32" for name in names if name not in constexprs and name not in pointers
    }
    aligned = (*pointers, *(name for name in scalars if name not in _FLOATS + _UNKNOWN))
    # The kernels' loops say themselves how far they read ahead; num_stages is without effect.
    return KernelCase(name, kernel, pointers | scalars, constexprs, config.num_warps, 1, aligned, budget="occupancy")
