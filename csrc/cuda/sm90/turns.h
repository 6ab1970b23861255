// Consumer warpgroups take turns on the tensor cores, so that the softmax of one runs beside the products of the others
// ("ping-pong"). Warpgroup w waits at barrier 1 + w, where its predecessor arrives.
#pragma once
#include <ptx/named_barrier.h>

namespace sm90 {

template <int CONSUMERS, bool ON>
struct Turns {
  static constexpr bool TAKEN = ON && CONSUMERS > 1;
  int w;

  __device__ __forceinline__ explicit Turns(int w) : w(w) {
    if (TAKEN && w == CONSUMERS - 1) ptx::barrier_arrive(1, 256);  // the first turn is that of warpgroup 0
  }
  __device__ __forceinline__ void begin() const {
    if (TAKEN) ptx::barrier_sync(1 + w, 256);
  }
  __device__ __forceinline__ void end() const {
    if (TAKEN) ptx::barrier_arrive(1 + (w == CONSUMERS - 1 ? 0 : w + 1), 256);
  }
  // Nobody takes the turn that the last warpgroup passed on at the end: the barrier is left empty.
  __device__ __forceinline__ void finish() const {
    if (TAKEN && w == 0) ptx::barrier_sync(1, 256);
  }
};

// The 128 threads of consumer warpgroup w.
__device__ __forceinline__ void warpgroup_sync(int w) { ptx::barrier_sync(4 + w, 128); }

}  // namespace sm90
