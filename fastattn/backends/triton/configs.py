"""Tile sizes of the attention kernels: data by (architecture, head dimension, dtype), and what admits them.

The tables hold for head dimensions up to the key; `fit` takes from them what a wider element or a smaller card needs
away. Nothing is tuned at call time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from fastattn.backends.triton import INTERPRET, MAX_HEAD_DIM
from fastattn.errors import UnsupportedError

# Shared memory one block may use, bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
# (opt-in maximum); CDNA 3 ISA guide for gfx942.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "interpret": 1 << 40,
}


_SMALLEST = 16  # rows or columns of a matrix instruction


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Columns:
    """How a row of n entries lies in a tile: one or two blocks of columns, powers of two that matrix instructions take.

    192 = 128 + 64 and 576 = 512 + 64 in two blocks need no padding; one block of 256 or 1024 would be mostly that.
    """

    n: int
    first: int
    second: int = 0  # 0: one block

    @classmethod
    @cache
    def of(cls, n: int, element_size: int = 2) -> Columns:
        smallest = 32 if element_size == 1 else _SMALLEST  # what a matrix instruction takes at once
        whole = max(smallest, next_power_of_2(n))
        if n == whole or whole == smallest:
            return cls(n, whole)
        rest = max(smallest, next_power_of_2(n - whole // 2))
        return cls(n, whole // 2, rest) if rest < whole // 2 else cls(n, whole)

    @property
    def width(self) -> int:
        return self.first + self.second


@dataclass(frozen=True)
class TileConfig:
    """One kernel's tile: BLOCK_M queries by BLOCK_N keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.BLOCK_M}x{self.BLOCK_N}, {self.num_warps} warps, {self.num_stages} stages"


@dataclass(frozen=True)
class BackwardConfig:
    """The tiles of the backward passes; the third runs where a bias has a gradient."""

    dq: TileConfig
    dkdv: TileConfig
    dbias: TileConfig

    def __str__(self) -> str:
        return f"dq {self.dq}; dk, dv {self.dkdv}"


# kernel -> {largest padded head dimension: tile}, for 16-bit inputs
_TILES: dict[str, dict[str, dict[int, TileConfig]]] = {
    "sm_80": {
        "forward": {
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 32, 8, 3),
            256: TileConfig(64, 32, 4, 2),
            MAX_HEAD_DIM: TileConfig(32, 32, 8, 1),
        },
        "dq": {
            64: TileConfig(128, 32, 8, 3),
            96: TileConfig(128, 32, 8, 2),
            128: TileConfig(64, 64, 8, 2),
            256: TileConfig(32, 32, 4, 2),
            MAX_HEAD_DIM: TileConfig(16, 32, 8, 1),
        },
        "dkdv": {
            64: TileConfig(32, 64, 8, 2),
            96: TileConfig(32, 64, 8, 2),
            128: TileConfig(64, 64, 8, 2),
            256: TileConfig(32, 32, 4, 2),
            MAX_HEAD_DIM: TileConfig(16, 16, 8, 1),
        },
        "jvp": {
            64: TileConfig(128, 16, 8, 3),
            96: TileConfig(128, 16, 8, 2),
            128: TileConfig(32, 32, 8, 2),
            256: TileConfig(32, 32, 4, 2),
            MAX_HEAD_DIM: TileConfig(16, 32, 8, 1),
        },
        "dbias": {MAX_HEAD_DIM: TileConfig(32, 32, 4, 1)},
    },
    "sm_90": {
        "forward": {
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 64, 8, 3),
            192: TileConfig(128, 64, 8, 2),
            256: TileConfig(128, 32, 8, 2),
            MAX_HEAD_DIM: TileConfig(64, 32, 8, 1),
        },
        "dq": {
            64: TileConfig(128, 64, 8, 3),
            128: TileConfig(128, 32, 8, 2),
            256: TileConfig(64, 32, 8, 2),
            MAX_HEAD_DIM: TileConfig(32, 32, 8, 1),
        },
        "dkdv": {
            64: TileConfig(32, 128, 8, 3),
            128: TileConfig(32, 64, 8, 2),
            256: TileConfig(32, 64, 8, 2),
            MAX_HEAD_DIM: TileConfig(32, 32, 8, 1),
        },
        "jvp": {
            64: TileConfig(128, 32, 8, 3),
            128: TileConfig(128, 32, 8, 2),
            256: TileConfig(64, 32, 8, 2),
            MAX_HEAD_DIM: TileConfig(32, 32, 8, 1),
        },
        "dbias": {128: TileConfig(64, 64, 8, 1), MAX_HEAD_DIM: TileConfig(32, 32, 4, 1)},
    },
    "sm_100": {
        "forward": {
            64: TileConfig(128, 32, 8, 2),
            128: TileConfig(128, 64, 8, 3),
            256: TileConfig(128, 64, 8, 2),
            MAX_HEAD_DIM: TileConfig(64, 32, 8, 1),
        },
        "dq": {
            64: TileConfig(128, 64, 8, 2),
            128: TileConfig(128, 32, 8, 2),
            256: TileConfig(64, 32, 8, 2),
            MAX_HEAD_DIM: TileConfig(32, 32, 8, 1),
        },
        "dkdv": {
            64: TileConfig(32, 128, 8, 3),
            128: TileConfig(32, 64, 4, 2),
            256: TileConfig(32, 64, 8, 2),
            MAX_HEAD_DIM: TileConfig(32, 32, 8, 1),
        },
        "jvp": {
            64: TileConfig(128, 32, 8, 2),
            128: TileConfig(64, 32, 8, 2),
            256: TileConfig(64, 32, 8, 2),
            MAX_HEAD_DIM: TileConfig(32, 32, 8, 1),
        },
        "dbias": {128: TileConfig(64, 32, 4, 1), MAX_HEAD_DIM: TileConfig(32, 32, 4, 1)},
    },
    "gfx942": {
        "forward": {
            64: TileConfig(128, 64, 4, 1),
            128: TileConfig(128, 64, 4, 1),
            256: TileConfig(64, 32, 4, 1),
            MAX_HEAD_DIM: TileConfig(32, 16, 8, 1),
        },
        "dq": {
            64: TileConfig(64, 64, 4, 1),
            128: TileConfig(64, 32, 4, 1),
            256: TileConfig(32, 32, 4, 1),
            MAX_HEAD_DIM: TileConfig(16, 16, 8, 1),
        },
        "dkdv": {
            64: TileConfig(64, 64, 4, 1),
            128: TileConfig(32, 64, 4, 1),
            256: TileConfig(32, 32, 4, 1),
            MAX_HEAD_DIM: TileConfig(16, 16, 8, 1),
        },
        "jvp": {
            64: TileConfig(64, 32, 4, 1),
            128: TileConfig(64, 16, 4, 1),
            256: TileConfig(32, 16, 4, 1),
            MAX_HEAD_DIM: TileConfig(16, 16, 8, 1),
        },
        "dbias": {MAX_HEAD_DIM: TileConfig(32, 32, 4, 1)},
    },
    "interpret": {  # small, and not square, so that small tests have many tiles of every kind
        "forward": {MAX_HEAD_DIM: TileConfig(32, 16, 4, 1)},
        "dq": {MAX_HEAD_DIM: TileConfig(32, 16, 4, 1)},
        "dkdv": {MAX_HEAD_DIM: TileConfig(16, 32, 4, 1)},
        "dbias": {MAX_HEAD_DIM: TileConfig(32, 16, 4, 1)},
        "jvp": {MAX_HEAD_DIM: TileConfig(32, 16, 4, 1)},
    },
}
_LIKE = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_80"}


@cache
def arch_of(device: torch.device) -> str:
    """The key of the tables for a device; a card without a row of its own takes that of its nearest older kin."""
    if INTERPRET or device.type != "cuda":
        return "interpret"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    exact = f"sm_{major}{minor}"
    return exact if exact in SHARED_MEMORY else {8: "sm_86", 9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def shared_memory(kernel: str, cfg: TileConfig, D: int, D_v: int, element_size: int) -> int:
    """Upper bound in bytes: what stays, and num_stages buffers of what streams through, plus one tile of p or ds."""
    m, n = cfg.BLOCK_M * element_size, cfg.BLOCK_N * element_size
    resident, streamed = (n, m) if kernel == "dkdv" else (m, n)
    width = Columns.of(D, element_size).width + Columns.of(D_v, element_size).width
    kept = resident * (Columns.of(D, element_size).width if kernel == "forward" else width)
    if kernel == "jvp":  # q and its tangent; k, v and, where tiles are loaded ahead, room for theirs too
        kept = resident * 2 * Columns.of(D, element_size).width
        streamed *= min(cfg.num_stages, 2)
    return kept + cfg.num_stages * streamed * width + cfg.BLOCK_M * n


def illegal(kernel: str, cfg: TileConfig, arch: str, D: int, D_v: int, element_size: int) -> str | None:
    """Why a tile cannot run; None when it can."""
    needed = shared_memory(kernel, cfg, D, D_v, element_size)
    if needed > SHARED_MEMORY[arch]:
        return f"it needs up to {needed} bytes of shared memory and {arch} has {SHARED_MEMORY[arch]}"
    for name in ("BLOCK_M", "BLOCK_N", "num_warps"):
        value = getattr(cfg, name)
        if value != next_power_of_2(value):
            return f"{name} = {value} is not a power of two"
    if min(cfg.BLOCK_M, cfg.BLOCK_N) < _SMALLEST:
        return f"a tile of {cfg.BLOCK_M}x{cfg.BLOCK_N} is smaller than a matrix instruction"
    return None


def fit(kernel: str, cfg: TileConfig, arch: str, D: int, D_v: int, element_size: int) -> TileConfig:
    """The tile, with stages and then rows of its longer side taken away until it is legal."""
    while why := illegal(kernel, cfg, arch, D, D_v, element_size):
        if cfg.num_stages > 1:
            cfg = replace(cfg, num_stages=cfg.num_stages - 1)
        elif cfg.BLOCK_M == cfg.BLOCK_N == _SMALLEST:
            raise UnsupportedError(f"the {kernel} kernel has no tile small enough for D = {D}, D_v = {D_v}: {why}")
        elif cfg.BLOCK_M > cfg.BLOCK_N:
            cfg = replace(cfg, BLOCK_M=cfg.BLOCK_M // 2)
        else:
            cfg = replace(cfg, BLOCK_N=cfg.BLOCK_N // 2)
    return cfg


def row_of(arch: str) -> str:
    """The row of the table that an architecture takes."""
    return _LIKE.get(arch, arch)


def table(arch: str, kernel: str) -> dict[int, TileConfig]:
    """{largest padded head dimension: tile}"""
    return _TILES[row_of(arch)][kernel]


def _tile(kernel: str, arch: str, D: int, D_v: int, dtype: torch.dtype) -> TileConfig:
    width = max(Columns.of(n, dtype.itemsize).width for n in (D, D_v))
    tiles = table(arch, kernel)
    cfg = tiles[min(key for key in tiles if key >= width)]
    if dtype == torch.float32 and arch != "interpret":  # twice the registers for each operand
        cfg = replace(cfg, BLOCK_M=max(_SMALLEST, cfg.BLOCK_M // 2), BLOCK_N=max(_SMALLEST, cfg.BLOCK_N // 2))
    return fit(kernel, cfg, arch, D, D_v, dtype.itemsize)


@cache
def forward_config(arch: str, D: int, D_v: int, dtype: torch.dtype) -> TileConfig:
    return _tile("forward", arch, D, D_v, dtype)


@cache
def backward_config(arch: str, D: int, D_v: int, dtype: torch.dtype) -> BackwardConfig:
    return BackwardConfig(*(_tile(kernel, arch, D, D_v, dtype) for kernel in ("dq", "dkdv", "dbias")))


@cache
def jvp_config(arch: str, D: int, D_v: int, dtype: torch.dtype) -> TileConfig:
    return _tile("jvp", arch, D, D_v, dtype)


def forget() -> None:
    """What was chosen from the table, after a change to it."""
    for chosen in (forward_config, backward_config, jvp_config, widest_head):
        chosen.cache_clear()


@cache
def widest_head(arch: str, dtype: torch.dtype) -> int:
    """The largest head dimension, up to MAX_HEAD_DIM, for which every kernel has a legal tile."""
    widest = 0
    for D in (64, 128, 192, 256, 320, 384, 512, MAX_HEAD_DIM):
        try:
            forward_config(arch, D, D, dtype)
            backward_config(arch, D, D, dtype)
            jvp_config(arch, D, D, dtype)
        except UnsupportedError:
            break
        widest = D
    return widest


def dot_precision(dtype: torch.dtype) -> str:
    """What `blocks.tile.dot` is compiled with: IEEE products in float32 unless torch has been told otherwise."""
    if INTERPRET:
        return "interpret"
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" and torch.version.hip is None
    return "tf32" if tf32 else "ieee"
