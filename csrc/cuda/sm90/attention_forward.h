// Attention forward on Hopper: persistent CTAs of a producer warpgroup, of which one thread loads tiles by TMA, and
// one to three consumer warpgroups, each with 64 queries.
//
//   S = Q·Kᵀ                                   (64, BLOCK_N)  Q and K in shared memory
//   P = exp2(factor · (mask(f(S)) - row_max))  (64, BLOCK_N)  in registers
//   O = rescale · O + P·V                      (64, D_v)      P in registers, V in shared memory
//
// S of block n is computed while O still takes in block n + 1, and the softmax of one warpgroup runs beside the
// products of the others. Blocks are visited from the last to the first, masked ones in loops of their own. Source:
// Shah et al., "FlashAttention-3" (2024), algorithms 1 and 2.
#pragma once
#include <attention/epilogue.h>
#include <attention/scheduler.h>
#include <attention/softmax.h>
#include <ptx/cluster.h>
#include <ptx/fence.h>
#include <sm90/products.h>
#include <sm90/shared_layout.h>
#include <sm90/turns.h>

#include <type_traits>

namespace sm90 {

using attention::ForwardArguments;
using attention::KeyBlocks;
using attention::Tile;
using attention::window_of;

// One K or V tile of a stage: BLOCK_N rows from `row`, of which each CTA of a cluster loads a part for all of them.
template <int COLUMNS, int BLOCK_N, int STAGES>
__device__ __forceinline__ void load_keys(const ptx::TensorMap& map, const Ring<STAGES>& ring, uint32_t shared,
                                          uint32_t bytes, int row, int head, int batch, int cluster) {
  using Panels = attention::Panels<COLUMNS>;
  ptx::mbarrier_arrive_expect_tx(ring.full(), bytes);
  for (int panel = 0; panel < Panels::COUNT; panel++) {
    const uint32_t tile = shared + panel * BLOCK_N * Panels::ROW_BYTES;
    const int column = panel * Panels::WIDTH;
    if (cluster == 1) {
      ptx::tma_load(tile, &map, ring.full(), column, row, head, batch, ptx::L2Hint::EvictLast);
    } else {
      const int part = BLOCK_N / 2 * ptx::cluster_rank();
      ptx::tma_load_multicast(tile + part * Panels::ROW_BYTES, &map, ring.full(), 3, column, row + part, head, batch,
                              ptx::L2Hint::EvictLast);
    }
  }
}

// By one thread: for each tile of queries K of the last block, Q, then K of every block and V of the one after it.
template <class Config, class Planted>
__device__ __forceinline__ void produce(const ForwardArguments& p, const SharedLayout<Config>& shared) {
  constexpr AttentionConfig C = Config::value;
  const uint32_t PART = Planted::has(Bug::ShortExpect) ? 2 : 1;
  using QPanels = attention::Panels<C.D>;
  auto k_ring = shared.k_ring(), v_ring = shared.v_ring();
  auto tile_ring = shared.tile_ring();

  attention::TileScheduler<C.BLOCK_M> scheduler(p);
  for (;;) {
    const Tile tile = scheduler.next(p);
    if (!Planted::has(Bug::NoTileEmptyWait)) tile_ring.wait_empty();
    attention::announce_tile(shared.tile(tile_ring.at.stage), tile);
    ptx::mbarrier_arrive(tile_ring.full());
    const uint32_t q_parity = tile_ring.at.stage;  // a tile has one Q: its parity alternates as the stage does
    tile_ring.at.advance();
    if (!tile.valid) break;

    const KeyBlocks blocks = attention::key_blocks<C.BLOCK_M, C.BLOCK_N>(tile, p.log2_P, window_of(tile, p));
    const int kv_head = tile.head / p.group;
    const auto load_k = [&](int n) {
      if (!Planted::has(Bug::NoKeyEmptyWait)) k_ring.wait_empty();
      load_keys<C.D, C.BLOCK_N>(p.k_map, k_ring, shared.k(k_ring.at.stage), C.k_bytes() / PART,
                                tile.k_start + n * C.BLOCK_N, kv_head, tile.batch, p.cluster);
      k_ring.at.advance();
    };
    const auto load_v = [&](int n) {
      if (!Planted::has(Bug::NoValueEmptyWait)) v_ring.wait_empty();
      load_keys<C.D_v, C.BLOCK_N>(p.v_map, v_ring, shared.v(v_ring.at.stage), C.v_bytes(),
                                  tile.k_start + n * C.BLOCK_N, kv_head, tile.batch, p.cluster);
      v_ring.at.advance();
    };
    const auto load_q = [&](int w) {
      auto q_ring = shared.q_ring(w);
      q_ring.at.parity = q_parity;
      if (!Planted::has(Bug::NoQueryEmptyWait)) q_ring.wait_empty();
      ptx::mbarrier_arrive_expect_tx(q_ring.full(), C.q_bytes());
      const int query = tile.q_start + attention::QueryRows(tile, w).query(0, p);
      for (int panel = 0; panel < QPanels::COUNT; panel++) {
        ptx::tma_load(shared.q(w) + panel * attention::ROWS * QPanels::ROW_BYTES, &p.q_map, q_ring.full(),
                      panel * QPanels::WIDTH, 0, query, tile.head, tile.batch, ptx::L2Hint::EvictFirst);
      }
    };

    int n = blocks.max - 1;
    if (n >= blocks.min) load_k(n);
    for (int w = 0; w < C.consumers(); w++) load_q(w);
    for (; n > blocks.min; n--) {
      load_k(n - 1);
      load_v(n);
    }
    if (n >= blocks.min) load_v(n);
  }
  if (!Planted::has(Bug::CounterLeft)) scheduler.finish(p);
}

// By consumer warpgroup w: 64 queries of each tile.
template <class T, class Config, class Planted>
__device__ __forceinline__ void consume(const ForwardArguments& p, const SharedLayout<Config>& shared, int w) {
  constexpr AttentionConfig C = Config::value;
  const int thread = threadIdx.x % 128, cluster = Planted::has(Bug::ReleaseToSelf) ? 1 : p.cluster;
  auto k_ring = shared.k_ring(), v_ring = shared.v_ring();
  auto q_ring = shared.q_ring(w);
  auto tile_ring = shared.tile_ring();
  const uint32_t q_tile = shared.q(w), o_tile = shared.o(w);
  const Turns<C.consumers(), C.PING_PONG> turns(w);

  for (;;) {
    tile_ring.wait_full();
    // The tile stays in shared memory until its end and is read again where it is needed: registers are short.
    const auto tile = [&] { return attention::announced_tile(shared.tile(tile_ring.at.stage)); };
    if (!uniform(tile().valid)) break;
    q_ring.at.parity = tile_ring.at.stage;
    v_ring.at = k_ring.at;  // as many V as K have gone by
    const KeyBlocks n_of = attention::key_blocks<C.BLOCK_M, C.BLOCK_N>(tile(), p.log2_P, window_of(tile(), p));
    const KeyBlocks blocks = {uniform(n_of.min), uniform(n_of.left), uniform(n_of.right), uniform(n_of.max)};

    attention::OnlineSoftmax<C.LAZY_RESCALE, C.POLYNOMIAL_EIGHTHS, C.POLYNOMIAL_DEGREE> softmax{p.score.factor};
    float s[C.BLOCK_N / 2];                 // S (64, BLOCK_N)
    uint32_t probabilities[C.BLOCK_N / 4];  // P (64, BLOCK_N), 16 bits
    float o[C.D_v / 2] = {};                // O (64, D_v)
    const auto pack = [&] {
#pragma unroll
      for (int i = 0; i < C.BLOCK_N / 4; i++) probabilities[i] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
    };
    const auto rescale = [&] {
#pragma unroll
      for (int i = 0; i < C.D_v / 2; i++) o[i] *= softmax.rescale[attention::row_half(i)];
    };
    // V of a block is waited for when its P is done, although O takes it in only later. ptxas would move the wait for
    // the tensor cores up to the start of its basic block, and exponentials down; this wait begins a block, and its
    // parity depends on the sum of all exponentials, in a way that never comes true.
    const auto wait_v = [&](const auto& ring) {
      if (!Planted::has(Bug::NoValueFullWait)) ring.wait_full(softmax.row_sum[0] + softmax.row_sum[1] < 0);
    };
    const auto mask = [&](int n) {
      attention::apply_mask(s, n * C.BLOCK_N - (Planted::has(Bug::MaskOffByOne) ? 1 : 0), tile(), w, thread, p);
    };

    q_ring.wait_full();
    int n = blocks.max - 1;
    if (n >= blocks.min) {
      // S of the last block, with nothing to overlap
      k_ring.wait_full();
      turns.begin();
      ptx::wgmma_fence();
      issue_scores<T, Config, Planted>(s, q_tile, shared.k(uniform(k_ring.at.stage)));
      turns.end();
      ptx::wgmma_wait<0>(s);
      k_ring.release(cluster);
      k_ring.at.advance();
      attention::apply_score(s, p.score);
      if (n >= blocks.right || n < blocks.left) mask(n);
      softmax.update(s);
      pack();
      wait_v(v_ring);
    }

    // S of block n, then O takes in block n + 1, whose V is there
    const auto step = [&](auto masked) {
      if (!Planted::has(Bug::NoKeyFullWait)) k_ring.wait_full(Planted::has(Bug::WrongParity));
      turns.begin();
      if (!Planted::has(Bug::NoWgmmaFence)) ptx::wgmma_fence();
      issue_scores<T, Config, Planted>(s, q_tile, shared.k(uniform(k_ring.at.stage)));
      if (Planted::has(Bug::EarlyKeyRelease)) k_ring.release(cluster);
      ptx::wgmma_fence();
      issue_output<T, Config, Planted>(o, probabilities, shared.v(uniform(v_ring.at.stage)));
      if (Planted::has(Bug::EarlyValueRelease)) v_ring.release(cluster);
      turns.end();

      if (!Planted::has(Bug::NoScoreWait)) ptx::wgmma_wait<1>(s);
      if (!Planted::has(Bug::EarlyKeyRelease)) k_ring.release(cluster);
      k_ring.at.advance();
      attention::apply_score(s, p.score);
      if (decltype(masked)::value) mask(n);
      const bool grown = softmax.update(s);  // beside the product P·V of block n + 1
      if (Planted::has(Bug::EarlyRescale)) rescale();
      if (Planted::has(Bug::EarlyPack)) pack();

      wait_v(v_ring.next());
      ptx::wgmma_wait<0>(o, probabilities);
      if (!Planted::has(Bug::EarlyValueRelease)) v_ring.release(cluster);
      v_ring.at.advance();
      if (grown && !Planted::has(Bug::EarlyRescale) && !Planted::has(Bug::NoRescale)) rescale();
      if (!Planted::has(Bug::EarlyPack)) pack();
    };
    for (n--; n >= blocks.right; n--) step(std::true_type{});
    for (; n >= blocks.left; n--) step(std::false_type{});
    for (; n >= blocks.min; n--) step(std::true_type{});

    if (C.o_apart()) q_ring.release();
    if (blocks.max > blocks.min) {
      ptx::wgmma_fence();
      issue_output<T, Config, Planted>(o, probabilities, shared.v(uniform(v_ring.at.stage)));
      ptx::wgmma_wait<0>(o, probabilities);
      v_ring.release(cluster);
      v_ring.at.advance();
    }

    float normaliser[2], lse[2], lse_low[2];
    softmax.finish(p.score.scale, normaliser, lse, lse_low);
    const attention::QueryRows rows(tile(), w);
    attention::store_lse(lse, lse_low, rows, p, thread);
    if (thread == 0 && !Planted::has(Bug::NoStoreWait)) ptx::tma_store_wait_read<0>();
    warpgroup_sync(w);  // the tile of O is free: of the last O, and of Q where they share it
    attention::store_fragment<T, C.D_v>(o_tile, o, normaliser, thread);
    const bool hidden = p.hidden_keys && !Planted::has(Bug::LeakHidden);
    const bool far[2] = {softmax.far(0), softmax.far(1)};
    if (hidden || ptx::ballot(far[0] || far[1]) != 0) {
      ptx::warp_sync();
      attention::repair_rows<T, C.D, C.D_v>(o_tile, o, lse, far, hidden, rows, p, thread);
    }
    if (rows.others_follow(p) && !Planted::has(Bug::StoreBeyondSequence)) {
      ptx::warp_sync();
      attention::store_rows<T, C.D_v>(o_tile, rows, p, thread);
      if (!C.o_apart()) {  // TMA loads the next Q here
        ptx::fence_proxy_async();
        warpgroup_sync(w);
      }
    } else {
      if (!Planted::has(Bug::NoProxyFence)) ptx::fence_proxy_async();
      if (!Planted::has(Bug::NoEpilogueBarrier)) warpgroup_sync(w);
      if (thread == 0) attention::store_tile<C.D_v>(o_tile, rows, p);
    }
    if (!C.o_apart() && thread == 0) {
      if (!Planted::has(Bug::NoStoreWait)) ptx::tma_store_wait_read<0>();
      ptx::mbarrier_arrive(q_ring.empty());
    }
    tile_ring.release();
    tile_ring.at.advance();
  }
  if (thread == 0) ptx::tma_store_wait_read<0>();
  turns.finish();
}

template <class T, class Config, class Planted = NoBugs>
__global__ void __launch_bounds__(Config::value.threads(), 1)
    attention_forward_kernel(const __grid_constant__ ForwardArguments p) {
  constexpr AttentionConfig C = Config::value;
  static_assert(C.illegal() == nullptr, "see AttentionConfig::illegal");
  const SharedLayout<Config> shared;
  const int warpgroup = uniform(threadIdx.x / 128);

  if (threadIdx.x == 0) {
    constexpr int WARPS = 4 * C.consumers();
    shared.k_ring().init(WARPS * p.cluster);
    shared.v_ring().init(WARPS * p.cluster);
    shared.tile_ring().init(WARPS);
    for (int w = 0; w < C.consumers(); w++) shared.q_ring(w).init(C.o_apart() ? 4 : 1);
    ptx::fence_mbarrier_init();
    for (const ptx::TensorMap* map : {&p.q_map, &p.k_map, &p.v_map, &p.o_map}) ptx::tma_prefetch(map);
  }
  ptx::warp_sync();
  if (p.cluster > 1) {
    ptx::cluster_sync();
  } else if (!Planted::has(Bug::NoInitSync)) {
    ptx::cta_sync();
  }

  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<C.producer_registers()>();
    if (threadIdx.x < 32 && ptx::elect_one()) produce<Config, Planted>(p, shared);
  } else {
    ptx::setmaxnreg_inc<C.consumer_registers()>();
    consume<T, Config, Planted>(p, shared, warpgroup - 1);
  }
  ptx::warp_sync();
  if (p.cluster > 1) ptx::cluster_sync();  // the other CTA may still write here
}

}  // namespace sm90
