// The two matrix products of attention, issued by a warpgroup and not waited for.
//
// K-major operands (q and k): a k step of 16 columns is 32 bytes on within a panel, groups of 8 rows are 8 widths
// apart. MN-major operand (v): a k step of 16 keys is 16 rows on, panels of columns are BLOCK_N rows apart.
#pragma once
#include <attention/panel.h>
#include <ptx/wgmma.h>
#include <sm90/attention_config.h>
#include <sm90/planted_bugs.h>

namespace sm90 {

// The descriptor of what is `bytes` further on; the address has no carry out of the lower half.
__device__ __forceinline__ uint64_t further(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xffffffff00000000) | (static_cast<uint32_t>(descriptor) + bytes / 16);
}

// s (64, BLOCK_N) = q (64, D) · kᵀ
template <class T, class Config, class Planted, int N>
__device__ __forceinline__ void issue_scores(float (&s)[N], uint32_t q, uint32_t k) {
  constexpr AttentionConfig C = Config::value;
  using Panels = attention::Panels<C.D>;
  constexpr uint32_t WIDTH = Panels::ROW_BYTES, STEPS = WIDTH / 32;
  const uint32_t k_groups = Planted::has(Bug::WrongKeyStride) ? 4 * WIDTH : 8 * WIDTH;
  const uint64_t q_rows = ptx::descriptor(q, 16, 8 * WIDTH, Panels::SWIZZLE);
  const uint64_t k_rows = ptx::descriptor(k, 16, k_groups, Panels::SWIZZLE);
#pragma unroll
  for (int i = 0; i < C.D / 16; i++) {
    const uint32_t panel = i / STEPS, column = i % STEPS * 32;  // bytes
    ptx::wgmma_ss<T, 0, 0>(s, further(q_rows, panel * 64 * WIDTH + column),
                           further(k_rows, panel * C.BLOCK_N * WIDTH + column), i != 0);
  }
  ptx::wgmma_commit();
}

// o (64, D_v) += p (64, BLOCK_N) · v (BLOCK_N, D_v), p in registers
template <class T, class Config, class Planted, int N, int M>
__device__ __forceinline__ void issue_output(float (&o)[N], const uint32_t (&p)[M], uint32_t v) {
  constexpr AttentionConfig C = Config::value;
  using Panels = attention::Panels<C.D_v>;
  constexpr uint32_t WIDTH = Panels::ROW_BYTES;
  const uint32_t panels = Planted::has(Bug::WrongValueStride) ? 8 * WIDTH : C.BLOCK_N * WIDTH;
  const uint64_t v_rows = ptx::descriptor(v, panels, 8 * WIDTH, Panels::SWIZZLE);
#pragma unroll
  for (int i = 0; i < C.BLOCK_N / 16; i++) ptx::wgmma_rs<T, 1>(o, p + 4 * i, further(v_rows, i * 16 * WIDTH), 1);
  ptx::wgmma_commit();
}

}  // namespace sm90
