// Gated activations of rows of N elements, forward and backward. The equations are in gated.cpp.
#pragma once
#include "dispatch.h"
#include "rows.h"

namespace fastattn {

enum class Activation : int { silu = 0, gelu = 1, gelu_tanh = 2 };

struct Gated {
  Rows rows;
  int64_t N;
  RowTensor y, gate, up;      // all tensors are of one type
  RowTensor dgate, dup, dy;   // dgate and dup each where it is wanted
  Activation activation;
};

FASTATTN_FOR_EACH_ISA(void gated_forward(const Gated& p, int threads);
                      void gated_backward(const Gated& p, int threads);)

}  // namespace fastattn
