// Rotary position embedding of the heads of each token. The equations are in rotary.cpp.
#pragma once
#include "dispatch.h"
#include "rows.h"

namespace fastattn {

// Heads (B, H, S, D) of one tensor: y is x rotated, and may be x.
struct RotaryHeads {
  void *y, *x;
  int64_t H;
  int64_t y_steps[3], x_steps[3];  // along B, H, S; D is contiguous
};

struct Rotary {
  RotaryHeads heads[2];
  int n_heads;  // how many of the two there are
  DType type;
  int64_t B, S, D, half;
  const float *cos, *sin;  // (S_max, half), or (B, S, half) with a batch step
  int64_t table_rows, table_batch;
  const int64_t* positions;  // (B, S), or null
  int64_t position_batch;
  const int32_t* cu_seqlens;  // (sequences + 1,), or null
  int64_t sequences;
  bool interleaved, inverse;
};

FASTATTN_FOR_EACH_ISA(void rotary(const Rotary& p, int threads);)

}  // namespace fastattn
