// Clusters: a sum over the shared memories of four CTAs, pulled or pushed; a tile that two CTAs load for each other.
#pragma once
#include <ptx/cluster.h>
#include <ptx/fence.h>
#include <ptx/mbarrier.h>
#include <ptx/named_barrier.h>
#include <ptx/shared.h>
#include <ptx/tma.h>
#include <ptx/warp.h>

namespace clusters {

enum class Bug {
  None,
  NoFirstSync,
  NoSync,
  NoLastSync,
  NoRemoteArrival,
  WrongRank,
  NoPeerArrival,
  NoPeerCount,
  WrongMask,
  ExpectHalf,
};

constexpr int CTAS = 4, THREADS = 64;

struct SumParams { const float* x; float* y; };  // x[clusters·CTAS·THREADS] -> y[clusters·CTAS], each the cluster's sum

// Each CTA writes its values, and reads those of all.
template <Bug BUG> void pull(const SumParams p) {
  const uint32_t values = ptx::dynamic_shared();
  const int t = threadIdx.x;
  ptx::st_shared(values + 4 * t, p.x[blockIdx.x * THREADS + t]);
  if (BUG != Bug::NoSync) ptx::cluster_sync();
  if (t == 0) {
    float sum = 0;
    for (uint32_t rank = 0; rank < ptx::cluster_size(); ++rank)
      for (int i = 0; i < THREADS; ++i) sum += ptx::ld_shared_cluster<float>(values + 4 * i, rank);
    p.y[blockIdx.x] = sum;
  }
  if (BUG != Bug::NoLastSync) ptx::cluster_sync();
}

// Each thread writes its value into its CTA's slots in every CTA, and arrives at the barrier there.
template <Bug BUG> void push(const SumParams p) {
  const uint32_t values = ptx::dynamic_shared(), bar = values + 4 * CTAS * THREADS;
  const int t = threadIdx.x;
  const uint32_t rank = ptx::cluster_rank();
  if (t == 0) {
    ptx::mbarrier_init(bar, CTAS * THREADS);
    ptx::fence_mbarrier_init();
  }
  if (BUG != Bug::NoFirstSync) ptx::cluster_sync();
  else ptx::cta_sync();
  for (uint32_t to = 0; to < CTAS; ++to) {
    const uint32_t slot = BUG == Bug::WrongRank ? (rank + 1) % 3 : rank;
    ptx::st_shared_cluster(values + 4 * (slot * THREADS + t), to, p.x[blockIdx.x * THREADS + t]);
    if (!(BUG == Bug::NoRemoteArrival && to != rank)) ptx::mbarrier_arrive_cluster(bar, to);
  }
  if (BUG != Bug::NoSync) ptx::mbarrier_wait_cluster(bar, 0);
  if (t == 0) {
    float sum = 0;
    for (int i = 0; i < CTAS * THREADS; ++i) sum += ptx::ld_shared<float>(values + 4 * i);
    p.y[blockIdx.x] = sum;
  }
}

constexpr int PAIR = 2, STAGES = 2, ROWS = 16, COLUMNS = 32;  // a tile; each CTA of a pair loads half its rows
constexpr uint32_t TILE = ROWS * COLUMNS * 4;

struct MulticastParams {
  ptx::TensorMap x;  // [tiles·ROWS, COLUMNS], box [ROWS / 2, COLUMNS]
  float* y;          // [CTAs, COLUMNS], each the sum of all rows
  int tiles;
};

// Thread 32 loads, threads 0 … 31 sum a column each.
template <Bug BUG> void multicast(const MulticastParams p) {
  const uint32_t shared = ptx::dynamic_shared(), full = shared + STAGES * TILE, empty = full + 8 * STAGES;
  const int t = threadIdx.x;
  const uint32_t rank = ptx::cluster_rank();
  if (t == 0) {
    for (int s = 0; s < STAGES; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, BUG == Bug::NoPeerCount ? 1 : PAIR);
    }
    ptx::fence_mbarrier_init();
  }
  if (BUG != Bug::NoFirstSync) ptx::cluster_sync();
  else ptx::cta_sync();
  if (t == 32) {
    for (int i = 0; i < p.tiles; ++i) {
      const int s = i % STAGES;
      ptx::mbarrier_wait(empty + 8 * s, (i / STAGES & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(full + 8 * s, BUG == Bug::ExpectHalf ? TILE / 2 : TILE);
      ptx::tma_load_multicast(shared + s * TILE + rank * TILE / 2, &p.x, full + 8 * s, BUG == Bug::WrongMask ? 1 : 3, 0,
                              i * ROWS + static_cast<int>(rank) * ROWS / 2);
    }
  } else if (t < 32) {
    float sum = 0;
    for (int i = 0; i < p.tiles; ++i) {
      const int s = i % STAGES;
      ptx::mbarrier_wait(full + 8 * s, i / STAGES & 1);
      for (int row = 0; row < ROWS; ++row) sum += ptx::ld_shared<float>(shared + s * TILE + (row * COLUMNS + t) * 4);
      ptx::warp_sync();
      if (BUG == Bug::NoPeerCount) {
        if (t == 0) ptx::mbarrier_arrive(empty + 8 * s);
      } else if (t < (BUG == Bug::NoPeerArrival ? 1 : PAIR)) {
        ptx::mbarrier_arrive_cluster(empty + 8 * s, t);
      }
    }
    p.y[blockIdx.x * COLUMNS + t] = sum;
  }
  if (BUG != Bug::NoLastSync) ptx::cluster_sync();  // the peer's last arrivals still come
}

}  // namespace clusters
