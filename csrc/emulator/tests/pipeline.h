// O = Σ_j (Q·K_jᵀ)·V_j by two TMA threads and one wgmma warpgroup, over tiles of 64 queries: a kernel with everything
// that an attention kernel synchronises, in which one mistake at a time can be planted.
#pragma once
#include <ptx/fence.h>
#include <ptx/matrix.h>
#include <ptx/mbarrier.h>
#include <ptx/named_barrier.h>
#include <ptx/numeric.h>
#include <ptx/shared.h>
#include <ptx/tma.h>
#include <ptx/warp.h>
#include <ptx/wgmma.h>

namespace pipeline {

enum class Bug {
  None,
  NoFullWait,
  NoEmptyWait,
  WrongParity,
  NoWgmmaWait,
  EarlyRelease,
  NoWgmmaFence,
  TouchAccumulator,
  RepackInFlight,
  UnpinnedAccumulator,
  WrongSbo,
  WrongLbo,
  WrongMajor,
  WrongSwizzle,
  ExpectTooSmall,
  ExpectTooLarge,
  TooManyArrivals,
  NoProxyFence,
  NoEpilogueBarrier,
  NoStoreWait,
  NoStoreCommit,
  NoInitSync,
  NoInitFence,
  LoadNeverWaitedFor,
};

constexpr int M = 64, N = 64, D = 64, D_V = 128, STAGES = 2, THREADS = 256;
constexpr uint32_t PANEL = 64 * 128;  // 64 rows of 128 bytes
constexpr uint32_t K_BYTES = PANEL, V_BYTES = 2 * PANEL;
constexpr uint32_t Q = 0, O = Q + PANEL, K = O + 2 * PANEL, V = K + STAGES * K_BYTES, BARRIERS = V + STAGES * V_BYTES;
constexpr uint32_t SHARED = BARRIERS + 128;

struct Params {
  ptx::TensorMap q;  // [M·tiles, D]
  ptx::TensorMap k;  // [N·blocks, D]
  ptx::TensorMap v;  // [N·blocks, D_V]
  ptx::TensorMap o;  // [M·tiles, D_V]
  int tiles, blocks;
};

// A full and an empty barrier for each of Q and the stages of K and V.
struct Ring {
  uint32_t base;
  int i = 0;

  uint32_t full() const { return base + 8 * (i % STAGES); }
  uint32_t empty() const { return base + 8 * (STAGES + i % STAGES); }
  uint32_t phase() const { return i / STAGES & 1; }
};

template <Bug BUG> void load_q_and_k(const Params& p, uint32_t shared, uint32_t q_full, uint32_t q_empty, Ring k) {
  int n = 0;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, ++n) {
    ptx::mbarrier_wait(q_empty, (n & 1) ^ 1);
    ptx::mbarrier_arrive_expect_tx(q_full, PANEL);
    ptx::tma_load(shared + Q, &p.q, q_full, 0, tile * M);
    for (int j = 0; j < p.blocks; ++j, ++k.i) {
      if (BUG != Bug::NoEmptyWait) ptx::mbarrier_wait(k.empty(), k.phase() ^ 1);
      const uint32_t halves = BUG == Bug::ExpectTooSmall ? 1 : BUG == Bug::ExpectTooLarge ? 4 : 2;
      ptx::mbarrier_arrive_expect_tx(k.full(), halves * K_BYTES / 2);
      ptx::tma_load(shared + K + k.i % STAGES * K_BYTES, &p.k, k.full(), 0, j * N);
    }
  }
  if (BUG == Bug::LoadNeverWaitedFor) {
    ptx::mbarrier_wait(k.empty(), k.phase() ^ 1);
    ptx::mbarrier_arrive_expect_tx(k.full(), K_BYTES);
    ptx::tma_load(shared + K + k.i % STAGES * K_BYTES, &p.k, k.full(), 0, 0);
  }
}

inline void load_v(const Params& p, uint32_t shared, Ring v) {
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x)
    for (int j = 0; j < p.blocks; ++j, ++v.i) {
      ptx::mbarrier_wait(v.empty(), v.phase() ^ 1);
      ptx::mbarrier_arrive_expect_tx(v.full(), V_BYTES);
      for (int panel = 0; panel < 2; ++panel)
        ptx::tma_load(shared + V + v.i % STAGES * V_BYTES + panel * PANEL, &p.v, v.full(), 64 * panel, j * N);
    }
}

template <Bug BUG> struct Consumer {
  uint32_t shared;
  Ring k, v;
  int t;
  float s[N / 2], o[D_V / 2];
  uint32_t p[N / 4];  // S in bf16, as A fragments

  void issue_qk() {  // s = Q·K_jᵀ
    const uint32_t sbo = BUG == Bug::WrongSbo ? 512 : 1024;
    for (int kk = 0; kk < D / 16; ++kk)
      ptx::wgmma_ss<ptx::bf16, 0, 0>(
          s, ptx::descriptor(shared + Q + 32 * kk, 16, 1024, ptx::Swizzle::B128),
          ptx::descriptor(shared + K + k.i % STAGES * K_BYTES + 32 * kk, 16, sbo, ptx::Swizzle::B128), kk != 0);
    ptx::wgmma_commit();
  }

  void issue_pv(bool first) {  // o += P·V_j
    const uint32_t lbo = BUG == Bug::WrongLbo ? 1024 : PANEL;
    constexpr int trans = BUG == Bug::WrongMajor ? 0 : 1;
    for (int kk = 0; kk < N / 16; ++kk)
      ptx::wgmma_rs<ptx::bf16, trans>(
          o, p + 4 * kk,
          ptx::descriptor(shared + V + v.i % STAGES * V_BYTES + 2048 * kk, lbo, 1024, ptx::Swizzle::B128),
          !(first && kk == 0));
    ptx::wgmma_commit();
  }

  void wait_full(Ring& ring) {
    if (BUG == Bug::NoFullWait && ring.i > 0) return;
    ptx::mbarrier_wait(ring.full(), ring.phase() ^ (BUG == Bug::WrongParity && ring.i > 1));
  }

  void release(Ring& ring) {
    if (t == 0) ptx::mbarrier_arrive(ring.empty());
    ++ring.i;
  }

  void pack_p() {
    for (int i = 0; i < N / 4; ++i) p[i] = ptx::pack<ptx::bf16>(s[2 * i], s[2 * i + 1]);
  }

  void tile(int blocks) {
    wait_full(k);
    ptx::wgmma_fence();
    issue_qk();
    ptx::wgmma_wait<0>(s);
    release(k);
    pack_p();
    for (int j = 1; j < blocks; ++j) {
      wait_full(k);
      if (BUG != Bug::NoWgmmaFence) ptx::wgmma_fence();
      issue_qk();
      if (BUG == Bug::EarlyRelease) release(k);
      ptx::mbarrier_wait(v.full(), v.phase());
      ptx::wgmma_fence();
      issue_pv(j == 1);
      if (BUG == Bug::UnpinnedAccumulator) ptx::wgmma_wait<1>();
      else if (BUG != Bug::NoWgmmaWait) ptx::wgmma_wait<1>(s);
      if (BUG != Bug::EarlyRelease) release(k);
      if (BUG == Bug::TouchAccumulator)
        for (float& x : o) x *= 2.f;
      if (BUG == Bug::RepackInFlight) pack_p();
      ptx::wgmma_wait<0>(o, p, s);
      release(v);
      if (BUG != Bug::RepackInFlight) pack_p();
    }
    ptx::mbarrier_wait(v.full(), v.phase());
    ptx::wgmma_fence();
    issue_pv(blocks == 1);
    ptx::wgmma_wait<0>(o, p);
    release(v);
  }

  // o through shared memory, swizzled, to global memory
  void store(const ptx::TensorMap* map, int row) {
    const int lane = t % 32;
    for (int n = 0; n < D_V / 16; ++n) {
      const int r = 16 * (t / 32) + (lane / 8 & 1) * 8 + lane % 8, column = 16 * n + lane / 16 * 8;
      const uint32_t a = shared + O + column / 64 * PANEL + r * 128 + column % 64 * 2;
      uint32_t packed[4];
      for (int j = 0; j < 4; ++j) packed[j] = ptx::pack<ptx::bf16>(o[8 * n + 2 * j], o[8 * n + 2 * j + 1]);
      ptx::stmatrix_x4(ptx::swizzle(a, ptx::Swizzle::B128), packed[0], packed[1], packed[2], packed[3]);
    }
    if (BUG != Bug::NoProxyFence) ptx::fence_proxy_async();
    if (BUG != Bug::NoEpilogueBarrier) ptx::barrier_sync(1, 128);
    if (t == 0) {
      for (int panel = 0; panel < 2; ++panel) ptx::tma_store(map, shared + O + panel * PANEL, 64 * panel, row);
      if (BUG != Bug::NoStoreCommit) ptx::tma_store_commit();
      if (BUG != Bug::NoStoreWait) ptx::tma_store_wait_read<0>();
    }
    ptx::barrier_sync(1, 128);  // the next tile's stores come after the wait
  }
};

template <Bug BUG> void kernel(const Params p) {
  const uint32_t shared = ptx::dynamic_shared(), q_full = shared + BARRIERS, q_empty = q_full + 8;
  const Ring k{q_empty + 8}, v{k.base + 2 * STAGES * 8};
  const int t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(q_full, 1);
    ptx::mbarrier_init(q_empty, 1);
    for (uint32_t bar = k.base; bar < v.base + 2 * STAGES * 8; bar += 8) ptx::mbarrier_init(bar, 1);
    if (BUG != Bug::NoInitFence) ptx::fence_mbarrier_init();
  }
  if (BUG != Bug::NoInitSync) ptx::cta_sync();
  if (t < 128) {
    ptx::setmaxnreg_dec<40>();
    if (t == 0) load_q_and_k<BUG>(p, shared, q_full, q_empty, k);
    if (t == 32) load_v(p, shared, v);
    return;
  }
  ptx::setmaxnreg_inc<232>();
  Consumer<BUG> consumer{shared, k, v, t - 128, {}, {}, {}};
  int n = 0;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, ++n) {
    ptx::mbarrier_wait(q_full, n & 1);
    consumer.tile(p.blocks);
    if (t == 128) ptx::mbarrier_arrive(q_empty);
    if (BUG == Bug::TooManyArrivals && t == 128) ptx::mbarrier_arrive(q_empty);
    consumer.store(&p.o, tile * M);
  }
}

}  // namespace pipeline
