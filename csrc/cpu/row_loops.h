// What the row kernels share: where a row lies, loops over its columns, and work that is split into blocks of rows.
#pragma once
#include "dropout.h"
#include "parallel.h"
#include "rows.h"

#define FASTATTN_LAMBDA __attribute__((always_inline))

namespace fastattn::FASTATTN_ISA {

constexpr int64_t GRAIN = 16384;  // elements: what is worth a task of its own
constexpr int SUMS = 64 / LANES;  // accumulators of a sum along a row: 64 numbers, whatever the vectors
constexpr int64_t SPAN = 16384;   // columns that such a sum covers; float64 adds up those of the spans of a longer row

struct Place {
  int64_t i0, i1, i2;
};

FASTATTN_INLINE int64_t count(const Rows& rows) { return rows.R0 * rows.R1 * rows.R2; }

FASTATTN_INLINE Place place_of(const Rows& rows, int64_t i) {
  if (rows.R1 == 1 && rows.R0 == 1) return {0, 0, i};
  const int64_t outer = i / rows.R2;
  return {outer / rows.R1, outer % rows.R1, i % rows.R2};
}

FASTATTN_INLINE int64_t offset_of(const RowTensor& t, Place p) {
  return p.i0 * t.steps[0] + p.i1 * t.steps[1] + p.i2 * t.steps[2];
}
template <class T>
FASTATTN_INLINE T* row_of(const RowTensor& t, Place p) { return (T*)t.data + offset_of(t, p); }

// call(T{}) for the type T that `type` names
template <class Call>
FASTATTN_INLINE void with_type(DType type, const Call& call) {
  if (type == DType::float32) return call(float{});
  if (type == DType::bfloat16) return call(bf16{});
  call(fp16{});
}

// How many of a vector's lanes are meant: all of them, or the first n, where a row ends.
struct All {};
struct First {
  int n;
};
template <class T>
FASTATTN_INLINE Vec load(const T* p, All) { return load(p); }
template <class T>
FASTATTN_INLINE Vec load(const T* p, First part) { return load(p, part.n); }
template <class T>
FASTATTN_INLINE void store(T* p, Vec x, All) { store(p, x); }
template <class T>
FASTATTN_INLINE void store(T* p, Vec x, First part) { store(p, x, part.n); }
FASTATTN_INLINE Vec only(All, Vec x) { return x; }
FASTATTN_INLINE Vec only(First part, Vec x) { return zero_unless(first_lanes(part.n), x); }
FASTATTN_INLINE Vec only(All, Vec x, float) { return x; }
FASTATTN_INLINE Vec only(First part, Vec x, float other) {
  return select(first_lanes(part.n), x, broadcast(other));
}

// body(n, part, k) for the columns n … n + LANES - 1 of N. k, of UNROLL, names an accumulator that is free.
template <int UNROLL, class Body>
FASTATTN_INLINE void for_columns(int64_t N, const Body& body) {
  int64_t n = 0;
  for (; n + UNROLL * LANES <= N; n += UNROLL * LANES) {
#pragma GCC unroll 16
    for (int k = 0; k < UNROLL; ++k) body(n + k * LANES, All{}, k);
  }
  for (; n + LANES <= N; n += LANES) body(n, All{}, 0);
  if (n < N) body(n, First{int(N - n)}, 0);
}

template <int UNROLL>
FASTATTN_INLINE float total_of(const Vec (&parts)[UNROLL]) {
  Vec t = parts[0];
#pragma GCC unroll 16
  for (int k = 1; k < UNROLL; ++k) t += parts[k];
  return reduce_sum(t);
}

// Σ over N columns of each of COUNT quantities, as fp32: body(n, part, sums) adds those of some columns to sums[COUNT]
template <int COUNT, class Body>
FASTATTN_INLINE void sum_columns(int64_t N, float (&totals)[COUNT], const Body& body) {
  double wide[COUNT] = {};
  for (int64_t start = 0; start < N; start += SPAN) {
    Vec sums[COUNT][SUMS] = {};
    for_columns<SUMS>(smaller(SPAN, N - start), [&](int64_t n, auto part, int k) FASTATTN_LAMBDA {
      Vec own[COUNT];
      for (int c = 0; c < COUNT; ++c) own[c] = sums[c][k];
      body(start + n, part, own);
      for (int c = 0; c < COUNT; ++c) sums[c][k] = own[c];
    });
    for (int c = 0; c < COUNT; ++c) wide[c] += total_of(sums[c]);
  }
  for (int c = 0; c < COUNT; ++c) totals[c] = (float)wide[c];
}

// Of one quantity: body(n, part, sum) adds to sum
template <class Body>
FASTATTN_INLINE float sum_columns(int64_t N, const Body& body) {
  float total[1];
  sum_columns(N, total, [&](int64_t n, auto part, Vec (&sums)[1]) FASTATTN_LAMBDA { body(n, part, sums[0]); });
  return total[0];
}

// x rounded to T
FASTATTN_INLINE Vec rounded(Vec x, float) { return x; }
template <class T>
FASTATTN_INLINE Vec rounded(Vec x, T) { return from_bits(to_bits(x, T{}), T{}); }

FASTATTN_INLINE UInt columns_from(int64_t n) { return (UInt)(lane_index() + (int32_t)n); }

// dropout(x) in columns n … of row i. What is dropped is 0, whatever it was.
FASTATTN_INLINE Vec drop(Vec x, int64_t i, int64_t n, const RowDropout& dropout, uint64_t key) {
  const UInt word = philox(key, columns_from(n), UInt{} + (uint32_t)i, UInt{} + (uint32_t)(i >> 32), UInt{});
  const Vec factor = dropout_factor(word, dropout.threshold, dropout.scale);
  return select(factor == broadcast(0.f), Vec{}, x * factor);
}

// body(first, last, thread) for ranges of M rows of N elements
template <class Body>
FASTATTN_INLINE void for_rows(int threads, int64_t M, int64_t N, const Body& body) {
  parallel_ranges(threads, M, GRAIN / (N < 1 ? 1 : N < GRAIN ? N : GRAIN), body);
}

// body(i, n, size) for pieces of M rows of N elements: columns n … n + size - 1 of row i
template <class Body>
FASTATTN_INLINE void for_pieces(int threads, int64_t M, int64_t N, const Body& body) {
  if (N <= GRAIN) {
    return for_rows(threads, M, N, [&](int64_t first, int64_t last, int) FASTATTN_LAMBDA {
      for (int64_t i = first; i < last; ++i) body(i, 0, N);
    });
  }
  const int64_t pieces = (N + GRAIN - 1) / GRAIN;
  parallel_shares(threads, M * pieces, [&](int64_t task, int) FASTATTN_LAMBDA {
    const int64_t n = task % pieces * GRAIN;
    body(task / pieces, n, smaller(GRAIN, N - n));
  });
}

// The threads that for_rows uses, for what each of them needs
FASTATTN_INLINE int threads_of(int threads, int64_t tasks) {
  return tasks < threads ? (tasks < 1 ? 1 : int(tasks)) : (threads < 1 ? 1 : threads);
}

}  // namespace fastattn::FASTATTN_ISA
