// Which entries of a row softmax sees: those before the causal limit, where the mask is true.
#pragma once
#include <rows/pack.h>
#include <rows/place.h>

namespace rows {

// How many columns a row may see at most: n <= i2 + diagonal. Nothing beyond them is read.
__device__ __forceinline__ int causal_limit(const Softmax& p, const Place& at) {
  if (!at.exists) return 0;
  if (!p.causal) return p.walk.N;
  const int64_t end = int64_t(at.i2) + p.diagonal + 1;
  return end < 0 ? 0 : end < p.walk.N ? static_cast<int>(end) : p.walk.N;
}

// Bit i: whether element n0 + i is visible.
template <int E> __device__ __forceinline__ uint32_t visible(const Softmax& p, const Place& at, int n0, int limit) {
  uint32_t bits = bits_inside<E>(n0, limit);
  if (!p.mask || !bits) return bits;
  const int64_t step = p.mask_step[3];
  const uint8_t* row = p.mask + at.i0 * p.mask_step[0] + at.i1 * p.mask_step[1] + at.i2 * p.mask_step[2];
  if (step == 0) return ptx::ld_global_nc(row) ? bits : 0;
  if (p.mask_wide && bits == ALL<E>) {
    const auto bytes = ptx::ld_global_nc(reinterpret_cast<const ptx::packet<uint8_t, E>*>(row + n0));
#pragma unroll
    for (int i = 0; i < E; ++i)
      if (!bytes[i]) bits &= ~(1u << i);
    return bits;
  }
#pragma unroll
  for (int i = 0; i < E; ++i)
    if (bits >> i & 1 && !ptx::ld_global_nc(row + (n0 + i) * step)) bits &= ~(1u << i);
  return bits;
}

}  // namespace rows
