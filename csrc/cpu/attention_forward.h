// What the two ways to compute a task of the forward share: many queries in lanes (attention_forward.cpp), and a few
// queries against keys in lanes (attention_decode.cpp).
#pragma once
#include "attention_tile.h"

namespace fastattn::FASTATTN_ISA {

constexpr int MOST_TILES = 4;

// What is kept of a tile from block to block
struct Sums {
  float* max;  // (M,) of s
  float* sum;  // (M,) of exp(logit - the largest logit)
  float* o;    // (D_v, width), not yet divided by sum; of few rows (rows, D_v)
  int32_t* q;  // (D / DEPTH, width); of few rows (rows, D / DEPTH)
};

// Memory of one thread
template <class T>
struct ForwardWorkspace {
  static constexpr int DEPTH = Element<T>::DEPTH;
  Sums sums[MOST_TILES];
  int32_t *k, *v, *v_finite;  // (N, D / DEPTH), (N / DEPTH, D_v), the same without inf and NaN
  float* s;                   // (N, M)
  int32_t* p;                 // (N / DEPTH, M)
  int32_t* keep;              // (N, M)
  float* entries;             // (N, M)
  float* rescale;             // (M,)
  float *few_s, *few_kept;    // (FEW_ROWS, N)

  size_t lay_out(const AttentionParams& params, int tiles, char* begin) {
    Memory memory(begin);
    const int D = depth_of<T>(params.D), D_v = round_up(params.D_v, 16);
    for (int i = 0; i < tiles; ++i) {
      memory.take(sums[i].max, BLOCK_M);
      memory.take(sums[i].sum, BLOCK_M);
      memory.take(sums[i].o, D_v * BLOCK_M);
      memory.take(sums[i].q, round_up(D, LANES) * BLOCK_M);
    }
    memory.take(k, BLOCK_N * D);
    for (int32_t** x : {&v, &v_finite}) memory.take(*x, BLOCK_N / DEPTH * D_v);
    for (float** tile : {&s, &entries}) memory.take(*tile, BLOCK_N * BLOCK_M);
    for (int32_t** tile : {&p, &keep}) memory.take(*tile, BLOCK_N * BLOCK_M);
    memory.take(rescale, BLOCK_M);
    for (float** rows : {&few_s, &few_kept}) memory.take(*rows, FEW_ROWS * BLOCK_N);
    return memory.used();
  }
};

// Tasks that reach over a part of the keys leave (max (M,), sum (M,), o (D_v, M)) there.
inline size_t part_size(const AttentionParams& p) { return 2 * BLOCK_M + size_t(p.D_v) * BLOCK_M; }

// Sums over no keys yet, of rows up to `width`
FASTATTN_INLINE void begin(Sums& sums, int width, int64_t o_size) {
  for (int l = 0; l < width; l += LANES) {
    store(sums.max + l, broadcast(-__builtin_inff()));
    store(sums.sum + l, Vec{});
  }
  memset(sums.o, 0, sizeof(float) * o_size);
}

// s (N, width): -inf where a row does not see a key
FASTATTN_INLINE void hide(const int32_t* keep, int size, float* s) {
  for (int i = 0; i < size; i += LANES)
    store(s + i, select(*(const UnalignedInt*)(keep + i), load(s + i), broadcast(-__builtin_inff())));
}

// The probability that an element of p holds for key i
template <class T>
FASTATTN_INLINE float weight_of(const int32_t* element, int i) {
  return Element<T>::DEPTH == 2 ? load_one((const bf16*)element + i % 2) : load_one((const float*)element);
}

// body(l, i, d, x) for each inf or NaN x = v[i][d] whose key lane l sees: what a product with v_finite leaves out. Rare.
template <class T, class Body>
void for_non_finite(const T* const* v, int n, int64_t stride, int D_v, const Tile& t, const int32_t* keep,
                    const Body& body) {
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < D_v; ++d) {
      const float x = load_one(v[i] + d * stride);
      if (x - x == 0.f) continue;
      for (int l = 0; l < t.n; ++l)
        if (keep[i * t.width + l]) body(l, i, d, x);
    }
}

// Writes lse = max + log sum of lanes j · LANES … of a tile, the sink among what is summed; returns what makes o of
// sums.o, 1 / sum. A row that saw nothing has the maximum -inf, an lse of -inf and an o of 0.
Vec finish_rows(const AttentionParams& p, const Tile& t, int b, const Sums& sums, int j);

template <class T>
void run_few(const AttentionParams& p, const ForwardTask& task, ForwardWorkspace<T>& w, float* parts);

}  // namespace fastattn::FASTATTN_ISA
