// Shared memory by 32-bit address, 1 to 16 bytes an access.
#pragma once
#include <ptx/types.h>

namespace ptx {

__device__ __forceinline__ uint32_t dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_bytes));
}

template <class T> __device__ __forceinline__ T ld_shared(uint32_t a) {
  if constexpr (sizeof(T) == 16) {
    packet<uint32_t, 4> w;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(a));
    return bit_cast<T>(w);
  } else if constexpr (sizeof(T) == 8) {
    uint64_t w;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(w) : "r"(a));
    return bit_cast<T>(w);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t w;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w) : "r"(a));
    return bit_cast<T>(w);
  } else if constexpr (sizeof(T) == 2) {
    uint16_t w;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(w) : "r"(a));
    return bit_cast<T>(w);
  } else {
    static_assert(sizeof(T) == 1, "1, 2, 4, 8 or 16 bytes");
    uint32_t w;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(w) : "r"(a));
    return bit_cast<T>(static_cast<uint8_t>(w));
  }
}

template <class T> __device__ __forceinline__ void st_shared(uint32_t a, T v) {
  if constexpr (sizeof(T) == 16) {
    const auto w = bit_cast<packet<uint32_t, 4>>(v);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"r"(a), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st.shared.u64 [%0], %1;" ::"r"(a), "l"(bit_cast<uint64_t>(v)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(bit_cast<uint32_t>(v)) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(a), "h"(bit_cast<uint16_t>(v)) : "memory");
  } else {
    static_assert(sizeof(T) == 1, "1, 2, 4, 8 or 16 bytes");
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(a), "r"(static_cast<uint32_t>(bit_cast<uint8_t>(v))) : "memory");
  }
}

}  // namespace ptx
