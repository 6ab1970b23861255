// Plain threads: sums of rows through shared memory, a transposition within a warp, and sums added to global memory by
// bulk reductions.
#pragma once
#include <ptx/fence.h>
#include <ptx/global.h>
#include <ptx/named_barrier.h>
#include <ptx/shared.h>
#include <ptx/tma.h>
#include <ptx/warp.h>

namespace rows {

enum class Bug {
  None,
  NoFirstSync,
  NoSecondSync,
  ReadsUnwritten,
  OutOfRange,
  Misaligned,
  NoWarpSync,
  DivergentShuffle,
  BarrierCount,
  NoProxyFence,
  NoBarrier,
  NoStoreWait,
};

constexpr int THREADS = 128, WARPS = THREADS / 32;

struct SumParams { const float* x; float* y; int n; };  // x[n, THREADS] -> y[n]

template <Bug BUG> void sum(const SumParams p) {
  const uint32_t partial = ptx::dynamic_shared();
  const int t = threadIdx.x, warp = t / 32;
  for (int row = 0; row < p.n; ++row) {
    float x = p.x[row * THREADS + t];
    if (BUG == Bug::DivergentShuffle && t == 0) ptx::warp_sync();
    for (int mask = 16; mask; mask /= 2) x += ptx::shuffle_xor(x, mask);
    if (BUG != Bug::ReadsUnwritten || warp) {
      const uint32_t offset = BUG == Bug::OutOfRange ? 4096 : BUG == Bug::Misaligned ? 2 : 0;
      if (t % 32 == 0) ptx::st_shared(partial + offset + 4 * warp, x);
    }
    if (BUG == Bug::BarrierCount) ptx::barrier_sync(1, t < 64 ? 64 : 128);
    else if (BUG != Bug::NoFirstSync) ptx::cta_sync();
    x = 0;
    for (int w = 0; w < WARPS; ++w) x += ptx::ld_shared<float>(partial + 4 * w);
    if (t == 0) p.y[row] = x;
    if (BUG != Bug::NoSecondSync) ptx::cta_sync();  // before the next row's partial sums
  }
}

struct TransposeParams { const float* x; float* y; };  // 32 × 4 -> 4 × 32

template <Bug BUG> void transpose(const TransposeParams p) {
  const uint32_t tile = ptx::dynamic_shared();
  const int l = threadIdx.x;
  for (int i = 0; i < 4; ++i) ptx::st_shared(tile + 4 * (32 * i + l), p.x[32 * i + l]);
  if (BUG != Bug::NoWarpSync) ptx::warp_sync();
  for (int i = 0; i < 4; ++i) p.y[32 * i + l] = ptx::ld_shared<float>(tile + 4 * (4 * l + i));
}

struct AccumulateParams { const float* x; float* y; int n; };  // y[THREADS] += Σ x[CTAs, n, THREADS]

template <Bug BUG> void accumulate(const AccumulateParams p) {
  const uint32_t stage = ptx::dynamic_shared();
  const int t = threadIdx.x;
  for (int row = 0; row < p.n; ++row) {
    ptx::st_shared(stage + 4 * t, p.x[(blockIdx.x * p.n + row) * THREADS + t]);
    if (BUG != Bug::NoProxyFence) ptx::fence_proxy_async();
    if (BUG != Bug::NoBarrier) ptx::cta_sync();
    if (t == 0) {
      ptx::bulk_reduce_add(p.y, stage, 4 * THREADS);
      ptx::tma_store_commit();
      if (BUG != Bug::NoStoreWait) ptx::tma_store_wait_read<0>();
    }
    ptx::cta_sync();
  }
}

}  // namespace rows
