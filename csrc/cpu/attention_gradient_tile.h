// A tile of the backward, transposed as in the forward: from q, k, v, do, lse and delta to p and ds, (N, width).
//
//   a = scale · k qᵀ        s = f(a)              p = exp(s - lse - lse_low)
//   dp = dropout(v doᵀ)     ds = p ∘ (dp - delta)   da = ds ∘ f'(a)
#pragma once
#include "attention_tile.h"

namespace fastattn::FASTATTN_ISA {

struct GradientTile {
  float *s, *dp;       // (N, width); then p, dropped where dropout says so, and ds
  float* derivative;   // f'(a), with a softcap
  float* entries;      // room for a tile of a bias
  int32_t* keep;       // -1 where a row sees a key
  float *lse, *lse_low, *delta;  // (M,); lse is inf for what sees nothing
  float* dslope;                 // (M,), sums of ds · distance

  void lay_out(Memory& memory) {
    for (float** tile : {&s, &dp, &derivative, &entries}) memory.take(*tile, BLOCK_N * BLOCK_M);
    memory.take(keep, BLOCK_N * BLOCK_M);
    for (float** row : {&lse, &lse_low, &delta, &dslope}) memory.take(*row, BLOCK_M);
  }

  // lse, lse_low and delta of the tile's rows; lanes without a row get a probability of 0
  void load_rows(const AttentionParams& p, const RowSums& sums, const Tile& t, int b) {
    for (int l = 0; l < BLOCK_M; ++l) {
      const int64_t at = p.lse_index(b, t.head[l]) + t.row[l];
      lse[l] = l < t.n ? sums.lse[at] : __builtin_inff();
      lse_low[l] = l < t.n ? sums.lse_low[at] : 0.f;
      delta[l] = l < t.n ? sums.delta[at] : 0.f;
    }
  }

  // p and ds of keys n_0 … n_0 + n - 1. `q` and `d_o` are packed columns; INNER: ds by the score before its softcap.
  template <class T>
  void compute(const AttentionParams& p, const Sequence& sequence, const Window& window, const Score& score,
               const Tile& t, int b, int n_0, int n, Seen what, Operand k, Operand v, const int32_t* q,
               const int32_t* d_o, bool inner, bool slope);
};

}  // namespace fastattn::FASTATTN_ISA
