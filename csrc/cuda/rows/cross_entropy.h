// Launchers of cross_entropy.cu; they choose the configuration and fill in `walk` but for its sizes, and every `wide`.
#pragma once
#include <params_rows.h>
#include <ptx/language.h>

namespace rows {

void cross_entropy_forward(CrossEntropy p, cudaStream_t stream);
void cross_entropy_backward(CrossEntropy p, cudaStream_t stream);
void scale_rows(ScaleRows p, cudaStream_t stream);

// Floats of `partial` that the two functions below need for P values.
int sum_partials(int64_t P);

// out[0] = Σ values (P,) / *divisor, if there is one; in one order.
void sum_values(SumValues p, float* partial, cudaStream_t stream);

// out[0] = Σ w_t over those of P classes that count.
void count_classes(CountClasses p, float* partial, cudaStream_t stream);

}  // namespace rows
