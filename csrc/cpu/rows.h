// Rows of tensors, as the row kernels take them. What lies along a row is contiguous, unless a kernel says otherwise.
#pragma once
#include <cstdint>

#include "numeric.h"

namespace fastattn {

// Three dimensions of rows: row i is (i0, i1, i2) with i = (i0 · R1 + i1) · R2 + i2.
struct Rows {
  int64_t R0 = 1, R1 = 1, R2 = 0;
};

// A tensor that has these rows, or none of them if its address is null. Steps are in elements.
struct RowTensor {
  void* data = nullptr;
  int64_t steps[3] = {0, 0, 0};
  DType type = DType::float32;
};

// A contiguous vector of any type
struct Vector {
  void* data = nullptr;
  DType type = DType::float32;
};

// An entry (row i, column j) is kept if the first word of the counter (j, i, i >> 32, 0) is at least `threshold`,
// dropout_p · 2^32, and then multiplied by `scale`, 1 / (1 - dropout_p).
struct RowDropout {
  const int64_t* seed = nullptr;  // null: no dropout
  int64_t threshold = 0;
  float scale = 1.f;
};

}  // namespace fastattn
