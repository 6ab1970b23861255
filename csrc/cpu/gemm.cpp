#include "gemm.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Vectors of C side by side; with 6 rows, accumulators fill the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_VECTORS = 4;
#else
constexpr int MOST_VECTORS = 2;
#endif

template <class E, int ROWS, int VECTORS>
FASTATTN_INLINE void product_block(int depth, Operand a, const char* b, int64_t b_bytes, float* c, int64_t c_row,
                                   Start start, const float* factor) {
  Vec acc[ROWS][VECTORS] = {};
  for (int k = 0; k < depth; ++k) {
    Int column[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) column[v] = *((const UnalignedInt*)b + v);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      int32_t element;
      memcpy(&element, a.data + i * a.row_bytes, 4);
      const Int x = broadcast(element);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) acc[i][v] = E::multiply_add(acc[i][v], x, column[v]);
    }
    a.data += a.step_bytes;
    b += b_bytes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      float* at = c + i * c_row + v * LANES;
      if (start == Start::zero)
        store(at, acc[i][v]);
      else if (start == Start::add)
        store(at, load(at) + acc[i][v]);
      else
        store(at, fma(load(at), load(factor + v * LANES), acc[i][v]));
    }
}

template <class E, int VECTORS>
__attribute__((noinline)) void product_columns(int rows, int depth, Operand a, const char* b, int64_t b_bytes, float* c,
                                               int64_t c_row, Start start, const float* factor) {
  constexpr int ROWS = MOST_VECTORS == 4 && VECTORS <= 2 ? 12 : 6;
  int i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    product_block<E, ROWS, VECTORS>(depth, a.from_row(i), b, b_bytes, c + i * c_row, c_row, start, factor);
  if (ROWS > 6 && i + 6 <= rows) {
    product_block<E, 6, VECTORS>(depth, a.from_row(i), b, b_bytes, c + i * c_row, c_row, start, factor);
    i += 6;
  }
  a = a.from_row(i);
  c += i * c_row;
  switch (rows - i) {
    case 5: return product_block<E, 5, VECTORS>(depth, a, b, b_bytes, c, c_row, start, factor);
    case 4: return product_block<E, 4, VECTORS>(depth, a, b, b_bytes, c, c_row, start, factor);
    case 3: return product_block<E, 3, VECTORS>(depth, a, b, b_bytes, c, c_row, start, factor);
    case 2: return product_block<E, 2, VECTORS>(depth, a, b, b_bytes, c, c_row, start, factor);
    case 1: return product_block<E, 1, VECTORS>(depth, a, b, b_bytes, c, c_row, start, factor);
  }
}

}  // namespace

// Sums are made of parts of at most DEEPEST elements, which keeps the rounding of long ones small, and B in the cache.
template <class E>
void product(int rows, int depth, int width, Operand a, const void* b, int64_t b_row, float* c, int64_t c_row,
             Start start, const float* factor) {
  constexpr int DEEPEST = 64, PANEL = MOST_VECTORS * LANES;
  for (int k = 0; k == 0 || k < depth; k += DEEPEST) {
    const int part = smaller(DEEPEST, depth - k);
    const Start how = k == 0 ? start : Start::add;
    const Operand from{a.data + k * a.step_bytes, a.row_bytes, a.step_bytes};
    const char* columns = (const char*)b + int64_t(k) * b_row * 4;
    int j = 0;
    for (; j + PANEL <= width; j += PANEL)
      product_columns<E, MOST_VECTORS>(rows, part, from, columns + j * 4, b_row * 4, c + j, c_row, how, factor + j);
    if constexpr (LANES == 16) {
      const int left = (width - j) / LANES;
      if (left == 3)
        product_columns<E, 3>(rows, part, from, columns + j * 4, b_row * 4, c + j, c_row, how, factor + j);
      else if (left == 2)
        product_columns<E, 2>(rows, part, from, columns + j * 4, b_row * 4, c + j, c_row, how, factor + j);
      else if (left == 1)
        product_columns<E, 1>(rows, part, from, columns + j * 4, b_row * 4, c + j, c_row, how, factor + j);
    }
  }
}

template void product<Single>(int, int, int, Operand, const void*, int64_t, float*, int64_t, Start, const float*);
#if defined(__AVX512BF16__)
template void product<Pair>(int, int, int, Operand, const void*, int64_t, float*, int64_t, Start, const float*);
#endif

}  // namespace fastattn::FASTATTN_ISA
