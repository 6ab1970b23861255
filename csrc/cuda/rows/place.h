// Where a row is: its three indices, its first element in each matrix, and how far that is off alignment.
#pragma once
#include <params_rows.h>
#include <ptx/numeric.h>

namespace rows {

struct Place {
  int i0, i1, i2;
  bool exists;
};

__device__ __forceinline__ Place locate(const Walk& walk, int64_t row) {
  const bool exists = row < walk.M;
  const uint32_t i = exists ? static_cast<uint32_t>(row) : 0;
  if (walk.R2 == walk.M) return {0, 0, static_cast<int>(i), exists};
  const uint32_t outer = i / walk.R2;
  return {static_cast<int>(outer / walk.R1), static_cast<int>(outer % walk.R1), static_cast<int>(i % walk.R2), exists};
}

__device__ __forceinline__ int64_t offset(const Place& at, const int64_t (&step)[3]) {
  return at.i0 * step[0] + at.i1 * step[1] + at.i2 * step[2];
}

template <class T> __device__ __forceinline__ T* row_of(const Matrix& m, const Place& at) {
  return static_cast<T*>(m.data) + offset(at, m.step);
}

// Elements between the 16-byte boundary before a row and its first element.
template <class T> __device__ __forceinline__ int shift_of(const Walk& walk, const T* row) {
  return walk.shifted ? static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T)) : 0;
}

// A number of a column whose dtype is T or fp32.
template <class T> __device__ __forceinline__ float load_number(const Column& c, const Place& at) {
  const int64_t i = offset(at, c.step);
  if (c.dtype == Dtype::Float32) return static_cast<const float*>(c.data)[i];
  return ptx::to_float(static_cast<const T*>(c.data)[i]);
}
template <class T> __device__ __forceinline__ void store_number(const Column& c, const Place& at, float v) {
  const int64_t i = offset(at, c.step);
  if (c.dtype == Dtype::Float32) static_cast<float*>(c.data)[i] = v;
  else static_cast<T*>(c.data)[i] = ptx::from_float<T>(v);
}

}  // namespace rows
