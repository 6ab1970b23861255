// From a chosen configuration to a launch: dispatch by dtype, alignment of tensors, grid.
#pragma once
#include <launch.h>
#include <rows/config.h>
#include <rows/target.h>

#include <initializer_list>
#include <stdexcept>
#include <type_traits>

namespace rows {

template <class F> void with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::Float32) f(float{});
  else if (dtype == Dtype::Bfloat16) f(ptx::bf16{});
  else f(ptx::fp16{});
}

inline const char* name_of(Dtype dtype) {
  return dtype == Dtype::Float32 ? "float32" : dtype == Dtype::Bfloat16 ? "bfloat16" : "float16";
}

// Refuses a tensor, if there is one, that is neither of `dtype` nor of `other`.
template <class Tensor> void require(const Tensor& t, const char* name, Dtype dtype, Dtype other) {
  if (!t.data || t.dtype == dtype || t.dtype == other) return;
  std::string accepted = name_of(dtype);
  if (other != dtype) accepted += std::string(" or ") + name_of(other);
  throw std::invalid_argument(std::string(name) + " is " + name_of(t.dtype) + "; it must be " + accepted);
}

template <class Kernel> RowLimits limits(Kernel kernel) { return limits_on(supports_clusters(kernel), shared_limit()); }

// Bytes of one access to E neighbours.
inline int access_bytes(Dtype dtype, int E) { return std::min(16, E * size_of(dtype)); }

inline void align(Matrix& m, int E) {
  const int bytes = access_bytes(m.dtype, E);
  m.wide = reinterpret_cast<uintptr_t>(m.data) % bytes == 0;
  for (int64_t step : m.step) m.wide &= step * size_of(m.dtype) % bytes == 0;
}

inline void align(Vector& v, int E) { v.wide = reinterpret_cast<uintptr_t>(v.data) % access_bytes(v.dtype, E) == 0; }

// Whether the rows of both matrices lie alike between 16-byte boundaries.
inline bool alike(const Matrix& a, const Matrix& b) {
  const auto begin = [](const Matrix& m) { return reinterpret_cast<uintptr_t>(m.data) % 16; };
  bool same = begin(a) == begin(b) && a.dtype == b.dtype;
  for (int d = 0; d < 3; ++d) same &= (a.step[d] - b.step[d]) * size_of(a.dtype) % 16 == 0;
  return same;
}

// Where the first matrix's rows are not aligned, but all matrices' rows alike, packs may be aligned in memory instead.
inline void shift_unaligned(Walk& walk, std::initializer_list<Matrix*> matrices) {
  const Matrix& first = **matrices.begin();
  walk.shifted = !first.wide;
  for (const Matrix* m : matrices) walk.shifted &= !m->data || alike(first, *m);
  if (walk.shifted)
    for (Matrix* m : matrices) m->wide = true;
}

inline int log2_of(int power) {
  int log = 0;
  while (power >> (log + 1)) ++log;
  return log;
}

// Whether every pack lies within its row or beyond it, and moves by whole accesses: what the lean kernels are for.
inline bool whole(const Walk& walk, int E, std::initializer_list<const Matrix*> matrices,
                  std::initializer_list<const Vector*> vectors = {}) {
  bool all = walk.N % E == 0 && !walk.shifted;
  for (const Matrix* m : matrices) all &= !m->data || m->wide;
  for (const Vector* v : vectors) all &= !v->data || v->wide;
  return all;
}

// f(true_type) or f(false_type).
template <class F> void with_bool(bool value, F f) {
  if (value) f(std::true_type{});
  else f(std::false_type{});
}

// Grid of one CTA, or cluster, per group of rows; and `walk` as the kernel reads it.
inline LaunchShape shape_of(const RowConfig& config, Walk& walk) {
  walk.log_threads = log2_of(config.threads_per_row);
  walk.log_cluster = log2_of(config.cluster);
  walk.chunks = config.chunks;
  walk.kept = config.kept;
  const int groups = (walk.M + config.rows_per_cta() - 1) / config.rows_per_cta();
  const int64_t ctas = int64_t(groups) * config.cluster;
  const int most = INT32_MAX / config.cluster * config.cluster;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(ctas, most)));
  return {grid, config.threads, config.shared_bytes, config.cluster};
}

}  // namespace rows
