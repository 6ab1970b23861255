"""Kernels with known flaws and known instruction counts, to test the detector that looks for them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.inspection import KernelCase

FACTOR = tl.constexpr(3.0)


@triton.jit
def exp2_kernel(y, x, n, BLOCK: tl.constexpr):
    """y (n,) = 2^x, over one block; the loads and stores are predicated."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.exp2(tl.load(x + i, mask=i < n)), mask=i < n)


@triton.jit
def dot_kernel(c, a, b, n_tiles, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """c (M, N) = sum over tiles of a (M, K) @ b (K, N)."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for i in range(n_tiles):
        tile_a = tl.load(a + i * M * K + m[:, None] * K + k[None, :])
        tile_b = tl.load(b + i * K * N + k[:, None] * N + n[None, :])
        acc = tl.dot(tile_a, tile_b, acc, input_precision="ieee")
    tl.store(c + m[:, None] * N + n[None, :], acc)


@triton.jit
def tma_copy_kernel(y, x, M, N: tl.constexpr, BLOCK: tl.constexpr):
    """y (M, N) = x, one tile by the tensor memory accelerator."""
    source = tl.make_tensor_descriptor(x, [M, N], [N, 1], [BLOCK, N])
    target = tl.make_tensor_descriptor(y, [M, N], [N, 1], [BLOCK, N])
    row = tl.program_id(0) * BLOCK
    target.store([row, 0], source.load([row, 0]))


@triton.jit
def scaled(x):
    """FACTOR · x: a function with a constant of its own, shared by the two kernels below."""
    return x * FACTOR


@triton.jit
def scale_kernel(y, x):
    tl.store(y, scaled(tl.load(x)))


@triton.jit
def scale_and_add_kernel(y, x):
    tl.store(y, scaled(tl.load(x)) + 1)


@triton.jit
def broken_kernel(x, BLOCK: tl.constexpr):
    """Does not compile: two shapes that cannot be added."""
    tl.store(x + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32) + tl.zeros((2 * BLOCK,), tl.float32))


def exp2_case(name: str, aligned: bool) -> KernelCase:
    signature = {"y": "*fp32", "x": "*fp32", "n": "i32"}
    return KernelCase(name, exp2_kernel, signature, {"BLOCK": 1024}, 4, 1, tuple(signature) if aligned else ())


def dot_case(name: str, M: int, N: int, K: int, num_stages: int = 2, dtype: str = "bf16", **kwargs) -> KernelCase:
    signature = {"c": "*fp32", "a": f"*{dtype}", "b": f"*{dtype}", "n_tiles": "i32"}
    return KernelCase(name, dot_kernel, signature, {"M": M, "N": N, "K": K}, 4, num_stages, ("c", "a", "b"), **kwargs)


def inspect_cases(arch: str) -> list[KernelCase]:
    cases = [
        exp2_case("exp2/aligned", aligned=True),
        exp2_case("exp2/unaligned", aligned=False),
        dot_case("dot/good", M=64, N=64, K=64),
        dot_case("dot/ieee", M=16, N=16, K=16, dtype="fp32"),
        dot_case("dot/shared", M=64, N=64, K=512, num_stages=4),
        dot_case("dot/small_tile", M=16, N=64, K=64),
        KernelCase("scale/only", scale_kernel, {"y": "*fp32", "x": "*fp32"}, {}, 1, 1),
        KernelCase("scale/add", scale_and_add_kernel, {"y": "*fp32", "x": "*fp32"}, {}, 1, 1),
        KernelCase("broken", broken_kernel, {"x": "*fp32"}, {"BLOCK": 16}, 4, 1),
    ]
    # The accumulator alone outgrows the registers: 256 per thread on NVIDIA, 512 on AMD.
    spilling = {"M": 256, "N": 256, "K": 64} if arch == "gfx942" else {"M": 128, "N": 256, "K": 16}
    cases += [dot_case("dot/spill", **spilling), dot_case("dot/spill_listed", **spilling, budget="listed")]
    if arch in ("sm_90", "sm_100"):
        signature = {"y": "*bf16", "x": "*bf16", "M": "i32"}
        cases.append(KernelCase("tma_copy", tma_copy_kernel, signature, {"N": 64, "BLOCK": 64}, 4, 1, ("y", "x")))
    if arch == "sm_100":
        cases.append(dot_case("dot/tensor_memory", M=128, N=1024, K=16))
    return cases
