// The rows of one warpgroup's tile: which query and head each is, and where its results go.
#pragma once
#include <attention/mask.h>

namespace attention {

struct QueryRows {
  Tile tile;
  int start;  // packed row of the first of 64

  __device__ __forceinline__ QueryRows(const Tile& tile, int w) : tile(tile), start(tile.m_start + ROWS * w) {}

  __device__ __forceinline__ int query(int row, const ForwardArguments& p) const { return (start + row) >> p.log2_P; }
  __device__ __forceinline__ int head(int row, const ForwardArguments& p) const {
    return (tile.head << p.log2_P) + ((start + row) & ((1 << p.log2_P) - 1));
  }
  __device__ __forceinline__ bool exists(int row, const ForwardArguments& p) const { return query(row, p) < tile.S_q; }
  // Whether the last of the 64 rows belong to another sequence.
  __device__ __forceinline__ bool others_follow(const ForwardArguments& p) const {
    return p.cu_seqlens_q != nullptr && !exists(ROWS - 1, p);
  }
  __device__ __forceinline__ VisibleKeys keys(int row, const ForwardArguments& p) const {
    return visible_keys(query(row, p), tile.S_k, window_of(tile, p));
  }
  // Elements of q or o, of k or v, and of lse.
  __device__ __forceinline__ int64_t at(int row, int64_t b, int64_t h, int64_t m, const ForwardArguments& p) const {
    return tile.batch * b + head(row, p) * h + (static_cast<int64_t>(tile.q_start) + query(row, p)) * m;
  }
  __device__ __forceinline__ int64_t first_key(int64_t b, int64_t h, int64_t n, const ForwardArguments& p) const {
    return tile.batch * b + tile.head / p.group * h + static_cast<int64_t>(tile.k_start) * n;
  }
  __device__ __forceinline__ int64_t lse_at(int row, const ForwardArguments& p) const {
    return (static_cast<int64_t>(tile.batch) * p.H + head(row, p)) * p.S_q + tile.q_start + query(row, p);
  }
};

// s = -inf where a row of warpgroup w does not see the key; `n_start` is the first key of the block.
template <int N>
__device__ __forceinline__ void apply_mask(float (&s)[N], int n_start, const Tile& tile, int w, int thread,
                                           const ForwardArguments& p) {
  const QueryRows rows(tile, w);
  const int row = first_row(thread);
  const VisibleKeys keys[2] = {rows.keys(row, p), rows.keys(row + 8, p)};
  apply_mask(s, n_start, keys, thread);
}

}  // namespace attention
