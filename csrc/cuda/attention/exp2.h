// 2^x on the FMA pipe, for the elements that the special function unit (16 per clock and SM) has no time for.
//
//   x = n + f, n = round(x), |f| <= 1/2;   2^x = 2^n · c(f)
//
// c is the minimax polynomial of the relative error: 2^-13.7 for degree 3, 2^-18.5 for 4, 2^-22.1 for 5 (where fp32
// rounds), all below the rounding of p to bf16 (2^-9) and to fp16 (2^-12).
#pragma once
#include <ptx/language.h>
#include <ptx/numeric.h>

namespace attention {

// Coefficient of f^(DEGREE - i).
template <int DEGREE>
__host__ __device__ constexpr float exp2_coefficient(int i) {
  static_assert(3 <= DEGREE && DEGREE <= 5, "degrees 3, 4 and 5 have coefficients");
  constexpr float C3[] = {0.0551716685f, 0.242611125f, 0.693260968f, 0.999928057f};
  constexpr float C4[] = {0.00957010221f, 0.0559178591f, 0.240247443f, 0.693121791f, 0.999999285f};
  constexpr float C5[] = {0.00132764725f, 0.00967554096f, 0.0555071309f, 0.240221202f, 0.693146944f, 1.00000012f};
  return DEGREE == 3 ? C3[i] : DEGREE == 4 ? C4[i] : C5[i];
}

template <int DEGREE>
__device__ __forceinline__ float exp2_polynomial(float x) {
  // x + MAGIC rounds x to an integer, whose value + 127 is then in the low bits: shifted to the exponent it is 2^n, and
  // 0 for n = -127. A NaN stays one, which is why the last step is a product and not an addition to the exponent.
  constexpr float MAGIC = 12582912.0f + 127.0f;  // 1.5 · 2^23
  x = ptx::max_nan(x, -127.0f);
  const float shifted = x + MAGIC;
  const float f = x - (shifted - MAGIC);
  float c = exp2_coefficient<DEGREE>(0);
#pragma unroll
  for (int i = 1; i <= DEGREE; i++) c = c * f + exp2_coefficient<DEGREE>(i);
  return c * ptx::bit_cast<float>(ptx::bit_cast<uint32_t>(shifted) << 23);
}

// 2^x for element i of a row: EIGHTHS of every 8 elements by polynomial, the others by the special function unit.
template <int EIGHTHS, int DEGREE>
__device__ __forceinline__ float exp2_shared_out(float x, int i) {
  return i % 8 < EIGHTHS ? exp2_polynomial<DEGREE>(x) : ptx::exp2_approx(x);
}

}  // namespace attention
