// Cross entropy of rows of V logits, forward with its gradient, and backward. The equations are in cross_entropy.cpp.
#pragma once
#include "dispatch.h"
#include "rows.h"

namespace fastattn {

struct CrossEntropy {
  Rows rows;
  int64_t V;
  RowTensor x, dx;        // (M, V); dx, which may be x, or null
  RowTensor q;            // (M, V) probabilities, or null
  const int64_t* target;  // (M,) classes, or null
  const float* weight;    // (V,) or null
  int64_t ignore_index;
  float smoothing, z_loss;
  float softcap;          // 0: none
  const float* divisor;   // (1,), by which gradients are divided, or null
  Vector factor;          // of each row's gradient: (M,), or (1,) for all; or null
  int64_t factor_step;
};

// What the forward makes beside dx
struct CrossEntropyLoss {
  Vector loss;               // (M,), or (1,) if it is reduced
  bool reduced, mean;
  float* row_max;            // (M,) or null
  float* row_sum;
  float* divisor;            // (1,) or null: Σ w_t over the rows that count, if it is the mean; M for probabilities
};

FASTATTN_FOR_EACH_ISA(void cross_entropy_forward(CrossEntropy p, const CrossEntropyLoss& out, int threads);
                      void cross_entropy_backward(const CrossEntropy& p, const float* row_max, const float* row_sum,
                                                  int threads);)

}  // namespace fastattn
