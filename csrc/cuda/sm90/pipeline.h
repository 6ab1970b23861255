// Rings of tiles in shared memory between the producer, which fills them by TMA, and the consumers. A full barrier
// counts bytes, an empty barrier counts consumer warps; the k-th use of a stage is phase k % 2 of both.
#pragma once
#include <ptx/mbarrier.h>
#include <ptx/warp.h>

namespace sm90 {

constexpr uint32_t BARRIER_BYTES = 8;

// v, the same in all lanes, in a form that the compiler knows to be so: what depends on it goes to uniform registers.
__device__ __forceinline__ int uniform(int v) { return ptx::shuffle(v, 0); }

// Where a ring is: a stage, and the parity of its use.
template <int STAGES>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// full[STAGES], then empty[STAGES], at `barriers`.
template <int STAGES>
struct Ring {
  uint32_t barriers;
  RingPosition<STAGES> at;

  static constexpr uint32_t BYTES = 2 * STAGES * BARRIER_BYTES;

  __device__ __forceinline__ explicit Ring(uint32_t barriers) : barriers(barriers) {}
  __device__ __forceinline__ Ring next() const {
    Ring ring = *this;
    ring.at.advance();
    return ring;
  }
  __device__ __forceinline__ uint32_t full() const { return barriers + at.stage * BARRIER_BYTES; }
  __device__ __forceinline__ uint32_t empty() const { return barriers + (STAGES + at.stage) * BARRIER_BYTES; }

  __device__ __forceinline__ void init(int consumer_warps) const {
    for (int s = 0; s < STAGES; s++) {
      ptx::mbarrier_init(barriers + s * BARRIER_BYTES, 1);
      ptx::mbarrier_init(barriers + (STAGES + s) * BARRIER_BYTES, consumer_warps);
    }
  }

  __device__ __forceinline__ void wait_empty() const { ptx::mbarrier_wait(empty(), at.parity ^ 1); }
  __device__ __forceinline__ void wait_full(bool too_early = false) const {
    ptx::mbarrier_wait(full(), at.parity ^ static_cast<uint32_t>(too_early));
  }

  // By every lane of a warp that has read the stage; each CTA of the cluster that wrote to it is told.
  __device__ __forceinline__ void release(int cluster = 1) const {
    ptx::warp_sync();
    if (cluster == 1) {
      if (ptx::elect_one()) ptx::mbarrier_arrive(empty());
    } else if (threadIdx.x % 32 < cluster) {
      ptx::mbarrier_arrive_consumed(empty(), threadIdx.x % 32);
    }
  }
};

}  // namespace sm90
