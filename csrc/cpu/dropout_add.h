// y = residual + dropout(x), of rows of N elements; also y = factor · x.
#pragma once
#include "dispatch.h"
#include "rows.h"

namespace fastattn {

struct DropoutAdd {
  Rows rows;
  int64_t N;
  RowTensor y, residual, x;  // y has residual's type, and may be it; residual may be null
  RowDropout dropout;
};

struct Scale {
  Rows rows;
  int64_t N;
  RowTensor out, x;   // of one type; out may be x, which a factor of 1 leaves alone
  Vector factor;      // of each row: (M,), or (1,) for all
  int64_t factor_step;
};

FASTATTN_FOR_EACH_ISA(void dropout_add(const DropoutAdd& p, int threads);
                      void scale_rows(const Scale& p, int threads);)

}  // namespace fastattn
