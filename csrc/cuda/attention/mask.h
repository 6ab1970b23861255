// Which entries of a score tile are visible.
#pragma once
#include <attention/block_range.h>
#include <attention/fragment.h>

#include <cmath>

namespace attention {

// Keys [begin, end) that one row sees.
struct VisibleKeys {
  int begin, end;
};

__device__ __forceinline__ VisibleKeys visible_keys(int row, int S_k, const Window& w) {
  const int begin = row + w.shift - w.left, end = row + w.shift + w.right + 1;
  return {begin > 0 ? begin : 0, end < S_k ? end : S_k};
}

// A thread's columns within 128 are 8·(u / 2) + 2·(lane % 4) + u % 2, u = 0 … 31. Bit u: whether the u-th is below
// `limit`, counted from column 2·(lane % 4).
__device__ __forceinline__ uint32_t columns_below(int limit) {
  const int rest = limit & 7;
  const int n = 2 * (limit >> 3) + (rest < 2 ? rest : 2);
  return n <= 0 ? 0u : n >= 32 ? ~0u : (1u << n) - 1;
}

// s = -inf where row_half(i) does not see the key; `n_start` is the first key of the tile.
template <int N>
__device__ __forceinline__ void apply_mask(float (&s)[N], int n_start, const VisibleKeys (&rows)[2], int thread) {
  constexpr int WORDS = (N / 2 + 31) / 32;
  const int origin = n_start + first_column(thread);
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
      const int start = origin + 128 * word;
      const uint32_t visible = columns_below(rows[half].end - start) & ~columns_below(rows[half].begin - start);
#pragma unroll
      for (int u = 32 * word; u < 32 * (word + 1) && u < N / 2; u++) {
        const int i = 4 * (u / 2) + 2 * half + u % 2;
        if (!(visible >> (u % 32) & 1)) s[i] = -INFINITY;
      }
    }
  }
}

}  // namespace attention
