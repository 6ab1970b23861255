// The threads that share a row: 8 to 512 of one CTA, or the CTAs of a cluster; and the reduction of one value per
// thread.
//
// V is a struct of FIELDS floats `field` and merge(lower, upper). Merging is ordered by thread, so that every thread of
// the row gets the same bits. Lanes by shuffles; warps through shared memory; CTAs through one another's shared memory.
#pragma once
#include <params_rows.h>
#include <ptx/cluster.h>
#include <ptx/named_barrier.h>
#include <ptx/shared.h>
#include <ptx/warp.h>
#include <rows/limits.h>
#include <rows/planted_bugs.h>

namespace rows {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool HAS_CLUSTERS = false;
#else
constexpr bool HAS_CLUSTERS = true;
#endif

// Threads that an SM has room for at once, by their registers; as the bound of a launch, a limit of registers.
constexpr int LEAN_RESIDENT = 768;  // 80 registers
constexpr int RESIDENT = 512;       // 128: where elements are accessed one by one, or dweight and dbias are summed


template <class Planted> struct Team {
  int threads;        // of this CTA that share a row
  int thread;         // this one's number among them
  int group;          // which of the CTA's rows
  int groups;         // how many rows the CTA has at once
  int log_cluster, cluster;  // CTAs that share a row
  int rank;                  // this one's number among them
  uint32_t slots;     // shared memory
  uint32_t round = 0;

  __device__ __forceinline__ explicit Team(const Walk& walk)
      : threads(1 << walk.log_threads), thread(threadIdx.x & (threads - 1)), group(threadIdx.x >> walk.log_threads),
        groups(blockDim.x >> walk.log_threads), log_cluster(0), cluster(1), rank(0), slots(ptx::dynamic_shared()) {
    if constexpr (HAS_CLUSTERS) {
      if (walk.log_cluster > 0) {
        log_cluster = walk.log_cluster;
        cluster = 1 << log_cluster;
        rank = ptx::cluster_rank();
        // Every CTA has begun: its shared memory may be written.
        if (!Planted::has(Bug::NoStartSync)) ptx::cluster_sync();
      }
    }
  }

  // A pack's number within a row is (chunk · PACKS + v) · width() + place().
  __device__ __forceinline__ int place() const { return rank * threads + thread; }
  __device__ __forceinline__ int width() const { return cluster * threads; }
  __device__ __forceinline__ int64_t first_row() const { return int64_t(blockIdx.x >> log_cluster) * groups; }
  __device__ __forceinline__ int64_t row_step() const { return int64_t(gridDim.x >> log_cluster) * groups; }

  template <class V> __device__ __forceinline__ V reduce(V v) {
    v = butterfly(v, threads < 32 ? threads : 32);
    if (threads <= 32 || Planted::has(Bug::WarpOnly)) return v;
    const int warp = thread / 32, lane = thread % 32, warps = threads / 32;
    const uint32_t turn = slots + round * (MAX_WARPS + MAX_CLUSTER) * SLOT;
    if (!Planted::has(Bug::OneRound)) round ^= 1;  // what this round reads, the next one does not write
    const uint32_t mine = turn + group * warps * SLOT;
    if (lane == 0) write(mine + warp * SLOT, v);
    if (!Planted::has(Bug::NoBarrier)) ptx::barrier_sync(1 + group, threads);
    v = butterfly(read<V>(mine + (lane & (warps - 1)) * SLOT), warps);
    if constexpr (HAS_CLUSTERS) {
      if (cluster > 1) {
        const uint32_t totals = turn + MAX_WARPS * SLOT;
        if (thread < cluster) {
          const int to = Planted::has(Bug::OwnTotals) ? rank : thread;
#pragma unroll
          for (int f = 0; f < V::FIELDS; ++f) ptx::st_shared_cluster(totals + rank * SLOT + 4 * f, to, v.field[f]);
        }
        if (!Planted::has(Bug::NoClusterSync)) ptx::cluster_sync();
        v = butterfly(read<V>(totals + (lane & (cluster - 1)) * SLOT), cluster);
      }
    }
    return v;
  }

 private:
  // Of `lanes` neighbouring lanes, a power of two, each gets the merged value of all.
  template <class V> __device__ __forceinline__ static V butterfly(V v, int lanes) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      if (mask >= lanes) break;
      V other;
#pragma unroll
      for (int f = 0; f < V::FIELDS; ++f) other.field[f] = ptx::shuffle_xor(v.field[f], mask);
      const bool upper = lane & mask;
      V first, second;
#pragma unroll
      for (int f = 0; f < V::FIELDS; ++f) {
        first.field[f] = upper ? other.field[f] : v.field[f];
        second.field[f] = upper ? v.field[f] : other.field[f];
      }
      v = V::merge(first, second);
    }
    return v;
  }

  template <class V> __device__ __forceinline__ static void write(uint32_t slot, const V& v) {
#pragma unroll
    for (int f = 0; f < V::FIELDS; ++f) ptx::st_shared(slot + 4 * f, v.field[f]);
  }
  template <class V> __device__ __forceinline__ static V read(uint32_t slot) {
    V v;
#pragma unroll
    for (int f = 0; f < V::FIELDS; ++f) v.field[f] = ptx::ld_shared<float>(slot + 4 * f);
    return v;
  }
};

}  // namespace rows
