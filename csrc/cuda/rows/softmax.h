// Launchers of softmax.cu; they choose the configuration and fill in `walk` but for its sizes, and every `wide`.
#pragma once
#include <params_rows.h>
#include <ptx/language.h>

namespace rows {

void softmax_forward(Softmax p, cudaStream_t stream);   // out = y, from x
void softmax_backward(Softmax p, cudaStream_t stream);  // out = dx, from x = dy, and y

}  // namespace rows
