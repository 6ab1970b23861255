// Global memory, 1 to 16 bytes an access.
//   ld_global            through L1, coherent with what this kernel writes
//   ld_global_nc         read-only for the life of the kernel
//   ld_global_streaming  read-only and read once: not kept in L1
//   st_global_streaming  not read again soon: not kept in L1
#pragma once
#include <ptx/types.h>

namespace ptx {

#define FASTATTN_GLOBAL_LOAD(NAME, OPCODE)                                                                             \
  template <class T> __device__ __forceinline__ T NAME(const T* p) {                                                   \
    if constexpr (sizeof(T) == 16) {                                                                                   \
      packet<uint32_t, 4> w;                                                                                           \
      asm volatile(OPCODE ".v4.u32 {%0, %1, %2, %3}, [%4];"                                                            \
                   : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));                                         \
      return bit_cast<T>(w);                                                                                           \
    } else if constexpr (sizeof(T) == 8) {                                                                             \
      uint64_t w;                                                                                                      \
      asm volatile(OPCODE ".u64 %0, [%1];" : "=l"(w) : "l"(p));                                                        \
      return bit_cast<T>(w);                                                                                           \
    } else if constexpr (sizeof(T) == 4) {                                                                             \
      uint32_t w;                                                                                                      \
      asm volatile(OPCODE ".u32 %0, [%1];" : "=r"(w) : "l"(p));                                                        \
      return bit_cast<T>(w);                                                                                           \
    } else if constexpr (sizeof(T) == 2) {                                                                             \
      uint16_t w;                                                                                                      \
      asm volatile(OPCODE ".u16 %0, [%1];" : "=h"(w) : "l"(p));                                                        \
      return bit_cast<T>(w);                                                                                           \
    } else {                                                                                                           \
      static_assert(sizeof(T) == 1, "1, 2, 4, 8 or 16 bytes");                                                         \
      uint32_t w;                                                                                                      \
      asm volatile(OPCODE ".u8 %0, [%1];" : "=r"(w) : "l"(p));                                                         \
      return bit_cast<T>(static_cast<uint8_t>(w));                                                                     \
    }                                                                                                                  \
  }

#define FASTATTN_GLOBAL_STORE(NAME, OPCODE)                                                                            \
  template <class T> __device__ __forceinline__ void NAME(T* p, T v) {                                                 \
    if constexpr (sizeof(T) == 16) {                                                                                   \
      const auto w = bit_cast<packet<uint32_t, 4>>(v);                                                                 \
      asm volatile(OPCODE ".v4.u32 [%0], {%1, %2, %3, %4};"                                                            \
                   ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");                                   \
    } else if constexpr (sizeof(T) == 8) {                                                                             \
      asm volatile(OPCODE ".u64 [%0], %1;" ::"l"(p), "l"(bit_cast<uint64_t>(v)) : "memory");                           \
    } else if constexpr (sizeof(T) == 4) {                                                                             \
      asm volatile(OPCODE ".u32 [%0], %1;" ::"l"(p), "r"(bit_cast<uint32_t>(v)) : "memory");                           \
    } else if constexpr (sizeof(T) == 2) {                                                                             \
      asm volatile(OPCODE ".u16 [%0], %1;" ::"l"(p), "h"(bit_cast<uint16_t>(v)) : "memory");                           \
    } else {                                                                                                           \
      static_assert(sizeof(T) == 1, "1, 2, 4, 8 or 16 bytes");                                                         \
      asm volatile(OPCODE ".u8 [%0], %1;" ::"l"(p), "r"(static_cast<uint32_t>(bit_cast<uint8_t>(v))) : "memory");      \
    }                                                                                                                  \
  }

FASTATTN_GLOBAL_LOAD(ld_global, "ld.global")
FASTATTN_GLOBAL_LOAD(ld_global_nc, "ld.global.nc")
FASTATTN_GLOBAL_LOAD(ld_global_streaming, "ld.global.nc.L1::no_allocate")
FASTATTN_GLOBAL_STORE(st_global, "st.global")
FASTATTN_GLOBAL_STORE(st_global_streaming, "st.global.L1::no_allocate")
#undef FASTATTN_GLOBAL_LOAD
#undef FASTATTN_GLOBAL_STORE

// Relaxed, gpu scope; returns the old value. T: int32_t, uint32_t, float.
template <class T> __device__ __forceinline__ T atomic_add(T* p, T v) { return atomicAdd(p, v); }

__device__ __forceinline__ void thread_fence() { __threadfence(); }

}  // namespace ptx
