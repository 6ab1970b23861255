// LayerNorm and RMSNorm over rows of N elements, behind a residual sum with dropout. The equations are in norm.cpp.
#pragma once
#include "dispatch.h"
#include "rows.h"

namespace fastattn {

struct NormForward {
  Rows rows;
  int64_t N;
  RowTensor x, residual;  // (M, N)
  RowTensor y, h;         // (M, N), h where there is a residual, of its type
  float* stats;           // (2, M): mean and rstd; of RMSNorm (1, M), rstd
  Vector weight, bias;    // (N,) or null
  float eps, weight_offset;
  bool rms;
  RowDropout dropout;
};

struct NormBackward {
  Rows rows;
  int64_t N;
  RowTensor dx, dresidual;  // (M, N), each where it is wanted
  RowTensor dy, dh;         // (M, N); dh, that of h beside what comes through y, or null
  RowTensor base;           // (M, N): x or h; y if from_y
  Vector dweight, dbias;    // (N,), each where it is wanted
  const float* stats;
  Vector weight, bias;
  float weight_offset;
  bool rms, from_y;
  RowDropout dropout;
};

FASTATTN_FOR_EACH_ISA(void norm_forward(const NormForward& p, int threads);
                      void norm_backward(const NormBackward& p, int threads);)

}  // namespace fastattn
