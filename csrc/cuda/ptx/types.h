// 16-bit number types and bit patterns; no instructions, so the emulator uses this header too.
#pragma once
#include <ptx/language.h>

#include <cstring>

namespace ptx {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

enum class ElementType { Bf16, Fp16, Fp32 };

template <class T> struct element_type;
template <> struct element_type<bf16> { static constexpr ElementType value = ElementType::Bf16; };
template <> struct element_type<fp16> { static constexpr ElementType value = ElementType::Fp16; };
template <> struct element_type<float> { static constexpr ElementType value = ElementType::Fp32; };

// N elements that move as one access: 16 bytes are packet<bf16, 8> or packet<float, 4>.
template <class T, int N> struct alignas(sizeof(T) * N) packet {
  T element[N];
  __host__ __device__ __forceinline__ T& operator[](int i) { return element[i]; }
  __host__ __device__ __forceinline__ const T& operator[](int i) const { return element[i]; }
};

template <class To, class From> __host__ __device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace ptx
