"""Tiles of the row kernels (LayerNorm, softmax) as data, chosen by pure functions.

A program holds `tiles` fp32 tiles of rows_per_program × BLOCK_N elements in registers. A row of up to BLOCK_N elements
is read once; a longer one is walked through in chunks of BLOCK_N.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastattn.backends.triton.configs import next_power_of_2

# 512 threads share a multiprocessor's 65536 registers at 128 each, of which a quarter is left to addresses and sums.
MIN_THREADS, MAX_THREADS = 128, 512
REGISTERS_FOR_TILES = 96
ELEMENTS = 16  # per thread: two vectors of 8 halves
CONTIGUOUS_ROWS = 64  # elements: 128 bytes of halves


@dataclass(frozen=True, slots=True)
class RowConfig:
    """One program's tile, and its threads; the rest is for programs that stay, to work on one tile after another."""

    BLOCK_N: int  # columns of a tile
    rows_per_program: int  # rows of a tile
    num_warps: int
    programs_per_sm: int = 1  # resident at once
    num_stages: int = 1  # tiles in hand: one that is worked on, and those that are being read


def dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """What `row_dropout_factor` compares a 32-bit word with, and what it returns for one that is kept."""
    return int(dropout_p * 2**32), 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def warp_size(arch: str) -> int:
    """Threads of a warp: 32; on AMD's accelerators 64."""
    return 64 if arch.startswith("gfx9") else 32


def illegal(config: RowConfig, tiles: int, arch: str) -> str | None:
    """Why a kernel with `tiles` live tiles cannot run well under this config; None when it can."""
    for name in ("BLOCK_N", "rows_per_program", "num_warps"):
        value = getattr(config, name)
        if value < 1 or value & (value - 1):
            return f"{name} is {value}, not a power of two"
    threads = config.num_warps * warp_size(arch)
    if threads > MAX_THREADS:
        return f"{threads} threads are more than {MAX_THREADS}"
    registers = tiles * config.BLOCK_N * config.rows_per_program // threads
    if registers > REGISTERS_FOR_TILES:
        return f"the tiles take {registers} registers per thread, more than {REGISTERS_FOR_TILES}"
    return None


@functools.lru_cache(maxsize=4096)
def row_config(N: int, tiles: int, arch: str, rows: int = 1 << 30, contiguous_rows: bool = False) -> RowConfig:
    """For `rows` rows of N elements. `contiguous_rows`: an element's neighbour in memory is in the next row.

    Several short rows make a tile of half of what the fewest threads could hold; a long one takes ELEMENTS per thread,
    or what a thread can hold once there are no more threads.
    """
    most = _floor_power_of_2(REGISTERS_FOR_TILES // tiles)
    BLOCK_N = next_power_of_2(N)
    group = max(MIN_THREADS * (most // 2) // BLOCK_N, CONTIGUOUS_ROWS if contiguous_rows else 1)
    group = min(group, next_power_of_2(rows))
    if BLOCK_N * group > MAX_THREADS * most:
        BLOCK_N = MAX_THREADS * min(ELEMENTS, most) // group
    return _with_threads(BLOCK_N, group, arch)


@functools.lru_cache(maxsize=4096)
def column_config(N: int, arch: str) -> RowConfig:
    """For sums down N columns, many rows deep: 256 bytes of each row, where these are halves."""
    return _columns(128, N, arch)


@functools.lru_cache(maxsize=4096)
def reduce_config(N: int, arch: str) -> RowConfig:
    """For sums down N columns of a few hundred fp32 rows: narrow, so that many programs share a small matrix."""
    return _columns(32, N, arch)


def _columns(width: int, N: int, arch: str) -> RowConfig:
    tile = MIN_THREADS * ELEMENTS
    if arch == "interpret":
        width = tile  # a program costs the interpreter the same, wide or narrow
    BLOCK_N = min(width, next_power_of_2(N))
    return _with_threads(BLOCK_N, tile // BLOCK_N, arch)


def _with_threads(BLOCK_N: int, rows: int, arch: str) -> RowConfig:
    tile = BLOCK_N * rows
    threads = min(max(tile // ELEMENTS, MIN_THREADS), MAX_THREADS)
    ahead = min(max(ELEMENTS * threads // tile, 1), 2)  # tiles that make ELEMENTS per thread on their way
    return RowConfig(BLOCK_N, rows, threads // warp_size(arch), MAX_THREADS // threads, 1 + ahead)


def _floor_power_of_2(x: int) -> int:
    return 1 << (x.bit_length() - 1)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; the interpreter runs one, and is given 2 so that they have to be added up."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
