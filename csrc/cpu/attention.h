// Attention on the CPU: what the bindings hand to the kernels. Strides count elements.
#pragma once
#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "numeric.h"

namespace fastattn {

// A tensor (B, H, S, D); packed sequences are (1, H, T, D).
struct Matrix {
  char* data = nullptr;
  int64_t b = 0, h = 0, row = 0, col = 0;
};

// A tensor that broadcasts to (B, H, S_q, S_k), by strides of 0.
struct Entries {
  const char* data = nullptr;  // nullptr: absent
  DType dtype = DType::float32;
  int64_t b = 0, h = 0, m = 0, n = 0;
};

struct Sequence {
  int64_t first_q = 0, first_k = 0;  // rows in q and k at which it begins; 0 unless packed
  int S_q = 0, S_k = 0;
};

constexpr int BLOCK_M = 64;   // query rows of a tile: the lanes
constexpr int BLOCK_N = 64;  // keys of a block
constexpr int FEW_ROWS = 8;   // so few queries, as when a token is decoded, would leave most lanes without work

struct AttentionParams {
  DType dtype = DType::float32;  // of q, k, v, o and their gradients
  int B = 0, H = 0, H_kv = 0, D = 0, D_v = 0;
  bool packed = false;
  int64_t rows_q = 0;  // S_q, or T_q of packed sequences
  int64_t rows_k = 0;
  std::vector<Sequence> sequences;  // B of them
  Matrix q, k, v, o;
  float* lse = nullptr;      // (B, H, S_q) or (1, H, T_q), contiguous
  float* lse_low = nullptr;  // the same: what float32 rounds off lse
  float scale = 1.f;
  float softcap = 0.f;           // 0: none
  int64_t left = -1, right = -1;  // -1: unbounded
  bool top_left = false;
  Entries bias, mask;            // mask: bool
  std::vector<float> slopes;     // (B, H), or empty
  std::vector<float> sinks;      // (H,), or empty
  bool dropout = false;
  uint64_t seed = 0;
  int64_t dropout_threshold = 0;  // a probability is kept if a 32-bit word is at least this
  float dropout_scale = 1.f;
  bool as_many = false;  // rows are treated as if there were many

  FASTATTN_INLINE int G() const { return H / H_kv; }
  // Whether the queries of a key head are so few that keys are what lies in lanes
  FASTATTN_INLINE bool few(const Sequence& s) const { return !as_many && G() * s.S_q <= FEW_ROWS; }
  FASTATTN_INLINE int64_t lse_index(int b, int h) const {  // of row 0 of a sequence
    return packed ? h * rows_q + sequences[b].first_q : (int64_t(b) * H + h) * rows_q;
  }
};

// The gradients that are wanted; data of the others is nullptr.
struct AttentionGradients {
  Matrix dq, dk, dv, d_o;
  const float* dlse = nullptr;  // gradient of lse; nullptr: 0
  int64_t dlse_b = 0, dlse_h = 0, dlse_m = 0;
  float* dbias = nullptr;  // contiguous, of sizes dbias_sizes, each 1 where the bias broadcasts
  bool dbias_is_ds = false;  // it does not broadcast, nor is there a softcap: an entry is one ds, written where that is found
  int64_t dbias_sizes[4] = {1, 1, 1, 1};
  float* dslopes = nullptr;  // (B, H)
  float* dsinks = nullptr;   // (H,)
};

// Query tiles first_tile … first_tile + n_tiles - 1 of the heads that read key head h_kv, against keys n_lo … n_hi - 1.
struct ForwardTask {
  int b, h_kv, first_tile, n_tiles, n_lo, n_hi;
  int part;  // where the unnormalised result goes, counted in tiles; -1: to o and lse
};

// Sums of one query tile over `n_parts` ranges of keys, brought together.
struct CombineTask {
  int b, h_kv, tile, first_part, n_parts;
};

struct ForwardPlan {
  std::vector<ForwardTask> tasks;
  std::vector<CombineTask> combine;
  int most_tiles = 1;  // of a task
  int parts = 0;
};

// Tiles of the G · S_q rows of one key head. Heads of many rows have tiles of their own; those of few share them.
struct RowLayout {
  int G, S_q;
  FASTATTN_INLINE bool shared() const { return S_q < BLOCK_M; }
  FASTATTN_INLINE int tiles_of_head() const { return (S_q + BLOCK_M - 1) / BLOCK_M; }
  FASTATTN_INLINE int tiles() const { return shared() ? (G * S_q + BLOCK_M - 1) / BLOCK_M : G * tiles_of_head(); }
};

// Keys n_lo … n_hi - 1 and query tiles t_lo … t_hi - 1 of one key head. Of the queries of a head, each group of keys has
// sums of its own, and of the keys each group of tiles; they are added up in order afterwards.
struct BackwardTask {
  int b, h_kv, n_lo, n_hi, t_lo, t_hi, key_group, tile_group;
};

struct BackwardPlan {
  std::vector<BackwardTask> tasks;
  std::vector<int64_t> first_tile;  // (B · H_kv + 1,): where the tiles of a key head begin, among all
  std::vector<int> key_groups, tile_groups;  // (B,)
  int most_key_groups = 0, most_tile_groups = 0;
};

// What the backward keeps of each row and tile
struct RowSums {
  float* lse;     // as p.lse; inf for a row that saw nothing, so that its probabilities are 0
  float* lse_low;  // as p.lse_low
  float* delta;   // the same: rowsum(o ∘ do) - dlse
  float* dq;      // (key_groups, tiles, D, M), without the scale
  float* dslope;  // (key_groups, tiles, M), -dslope by row; nullptr: not wanted
  float* dk;      // (tile_groups, B, H_kv, S_k, D), without the scale; nullptr: one group, dk itself is written
  float* dv;      // (tile_groups, B, H_kv, S_k, D_v)
};

ForwardPlan plan_forward(const AttentionParams& p, int threads);
BackwardPlan plan_backward(const AttentionParams& p);

void attention_forward(const AttentionParams& p, int threads);
void attention_backward(const AttentionParams& p, const AttentionGradients& g, int threads);

FASTATTN_FOR_EACH_ISA(void run_forward(const AttentionParams& p, const ForwardPlan& plan, int threads);)
FASTATTN_FOR_EACH_ISA(void run_backward(const AttentionParams& p, const AttentionGradients& g, const BackwardPlan& plan,
                                        const RowSums& sums, int threads);)
FASTATTN_FOR_EACH_ISA(void run_bias_gradient(const AttentionParams& p, const AttentionGradients& g, const RowSums& sums,
                                             int threads);)

}  // namespace fastattn
