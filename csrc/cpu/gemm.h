// C (rows, width) += A (rows, depth) B (depth, width), with the columns of C in lanes and A broadcast.
//
// An element of A and of B is 32 bits: a float, or a pair of bf16 that are neighbours along the depth.
#pragma once
#include <type_traits>

#include "simd.h"

namespace fastattn::FASTATTN_ISA {

struct Single {
  static constexpr int DEPTH = 1;  // numbers in an element
  static FASTATTN_INLINE Vec multiply_add(Vec c, Int a, Int b) { return fma(as_float(a), as_float(b), c); }
};

#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int DEPTH = 2;
  static FASTATTN_INLINE Vec multiply_add(Vec c, Int a, Int b) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Where an element of A lies: data + row · row_bytes + k · step_bytes
struct Operand {
  const char* data;
  int64_t row_bytes, step_bytes;
  FASTATTN_INLINE Operand from_row(int64_t i) const { return {data + i * row_bytes, row_bytes, step_bytes}; }
};

enum class Start { zero, add, rescale };  // C is overwritten, added to, or first multiplied by `factor`, by column

// `depth` counts elements; B has rows of b_row elements, C of c_row floats; width is a multiple of 16.
template <class E>
void product(int rows, int depth, int width, Operand a, const void* b, int64_t b_row, float* c, int64_t c_row,
             Start start, const float* factor = nullptr);

}  // namespace fastattn::FASTATTN_ISA
