// Launchers of layer_norm.cu; they choose the configuration and fill in `walk` but for its sizes, and every `wide`.
#pragma once
#include <params_rows.h>
#include <ptx/language.h>

namespace rows {

void norm_forward(NormForward p, cudaStream_t stream);

// Rows P of dweight_parts and dbias_parts.
int norm_backward_parts(int M, int N, Dtype x, Dtype h);

// dweight, dbias (N,), each or none.
void norm_backward(NormBackward p, Dtype x, const Vector& dweight, const Vector& dbias, cudaStream_t stream);

}  // namespace rows
