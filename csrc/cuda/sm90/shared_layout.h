// Where everything lies in the shared memory of the attention forward.
#pragma once
#include <ptx/shared.h>
#include <sm90/attention_config.h>
#include <sm90/pipeline.h>

namespace sm90 {

template <class Config>
struct SharedLayout {
  static constexpr AttentionConfig C = Config::value;
  static constexpr uint32_t RING_BYTES = Ring<C.STAGES>::BYTES;
  static constexpr uint32_t SINGLE_BYTES = Ring<1>::BYTES;
  static constexpr uint32_t K = C.consumers() * C.q_bytes();
  static constexpr uint32_t V = K + C.STAGES * C.k_bytes();
  static constexpr uint32_t O = C.o_apart() ? V + C.STAGES * C.v_bytes() : 0;
  static constexpr uint32_t CONTROL = C.shared_bytes() - C.control_bytes();
  static constexpr uint32_t TILES = 2, TILE_BYTES = 32;  // announced: the current one, and the one that is loaded next
  static constexpr uint32_t TILE_RING = CONTROL + TILES * TILE_BYTES, TILE_RING_BYTES = Ring<TILES>::BYTES;
  static constexpr uint32_t K_RING = TILE_RING + TILE_RING_BYTES, V_RING = K_RING + RING_BYTES;
  static constexpr uint32_t Q_RINGS = V_RING + RING_BYTES;
  static_assert(Q_RINGS + C.consumers() * SINGLE_BYTES <= CONTROL + C.control_bytes(), "control_bytes is too small");

  uint32_t base = ptx::dynamic_shared();

  // (64, D) of consumer w, (BLOCK_N, D), (BLOCK_N, D_v) of a stage, (64, D_v): each as panels of one swizzle width.
  __device__ __forceinline__ uint32_t q(int w) const { return base + w * C.q_bytes(); }
  __device__ __forceinline__ uint32_t k(int stage) const { return base + K + stage * C.k_bytes(); }
  __device__ __forceinline__ uint32_t v(int stage) const { return base + V + stage * C.v_bytes(); }
  __device__ __forceinline__ uint32_t o(int w) const {
    return base + O + w * (C.o_apart() ? C.o_bytes() : C.q_bytes());
  }

  __device__ __forceinline__ uint32_t tile(int i) const { return base + CONTROL + i * TILE_BYTES; }
  __device__ __forceinline__ Ring<TILES> tile_ring() const { return Ring<TILES>(base + TILE_RING); }
  __device__ __forceinline__ Ring<C.STAGES> k_ring() const { return Ring<C.STAGES>(base + K_RING); }
  __device__ __forceinline__ Ring<C.STAGES> v_ring() const { return Ring<C.STAGES>(base + V_RING); }
  __device__ __forceinline__ Ring<1> q_ring(int w) const { return Ring<1>(base + Q_RINGS + w * SINGLE_BYTES); }
};

}  // namespace sm90
