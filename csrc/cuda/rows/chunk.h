// A row in chunks: a thread holds PACKS packs of a chunk in registers. The first pass over a row runs through its
// chunks forwards, the second backwards: the last chunk is still in registers, those that fit come from shared memory,
// where each thread keeps its own, and the rest is read again, mostly from L2.
#pragma once
#include <params_rows.h>
#include <ptx/shared.h>
#include <rows/pack.h>
#include <rows/team.h>

namespace rows {

constexpr int FORWARD_BYTES = 64;      // of a row that a thread holds
constexpr int BACKWARD_ELEMENTS = 16;  // of each of two matrices, of weight, and of two sums

template <class T> constexpr int PACK = 16 / int(sizeof(T));  // elements of a pack, by the dtype of x

template <class T, int E, int PACKS, class Planted> struct Chunk {
  static constexpr int ACCESSES = Pack<T, E>::WORDS / 4;
  using Access = ptx::packet<uint32_t, 4>;
  Pack<T, E> pack[PACKS];

  // Chunk c of the row, which is not the last, as this thread has it, to shared memory and back.
  __device__ __forceinline__ void keep(int c) const {
#pragma unroll
    for (int i = 0; i < PACKS * ACCESSES; ++i) {
      Access access;
#pragma unroll
      for (int w = 0; w < 4; ++w) access[w] = pack[i / ACCESSES].word[i % ACCESSES * 4 + w];
      ptx::st_shared(address(c, i), access);
    }
  }
  __device__ __forceinline__ void recall(int c) {
#pragma unroll
    for (int i = 0; i < PACKS * ACCESSES; ++i) {
      const auto access = ptx::ld_shared<Access>(address(c, i));
#pragma unroll
      for (int w = 0; w < 4; ++w) pack[i / ACCESSES].word[i % ACCESSES * 4 + w] = access[w];
    }
  }
  // Between passes: makes the compiler convert again, so that halves, not fp32, are live across the reduction.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int v = 0; v < PACKS; ++v)
#pragma unroll
      for (int w = 0; w < Pack<T, E>::WORDS; ++w) asm volatile("" : "+r"(pack[v].word[w]));
  }

 private:
  __device__ __forceinline__ static uint32_t address(int c, int i) {
    const uint32_t thread = Planted::has(Bug::SharedKeep) ? threadIdx.x / 2 : threadIdx.x;
    return ptx::dynamic_shared() + REDUCTION_BYTES + ((c * PACKS * ACCESSES + i) * blockDim.x + thread) * 16;
  }
};

// First element of a thread's pack v of chunk c.
template <int E, int PACKS, class Planted>
__device__ __forceinline__ int pack_begin(const Team<Planted>& team, int c, int v, int shift) {
  return ((c * PACKS + v) * team.width() + team.place()) * E - shift;
}

}  // namespace rows
