// Which entries of a 64-row tile a thread of a warpgroup holds: accumulator i of lane l in warp w is
//   row    16·w + l / 4 + 8·row_half(i)
//   column 8·(i / 4) + 2·(l % 4) + i % 2
// so that a thread has two rows, and the four lanes of a quad share them.
#pragma once
#include <ptx/language.h>

namespace attention {

constexpr int ROWS = 64;         // of one warpgroup's tile
constexpr int ROWS_PER_WARP = 16;

__host__ __device__ constexpr int row_half(int i) { return (i >> 1) & 1; }

// This thread's first row and first column within the tile.
__device__ __forceinline__ int first_row(int thread) { return thread / 32 * ROWS_PER_WARP + thread % 32 / 4; }
__device__ __forceinline__ int first_column(int thread) { return 2 * (thread % 4); }

}  // namespace attention
