// A pack: E neighbours of a row as they lie in memory, moved by accesses of up to 16 bytes.
#pragma once
#include <ptx/global.h>
#include <ptx/numeric.h>
#include <ptx/shared.h>

namespace rows {

template <class T, int E> struct Pack {
  static constexpr int WORDS = E * int(sizeof(T)) / 4;
  static constexpr int ACCESS = WORDS < 4 ? WORDS : 4;  // words of one access
  uint32_t word[WORDS];

  __device__ __forceinline__ T get(int i) const {
    if constexpr (sizeof(T) == 4) return ptx::bit_cast<T>(word[i]);
    else return ptx::bit_cast<T>(static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2))));
  }
  __device__ __forceinline__ void put(int i, T v) {
    if constexpr (sizeof(T) == 4) {
      word[i] = ptx::bit_cast<uint32_t>(v);
    } else {
      const uint32_t half = ptx::bit_cast<uint16_t>(v);
      word[i / 2] = i % 2 ? (word[i / 2] & 0xffffu) | (half << 16) : (word[i / 2] & 0xffff0000u) | half;
    }
  }
  __device__ __forceinline__ float operator[](int i) const { return ptx::to_float(get(i)); }
};

template <class T, int E> __device__ __forceinline__ Pack<T, E> to_pack(const float (&value)[E]) {
  Pack<T, E> out;
#pragma unroll
  for (int i = 0; i < out.WORDS; ++i) {
    if constexpr (sizeof(T) == 4) out.word[i] = ptx::bit_cast<uint32_t>(value[i]);
    else out.word[i] = ptx::pack<T>(value[2 * i], value[2 * i + 1]);
  }
  return out;
}

// Bit i: whether element n0 + i is one of the first `end`.
template <int E> __device__ __forceinline__ uint32_t bits_inside(int n0, int end) {
  const int from = n0 < 0 ? -n0 : 0;
  const int to = end - n0 < E ? (end > n0 ? end - n0 : 0) : E;
  return ((1u << to) - 1u) & ~((1u << from) - 1u);
}

template <int E> constexpr uint32_t ALL = (1u << E) - 1u;

// Which elements of a pack that begins before `end` are inside of the row; WHOLE: all of them.
template <int E, bool WHOLE> struct Inside {
  uint32_t bits;
  __device__ __forceinline__ Inside(int n0, int end) : bits(WHOLE ? 0 : bits_inside<E>(n0, end)) {}
  __device__ __forceinline__ bool operator[](int i) const { return WHOLE || (bits >> i & 1); }
};

// How a matrix is read: again by nobody; by another CTA, or by this one after it wrote it; or never written meanwhile.
enum class Read { Streaming, Coherent, Constant };

template <Read READ, class W> __device__ __forceinline__ W read_global(const W* p) {
  if constexpr (READ == Read::Streaming) return ptx::ld_global_streaming(p);
  else if constexpr (READ == Read::Coherent) return ptx::ld_global(p);
  else return ptx::ld_global_nc(p);
}

// Elements n0 … n0 + E - 1 of `row`, which has elements 0 … end - 1; zeros elsewhere. wide: these are aligned together.
// WHOLE: they are, in every pack, and of a pack that begins before `end` all are there.
template <class T, int E, Read READ, bool WHOLE = false>
__device__ __forceinline__ Pack<T, E> load(const T* row, int n0, int end, bool wide) {
  using Access = ptx::packet<uint32_t, Pack<T, E>::ACCESS>;
  Pack<T, E> out;
#pragma unroll
  for (int i = 0; i < out.WORDS; ++i) out.word[i] = 0;
  if (WHOLE ? n0 < end : wide && n0 >= 0 && n0 + E <= end) {
#pragma unroll
    for (int a = 0; a < out.WORDS / out.ACCESS; ++a) {
      const Access access = read_global<READ>(reinterpret_cast<const Access*>(row + n0) + a);
#pragma unroll
      for (int i = 0; i < out.ACCESS; ++i) out.word[a * out.ACCESS + i] = access[i];
    }
  } else if (!WHOLE && n0 < end) {
#pragma unroll
    for (int i = 0; i < E; ++i)
      if (n0 + i >= 0 && n0 + i < end) out.put(i, read_global<READ>(row + n0 + i));
  }
  return out;
}

template <class T, int E, bool WHOLE = false>
__device__ __forceinline__ void store(T* row, int n0, int end, bool wide, const float (&value)[E]) {
  using Access = ptx::packet<uint32_t, Pack<T, E>::ACCESS>;
  const Pack<T, E> pack = to_pack<T, E>(value);
  if (WHOLE ? n0 < end : wide && n0 >= 0 && n0 + E <= end) {
#pragma unroll
    for (int a = 0; a < pack.WORDS / pack.ACCESS; ++a) {
      Access access;
#pragma unroll
      for (int i = 0; i < pack.ACCESS; ++i) access[i] = pack.word[a * pack.ACCESS + i];
      ptx::st_global_streaming(reinterpret_cast<Access*>(row + n0) + a, access);
    }
  } else if (!WHOLE && n0 < end) {
#pragma unroll
    for (int i = 0; i < E; ++i)
      if (n0 + i >= 0 && n0 + i < end) ptx::st_global(row + n0 + i, pack.get(i));
  }
}

}  // namespace rows
