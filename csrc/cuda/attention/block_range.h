// Which key blocks a tile of queries visits, and which of them need a mask.
#pragma once
#include <attention/seqlen.h>

namespace attention {

// Row i sees keys [i + shift - left, i + shift + right], so far as they exist.
struct Window {
  int left, right, shift;
};

__device__ __forceinline__ Window window_of(const Tile& tile, const ForwardArguments& p) {
  return {p.window_left, p.window_right, p.bottom_right ? tile.S_k - tile.S_q : 0};
}

// Blocks [min, left) and [right, max) are visible in part, [left, right) as a whole; all others are never loaded.
struct KeyBlocks {
  int min, left, right, max;
};

template <int BLOCK_M, int BLOCK_N>
__device__ __forceinline__ KeyBlocks key_blocks(const Tile& tile, int log2_P, const Window& w) {
  const auto at_least_0 = [](int x) { return x > 0 ? x : 0; };
  const auto smaller = [](int x, int y) { return x < y ? x : y; };
  const auto larger = [](int x, int y) { return x > y ? x : y; };
  const auto blocks = [](int keys) { return (keys + BLOCK_N - 1) / BLOCK_N; };

  const int first = tile.m_start >> log2_P;  // queries first … last of the tile
  const int last = smaller((tile.m_start + BLOCK_M - 1) >> log2_P, tile.S_q - 1);
  KeyBlocks n;
  n.max = blocks(smaller(tile.S_k, at_least_0(last + w.shift + w.right + 1)));
  n.min = smaller(at_least_0(first + w.shift - w.left) / BLOCK_N, n.max);
  n.left = smaller(larger(blocks(at_least_0(last + w.shift - w.left)), n.min), n.max);
  n.right = smaller(tile.S_k, at_least_0(first + w.shift + w.right + 1)) / BLOCK_N;
  n.right = smaller(larger(n.right, n.left), n.max);
  return n;
}

}  // namespace attention
