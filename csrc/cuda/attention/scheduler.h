// Which tile of queries comes next. CTAs are persistent: a CTA's first item is its index, further ones follow at a
// stride of the grid (equal tiles) or are claimed from a counter (tiles of unequal length, the longest first).
#pragma once
#include <attention/seqlen.h>
#include <ptx/shared.h>

namespace attention {

// Item -> tile. Heads are taken `section` at a time, as many as have their K and V in the L2 cache together; within a
// section all heads of one m block come before the next block. The two CTAs of a cluster share an item and take the two
// halves of 2·BLOCK_M rows, which may be more rows than there are.
template <int BLOCK_M>
__device__ __forceinline__ Tile tile_of(int item, int rank, const ForwardArguments& p) {
  Tile tile{};
  tile.valid = item < p.n_items;
  if (!tile.valid) return tile;
  const int section_items = p.m_blocks * p.section, section = item / section_items;
  const int first = section * p.section, rest = p.heads - first;
  const int heads = rest < p.section ? rest : p.section;
  const int place = item - section * section_items;
  const int head = first + place % heads;  // b · H/P + h, packed h
  const int m_block = p.longest_first ? p.m_blocks - 1 - place / heads : place / heads;
  tile.head = head % p.heads_per_batch;
  if (p.cu_seqlens_q != nullptr) {
    locate(tile, m_block, BLOCK_M >> p.log2_P, p);
    tile.m_start <<= p.log2_P;
  } else {
    tile.batch = head / p.heads_per_batch;
    tile.m_start = (m_block * p.cluster + rank) * BLOCK_M;
    tile.q_start = tile.k_start = 0;
    tile.S_q = p.S_q;
    tile.S_k = p.S_k;
  }
  return tile;
}

// The tile in shared memory, where the producer announces it to the consumers: 32 bytes at `at`.
using TileHalf = ptx::packet<int, 4>;

__device__ __forceinline__ void announce_tile(uint32_t at, const Tile& tile) {
  ptx::st_shared(at, TileHalf{{tile.valid, tile.m_start, tile.head, tile.batch}});
  ptx::st_shared(at + sizeof(TileHalf), TileHalf{{tile.q_start, tile.k_start, tile.S_q, tile.S_k}});
}

__device__ __forceinline__ Tile announced_tile(uint32_t at) {
  const auto a = ptx::ld_shared<TileHalf>(at), b = ptx::ld_shared<TileHalf>(at + sizeof(TileHalf));
  return {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]};
}

template <int BLOCK_M>
struct TileScheduler {
  int item;  // the next one
  int rank;  // in the cluster

  __device__ __forceinline__ explicit TileScheduler(const ForwardArguments& p)
      : item(blockIdx.x / p.cluster), rank(blockIdx.x % p.cluster) {}

  // The next tile that has rows; one that is not valid after the last.
  __device__ __forceinline__ Tile next(const ForwardArguments& p) {
    for (;;) {
      const Tile tile = tile_of<BLOCK_M>(item, rank, p);
      if (!tile.valid) return tile;
      advance(p);
      if ((tile.m_start >> p.log2_P) < tile.S_q || p.cluster > 1) return tile;
    }
  }

  // The claim is a load whose result nobody needs before the current tile is loaded.
  __device__ __forceinline__ void advance(const ForwardArguments& p) {
    const int claims = gridDim.x / p.cluster;
    item = !p.dynamic ? item + claims : claims + ptx::atomic_add(p.counter, 1);
  }

  // Once per CTA, after its last claim: the last one leaves the counter as it was found.
  __device__ __forceinline__ void finish(const ForwardArguments& p) const {
    if (!p.dynamic) return;
    if (ptx::atomic_add(p.counter + 1, 1) == static_cast<int>(gridDim.x) - 1) {
      ptx::st_global(p.counter, 0);
      ptx::st_global(p.counter + 1, 0);
    }
  }
};

}  // namespace attention
