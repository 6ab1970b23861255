"""Rounding to the type of an output."""

import triton
import triton.language as tl

from fastattn.backends import triton as backend

INTERPRET = tl.constexpr(backend.INTERPRET)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x, fp32, rounded to the nearest value of dtype, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        # The interpreter truncates. Adding 0x7FFF, and 1 if the result is odd, makes dropping the low 16 bits round.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)
