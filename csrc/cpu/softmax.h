// Softmax and log_softmax of lines of N elements, with scale, bool mask and causality. Equations: softmax.cpp.
#pragma once
#include "dispatch.h"
#include "rows.h"

namespace fastattn {

// Lines along which elements are `along` apart; 1 for softmax_rows. In softmax_columns R2 is contiguous.
struct Softmax {
  Rows rows;
  int64_t N;
  RowTensor y, x;         // y = softmax(scale · x)
  RowTensor dx, dy;       // of the backward, which reads y; all of one type
  RowTensor mask;         // bool, or null
  int64_t along_y, along_x, along_dx, along_dy, along_mask;
  float scale;
  bool log, causal;
  int64_t shift;  // causal: row i2 sees columns up to i2 + shift
};

FASTATTN_FOR_EACH_ISA(void softmax_rows(const Softmax& p, int threads);
                      void softmax_rows_backward(const Softmax& p, int threads);
                      void softmax_columns(const Softmax& p, int threads);
                      void softmax_columns_backward(const Softmax& p, int threads);)

}  // namespace fastattn
